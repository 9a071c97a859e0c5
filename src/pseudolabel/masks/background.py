"""Background rules: a background channel in front of normalised class maps."""

import torch
from torch import Tensor

from pseudolabel._checks import check_float, check_number, check_probability, check_shapes, check_unit_range
from pseudolabel._maps import clamp_keeping_slope, working_dtype

__all__ = ["constant_background", "power_background"]


def constant_background(cam: Tensor, value: float) -> Tensor:
    """Put a background channel of one constant score in front of class maps.

    With `scores_to_mask` a pixel is background where no class scores above ``value``. Published values: 0.15
    (IRN, CAM evaluation), 0.25 (IRN, after the random walk); `choose_background` finds one on scored images.

    Args:
        cam: Normalised maps (B,C,H,W), in [0, 1].
        value: Background score, in [0, 1].

    Returns:
        Scores (B,1+C,H,W) in the dtype of ``cam``.

    Raises:
        TypeError: If ``cam`` is not a floating-point tensor.
        ValueError: If ``cam`` is not (B,C,H,W) or leaves [0, 1], or ``value`` does.

    Examples:
        >>> import torch
        >>> constant_background(torch.tensor([[[[0.9, 0.1]]]]), 0.15)
        tensor([[[[0.1500, 0.1500]],
                 [[0.9000, 0.1000]]]])
    """
    _check_cam(cam)
    check_probability("value", value)
    return torch.cat([_background(cam, value), cam], dim=1)


def power_background(cam: Tensor, alpha: float) -> Tensor:
    """Put the background channel `(1 - max_c cam)^alpha` in front of class maps.

    A larger ``alpha`` gives more foreground: the foreground wins where the highest class map exceeds the root
    of `x = (1 - x)^alpha`, which is 0.276 for 4, 0.156 for 11, 0.094 for 24. Published exponents: 4 and 24
    (SEAM), 24 (PMM, rough masks), 1 or 2 (CLIP-ES).

    Args:
        cam: Normalised maps (B,C,H,W), in [0, 1]. Half precision is computed in float32.
        alpha: Exponent, > 0.

    Returns:
        Scores (B,1+C,H,W) in the dtype of ``cam``.

    Raises:
        TypeError: If ``cam`` is not a floating-point tensor.
        ValueError: If ``cam`` is not (B,C,H,W) or leaves [0, 1], or ``alpha`` is not positive.

    Examples:
        >>> import torch
        >>> power_background(torch.tensor([[[[0.5, 0.0]]]]), alpha=2)
        tensor([[[[0.2500, 1.0000]],
                 [[0.5000, 0.0000]]]])
    """
    _check_cam(cam)
    check_number("alpha", alpha, above=0)
    if cam.shape[1] == 0:  # without classes all is background
        return _background(cam, 1.0)
    highest = cam.to(working_dtype(cam)).amax(1, keepdim=True)
    rest = 1 - clamp_keeping_slope(highest, 0, 1)  # rounding noise above 1 would leave [0, 1]
    # Roots have no finite slope at 0: maps of 1 take a constant there instead.
    background = rest.pow(alpha) if alpha >= 1 else rest.where(rest > 0, 1).pow(alpha).where(rest > 0, 0)
    return torch.cat([background.to(cam.dtype), cam], dim=1)


def _check_cam(cam: Tensor) -> None:
    check_shapes(cam=(cam, "B C H W"))
    check_float(cam=cam)
    check_unit_range(cam=cam)


def _background(cam: Tensor, value: float) -> Tensor:
    return cam.new_full((cam.shape[0], 1, *cam.shape[2:]), value)
