"""Equivariance: two views of an image should show the same maps."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pseudolabel._checks import check_channels, check_choice, check_float, check_number, check_shapes
from pseudolabel._maps import working_dtype
from pseudolabel.losses._present import zero_absent
from pseudolabel.losses._reduction import Over, Reduction, reduce
from pseudolabel.refine.pixel_correlation import keep_max_class

__all__ = ["EquivarianceLoss", "EquivariantCrossLoss", "equivariance_loss", "equivariant_cross_loss"]


def equivariance_loss(
    cam1: Tensor,
    cam2: Tensor,
    labels: Tensor | None = None,
    *,
    reduction: Reduction = "mean",
    mean_over: Over = "valid",
) -> Tensor:
    """Mean absolute difference of the maps of two views, `mean |cam1 - cam2|`.

    Symmetric; gradients flow to both views. Bring the maps to one place first: undo the transform of the
    second view on its maps, or do it to the maps of the first.

    Args:
        cam1: Maps of the first view (B,C,h,w), foreground classes only; SEAM normalises them by
            `normalize_cam(cam, "minmax-zero")`. Half precision is computed in float32.
        cam2: Maps of the second view (B,C,h,w).
        labels: Image-level labels (B,C); absent classes have no loss.
        reduction: `mean`, `sum`, or `none` for the loss of each value (B,C,h,w).
        mean_over: With ``labels``, the mean divides by the number of `valid` values, those of present
            classes, or of `all` values (official).

    Returns:
        The loss, a scalar or (B,C,h,w), float32 or better. A batch without a present class gives 0 with a
        graph.

    Raises:
        TypeError: If a map is not a floating-point tensor.
        ValueError: If shapes do not fit, or a setting is unknown.

    Examples:
        >>> import torch
        >>> cam1, cam2 = torch.tensor([[[[0.2]], [[1.0]]]]), torch.tensor([[[[0.5]], [[0.0]]]])
        >>> equivariance_loss(cam1, cam2, labels=torch.tensor([[1, 0]]))
        tensor(0.3000)

    Source:
        Wang et al., "Self-supervised Equivariant Attention Mechanism for Weakly Supervised Semantic
        Segmentation" (SEAM), CVPR 2020; with `mean_over="all"` it matches the official RTC program at
        9c777e0, values and gradients.
    """
    check_shapes(cam1=(cam1, "B C h w"), cam2=(cam2, "B C h w"))
    check_float(cam1=cam1, cam2=cam2)
    check_choice("mean_over", mean_over, Over)
    difference = (cam1.to(working_dtype(cam1)) - cam2.to(working_dtype(cam2))).abs()
    loss = zero_absent(difference, labels, "cam1")
    present = torch.ones_like(loss, dtype=torch.bool)
    if labels is not None:
        present = (labels != 0)[:, :, None, None].expand_as(loss)
    return reduce(loss, present, reduction, mean_over)


def equivariant_cross_loss(
    cam: Tensor,
    refined: Tensor,
    labels: Tensor | None = None,
    *,
    keep_ratio: float = 0.2,
    reduction: Reduction = "mean",
) -> Tensor:
    """Mean of the largest differences between the maps of one view and the refined maps of the other.

    With `target` the background `1 - max cam` and, of the classes of ``cam``, the largest of each pixel
    (`keep_max_class`),

        loss = mean of the floor(keep_ratio (1+C) h w) largest |target - refined| of an image, one at least

    No gradient flows to ``cam``. SEAM adds both directions:
    `equivariant_cross_loss(cam2, refined1) + equivariant_cross_loss(cam1, refined2)`.

    Args:
        cam: Maps of one view (B,C,h,w) in [0, 1], foreground classes only, normalised as for
            `equivariance_loss`.
        refined: Refined maps of the other view (B,1+C,h,w) with their own background in front, such as the
            output of `pixel_correlation` after `normalize_cam(refined, "minmax-zero")`. Half precision is
            computed in float32.
        labels: Image-level labels (B,C); maps of absent classes count as 0 on both sides.
        keep_ratio: Share of the values of an image that enter its mean, those of absent classes counted, in
            (0, 1]. Published: 0.2.
        reduction: `mean` or `sum` over the images, or `none` for the loss of each image (B,).

    Returns:
        The loss, a scalar or (B,), float32 or better.

    Raises:
        TypeError: If a map is not a floating-point tensor.
        ValueError: If shapes do not fit, or a setting is out of range.

    Examples:
        >>> import torch
        >>> cam = torch.tensor([[[[0.9]], [[0.4]]]])  # target: background 0.1, classes 0.9 and 0
        >>> refined = torch.tensor([[[[0.1]], [[0.6]], [[0.1]]]])
        >>> equivariant_cross_loss(cam, refined, keep_ratio=0.5)
        tensor(0.3000)

    Source:
        SEAM (CVPR 2020), its equivariant cross regularisation; matches the official RTC program at 9c777e0,
        values and gradients.
    """
    sizes = check_shapes(cam=(cam, "B C h w"), refined=(refined, "B 1+C h w"))
    check_float(cam=cam, refined=refined)
    check_channels(sizes["C"], "cam", refined=refined)
    check_number("keep_ratio", keep_ratio, above=0, at_most=1)

    cam = zero_absent(cam.detach().to(working_dtype(cam)), labels, "cam")
    background = 1 - F.pad(cam, (0, 0, 0, 0, 1, 0)).amax(1, keepdim=True)
    target = keep_max_class(torch.cat([background, cam], 1))
    refined = refined.to(working_dtype(refined))
    refined = torch.cat([refined[:, :1], zero_absent(refined[:, 1:], labels, "refined")], 1)

    difference = (target - refined).abs().flatten(1)
    count = max(1, int(keep_ratio * difference.shape[1]))
    loss = difference.topk(count, dim=1, sorted=False).values.mean(1)
    return reduce(loss, torch.ones_like(loss, dtype=torch.bool), reduction)


class EquivarianceLoss(nn.Module):
    """Module twin of `equivariance_loss`: `loss(cam1, cam2, labels)`."""

    def __init__(self, *, reduction: Reduction = "mean", mean_over: Over = "valid") -> None:
        super().__init__()
        check_choice("reduction", reduction, Reduction)
        check_choice("mean_over", mean_over, Over)
        self.reduction: Reduction = reduction
        self.mean_over: Over = mean_over

    def forward(self, cam1: Tensor, cam2: Tensor, labels: Tensor | None = None) -> Tensor:
        """See `equivariance_loss`."""
        return equivariance_loss(cam1, cam2, labels, reduction=self.reduction, mean_over=self.mean_over)

    def extra_repr(self) -> str:
        """Settings, for `print`."""
        return f"reduction={self.reduction!r}, mean_over={self.mean_over!r}"


class EquivariantCrossLoss(nn.Module):
    """Module twin of `equivariant_cross_loss`: `loss(cam, refined, labels)`."""

    def __init__(self, *, keep_ratio: float = 0.2, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_number("keep_ratio", keep_ratio, above=0, at_most=1)
        check_choice("reduction", reduction, Reduction)
        self.keep_ratio = keep_ratio
        self.reduction: Reduction = reduction

    def forward(self, cam: Tensor, refined: Tensor, labels: Tensor | None = None) -> Tensor:
        """See `equivariant_cross_loss`."""
        return equivariant_cross_loss(
            cam, refined, labels, keep_ratio=self.keep_ratio, reduction=self.reduction
        )

    def extra_repr(self) -> str:
        """Settings, for `print`."""
        return f"keep_ratio={self.keep_ratio}, reduction={self.reduction!r}"
