"""Networks by name, without the libraries: stand-ins take their place in `sys.modules`."""

import io
import os
import pickle
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from pseudolabel.cli import _models
from pseudolabel.cli._console import UserError
from pseudolabel.cli._models import class_places, load_classifier

NAMES = ["tench, Tinca tinca", "crane", "crane", "cat", "big_dog", "cat, tiger"]


class Net(nn.Module):
    """As of transformers: a config, and an output with logits."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.config = config
        self.body = nn.Conv2d(3, 4, 3, padding=1)
        self.classifier = nn.Linear(4, config.num_labels)

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.classifier(self.body(pixel_values).mean((2, 3))))


class Config(SimpleNamespace):
    @property
    def num_labels(self) -> int:
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, count: int) -> None:
        self.id2label = {place: f"LABEL_{place}" for place in range(count)}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What a stand-in of transformers finds, and what it was asked."""
    found = SimpleNamespace(names=NAMES, missing=[], processor={}, asked=[])

    def config(name: str, **settings: object) -> Config:
        found.asked.append((name, settings))
        return Config(id2label=dict(enumerate(found.names)), image_size=32)

    def model(name: str, *, config: Config, output_loading_info: bool, **settings: object) -> object:
        assert output_loading_info
        found.asked.append((name, settings))
        torch.manual_seed(1)
        return Net(config).half(), {"missing_keys": found.missing}

    def processor(_name: str, **_settings: object) -> tuple[dict, dict]:
        if found.processor is None:
            raise OSError("no preprocessor_config.json")
        return found.processor, {}

    fake = SimpleNamespace(
        AutoConfig=SimpleNamespace(from_pretrained=config),
        AutoModelForImageClassification=SimpleNamespace(
            from_pretrained=model, from_config=lambda config, trust_remote_code: Net(config)
        ),
        ImageProcessingMixin=SimpleNamespace(get_image_processor_dict=processor),
    )
    monkeypatch.setitem(sys.modules, "transformers", fake)
    return found


class TimmNet(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.num_classes = count
        self.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2), "input_size": (3, 48, 64)}
        self.pretrained_cfg |= {"num_classes": 2, "label_names": ["cat", "dog"], "classifier": "fc"}
        self.fc = nn.Linear(3, count) if count else nn.Identity()


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    asked = []

    def create_model(name: str, *, pretrained: bool, num_classes: int = 2, **settings: object) -> nn.Module:
        asked.append((name, pretrained, num_classes, settings))
        if name == "unknown":
            raise RuntimeError("Unknown model (unknown)")
        if settings:
            raise TypeError(f"unexpected keyword argument {next(iter(settings))!r}")
        return TimmNet(0 if name == "backbone" and num_classes == 2 else num_classes)

    data = SimpleNamespace(infer_imagenet_subset=lambda told: None)
    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create_model, data=data))
    return asked


# Classes


@pytest.mark.parametrize(
    ("wanted", "places"),
    [
        (["BIG dog", "Tinca_tinca"], [4, 0]),
        (["tench"], [0]),
        (["tench, tinca tinca"], [0]),
        (["cat"], [3]),  # in full, before the synonym
        (["tiger"], [5]),
        (["1", "2", "3", "4", "5", "6"], [0, 1, 2, 3, 4, 5]),  # no names: in order
    ],
)
def test_classes_are_found_by_name(wanted, places):
    assert class_places(wanted, NAMES, 6) == places


def test_missing_and_doubtful_classes_are_listed():
    with pytest.raises(UserError) as error:
        class_places(["cat", "lynx", "crane", "okapi"], NAMES, 6)
    said = str(error.value)
    assert "lacks 2 of the labels' classes: lynx, okapi; it has more than one class for crane" in said
    assert "it knows 6, such as tench, Tinca tinca | crane" in said


@pytest.mark.parametrize("names", [None, ["cat"]])
def test_without_names_classes_go_in_order(names):
    assert class_places(["cat", "dog"], names, 2) == [0, 1]
    with pytest.raises(UserError, match="the classifier has 3 classes, the labels have 2: cat, dog"):
        class_places(["cat", "dog"], names, 3)


# One's own


def test_own_network_needs_weights():
    with pytest.raises(UserError, match="--weights: expected a file"):
        load_classifier("pseudolabel.cli.demo:classifier", None)


def test_own_network_may_name_its_classes_and_size(tmp_path, monkeypatch):
    (tmp_path / "own_named.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    net = nn.Linear(3, 2)\n"
        "    net.classes, net.image_size = ['cat', 'dog'], (32, 48)\n"
        "    return net\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "w.pt")
    found = load_classifier("own_named:make", str(tmp_path / "w.pt"))
    assert found.own
    assert (found.classes, found.size, found.mean) == (["cat", "dog"], 48, None)


# transformers


def test_hf(hub):
    hub.processor = {"image_mean": [0.1, 0.2, 0.3], "image_std": 0.5, "rescale_factor": 0.00392156862745098}
    found = load_classifier("hf:someone/net", None)
    assert [name for name, _ in hub.asked] == ["someone/net"] * 2
    assert all(s == {"trust_remote_code": False, "local_files_only": False} for _, s in hub.asked)
    assert not found.own
    assert (found.classes, found.mean, found.std, found.size) == (NAMES, (0.1, 0.2, 0.3), (0.5,) * 3, 32)
    assert found.model.classifier.weight.dtype == torch.float32


def test_hf_folder_asks_no_hub(hub, tmp_path):
    load_classifier(f"hf:{tmp_path}", None)
    assert all(settings["local_files_only"] for _, settings in hub.asked)


def test_hf_without_names_or_processor(hub):
    hub.names, hub.processor = ["LABEL_0", "LABEL_1"], None
    found = load_classifier("hf:someone/net", None)
    assert (found.classes, found.mean, found.std) == (None, None, None)
    hub.processor = {"do_normalize": False}
    found = load_classifier("hf:someone/net", None)
    assert (found.mean, found.std) == ((0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize(
    ("processor", "said"),
    [
        ({"include_top": True}, "include_top"),
        ({"do_flip_channel_order": True}, "do_flip_channel_order"),
        ({"rescale_factor": 1 / 127.5}, "scale"),
        ({"do_rescale": False}, "scale"),
    ],
)
def test_hf_that_wants_other_images_is_refused(hub, processor, said):
    hub.processor = processor
    with pytest.raises(UserError, match=rf"in a way of its own \({said}\)"):
        load_classifier("hf:someone/net", None)


def test_hf_without_a_trained_classifier_is_refused(hub):
    hub.missing = ["classifier.weight", "classifier.bias"]
    with pytest.raises(UserError, match=r"lacks 2 weights, such as classifier\.bias, classifier\.weight"):
        load_classifier("hf:someone/clip", None)


@pytest.mark.parametrize("count", [6, 2])
def test_hf_with_weights_of_a_file(hub, tmp_path, count):
    """The file says how many classes there are; other than the config's have no names."""
    state = Net(Config(id2label=dict.fromkeys(range(count)))).state_dict()
    torch.save(state, tmp_path / "w.pt")
    found = load_classifier("hf:someone/net", str(tmp_path / "w.pt"))
    assert all(torch.equal(value, state[name]) for name, value in found.model.state_dict().items())
    assert found.classes == (NAMES if count == 6 else None)
    assert len(hub.asked) == 1  # the config alone


@pytest.mark.parametrize("lost", [[], ["body.bias"]])
def test_hf_with_a_file_of_another_release(hub, tmp_path, monkeypatch, lost):
    """The library knows how its networks' layers were named before; a file that it cannot fit is refused."""
    state = Net(Config(id2label=dict.fromkeys(range(6)))).state_dict()
    asked = []

    def from_pretrained(name: None, *, config: Config, state_dict: dict, output_loading_info: bool) -> object:
        asked.append((name, sorted(state_dict), output_loading_info))
        model = Net(config)
        model.load_state_dict({key.removeprefix("old."): value for key, value in state_dict.items()})
        return model, {"missing_keys": lost, "unexpected_keys": []}

    monkeypatch.setattr(Net, "from_pretrained", from_pretrained, raising=False)
    torch.save(
        {f"old.{key}" if "body" in key else key: value for key, value in state.items()}, tmp_path / "w.pt"
    )
    if lost:
        with pytest.raises(UserError, match=r"does not fit the model; it lacks 2: body\.weight, body\.bias"):
            load_classifier("hf:someone/net", str(tmp_path / "w.pt"))
    else:
        found = load_classifier("hf:someone/net", str(tmp_path / "w.pt"))
        assert all(torch.equal(value, state[name]) for name, value in found.model.state_dict().items())
    assert asked == [
        (None, ["classifier.bias", "classifier.weight", "old.body.bias", "old.body.weight"], True)
    ]


def test_hub_out_of_reach(hub, monkeypatch):
    def fail(*_args: object, **_settings: object) -> None:
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr(sys.modules["transformers"].AutoConfig, "from_pretrained", fail)
    with pytest.raises(UserError, match=r"hf:someone/net is no folder here, and cannot be had .* connect to"):
        load_classifier("hf:someone/net", None)


@pytest.mark.parametrize("name", ["hf:someone/net", "timm:resnet18"])
def test_library_that_is_not_there(monkeypatch, name):
    library = {"hf": "transformers", "timm": "timm"}[name.partition(":")[0]]
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=f"cannot import {library} .*pip install {library}"):
        load_classifier(name, None)


# timm


def test_timm(timm):
    found = load_classifier("timm:net", None)
    assert timm == [
        ("net", True, 2, {"dynamic_img_size": True}),
        ("net", True, 2, {"strict_img_size": False}),
        ("net", True, 2, {}),
    ]
    assert (found.classes, found.mean, found.size) == (["cat", "dog"], (0.5, 0.5, 0.5), 64)


def test_timm_folder(timm, tmp_path):
    load_classifier(f"timm:{tmp_path}", None)
    assert timm[-1][0] == f"local-dir:{tmp_path}"


@pytest.mark.parametrize("name", ["net", "backbone"])
def test_timm_with_weights_of_a_file(timm, tmp_path, name):
    state = nn.Linear(3, 5).state_dict()
    torch.save({f"fc.{key}": value for key, value in state.items()}, tmp_path / "w.pt")
    found = load_classifier(f"timm:{name}", str(tmp_path / "w.pt"))
    assert torch.equal(found.model.fc.weight, state["weight"])
    assert found.classes is None
    assert not any(pretrained for _, pretrained, _, _ in timm)


def test_timm_errors(timm):
    with pytest.raises(UserError, match=r"timm:unknown is no folder here, .*Unknown model"):
        load_classifier("timm:unknown", None)
    with pytest.raises(UserError, match="timm:backbone has no classifier"):
        load_classifier("timm:backbone", None)


# Weights


def test_safetensors(tmp_path, monkeypatch):
    path, read = tmp_path / "w.safetensors", []
    state = nn.Linear(3, 2).state_dict()
    fake = SimpleNamespace(load_file=lambda file: read.append(file) or state)
    monkeypatch.setitem(sys.modules, "safetensors", SimpleNamespace(torch=fake))
    monkeypatch.setitem(sys.modules, "safetensors.torch", fake)
    with pytest.raises(FileNotFoundError):
        _models.load_weights(nn.Linear(3, 2), path)
    path.write_bytes(b"")
    model = _models.load_weights(nn.Linear(3, 2), path)
    assert read == [path]
    assert torch.equal(model.weight, state["weight"])
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError, match="pip install safetensors"):
        _models.load_weights(nn.Linear(3, 2), path)


def linear(**changes):
    return nn.Linear(3, 2).state_dict() | changes


ONES = torch.ones(2)
ODD = {  # what stands in the place of the bias, and what is said of it
    "NaN": (lambda: torch.tensor([0, torch.nan]), "bias has values that are not finite in torch.float32"),
    "infinity": (lambda: torch.tensor([0, -torch.inf]), "bias has values that are not finite"),
    "too large for a float": (
        lambda: torch.tensor([0, 1e300]).double(),
        "bias has values that are not finite",
    ),
    "complex": (lambda: ONES * 1j, r"bias is of torch\.complex64, the model's own of torch\.float32"),
    "bool": (lambda: ONES > 0, "bias is of torch.bool"),
    "whole numbers": (ONES.long, "bias is of torch.int64"),
    "sparse": (
        ONES.to_sparse,
        "bias: expected a dense tensor with values, got one of layout torch.sparse_coo",
    ),
    "nested": (
        lambda: torch.nested.nested_tensor([ONES]),
        "bias: expected a dense tensor with values|cannot read these weights",
    ),
    "quantised": (
        lambda: torch.quantize_per_tensor(ONES, 1, 0, torch.qint8),
        "bias: expected a dense tensor with values, got .*torch.qint8",
    ),
    "meta": (lambda: ONES.to("meta"), "bias: expected a dense tensor with values, got .*on meta"),
    "a number": (lambda: 3, "bias: expected a dense tensor with values, got int"),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.filterwarnings("ignore")
def test_weights_that_cannot_be_used(tmp_path, name):
    value, message = ODD[name]
    torch.save(linear(bias=value()), tmp_path / "w.pt")
    model = nn.Linear(3, 2)
    before = model.bias.clone()
    with pytest.raises(UserError, match=rf"w\.pt: .*{message}"):
        _models.load_weights(model, tmp_path / "w.pt")
    assert torch.equal(model.bias, before)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (linear() | {3: ONES}, r"expected a state dict \(name -> tensor\), got the name 3"),
        ([ONES], r"expected a state dict \(name -> tensor\), got list"),
    ],
)
def test_weights_that_are_no_state_dict(tmp_path, content, message):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(UserError, match=rf"w\.pt: .*{message}"):
        _models.load_weights(nn.Linear(3, 2), tmp_path / "w.pt")


@pytest.mark.parametrize("name", ["NaN", "too large for a float", "complex", "bool", "whole numbers"])
def test_npz_that_cannot_be_used(tmp_path, name):
    value, message = ODD[name]
    state = {key: each.numpy() for key, each in linear(bias=value()).items()}
    np.savez(tmp_path / "w.npz", **state)
    with pytest.raises(UserError, match=rf"w\.npz: .*{message}"):
        _models.load_weights(nn.Linear(3, 2), tmp_path / "w.npz")


class Masked(nn.BatchNorm1d):
    """With buffers of other kinds: a count, a mask of minus infinity."""

    def __init__(self) -> None:
        super().__init__(2)
        self.register_buffer("mask", torch.tensor([0, -torch.inf]))


def test_weights_of_other_precision_and_buffers(tmp_path):
    state = Masked().state_dict() | {"weight": torch.tensor([0.5, 2]).half(), "bias": torch.ones(2).double()}
    state["num_batches_tracked"] = torch.tensor(7, dtype=torch.int32)
    torch.save({"state_dict": state}, tmp_path / "w.pth")
    np.savez_compressed(tmp_path / "w.npz", **{name: value.numpy() for name, value in state.items()})
    for name in ("w.pth", "w.npz"):
        model = _models.load_weights(Masked(), tmp_path / name)
        assert model.weight.tolist() == [0.5, 2]
        assert model.weight.dtype == model.bias.dtype == torch.float32
        assert model.num_batches_tracked == 7
        assert model.mask.tolist() == [0, -torch.inf]
    for odd in ({"mask": -state["mask"]}, {"num_batches_tracked": torch.tensor(7.5)}):
        torch.save(state | odd, tmp_path / "w.pt")
        with pytest.raises(UserError, match=rf"w\.pt: cannot be used: {next(iter(odd))} "):
            _models.load_weights(Masked(), tmp_path / "w.pt")


def test_a_network_that_loads_in_a_way_of_its_own(tmp_path):
    class Own(nn.Linear):
        def _load_from_state_dict(self, *_: object) -> None:
            raise KeyError("x")

    torch.save(linear(), tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"w\.pt: does not fit the model: 'x'"):
        _models.load_weights(Own(3, 2), tmp_path / "w.pt")


@pytest.mark.parametrize("lies", [False, True])
def test_npz_is_not_unpacked_unless_it_may_fit(tmp_path, monkeypatch, lies):
    """600 MB in half a megabyte."""
    path, header = tmp_path / "w.npz", io.BytesIO()
    count = 6 if lies else 150_000_000
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (count,)})
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("weight.npy", "w") as member,
    ):
        member.write(header.getvalue())
        for _ in range(600):
            member.write(bytes(10**6))
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("unpacked"))
    with pytest.raises(UserError, match=r"w\.npz: .* take 600\d+ bytes, more than the model can take"):
        _models.load_weights(nn.Linear(3, 2), path)


@pytest.mark.parametrize("member", [b"no array", pickle.dumps(3), b""])
def test_npz_of_something_else(tmp_path, member):
    with zipfile.ZipFile(tmp_path / "w.npz", "w") as archive:
        archive.writestr("weight.npy", member)
    with pytest.raises(UserError, match=r"w\.npz: cannot read these weights without running code"):
        _models.load_weights(nn.Linear(3, 2), tmp_path / "w.npz")


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX files")
@pytest.mark.parametrize("suffix", [".pt", ".npz", ".safetensors"])
def test_weights_in_a_pipe(tmp_path, suffix):
    os.mkfifo(tmp_path / f"w{suffix}")
    with pytest.raises(UserError, match=rf"w\{suffix}: .* expected a regular file, got a pipe"):
        _models.load_weights(nn.Linear(3, 2), tmp_path / f"w{suffix}")


def test_safetensors_of_a_hostile_header(tmp_path):
    pytest.importorskip("safetensors")
    for header in (
        b'{"weight":{"dtype":"F32","shape":[1000000,1000000],"data_offsets":[0,4000000000000]}}',
        b'{"weight":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},"b":{"dtype":"F32","shape":[6],"data_offsets":[0,24]}}',
        b"[" * 100_000,
    ):
        (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(24))
        with pytest.raises(UserError, match=r"w\.safetensors: cannot read these weights"):
            _models.load_weights(nn.Linear(3, 2), tmp_path / "w.safetensors")


def test_long_names_are_cut(tmp_path):
    torch.save(linear(**{"x" * 10**6: torch.ones(2)}), tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"unknown to the model, 1: xxx") as error:
        _models.load_weights(nn.Linear(3, 2), tmp_path / "w.pt")
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("name", ["hf:someone/net", "timm:net"])
def test_networks_whose_own_weights_are_not_finite(hub, timm, monkeypatch, name):
    real = nn.Linear.reset_parameters

    def diverged(layer: nn.Linear) -> None:
        real(layer)
        layer.bias.data[0] = torch.nan

    monkeypatch.setattr(nn.Linear, "reset_parameters", diverged)
    with pytest.raises(UserError, match=rf"--model: {name} has parameters that are not finite: \w+\.bias"):
        load_classifier(name, None)


# Sizes


SIDES = [0, -5, 4097, 10**6, 224.0, "224", True, [], [32, -1], [32, [32]], {"height": 32}, [3, 32, 10**6]]


@pytest.mark.parametrize("side", SIDES, ids=str)
def test_image_sizes_that_nobody_can_try(hub, monkeypatch, side):
    """They come from a file, `config.json`, and the network is tried with an image of that size."""
    real = sys.modules["transformers"].AutoConfig.from_pretrained

    def config(name: str, **settings: object) -> Config:
        found = real(name, **settings)
        found.image_size = side
        return found

    monkeypatch.setattr(sys.modules["transformers"].AutoConfig, "from_pretrained", config)
    built = len(hub.asked)
    with pytest.raises(
        UserError, match=r"--model: expected an image_size of 1 to 4096 pixels, got "
    ) as error:
        load_classifier("hf:someone/net", None)
    assert repr(side) in str(error.value)
    assert len(hub.asked) == built + 1  # the configuration, and no network


@pytest.mark.parametrize(("side", "size"), [(None, 224), (4096, 4096), ([32, 48], 48), ((32, 48), 48)])
def test_image_sizes(hub, monkeypatch, side, size):
    real = sys.modules["transformers"].AutoConfig.from_pretrained
    monkeypatch.setattr(
        sys.modules["transformers"].AutoConfig,
        "from_pretrained",
        lambda name, **settings: vars(found := real(name, **settings)).update(image_size=side) or found,
    )
    assert load_classifier("hf:someone/net", None).size == size


@pytest.mark.parametrize("told", [5_000, (3, 48, 10**6), (3, -1, 48)])
def test_image_sizes_of_timm(timm, monkeypatch, told):
    real = sys.modules["timm"].create_model

    def create_model(name: str, **settings: object) -> nn.Module:
        model = real(name, **settings)
        model.pretrained_cfg["input_size"] = told
        return model

    monkeypatch.setattr(sys.modules["timm"], "create_model", create_model)
    with pytest.raises(UserError, match="--model: expected an image_size of 1 to 4096 pixels"):
        load_classifier("timm:net", None)


# Where `module:function` is looked for


def test_current_folder_comes_last(tmp_path, monkeypatch):
    """A folder of photos may hold a module called like one of the library's, or the network's."""
    for name in ("colorsys", "own_module_here"):
        (tmp_path / f"{name}.py").write_text("from torch import nn\ndef make(): return nn.Linear(3, 2)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    before = list(sys.path)
    with pytest.raises(
        UserError, match=r"--model: 'colorsys' \(.*python.*colorsys\.py\) has no function 'make'"
    ):
        _models.load_model("colorsys:make")
    assert isinstance(_models.load_model("own_module_here:make"), nn.Linear)
    assert sys.path == [*before, str(tmp_path)]
    sys.modules.pop("own_module_here")


class Harm:
    def __reduce__(self):
        return (os.mkdir, ("should_not_be_made",))


@pytest.mark.parametrize("name", ["hf:someone/net", "timm:net"])
def test_weights_are_not_unpickled(hub, timm, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    torch.save({"fc.weight": Harm()}, "w.pt")
    with pytest.raises(UserError, match="without running code"):
        load_classifier(name, "w.pt")
    assert not Path("should_not_be_made").exists()
