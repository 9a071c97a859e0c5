"""How losses of pixels become one number."""

from typing import Literal

from torch import Tensor

from pseudolabel._checks import check_choice

__all__ = ["Over", "Reduction", "mean", "reduce"]

Reduction = Literal["mean", "sum", "none"]
Over = Literal["valid", "all"]


def mean(loss: Tensor, valid: Tensor, over: Over = "valid") -> Tensor:
    """Mean over the valid pixels (0 with a graph where there are none), or over all of them."""
    if over == "all":
        return loss.sum() / max(loss.numel(), 1)
    return loss.where(valid, 0).sum() / valid.sum().clamp(min=1)


def reduce(loss: Tensor, valid: Tensor, reduction: Reduction, over: Over = "valid") -> Tensor:
    """Apply a `reduction` to losses of pixels, of which ignored ones are 0."""
    check_choice("reduction", reduction, Reduction)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else mean(loss, valid, over)
