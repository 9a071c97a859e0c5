"""`balanced_mask_cross_entropy`: section 8 of the RTC specification."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from pseudolabel.losses import BalancedMaskCrossEntropy, balanced_mask_cross_entropy

seeds = st.integers(0, 1000)
LABELS = torch.tensor([[1, 0, 1], [0, 1, 0]])


def case(
    seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Masks that show each label of their image, and ignore their last row."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 4, 5, 6, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[0, 1, 3], [0, 2, 2]])
    mask = mask.gather(1, torch.randint(0, 3, (2, 30), generator=generator)).view(2, 5, 6)
    mask[:, 0, :3] = torch.tensor([[0, 1, 3], [0, 2, 2]])
    mask[:, -1] = 255
    return logits.to(dtype), mask, LABELS


def loss_and_gradient(logits: torch.Tensor, *arguments, **settings) -> tuple[torch.Tensor, torch.Tensor]:
    logits = logits.clone().requires_grad_()
    loss = balanced_mask_cross_entropy(logits, *arguments, **settings)
    loss.sum().backward()
    assert logits.grad is not None
    return loss.detach(), logits.grad


def plain(logits: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    """The formula, image by image and pixel by pixel."""
    losses = []
    for image, target, present in zip(logits.log_softmax(1), mask, labels, strict=True):
        counts = {k: int((target == k).sum()) for k in range(len(image))}
        n = sum(counts.values())
        total = image.new_zeros(())
        for y, x in (target != 255).nonzero().tolist():
            k = int(target[y, x])
            total = total - (n - counts[k]) / (1 + n) * image[k, y, x]
        gate = sum(count > 0 for count in counts.values()) == 1 + int(present.sum())
        losses.append(gate * total / target.numel())
    return losses


def test_golden(golden: Callable) -> None:
    data = golden("rtc/public_balanced_ce")
    logits, target, missing, label = (
        torch.from_numpy(data[name]) for name in ("logits", "target", "target_missing", "label")
    )
    cases = {
        "loss_per_image": target,
        "loss_per_image_missing": missing,
        "loss_per_image_all_ignored": torch.full_like(target, 255),
    }
    for name, mask in cases.items():
        loss = balanced_mask_cross_entropy(logits, mask, label, reduction="none")
        np.testing.assert_allclose(loss.numpy(), data[name], rtol=1e-4, atol=1e-5, err_msg=name)
    loss, gradient = loss_and_gradient(logits, target, label)
    np.testing.assert_allclose(loss.item(), data["loss_per_image"].mean(), rtol=1e-4)
    np.testing.assert_allclose(gradient.numpy(), data["grad_logits_of_mean"], rtol=1e-3, atol=1e-7)


def test_hand_computed() -> None:
    logits = torch.zeros(1, 3, 1, 4)
    logits[0, 2, 0, 2] = math.log(2)  # the pixel of class 2 has probability 1/2
    mask = torch.tensor([[[0, 0, 2, 255]]])
    labels = torch.tensor([[0, 1]])
    # n = 3: weights 1/4 for the background, 2/4 for class 2.
    expected = (2 * math.log(3) / 4 + math.log(2) * 2 / 4) / 4
    assert balanced_mask_cross_entropy(logits, mask, labels).item() == pytest.approx(expected)
    valid = balanced_mask_cross_entropy(logits, mask, labels, mean_over="valid")
    assert valid.item() == pytest.approx(expected * 4 / 3)


@given(seed=seeds)
def test_equals_the_plain_way(seed: int) -> None:
    logits, mask, labels = case(seed)
    loss = balanced_mask_cross_entropy(logits, mask, labels, reduction="none")
    torch.testing.assert_close(loss, torch.stack(plain(logits, mask, labels)))
    assert (loss > 0).all()


# ------------------------------------------------------------------------------------------ edge cases


def test_missing_class_drops_the_image() -> None:
    logits, mask, labels = case()
    for gone in (3, 0):  # a labelled class, or the background
        mask_without = mask.clone()
        mask_without[0][mask[0] == gone] = 1
        loss, gradient = loss_and_gradient(logits, mask_without, labels, reduction="none")
        assert loss[0] == 0
        assert loss[1] == balanced_mask_cross_entropy(logits, mask, labels, reduction="none")[1]
        assert gradient[0].eq(0).all()
        assert gradient[1].abs().sum() > 0
        taken = balanced_mask_cross_entropy(
            logits, mask_without, labels, reduction="none", require_all_classes=False
        )
        assert taken[0] > 0
        torch.testing.assert_close(
            taken[0], plain(logits, mask_without, torch.tensor([[1, 0, 0], [0, 1, 0]]))[0]
        )


def test_gate_counts_classes() -> None:
    """One class too many drops the image as well; a wrong one in place of a labelled one does not."""
    logits, mask, labels = case()
    too_many = mask.clone()
    too_many[0, 0, 0] = 2
    loss = balanced_mask_cross_entropy(logits, too_many, labels, reduction="none")
    assert loss[0] == 0
    assert loss[1] > 0
    wrong = mask.where(mask != 3, 2)
    loss = balanced_mask_cross_entropy(logits, wrong, labels, reduction="none")
    torch.testing.assert_close(loss, torch.stack(plain(logits, wrong, labels)))
    assert loss[0] > 0


@pytest.mark.parametrize("mean_over", ["all", "valid"])
@pytest.mark.parametrize("gate", [True, False])
def test_all_ignored(gate: bool, mean_over: str) -> None:
    logits, mask, labels = case()
    loss, gradient = loss_and_gradient(
        logits, torch.full_like(mask, 255), labels, require_all_classes=gate, mean_over=mean_over
    )
    assert loss == 0
    assert gradient.eq(0).all()
    mask[1] = 255  # one of two
    loss, gradient = loss_and_gradient(logits, mask, labels, reduction="none", mean_over=mean_over)
    assert loss[0] > 0
    assert loss[1] == 0
    assert gradient.isfinite().all()


def test_no_foreground_label() -> None:
    logits, mask, labels = case()
    loss = balanced_mask_cross_entropy(logits, 0 * mask, 0 * labels, reduction="none")
    assert loss.eq(0).all(), "a mask of one class has weight 0"


@given(seed=seeds, k=st.integers(0, 3))
def test_single_class_mask(seed: int, k: int) -> None:
    logits, mask, _ = case(seed)
    loss = balanced_mask_cross_entropy(logits, torch.full_like(mask, k), torch.zeros(2, 3), reduction="none")
    assert loss.eq(0).all()


# ------------------------------------------------------------------------------------------ properties


@given(seed=seeds)
def test_permutation_of_images(seed: int) -> None:
    logits, mask, labels = case(seed)
    loss = balanced_mask_cross_entropy(logits, mask, labels, reduction="none")
    flipped = balanced_mask_cross_entropy(logits.flip(0), mask.flip(0), labels.flip(0), reduction="none")
    torch.testing.assert_close(flipped, loss.flip(0))
    for one in range(2):
        some = slice(one, one + 1)
        single = balanced_mask_cross_entropy(logits[some], mask[some], labels[some])
        torch.testing.assert_close(single, loss[one])


@given(seed=seeds)
def test_ignored_pixels_have_no_gradient(seed: int) -> None:
    logits, mask, labels = case(seed)
    gradient = loss_and_gradient(logits, mask, labels)[1]
    assert gradient[:, :, -1].eq(0).all()
    assert gradient[:, :, :-1].abs().sum() > 0


def test_reductions() -> None:
    logits, mask, labels = case()
    none = balanced_mask_cross_entropy(logits, mask, labels, reduction="none")
    assert none.shape == (2,)
    assert balanced_mask_cross_entropy(logits, mask, labels) == none.sum() / 2
    assert balanced_mask_cross_entropy(logits, mask, labels, reduction="sum") == none.sum()
    valid = balanced_mask_cross_entropy(logits, mask, labels, reduction="none", mean_over="valid")
    torch.testing.assert_close(valid, none * 30 / 24)


def test_empty_batch() -> None:
    logits, mask, labels = case()
    loss = balanced_mask_cross_entropy(logits[:0].requires_grad_(), mask[:0], labels[:0])
    assert loss == 0
    assert loss.requires_grad


def test_logits_are_resized_to_the_mask() -> None:
    logits, _, labels = case()
    mask = case(1)[1].repeat_interleave(2, 1)
    expected = F.interpolate(logits, size=(10, 6), mode="bilinear", align_corners=True)
    torch.testing.assert_close(
        balanced_mask_cross_entropy(logits, mask, labels), balanced_mask_cross_entropy(expected, mask, labels)
    )


def test_other_ignore_index() -> None:
    logits, mask, labels = case()
    other = mask.where(mask != 255, -1)
    assert balanced_mask_cross_entropy(logits, other, labels, ignore_index=-1) == balanced_mask_cross_entropy(
        logits, mask, labels
    )


@pytest.mark.parametrize("gate", [True, False])
def test_gradcheck(gate: bool) -> None:
    logits, mask, labels = case()
    mask[0][mask[0] == 3] = 1
    assert torch.autograd.gradcheck(
        lambda x: balanced_mask_cross_entropy(x, mask, labels, require_all_classes=gate),
        (logits.requires_grad_(),),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(dtype: torch.dtype) -> None:
    logits, mask, labels = case(dtype=torch.float32)
    exact = balanced_mask_cross_entropy(logits, mask, labels)
    low = balanced_mask_cross_entropy(logits.to(dtype), mask, labels)
    assert low.dtype == torch.float32
    assert low == balanced_mask_cross_entropy(logits.to(dtype).float(), mask, labels)
    torch.testing.assert_close(low, exact, atol=0.02, rtol=0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(balanced_mask_cross_entropy(logits, mask, labels), exact)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_mask_and_label_dtypes(dtype: torch.dtype) -> None:
    logits, mask, labels = case()
    expected = balanced_mask_cross_entropy(logits, mask, labels)
    assert balanced_mask_cross_entropy(logits, mask.to(dtype), labels.bool()) == expected
    assert balanced_mask_cross_entropy(logits, mask.to(dtype), labels.float()) == expected


def test_compiles_to_one_graph() -> None:
    logits, mask, labels = case(dtype=torch.float32)
    compiled = torch.compile(balanced_mask_cross_entropy, fullgraph=True, backend="eager")
    for settings in ({}, {"require_all_classes": False, "mean_over": "valid"}):
        assert compiled(logits, mask, labels, **settings) == balanced_mask_cross_entropy(
            logits, mask, labels, **settings
        )


def test_module_equals_function() -> None:
    logits, mask, labels = case()
    mask = mask.where(mask != 255, -1)
    mask[0][mask[0] == 3] = 1
    settings = {
        "require_all_classes": False,
        "ignore_index": -1,
        "reduction": "none",
        "mean_over": "valid",
    }
    module = BalancedMaskCrossEntropy(**settings)
    expected = balanced_mask_cross_entropy(logits, mask, labels, **settings)
    assert torch.equal(module(logits, mask, labels), expected)
    assert (expected > 0).all()
    assert repr(module) == (
        "BalancedMaskCrossEntropy(require_all_classes=False, reduction='none', mean_over='valid')"
    )
    logits, mask, labels = case()
    assert BalancedMaskCrossEntropy()(logits, mask, labels) == balanced_mask_cross_entropy(
        logits, mask, labels
    )


def test_devices(device: torch.device) -> None:
    logits, mask, labels = case(dtype=torch.float32)
    loss = balanced_mask_cross_entropy(logits.to(device), mask.to(device), labels.to(device))
    assert loss.device.type == device.type
    torch.testing.assert_close(loss.cpu(), balanced_mask_cross_entropy(logits, mask, labels))


LOGITS, MASK, _ = case(dtype=torch.float32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f: f(LOGITS[0], MASK, LABELS), ValueError, r"logits: expected shape \(B, N, h, w\)"),
        (lambda f: f(LOGITS, MASK[:1], LABELS), ValueError, "mask: .* with B=2 from logits"),
        (lambda f: f(LOGITS, MASK, LABELS[:, 1:]), ValueError, "labels: .* with C=3 from logits"),
        (lambda f: f(LOGITS, MASK, 2 * LABELS), ValueError, "labels: expected a multi-hot tensor"),
        (lambda f: f(LOGITS.long(), MASK, LABELS), TypeError, "logits: expected a floating-point tensor"),
        (lambda f: f(LOGITS, MASK.float(), LABELS), TypeError, "mask: expected an integer tensor"),
        (
            lambda f: f(LOGITS, MASK.clamp(max=9), LABELS),
            ValueError,
            r"mask: expected classes 0\.\.3 or ignore_index 255",
        ),
        (lambda f: f(LOGITS, MASK, LABELS, ignore_index=2), ValueError, "ignore_index: expected an integer"),
        (lambda f: f(LOGITS, MASK, LABELS, reduction="max"), ValueError, "reduction: expected one of"),
        (lambda f: f(LOGITS, MASK, LABELS, mean_over="some"), ValueError, "mean_over: expected one of"),
        (lambda f: BalancedMaskCrossEntropy(reduction="max"), ValueError, "reduction: expected one of"),
    ],
)
def test_errors(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call(balanced_mask_cross_entropy)
