"""Mattes to a label map: section 1.5 of the Mat-Label specification."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pseudolabel.masks import alpha_to_mask, scores_to_mask, trimap_from_mask

# class 0; class 1; background; nobody's; class 0 and 1 alike; class 0 and background alike
ALPHA = torch.tensor([[[[0.9, 0.1, 0.2, 0.3, 0.4, 0.5]], [[0.0, 0.8, 0.1, 0.36, 0.4, 0.0]]]])


def test_by_hand() -> None:
    mask = alpha_to_mask(ALPHA)
    assert mask.tolist() == [[[1, 2, 0, 2, 1, 0]]]
    assert mask.dtype == torch.int64


def test_confidence_and_margin() -> None:
    assert alpha_to_mask(ALPHA, confidence=0.5).tolist() == [[[1, 2, 0, 255, 255, 0]]]
    assert alpha_to_mask(ALPHA, margin=0.1).tolist() == [[[1, 2, 0, 255, 255, 255]]]
    assert alpha_to_mask(ALPHA, confidence=0.85, margin=0.1, ignore_index=-1).tolist() == [
        [[1, -1, -1, -1, -1, -1]]
    ]


def test_classes_that_overlap_are_brought_to_a_sum_of_one() -> None:
    alpha = torch.tensor([[[[1.0, 0.8]], [[0.9, 0.8]], [[0.6, 0.0]]]])
    assert alpha_to_mask(alpha).tolist() == [[[1, 1]]]
    # Parts 0.4, 0.36, 0.24 and 0.5, 0.5.
    assert alpha_to_mask(alpha, confidence=0.39).tolist() == [[[1, 1]]]
    assert alpha_to_mask(alpha, confidence=0.45).tolist() == [[[255, 1]]]
    assert alpha_to_mask(alpha, margin=0.03).tolist() == [[[1, 255]]]


def test_labels() -> None:
    alpha = torch.tensor([[[[0.6, 0.3]], [[0.1, 0.1]], [[0.3, 0.6]]]]).repeat(3, 1, 1, 1)
    labels = torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 0]])
    assert alpha_to_mask(alpha).tolist() == [[[1, 3]]] * 3
    assert alpha_to_mask(alpha, labels).tolist() == [[[1, 3]], [[0, 3]], [[0, 0]]]


@given(seed=st.integers(0, 10**6), classes=st.integers(1, 4))
def test_argmax_of_what_is_left(seed: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(2, 1 + classes, 5, 6, generator=generator, dtype=torch.float64).softmax(1)
    assert torch.equal(alpha_to_mask(scores[:, 1:]), scores_to_mask(scores))
    top = scores.topk(2, 1).values
    ignored = (top[:, 0] < 0.45) | (top[:, 0] - top[:, 1] < 0.1)
    mask = alpha_to_mask(scores[:, 1:], confidence=0.45, margin=0.1)
    assert torch.equal(mask, scores_to_mask(scores).masked_fill(ignored, 255))


def test_a_trimap_of_a_mask_gives_the_mask_back(generator: torch.Generator) -> None:
    mask = torch.randint(0, 4, (2, 6, 7), generator=generator)
    assert torch.equal(alpha_to_mask(trimap_from_mask(mask, 4, erode=0)), mask)
    unknown = trimap_from_mask(torch.full((1, 4, 4), 255), 2, torch.tensor([[1]]))
    assert alpha_to_mask(unknown, margin=0.1).eq(255).all()


def test_no_class() -> None:
    assert alpha_to_mask(torch.zeros(1, 0, 2, 2), margin=0.1).eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_and_devices(dtype: torch.dtype, device: torch.device) -> None:
    alpha = ((ALPHA * 8).round() / 8).to(device, dtype)
    found = alpha_to_mask(alpha, torch.tensor([[1, 1]], device=device), margin=0.1)
    assert torch.equal(found.cpu(), alpha_to_mask((ALPHA * 8).round() / 8, margin=0.1))
    assert found.device.type == device.type


def test_compiles() -> None:
    compiled = torch.compile(alpha_to_mask, fullgraph=True, backend="eager")
    assert torch.equal(
        compiled(ALPHA, confidence=0.5, margin=0.1), alpha_to_mask(ALPHA, confidence=0.5, margin=0.1)
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: alpha_to_mask(ALPHA[0]), ValueError, r"alpha: expected shape \(B, C, H, W\)"),
        (lambda: alpha_to_mask(ALPHA.long()), TypeError, "alpha: expected a floating-point tensor"),
        (lambda: alpha_to_mask(ALPHA * 2), ValueError, r"alpha: expected values in \[0, 1\]"),
        (lambda: alpha_to_mask(ALPHA * torch.nan), ValueError, r"alpha: expected values in \[0, 1\]"),
        (lambda: alpha_to_mask(ALPHA, torch.ones(1, 3)), ValueError, "labels: .* with C=2 from alpha"),
        (lambda: alpha_to_mask(ALPHA, torch.full((1, 2), 2)), ValueError, "labels: expected a multi-hot"),
        (lambda: alpha_to_mask(ALPHA, confidence=50), ValueError, "confidence: expected"),
        (lambda: alpha_to_mask(ALPHA, margin=-0.1), ValueError, "margin: expected"),
        (lambda: alpha_to_mask(ALPHA, ignore_index=2), ValueError, "ignore_index: .* got 2"),
    ],
)
def test_errors(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
