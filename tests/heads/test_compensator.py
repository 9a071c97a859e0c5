"""Compensator: sections 7, 12, 13 of the RTC specification."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from pseudolabel.cam import normalize_cam
from pseudolabel.heads import (
    Compensator,
    CrossTransformRegularization,
    TopK,
    compensate,
    compensation_loss,
    confidence_scores,
    topk_pixels,
)
from pseudolabel.refine import keep_max_class

seeds = st.integers(0, 1000)
LABELS = torch.tensor([[1, 0, 1], [0, 0, 1]])
PRESENT = torch.tensor([True, True, False, True])


def tensors(data: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in data.items()}


def case(seed: int = 0, dtype: torch.dtype = torch.float64):
    """Scores, features of the other view, and maps of the classifier at another size."""
    generator = torch.Generator().manual_seed(seed)
    scores = confidence_scores(torch.rand(2, 4, 4, 6, generator=generator, dtype=dtype))
    features = torch.rand(2, 5, 4, 6, generator=generator, dtype=dtype)
    return scores, features, torch.rand(2, 3, 8, 9, generator=generator, dtype=dtype)


def ctr_case(dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(1)
    refined1, refined2 = torch.rand(2, 2, 4, 4, 6, generator=generator, dtype=dtype)
    x1, x2 = torch.rand(2, 2, 5, 4, 6, generator=generator, dtype=dtype)
    cam1, cam2 = torch.rand(2, 2, 3, 8, 9, generator=generator, dtype=dtype)
    head = CrossTransformRegularization(background_ranking="complement")
    return cam1, cam2, head(refined1, refined2, x1, x2, LABELS), LABELS


# ------------------------------------------------------------------------------------------ golden files


@pytest.mark.parametrize("name", ["ctr", "ctr_edge"])
@pytest.mark.parametrize(("view", "other"), [(1, 2), (2, 1)])
def test_golden_compensate(golden: Callable, name: str, view: int, other: int) -> None:
    data = tensors(golden(f"rtc/public_{name}"))
    topk = TopK(data[f"top_values{view}"], data[f"top_indices{view}"])
    present = F.pad(data["label"].amax(0), (1, 0), value=1)
    found = compensate(data[f"norm_cam{view}"], data[f"feat{other}"], topk, present)
    torch.testing.assert_close(found, data[f"comp_cam{view}"], atol=1e-4, rtol=1e-3)
    sharp = compensate(data[f"norm_cam{view}"], data[f"feat{other}"], topk, present, temperature=0.05)
    assert (sharp - data[f"comp_cam{view}"]).abs().max() > 0.03


def test_golden_loss(golden: Callable) -> None:
    data = tensors(golden("rtc/public_com"))
    total = 0
    for view in (1, 2):
        cam, compensated = data[f"cam{view}"].requires_grad_(), data[f"comp_cam{view}"]
        loss = compensation_loss(cam[:, 1:], compensated, data["label"])
        torch.testing.assert_close(loss, data[f"loss{view}"], atol=1e-6, rtol=1e-5)
        loss.backward()
        torch.testing.assert_close(cam.grad, data[f"grad_cam{view}"], atol=1e-9, rtol=1e-3)
        total = total + loss
    torch.testing.assert_close(total, data["loss"], atol=1e-6, rtol=1e-5)


def test_golden_target(golden: Callable) -> None:
    """The target, seen through the loss: zero maps of the classifier leave its mean."""
    data = tensors(golden("rtc/public_com"))
    cam = torch.zeros_like(data["cam1"][:, 1:])
    loss = compensation_loss(cam, data["comp_cam1"], data["label"], keep_ratio=1.0, reduction="none")
    torch.testing.assert_close(loss, data["target1"][:, 1:].mean((1, 2, 3)), atol=1e-6, rtol=1e-5)


# ------------------------------------------------------------------------------------------ compensation


def test_hand_computed() -> None:
    """Weights e and 1 of cosines 1 and 0 at temperature 1."""
    scores = torch.tensor([[[[0.8, 0.0, 0.4]]]])
    features = torch.tensor([[[[1.0, 3.0, 0.0]], [[0.0, 0.0, 2.0]]]])
    topk = TopK(torch.tensor([[0.8, 0.4]]), torch.tensor([[0, 2]]))
    e = float(np.e)
    first, last = (0.8 * e + 0.4) / (1 + e), (0.8 + 0.4 * e) / (1 + e)
    expected = torch.tensor([0.8 + first, first, 0.4 + last])
    found = compensate(scores, features, topk, torch.tensor([1]))
    torch.testing.assert_close(found.flatten(), expected)


def test_reaches_over_the_images() -> None:
    scores = torch.zeros(2, 1, 1, 2)
    scores[0, 0, 0, 0] = 0.9
    features = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]], [[[0.0, 1.0]], [[1.0, 0.0]]]])
    topk = TopK(torch.tensor([[0.9, 0.0]]), torch.tensor([[0, 1]]))
    found = compensate(scores, features, topk, torch.tensor([True]), temperature=0.02)
    torch.testing.assert_close(found[1, 0, 0], torch.tensor([0.0, 0.9]))


@given(seed=seeds, temperature=st.sampled_from([0.02, 0.1, 1.0]))
def test_properties(seed: int, temperature: float) -> None:
    scores, features, _ = case(seed)
    topk = topk_pixels(scores, k=5)
    added = compensate(scores, features, topk, PRESENT, temperature=temperature) - scores
    assert added[:, 2].eq(0).all(), "scores of absent classes stay"
    low, high = topk.values.amin(1), topk.values.amax(1)
    for k in (0, 1, 3):
        assert added[:, k].min() >= low[k] - 1e-9
        assert added[:, k].max() <= high[k] + 1e-9
    endless = compensate(scores, features, topk, PRESENT, temperature=1e9) - scores
    expected = topk.values.mean(1)[[0, 1, 3], None, None].expand(2, 3, 4, 6)
    torch.testing.assert_close(endless[:, [0, 1, 3]], expected)


def test_close_to_nothing_at_temperature_one() -> None:
    """The finding of the specification, at the official size: a constant is added, or nearly so."""
    generator = torch.Generator().manual_seed(0)
    scores = confidence_scores(torch.rand(8, 4, 16, 16, generator=generator))
    features = torch.rand(8, 256, 16, 16, generator=generator)
    topk, present = topk_pixels(scores), torch.ones(4)
    spread = {
        temperature: (compensate(scores, features, topk, present, temperature=temperature) - scores)[:, 1:]
        .std((0, 2, 3))
        .max()
        for temperature in (1.0, 0.02)
    }
    assert spread[1.0] < 1e-3
    assert spread[0.02] > 20 * spread[1.0]


def test_all_zero_map_of_a_present_class() -> None:
    """Scores of -1 become -2, and the target is 0."""
    scores, features, cam = case()
    scores[:, 1] = -1
    found = compensate(scores, features, topk_pixels(scores), PRESENT)
    torch.testing.assert_close(found[:, 1], torch.full_like(found[:, 1], -2))
    only = torch.tensor([[1, 0, 0], [1, 0, 0]])
    loss = compensation_loss(cam, found, only, keep_ratio=1.0)
    torch.testing.assert_close(loss, cam[:, 0].mean() / 3)


def test_compensation_has_no_gradient() -> None:
    scores, features, _ = case()
    found = compensate(scores.requires_grad_(), features.requires_grad_(), topk_pixels(scores), PRESENT)
    assert not found.requires_grad


# ------------------------------------------------------------------------------------------ loss


def test_hand_computed_loss() -> None:
    cam = torch.tensor([[[[0.7, 0.5, 0.0]], [[0.2, 0.6, 0.0]]]])
    compensated = torch.tensor([[[[0.2, 0.2, 0.2]], [[2.0, 1.0, 1.0]], [[1.0, 1.0, 1.0]]]])
    run = lambda *labels, **settings: (  # noqa: E731
        compensation_loss(cam, compensated, torch.tensor([labels]), **settings).item()
    )
    # Differences: 0.3, 0, 0 of the first class and 0, 0.6, 0 of the second.
    assert run(1, 1) == pytest.approx(0.9 / 4, abs=1e-4)
    assert run(1, 1, keep_ratio=1.0) == pytest.approx(0.9 / 6, abs=1e-4)
    assert run(1, 1, keep_ratio=0.01) == pytest.approx(0.6, abs=1e-4), "one at least"
    # The first class alone: 0.3, 0.5, 0.
    assert run(1, 0, keep_ratio=1.0) == pytest.approx(0.8 / 6, abs=1e-4)
    assert run(0, 0) == 0


def test_loss_is_its_formula() -> None:
    _, _, cam = case()
    compensated = case(seed=3)[0] * 2
    allowed = LABELS[:, :, None, None]
    target = F.interpolate(
        normalize_cam(compensated[:, 1:], "minmax-zero"), (8, 9), mode="bilinear", align_corners=True
    )
    one_hot = [keep_max_class(F.pad(maps * allowed, (0, 0, 0, 0, 1, 0)))[:, 1:] for maps in (target, cam)]
    difference = (one_hot[0] - one_hot[1]).abs().flatten(1).sort(1, descending=True).values
    expected = difference[:, : int(0.8 * 3 * 72)].mean(1)
    for reduction, value in (("none", expected), ("mean", expected.mean()), ("sum", expected.sum())):
        torch.testing.assert_close(compensation_loss(cam, compensated, LABELS, reduction=reduction), value)


@given(seed=seeds)
def test_loss_properties(seed: int) -> None:
    compensated, _, cam = case(seed)
    losses = [compensation_loss(cam, compensated, LABELS, keep_ratio=ratio) for ratio in (0.2, 0.8, 1.0)]
    assert losses[0] >= losses[1] >= losses[2] >= 0
    torch.testing.assert_close(compensation_loss(cam, 3 * compensated, LABELS), losses[1], atol=1e-4, rtol=0)
    torch.testing.assert_close(compensation_loss(cam.flip(3), compensated.flip(3), LABELS), losses[1])
    together = compensation_loss(cam, compensated, LABELS, reduction="none")
    for one in range(2):
        some = slice(one, one + 1)
        alone = compensation_loss(cam[some], compensated[some], LABELS[some])
        torch.testing.assert_close(together[one], alone)


def test_agreement_has_no_loss() -> None:
    cam = torch.zeros(1, 2, 2, 2)
    cam[0, 0, 0], cam[0, 1, 1] = 1.0, 1.0
    compensated = F.pad(cam, (0, 0, 0, 0, 1, 0))
    assert compensation_loss(cam, compensated, torch.ones(1, 2)).item() == pytest.approx(0, abs=2e-5)


def test_gradient_goes_to_the_winners() -> None:
    compensated, _, cam = case()
    compensation_loss(cam.requires_grad_(), compensated.requires_grad_(), LABELS, keep_ratio=1.0).backward()
    assert compensated.grad is None
    allowed = F.pad(cam.detach() * LABELS[:, :, None, None], (0, 0, 0, 0, 1, 0))
    winners = keep_max_class(allowed)[:, 1:] > 0
    assert torch.equal(cam.grad != 0, winners)
    assert torch.autograd.gradcheck(lambda x: compensation_loss(x, compensated, LABELS), (cam,))


# ------------------------------------------------------------------------------------------ module


def test_module_is_its_functions() -> None:
    cam1, cam2, ctr, labels = ctr_case()
    module = Compensator(temperature=0.1, keep_ratio=0.5)
    one = compensate(ctr.scores1, ctr.features2, ctr.topk1, PRESENT, temperature=0.1)
    two = compensate(ctr.scores2, ctr.features1, ctr.topk2, PRESENT, temperature=0.1)
    expected = compensation_loss(cam1, one, labels, keep_ratio=0.5)
    expected = expected + compensation_loss(cam2, two, labels, keep_ratio=0.5)
    torch.testing.assert_close(module(cam1, cam2, ctr, labels), expected)
    assert not torch.allclose(Compensator()(cam1, cam2, ctr, labels), expected)
    assert repr(module) == "Compensator(temperature=0.1, keep_ratio=0.5)"
    assert repr(Compensator()) == "Compensator(temperature=1.0, keep_ratio=0.8)"


def test_image_without_label() -> None:
    cam1, cam2, ctr, labels = ctr_case()
    loss = Compensator()(cam1.requires_grad_(), cam2, ctr, torch.zeros_like(labels))
    assert loss == 0
    loss.backward()
    assert cam1.grad.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    scores, features, cam = (value.to(dtype) for value in case(dtype=torch.float32))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    topk = topk_pixels(scores)
    found = compensate(scores, features, topk, PRESENT)
    loss = compensation_loss(cam, scores, LABELS)
    assert found.dtype == loss.dtype == wide
    exact = TopK(topk.values.to(wide), topk.indices)
    torch.testing.assert_close(found, compensate(scores.to(wide), features.to(wide), exact, PRESENT))
    torch.testing.assert_close(loss, compensation_loss(cam.to(wide), scores.to(wide), LABELS))


def test_devices(device: torch.device) -> None:
    scores, features, cam = case(dtype=torch.float32)
    topk = topk_pixels(scores, background="complement")
    expected = compensate(scores, features, topk, PRESENT)
    there = TopK(topk.values.to(device), topk.indices.to(device))
    found = compensate(scores.to(device), features.to(device), there, PRESENT.to(device))
    assert found.device.type == device.type
    torch.testing.assert_close(found.cpu(), expected, atol=1e-5, rtol=1e-4)
    loss = compensation_loss(cam.to(device), found, LABELS.to(device))
    torch.testing.assert_close(loss.cpu(), compensation_loss(cam, expected, LABELS), atol=1e-5, rtol=1e-4)


def test_compiles_to_one_graph() -> None:
    cam1, cam2, ctr, labels = ctr_case(torch.float32)
    module = Compensator(temperature=0.1)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(cam1, cam2, ctr, labels), module(cam1, cam2, ctr, labels))


SCORES, FEATURES, CAM = case()
TOPK = topk_pixels(SCORES)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: compensate(SCORES, FEATURES[..., 1:], TOPK, PRESENT),
            ValueError,
            "features: .* with w=6 from scores",
        ),
        (lambda: compensate(SCORES, FEATURES, TOPK, PRESENT[1:]), ValueError, "present: .* with K=4 from"),
        (
            lambda: compensate(SCORES, FEATURES, TopK(TOPK.values[1:], TOPK.indices[1:]), PRESENT),
            ValueError,
            "topk.values: .* with K=4 from present",
        ),
        (
            lambda: compensate(SCORES, FEATURES, TopK(TOPK.values, TOPK.indices + 48), PRESENT),
            ValueError,
            "topk.indices: expected pixels 0..47",
        ),
        (lambda: compensate(SCORES.long(), FEATURES, TOPK, PRESENT), TypeError, "scores: expected a float"),
        (
            lambda: compensate(SCORES, FEATURES, TOPK, PRESENT, temperature=0),
            ValueError,
            "temperature: expected a finite number > 0",
        ),
        (
            lambda: compensation_loss(CAM[0], SCORES, LABELS),
            ValueError,
            r"cam: expected shape \(B, C, H, W\)",
        ),
        (
            lambda: compensation_loss(CAM, SCORES[:, 1:], LABELS),
            ValueError,
            "compensated: .* with C=3 from cam",
        ),
        (lambda: compensation_loss(CAM, SCORES[:, :0], LABELS), ValueError, "compensated: expected a backgr"),
        (lambda: compensation_loss(CAM, SCORES, LABELS[:1]), ValueError, "labels: .* with B=2 from cam"),
        (lambda: compensation_loss(CAM, SCORES, 2 * LABELS), ValueError, "labels: expected a multi-hot"),
        (lambda: compensation_loss(CAM.long(), SCORES, LABELS), TypeError, "cam: expected a floating-point"),
        (
            lambda: compensation_loss(CAM, SCORES, LABELS, keep_ratio=0),
            ValueError,
            "keep_ratio: expected a finite number > 0",
        ),
        (
            lambda: compensation_loss(CAM, SCORES, LABELS, reduction="max"),
            ValueError,
            "reduction: expected one of",
        ),
        (lambda: Compensator(temperature=-1), ValueError, "temperature: expected a finite number > 0"),
        (lambda: Compensator(keep_ratio=1.5), ValueError, "keep_ratio: expected a finite number"),
    ],
)
def test_errors(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("name", ["cam", "compensated"])
def test_nan_does_not_hide_below_the_largest(name: str) -> None:
    maps = {"cam": torch.rand(1, 2, 3, 3), "compensated": torch.rand(1, 3, 3, 3)}
    maps[name][..., 0, 0] = torch.nan
    with pytest.raises(ValueError, match=f"{name}: expected finite values"):
        compensation_loss(maps["cam"], maps["compensated"], torch.ones(1, 2))


def test_present_classes_are_told_by_0_and_1() -> None:
    scores = torch.rand(1, 2, 3, 3)
    with pytest.raises(ValueError, match=r"present: expected a multi-hot tensor"):
        compensate(scores, scores, topk_pixels(scores), torch.tensor([1, torch.nan]))
