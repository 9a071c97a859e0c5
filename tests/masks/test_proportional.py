"""`proportional_pseudo_mask` and its parts: section 3 of the PMM specification."""

from collections.abc import Callable

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pseudolabel.masks import (
    ProportionalPseudoMask,
    class_foreground,
    proportional_argmax,
    proportional_pseudo_mask,
)
from pseudolabel.refine import CRF_PRESETS, DenseCRF

unit_maps = hnp.arrays(
    "float64",
    st.tuples(st.just(1), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)),
    elements=st.one_of(st.just(0.0), st.floats(0.01, 1)),
).map(torch.from_numpy)


def without_crf(cam: torch.Tensor, labels: torch.Tensor | None = None, **settings) -> torch.Tensor:
    labels = torch.ones(cam.shape[:2]) if labels is None else labels
    return proportional_pseudo_mask(
        torch.zeros(cam.shape[0], 3, *cam.shape[2:]), cam, labels, crf=None, **settings
    )


def test_hand_computed_shares() -> None:
    # Totals over the foreground 2 and 0.5; shares with offset 1: 0.8/3 against 0.5/1.5 on the last pixel.
    cam = torch.tensor([[[[0.6, 0.6, 0.8]], [[0.0, 0.3, 0.5]]]])
    foreground = torch.tensor([[[[True, True, True]], [[True, False, True]]]])
    assert proportional_argmax(cam, foreground).tolist() == [[[1, 1, 2]]]
    # Over all pixels the second total is 0.8: 0.8/3 = 0.267 against 0.5/1.8 = 0.278, still the second.
    assert proportional_argmax(cam, foreground, share_over="all").tolist() == [[[1, 1, 2]]]
    # A large offset leaves the plain argmax.
    assert proportional_argmax(cam, foreground, offset=1e6).tolist() == [[[1, 1, 1]]]


def test_hand_computed_share_over_all() -> None:
    cam = torch.tensor([[[[0.5, 0.0]], [[0.6, 0.9]]]])
    foreground = torch.tensor([[[[True, False]], [[True, False]]]])
    assert proportional_argmax(cam, foreground, offset=0.1).tolist() == [[[2, 0]]], "0.5/0.6 < 0.6/0.7"
    assert proportional_argmax(cam, foreground, offset=0.1, share_over="all").tolist() == [[[1, 0]]], (
        "0.5/0.6 > 0.6/1.6"
    )


def test_hand_computed_foreground() -> None:
    # x = (1 - x)^11 at 0.1556.
    cam = torch.tensor([[[[0.0, 0.155, 0.156, 1.0]]]])
    image = torch.zeros(1, 3, 1, 4)
    assert class_foreground(image, cam, crf=None).tolist() == [[[[False, False, True, True]]]]
    assert class_foreground(image, cam, alpha=1, crf=None).tolist() == [[[[False, False, False, True]]]]


@pytest.mark.parametrize("name", ["ppmg_ident", "ppmg_dense"])
def test_golden_from_the_recorded_crf(golden: Callable, name: str) -> None:
    """Exact labels when the CRF answers what it answered the authors' program."""
    data = golden(f"pmm/public_{name}")
    for case in range(int(data["n_cases"])):
        image = torch.from_numpy(data[f"c{case}_img"]).permute(2, 0, 1)[None] / 255
        cam = torch.from_numpy(data[f"c{case}_cam"])[None]
        keys = data[f"c{case}_keys"]
        recorded_in, recorded_out = data[f"c{case}_crf_in"], torch.from_numpy(data[f"c{case}_crf_out"])

        def replay(_image: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
            np.testing.assert_allclose(probs[0].numpy(), recorded_in, atol=4e-6, rtol=0)  # noqa: B023
            return recorded_out[None]  # noqa: B023

        mask = proportional_pseudo_mask(
            image,
            cam,
            torch.ones(1, len(keys)),
            alpha=int(data[f"c{case}_alpha"]),
            scale=float(data[f"c{case}_cv_scale"]),
            threshold=float(data[f"c{case}_cam_thresh"]),
            crf=replay if len(keys) else None,
        )
        label = np.concatenate([[0], keys + 1])[mask[0].numpy()]
        np.testing.assert_array_equal(label, data[f"c{case}_label"])


@pytest.mark.parametrize("name", ["ppmg_ident", "ppmg_dense"])
def test_golden_from_end_to_end(golden: Callable, name: str) -> None:
    """With our own CRF: labels may differ only where a marginal is within the CRF's tolerance of the cut."""
    data = golden(f"pmm/public_{name}")
    crf = None if name == "ppmg_ident" else DenseCRF(**CRF_PRESETS["pmm"])
    for case in range(int(data["n_cases"])):
        image = torch.from_numpy(data[f"c{case}_img"]).permute(2, 0, 1)[None] / 255
        cam, keys = torch.from_numpy(data[f"c{case}_cam"])[None], data[f"c{case}_keys"]
        mask = proportional_pseudo_mask(
            image,
            cam,
            torch.ones(1, len(keys)),
            alpha=int(data[f"c{case}_alpha"]),
            scale=float(data[f"c{case}_cv_scale"]),
            threshold=float(data[f"c{case}_cam_thresh"]),
            crf=crf,
        )
        label = np.concatenate([[0], keys + 1])[mask[0].numpy()]
        undecided = (np.abs(data[f"c{case}_crf_out"][:, 1] - 0.5) < 2e-3).any(0)
        np.testing.assert_array_equal(label[~undecided], data[f"c{case}_label"][~undecided])
        assert undecided.mean() < 0.01


@pytest.mark.parametrize("kind", ["f16", "f32"])
def test_golden_half_precision(golden: Callable, kind: str) -> None:
    data = golden("pmm/public_ppmg_f16")
    image = torch.from_numpy(data["img"]).permute(2, 0, 1)[None] / 255
    cam = torch.from_numpy(data["cam"])[None]
    assert cam.dtype == torch.float16
    if kind == "f32":
        cam = cam.float()
    for name, crf in (("ident", None), ("dense", DenseCRF(**CRF_PRESETS["pmm"]))):
        mask = proportional_pseudo_mask(image, cam, torch.ones(1, len(data["keys"])), crf=crf)
        label = np.concatenate([[0], data["keys"] + 1])[mask[0].numpy()]
        assert (label == data[f"{name}_label_{kind}"]).mean() > 0.999


def test_no_label_is_all_background() -> None:
    assert without_crf(torch.ones(2, 3, 4, 4), torch.zeros(2, 3)).eq(0).all()
    assert without_crf(torch.ones(2, 0, 4, 4), torch.zeros(2, 0)).eq(0).all()


def test_absent_classes_do_not_count() -> None:
    cam = torch.rand(2, 3, 5, 5)
    labels = torch.tensor([[0, 1, 0], [1, 0, 1]])
    mask = without_crf(cam, labels)
    assert set(mask[0].unique().tolist()) <= {0, 2}
    assert set(mask[1].unique().tolist()) <= {0, 1, 3}
    assert torch.equal(mask, without_crf(cam * labels[:, :, None, None], labels))


def test_a_class_of_zeros_contributes_nothing() -> None:
    cam = torch.rand(1, 2, 5, 5)
    with_zero = torch.cat([torch.zeros(1, 1, 5, 5), cam], dim=1)
    expected = without_crf(cam)
    assert torch.equal(without_crf(with_zero), torch.where(expected > 0, expected + 1, 0))


def test_a_hole_that_the_crf_fills_stays_background() -> None:
    """F = 1 where the map is exactly 0: every score is 0 there, and background comes first."""
    cam = torch.tensor([[[[0.9, 0.0, 0.9]]]])
    everything = lambda image, probs: torch.ones_like(probs)  # noqa: E731
    mask = proportional_pseudo_mask(torch.zeros(1, 3, 1, 3), cam, torch.ones(1, 1), crf=everything)
    assert mask.tolist() == [[[1, 0, 1]]]


def test_equal_classes_go_to_the_lowest() -> None:
    assert without_crf(torch.full((1, 3, 2, 2), 0.8)).eq(1).all()


def test_negative_values_lose_to_the_background() -> None:
    cam = torch.tensor([[[[-0.2, 0.9]]]])
    assert proportional_argmax(cam, torch.ones(1, 1, 1, 2, dtype=torch.bool)).tolist() == [[[0, 1]]]


def test_the_cut_itself_is_background() -> None:
    half = lambda image, probs: torch.full_like(probs, 0.5)  # noqa: E731
    assert not class_foreground(torch.zeros(1, 3, 1, 3), torch.ones(1, 1, 1, 3), crf=half).any()


def test_a_class_without_response_and_no_offset() -> None:
    cam = torch.tensor([[[[0.0, 0.0]], [[0.0, 0.9]]]])
    foreground = torch.ones(1, 2, 1, 2, dtype=torch.bool)
    assert proportional_argmax(cam, foreground, offset=0).tolist() == [[[0, 2]]]


def test_no_background_is_legal() -> None:
    assert without_crf(torch.full((1, 1, 3, 3), 0.9)).eq(1).all()


def test_single_class_ignores_the_share() -> None:
    cam = torch.rand(1, 1, 6, 6)
    foreground = cam > 0.4
    assert torch.equal(proportional_argmax(cam, foreground), foreground[:, 0].long())


def test_one_pixel_image() -> None:
    image = torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1)
    assert proportional_pseudo_mask(image, torch.ones(1, 1, 1, 1), torch.ones(1, 1)).tolist() == [[[1]]]


def test_small_maps_are_resized_to_the_image() -> None:
    cam = torch.zeros(1, 1, 2, 2)
    cam[..., 0] = 1
    mask = proportional_pseudo_mask(torch.zeros(1, 3, 4, 8), cam, torch.ones(1, 1), crf=None)
    assert mask.shape == (1, 4, 8)
    assert mask[0, :, 0].eq(1).all()
    assert mask[0, :, -1].eq(0).all()


def test_problems_share_one_crf_call() -> None:
    seen = []

    def crf(image: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(probs.shape))
        return probs

    labels = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 1, 0, 0]])
    proportional_pseudo_mask(torch.rand(2, 3, 4, 5), torch.rand(2, 5, 4, 5), labels, crf=crf)
    assert seen == [(2, 3, 2, 4, 5)], "three present classes at most, not five"


@given(cam=unit_maps)
def test_labels_and_their_reason(cam: torch.Tensor) -> None:
    mask = without_crf(cam)
    assert mask.min() >= 0
    assert mask.max() <= cam.shape[1]
    chosen = torch.cat([torch.zeros_like(cam[:, :1]), cam], dim=1).gather(1, mask[:, None])[:, 0]
    assert (chosen > 0)[mask > 0].all()


@given(cam=unit_maps)
def test_class_order_matters_at_ties_only(cam: torch.Tensor) -> None:
    count = cam.shape[1]
    # Values that differ everywhere, so that there are no ties.
    cam = cam * (1 - 0.01 * torch.arange(cam.numel()).view_as(cam) / cam.numel())
    foreground = cam > 0.1
    order = torch.arange(count - 1, -1, -1)
    mask, turned = (
        proportional_argmax(cam, foreground),
        proportional_argmax(cam[:, order], foreground[:, order]),
    )
    shares = (cam * foreground) / (1 + (cam * foreground).sum((-2, -1), keepdim=True))
    top = shares.sort(1, descending=True).values
    clear = torch.ones_like(mask, dtype=torch.bool) if count == 1 else (top[:, 0] - top[:, 1]) > 1e-12
    assert torch.equal(mask[clear], torch.where(turned > 0, count + 1 - turned, 0)[clear])


@given(cam=unit_maps)
def test_adding_a_class_of_zeros_changes_nothing(cam: torch.Tensor) -> None:
    assert torch.equal(without_crf(torch.cat([cam, torch.zeros_like(cam[:, :1])], dim=1)), without_crf(cam))


@given(cam=unit_maps, factor=st.floats(0.1, 1))
def test_rescaling_a_class_cancels_without_the_offset(cam: torch.Tensor, factor: float) -> None:
    foreground = cam > 0.05
    scaled = cam.clone()
    scaled[:, 0] *= factor
    total = (cam * foreground).sum((-2, -1), keepdim=True)
    top = (cam * foreground / total).nan_to_num().sort(1, descending=True).values
    clear = (
        (top[:, 0] - top[:, 1] > 1e-9) if cam.shape[1] > 1 else torch.ones_like(top[:, 0], dtype=torch.bool)
    )
    masks = [proportional_argmax(maps, foreground, offset=0) for maps in (cam, scaled)]
    assert torch.equal(masks[0][clear], masks[1][clear])


@given(cam=unit_maps, seed=st.integers(0, 20))
def test_shrinking_the_rest_of_a_class_loses_it_no_pixel(cam: torch.Tensor, seed: int) -> None:
    foreground = torch.ones_like(cam, dtype=torch.bool)
    kept = torch.rand(cam.shape[2:], generator=torch.Generator().manual_seed(seed)) < 0.5
    shrunk = cam.clone()
    shrunk[0, 0] = cam[0, 0].where(kept, cam[0, 0] * 0.5)
    before, after = proportional_argmax(cam, foreground), proportional_argmax(shrunk, foreground)
    assert (after == 1)[(before == 1) & kept].all()


@given(cam=unit_maps)
def test_flip_equivariant_without_crf(cam: torch.Tensor) -> None:
    # Sums in another order may decide ties otherwise: values on a coarse grid have exact sums.
    cam = (cam * 64).round() / 64
    foreground = cam > 0.1
    assert torch.equal(
        proportional_argmax(cam.flip(-1), foreground.flip(-1)), proportional_argmax(cam, foreground).flip(-1)
    )


@given(cam=unit_maps)
def test_larger_exponents_grow_the_foreground(cam: torch.Tensor) -> None:
    image = torch.zeros(1, 3, *cam.shape[2:])
    small, large = (class_foreground(image, cam, alpha=alpha, crf=None) for alpha in (4, 11))
    assert large[small].all()


def test_batch_equals_singles(generator: torch.Generator) -> None:
    image, cam = torch.rand(3, 3, 8, 9, generator=generator), torch.rand(3, 4, 8, 9, generator=generator) ** 3
    labels = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]])
    singles = [
        proportional_pseudo_mask(image[b : b + 1], cam[b : b + 1], labels[b : b + 1])
        for b in range(len(image))
    ]
    assert torch.equal(proportional_pseudo_mask(image, cam, labels), torch.cat(singles))


def test_module_equals_function(generator: torch.Generator) -> None:
    image, cam = torch.rand(1, 3, 6, 6, generator=generator), torch.rand(1, 3, 6, 6, generator=generator) ** 4
    labels = torch.ones(1, 3)
    settings = {
        "alpha": 3,
        "scale": 0.1,
        "threshold": 0.1,
        "crf": None,
        "cut": 0.6,
        "offset": 0.2,
        "share_over": "all",
        "share_of": "smoothed",
    }
    module = ProportionalPseudoMask(**settings)
    assert torch.equal(module(image, cam, labels), proportional_pseudo_mask(image, cam, labels, **settings))
    assert repr(module).startswith("ProportionalPseudoMask(alpha=3, scale=0.1, threshold=0.1, cut=0.6")
    default = ProportionalPseudoMask()(image, cam, labels)
    assert torch.equal(default, proportional_pseudo_mask(image, cam, labels))


@pytest.mark.parametrize(
    "setting", [{"cut": 0.9}, {"share_of": "smoothed"}, {"share_over": "all"}, {"offset": 50}]
)
def test_every_setting_does_something(setting, generator: torch.Generator) -> None:
    cam = torch.rand(1, 3, 16, 16, generator=generator) ** torch.tensor([1.0, 3, 6]).view(1, 3, 1, 1)
    assert not torch.equal(without_crf(cam), without_crf(cam, **setting))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype, generator: torch.Generator) -> None:
    cam = torch.rand(1, 3, 16, 16, generator=generator) ** 3
    mask = without_crf(cam.to(dtype))
    assert mask.dtype == torch.int64
    assert (mask == without_crf(cam)).float().mean() > 0.95


def test_devices(device: torch.device) -> None:
    mask = proportional_pseudo_mask(
        torch.rand(1, 3, 4, 4, device=device),
        torch.rand(1, 2, 4, 4, device=device),
        torch.ones(1, 2, device=device),
    )
    assert mask.device.type == device.type


IMAGE, CAM, LABELS = torch.rand(1, 3, 4, 4), torch.rand(1, 2, 4, 4), torch.ones(1, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f: f(IMAGE[0], CAM, LABELS), ValueError, r"image: expected shape \(B, 3, H, W\)"),
        (lambda f: f(IMAGE * 255, CAM, LABELS), ValueError, r"image: .*\(divide 8-bit values by 255\)"),
        (
            lambda f: f((IMAGE * 255).byte(), CAM, LABELS),
            TypeError,
            "image: expected a floating-point tensor",
        ),
        (lambda f: f(IMAGE, CAM * 2, LABELS), ValueError, r"cam: expected values in \[0, 1\]"),
        (lambda f: f(IMAGE, CAM * torch.nan, LABELS), ValueError, r"cam: expected values in \[0, 1\]"),
        (lambda f: f(IMAGE, CAM.long(), LABELS), TypeError, "cam: expected a floating-point tensor"),
        (lambda f: f(IMAGE, CAM, LABELS[:, :1]), ValueError, r"labels: .* with C=2 from cam, got \(1, 1\)"),
        (lambda f: f(IMAGE, CAM, LABELS * 2), ValueError, r"labels: expected a multi-hot .* \[2.0\]"),
        (lambda f: f(IMAGE, CAM, LABELS, alpha=0), ValueError, "alpha: expected a finite number > 0"),
        (lambda f: f(IMAGE, CAM, LABELS, cut=1.5), ValueError, "cut: expected a finite number"),
        (lambda f: f(IMAGE, CAM, LABELS, offset=-1), ValueError, "offset: expected a finite number >= 0"),
        (lambda f: f(IMAGE, CAM, LABELS, share_over="some"), ValueError, "share_over: expected one of"),
        (lambda f: f(IMAGE, CAM, LABELS, share_of="some"), ValueError, "share_of: expected one of"),
    ],
)
def test_errors(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call(proportional_pseudo_mask)


def test_foreground_is_bool() -> None:
    with pytest.raises(TypeError, match=r"foreground: expected a bool tensor, got torch.int64"):
        proportional_argmax(torch.rand(1, 2, 3, 3), torch.ones(1, 2, 3, 3).long())


def test_photo_is_floating_point_without_crf() -> None:
    with pytest.raises(TypeError, match=r"image: expected a floating-point tensor"):
        class_foreground(torch.ones(1, 3, 2, 2).long(), torch.rand(1, 2, 2, 2), crf=None)
