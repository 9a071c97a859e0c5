"""`min_pooling_loss`: section 6.2 of the PMM and 3 of the RTC specification."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pseudolabel.losses import MinPoolingLoss, min_pooling_loss

seeds = st.integers(0, 1000)


def case(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    cam = torch.randn(2, 3, 5, 6, generator=generator, dtype=dtype) + 0.5
    return cam, torch.tensor([[1, 0, 1], [0, 1, 0]])


@pytest.mark.parametrize(
    ("name", "maps", "loss"),
    [("pmm/public_seam", "x", "min_pool_loss"), ("rtc/public_camnorm", "minpool_in", "minpool_loss")],
)
def test_golden(golden: Callable, name: str, maps: str, loss: str) -> None:
    data = golden(name)
    assert min_pooling_loss(torch.from_numpy(data[maps])).item() == pytest.approx(float(data[loss]), abs=1e-6)


def test_hand_computed() -> None:
    # Largest of each pixel: 0.1 0.2 0.3 0.4 0.5 0.6 0.7 -1; a quarter of 8 pixels are 2: -1 and 0.1.
    first = torch.tensor([[0.1, 0.0, 0.3, 0.0], [0.5, 0.0, 0.7, -1.0]])
    second = torch.tensor([[0.0, 0.2, 0.0, 0.4], [0.0, 0.6, 0.0, -2.0]])
    cam = torch.stack([first, second])[None]
    assert min_pooling_loss(cam).item() == pytest.approx(0.05)
    assert min_pooling_loss(cam, fraction=0.5).item() == pytest.approx((0 + 0.1 + 0.2 + 0.3) / 4)
    assert min_pooling_loss(cam, fraction=1).item() == pytest.approx(2.8 / 8)
    # The second class alone: -2, which is 0, and 0.
    assert min_pooling_loss(cam, torch.tensor([[0, 1]]), fraction=1).item() == pytest.approx(1.2 / 8)


def test_quarter_is_rounded_down_to_one_at_least() -> None:
    cam = torch.tensor([[[[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]]]])
    assert min_pooling_loss(cam).item() == pytest.approx(0.1)
    assert min_pooling_loss(cam[..., :2]).item() == pytest.approx(0.1)


def test_labels_hide_absent_classes() -> None:
    cam, labels = case()
    torch.testing.assert_close(
        min_pooling_loss(cam, labels), min_pooling_loss(cam * labels[:, :, None, None])
    )
    for kind in (torch.bool, torch.float32):
        assert min_pooling_loss(cam, labels.to(kind)) == min_pooling_loss(cam, labels)
    nothing = cam.clone().requires_grad_()
    loss = min_pooling_loss(nothing, torch.zeros(2, 3))
    assert loss == 0
    loss.backward()
    assert nothing.grad.eq(0).all()


@given(seed=seeds, fraction=st.sampled_from([0.01, 0.25, 0.5, 1.0]))
def test_properties(seed: int, fraction: float) -> None:
    cam, _ = case(seed)
    loss = min_pooling_loss(cam, fraction=fraction)
    assert loss >= 0
    assert loss <= min_pooling_loss(cam + 0.1, fraction=fraction)
    assert loss <= min_pooling_loss(cam, fraction=1.0)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(seed))
    shuffled = cam.flatten(2)[..., order].view_as(cam).flip(1)
    torch.testing.assert_close(min_pooling_loss(shuffled, fraction=fraction), loss)
    emptied = cam.clone()
    emptied.flatten(2)[:, :, : max(1, int(fraction * 30))] = 0
    assert min_pooling_loss(emptied, fraction=fraction) == 0


def test_reductions() -> None:
    cam, labels = case()
    each = min_pooling_loss(cam, labels, reduction="none")
    assert each.shape == (2,)
    torch.testing.assert_close(min_pooling_loss(cam, labels, reduction="sum"), each.sum())
    torch.testing.assert_close(min_pooling_loss(cam, labels), each.mean())
    for one in range(2):
        some = slice(one, one + 1)
        torch.testing.assert_close(min_pooling_loss(cam[some], labels[some]), each[one])


def test_gradient_of_the_weakest_pixels_alone() -> None:
    cam = torch.tensor([[[[0.1, 0.2, 0.8, 0.9]], [[0.0, 0.3, 0.0, 0.0]]]], requires_grad=True)
    min_pooling_loss(cam, fraction=0.5).backward()
    assert cam.grad.tolist() == [[[[0.5, 0, 0, 0]], [[0, 0.5, 0, 0]]]]
    cam, labels = case()
    assert torch.autograd.gradcheck(lambda x: min_pooling_loss(x, labels), (cam.requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    cam, labels = case(dtype=torch.float32)
    low = min_pooling_loss(cam.to(dtype), labels)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, min_pooling_loss(cam, labels), atol=0.02, rtol=0.02)


def test_compiles_to_one_graph() -> None:
    cam, labels = case()
    compiled = torch.compile(min_pooling_loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(cam, labels), min_pooling_loss(cam, labels))


def test_module_equals_function() -> None:
    cam, labels = case()
    module = MinPoolingLoss(fraction=0.5, reduction="sum")
    assert module(cam, labels) == min_pooling_loss(cam, labels, fraction=0.5, reduction="sum")
    assert MinPoolingLoss()(cam) == min_pooling_loss(cam)
    assert repr(module) == "MinPoolingLoss(fraction=0.5, reduction='sum')"


def test_devices(device: torch.device) -> None:
    cam, labels = case()
    loss = min_pooling_loss(cam.to(device), labels.to(device))
    assert loss.device.type == device.type
    torch.testing.assert_close(loss.cpu(), min_pooling_loss(cam, labels))


CAM, LABELS = case()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f: f(CAM[0]), ValueError, r"cam: expected shape \(B, C, h, w\)"),
        (lambda f: f(CAM.long()), TypeError, "cam: expected a floating-point tensor"),
        (lambda f: f(CAM[:, :0]), ValueError, "cam: expected at least one class"),
        (lambda f: f(CAM, LABELS[:, 1:]), ValueError, "labels: .* with C=3 from cam"),
        (lambda f: f(CAM, 2 * LABELS), ValueError, "labels: expected a multi-hot tensor"),
        (lambda f: f(CAM, fraction=0), ValueError, "fraction: expected a finite number > 0 and <= 1"),
        (lambda f: f(CAM, fraction=1.5), ValueError, "fraction: expected a finite number"),
        (lambda f: f(CAM, reduction="max"), ValueError, "reduction: expected one of"),
        (lambda _: MinPoolingLoss(fraction=2), ValueError, "fraction: expected a finite number"),
        (lambda _: MinPoolingLoss(reduction="max"), ValueError, "reduction: expected one of"),
    ],
)
def test_errors(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call(min_pooling_loss)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_nan_does_not_hide_among_the_largest(value: float) -> None:
    cam = torch.zeros(1, 1, 2, 2)
    cam[..., 0, 0] = value
    with pytest.raises(ValueError, match=r"cam: expected finite values"):
        min_pooling_loss(cam, torch.ones(1, 1))
