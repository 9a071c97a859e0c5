"""Coefficient-of-variation smoothing: the peakier a map, the more it is widened."""

import torch
from torch import Tensor, nn

from pseudolabel._checks import check_finite, check_float, check_number, check_shapes
from pseudolabel._maps import clamp_keeping_slope, working_dtype

__all__ = [
    "CoefficientOfVariationSmoothing",
    "coefficient_of_variation",
    "coefficient_of_variation_smoothing",
]

# The exponent 1 - cv is kept positive: with a threshold of 0, or a large scale, it would reach 0 and below,
# where 0^0 = 1 makes foreground of zeros. The official code has no such guard.
_SMALLEST_EXPONENT = 1e-3


def coefficient_of_variation(cam: Tensor, scale: float = 0.3, threshold: float = 0.05) -> Tensor:
    """Coefficient of variation of each class map over its active pixels.

    Over the pixels `A = {p : cam(p) > threshold}` of one map, with the population standard deviation:

        cv = scale * std(cam over A) / (mean(cam over A) + 1e-8),   0 where A is empty

    The comparison is made in the dtype of ``cam``, the sums in float32 or better: the official code sums in
    the float16 of its cache, which overflows on large objects and labels the whole image foreground.

    Args:
        cam: Normalised maps (B,C,h,w), in [0, 1].
        scale: Factor of the result, >= 0.
        threshold: Lowest active value, >= 0. Published: 0.05.

    Returns:
        Coefficients (B,C), float32 for half-precision maps.

    Raises:
        TypeError: If ``cam`` is not a floating-point tensor.
        ValueError: If ``cam`` is not (B,C,h,w) or not finite, or a setting is out of range.

    Examples:
        >>> import torch
        >>> coefficient_of_variation(torch.tensor([[[[0.0, 0.2, 0.6]]]]), scale=1.0)
        tensor([[0.5000]])

    Source:
        Li et al., "Pseudo-mask Matters in Weakly-supervised Semantic Segmentation", ICCV 2021; matches the
        official implementation at 134ad33 (the paper's own equations were not at hand).
    """
    _check(cam, scale, threshold)
    active = cam > threshold
    value = cam.to(working_dtype(cam))
    count = active.sum((-2, -1), keepdim=True).clamp(min=1)
    mean = value.where(active, 0).sum((-2, -1), keepdim=True) / count
    variance = ((value - mean).where(active, 0) ** 2).sum((-2, -1), keepdim=True) / count
    # The root has no finite slope at 0: constant and empty maps take a constant there instead.
    spread = torch.where(variance > 0, variance, 1).sqrt().where(variance > 0, 0)
    return (scale * spread / (mean + 1e-8)).flatten(1)


def coefficient_of_variation_smoothing(cam: Tensor, scale: float = 0.3, threshold: float = 0.05) -> Tensor:
    """Widen each class map by a power that falls with its coefficient of variation.

        u = 0                where cam < threshold
        u = cam^(1 - cv)     elsewhere, at most 1

    with `cv` of `coefficient_of_variation`. 0 and 1 stay, order within a map stays, values between grow: a
    peaky map (large `cv`) grows most. A pixel equal to the threshold is kept here but not counted in `cv`.

    Args:
        cam: Normalised maps (B,C,h,w), in [0, 1].
        scale: Factor of the coefficient of variation, >= 0. Published: 0.3. With 0 the maps are only cut off
            at the threshold.
        threshold: Values below it become 0, >= 0. Published: 0.05.

    Returns:
        Smoothed maps like ``cam``.

    Raises:
        TypeError: If ``cam`` is not a floating-point tensor.
        ValueError: If ``cam`` is not (B,C,h,w) or not finite, or a setting is out of range.

    Examples:
        >>> import torch
        >>> coefficient_of_variation_smoothing(torch.tensor([[[[0.0, 0.2, 0.6]]]]), scale=1.0)
        tensor([[[[0.0000, 0.4472, 0.7746]]]])

    Source:
        Li et al., "Pseudo-mask Matters in Weakly-supervised Semantic Segmentation", ICCV 2021; matches the
        official implementation at 134ad33 (there inside `ppmg`; the paper's own equations were not at hand).
    """
    cv = coefficient_of_variation(cam, scale, threshold)
    exponent = (1 - cv).clamp(min=_SMALLEST_EXPONENT)[:, :, None, None]
    value = cam.to(cv.dtype)
    kept = (cam >= threshold) & (value > 0)
    # Zeros are raised as ones and dropped after it: the slope of a power at 0 is infinite.
    smoothed = value.where(kept, 1).pow(exponent).where(kept, 0)
    return clamp_keeping_slope(smoothed, high=1).to(cam.dtype)


class CoefficientOfVariationSmoothing(nn.Module):
    """Module twin of `coefficient_of_variation_smoothing`."""

    def __init__(self, scale: float = 0.3, threshold: float = 0.05) -> None:
        super().__init__()
        self.scale = scale
        self.threshold = threshold

    def forward(self, cam: Tensor) -> Tensor:
        """See `coefficient_of_variation_smoothing`."""
        return coefficient_of_variation_smoothing(cam, self.scale, self.threshold)

    def extra_repr(self) -> str:
        """Settings, for `print`."""
        return f"scale={self.scale}, threshold={self.threshold}"


def _check(cam: Tensor, scale: float, threshold: float) -> None:
    check_shapes(cam=(cam, "B C h w"))
    check_float(cam=cam)
    check_number("scale", scale, at_least=0)
    check_number("threshold", threshold, at_least=0)
    check_finite(cam=cam)
