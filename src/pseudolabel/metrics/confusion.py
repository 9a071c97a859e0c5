"""Confusion matrix of label maps, and the rates that are read off it."""

from typing import Literal

import torch
from torch import Tensor

from pseudolabel._checks import check_choice, check_classes, check_shapes, describe_pixels, values_unchecked

__all__ = [
    "Absent",
    "PredIgnore",
    "confusion_matrix",
    "count",
    "iou_from_confusion",
    "over_under_segmentation",
]

PredIgnore = Literal["error", "background", "exclude", "wrong"]
Absent = Literal["nan", "skip"]


def confusion_matrix(
    mask: Tensor,
    truth: Tensor,
    num_classes: int,
    *,
    ignore_index: int = 255,
    pred_ignore: PredIgnore = "error",
) -> Tensor:
    """Count the pixels of each pair (true class, predicted class).

    `confusion[t, p] = #{pixels : truth = t, mask = p}`, pixels with `truth = ignore_index` left out. Matrices
    of several batches add up to that of the whole set, and that sum, not an average over images, is what
    the mIoU of the field is computed from.

    A pseudo label may hold ``ignore_index`` itself, and published figures read it in different ways:

    | `pred_ignore` | such a pixel, where the truth is labelled, |
    |---|---|
    | `error` | raises an error |
    | `background` | counts as predicted background |
    | `exclude` | is not counted; flatters a mask that leaves the hard pixels out |
    | `wrong` | misses its true class and is no false positive of any other: one more column, last |

    Args:
        mask: Predicted label map (B,H,W), any integer dtype: classes `0..num_classes-1` or ``ignore_index``.
        truth: Ground truth (B,H,W), likewise.
        num_classes: Number of classes, the background included.
        ignore_index: The label of pixels without a class; not itself a class.
        pred_ignore: What ``ignore_index`` in ``mask`` means, see the table.

    Returns:
        Counts (num_classes, num_classes) int64, rows true, columns predicted classes, on the device of
        ``mask``; (num_classes, num_classes + 1) for `wrong`.

    Raises:
        TypeError: If ``mask`` or ``truth`` is not an integer tensor.
        ValueError: If they differ in shape or hold other values than classes and ``ignore_index``; if
            ``mask`` holds ``ignore_index`` and ``pred_ignore`` is `error`; if a setting is out of range.

    Note:
        With `torch.compile`, `error` has to look at the counts and breaks the graph; the others do not.

    Examples:
        >>> import torch
        >>> truth = torch.tensor([[[0, 1, 1, 255]]])
        >>> mask = torch.tensor([[[0, 1, 0, 1]]])
        >>> confusion_matrix(mask, truth, num_classes=2)
        tensor([[1, 0],
                [1, 1]])
    """
    check_shapes(mask=(mask, "B H W"), truth=(truth, "B H W"))
    check_choice("pred_ignore", pred_ignore, PredIgnore)
    check_classes(num_classes, ignore_index, mask=mask, truth=truth)

    # Ignored pixels get a row and a column of their own behind the classes: shapes stay fixed.
    mask, truth = mask.long(), truth.long()  # uint8 would take 255 for -1
    row = torch.where(truth == ignore_index, num_classes, truth)
    column = torch.where(mask == ignore_index, num_classes, mask)
    size = num_classes + 1
    confusion = count(row * size + column, size * size).view(size, size)[:num_classes]

    if pred_ignore == "wrong":
        return confusion
    classes, unlabelled = confusion[:, :num_classes], confusion[:, num_classes]
    if pred_ignore == "background":
        return torch.cat([classes[:, :1] + unlabelled[:, None], classes[:, 1:]], dim=1)
    if pred_ignore == "error" and bool(unlabelled.any()):
        found = (mask == ignore_index) & (truth != ignore_index)
        raise ValueError(
            f"mask: ignore_index {ignore_index} is predicted where the truth is labelled, in "
            f"{describe_pixels(found)}; say what it means by pred_ignore='background' (counts as "
            "background), 'exclude' (is not counted) or 'wrong' (misses its true class)"
        )
    return classes.contiguous()


def iou_from_confusion(confusion: Tensor, *, absent: Absent = "skip") -> Tensor:
    """Intersection over union of each class: `TP / (TP + FP + FN)`.

    The mean over the set, mIoU, is `iou.nanmean(-1)`: NaN marks the classes that are left out of it. Which
    these are differs between programs, and so does the mIoU of a set that lacks a class:

    | `absent` | left out | a class that is predicted but nowhere true | found in |
    |---|---|---|---|
    | `skip` | classes without a true pixel | is left out | PMM `evaluation.py` |
    | `nan` | classes neither true nor predicted | counts as 0 | MMSegmentation |

    Where every class occurs in the truth, as on the VOC sets, both are the same.

    Args:
        confusion: Counts (...,N,N), rows true, columns predicted classes, or (...,N,N+1) with a last column
            of pixels that are predicted as no class (`pred_ignore="wrong"` of `confusion_matrix`).
        absent: See the table.

    Returns:
        IoU (...,N) float64 in [0, 1], NaN where left out.

    Raises:
        TypeError: If ``confusion`` is not a tensor of numbers.
        ValueError: If it is neither (...,N,N) nor (...,N,N+1), or a count is negative or NaN.

    Examples:
        >>> import torch
        >>> confusion = torch.tensor([[6, 2, 1], [0, 3, 0], [0, 0, 0]])
        >>> iou_from_confusion(confusion)
        tensor([0.6667, 0.6000,    nan], dtype=torch.float64)
        >>> iou_from_confusion(confusion, absent="nan")
        tensor([0.6667, 0.6000, 0.0000], dtype=torch.float64)
    """
    return _shares_of_union(confusion, absent)[0]


def over_under_segmentation(confusion: Tensor, *, absent: Absent = "skip") -> tuple[Tensor, Tensor]:
    """What a class loses by covering too much, `FP / union`, and by covering too little, `FN / union`.

    With `union = TP + FP + FN`, for each class IoU + over + under = 1.

    Args:
        confusion: Counts, as `iou_from_confusion` takes them.
        absent: Which classes are left out, as there.

    Returns:
        ``over`` and ``under`` (...,N), each float64 in [0, 1], NaN where left out.

    Raises:
        TypeError: If ``confusion`` is not a tensor of numbers.
        ValueError: If it is neither (...,N,N) nor (...,N,N+1), or a count is negative or NaN.

    Examples:
        >>> import torch
        >>> over_under_segmentation(torch.tensor([[6, 2], [0, 2]]))
        (tensor([0.0000, 0.5000], dtype=torch.float64), tensor([0.2500, 0.0000], dtype=torch.float64))
    """
    return _shares_of_union(confusion, absent)[1:]


def _shares_of_union(confusion: Tensor, absent: Absent) -> tuple[Tensor, Tensor, Tensor]:
    """TP, FP and FN, each over their sum; NaN for classes that are left out."""
    sizes = check_shapes(confusion=(confusion, "... N M"))
    check_choice("absent", absent, Absent)
    if confusion.is_complex() or confusion.dtype == torch.bool:
        raise TypeError(f"confusion: expected counts, got a tensor of dtype {confusion.dtype}")
    if sizes["M"] - sizes["N"] not in (0, 1) or sizes["N"] == 0:
        raise ValueError(
            f"confusion: expected shape (..., N, N) or (..., N, N + 1), got {tuple(confusion.shape)}"
        )
    if not values_unchecked(confusion) and not bool((confusion >= 0).all()):
        raise ValueError("confusion: expected counts >= 0, got negative or NaN values")
    confusion = confusion.double()  # exact up to 2^53 pixels
    true = confusion.sum(-1)
    hit = confusion.diagonal(dim1=-2, dim2=-1)
    false = confusion[..., : sizes["N"]].sum(-2) - hit
    union = true + false
    kept = (true if absent == "skip" else union) > 0
    hit, false, missed = ((part / union).masked_fill(~kept, torch.nan) for part in (hit, false, true - hit))
    return hit, false, missed


def count(index: Tensor, size: int) -> Tensor:
    """How often each of `0..size-1` occurs in ``index``, as int64 (size,)."""
    index = index.flatten()
    if torch.compiler.is_compiling():  # bincount has an output of unknown length, which breaks a graph
        return index.new_zeros(size).scatter_add(0, index, torch.ones_like(index))
    return torch.bincount(index, minlength=size)
