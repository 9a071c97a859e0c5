"""Foreign modes of PyTorch: none changes a result on CPU tensors, and none leaves anything behind.

The calls are those of `test_arguments`.
"""

import functools
import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pseudolabel as pl


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"hostile_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


arguments = load("test_arguments")
Call, tensors = arguments.Call, arguments.tensors


@functools.cache
def calls() -> dict[str, Call]:
    """Those calls, and some whose systems are large enough for a V-cycle."""
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, 24, 32, generator=generator)
    trimap = torch.full((1, 1, 24, 32), 0.5)
    trimap[..., :2, :], trimap[..., -2:, :] = 0, 1
    large = {
        f"{name}, large": Call(getattr(pl.matting, name), {guide: image, "trimap": trimap}, set())
        for name, guide in (
            ("closed_form_matting", "image"),
            ("random_walk_matting", "guidance"),
            ("large_kernel_matting", "image"),
        )
    }
    return {**arguments.calls(), **large}


NAMES = list(calls())
FACTORIES = {"cam.multi_crop_boxes"}  # without a tensor among its arguments, it makes them where all are made


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    before = torch.get_default_device()
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(before)


SURROUNDINGS: dict[str, Callable[[], Any]] = {
    "meta": lambda: torch.device("meta"),
    "default device": lambda: default_device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "inference": torch.inference_mode,
}
TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "functionalize": torch.func.functionalize,
    "grad": torch.func.grad,
    "vmap": lambda function: lambda x: torch.vmap(function)(x[None]),
}


def same(one: object, other: object) -> bool:
    """The same tensors to the last bit, in dtype and device as well."""
    pairs = list(tensors(one)), list(tensors(other))
    return len(pairs[0]) == len(pairs[1]) and all(
        (a.dtype, a.device, a.shape) == (b.dtype, b.device, b.shape)
        and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(*pairs, strict=True)
    )


def run(call: Call) -> Any:
    return call.function(**call.arguments)


def forget() -> None:
    """As in a new process: nothing is kept."""
    for module in [module for name, module in sys.modules.items() if name.startswith("pseudolabel.")]:
        for value in list(vars(module).values()):
            if isinstance(value, functools._lru_cache_wrapper):
                value.cache_clear()
    importlib.import_module("pseudolabel.refine.dense_crf")._kept.clear()


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    forget()
    yield
    forget()


@pytest.mark.parametrize("name", NAMES)
def test_surroundings_change_nothing(name: str) -> None:
    call = calls()[name]
    usual = run(call)
    wrong = {}
    for surroundings, enter in SURROUNDINGS.items():
        if name in FACTORIES and surroundings in ("meta", "default device"):
            continue
        forget()
        try:
            with enter():
                found = run(call)
        except Exception as error:  # noqa: BLE001
            wrong[surroundings] = f"{type(error).__name__}: {str(error)[:150]}"
            continue
        if not same(found, usual):
            wrong[surroundings] = "another result"
    assert not wrong


@pytest.mark.parametrize("surroundings", [*SURROUNDINGS, *TRANSFORMS])
def test_nothing_is_left_behind(surroundings: str) -> None:
    """Calls under the mode may fail, those after it do as ever."""
    usual = {name: run(call) for name, call in calls().items()}
    forget()

    def here(call: Call) -> None:
        if surroundings in SURROUNDINGS:
            with SURROUNDINGS[surroundings]():
                run(call)
        else:
            TRANSFORMS[surroundings](lambda x: (run(call), x.sum())[1])(torch.ones(3))

    for call in calls().values():
        with suppress(Exception):
            here(call)
    assert [name for name, call in calls().items() if not same(run(call), usual[name])] == []


@pytest.mark.parametrize("name", ["refine.dense_crf", *(name for name in NAMES if name.endswith("large"))])
def test_nothing_is_left_behind_by_an_export(name: str) -> None:
    """Exported without its values, a call cannot go on for long; those after it do as ever."""
    call = calls()[name]
    usual = run(call)
    forget()
    inputs = {key: value for key, value in call.arguments.items() if isinstance(value, Tensor)}

    class Exported(nn.Module):
        def forward(self, **given: Tensor) -> Any:
            return call.function(**{**call.arguments, **given})

    with suppress(Exception):
        torch.export.export(Exported(), (), inputs, strict=False)
    assert same(run(call), usual)


def test_tracers_neither_fill_nor_find_what_is_kept() -> None:
    crf = importlib.import_module("pseudolabel.refine.dense_crf")
    size = 1, 4, 5, 3.0, torch.device("cpu")

    def look(x: Tensor) -> Tensor:
        crf._spatial_filter(*size)
        return x.sum()

    look(torch.ones(3))
    kept = crf._kept[size]
    for _ in range(2):
        with pytest.raises(
            RuntimeError, match="data pointer"
        ):  # tensors of `torch.func.grad` have no numbers
            torch.func.grad(look)(torch.ones(3))
        assert crf._kept.get(size, kept) is kept
        crf._kept.clear()
    assert not crf._kept
    with torch.device("meta"):
        look(torch.ones(3))
    assert size in crf._kept


SURROUNDED = [pytest.param(enter, id=name) for name, enter in SURROUNDINGS.items()]


@pytest.mark.parametrize("enter", SURROUNDED)
def test_extractors(enter: Callable[[], Any]) -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    image, tokens, labels = torch.rand(2, 3, 8, 9), torch.rand(2, 5, 8), torch.tensor([[1, 0, 1], [0, 1, 0]])

    def look() -> list[Tensor]:
        with pl.cam.capture_attention(block) as layers:
            block(tokens)
        maps = pl.cam.class_attention_map(layers, (2, 2))
        cams = [pl.cam.CAM(network, bias=True)(image), pl.cam.GradCAM(network, "1")(image, labels)]
        several = pl.cam.LayerCAM(network, "1", chunk_size=2, score=pl.cam.present_softmax)(image, labels)
        infer = pl.cam.ClassConditionalInference(pl.cam.CAM(network), scales=(1.0, 2.0))
        return [maps, *cams, several, *infer(image, labels)]

    usual = look()
    with enter():
        found = look()
    assert same(found, usual)


@pytest.mark.parametrize("enter", SURROUNDED)
def test_files(enter: Callable[[], Any], tmp_path) -> None:
    image = torch.arange(2 * 3 * 4).view(3, 2, 4) / 24
    mask, labels = torch.tensor([[0, 1, 2, 255]]), torch.tensor([1, 0, 1])
    maps = torch.rand(3, 2, 4)
    (tmp_path / "labels.csv").write_text("name,cat,dog\na,1,0\nb,0,1\n")

    def go_round() -> list[Any]:
        pl.io.write_mask(tmp_path / "mask.png", mask)
        pl.io.write_cam(tmp_path / "cam.npz", maps, labels)
        stored = pl.io.read_cam(tmp_path / "cam.npz")
        return [
            pl.io.read_mask(tmp_path / "mask.png"),
            pl.io.read_image(tmp_path / "mask.png"),
            pl.io.colorize_mask(mask),
            pl.io.voc_palette(),
            stored.keys,
            stored.dense(4),
            stored.labels(4),
            pl.io.read_labels(tmp_path / "labels.csv").labels,
            image,
        ]

    usual = go_round()
    with enter():
        found = go_round()
    assert same(found, usual)


@pytest.mark.parametrize("enter", SURROUNDED)
def test_metric(enter: Callable[[], Any]) -> None:
    mask, truth = torch.tensor([[[0, 1], [1, 2]]]), torch.tensor([[[0, 1], [2, 2]]])
    cam = torch.ones(1, 2, 2, 2) / 2

    def score() -> list[Any]:
        metric = pl.metrics.PseudoLabelMetric(3)
        metric.update(mask, truth)
        chosen = pl.masks.choose_background([(cam, truth)], candidates=[0.3, 0.6])
        return [metric.compute(), torch.tensor(chosen.curve, dtype=torch.float64, device="cpu")]

    usual = score()
    with enter():
        found = score()
    assert same(found, usual)


def test_imports_under_a_foreign_mode() -> None:
    """What modules make on import is of the dtype and device that they mean, not of the caller."""
    program = """
import importlib, logging, pkgutil, sys
import torch
import torch._dynamo  # which PyTorch 2.6 itself cannot import there
from torch._subclasses.fake_tensor import FakeTensorMode

logging.disable(logging.CRITICAL)
torch.set_default_dtype(torch.float16)
with torch.device("meta"):
    import pseudolabel
    with FakeTensorMode():
        rooms = [getattr(pseudolabel, room) for room in pseudolabel.__all__]
    for found in pkgutil.walk_packages(pseudolabel.__path__, "pseudolabel."):
        if not found.name.endswith("__main__"):
            try:
                importlib.import_module(found.name)
            except ModuleNotFoundError as error:  # an extra
                assert not str(error.name).startswith("pseudolabel"), error
torch.set_default_dtype(torch.float32)
modules = [module for name, module in sys.modules.items() if name.startswith("pseudolabel.")]
made = [value for module in modules for value in vars(module).values() if isinstance(value, torch.Tensor)]
assert len(modules) > 90, len(modules)
assert made, "the colours of the scenes"
kinds = {(type(value), str(value.device), value.dtype) for value in made}
assert kinds == {(torch.Tensor, "cpu", torch.float32)}, kinds
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
