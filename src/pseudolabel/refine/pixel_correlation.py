"""Pixel correlation: every pixel takes over the maps of the pixels that look like it."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pseudolabel._checks import check_float, check_number, check_shapes
from pseudolabel._maps import working_dtype

__all__ = ["PixelCorrelation", "cam_seed", "keep_max_class", "pixel_correlation"]


def cam_seed(cam: Tensor, eps: float = 1e-5) -> Tensor:
    """Scores that pixel correlation starts from: each pixel has its background and its winning class alone.

    With `x = max(cam, 0)`, and `M` its maximum over the pixels of one map:

        q = max(x - eps, 0) / (M + eps)
        background = 1 - (largest q of the pixel)

    and of the classes only the largest `q` of the pixel stays (`keep_max_class`), so that the scores of a
    pixel sum to 1 where no two classes tie. SEAM hands in all classes, present or not, and
    `cam.detach()`: its seed has no gradient. This is not the normalisation of its losses and of its maps on
    disk, which takes the minimum off as well: that is `normalize_cam(cam, "minmax-zero")`.

    Args:
        cam: Raw maps (B,C,h,w), foreground classes only.
        eps: Guard of the division, > 0.

    Returns:
        Scores (B,1+C,h,w) in [0, 1], background first, in the dtype of ``cam``.

    Raises:
        TypeError: If ``cam`` is not a floating-point tensor.
        ValueError: If ``cam`` is not (B,C,h,w), or ``eps`` not positive.

    Examples:
        >>> import torch
        >>> cam_seed(torch.tensor([[[[4.0, 1.0]], [[-1.0, 2.0]]]]), eps=1e-9)  # background and two classes
        tensor([[[[0., 0.]],
                 [[1., 0.]],
                 [[0., 1.]]]])

    Source:
        Wang et al., "Self-supervised Equivariant Attention Mechanism for Weakly Supervised Semantic
        Segmentation" (SEAM), CVPR 2020; matches the SEAM classifier of the official PMM implementation at
        134ad33 and the one of RTC at 9c777e0.
    """
    check_shapes(cam=(cam, "B C h w"))
    check_float(cam=cam)
    check_number("eps", eps, above=0)
    x = cam.to(working_dtype(cam)).clamp(min=0)
    q = (x - eps).clamp(min=0) / (x.amax((-2, -1), keepdim=True) + eps)
    zero = q.new_zeros(q.shape[0], 1, *q.shape[2:])
    background = 1 - torch.cat([zero, q], 1).amax(1, keepdim=True)
    return keep_max_class(torch.cat([background, q], 1)).to(cam.dtype)


def keep_max_class(scores: Tensor) -> Tensor:
    """Set all foreground classes of a pixel to 0 but the one with the largest score.

    Classes that tie are all kept, and so is the background, channel 0. The gradient passes where a score was
    kept. The tensor that goes in stays as it is: the official program overwrites it.

    Args:
        scores: Scores (B,1+C,h,w), background first.

    Returns:
        Scores like ``scores``.

    Raises:
        TypeError: If ``scores`` is not a floating-point tensor.
        ValueError: If ``scores`` is not (B,1+C,h,w), or has no channel.

    Examples:
        >>> import torch
        >>> keep_max_class(torch.tensor([[[[0.9, 0.1]], [[0.3, 0.5]], [[0.4, 0.2]]]])).squeeze()
        tensor([[0.9000, 0.1000],
                [0.0000, 0.5000],
                [0.4000, 0.0000]])

    Source:
        SEAM (CVPR 2020); matches `max_onehot` of the official PMM (134ad33) and RTC (9c777e0) programs.
    """
    check_shapes(scores=(scores, "B 1+C h w"))
    check_float(scores=scores)
    if scores.shape[1] == 0:
        raise ValueError(f"scores: expected a background channel in front, got {tuple(scores.shape)}")
    if scores.shape[1] == 1:
        return scores.clone()
    foreground = scores[:, 1:]
    # A NaN is below nothing: it stays, and is seen.
    beaten = foreground < foreground.amax(1, keepdim=True)
    return torch.cat([scores[:, :1], foreground.masked_fill(beaten, 0)], 1)


def pixel_correlation(
    cam: Tensor, features: Tensor, *, eps: float = 1e-5, chunk_size: int | None = None
) -> Tensor:
    """Replace the maps of each pixel by their mean over all pixels, weighted by the likeness of features.

    With the features `f` of a pixel scaled to length 1, `f / (|f| + eps)`, and pixels i, j:

        A_ij = max(f_i . f_j, 0)
        out_j = sum_i cam_i A_ij / (sum_i A_ij + eps)

    Equal features give every pixel the mean of the map, features at right angles leave the map as it is, a
    pixel without features gets 0. Linear in ``cam``; gradients flow to ``cam`` and to ``features``.

    Args:
        cam: Maps (B,K,h',w'), with a background channel (SEAM: `cam_seed`) or without. Resized to the
            features where the size differs, bilinear with `align_corners=True` as in the published programs.
        features: Features (B,D,h,w), of the image or of a network. Computed in float32 or better.
        eps: Guard of both divisions, > 0.
        chunk_size: Work on so many pixels j at a time. The matrix `A` of `(hw)^2` numbers an image then never
            exists, in the backward pass neither (it is computed a second time); values and gradients are the
            same up to rounding.

    Returns:
        Maps (B,K,h,w) in the dtype of ``cam``.

    Raises:
        TypeError: If ``cam`` or ``features`` is not a floating-point tensor.
        ValueError: If shapes do not fit, or a setting is out of range.

    Examples:
        >>> import torch
        >>> cam = torch.tensor([[[[1.0, 0.0, 0.0, 0.6]]]])
        >>> features = torch.tensor([[[[5.0, 2.0, 0.0, 0.0]], [[0.0, 0.0, 1.0, 3.0]]]])  # two things
        >>> pixel_correlation(cam, features)
        tensor([[[[0.5000, 0.5000, 0.3000, 0.3000]]]])

    Source:
        SEAM (CVPR 2020), its pixel correlation module after the convolutions that make the features; matches
        the official PMM (134ad33) and RTC (9c777e0) programs, values and gradients.
    """
    sizes = check_shapes(cam=(cam, "B K h' w'"), features=(features, "B D h w"))
    check_float(cam=cam, features=features)
    _check_settings(eps, chunk_size)

    dtype = torch.promote_types(working_dtype(cam), working_dtype(features))
    size = (sizes["h"], sizes["w"])
    with torch.autocast(
        cam.device.type, enabled=False
    ):  # sums over all pixels are too long for half precision
        maps, f = cam.to(dtype), features.to(dtype).flatten(2)
        if maps.shape[2:] != size:
            maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=True)
        maps = maps.flatten(2)
        f = f / (torch.linalg.vector_norm(f, dim=1, keepdim=True) + eps)
        if chunk_size is None:
            out = _correlate(maps, f, f, eps)
        else:
            out = torch.cat(
                [
                    checkpoint(_correlate, maps, f, some, eps, use_reentrant=False, preserve_rng_state=False)
                    for some in f.split(chunk_size, dim=2)
                ],
                dim=2,
            )
    return out.view(*out.shape[:2], *size).to(cam.dtype)


def _correlate(maps: Tensor, f: Tensor, some: Tensor, eps: float) -> Tensor:
    """Maps (B,K,j) of the pixels with the features ``some`` (B,D,j), from all pixels."""
    affinity = (f.transpose(1, 2) @ some).relu()
    return maps @ affinity / (affinity.sum(1, keepdim=True) + eps)


class PixelCorrelation(nn.Module):
    """Module twin of `pixel_correlation`: `refine(cam, features)`."""

    def __init__(self, *, eps: float = 1e-5, chunk_size: int | None = None) -> None:
        super().__init__()
        _check_settings(eps, chunk_size)
        self.eps = eps
        self.chunk_size = chunk_size

    def forward(self, cam: Tensor, features: Tensor) -> Tensor:
        """See `pixel_correlation`."""
        return pixel_correlation(cam, features, eps=self.eps, chunk_size=self.chunk_size)

    def extra_repr(self) -> str:
        """Settings, for `print`."""
        return f"eps={self.eps}, chunk_size={self.chunk_size}"


def _check_settings(eps: float, chunk_size: int | None) -> None:
    check_number("eps", eps, above=0)
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size: expected an integer >= 1 or None, got {chunk_size!r}")
