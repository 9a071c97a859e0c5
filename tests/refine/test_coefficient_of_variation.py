"""`coefficient_of_variation` and `coefficient_of_variation_smoothing`: section 2 of the PMM specification."""

import math
from collections.abc import Callable

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pseudolabel.refine import (
    CoefficientOfVariationSmoothing,
    coefficient_of_variation,
    coefficient_of_variation_smoothing,
)

unit_maps = hnp.arrays(
    "float64",
    hnp.array_shapes(min_dims=4, max_dims=4, max_side=5),
    elements=st.floats(0, 1, allow_subnormal=False),
).map(torch.from_numpy)
scales = st.floats(0, 0.45)
thresholds = st.floats(0.05, 0.5)


def test_hand_computed() -> None:
    # Active: 0.2 and 0.6, mean 0.4, population deviation 0.2, so cv = 0.3 * 0.5.
    cam = torch.tensor([[[[0.0, 0.04], [0.2, 0.6]]]])
    torch.testing.assert_close(coefficient_of_variation(cam), torch.tensor([[0.15]]))
    expected = torch.tensor([[[[0.0, 0.0], [0.2**0.85, 0.6**0.85]]]])
    torch.testing.assert_close(coefficient_of_variation_smoothing(cam), expected)


def test_golden(golden: Callable) -> None:
    data = golden("pmm/public_cvs")
    for case in range(int(data["n_cases"])):
        cam = torch.from_numpy(data[f"c{case}_cam"])[None]
        settings = float(data[f"c{case}_scale"]), float(data[f"c{case}_t"])
        cv, smoothed = (
            coefficient_of_variation(cam, *settings),
            coefficient_of_variation_smoothing(cam, *settings),
        )
        np.testing.assert_allclose(cv[0].numpy(), data[f"c{case}_cov"], atol=4e-6, rtol=0)
        np.testing.assert_allclose(smoothed[0].numpy(), data[f"c{case}_cvs"], atol=4e-6, rtol=0)
        np.testing.assert_allclose(
            ((1 - smoothed) ** 11)[0].numpy(), data[f"c{case}_bg11"], atol=4e-6, rtol=0
        )


def test_a_pixel_equal_to_the_threshold_is_kept_but_not_counted() -> None:
    cam = torch.tensor([[[[0.05, 0.2, 0.6]]]])
    torch.testing.assert_close(coefficient_of_variation(cam), torch.tensor([[0.15]]))
    assert coefficient_of_variation_smoothing(cam)[0, 0, 0, 0].item() == pytest.approx(0.05**0.85)


@pytest.mark.parametrize("cam", [torch.zeros(1, 1, 3, 3), torch.full((1, 1, 3, 3), 0.04)])
def test_nothing_above_the_threshold(cam: torch.Tensor) -> None:
    assert coefficient_of_variation(cam).eq(0).all()
    assert coefficient_of_variation_smoothing(cam).eq(0).all()


def test_constant_map_stays() -> None:
    cam = torch.full((1, 1, 4, 4), 0.3)
    assert coefficient_of_variation(cam).abs().max() < 1e-6
    torch.testing.assert_close(coefficient_of_variation_smoothing(cam), cam)


def test_one_active_pixel() -> None:
    cam = torch.zeros(1, 1, 3, 3)
    cam[0, 0, 1, 1] = 0.7
    assert coefficient_of_variation(cam).eq(0).all()
    torch.testing.assert_close(coefficient_of_variation_smoothing(cam), cam)


def test_negative_values_are_dropped() -> None:
    cam = torch.tensor([[[[-1.0, 0.2, 0.6]]]])
    assert coefficient_of_variation_smoothing(cam, threshold=0)[0, 0, 0, 0] == 0


def test_values_above_one_are_clamped() -> None:
    assert coefficient_of_variation_smoothing(torch.tensor([[[[0.1, 1.001]]]])).max() == 1


@pytest.mark.parametrize(("scale", "threshold"), [(5.0, 0.05), (1.0, 0.0)])
def test_exponent_stays_positive(scale: float, threshold: float) -> None:
    """Unguarded, 0^0 = 1 would make foreground of zeros, and a negative exponent infinities."""
    cam = torch.zeros(1, 1, 10, 10)
    cam[0, 0, 0] = torch.linspace(0.001, 1, 10)
    out = coefficient_of_variation_smoothing(cam, scale, threshold)
    assert out.isfinite().all()
    assert out[cam == 0].eq(0).all()
    assert out.max() <= 1
    assert (out[0, 0, 0][cam[0, 0, 0] >= threshold].diff() > 0).all(), "a negative exponent turns the order"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_objects_in_half_precision(dtype: torch.dtype) -> None:
    """The official code sums in float16: above 65504 the deviation is infinite and all becomes foreground."""
    ys, xs = torch.meshgrid(torch.arange(375), torch.arange(500), indexing="ij")
    disc = ((ys - 187) ** 2 + (xs - 250) ** 2 < 165**2).float() * (0.8 + 0.2 * xs / 500)
    cam = disc[None, None].to(dtype)
    assert cam.float().sum() > 65504
    exact = coefficient_of_variation(cam.float())
    torch.testing.assert_close(coefficient_of_variation(cam), exact, atol=1e-3, rtol=0)
    smoothed = coefficient_of_variation_smoothing(cam)
    assert smoothed.dtype == dtype
    assert smoothed[disc[None, None] == 0].eq(0).all()


@given(cam=unit_maps, scale=scales, threshold=thresholds)
def test_bound(cam: torch.Tensor, scale: float, threshold: float) -> None:
    cv = coefficient_of_variation(cam, scale, threshold)
    assert (cv >= 0).all()
    assert (cv <= scale * (1 - threshold) / (2 * math.sqrt(threshold)) + 1e-9).all()


@given(cam=unit_maps, scale=scales, threshold=thresholds)
def test_grows_and_keeps_its_order(cam: torch.Tensor, scale: float, threshold: float) -> None:
    u = coefficient_of_variation_smoothing(cam, scale, threshold)
    assert u.min() >= 0
    assert u.max() <= 1
    assert u[cam < threshold].eq(0).all()
    assert (u >= cam - 1e-12)[cam >= threshold].all()
    assert u[cam == 1].eq(1).all()
    order = cam.flatten(2).argsort(-1)
    # Vectors and the rest of a row may take `pow` of one value apart by the last bit.
    assert (u.flatten(2).gather(-1, order).diff(dim=-1) >= -torch.finfo(u.dtype).eps).all()


@given(cam=unit_maps, threshold=thresholds)
def test_scale_zero_only_cuts_off(cam: torch.Tensor, threshold: float) -> None:
    torch.testing.assert_close(
        coefficient_of_variation_smoothing(cam, 0, threshold), cam.where(cam >= threshold, 0)
    )


@given(cam=unit_maps, factor=st.floats(0.1, 1))
def test_joint_rescale(cam: torch.Tensor, factor: float) -> None:
    # Moved off the threshold, where rounding would decide.
    cam = cam.where((cam - 0.2).abs() > 1e-6, 0)
    torch.testing.assert_close(
        coefficient_of_variation(cam * factor, 0.3, 0.2 * factor), coefficient_of_variation(cam, 0.3, 0.2)
    )


@given(cam=unit_maps, seed=st.integers(0, 99))
def test_pixel_order_does_not_matter(cam: torch.Tensor, seed: int) -> None:
    order = torch.randperm(cam[0, 0].numel(), generator=torch.Generator().manual_seed(seed))
    shuffled = cam.flatten(2)[..., order].view_as(cam)
    torch.testing.assert_close(coefficient_of_variation(shuffled), coefficient_of_variation(cam))
    expected = coefficient_of_variation_smoothing(cam).flatten(2)[..., order].view_as(cam)
    torch.testing.assert_close(coefficient_of_variation_smoothing(shuffled), expected)


@given(cam=unit_maps)
def test_tiling_and_nearest_upsampling_change_nothing(cam: torch.Tensor) -> None:
    cv = coefficient_of_variation(cam)
    torch.testing.assert_close(coefficient_of_variation(cam.repeat(1, 1, 2, 3)), cv)
    torch.testing.assert_close(coefficient_of_variation(cam.repeat_interleave(2, -1)), cv)


@given(cam=unit_maps, other=st.floats(0, 0.199))
def test_values_below_the_threshold_have_no_influence(cam: torch.Tensor, other: float) -> None:
    changed = cam.where(cam >= 0.2, other)
    torch.testing.assert_close(
        coefficient_of_variation_smoothing(changed, 0.3, 0.2),
        coefficient_of_variation_smoothing(cam, 0.3, 0.2),
    )


@given(cam=unit_maps)
def test_classes_and_images_are_independent(cam: torch.Tensor) -> None:
    whole = coefficient_of_variation_smoothing(torch.cat([cam, torch.zeros_like(cam)], dim=1))
    singles = [
        torch.cat(
            [coefficient_of_variation_smoothing(cam[b, c][None, None]) for c in range(cam.shape[1])], dim=1
        )
        for b in range(cam.shape[0])
    ]
    torch.testing.assert_close(whole[:, : cam.shape[1]], torch.cat(singles))


def test_gradients(generator: torch.Generator) -> None:
    cam = 0.1 + 0.8 * torch.rand(1, 2, 3, 3, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(coefficient_of_variation_smoothing, (cam.requires_grad_(),))


@pytest.mark.parametrize("value", [0.0, 0.04, 0.5, 1.0])
def test_gradients_of_constant_maps_are_finite(value: float) -> None:
    cam = torch.full((1, 1, 3, 3), value, requires_grad=True)
    coefficient_of_variation_smoothing(cam).sum().backward()
    assert cam.grad is not None
    assert cam.grad.isfinite().all()


def test_slope_at_one(flat_clamp: Callable) -> None:
    """The highest pixel of a map is 1 after normalising."""
    cam = torch.tensor([[[[0.5, 1.0, 1.5]]]], requires_grad=True)
    with flat_clamp():
        coefficient_of_variation_smoothing(cam, scale=0).sum().backward()
    assert cam.grad.flatten().tolist() == [1, 1, 0]


def test_module_equals_function(generator: torch.Generator) -> None:
    cam = torch.rand(2, 3, 5, 5, generator=generator)
    module = CoefficientOfVariationSmoothing(0.2, 0.1)
    assert torch.equal(module(cam), coefficient_of_variation_smoothing(cam, 0.2, 0.1))
    assert repr(module) == "CoefficientOfVariationSmoothing(scale=0.2, threshold=0.1)"
    assert torch.equal(CoefficientOfVariationSmoothing()(cam), coefficient_of_variation_smoothing(cam))


def test_compiles() -> None:
    cam = torch.rand(1, 2, 4, 4)
    compiled = torch.compile(coefficient_of_variation_smoothing, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(cam), coefficient_of_variation_smoothing(cam))


def test_no_classes() -> None:
    assert coefficient_of_variation_smoothing(torch.rand(2, 0, 4, 4)).shape == (2, 0, 4, 4)


def test_devices(device: torch.device) -> None:
    assert (
        coefficient_of_variation_smoothing(torch.rand(1, 1, 2, 2, device=device)).device.type == device.type
    )


@pytest.mark.parametrize("function", [coefficient_of_variation, coefficient_of_variation_smoothing])
@pytest.mark.parametrize(
    ("cam", "settings", "error", "message"),
    [
        (torch.rand(3, 4, 4), {}, ValueError, r"cam: expected shape \(B, C, h, w\)"),
        (torch.ones(1, 1, 2, 2, dtype=torch.bool), {}, TypeError, "cam: expected a floating-point tensor"),
        (torch.full((1, 1, 2, 2), torch.nan), {}, ValueError, "cam: expected finite values, got 4 NaN"),
        (
            torch.rand(1, 1, 2, 2),
            {"scale": -0.1},
            ValueError,
            "scale: expected a finite number >= 0, got -0.1",
        ),
        (torch.rand(1, 1, 2, 2), {"threshold": -0.1}, ValueError, "threshold: expected a finite number >= 0"),
        (torch.rand(1, 1, 2, 2), {"scale": math.nan}, ValueError, "scale: expected a finite number"),
    ],
)
def test_errors(function, cam, settings, error, message) -> None:
    with pytest.raises(error, match=message):
        function(cam, **settings)
