"""Confusion matrices for all background thresholds in one pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pseudolabel._checks import (
    check_classes,
    check_finite,
    check_float,
    check_number,
    check_sequence,
    check_shapes,
)
from pseudolabel.metrics.confusion import count

__all__ = ["background_sweep"]


def background_sweep(
    cam: Tensor,
    truth: Tensor,
    thresholds: Sequence[float] | Tensor,
    *,
    ignore_index: int = 255,
) -> Tensor:
    """Count, for each constant background `t`, the pixels of each pair (true class, predicted class).

    The mask at `t` is `argmax over [t, cam_1, ..., cam_C]`, the first of equal values winning: class `k` of
    the largest activation `m = max_k cam_k` where `m > t`, background where `m <= t`. So a pixel's part in
    all the matrices is known from its bin among the thresholds, its `k` and its true class. One histogram
    over (bin, true class, k) and its cumulative sums over the bins are the matrices of all thresholds, equal
    to those of thresholding each time, for the cost of about one.

    The matrices of batches add up to those of the set. For the curve of the mIoU and its best threshold see
    the example; a threshold that is chosen on the truth it is scored on flatters.

    Args:
        cam: Maps (B,C,H,W), float, of the size of ``truth``, in the scale of the thresholds (usually
            normalised). Set the maps of classes that an image lacks to zero first.
        truth: Ground truth (B,H,W), any integer dtype: 0 background, c + 1 class c, or ``ignore_index``.
        thresholds: The T values of the background, in any order. They are compared in the dtype of ``cam``.
        ignore_index: Label of true pixels that are not counted.

    Returns:
        Counts (T,1+C,1+C) int64: as `confusion_matrix`, one matrix a threshold, in the order given.

    Raises:
        TypeError: If ``cam`` is not a floating-point or ``truth`` not an integer tensor.
        ValueError: If the sizes of ``cam`` and ``truth`` differ, ``cam`` or a threshold is not finite, there
            is no threshold or no class, or ``truth`` holds other values.

    Examples:
        >>> import torch
        >>> from pseudolabel.metrics import background_sweep, iou_from_confusion
        >>> cam = torch.tensor([[[[0.9, 0.4, 0.2, 0.1]]]])
        >>> truth = torch.tensor([[[1, 1, 0, 255]]])
        >>> thresholds = torch.tensor([0.1, 0.3, 0.5])
        >>> confusion = background_sweep(cam, truth, thresholds)
        >>> miou = iou_from_confusion(confusion).nanmean(-1)
        >>> miou
        tensor([0.3333, 1.0000, 0.5000], dtype=torch.float64)
        >>> thresholds[miou.argmax()]
        tensor(0.3000)
    """
    num_foreground = check_shapes(cam=(cam, "B C h w"), truth=(truth, "B H W"))["C"]
    if cam.shape[2:] != truth.shape[1:]:
        raise ValueError(
            f"cam: expected the size of truth {tuple(truth.shape[1:])}, got {tuple(cam.shape[2:])}; resize "
            "the maps to the truth, never the truth to the maps"
        )
    if num_foreground == 0:
        raise ValueError(f"cam: expected at least one class, got shape {tuple(cam.shape)}")
    check_float(cam=cam)
    num_classes = 1 + num_foreground
    check_classes(num_classes, ignore_index, truth=truth)
    if not isinstance(thresholds, Tensor):
        check_sequence(thresholds=thresholds)
        for threshold in thresholds:
            check_number("thresholds", threshold)
    # Rounded once, to the dtype of cam.
    thresholds = torch.as_tensor(thresholds, dtype=torch.float64, device="cpu")
    check_shapes(thresholds=(thresholds, "T"))
    check_finite(thresholds=thresholds)
    if len(thresholds) == 0:
        raise ValueError("thresholds: expected at least one, got none")

    ascending, order = thresholds.to(cam).sort()
    score, winner = cam.detach().max(dim=1)  # the first of equal maxima
    check_finite(cam=score)  # a NaN of any class shows here, at a fraction of the cost of looking at all
    passed = torch.searchsorted(ascending, score)  # the number of thresholds below the score, 0..T
    truth = truth.long()
    row = torch.where(truth == ignore_index, num_classes, truth)
    shape = (len(ascending) + 1, num_classes + 1, num_foreground)
    histogram = count((passed * shape[1] + row) * shape[2] + winner, shape[0] * shape[1] * shape[2])

    # The j-th threshold from below turns to background what passed at most j thresholds.
    lost = histogram.view(shape)[:, :num_classes].cumsum(0)
    background, foreground = lost[:-1].sum(-1, keepdim=True), lost[-1] - lost[:-1]
    return torch.cat([background, foreground], dim=-1)[order.argsort()]
