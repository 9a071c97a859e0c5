"""Pretended under-fitting: once a network fits its noisy masks, it lets go of what it does not fit."""

import math
import warnings
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pseudolabel._checks import (
    check_choice,
    check_classes,
    check_float,
    check_integer,
    check_number,
    check_shapes,
    values_unchecked,
)
from pseudolabel._maps import clamp_keeping_slope, exact_dtype, resize, working_dtype
from pseudolabel.losses._reduction import Over, Reduction, reduce

__all__ = [
    "PretendedUnderFittingLoss",
    "UnderFittingMode",
    "gate_mean",
    "gate_terms",
    "pretended_under_fitting_loss",
]

UnderFittingMode = Literal["clamp", "ignore", "pow"]
GateOver = Literal["all", "valid", "classes"]

_told_of_dead_class = False


def pretended_under_fitting_loss(
    logits: Tensor,
    mask: Tensor,
    *,
    mode: UnderFittingMode = "clamp",
    beta: float = 0.5,
    k: float | None = None,
    gate_over: GateOver = "all",
    gate_value: float | Tensor | None = None,
    class_weight: Tensor | None = None,
    pixel_weight: Tensor | None = None,
    ignore_index: int = 255,
    reduction: Reduction = "mean",
    mean_over: Over = "valid",
) -> Tensor:
    """Cross-entropy that stops at the pixels which a well fitted network still gets wrong.

    With `l` the cross-entropy of each pixel and `m` its mean,

        l' = min(l, k)          mode "clamp"   }
        l' = l where l <= k     mode "ignore"  }  where m < beta;     l' = l  otherwise
        l' = (l + 1e-9)^k       mode "pow"     }

    `clamp` and `ignore` have the same gradient (none where `l > k`) and differ in the value alone; `pow` with
    `k < 1` gives well fitted pixels more weight and badly fitted ones less. The gate `m < beta` is decided
    anew at each call, and no gradient flows through it.

    A small class has little part in a mean over pixels: the gate may open as soon as everything is taken for
    background, and then all pixels of the class are let go, for ever. `gate_over="classes"` waits for each
    class. Where the gate is open and no pixel of a class of the mask is at or below the level, a warning says
    so, once in a process (on the CPU, where looking is free, and not under `torch.compile`).

    Args:
        logits: Output of the segmentation network (B,1+C,h,w), background first; resized to the mask. Half
            precision is computed in float32.
        mask: Pseudo label (B,H,W), integer: 0 background, c+1 class c, or ``ignore_index``.
        mode: See the formula.
        beta: The gate opens when the mean cross-entropy is below it, >= 0. Official: 0.5 (VOC), 0.8 (COCO).
        k: Level (`clamp`, `ignore`) or exponent (`pow`), > 0. None: a level of ``beta``, as official settings
            have it; an exponent of 0.5.
        gate_over: The mean of the gate runs over `all` pixels, ignored ones adding 0 (official), over the
            `valid` ones, or over the `classes` of the mask, each with the mean of its own pixels.
        gate_value: Take this mean for the gate instead, such as one that all processes agree on.
        class_weight: Factor of each class (1+C,), part of `l`: of the gate, and of what is held against a
            level ``k``, so that a class of weight 10 is let go above a cross-entropy of `k / 10`.
        pixel_weight: Factor of each pixel (B,H,W), applied to `l'`, no part of the gate.
        ignore_index: Label of the pixels that carry no loss.
        reduction: `mean`, `sum`, or `none` for the loss of each pixel (B,H,W).
        mean_over: The mean divides by the number of `valid` pixels, or of `all` pixels (official; with `pow`
            an ignored pixel then adds `1e-9^k`).

    Returns:
        The loss, a scalar or (B,H,W), float32 or better. A batch without a valid pixel gives 0 with a graph.

    Raises:
        TypeError: If ``logits`` is not floating-point or ``mask`` no integer tensor.
        ValueError: If shapes do not fit, the mask holds other labels, or a setting is out of range.

    Examples:
        >>> import torch
        >>> logits = torch.tensor([[[[4.0, -3.0]], [[0.0, 0.0]]]])  # the second pixel does not fit
        >>> mask = torch.zeros(1, 1, 2, dtype=torch.int64)
        >>> pretended_under_fitting_loss(logits, mask, beta=2, reduction="none")
        tensor([[[0.0181, 2.0000]]])

    Source:
        Li et al., "Pseudo-mask Matters in Weakly-supervised Semantic Segmentation", ICCV 2021; with
        `mean_over="all"` it matches the official implementation at 2cbb54e, values and gradients.
    """
    sizes = check_shapes(logits=(logits, "B N h w"), mask=(mask, "B H W"))
    check_float(logits=logits)
    if sizes["N"] == 0:
        raise ValueError(f"logits: expected a background channel in front, got {tuple(logits.shape)}")
    k = _checked_k(mode, beta, k, gate_over, mean_over)
    if class_weight is not None:
        check_shapes(logits=(logits, "B N h w"), class_weight=(class_weight, "N"))
    if pixel_weight is not None:
        check_shapes(mask=(mask, "B H W"), pixel_weight=(pixel_weight, "B H W"))
    check_integer(mask=mask)
    if mask.device.type == "cpu":  # accelerators would have to be waited for, and assert it themselves
        check_classes(sizes["N"], ignore_index, mask=mask)

    logits = resize(logits.to(working_dtype(logits)), (sizes["H"], sizes["W"]))
    valid = mask != ignore_index
    with torch.autocast(logits.device.type, enabled=False):
        weight = None if class_weight is None else class_weight.to(logits)
        loss = F.cross_entropy(logits, mask.long(), weight, ignore_index=ignore_index, reduction="none")

    gate = gate_value
    if gate is None:
        gate = gate_mean(gate_terms(loss, mask, valid, gate_over, sizes["N"]))
    is_open = torch.as_tensor(gate < beta, device=loss.device)
    if mode != "pow":
        _warn_of_dead_class(loss, mask, valid, is_open, k)
    # No branch: whether the gate is open is known on the device alone.
    loss = torch.where(is_open, _let_go(loss, mode, k), loss)
    if mean_over == "valid":
        loss = loss.where(valid, 0)
    if pixel_weight is not None:
        loss = loss * pixel_weight
    return reduce(loss, valid, reduction, mean_over)


def _let_go(loss: Tensor, mode: UnderFittingMode, k: float) -> Tensor:
    """What becomes of the cross-entropy of each pixel once the gate is open."""
    if mode == "clamp":
        return clamp_keeping_slope(loss, high=k)  # also where it is k, as with `ignore`
    if mode == "ignore":
        return loss * (loss <= k)
    return (loss + 1e-9) ** k


def gate_terms(loss: Tensor, mask: Tensor, valid: Tensor, over: GateOver, num_classes: int) -> Tensor:
    """Sums of the losses of pixels, and their numbers (2,G), of each class or of all together.

    Those of the parts of a batch add up to those of the batch.
    """
    loss = loss.detach()
    exact = exact_dtype(loss.device)
    if over != "classes":
        number = valid.sum() if over == "valid" else loss.new_full((), loss.numel())
        return torch.stack([loss.sum().to(exact), number.to(exact)])[:, None]
    label = mask.long().where(valid, 0).flatten()
    both = torch.stack([loss.where(valid, 0), valid]).flatten(1).to(exact)
    return both.new_zeros(2, num_classes).scatter_add_(1, label.expand(2, -1), both)


def gate_mean(terms: Tensor) -> Tensor:
    """The mean that the gate looks at: that of the means of `gate_terms`, where there are pixels."""
    total, number = terms.unbind()
    return (total / number.clamp(min=1)).sum() / (number > 0).sum().clamp(min=1)


def _warn_of_dead_class(loss: Tensor, mask: Tensor, valid: Tensor, is_open: Tensor, k: float) -> None:
    """Say once that a class gets no gradient at all, where looking is free."""
    global _told_of_dead_class  # noqa: PLW0603 - once in a process
    if values_unchecked(loss) or loss.device.type != "cpu" or not loss.requires_grad or _told_of_dead_class:
        return
    if not is_open:
        return
    labelled = torch.bincount(mask[valid])
    learning = torch.bincount(mask[valid & (loss <= k)], minlength=len(labelled))
    dead = ((labelled > 0) & (learning == 0)).nonzero().flatten().tolist()
    if dead:
        _told_of_dead_class = True
        warnings.warn(
            f"pretended under-fitting: the gate is open, and each pixel of mask label {dead[0]} has a loss "
            f"above k={k:g}, so that this class learns nothing here. Where that lasts, as it does for small "
            "classes, take gate_over='classes', class_weight, or a smaller beta. This is said once",
            stacklevel=3,
        )


class PretendedUnderFittingLoss(nn.Module):
    """Module twin of `pretended_under_fitting_loss`: `loss(logits, mask)`."""

    def __init__(
        self,
        *,
        mode: UnderFittingMode = "clamp",
        beta: float = 0.5,
        k: float | None = None,
        gate_over: GateOver = "all",
        ignore_index: int = 255,
        reduction: Reduction = "mean",
        mean_over: Over = "valid",
    ) -> None:
        super().__init__()
        self.k = _checked_k(mode, beta, k, gate_over, mean_over)
        self.mode: UnderFittingMode = mode
        self.beta = beta
        self.gate_over: GateOver = gate_over
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction
        self.mean_over: Over = mean_over

    def forward(
        self,
        logits: Tensor,
        mask: Tensor,
        *,
        gate_value: float | Tensor | None = None,
        class_weight: Tensor | None = None,
        pixel_weight: Tensor | None = None,
    ) -> Tensor:
        """See `pretended_under_fitting_loss`."""
        return pretended_under_fitting_loss(
            logits,
            mask,
            mode=self.mode,
            beta=self.beta,
            k=self.k,
            gate_over=self.gate_over,
            gate_value=gate_value,
            class_weight=class_weight,
            pixel_weight=pixel_weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            mean_over=self.mean_over,
        )

    def extra_repr(self) -> str:
        """Settings, for `print`."""
        return f"mode={self.mode!r}, beta={self.beta}, k={self.k}, gate_over={self.gate_over!r}"


def _checked_k(mode: str, beta: float, k: float | None, gate_over: str, mean_over: str) -> float:
    """Check the settings; what `k` is where none is given."""
    check_choice("mode", mode, UnderFittingMode)
    check_choice("gate_over", gate_over, GateOver)
    check_choice("mean_over", mean_over, Over)
    if beta != math.inf:  # which keeps the gate open
        check_number("beta", beta, at_least=0)
    if k is None and mode == "pow":
        return 0.5
    if k is None and beta == math.inf:
        raise ValueError("k: expected a number beside beta=inf, which is no level, got None")
    if k is None:
        return beta
    check_number("k", k, above=0)
    return k
