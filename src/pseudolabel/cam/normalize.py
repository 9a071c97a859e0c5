"""Normalisation of class activation maps."""

from typing import Literal

import torch
from torch import Tensor

from pseudolabel._checks import check_choice, check_finite, check_float, check_number, check_shapes
from pseudolabel._maps import clamp_keeping_slope, working_dtype

__all__ = ["NormalizationMethod", "normalize_cam"]

NormalizationMethod = Literal["max", "minmax", "minmax-zero", "none"]


def normalize_cam(cam: Tensor, method: NormalizationMethod = "max", eps: float = 1e-5) -> Tensor:
    """Bring each class map of each image to [0, 1].

    With `x = max(cam, 0)`, and `m`, `M` its minimum and maximum over the pixels of one map:

    | method | formula | where it is found |
    |---|---|---|
    | `max` | `x / (M + eps)` | IRN, AdvCAM, ReCAM |
    | `minmax` | `(x - m) / (M - m + eps)` | ToCo, AFA, CLIP-ES |
    | `minmax-zero` | `max(x - m - eps, 0) / (M - m + eps)` | SEAM, PMM multi-scale |
    | `none` | `cam` as it is, negative values included | |

    Negative activations are evidence against a class, so all methods but `none` clip them first; a map
    without a positive value becomes zero everywhere. The official PMM code gives a slightly negative value
    to the lowest pixels of `minmax-zero` (-1 to a map of zeros); here they are 0.

    Args:
        cam: Raw maps (B,C,h,w), any float dtype. Half precision is computed in float32.
        method: One of the four above.
        eps: Guard of the division, > 0.

    Returns:
        Maps like ``cam``, in [0, 1] unless the method is `none`.

    Raises:
        TypeError: If ``cam`` is not a floating-point tensor.
        ValueError: If ``cam`` is not (B,C,h,w) or not finite, or a setting is unknown.

    Examples:
        >>> import torch
        >>> normalize_cam(torch.tensor([[[[-1.0, 1.0], [2.0, 4.0]]]]), eps=1e-9)
        tensor([[[[0.0000, 0.2500],
                  [0.5000, 1.0000]]]])
    """
    check_shapes(cam=(cam, "B C h w"))
    check_float(cam=cam)
    check_choice("method", method, NormalizationMethod)
    check_number("eps", eps, above=0)
    check_finite(cam=cam)
    if method == "none" or cam.numel() == 0:
        return cam
    x = clamp_keeping_slope(cam.to(working_dtype(cam)), low=0)
    high = x.amax((-2, -1), keepdim=True)
    low = torch.zeros_like(high) if method == "max" else x.amin((-2, -1), keepdim=True)
    floor = low + eps if method == "minmax-zero" else low
    return (clamp_keeping_slope(x - floor, low=0) / (high - low + eps)).to(cam.dtype)
