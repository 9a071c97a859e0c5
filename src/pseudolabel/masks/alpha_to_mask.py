"""From mattes to a label map."""

import torch
from torch import Tensor

from pseudolabel._checks import (
    check_float,
    check_ignore_index,
    check_labels,
    check_probability,
    check_shapes,
    check_unit_range,
)
from pseudolabel._maps import gather_present, label_places, present_classes, working_dtype
from pseudolabel.masks.thresholds import scores_to_mask

__all__ = ["alpha_to_mask"]


def alpha_to_mask(
    alpha: Tensor,
    labels: Tensor | None = None,
    *,
    confidence: float | None = None,
    margin: float | None = None,
    ignore_index: int = 255,
) -> Tensor:
    """Label each pixel with its largest part: of the mattes, or of the background that they leave.

        a_0 = max(0, 1 - sum_c alpha_c),   a_c = alpha_c / max(1, sum_c alpha_c)
        mask = argmax [a_0, a_1, ...],   ties to the first

    Args:
        alpha: Mattes (B,C,H,W), in [0, 1].
        labels: Image-level labels (B,C). By default every class may be labelled.
        confidence: Pixels whose largest part is below it become ``ignore_index``. To evaluate, label every
            pixel (None, the default); to train on the mask, 0.5 is our proposal.
        margin: Pixels where the largest part leads by less become ``ignore_index``. To train on the mask, 0.1
            is our proposal.
        ignore_index: Label of the pixels left out.

    Returns:
        Mask (B,H,W) int64: 0 background, c+1 class c.

    Raises:
        TypeError: If ``alpha`` is not a floating-point tensor.
        ValueError: If shapes do not fit, ``alpha`` leaves [0, 1], ``labels`` are not multi-hot, or a setting
            is out of range.

    Examples:
        >>> import torch
        >>> alpha = torch.tensor([[[[0.9, 0.3, 0.1, 0.48]], [[0.1, 0.4, 0.1, 0.0]]]])
        >>> alpha_to_mask(alpha)
        tensor([[[1, 2, 0, 0]]])
        >>> alpha_to_mask(alpha, confidence=0.5, margin=0.1)
        tensor([[[  1, 255,   0, 255]]])

    Source:
        Ours: the merging of classes in Mat-Label (ICCV 2023) is not public.
    """
    check_shapes(alpha=(alpha, "B C H W"))
    check_float(alpha=alpha)
    check_unit_range(alpha=alpha)
    if margin is not None:
        check_probability("margin", margin)
    if confidence is not None:
        check_probability("confidence", confidence)
    check_ignore_index(ignore_index)
    if 0 <= ignore_index <= alpha.shape[1]:
        raise ValueError(f"ignore_index: expected no label of the classes, got {ignore_index}")
    if labels is not None:
        check_shapes(alpha=(alpha, "B C H W"), labels=(labels, "B C"))
        check_labels(labels)
        index, valid = present_classes(labels)
        alpha = gather_present(alpha, index).masked_fill(~valid[:, :, None, None], 0)

    alpha = alpha.to(working_dtype(alpha)).clamp(0, 1)
    covered = alpha.sum(1, keepdim=True)
    parts = torch.cat([1 - covered.clamp(max=1), alpha / covered.clamp(min=1)], dim=1)
    mask = scores_to_mask(parts)
    largest = parts.amax(1)
    ignored = torch.zeros_like(largest, dtype=torch.bool)
    if confidence is not None:
        ignored |= largest < confidence
    if margin is not None:
        runner_up = parts.scatter(1, mask[:, None], -torch.inf).amax(1)
        ignored |= largest - runner_up < margin
    if labels is not None:
        mask = label_places(mask, index)
    return mask.masked_fill(ignored, ignore_index)
