import copy
import errno
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pseudolabel import io, masks, recipes
from pseudolabel.cam import CAM, GradCAM, infer_response_map, multi_scale_cam, normalize_cam
from pseudolabel.cli import main
from pseudolabel.cli._models import load_model, load_weights
from pseudolabel.cli._scenes import CLASSES
from pseudolabel.cli.demo import classifier
from pseudolabel.refine import CRF_PRESETS, dense_crf

MODEL = "pseudolabel.cli.demo:classifier"
MEAN, STD = (
    torch.tensor(values).view(1, 3, 1, 1) for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
)


def made(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def maps_of(data, name, scales=(1.0,), flip=True):
    """Raw maps of all classes, the straight way."""
    model = load_weights(classifier(), data.weights)
    image = io.read_image(data.images / f"{name}.png")[None]
    labels = io.read_labels(data.csv)[name][None]
    with torch.no_grad(), CAM(model) as cam:
        return image, multi_scale_cam(cam, (image - MEAN) / STD, labels, scales, flip), labels


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--method", "pmm", "--crf"], recipes.pmm),
        (["--alpha", "3"], lambda i, m, y: recipes.pmm(i, m, y, alpha=3, crf=None)),
        (
            ["--method", "cam", "--background", "0.4"],
            lambda i, m, y: masks.scores_to_mask(masks.constant_background(normalize_cam(m), 0.4)),
        ),
        (
            ["--method", "cam", "--crf"],
            lambda i, m, y: masks.scores_to_mask(
                dense_crf(i, masks.constant_background(normalize_cam(m), 0.15), **CRF_PRESETS["psa"])
            ),
        ),
    ],
)
def test_masks_are_those_of_the_parts(data, more, expected):
    assert main(data.generate(*more)) == 0
    assert sorted(made(data.out)) == [f"{name}.png" for name in data.names]
    for name in data.names:
        mask = io.read_mask(data.out / f"{name}.png")
        wanted = expected(*maps_of(data, name))[0]
        # With a CRF, absent classes are labels of probability 1e-5 there, and no labels at all here.
        assert (mask == wanted).double().mean() > (0.97 if "--crf" in more else 1 - 1e-9), name


@pytest.mark.parametrize(
    ("more", "background", "settings"),
    [
        ([], 0.2, {"scales": (1.0,)}),
        (["--background", "0.5", "--scales", "1", "0.5"], 0.5, {"scales": (1.0, 0.5)}),
        (["--no-flip"], 0.2, {"scales": (1.0,), "flip": False}),
    ],
)
def test_infercam(data, more, background, settings):
    cams = data.root / "cams"
    assert main(data.generate("--method", "infercam", "--save-cams", str(cams), *more)) == 0
    for name in data.names:
        image = io.read_image(data.images / f"{name}.png")[None]
        labels = io.read_labels(data.csv)[name][None]
        cam = CAM(load_weights(classifier(), data.weights))
        maps = infer_response_map(cam, (image - MEAN) / STD, labels, **settings).response
        wanted = masks.scores_to_mask(masks.constant_background(normalize_cam(maps), background))[0]
        # The present classes alone, and all: rounding may differ.
        assert (io.read_mask(data.out / f"{name}.png") == wanted).double().mean() > 0.999, name
        stored = io.read_cam(cams / f"{name}.npz").dense(7).float()
        assert (stored - maps[0]).abs().mean() < 1e-3


def test_scales_flip_mean_and_std_reach_the_network(data):
    assert (
        main(data.generate("--scales", "0.5", "1", "--no-flip", "--save-cams", str(data.root / "cams"))) == 0
    )
    for name in data.names:
        _, maps, labels = maps_of(data, name, scales=(0.5, 1.0), flip=False)
        stored = io.read_cam(data.root / "cams" / f"{name}.npz")
        assert torch.equal(stored.keys, labels[0].nonzero()[:, 0])
        assert torch.allclose(stored.dense(7).float(), normalize_cam(maps)[0], atol=1e-3)
    before = made(data.out)
    assert main(data.generate("--mean", "0", "0", "0", "--std", "1", "1", "1", "--overwrite")) == 0
    assert made(data.out) != before


def test_any_number_of_workers_gives_the_same_files(data):
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        for workers in ("1", "4"):
            assert main(data.generate("--workers", workers, "--crf", out=data.root / workers)) == 0
            # As the caller had it, in threads that start later, too.
            with ThreadPoolExecutor(1) as pool:
                assert pool.submit(torch.get_num_threads).result() == torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    assert made(data.root / "1") == made(data.root / "4")


def test_goes_on_where_it_stopped(data, capsys):
    assert main(data.generate()) == 0
    before = made(data.out)
    (data.out / "photo1.png").unlink()
    (data.out / "photo2.png").write_bytes(before["photo3.png"])  # made here, and of another photo
    (data.out / "photo3.png").unlink()
    times = {name: (data.out / name).stat().st_mtime_ns for name in ("photo0.png", "photo4.png")}
    capsys.readouterr()
    assert main(data.generate()) == 0
    assert "3 masks made, 2 were there already" in capsys.readouterr().err
    assert made(data.out) == before
    assert times == {name: (data.out / name).stat().st_mtime_ns for name in times}
    assert main(data.generate("--overwrite")) == 0
    assert "5 masks made" in capsys.readouterr().err


def test_a_corrected_label_makes_its_mask_anew(data, capsys):
    assert main(data.generate("--alpha", "32")) == 0
    labels = data.labels.clone()
    shown = io.read_mask(data.out / "photo0.png").unique()
    labels[0, int(shown[-1]) - 1] = False
    data.write_labels(data.names, labels)
    capsys.readouterr()
    assert main(data.generate("--alpha", "32")) == 0
    assert "1 masks made, 4 were there already" in capsys.readouterr().err
    assert int(shown[-1]) not in io.read_mask(data.out / "photo0.png")


def test_masks_of_other_settings_are_not_mixed(data, capsys):
    assert main(data.generate()) == 0
    before = made(data.out)
    assert main(data.generate("--alpha", "3")) == 2
    err = capsys.readouterr().err
    assert "'alpha': 11" in err
    assert "--overwrite" in err
    assert made(data.out) == before
    (data.out / "pseudolabel.json").write_text("{")
    assert main(data.generate()) == 2
    assert "pseudolabel.json" in capsys.readouterr().err
    (data.out / "pseudolabel.json").unlink()
    assert main(data.generate()) == 2
    assert "made in an unknown way" in capsys.readouterr().err
    assert made(data.out) == before
    assert main(data.generate("--alpha", "3", "--overwrite")) == 0
    assert json.loads((data.out / "pseudolabel.json").read_text())["settings"]["alpha"] == 3


def test_what_an_interrupted_overwrite_leaves_is_not_taken_for_its_own(data, capsys, monkeypatch):
    assert main(data.generate("--alpha", "3", out=data.root / "wanted")) == 0
    assert main(data.generate()) == 0
    write, written = io.write_mask, []

    def interrupted(path, mask, **more):
        if written:
            raise KeyboardInterrupt
        written.append(path)
        write(path, mask, **more)

    monkeypatch.setattr(io, "write_mask", interrupted)
    assert main(data.generate("--alpha", "3", "--overwrite", "--workers", "1")) == 130
    monkeypatch.setattr(io, "write_mask", write)
    assert main(data.generate("--alpha", "3")) == 0
    assert made(data.out) == made(data.root / "wanted")
    # Masks that the run would not make again are neither mixed nor lost.
    (data.root / "list.txt").write_text("photo3\n")
    assert main(data.generate("--overwrite", "--list", str(data.root / "list.txt"))) == 2
    assert "holds 4 masks of other settings" in capsys.readouterr().err
    assert made(data.out) == made(data.root / "wanted")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--mean", "nan", "0", "0"), "--mean: expected finite numbers"),
        (("--std", "1", "inf", "1"), "--std: expected numbers > 0"),
        (("--std", "1", "nan", "1"), "--std: expected numbers > 0"),
        (("--device", "meta"), "--device: 'meta' cannot be used here"),
    ],
)
def test_settings_that_make_no_masks(data, capsys, more, said):
    assert main(data.generate(*more)) == 2
    assert said in capsys.readouterr().err


# Photos of all kinds


def save_kinds(folder: Path) -> None:
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8))
    rgb.convert("L").save(folder / "gray.jpg")
    rgb.convert("RGBA").save(folder / "rgba.png")
    rgb.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray((np.arange(24 * 32, dtype=np.uint16) * 80).reshape(24, 32)).save(folder / "sixteen.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    rgb.save(folder / "turned.jpg", exif=exif)
    rgb.resize((1, 1)).save(folder / "one.png")
    rgb.resize((3, 2)).save(folder / "tiny.png")


@pytest.mark.filterwarnings("ignore:image. image 0 of the batch spans only")  # those of a few pixels do
def test_photos_of_all_kinds(data):
    for path in data.images.iterdir():
        path.unlink()
    save_kinds(data.images)
    names = ["gray", "rgba", "cmyk", "sixteen", "turned", "one", "tiny"]
    labels = torch.zeros(7, 6, dtype=torch.bool)
    labels[:, 1:3] = True
    data.write_labels(names, labels)
    assert main(data.generate("--crf", "--scales", "0.5", "1", "2")) == 0
    sizes = {name: tuple(io.read_mask(data.out / f"{name}.png").shape) for name in names}
    assert sizes == dict.fromkeys(names, (24, 32)) | {"turned": (32, 24), "one": (1, 1), "tiny": (2, 3)}


@pytest.mark.parametrize("harm", ["truncated", "empty", "text"])
def test_one_bad_photo_is_reported_and_skipped(data, capsys, harm):
    path = data.images / "photo2.png"
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"no photo"}[harm])
    assert main(data.generate()) == 1
    err = capsys.readouterr().err
    assert "skipped photo2.png" in err
    assert "4 masks made" in err
    assert sorted(made(data.out)) == [f"photo{index}.png" for index in (0, 1, 3, 4)]
    path.write_bytes(whole)
    assert main(data.generate()) == 0


def test_a_truncated_jpeg_is_skipped(data, capsys):
    path = data.images / "photo0.png"
    picture = Image.new("RGB", (200, 200), "red")
    path.unlink()
    picture.save(path.with_suffix(".jpg"))
    path = path.with_suffix(".jpg")
    path.write_bytes(path.read_bytes()[:-40])
    assert main(data.generate()) == 1
    assert "skipped photo0.jpg" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"photo0\.jpg"):
        main(data.generate("--debug"))


# Labels


def test_photos_without_labels_and_labels_without_photos(data, capsys):
    data.write_labels([*data.names[1:], "nowhere"], data.labels)
    assert main(data.generate()) == 1
    err = capsys.readouterr().err
    assert "photo0" in err
    assert "nowhere" in err
    assert "4 masks made" in err
    assert not (data.out / "photo0.png").exists()


def test_list(data, capsys):
    (data.root / "list.txt").write_text("photo3\nphoto1\n")
    assert main(data.generate("--list", str(data.root / "list.txt"))) == 0
    assert sorted(made(data.out)) == ["photo1.png", "photo3.png"]
    (data.root / "list.txt").write_text("photo3\nnowhere\n")
    assert main(data.generate("--list", str(data.root / "list.txt"))) == 1
    assert "nowhere" in capsys.readouterr().err


def test_no_label_at_all_is_all_background(data):
    labels = data.labels.clone()
    labels[1] = False
    labels[:, 4] = False  # and a class that no photo shows
    data.write_labels(data.names, labels)
    assert main(data.generate("--save-cams", str(data.root / "cams"))) == 0
    mask = io.read_mask(data.out / "photo1.png")
    assert mask.shape == (40, 48)
    assert int(mask.max()) == 0
    assert len(io.read_cam(data.root / "cams" / "photo1.npz").keys) == 0
    assert main(data.generate("--save-cams", str(data.root / "cams"))) == 0


def test_cls_labels_only_with_allow_pickle(data, capsys):
    path = data.root / "cls_labels.npy"
    np.save(
        path,
        {name: row.float().numpy() for name, row in zip(data.names, data.labels, strict=True)},
        allow_pickle=True,
    )
    arguments = [str(path) if word == str(data.csv) else word for word in data.generate()]
    assert main(arguments) == 2
    assert "--allow-pickle" in capsys.readouterr().err
    assert main(data.generate()) == 0
    before = made(data.out)
    assert main([*arguments, "--allow-pickle", "--overwrite"]) == 0
    assert made(data.out) == before


def test_other_classes_than_the_classifier_has(data, capsys):
    io.write_labels(data.csv, io.ImageLabels(tuple(data.names), ("cat", "dog"), torch.ones(5, 2)))
    assert main(data.generate()) == 2
    assert "the classifier has 6 classes, the labels have 2" in capsys.readouterr().err
    assert not made(data.out)


# Models and weights


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("nowhere", "expected module:function"),
        ("no_such_module:f", "cannot import 'no_such_module'"),
        ("pseudolabel.cli.demo:nothing", "has no function 'nothing'"),
        ("builtins:dict", "expected builtins:dict() to return an nn.Module, got dict"),
        ("operator:add", "operator:add() failed: TypeError"),
    ],
)
def test_a_wrong_model(data, capsys, factory, said):
    arguments = [factory if word == "pseudolabel.cli.demo:classifier" else word for word in data.generate()]
    assert main(arguments) == 2
    assert said in capsys.readouterr().err
    assert not data.out.exists()


def test_a_model_of_the_current_folder(data, monkeypatch):
    (data.root / "my_networks_here.py").write_text(
        "from pseudolabel.cli.demo import classifier\ndef make():\n    return classifier()\n"
    )
    monkeypatch.chdir(data.root)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    arguments = [
        "my_networks_here:make" if word.endswith(":classifier") else word for word in data.generate()
    ]
    assert main(arguments) == 0


def test_weights_as_npz_and_inside_a_checkpoint(data):
    state = torch.load(data.weights, weights_only=True)
    np.savez(data.root / "w.npz", **{name: value.numpy() for name, value in state.items()})
    torch.save({"state_dict": state, "epoch": 3}, data.root / "w.pth")
    for path in ("w.npz", "w.pth"):
        model = load_weights(load_model("pseudolabel.cli.demo:classifier"), data.root / path)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("2.bias"), "lacks 1: 2.bias"),
        (lambda state: state.update(extra=torch.zeros(1)), "unknown to the model, 1: extra"),
        (lambda state: state.update({"2.bias": torch.zeros(5)}), "in another shape 1: 2.bias (5,) for (6,)"),
        (
            lambda state: state.update({"2.bias": "text"}),
            "2.bias: expected a dense tensor with values, got str",
        ),
    ],
)
def test_weights_that_do_not_fit(data, capsys, change, said):
    state = dict(torch.load(data.weights, weights_only=True))
    change(state)
    torch.save(state, data.weights)
    assert main(data.generate()) == 2
    assert said in capsys.readouterr().err


class Harm:
    def __reduce__(self):
        return (os.mkdir, ("should_not_be_made",))


@pytest.mark.parametrize("kind", ["garbage", "pickle", "suffix", "missing"])
def test_weights_that_cannot_be_read(data, capsys, kind, monkeypatch):
    monkeypatch.chdir(data.root)
    path = data.weights
    if kind == "garbage":
        path.write_bytes(b"no weights")
    elif kind == "pickle":
        torch.save({"2.bias": Harm()}, path)
    elif kind == "suffix":
        data.weights = path.rename(path.with_suffix(".ckpt"))
    else:
        path.unlink()
    arguments = [str(data.weights) if word == str(path) else word for word in data.generate()]
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert data.weights.name in err
    assert err.count("\n") == 1
    assert not (data.root / "should_not_be_made").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--layer", "nope"], "nope"),
        (["--classifier", "0.0"], "classifier"),
        (["--std", "1", "0", "1"], "--std"),
        (["--scales", "0"], "scales"),
        (["--device", "toaster"], "--device"),
        (["--background", "0.2"], "--background: not an option of --method pmm"),
        (["--method", "cam", "--alpha", "2"], "--alpha: not an option of --method cam"),
        (["--method", "infercam", "--alpha", "2"], "--alpha: not an option of --method infercam"),
        (["--alpha", "-1"], "alpha"),
    ],
)
def test_a_wrong_setting(data, capsys, more, said):
    assert main(data.generate(*more)) == 2
    assert said in capsys.readouterr().err
    assert not made(data.out)


def test_named_layer_and_classifier_are_what_is_found_alone(data):
    assert main(data.generate()) == 0
    assert main(data.generate("--layer", "0", "--classifier", "2", out=data.root / "named")) == 0
    assert made(data.out) == made(data.root / "named")


# Networks by name, and gradients


class Named(torch.nn.Module):
    """As of transformers: more classes than the labels have, in another order."""

    names = ("none", *reversed(CLASSES[1:]), "other")

    def __init__(self):
        super().__init__()
        convolution = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.body = torch.nn.Sequential(convolution, torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        self.classifier = torch.nn.Linear(8, len(self.names))
        self.config = SimpleNamespace(id2label=dict(enumerate(self.names)), image_size=32)

    def forward(self, pixel_values):
        return SimpleNamespace(logits=self.classifier(self.body(pixel_values).mean((2, 3))))


@pytest.fixture
def named(monkeypatch):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = Named().eval()
    processor = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.2, 0.2]}
    fake = SimpleNamespace(
        AutoConfig=SimpleNamespace(from_pretrained=lambda name, **_: model.config),
        AutoModelForImageClassification=SimpleNamespace(
            from_pretrained=lambda name, **_: (copy.deepcopy(model).train(), {"missing_keys": []})
        ),
        ImageProcessingMixin=SimpleNamespace(get_image_processor_dict=lambda name, **_: (processor, {})),
    )
    monkeypatch.setitem(sys.modules, "transformers", fake)
    return model


def by_name(data, *more, out=None):
    arguments = data.generate(*more, out=out or data.out)
    place = arguments.index("--weights")
    arguments = [*arguments[:place], *arguments[place + 2 :]]
    return ["hf:someone/net" if word.endswith(":classifier") else word for word in arguments]


def test_a_network_by_name(data, named, capsys):
    assert main(by_name(data, "--save-cams", str(data.root / "cams"))) == 0
    err = capsys.readouterr().err
    assert "maps: CAM of what is pooled before it, by the weights of" in err
    assert "6 of the network's 8 classes, by name; mean (0.4, 0.5, 0.6), std (0.2, 0.2, 0.2)" in err
    for name in data.names:
        image = (
            io.read_image(data.images / f"{name}.png")[None] - torch.tensor([0.4, 0.5, 0.6])[:, None, None]
        ) / 0.2
        labels = io.read_labels(data.csv)[name][None]
        with torch.no_grad(), CAM(named) as cam:
            maps = multi_scale_cam(lambda x: cam(x)[:, 1:7].flip(1), image, labels, (1.0,))
        stored = io.read_cam(data.root / "cams" / f"{name}.npz").dense(7).float()
        assert (stored - normalize_cam(maps)[0]).abs().max() < 1e-3
    assert main(by_name(data)) == 0
    assert "5 were there already" in capsys.readouterr().err
    with torch.no_grad():
        named.body[0].weight += 1
    assert main(by_name(data)) == 2  # the weights are others
    assert "--overwrite" in capsys.readouterr().err


def test_mean_and_std_that_are_given_come_first(data, named, capsys):
    assert main(by_name(data, "--mean", "0.1", "0.2", "0.3")) == 0
    assert "mean (0.1, 0.2, 0.3), std (0.2, 0.2, 0.2)" in capsys.readouterr().err
    settings = json.loads((data.out / "pseudolabel.json").read_text())["settings"]
    assert (settings["mean"], settings["std"]) == ([0.1, 0.2, 0.3], [0.2, 0.2, 0.2])


def test_classes_that_the_network_lacks(data, named, capsys):
    classes = ("unicorn", *CLASSES[2:])
    io.write_labels(data.csv, io.ImageLabels(tuple(data.names), classes, data.labels))
    assert main(by_name(data)) == 2
    assert "lacks 1 of the labels' classes: unicorn" in capsys.readouterr().err
    assert not data.out.exists()


def test_a_name_without_weights(data, capsys):
    arguments = [word.replace("hf:someone/net", MODEL) for word in by_name(data)]
    assert main(arguments) == 2
    assert "--weights" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["pmm", "infercam"])
def test_gradients(data, capsys, method):
    cams = data.root / "cams"
    assert main(data.generate("--maps", "gradcam", "--method", method, "--save-cams", str(cams))) == 0
    assert "maps: Grad-CAM at" in capsys.readouterr().err
    model = load_weights(classifier(), data.weights)
    for name in data.names:
        image = (io.read_image(data.images / f"{name}.png")[None] - MEAN) / STD
        labels = io.read_labels(data.csv)[name][None]
        with GradCAM(model) as cam:

            def maps_of_views(views, cam=cam, labels=labels):
                return cam(views, labels.expand(len(views), -1))

            if method == "pmm":
                maps = multi_scale_cam(maps_of_views, image, labels, (1.0,))
            else:
                maps = infer_response_map(maps_of_views, image, labels, scales=(1.0,)).response
        stored = io.read_cam(cams / f"{name}.npz").dense(7).float()
        assert (stored - normalize_cam(maps)[0]).abs().mean() < 1e-3
    settings = json.loads((data.out / "pseudolabel.json").read_text())["settings"]
    assert settings["maps"] == "gradcam"
    assert main(data.generate("--method", method)) == 2
    assert "'maps': 'gradcam'" in capsys.readouterr().err


# Disks


def test_out_is_a_file(data, capsys):
    data.out.write_text("in the way")
    assert main(data.generate()) == 2
    assert str(data.out) in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_out_may_not_be_written(data, capsys):
    data.out.mkdir(mode=0o555)
    assert main(data.generate()) == 2
    assert str(data.out) in capsys.readouterr().err


@pytest.mark.parametrize("fits", [0, 1, 3])
def test_a_full_disk_stops_and_leaves_whole_files(data, capsys, monkeypatch, fits):
    assert main(data.generate(out=data.root / "whole")) == 0
    capsys.readouterr()
    written, sync = [], os.fsync

    def full(descriptor):
        if len(written) >= fits:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(descriptor)
        sync(descriptor)

    monkeypatch.setattr("pseudolabel.io._atomic.os.fsync", full)
    assert main(data.generate("--workers", "1")) == 2
    err = capsys.readouterr().err
    assert "No space left on device" in err
    assert str(data.out) in err
    assert not list(data.out.glob("*.tmp"))
    so_far, whole = made(data.out), made(data.root / "whole")
    assert len(so_far) == max(fits - 1, 0)  # the first file is the one of the settings
    assert so_far.items() <= whole.items()
    monkeypatch.setattr("pseudolabel.io._atomic.os.fsync", sync)
    assert main(data.generate()) == 0
    assert made(data.out) == whole
