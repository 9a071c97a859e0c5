"""Min pooling: part of each image has to stay free of every class."""

import torch
from torch import Tensor, nn

from pseudolabel._checks import check_choice, check_finite, check_float, check_number, check_shapes
from pseudolabel._maps import working_dtype
from pseudolabel.losses._present import zero_absent
from pseudolabel.losses._reduction import Reduction, reduce

__all__ = ["MinPoolingLoss", "min_pooling_loss"]


def min_pooling_loss(
    cam: Tensor, labels: Tensor | None = None, *, fraction: float = 0.25, reduction: Reduction = "mean"
) -> Tensor:
    """Mean of the weakest pixels of an image, each pixel taken at its strongest class.

        z = (largest cam of the pixel)
        loss = mean of max(z, 0) over the floor(fraction h w) pixels with the smallest z, one at least

    It keeps refined maps from spreading over the whole image; a map that is 0 on that fraction costs nothing.

    Args:
        cam: Raw maps (B,C,h,w) of foreground classes. Half precision is computed in float32.
        labels: Image-level labels (B,C); maps of absent classes count as 0.
        fraction: Share of the pixels, in (0, 1]. Published: a quarter.
        reduction: `mean` or `sum` over the images, or `none` for the loss of each image (B,).

    Returns:
        The loss, a scalar or (B,), float32 or better.

    Raises:
        TypeError: If ``cam`` is not a floating-point tensor.
        ValueError: If shapes do not fit, there is no class, or a setting is out of range.

    Examples:
        >>> import torch
        >>> cam = torch.tensor([[[[0.2, 0.9], [0.8, 0.0]], [[0.6, 0.0], [0.0, 0.1]]]])
        >>> min_pooling_loss(cam, fraction=0.5)  # (0.1 + 0.6) / 2
        tensor(0.3500)

    Source:
        Wang et al., "Self-supervised Equivariant Attention Mechanism for Weakly Supervised Semantic
        Segmentation" (SEAM), CVPR 2020; matches `adaptive_min_pooling_loss` of the official PMM (134ad33) and
        RTC (9c777e0) programs, which run it on `cam * labels`.
    """
    sizes = check_shapes(cam=(cam, "B C h w"))
    check_float(cam=cam)
    check_number("fraction", fraction, above=0, at_most=1)
    if sizes["C"] == 0:
        raise ValueError(f"cam: expected at least one class, got {tuple(cam.shape)}")
    if cam.device.type == "cpu":  # accelerators would have to be waited for
        check_finite(cam=cam)  # a NaN would not be among the smallest
    strongest = zero_absent(cam.to(working_dtype(cam)), labels, "cam").amax(1).flatten(1)
    count = max(1, int(fraction * strongest.shape[1]))
    loss = strongest.topk(count, dim=1, largest=False, sorted=False).values.relu().mean(1)
    return reduce(loss, torch.ones_like(loss, dtype=torch.bool), reduction)


class MinPoolingLoss(nn.Module):
    """Module twin of `min_pooling_loss`: `loss(cam, labels)`."""

    def __init__(self, *, fraction: float = 0.25, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_number("fraction", fraction, above=0, at_most=1)
        check_choice("reduction", reduction, Reduction)
        self.fraction = fraction
        self.reduction: Reduction = reduction

    def forward(self, cam: Tensor, labels: Tensor | None = None) -> Tensor:
        """See `min_pooling_loss`."""
        return min_pooling_loss(cam, labels, fraction=self.fraction, reduction=self.reduction)

    def extra_repr(self) -> str:
        """Settings, for `print`."""
        return f"fraction={self.fraction}, reduction={self.reduction!r}"
