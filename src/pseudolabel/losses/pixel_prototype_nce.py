"""Pixel-prototype contrast: each pixel should look like the prototype of its class, unlike all others."""

import torch
from torch import Tensor, nn

from pseudolabel._checks import (
    check_choice,
    check_classes,
    check_float,
    check_integer,
    check_number,
    check_shapes,
)
from pseudolabel._prototype_nce import prototype_logits, prototype_nce
from pseudolabel.losses._reduction import Reduction, reduce

__all__ = ["PixelPrototypeNCE", "pixel_prototype_nce"]


def pixel_prototype_nce(
    features: Tensor,
    targets: Tensor,
    prototypes: Tensor,
    *,
    temperature: float = 0.1,
    valid: Tensor | None = None,
    ignore_index: int = 255,
    reduction: Reduction = "mean",
) -> Tensor:
    """InfoNCE of pixels against one prototype a class, the prototypes being constants.

    With the features `x` of a pixel, `u = x / |x|`, its class `y` and the prototypes `P`:

        loss = - u . P_y / temperature + log sum_k exp(u . P_k / temperature)

    which is the cross-entropy of the cosines over the temperature. It is at most `log K + 2 / temperature`; a
    pixel without features has `log K`. Gradients flow to ``features`` alone.

    Args:
        features: Features (B,D,h,w), of any length. Half precision is computed in float32.
        targets: Class of each pixel (B,h,w), integer: 0 background, c+1 class c, or ``ignore_index``.
        prototypes: Prototypes (K,D) of length 1, background first, such as those of
            `heads.prototypes_from_topk`.
        temperature: Divisor of the cosines, > 0. Published: 0.1.
        valid: Classes (K,) bool that serve as negatives; all by default (official), those that no image of
            the batch shows included. The class of a pixel always stands in its sum.
        ignore_index: Label of the pixels that carry no loss.
        reduction: `mean` over the other pixels, `sum`, or `none` for the loss of each pixel (B,h,w).

    Returns:
        The loss, a scalar or (B,h,w), float32 or better. Without a labelled pixel it is 0 with a graph.

    Raises:
        TypeError: If ``features`` or ``prototypes`` are not floating-point, ``targets`` not integer, or
            ``valid`` not bool.
        ValueError: If shapes do not fit, ``targets`` hold other labels, or a setting is out of range.

    Examples:
        >>> import torch
        >>> features = torch.tensor([[[[2.0, 0.0]], [[0.0, 5.0]]]])
        >>> targets = torch.tensor([[[0, 0]]])
        >>> pixel_prototype_nce(features, targets, torch.eye(2), temperature=0.5, reduction="none")
        tensor([[[0.1269, 2.1269]]])

    Source:
        Wang, Zhang and Yan, "Boosting Weakly-Supervised Image Segmentation via Representation, Transform, and
        Compensator" (RTC), 2023; matches the official implementation at 9c777e0, values and gradients. The
        formula is read off the code. ``valid`` and ``ignore_index`` are ours.
    """
    sizes = check_shapes(
        features=(features, "B D h w"), targets=(targets, "B h w"), prototypes=(prototypes, "K D")
    )
    check_float(features=features, prototypes=prototypes)
    check_integer(targets=targets)
    check_number("temperature", temperature, above=0)
    if sizes["K"] == 0:
        raise ValueError(f"prototypes: expected at least one class, got {tuple(prototypes.shape)}")
    if targets.device.type == "cpu":  # accelerators would have to be waited for, and assert it themselves
        check_classes(sizes["K"], ignore_index, targets=targets)
    if valid is not None:
        check_shapes(prototypes=(prototypes, "K D"), valid=(valid, "K"))
        if valid.dtype != torch.bool:
            raise TypeError(f"valid: expected a bool tensor, got {valid.dtype}")
    ignored = targets == ignore_index
    logits = prototype_logits(features, prototypes, temperature)
    loss = prototype_nce(logits, targets, ignored=ignored, valid=valid)
    return reduce(loss, ~ignored, reduction)


class PixelPrototypeNCE(nn.Module):
    """Module twin of `pixel_prototype_nce`: `loss(features, targets, prototypes)`."""

    def __init__(
        self, *, temperature: float = 0.1, ignore_index: int = 255, reduction: Reduction = "mean"
    ) -> None:
        super().__init__()
        check_number("temperature", temperature, above=0)
        check_choice("reduction", reduction, Reduction)
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction

    def forward(
        self, features: Tensor, targets: Tensor, prototypes: Tensor, *, valid: Tensor | None = None
    ) -> Tensor:
        """See `pixel_prototype_nce`."""
        return pixel_prototype_nce(
            features,
            targets,
            prototypes,
            temperature=self.temperature,
            valid=valid,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """Settings, for `print`."""
        return f"temperature={self.temperature}, reduction={self.reduction!r}"
