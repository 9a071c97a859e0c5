"""`MattingRefiner`, and the adapters of pymatting and ViTMatte."""

import builtins
import inspect
import sys
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from skimage import data
from torch import nn

from pseudolabel import matting
from pseudolabel.matting import (
    MattingMethod,
    MattingRefiner,
    PymattingSolver,
    ViTMatte,
    pymatting_matting,
    vitmatte_matting,
)
from pseudolabel.matting._system import _clip
from pseudolabel.matting.refiner import _shrink

NATIVE = [name for name in get_args(MattingMethod) if name != "pymatting"]


def photo(size: int = 48) -> torch.Tensor:
    step = 256 // size
    crop = data.astronaut()[:256:step, 128:384:step][:size, :size].copy()
    return torch.from_numpy(crop).permute(2, 0, 1)[None].float() / 255


def trimap_of(size: int = 48, classes: int = 1) -> torch.Tensor:
    """Background at the sides, classes side by side in the middle."""
    trimap = torch.full((1, classes, size, size), 0.5)
    trimap[..., : size // 6] = trimap[..., -size // 6 :] = 0
    middle = torch.arange(size // 3, 2 * size // 3).chunk(classes)
    for c, columns in enumerate(middle):
        trimap[:, :, size // 3 : 2 * size // 3, columns] = 0
        trimap[:, c, size // 3 : 2 * size // 3, columns] = 1
    return trimap


# ------------------------------------------------------------------------------------------ the front


@pytest.mark.parametrize("method", NATIVE)
def test_calls_the_function(method: str) -> None:
    image, trimap = photo(), trimap_of(classes=2)
    function = getattr(matting, f"{method}_matting")
    settings = {"closed_form": {"eps": 1e-3}, "guided_filter": {"radius": 7}}.get(method, {"rtol": 1e-2})
    refiner = MattingRefiner(method, **settings)
    assert torch.equal(refiner(image, trimap), function(image, trimap, **settings))
    prior = torch.rand(1, 2, 48, 48, generator=torch.Generator().manual_seed(0))
    assert torch.equal(refiner(image, trimap, prior), function(image, trimap, prior=prior, **settings))
    assert not torch.equal(refiner(image, trimap, prior), refiner(image, trimap))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scale(dtype: torch.dtype) -> None:
    image, trimap, prior = (
        photo().to(dtype),
        trimap_of().to(dtype),
        torch.full((1, 1, 48, 48), 0.2, dtype=dtype),
    )
    seen = []

    def spy(image, trimap, **optional):
        seen.append((image, trimap, optional))
        return torch.full_like(trimap, 0.25)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules["pseudolabel.matting.refiner"].METHODS, "closed_form", spy)
        alpha = MattingRefiner("closed_form", scale=0.25)(image, trimap, prior)
    ((small, small_trimap, optional),) = seen
    assert small.shape == (1, 3, 12, 12)
    assert sorted(small_trimap.unique().tolist()) == [0, 0.5, 1]
    assert optional["prior"].shape == (1, 1, 12, 12)
    torch.testing.assert_close(small.mean(), image.mean(), rtol=0.01, atol=0)
    unknown = trimap == 0.5
    assert alpha[unknown].eq(0.25).all()
    assert torch.equal(alpha[~unknown], trimap[~unknown]), "known pixels are those of the whole trimap"
    assert alpha.dtype == dtype


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_shrunken_maps_have_a_slope_at_their_bounds(value: float, flat_clamp: Callable) -> None:
    """Each of the nine pixels is a mean: its weights sum to 1."""
    maps = torch.full((1, 1, 6, 6), value, dtype=torch.float64, requires_grad=True)
    with flat_clamp():
        _shrink(maps, (3, 3)).sum().backward()
    assert maps.grad.sum().item() == pytest.approx(9)


@pytest.mark.parametrize("matte", [[0.0, 1.0], [0.0, 0.0], [0.25, 0.75]])
def test_mattes_have_a_slope_at_their_bounds(matte: list[float], flat_clamp: Callable) -> None:
    """Mattes that are as they should be stay so, and one moves without the other."""
    with flat_clamp():
        slope = torch.autograd.functional.jacobian(_clip, torch.tensor([matte]))
    assert torch.equal(slope.squeeze(), torch.eye(2))


def test_scale_is_about_the_same() -> None:
    image, trimap = photo(96), trimap_of(96)
    whole, half = (
        MattingRefiner("closed_form")(image, trimap),
        MattingRefiner("closed_form", scale=0.5)(image, trimap),
    )
    assert ((whole > 0.5) == (half > 0.5)).float().mean() > 0.9


def test_repr() -> None:
    assert (
        repr(MattingRefiner("knn", neighbours=[5, 3]))
        == "MattingRefiner('knn', scale=1.0, neighbours=[5, 3])"
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: MattingRefiner("levin"), ValueError, "method: expected one of"),
        (lambda: MattingRefiner(scale=0), ValueError, "scale: expected"),
        (lambda: MattingRefiner(scale=2), ValueError, "scale: expected"),
        (
            lambda: MattingRefiner("closed_form", radius=3),
            TypeError,
            r"settings: expected some of \['eps', .*'closed_form', got \['radius'\]",
        ),
        (lambda: MattingRefiner("closed_form", return_report=True), TypeError, "got .'return_report'"),
        (lambda: MattingRefiner(scale=0.5)(photo()[0], trimap_of()), ValueError, "image: expected shape"),
        (
            lambda: MattingRefiner("pymatting")(photo(), trimap_of(), trimap_of()),
            ValueError,
            "prior: expected None",
        ),
    ],
)
def test_errors(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


# ------------------------------------------------------------------------------------------ pymatting


@pytest.fixture
def pymatting():
    return pytest.importorskip("pymatting", reason="pymatting is not installed: its adapter is not run")


@pytest.mark.parametrize("solver", get_args(PymattingSolver))
def test_pymatting_gives_its_mattes(pymatting, solver: str) -> None:
    image, trimap = photo(), trimap_of()
    alpha = pymatting_matting(image, trimap, solver=solver)
    pixels = image[0].permute(1, 2, 0).double().numpy().copy()
    estimate = getattr(pymatting, f"estimate_alpha_{solver}")
    theirs = torch.from_numpy(np.clip(estimate(pixels, trimap[0, 0].double().numpy()), 0, 1))
    unknown = trimap[0, 0] == 0.5
    torch.testing.assert_close(alpha[0, 0][unknown], theirs[unknown].float(), rtol=0, atol=1e-6)
    assert torch.equal(alpha[0, 0][~unknown], trimap[0, 0][~unknown])
    assert alpha.dtype == torch.float32


def test_pymatting_behind_the_front(pymatting) -> None:
    refiner = MattingRefiner("pymatting", solver="sm")
    assert torch.equal(refiner(photo(), trimap_of()), pymatting_matting(photo(), trimap_of(), solver="sm"))


def test_pymatting_agrees_with_the_native_closed_form(pymatting) -> None:
    image, trimap = photo().double(), trimap_of().double()
    theirs = pymatting_matting(image, trimap, epsilon=1e-5)
    ours = matting.closed_form_matting(image, trimap, eps=1e-5, rtol=1e-9)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_pymatting_classes_are_solved_alone_and_share(pymatting) -> None:
    image, trimap = photo(), trimap_of(classes=2)
    trimap = torch.cat([trimap, torch.zeros_like(trimap[:, :1])], 1)  # and an absent one
    alpha = pymatting_matting(image, trimap)
    alone = torch.cat([pymatting_matting(image, trimap[:, c : c + 1]) for c in range(2)], 1)
    torch.testing.assert_close(alpha[:, :2], alone / alone.sum(1, keepdim=True).clamp(min=1))
    assert not alpha[:, 2].any()
    assert alpha.sum(1).max() <= 1 + 1e-6


def test_pymatting_does_not_mind_missing_seeds(pymatting) -> None:
    image, trimap = photo(), trimap_of()
    batch = torch.cat(
        [trimap.where(trimap != 1, 0.5), trimap.where(trimap != 0, 0.5), torch.full_like(trimap, 0.5)]
    )
    alpha = pymatting_matting(image.expand(3, -1, -1, -1), batch)
    assert [alpha[i].unique().tolist() for i in range(3)] == [[0], [1], [0.5]]
    known = (trimap == 1).float()
    assert torch.equal(pymatting_matting(image, known), known)


@pytest.mark.parametrize("solver", ["cf", "knn"])
def test_pymatting_that_does_not_converge_gives_what_it_has(pymatting, solver: str) -> None:
    image, trimap = photo(), trimap_of()
    with pytest.warns(UserWarning, match=f"pymatting, {solver}: .*did not converge within 1 iterations"):
        alpha = pymatting_matting(image, trimap, solver=solver, max_iter=1)
    exact = pymatting_matting(image, trimap, solver=solver)
    assert alpha.isfinite().all()
    assert torch.equal(alpha[trimap != 0.5], trimap[trimap != 0.5])
    assert 0 < (alpha - exact).abs().mean() < 0.3


def test_pymatting_takes_one_thread_and_gives_the_others_back(pymatting, monkeypatch) -> None:
    import numba

    during = []
    original = pymatting.estimate_alpha_cf

    def spy(*arguments, **options):
        during.append(numba.get_num_threads())
        return original(*arguments, **options)

    monkeypatch.setattr(pymatting, "estimate_alpha_cf", spy)
    before = numba.get_num_threads()
    pymatting_matting(photo(), trimap_of())
    assert during == [1]
    assert numba.get_num_threads() == before


def test_pymatting_passes_settings_and_errors_on(pymatting) -> None:
    image, trimap = photo(), trimap_of()
    assert not torch.equal(pymatting_matting(image, trimap, epsilon=1e-1), pymatting_matting(image, trimap))
    with pytest.raises(TypeError, match="colour"):
        pymatting_matting(image, trimap, colour=3)
    with pytest.raises(ValueError, match="sigma: "):
        pymatting_matting(image, trimap, solver="rw", sigma=0.1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pymatting_matting(photo()[0], trimap_of()), ValueError, "image: expected shape"),
        (lambda: pymatting_matting(photo() * 255, trimap_of()), ValueError, "image: .*divide 8-bit"),
        (lambda: pymatting_matting(photo(), trimap_of().long()), TypeError, "trimap: expected a floating"),
        (lambda: pymatting_matting(photo(), trimap_of(), solver="sf"), ValueError, "solver: expected one of"),
        (lambda: pymatting_matting(photo(), trimap_of(), rtol=0), ValueError, "rtol: expected"),
        (lambda: pymatting_matting(photo(), trimap_of(), max_iter=0), ValueError, "max_iter: expected"),
    ],
)
def test_pymatting_errors(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


def block_import(monkeypatch, blocked: str) -> None:
    original = builtins.__import__

    def imports(name, *arguments, **options):
        if name.split(".")[0] == blocked:
            raise ImportError("not here")
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", imports)


def test_pymatting_missing(monkeypatch) -> None:
    block_import(monkeypatch, "pymatting")
    with pytest.raises(ImportError, match=r"not here.*pseudolabel\[matting\]"):
        pymatting_matting(photo(), trimap_of())


# ------------------------------------------------------------------------------------------ ViTMatte


class Network(nn.Module):
    """In the place of ViTMatte: says what it saw, and gives the mean of the image where it is unknown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        self.seen.append(x)
        return SimpleNamespace(alphas=(x[:, :3].mean(1, keepdim=True) + 1) / 2)


def test_vitmatte_prepares_what_the_network_sees() -> None:
    image, trimap, network = photo(), trimap_of(classes=2), Network()
    trimap = torch.cat([trimap, torch.zeros_like(trimap[:, :1])], 1)
    alpha = vitmatte_matting(image, trimap, network)
    assert [tuple(x.shape) for x in network.seen] == [(1, 4, 64, 64)] * 2, (
        "one class at a time, absent ones not"
    )
    for c, x in enumerate(network.seen):
        torch.testing.assert_close(x[0, :3, :48, :48], 2 * image[0] - 1)
        assert torch.equal(x[0, 3, :48, :48], trimap[0, c])
        assert not x[..., 48:, :].any()
        assert not x[..., 48:].any()
    unknown = (trimap == 0.5).any(1, keepdim=True)
    mean = image.mean(1, keepdim=True).expand(-1, 2, -1, -1)
    expected = (mean / mean.sum(1, keepdim=True).clamp(min=1)).where(unknown, trimap[:, :2])
    torch.testing.assert_close(alpha[:, :2], expected)
    assert not alpha[:, 2].any()
    network.seen.clear()
    assert torch.equal(vitmatte_matting(image, trimap, network, batch_size=2), alpha)
    assert len(network.seen) == 1


def test_vitmatte_without_anything_unknown_asks_nobody() -> None:
    known, network = (trimap_of() == 1).float(), Network()
    assert torch.equal(vitmatte_matting(photo(), known, network), known)
    assert not network.seen


def test_vitmatte_module_equals_function() -> None:
    module = ViTMatte(Network(), batch_size=2)
    assert torch.equal(module(photo(), trimap_of()), vitmatte_matting(photo(), trimap_of(), Network()))
    assert ViTMatte.extra_supervision is True
    assert "batch_size=2" in repr(module)


def test_vitmatte_of_transformers(tmp_path) -> None:
    """A tiny network with random weights, saved to and read from a folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports
        transformers = pytest.importorskip(
            "transformers", reason="transformers is not installed: ViTMatte is not run"
        )
        backbone = transformers.VitDetConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=64,
            num_channels=4,
            out_features=["stage2"],
            window_size=2,
            window_block_indices=[0],
            residual_block_indices=[],
        )
        config = transformers.VitMatteConfig(
            backbone_config=backbone, hidden_size=16, fusion_hidden_sizes=[16, 8, 8, 4]
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = transformers.VitMatteForImageMatting(config).eval()
        network.save_pretrained(tmp_path)
        module = ViTMatte(str(tmp_path))
    image, trimap = photo(), trimap_of(classes=2)
    alpha = module(image, trimap)
    assert torch.equal(alpha, vitmatte_matting(image, trimap, network))
    # The same as with the image processor of transformers.
    processor = transformers.VitMatteImageProcessor()
    pixels = (image[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    inputs = processor(images=pixels, trimaps=trimap[0, 0].numpy() * 255, return_tensors="pt")
    with torch.no_grad():
        theirs = network(**inputs).alphas[0, 0, :48, :48]
    one = vitmatte_matting(image, trimap[:, :1], network)[0, 0]
    unknown = trimap[0, 0] == 0.5
    torch.testing.assert_close(one[unknown], theirs[unknown], rtol=0, atol=1e-4)
    assert not module.model.training


def test_vitmatte_errors(tmp_path, monkeypatch) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"model: expected a network or a folder .*Nothing is downloaded"
    ):
        ViTMatte("hustvl/vitmatte-small-composition-1k")
    with pytest.raises(ValueError, match="batch_size: expected an integer >= 1, got 0"):
        ViTMatte(Network(), batch_size=0)
    with pytest.raises(ValueError, match="trimap: expected shape"):
        vitmatte_matting(photo(), trimap_of()[0], Network())
    (tmp_path / "model.safetensors").touch()
    block_import(monkeypatch, "transformers")
    with pytest.raises(ImportError, match=r"not here.*pseudolabel\[hub\]"):
        ViTMatte(tmp_path)


def test_settings_of_methods_are_named_alike() -> None:
    """What differs between methods is what they compute, not how they are called."""
    for method in NATIVE:
        parameters = inspect.signature(getattr(matting, f"{method}_matting")).parameters
        assert next(iter(parameters)) in {"image", "guidance"}
        assert list(parameters)[1] == "trimap"
        assert "prior" in parameters
        if method != "guided_filter":
            assert {"rtol", "max_iter", "prior_weight", "x0", "return_report"} <= parameters.keys()


@pytest.mark.parametrize(
    ("alphas", "error", "message"),
    [
        (lambda x: None, TypeError, r"expected a tensor of shape"),
        (lambda x: x[:, :1].repeat(2, 1, 1, 1), ValueError, r"expected shape \(1, 1, 64, 64\), got \(2, "),
        (lambda x: x[:, :1] * torch.nan, ValueError, r"expected values in \[0, 1\], got values from nan"),
        (lambda x: x[:, :1].long(), TypeError, r"expected a floating-point tensor"),
    ],
)
def test_what_vitmatte_returns_is_checked(alphas, error, message):
    with pytest.raises(error, match=rf"model\(image\).alphas: {message}"):
        vitmatte_matting(photo(), trimap_of(), lambda x: SimpleNamespace(alphas=alphas(x)))
