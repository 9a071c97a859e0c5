"""Activation-aware mask loss: saliency teaches foreground, class activations say where it is blind."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pseudolabel._checks import (
    check_channels,
    check_choice,
    check_float,
    check_probability,
    check_shapes,
    check_unit_range,
)
from pseudolabel._maps import resize, working_dtype
from pseudolabel.losses._present import zero_absent
from pseudolabel.losses._reduction import Reduction

__all__ = [
    "ActivationAwareMaskLoss",
    "ActivationAwareMode",
    "EmptySaliency",
    "activation_aware_mask_loss",
    "refine_saliency_target",
]

ActivationAwareMode = Literal["complete", "ignore", "soft", "none"]
EmptySaliency = Literal["keep", "skip"]


def activation_aware_mask_loss(
    logits: Tensor,
    saliency: Tensor,
    activation: Tensor,
    labels: Tensor,
    *,
    mode: ActivationAwareMode = "complete",
    saliency_threshold: float = 0.5,
    activation_threshold: float = 0.7,
    valid: Tensor | None = None,
    empty_saliency: EmptySaliency = "keep",
    reduction: Reduction = "mean",
) -> Tensor:
    """Cross-entropy of foreground, of any class, against a saliency map that class activations correct.

    With `p` the foreground probability, and target `t` and weight `w` from `refine_saliency_target`,

        p = sum of softmax(logits) over the classes 1..C
        loss = - sum w [t log p + (1 - t) log(1 - p)] / sum w

    Saliency maps find the outlines of what stands out and miss objects that do not; class activations find
    those, without outlines. The loss never chooses a class: it moves all classes of a pixel up or down, each
    by its share of `p`. So it stands beside a cross-entropy of classes,
    `pretended_under_fitting_loss(logits, mask) + weight * activation_aware_mask_loss(...)`.

    Args:
        logits: Output of the segmentation network (B,1+C,h,w), background first; resized to the saliency.
            Half precision is computed in float32.
        saliency: Class-agnostic saliency (B,H,W) in [0, 1]. No gradient flows to it.
        activation: Normalised class activation maps (B,C,H,W) in [0, 1]. No gradient flows to them.
        labels: Image-level labels (B,C). Maps of absent classes are not looked at.
        mode: What becomes of activated pixels that are not salient, see `refine_saliency_target`.
        saliency_threshold: See `refine_saliency_target`.
        activation_threshold: See `refine_saliency_target`.
        valid: Pixels with a loss (B,H,W) bool, such as `mask != 255`; all by default.
        empty_saliency: See `refine_saliency_target`.
        reduction: `mean` by the weights, over the batch, `sum`, or `none` for the weighted loss of each pixel
            (B,H,W).

    Returns:
        The loss, a scalar or (B,H,W), float32 or better. A batch without weight gives 0 with a graph.

    Raises:
        TypeError: If ``logits`` or a map is not floating-point, or ``valid`` not bool.
        ValueError: If shapes do not fit, maps leave [0, 1], ``labels`` are not multi-hot, or a setting is out
            of range.

    Examples:
        >>> import torch
        >>> logits = torch.zeros(1, 2, 1, 3)  # background and one class: p = 1/2
        >>> saliency = torch.tensor([[[0.9, 0.1, 0.1]]])
        >>> activation = torch.tensor([[[[0.0, 0.8, 0.2]]]])
        >>> ignore = {"mode": "ignore", "reduction": "none"}
        >>> activation_aware_mask_loss(logits, saliency, activation, torch.tensor([[1]]), **ignore)
        tensor([[[0.6931, 0.0000, 0.6931]]])

    Source:
        In the spirit of the activation aware mask refinement loss of Sun et al., "Inferring the Class
        Conditional Response Map for Weakly Supervised Semantic Segmentation", WACV 2022. Its abstract says:
        a loss of the training of the segmentation network, which uses saliency maps there and does not
        suppress objects in the saliency background. Everything else here is our reading, the formula is not
        confirmed: only the abstract was at hand, and the official program (96ba7d8) has no such loss.
    """
    check_shapes(
        logits=(logits, "B N h w"),
        saliency=(saliency, "B H W"),
        activation=(activation, "B C H W"),
        labels=(labels, "B C"),
    )
    check_float(logits=logits)
    check_channels(labels.shape[1], "labels", logits=logits)
    check_choice("reduction", reduction, Reduction)
    if valid is not None:
        check_shapes(saliency=(saliency, "B H W"), valid=(valid, "B H W"))
        if valid.dtype != torch.bool:
            raise TypeError(f"valid: expected a bool tensor, got {str(valid.dtype).removeprefix('torch.')}")
    target, weight = refine_saliency_target(
        saliency,
        activation,
        labels,
        mode=mode,
        saliency_threshold=saliency_threshold,
        activation_threshold=activation_threshold,
        empty_saliency=empty_saliency,
    )

    z = resize(logits.to(working_dtype(logits)), (saliency.shape[1], saliency.shape[2]))
    weight = weight.to(z) if valid is None else weight.to(z).where(valid, 0)
    with torch.autocast(logits.device.type, enabled=False):
        odds = z[:, 1:].logsumexp(1) - z[:, 0]  # p = sigmoid(odds), finite for any finite logits
        loss = weight * F.binary_cross_entropy_with_logits(odds, target.to(z), reduction="none")
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    total = weight.sum()
    return loss.sum() / total.where(total > 0, 1)


def refine_saliency_target(
    saliency: Tensor,
    activation: Tensor,
    labels: Tensor,
    *,
    mode: ActivationAwareMode = "complete",
    saliency_threshold: float = 0.5,
    activation_threshold: float = 0.7,
    empty_saliency: EmptySaliency = "keep",
) -> tuple[Tensor, Tensor]:
    """What `activation_aware_mask_loss` wants of each pixel, and how much.

    With `s` the saliency and `a` the largest activation of a present class at the pixel:

    | pixel | target | weight `complete` | `ignore` | `soft` | `none` |
    |---|---|---|---|---|---|
    | salient, `s >= saliency_threshold` | 1 | 1 | 1 | 1 | 1 |
    | not salient, `a >= activation_threshold` | 0, `complete`: 1 | 1 | 0 | 1 - a | 1 |
    | not salient, `a < activation_threshold` | 0 | 1 | 1 | 1 - a | 1 |

    `none` is plain saliency, which suppresses every object that is not salient. `ignore` leaves activated
    pixels alone, `complete` makes them foreground, `soft` needs no threshold.

    Args:
        saliency: Class-agnostic saliency (B,H,W) in [0, 1].
        activation: Normalised class activation maps (B,C,H,W) in [0, 1].
        labels: Image-level labels (B,C). Maps of absent classes are not looked at.
        mode: See the table.
        saliency_threshold: Salient from here on, in [0, 1].
        activation_threshold: Activated from here on, in [0, 1].
        empty_saliency: An image without a salient pixel says that nothing is there (`keep`), or that the
            saliency has failed, and no pixel of it has weight (`skip`).

    Returns:
        Target (B,H,W), 0 or 1, and weight (B,H,W) in [0, 1], both in the dtype of ``saliency``, without a
        graph.

    Raises:
        TypeError: If a map is not a floating-point tensor.
        ValueError: If shapes do not fit, maps leave [0, 1], ``labels`` are not multi-hot, or a setting is out
            of range.

    Examples:
        >>> import torch
        >>> saliency = torch.tensor([[[0.9, 0.1, 0.1]]])
        >>> activation = torch.tensor([[[[0.0, 0.8, 0.2]]]])
        >>> refine_saliency_target(saliency, activation, torch.tensor([[1]]), mode="soft")
        (tensor([[[1., 0., 0.]]]), tensor([[[1.0000, 0.2000, 0.8000]]]))

    Source:
        As `activation_aware_mask_loss`: our reading, the formula is not confirmed.
    """
    sizes = check_shapes(
        saliency=(saliency, "B H W"), activation=(activation, "B C H W"), labels=(labels, "B C")
    )
    check_float(saliency=saliency, activation=activation)
    if sizes["C"] == 0:
        raise ValueError(f"activation: expected at least one class, got {tuple(activation.shape)}")
    _check_settings(mode, saliency_threshold, activation_threshold, empty_saliency)
    if saliency.device.type == "cpu":  # accelerators would have to be waited for
        check_unit_range(saliency=saliency, activation=activation)

    saliency = saliency.detach()
    a = zero_absent(activation.detach(), labels, "activation").amax(1).clamp(0, 1)
    salient, activated = saliency >= saliency_threshold, a >= activation_threshold
    target = salient | activated if mode == "complete" else salient
    weight = torch.ones_like(saliency)
    if mode == "ignore":
        weight = weight.where(salient | ~activated, 0)
    if mode == "soft":
        weight = weight.where(salient, (1 - a).to(weight))
    if empty_saliency == "skip":
        weight = weight * salient.flatten(1).any(1)[:, None, None]
    return target.to(weight), weight


class ActivationAwareMaskLoss(nn.Module):
    """Module twin of `activation_aware_mask_loss`: `loss(logits, saliency, activation, labels)`."""

    def __init__(
        self,
        *,
        mode: ActivationAwareMode = "complete",
        saliency_threshold: float = 0.5,
        activation_threshold: float = 0.7,
        empty_saliency: EmptySaliency = "keep",
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        _check_settings(mode, saliency_threshold, activation_threshold, empty_saliency)
        check_choice("reduction", reduction, Reduction)
        self.mode: ActivationAwareMode = mode
        self.saliency_threshold = saliency_threshold
        self.activation_threshold = activation_threshold
        self.empty_saliency: EmptySaliency = empty_saliency
        self.reduction: Reduction = reduction

    def forward(
        self,
        logits: Tensor,
        saliency: Tensor,
        activation: Tensor,
        labels: Tensor,
        valid: Tensor | None = None,
    ) -> Tensor:
        """See `activation_aware_mask_loss`."""
        return activation_aware_mask_loss(
            logits,
            saliency,
            activation,
            labels,
            mode=self.mode,
            saliency_threshold=self.saliency_threshold,
            activation_threshold=self.activation_threshold,
            valid=valid,
            empty_saliency=self.empty_saliency,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """Settings, for `print`."""
        return (
            f"mode={self.mode!r}, saliency_threshold={self.saliency_threshold}, "
            f"activation_threshold={self.activation_threshold}, empty_saliency={self.empty_saliency!r}"
        )


def _check_settings(
    mode: str, saliency_threshold: float, activation_threshold: float, empty_saliency: str
) -> None:
    check_choice("mode", mode, ActivationAwareMode)
    check_probability("saliency_threshold", saliency_threshold)
    check_probability("activation_threshold", activation_threshold)
    check_choice("empty_saliency", empty_saliency, EmptySaliency)
