"""Saliency without training: what stands out of an image is what least resembles its border."""

import torch
from torch import Tensor
from torch.nn import functional as F

from pseudolabel._checks import check_count, check_finite, check_float, check_shapes
from pseudolabel._maps import working_dtype

__all__ = ["saliency_from_features"]


def saliency_from_features(features: Tensor, *, border: int = 1, steps: int = 10) -> Tensor:
    """Class-agnostic saliency of images: how far deep features leave the border's, along one direction.

    The border of a photo is mostly background. With `f_p` the features of position `p` of one image,

        x_p = f_p - (mean of f over the border)
        v = (X X^T)^steps mean_p x_p,  X the matrix of all x_p     towards the first principal component
        y_p = v . x_p
        s_p = max(y_p, 0)^2 / (max(y_p, 0)^2 + mean y^2)

    `v` is a power iteration: it starts where the image deviates from its border on average and ends at
    the direction that explains the most of all deviations. The start settles the sign, for `X X^T` has no
    negative eigenvalue: the mean of `y` is never negative. Saliency is 0 where a position is like the border
    or opposed, 1/2 where `y` has its root mean square, and stays below 1.

    Each image is seen alone. The scale of the features, a constant added to all positions, and rotations of
    the channels change nothing; images without any contrast, such as of constant features, have saliency 0.
    An object whose share of the border is larger than its share of the image is taken for background.

    Args:
        features: Deep features (B,D,h,w), not normalised to unit length: that a network responds more to
            objects is part of what tells. Half precision is computed in float32.
        border: Width of the border, in positions, >= 1.
        steps: Steps of the power iteration, >= 1.

    Returns:
        Saliency (B,h,w) in [0, 1], in the dtype of ``features``.

    Raises:
        TypeError: If ``features`` is not a floating-point tensor.
        ValueError: If ``features`` is not (B,D,h,w), has no channel, is not finite or has a side of at most
            two borders, or a setting is no integer >= 1.

    Examples:
        >>> import torch
        >>> features = torch.zeros(1, 2, 3, 4)
        >>> features[0, 1, 1, 1:3] = torch.tensor([-3.0, -4.0])  # an object; its sign says nothing
        >>> saliency_from_features(features)[0]
        tensor([[0.0000, 0.0000, 0.0000, 0.0000],
                [0.0000, 0.8120, 0.8848, 0.0000],
                [0.0000, 0.0000, 0.0000, 0.0000]])

    Source:
        Ours, put together from known parts: the first principal component of deep features as an object map,
        and the border as an example of the background.
    """
    sizes = check_shapes(features=(features, "B D h w"))
    check_float(features=features)
    check_count(border=border, steps=steps)
    if sizes["D"] == 0 or min(sizes["h"], sizes["w"]) <= 2 * border:
        raise ValueError(
            f"features: expected at least one channel, and sides above {2 * border} with a border of "
            f"{border}, got {tuple(features.shape)}"
        )
    check_finite(features=features)

    with torch.autocast(features.device.type, enabled=False):
        f = features.to(working_dtype(features))
        f = f - f[:, :, :1, :1]  # constant features become zeros without a rounding error
        largest = f.abs().amax((1, 2, 3), keepdim=True)
        f = f / largest.where(largest > 0, 1)  # squares neither overflow nor vanish
        at_border = torch.ones(f.shape[2:], dtype=torch.bool, device=f.device)
        at_border[border:-border, border:-border] = False
        x = f.flatten(2)
        x = x - (x * at_border.flatten()).sum(2, keepdim=True) / at_border.sum()

        v = x.mean(2, keepdim=True)
        for _ in range(steps):
            v = F.normalize(x @ (x.mT @ v), dim=1)
        y = (v.mT @ x)[:, 0]
        energy = y.square().mean(1, keepdim=True)
        squared = y.clamp(min=0).square()
        saliency = squared / (squared + energy).where(energy > 0, 1)
    return saliency.view(-1, sizes["h"], sizes["w"]).to(features.dtype)
