"""Balanced mask cross-entropy: classes with few pixels in a mask count more, images with gaps not at all."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pseudolabel._checks import (
    check_choice,
    check_classes,
    check_float,
    check_integer,
    check_labels,
    check_shapes,
)
from pseudolabel._maps import stretch, working_dtype
from pseudolabel.losses._reduction import Over, Reduction

__all__ = ["BalancedMaskCrossEntropy", "balanced_mask_cross_entropy"]


def balanced_mask_cross_entropy(
    logits: Tensor,
    mask: Tensor,
    labels: Tensor,
    *,
    require_all_classes: bool = True,
    ignore_index: int = 255,
    reduction: Reduction = "mean",
    mean_over: Over = "all",
) -> Tensor:
    """Cross-entropy with a mask, each class weighted by how many pixels the others have in this image.

    With `n_k` the pixels that the mask of an image gives to class k, background included, and `n` their sum:

        w_k = (n - n_k) / (1 + n)
        l = g * mean over pixels of w_{mask(p)} CE(logits(p), mask(p)),   0 at ignored pixels

    The gate `g` is 1 where the number of classes in the mask is that of the image's labels plus one, for the
    background. Else it is 0: an image whose mask misses a class teaches that the class is not there. A mask
    of one class alone has weight 0 everywhere.

    Args:
        logits: Output of the segmentation network (B,1+C,h,w), background first; resized to the mask,
            bilinear with `align_corners=True` as in the official program. Half precision is computed in
            float32.
        mask: Pseudo label (B,H,W), integer: 0 background, c+1 class c, or ``ignore_index``.
        labels: Image-level labels (B,C).
        require_all_classes: Whether there is a gate; False takes every image.
        ignore_index: Label of the pixels that carry no loss.
        reduction: `mean` or `sum` over the images, or `none` for the loss of each image (B,).
        mean_over: The mean within an image divides by the number of `all` pixels (official), or of the
            `valid` ones.

    Returns:
        The loss, a scalar or (B,), float32 or better. A batch without a valid pixel gives 0 with a graph.

    Raises:
        TypeError: If ``logits`` is not floating-point or ``mask`` no integer tensor.
        ValueError: If shapes do not fit, the mask holds other labels, ``labels`` are not multi-hot, or a
            setting is out of range.

    Examples:
        >>> import torch
        >>> logits = torch.zeros(1, 3, 1, 4)  # all classes alike: the cross-entropy is log 3
        >>> mask = torch.tensor([[[0, 0, 2, 255]]])
        >>> balanced_mask_cross_entropy(logits, mask, torch.tensor([[0, 1]]))  # log 3 (1/4 + 1/4 + 2/4) / 4
        tensor(0.2747)
        >>> balanced_mask_cross_entropy(logits, mask, torch.tensor([[1, 1]]))  # the first class is missing
        tensor(0.)

    Source:
        Araslanov and Roth, "Single-Stage Semantic Segmentation from Image Labels", CVPR 2020, the loss fed
        with hard labels. The formula is read off the code: it matches `balanced_mask_loss_ce` of the official
        program of RTC (arXiv 2309.00871) at 9c777e0, values and gradients. ``mean_over`` and
        ``require_all_classes=False`` are ours.
    """
    sizes = check_shapes(logits=(logits, "B N h w"), mask=(mask, "B H W"))
    check_float(logits=logits)
    if sizes["N"] == 0:
        raise ValueError(f"logits: expected a background channel in front, got {tuple(logits.shape)}")
    check_integer(mask=mask)
    check_shapes(**{"logits[:, 1:]": (logits[:, 1:], "B C h w")}, labels=(labels, "B C"))
    _check_settings(reduction, mean_over)
    if mask.device.type == "cpu":  # accelerators would have to be waited for, and assert it themselves
        check_labels(labels)
        check_classes(sizes["N"], ignore_index, mask=mask)

    size = (sizes["H"], sizes["W"])
    logits, mask = stretch(logits.to(working_dtype(logits)), size), mask.long()
    valid = mask != ignore_index
    known = mask.where(valid, 0)
    with torch.autocast(logits.device.type, enabled=False):
        cross_entropy = F.cross_entropy(logits, known, reduction="none").where(valid, 0)

    counts = mask.new_zeros(len(mask), sizes["N"]).scatter_add_(1, known.flatten(1), valid.flatten(1).long())
    total = counts.sum(1, keepdim=True)
    weight = (total - counts).to(logits.dtype) / (1 + total)
    loss = (weight.gather(1, known.flatten(1)) * cross_entropy.flatten(1)).sum(1)
    loss = loss / (size[0] * size[1] if mean_over == "all" else total[:, 0].clamp(min=1))
    if require_all_classes:
        loss = loss.where((counts > 0).sum(1) == 1 + (labels != 0).sum(1), 0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / max(len(loss), 1)


class BalancedMaskCrossEntropy(nn.Module):
    """Module twin of `balanced_mask_cross_entropy`: `loss(logits, mask, labels)`."""

    def __init__(
        self,
        *,
        require_all_classes: bool = True,
        ignore_index: int = 255,
        reduction: Reduction = "mean",
        mean_over: Over = "all",
    ) -> None:
        super().__init__()
        _check_settings(reduction, mean_over)
        self.require_all_classes = require_all_classes
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction
        self.mean_over: Over = mean_over

    def forward(self, logits: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        """See `balanced_mask_cross_entropy`."""
        return balanced_mask_cross_entropy(
            logits,
            mask,
            labels,
            require_all_classes=self.require_all_classes,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            mean_over=self.mean_over,
        )

    def extra_repr(self) -> str:
        """Settings, for `print`."""
        return (
            f"require_all_classes={self.require_all_classes}, reduction={self.reduction!r}, "
            f"mean_over={self.mean_over!r}"
        )


def _check_settings(reduction: str, mean_over: str) -> None:
    check_choice("reduction", reduction, Reduction)
    check_choice("mean_over", mean_over, Over)
