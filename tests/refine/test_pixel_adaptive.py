"""PAMR, PAR and VARM: section 9 of the RTC specification."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pseudolabel.refine import PAMR, PAR, VARM, dilated_neighbors, pamr, par, varm

REFINERS = {"pamr": pamr, "par": par, "varm": varm}
MODULES = {"pamr": PAMR, "par": PAR, "varm": VARM}
SCALE = {"pamr": 1.0, "par": 1.01, "varm": 0.99}  # of a constant map, each pass
DIRECTIONS = [(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)]
Refine = Callable[..., torch.Tensor]

each = pytest.mark.parametrize("refine", REFINERS.values(), ids=REFINERS)
seeds = st.integers(0, 1000)
sides = st.tuples(st.integers(1, 8), st.integers(1, 8))
distances = st.lists(st.integers(1, 9), min_size=1, max_size=3)


def case(
    seed: int = 0,
    size: tuple[int, int] = (7, 9),
    dtype: torch.dtype = torch.float64,
    maps_size: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(2, 3, *size, generator=generator, dtype=torch.float64)
    maps = torch.rand(2, 4, *(maps_size or size), generator=generator, dtype=torch.float64)
    return image.to(dtype), maps.to(dtype)


def stacked(values: torch.Tensor, dilations: list[int]) -> torch.Tensor:
    """All neighbours (B,C,Q,H,W), by indices that stop at the border."""
    height, width = values.shape[2:]
    y, x = torch.arange(height)[:, None], torch.arange(width)
    return torch.stack(
        [
            values[..., (y + d * dy).clamp(0, height - 1), (x + d * dx).clamp(0, width - 1)]
            for d in dilations
            for dy, dx in DIRECTIONS
        ],
        dim=2,
    )


def plain_weights(kind: str, image: torch.Tensor, dilations: list[int]) -> torch.Tensor:
    """The table of the specification, on stacked copies (B,Q,H,W)."""
    near, centre = stacked(image, dilations), image[:, :, None]
    if kind == "pamr":
        repeated = centre.expand(-1, -1, len(dilations), -1, -1)
        sigma = torch.cat([near, repeated], 2).std(2, keepdim=True)
        return (-(near - centre).abs() / (1e-8 + 0.1 * sigma)).mean(1).softmax(1)
    sigma = near.std(2, keepdim=True)
    if kind == "par":
        rho = torch.tensor(
            [d * (1 if 0 in direction else 2**0.5) for d in dilations for direction in DIRECTIONS],
            dtype=image.dtype,
        )
        place = (-((rho / (rho.std() + 1e-8) / 0.3) ** 2)).softmax(0)
        like = (-(((near - centre).abs() / (sigma + 1e-8) / 0.3) ** 2)).mean(1).softmax(1)
        return like + 0.01 * place[:, None, None]
    like = (-((4 * (near - centre).abs() / (sigma + 1e-8)) ** 2)).mean(1).softmax(1)
    rough = torch.zeros_like(near)
    rough[..., :-1, :] += (near[..., :-1, :] - near[..., 1:, :]) ** 2
    rough[..., :-1] += (near[..., :-1] - near[..., 1:]) ** 2
    return like - 0.01 * rough.mean(1).softmax(1)


def plain(
    kind: str, image: torch.Tensor, maps: torch.Tensor, dilations: list[int], iterations: int
) -> torch.Tensor:
    weights = plain_weights(kind, image, dilations)
    maps = F.interpolate(maps, size=image.shape[2:], mode="bilinear", align_corners=True)
    for _ in range(iterations):
        maps = (weights[:, None] * stacked(maps, dilations)).sum(2)
    return maps


# ------------------------------------------------------------------------------------------ golden files


@pytest.mark.parametrize("kind", REFINERS)
def test_golden(golden: Callable, kind: str) -> None:
    data = golden(f"rtc/public_{kind}")
    image, image255, mask, same = (
        torch.from_numpy(data[name]) for name in ("image", "image255", "mask", "mask_same")
    )
    dilations, iterations = data["dilations"].tolist(), int(data["num_iter"])
    refine = REFINERS[kind]
    results = {
        "out": refine(image, mask, dilations, iterations),
        "out_same": refine(image, same, dilations, iterations),
        "out_default": refine(image, mask),
        "out_default_image255": refine(image255, mask),
        "ones_out": refine(image, torch.ones_like(mask[:, :1]), dilations, iterations),
    }
    if kind == "pamr":
        results["run_pamr_out"] = refine(image, same)
    else:
        assert np.array_equal(dilated_neighbors(image, dilations).numpy(), data["neighbours"])
    used = {"image", "image255", "mask", "mask_same", "dilations", "num_iter", "neighbours"}
    assert set(results) == set(data) - used
    for name, result in results.items():
        np.testing.assert_allclose(result.numpy(), data[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_golden_negative_results(golden: Callable) -> None:
    """VARM goes below 0, the other two do not."""
    lowest = {kind: golden(f"rtc/public_{kind}")["out_default_image255"].min() for kind in REFINERS}
    assert lowest["varm"] < 0 < min(lowest["par"], lowest["pamr"])


# ------------------------------------------------------------------------------------------ neighbours


def test_neighbours_by_hand() -> None:
    maps = torch.arange(25.0).view(1, 1, 5, 5)
    assert dilated_neighbors(maps, [1, 2])[0, 0, :, 2, 2].tolist() == [
        *(6, 7, 8, 11, 13, 16, 17, 18),
        *(0, 2, 4, 10, 14, 20, 22, 24),
    ]
    assert dilated_neighbors(maps, [1])[0, 0, :, 0, 4].tolist() == [3, 4, 4, 3, 4, 8, 9, 9]
    with_center = dilated_neighbors(maps, [1, 2], include_center=True)[0, 0, :, 2, 2].tolist()
    assert with_center[:9] == [6, 7, 8, 11, 12, 13, 16, 17, 18]
    assert with_center[9:] == [0, 2, 4, 10, 12, 14, 20, 22, 24]


@given(seed=seeds, size=sides, dilations=distances)
def test_neighbours_stop_at_the_border(seed: int, size: tuple[int, int], dilations: list[int]) -> None:
    maps = case(seed, size)[1]
    assert torch.equal(dilated_neighbors(maps, dilations), stacked(maps, dilations))


def test_neighbours_keep_dtype_and_gradient() -> None:
    maps = case()[1]
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert dilated_neighbors(maps.to(dtype), [1]).dtype == dtype
    assert torch.autograd.gradcheck(
        lambda x: dilated_neighbors(x, [1, 3]), (maps[:1, :1, :3, :4].requires_grad_(),)
    )


# ------------------------------------------------------------------------------------------ the formulas


def test_pamr_by_hand() -> None:
    """One row: neighbours left and right three times each, above and below the pixel itself."""
    image = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).expand(1, 3, 1, 3)
    maps = torch.tensor([[[[1.0, 0.0, 0.0]]]], dtype=torch.float64)
    # At the middle pixel: 3 of 9 are 1, so sigma^2 = (3 - 9/9) / 8 = 1/4 and -|D| / (0.1 sigma) = -20.
    unlike = np.exp(-20.0)
    middle = 3 / (5 + 3 * unlike)
    # At the left pixel all are like it: 5 of 8 are the pixel itself (3 beyond the border), 3 the middle one.
    expected = torch.tensor([5 / 8, middle, 0.0], dtype=torch.float64)
    refined = pamr(image, maps, [1], 1).flatten()
    torch.testing.assert_close(refined, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", REFINERS)
@given(seed=seeds, size=sides, dilations=distances, iterations=st.integers(0, 3))
def test_equals_the_plain_way(
    kind: str, seed: int, size: tuple[int, int], dilations: list[int], iterations: int
) -> None:
    image, maps = case(seed, size)
    refined = REFINERS[kind](image, maps, dilations, iterations)
    torch.testing.assert_close(refined, plain(kind, image, maps, dilations, iterations))


@pytest.mark.parametrize("kind", REFINERS)
def test_maps_are_resized_to_the_image(kind: str) -> None:
    for maps_size in ((4, 5), (11, 2), (1, 1)):
        image, maps = case(maps_size=maps_size)
        resized = F.interpolate(maps, size=(7, 9), mode="bilinear", align_corners=True)
        assert torch.equal(REFINERS[kind](image, maps, [1, 2], 0), resized), "no pass only resizes"
        torch.testing.assert_close(
            REFINERS[kind](image, maps, [1, 2], 2), plain(kind, image, maps, [1, 2], 2)
        )


def test_settings_of_par_and_varm() -> None:
    image, maps = case()
    torch.testing.assert_close(
        par(image, maps, [1, 2], w1=0.25, w2=0.0), varm(image, maps, [1, 2], w2=0.0), msg="factor 4 is 1/0.25"
    )
    assert not torch.allclose(par(image, maps, [1, 2], w1=0.5), par(image, maps, [1, 2]))
    assert not torch.allclose(varm(image, maps, [1, 2], sharpness=2.0), varm(image, maps, [1, 2]))


# ------------------------------------------------------------------------------------------ properties


@each
@given(seed=seeds)
def test_linear_and_classes_apart(refine: Refine, seed: int) -> None:
    image, maps = case(seed)
    other = maps.flip(2).sqrt()
    refined = refine(image, maps, [1, 3], 3)
    torch.testing.assert_close(
        refine(image, 2 * maps - other, [1, 3], 3), 2 * refined - refine(image, other, [1, 3], 3)
    )
    for one in range(4):
        torch.testing.assert_close(refine(image, maps[:, one : one + 1], [1, 3], 3)[:, 0], refined[:, one])


@pytest.mark.parametrize("kind", REFINERS)
@given(seed=seeds, iterations=st.integers(0, 12))
def test_constant_maps_are_scaled(kind: str, seed: int, iterations: int) -> None:
    image, _ = case(seed)
    maps = torch.full((2, 1, 3, 4), 0.7, dtype=torch.float64)
    refined = REFINERS[kind](image, maps, [1, 2], iterations)
    torch.testing.assert_close(refined, torch.full_like(refined, 0.7 * SCALE[kind] ** iterations))


@pytest.mark.parametrize("kind", REFINERS)
def test_constant_image_averages(kind: str) -> None:
    _, maps = case()
    image = torch.full((2, 3, 7, 9), 0.3, dtype=torch.float64)
    near = stacked(maps, [1, 2])
    expected = near.mean(2)
    if kind == "par":
        expected = expected + 0.01 * (plain_weights("par", image, [1, 2]) - 1 / 16)[:, None].div(0.01).mul(
            near
        ).sum(2)
    else:
        expected = SCALE[kind] * expected
    torch.testing.assert_close(REFINERS[kind](image, maps, [1, 2], 1), expected)


@each
@given(seed=seeds, offset=st.floats(-2, 2))
def test_offset_and_order_of_colours_do_not_matter(refine: Refine, seed: int, offset: float) -> None:
    image, maps = case(seed)
    refined = refine(image, maps, [1, 2], 3)
    torch.testing.assert_close(refine(image + offset, maps, [1, 2], 3), refined)
    torch.testing.assert_close(refine(image[:, [2, 0, 1]], maps, [1, 2], 3), refined)


@pytest.mark.parametrize("kind", ["pamr", "par"])
@given(seed=seeds, scale=st.floats(0.1, 255))
def test_scale_of_the_image_does_not_matter(kind: str, seed: int, scale: float) -> None:
    image, maps = case(seed)
    refined = REFINERS[kind](image, maps, [1, 2], 3)
    torch.testing.assert_close(REFINERS[kind](scale * image, maps, [1, 2], 3), refined, atol=1e-5, rtol=0)


def test_scale_of_the_image_matters_to_varm() -> None:
    image, maps = case()
    assert (varm(image, maps, [1, 2]) - varm(255 * image, maps, [1, 2])).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["pamr", "par"])
@given(seed=seeds)
def test_mirrored_and_transposed(kind: str, seed: int) -> None:
    refine = REFINERS[kind]
    image, maps = case(seed)
    refined = refine(image, maps, [1, 3], 2)
    for axes in ([2], [3], [2, 3]):
        torch.testing.assert_close(refine(image.flip(axes), maps.flip(axes), [1, 3], 2), refined.flip(axes))
    torch.testing.assert_close(refine(image.mT, maps.mT, [1, 3], 2), refined.mT)


@given(seed=seeds)
def test_varm_transposed_only(seed: int) -> None:
    """Its differences look right and down."""
    image, maps = case(seed)
    refined = varm(image, maps, [1, 3], 2)
    torch.testing.assert_close(varm(image.mT, maps.mT, [1, 3], 2), refined.mT)
    for axis in (2, 3):
        mirrored = varm(image.flip(axis), maps.flip(axis), [1, 3], 2).flip(axis)
        assert 1e-6 < (mirrored - refined).abs().max() < 1e-2


@given(seed=seeds)
def test_results_stay_in_range(seed: int) -> None:
    image, maps = case(seed)
    for refine, scale in ((pamr, 1), (par, 1.01**4)):
        refined = refine(image, maps, [1, 2], 4)
        assert refined.min() >= 0
        assert refined.max() <= scale * maps.max() + 1e-12


@each
def test_no_way_across_an_edge(refine: Refine) -> None:
    image = torch.zeros(1, 3, 8, 10, dtype=torch.float64)
    image[..., 5:] = 1
    maps = torch.zeros(1, 1, 8, 10, dtype=torch.float64)
    maps[..., 2, 2] = 1
    refined = refine(image, maps, [1], 20)
    assert refined[..., 5:].abs().max() < (1e-2 if refine is not pamr else 1e-3)
    assert refined[..., 4, 4] > 1e-3, "but to the edge"


# ------------------------------------------------------------------------------------------ tensors


@each
def test_gradcheck(refine: Refine) -> None:
    image, maps = case(size=(3, 4), maps_size=(2, 3))
    assert torch.autograd.gradcheck(
        lambda x: refine(image[:1], x, [1, 2], 2), (maps[:1, :2].requires_grad_(),)
    )


@each
def test_gradient_is_the_plain_ways(refine: Refine) -> None:
    image, maps = case()
    kind = refine.__name__
    weight = torch.rand(2, 4, 7, 9, dtype=torch.float64)
    gradients = []
    for run in (refine, lambda *arguments: plain(kind, *arguments)):
        own = maps.clone().requires_grad_()
        (run(image, own, [1, 2, 4], 3) * weight).sum().backward()
        gradients.append(own.grad)
    torch.testing.assert_close(*gradients)


@each
def test_no_gradient_to_the_image(refine: Refine) -> None:
    image, maps = case()
    image.requires_grad_()
    assert not refine(image, maps, [1], 1).requires_grad
    refine(image, maps.requires_grad_(), [1], 1).sum().backward()
    assert image.grad is None


class _Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.numel())
        return out


@each
def test_no_stack_of_shifted_copies(refine: Refine) -> None:
    """48 neighbours and 21 maps: nothing is larger than the weights of the 48 neighbours."""
    image, maps = torch.rand(1, 3, 120, 160), torch.rand(1, 21, 15, 20)
    with _Largest() as largest:
        refine(image, maps, iterations=2)
    assert largest.numel == 48 * 120 * 160
    with _Largest() as largest:
        dilated_neighbors(maps)
    assert largest.numel == 48 * maps.numel(), "the counter sees a stack"


@each
def test_inputs_stay_as_they_are(refine: Refine) -> None:
    image, maps = case()
    before = image.clone(), maps.clone()
    for iterations in (0, 1):
        refine(image, maps, [1, 2], iterations)
    assert torch.equal(image, before[0])
    assert torch.equal(maps, before[1])


@each
def test_batch_equals_singles(refine: Refine) -> None:
    image, maps = case()
    refined = refine(image, maps, [1, 2], 3)
    for one in range(2):
        some = slice(one, one + 1)
        torch.testing.assert_close(refine(image[some], maps[some], [1, 2], 3), refined[some])
    noncontiguous = refine(image.flip(3).flip(3).mT.contiguous().mT, maps.expand(2, 4, 7, 9), [1, 2], 3)
    torch.testing.assert_close(noncontiguous, refined)


@each
def test_nothing_in_nothing_out(refine: Refine) -> None:
    image, maps = case(maps_size=(3, 4))
    assert refine(image, maps[:, :0]).shape == (2, 0, 7, 9)
    assert refine(image[:0], maps[:0]).shape == (0, 4, 7, 9)
    one = torch.rand(1, 2, 1, 1)
    torch.testing.assert_close(
        refine(torch.rand(1, 3, 1, 1), one), one * SCALE[refine.__name__] ** 10, msg="one pixel"
    )


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(refine: Refine, dtype: torch.dtype) -> None:
    image, maps = case(dtype=dtype)
    refined = refine(image, maps, [1, 2])
    assert refined.dtype == dtype
    exact = refine(image.double(), maps.double(), [1, 2])
    torch.testing.assert_close(refined, exact.to(dtype), atol=1e-5, rtol=torch.finfo(dtype).eps * 2)
    mixed = refine(image, maps.float(), [1, 2])
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed.double(), exact, atol=1e-5, rtol=1e-4)


@each
def test_autocast(refine: Refine) -> None:
    image, maps = case(dtype=torch.float32)
    expected = refine(image, maps, [1, 2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(refine(image, maps, [1, 2]), expected)


@each
def test_compiles_to_one_graph(refine: Refine) -> None:
    image, maps = case(dtype=torch.float32, maps_size=(4, 5))
    compiled = torch.compile(refine, fullgraph=True, backend="eager")
    assert torch.equal(compiled(image, maps, (1, 2), 2), refine(image, maps, (1, 2), 2))
    compiled = torch.compile(dilated_neighbors, fullgraph=True, backend="eager")
    assert torch.equal(compiled(maps, (1, 2)), dilated_neighbors(maps, (1, 2)))


@pytest.mark.parametrize(
    ("kind", "settings", "shown"),
    [
        ("pamr", {}, "PAMR(dilations=(1, 3), iterations=2)"),
        ("par", {"w1": 0.5, "w2": 0.1}, "PAR(dilations=(1, 3), iterations=2, w1=0.5, w2=0.1)"),
        (
            "varm",
            {"sharpness": 2.0, "w2": 0.1},
            "VARM(dilations=(1, 3), iterations=2, sharpness=2.0, w2=0.1)",
        ),
    ],
)
def test_module_equals_function(kind: str, settings: dict[str, float], shown: str) -> None:
    image, maps = case()
    refine, module = REFINERS[kind], MODULES[kind]([1, 3], 2, **settings)
    assert torch.equal(module(image, maps), refine(image, maps, [1, 3], 2, **settings))
    assert torch.equal(MODULES[kind]()(image, maps), refine(image, maps))
    assert not torch.allclose(module(image, maps), refine(image, maps, [1, 3], 3, **settings))
    assert repr(module) == shown
    assert not list(module.state_dict())


@each
def test_devices(refine: Refine, device: torch.device) -> None:
    image, maps = case(dtype=torch.float32, maps_size=(4, 5))
    refined = refine(image.to(device), maps.to(device))
    assert refined.device.type == device.type
    torch.testing.assert_close(refined.cpu(), refine(image, maps), atol=1e-5, rtol=1e-4)
    assert torch.equal(dilated_neighbors(maps.to(device)).cpu(), dilated_neighbors(maps))


IMAGE, MAPS = case()


@each
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f: f(IMAGE[0], MAPS), ValueError, r"image: expected shape \(B, 3, H, W\)"),
        (lambda f: f(IMAGE[:, :1], MAPS), ValueError, r"image: expected shape \(B, 3, H, W\)"),
        (lambda f: f(IMAGE, MAPS[:1]), ValueError, "maps: .* with B=2 from image"),
        (lambda f: f(IMAGE.byte(), MAPS), TypeError, "image: expected a floating-point tensor"),
        (lambda f: f(IMAGE, MAPS > 0.5), TypeError, "maps: expected a floating-point tensor"),
        (lambda f: f(IMAGE * torch.nan, MAPS), ValueError, "image: expected finite values"),
        (lambda f: f(IMAGE, MAPS / 0), ValueError, "maps: expected finite values"),
        (lambda f: f(IMAGE, MAPS, []), ValueError, "dilations: expected at least one distance"),
        (lambda f: f(IMAGE, MAPS, 3), ValueError, "dilations: expected at least one distance, got 3"),
        (lambda f: f(IMAGE, MAPS, [1, 0]), ValueError, r"dilations\[1\]: expected an integer >= 1, got 0"),
        (lambda f: f(IMAGE, MAPS, [1.0]), ValueError, r"dilations\[0\]: expected an integer >= 1, got 1.0"),
        (lambda f: f(IMAGE, MAPS, [1], -1), ValueError, "iterations: expected an integer >= 0, got -1"),
        (lambda f: f(IMAGE, MAPS, [1], 2.0), ValueError, "iterations: expected an integer >= 0"),
    ],
)
def test_errors(refine: Refine, call, error, message) -> None:
    with pytest.raises(error, match=message):
        call(refine)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: par(IMAGE, MAPS, w1=0), ValueError, "w1: expected a finite number > 0"),
        (lambda: par(IMAGE, MAPS, w2=-1), ValueError, "w2: expected a finite number >= 0"),
        (lambda: varm(IMAGE, MAPS, sharpness=0), ValueError, "sharpness: expected a finite number > 0"),
        (lambda: varm(IMAGE, MAPS, w2=-1), ValueError, "w2: expected a finite number >= 0"),
        (lambda: PAMR([]), ValueError, "dilations: expected at least one"),
        (lambda: PAR(w1=-1), ValueError, "w1: expected a finite number > 0"),
        (lambda: VARM(iterations=True), ValueError, "iterations: expected an integer >= 0"),
        (lambda: dilated_neighbors(MAPS[0]), ValueError, r"maps: expected shape \(B, C, H, W\)"),
        (lambda: dilated_neighbors(MAPS.long()), TypeError, "maps: expected a floating-point tensor"),
        (lambda: dilated_neighbors(MAPS, [True]), ValueError, r"dilations\[0\]: expected an integer >= 1"),
    ],
)
def test_errors_of_settings(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


def test_neighbors_of_no_map() -> None:
    assert dilated_neighbors(torch.rand(2, 0, 3, 4), [1]).shape == (2, 0, 8, 3, 4)
