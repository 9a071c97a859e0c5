"""Equivariance and cross loss: section 6.2 of the PMM and 5, 13 of the RTC specification."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pseudolabel.losses import (
    EquivarianceLoss,
    EquivariantCrossLoss,
    equivariance_loss,
    equivariant_cross_loss,
)

seeds = st.integers(0, 1000)


def case(
    seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cam1, cam2 = torch.rand(2, 2, 3, 5, 6, generator=generator, dtype=dtype)
    refined = torch.rand(2, 4, 5, 6, generator=generator, dtype=dtype)
    return cam1, cam2, refined, torch.tensor([[1, 0, 1], [0, 1, 0]])


def test_golden(golden: Callable) -> None:
    """Both losses and their common gradient; the golden maps are masked by the labels already."""
    data = golden("rtc/public_consistency")
    maps = {
        name: torch.from_numpy(data[name]).requires_grad_() for name in ("cam1", "cam2", "cam_rv1", "cam_rv2")
    }
    cam1, cam2 = maps["cam1"][:, 1:], maps["cam2"][:, 1:]
    er = equivariance_loss(cam1, cam2)
    ecr1 = equivariant_cross_loss(cam2, maps["cam_rv1"])
    ecr2 = equivariant_cross_loss(cam1, maps["cam_rv2"])
    for loss, name in ((er, "er"), (ecr1, "ecr1"), (ecr2, "ecr2"), (ecr1 + ecr2, "ecr")):
        assert loss.item() == pytest.approx(float(data[f"loss_{name}"]), rel=1e-4, abs=1e-5)
    (er + ecr1 + ecr2).backward()
    for name, value in maps.items():
        torch.testing.assert_close(
            value.grad, torch.from_numpy(data[f"grad_{name}"]), atol=1e-4 / value.numel(), rtol=1e-3
        )


def test_golden_with_labels(golden: Callable) -> None:
    """Labels that hide nothing: the official mean divides by all classes."""
    data = golden("rtc/public_consistency")
    cam1, cam2 = (torch.from_numpy(data[name])[:, 1:] for name in ("cam1", "cam2"))
    labels = ((cam1 != 0) | (cam2 != 0)).flatten(2).any(2)
    assert 0 < labels.sum() < labels.numel()
    loss = equivariance_loss(cam1, cam2, labels, mean_over="all").item()
    assert loss == pytest.approx(float(data["loss_er"]), rel=1e-4)
    share = labels.float().mean().item()
    assert equivariance_loss(cam1, cam2, labels).item() == pytest.approx(loss / share, rel=1e-4)


# ------------------------------------------------------------------------------------------ equivariance


def test_hand_computed_equivariance() -> None:
    cam1 = torch.tensor([[[[0.2, 0.4]], [[1.0, 0.0]]]])
    cam2 = torch.tensor([[[[0.5, 0.4]], [[0.0, 0.5]]]])
    labels = torch.tensor([[True, False]])
    assert equivariance_loss(cam1, cam2).item() == pytest.approx(1.8 / 4)
    assert equivariance_loss(cam1, cam2, labels).item() == pytest.approx(0.15)
    assert equivariance_loss(cam1, cam2, labels, mean_over="all").item() == pytest.approx(0.075)
    none = equivariance_loss(cam1, cam2, labels, reduction="none")
    torch.testing.assert_close(none, torch.tensor([[[[0.3, 0.0]], [[0.0, 0.0]]]]))
    assert equivariance_loss(cam1, cam2, labels, reduction="sum").item() == pytest.approx(0.3)


@given(seed=seeds)
def test_equivariance_properties(seed: int) -> None:
    cam1, cam2, _, labels = case(seed)
    assert equivariance_loss(cam1, cam1) == 0
    assert equivariance_loss(cam1, cam2) > 0
    for arguments in ((), (labels,)):
        torch.testing.assert_close(
            equivariance_loss(cam1, cam2, *arguments), equivariance_loss(cam2, cam1, *arguments)
        )
    torch.testing.assert_close(
        equivariance_loss(cam1.flip(3), cam2.flip(3), labels), equivariance_loss(cam1, cam2, labels)
    )


@pytest.mark.parametrize("mean_over", ["valid", "all"])
def test_no_present_class(mean_over: str) -> None:
    cam1, cam2, _, labels = case()
    loss = equivariance_loss(cam1.requires_grad_(), cam2, torch.zeros_like(labels), mean_over=mean_over)
    assert loss == 0
    loss.backward()
    assert cam1.grad.eq(0).all()


# ------------------------------------------------------------------------------------------ cross loss


def test_hand_computed_cross_loss() -> None:
    # Targets (background, classes): (0.1, 0.9, 0) and (0.7, 0, 0.3).
    cam = torch.tensor([[[[0.9, 0.1]], [[0.4, 0.3]]]])
    refined = torch.tensor([[[[0.1, 0.2]], [[0.6, 0.0]], [[0.1, 0.3]]]])
    # Differences: 0, 0.5 of the background; 0.3, 0; 0.1, 0.
    run = lambda **settings: equivariant_cross_loss(cam, refined, **settings).item()  # noqa: E731
    assert run() == pytest.approx(0.5)  # a fifth of 6 is 1
    assert run(keep_ratio=0.5) == pytest.approx(0.3)
    assert run(keep_ratio=1) == pytest.approx(0.15)
    assert run(keep_ratio=0.01) == pytest.approx(0.5), "one at least"
    # Without the first class: target (0.6, 0, 0.4), (0.7, 0, 0.3); differences 0.5, 0.5; 0; 0.3, 0.
    absent = torch.tensor([[0, 1]])
    assert run(labels=absent, keep_ratio=1) == pytest.approx(1.3 / 6)


def test_labels_hide_both_sides() -> None:
    cam, _, refined, labels = case()
    present = labels[:, :, None, None]
    masked = torch.cat([refined[:, :1], refined[:, 1:] * present], 1)
    torch.testing.assert_close(
        equivariant_cross_loss(cam, refined, labels), equivariant_cross_loss(cam * present, masked)
    )
    assert not torch.allclose(
        equivariant_cross_loss(cam, refined, labels), equivariant_cross_loss(cam, refined)
    )


@given(seed=seeds)
def test_cross_loss_properties(seed: int) -> None:
    cam, _, refined, labels = case(seed)
    losses = [equivariant_cross_loss(cam, refined, labels, keep_ratio=ratio) for ratio in (0.1, 0.2, 1.0)]
    assert losses[0] >= losses[1] >= losses[2] >= 0
    whole = equivariant_cross_loss(cam, refined, labels, keep_ratio=1.0, reduction="none")
    assert whole.shape == (2,)
    torch.testing.assert_close(
        equivariant_cross_loss(cam.flip(2), refined.flip(2), labels),
        equivariant_cross_loss(cam, refined, labels),
    )


def test_perfect_refinement_has_no_loss() -> None:
    cam = torch.zeros(1, 2, 2, 2)
    cam[0, 0, 0], cam[0, 1, 1] = 0.7, 0.4
    refined = torch.cat([1 - cam.amax(1, keepdim=True), cam], 1)
    assert equivariant_cross_loss(cam, refined) == 0


def test_gradient_goes_to_the_refined_maps_alone() -> None:
    cam, _, refined, labels = case()
    equivariant_cross_loss(cam.requires_grad_(), refined.requires_grad_(), labels).backward()
    assert cam.grad is None
    assert (refined.grad != 0).sum() == 2 * int(0.2 * 4 * 30)
    assert refined.grad[0, 2].eq(0).all(), "absent"


def test_inputs_stay_as_they_are() -> None:
    cam, _, refined, labels = case()
    before = cam.clone(), refined.clone()
    equivariant_cross_loss(cam, refined, labels)
    assert torch.equal(cam, before[0])
    assert torch.equal(refined, before[1])


# ------------------------------------------------------------------------------------------ both


def test_reductions_of_images() -> None:
    cam, _, refined, labels = case()
    each = equivariant_cross_loss(cam, refined, labels, reduction="none")
    assert each.shape == (2,)
    torch.testing.assert_close(equivariant_cross_loss(cam, refined, labels), each.mean())
    torch.testing.assert_close(equivariant_cross_loss(cam, refined, labels, reduction="sum"), each.sum())
    for one in range(2):
        some = slice(one, one + 1)
        torch.testing.assert_close(equivariant_cross_loss(cam[some], refined[some], labels[some]), each[one])


def test_gradcheck() -> None:
    cam1, cam2, refined, labels = case()
    assert torch.autograd.gradcheck(
        lambda a, b: equivariance_loss(a, b, labels), (cam1.requires_grad_(), cam2.requires_grad_())
    )
    assert torch.autograd.gradcheck(
        lambda r: equivariant_cross_loss(cam2.detach(), r, labels), (refined.requires_grad_(),)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    cam1, cam2, refined, labels = case(dtype=torch.float32)
    for function, first, second in (
        (equivariance_loss, cam1, cam2),
        (equivariant_cross_loss, cam1, refined),
    ):
        low = function(first.to(dtype), second.to(dtype), labels)
        assert low.dtype == torch.float32
        torch.testing.assert_close(low, function(first, second, labels), atol=0.01, rtol=0.01)


def test_compiles_to_one_graph() -> None:
    cam1, cam2, refined, labels = case()
    for function, first, second in (
        (equivariance_loss, cam1, cam2),
        (equivariant_cross_loss, cam1, refined),
    ):
        compiled = torch.compile(function, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(first, second, labels), function(first, second, labels))


def test_modules_equal_functions() -> None:
    cam1, cam2, refined, labels = case()
    module = EquivarianceLoss(reduction="sum", mean_over="all")
    assert module(cam1, cam2, labels) == equivariance_loss(
        cam1, cam2, labels, reduction="sum", mean_over="all"
    )
    assert EquivarianceLoss(mean_over="all")(cam1, cam2, labels) == equivariance_loss(
        cam1, cam2, labels, mean_over="all"
    )
    assert EquivarianceLoss()(cam1, cam2) == equivariance_loss(cam1, cam2)
    assert repr(module) == "EquivarianceLoss(reduction='sum', mean_over='all')"
    cross = EquivariantCrossLoss(keep_ratio=0.5, reduction="sum")
    assert cross(cam1, refined, labels) == equivariant_cross_loss(
        cam1, refined, labels, keep_ratio=0.5, reduction="sum"
    )
    assert EquivariantCrossLoss()(cam1, refined) == equivariant_cross_loss(cam1, refined)
    assert repr(cross) == "EquivariantCrossLoss(keep_ratio=0.5, reduction='sum')"


def test_devices(device: torch.device) -> None:
    cam1, cam2, refined, labels = case()
    for function, first, second in (
        (equivariance_loss, cam1, cam2),
        (equivariant_cross_loss, cam1, refined),
    ):
        loss = function(first.to(device), second.to(device), labels.to(device))
        assert loss.device.type == device.type
        torch.testing.assert_close(loss.cpu(), function(first, second, labels))


CAM, OTHER, REFINED, LABELS = case()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: equivariance_loss(CAM[0], OTHER), ValueError, r"cam1: expected shape \(B, C, h, w\)"),
        (lambda: equivariance_loss(CAM, OTHER[..., 1:]), ValueError, "cam2: .* with w=6 from cam1"),
        (lambda: equivariance_loss(CAM, OTHER.long()), TypeError, "cam2: expected a floating-point"),
        (lambda: equivariance_loss(CAM, OTHER, LABELS[:1]), ValueError, "labels: .* with B=2 from cam1"),
        (lambda: equivariance_loss(CAM, OTHER, 3 * LABELS), ValueError, "labels: expected a multi-hot"),
        (lambda: equivariance_loss(CAM, OTHER, mean_over="some"), ValueError, "mean_over: expected one of"),
        (lambda: equivariance_loss(CAM, OTHER, reduction="max"), ValueError, "reduction: expected one of"),
        (lambda: EquivarianceLoss(reduction="max"), ValueError, "reduction: expected one of"),
        (lambda: EquivarianceLoss(mean_over="max"), ValueError, "mean_over: expected one of"),
        (
            lambda: equivariant_cross_loss(CAM, REFINED[:, 1:]),
            ValueError,
            "refined: expected 4 channels, the background and the classes of cam, got 3",
        ),
        (lambda: equivariant_cross_loss(CAM, REFINED[:1]), ValueError, "refined: .* with B=2 from cam"),
        (lambda: equivariant_cross_loss(CAM.long(), REFINED), TypeError, "cam: expected a floating-point"),
        (
            lambda: equivariant_cross_loss(CAM, REFINED, LABELS[:, :2]),
            ValueError,
            "labels: .* with C=3 from cam",
        ),
        (
            lambda: equivariant_cross_loss(CAM, REFINED, keep_ratio=0),
            ValueError,
            "keep_ratio: expected a finite number > 0 and <= 1",
        ),
        (lambda: equivariant_cross_loss(CAM, REFINED, reduction="max"), ValueError, "reduction: expected"),
        (lambda: EquivariantCrossLoss(keep_ratio=1.1), ValueError, "keep_ratio: expected a finite number"),
        (lambda: EquivariantCrossLoss(reduction="max"), ValueError, "reduction: expected one of"),
    ],
)
def test_errors(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
