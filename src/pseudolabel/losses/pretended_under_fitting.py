"""Pretended under-fitting: once a network fits its noisy masks, it lets go of what it does not fit."""

from typing import Literal, get_args

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
)
from pseudolabel._maps import clamp_keeping_slope, resize, working_dtype
from pseudolabel.losses._reduction import Over, Reduction, mean, reduce

__all__ = ["PretendedUnderFittingLoss", "UnderFittingMode", "pretended_under_fitting_loss"]

UnderFittingMode = Literal["clamp", "ignore", "pow"]


def pretended_under_fitting_loss(
    logits: Tensor,
    mask: Tensor,
    *,
    mode: UnderFittingMode = "clamp",
    beta: float = 0.5,
    k: float = 0.5,
    gate_over: Over = "all",
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

    Args:
        logits: Output of the segmentation network (B,1+C,h,w), background first; resized to the mask. Half
            precision is computed in float32.
        mask: Pseudo label (B,H,W), integer: 0 background, c+1 class c, or ``ignore_index``.
        mode: See the formula.
        beta: The gate opens when the mean cross-entropy is below it, >= 0. Official: 0.5 (VOC), 0.8 (COCO).
        k: Level (`clamp`, `ignore`) or exponent (`pow`), > 0. Official: as ``beta``.
        gate_over: The mean of the gate runs over `all` pixels, ignored ones adding 0 (official), or over the
            `valid` ones.
        gate_value: Take this mean for the gate instead, such as one that all processes agree on.
        class_weight: Factor of each class (1+C,), part of `l` and of the gate.
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
        tensor([[[0.0181, 0.5000]]])

    Source:
        Li et al., "Pseudo-mask Matters in Weakly-supervised Semantic Segmentation", ICCV 2021; with
        `mean_over="all"` it matches the official implementation at 2cbb54e, values and gradients.
    """
    sizes = check_shapes(logits=(logits, "B N h w"), mask=(mask, "B H W"))
    check_float(logits=logits)
    if sizes["N"] == 0:
        raise ValueError(f"logits: expected a background channel in front, got {tuple(logits.shape)}")
    _check_settings(mode, beta, k, gate_over, mean_over)
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

    gate = mean(loss.detach(), valid, gate_over) if gate_value is None else gate_value
    let_go = _let_go(loss, mode, k)
    # No branch: whether the gate is open is known on the device alone.
    loss = torch.where(torch.as_tensor(gate < beta, device=loss.device), let_go, loss)
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


class PretendedUnderFittingLoss(nn.Module):
    """Module twin of `pretended_under_fitting_loss`: `loss(logits, mask)`."""

    def __init__(
        self,
        *,
        mode: UnderFittingMode = "clamp",
        beta: float = 0.5,
        k: float = 0.5,
        gate_over: Over = "all",
        ignore_index: int = 255,
        reduction: Reduction = "mean",
        mean_over: Over = "valid",
    ) -> None:
        super().__init__()
        _check_settings(mode, beta, k, gate_over, mean_over)
        self.mode: UnderFittingMode = mode
        self.beta = beta
        self.k = k
        self.gate_over: Over = gate_over
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


def _check_settings(mode: str, beta: float, k: float, gate_over: str, mean_over: str) -> None:
    check_choice("mode", mode, get_args(UnderFittingMode))
    check_choice("gate_over", gate_over, get_args(Over))
    check_choice("mean_over", mean_over, get_args(Over))
    if beta != float("inf"):  # which keeps the gate open
        check_number("beta", beta, at_least=0)
    check_number("k", k, above=0)
