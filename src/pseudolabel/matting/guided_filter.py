"""Guided filter: in each window a linear function of the colours, so that it takes over their edges."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from pseudolabel._checks import (
    check_count,
    check_finite,
    check_float,
    check_number,
    check_shapes,
    check_unit_range,
)
from pseudolabel._maps import (
    clamp_keeping_slope,
    exact_dtype,
    gather_present,
    present_classes,
    scatter_present,
)
from pseudolabel.matting._classes import check_inputs, join_mattes, known_pixels
from pseudolabel.matting._system import _share

__all__ = ["guided_filter", "guided_filter_matting"]


def guided_filter_matting(
    image: Tensor, trimap: Tensor, *, radius: int = 60, eps: float = 1e-5, prior: Tensor | None = None
) -> Tensor:
    """Guess the mattes of the unknown pixels by one `guided_filter`, without solving anything.

        p = seeds on known pixels;  elsewhere the prior, or equal shares of present classes and background
        alpha = guided_filter(image, p), known pixels as they were

    Nothing is known farther than ``radius`` from a seed: there the mattes of an unknown zone are those of the
    prior, or equal shares. Which pixels are known, and what absent classes are, see `closed_form_matting`.

    Args:
        image: Images (B,3,H,W) in [0, 1].
        trimap: Trimaps (B,C,H,W): 1 foreground, 0 background, 0.5 unknown.
        radius: Half the side of a window, in pixels, >= 1. The cost does not depend on it.
        eps: How much the colours must vary for an edge to count, as a variance, > 0.
        prior: Expected mattes (B,C,H,W) in [0, 1]. Where they sum to more than 1 they are scaled to sum 1.

    Returns:
        Mattes (B,C,H,W) in the dtype of ``trimap``, in [0, 1] and with a sum of at most 1.

    Raises:
        TypeError: If a tensor is not floating-point.
        ValueError: If shapes do not fit, values leave [0, 1], or a setting is out of range.

    Examples:
        >>> import torch
        >>> image = torch.tensor([0.1, 0.1, 0.1, 0.9, 0.9, 0.9]).expand(1, 3, 4, 6)
        >>> trimap = torch.tensor([0.0, 0.5, 0.5, 0.5, 0.5, 1.0]).expand(1, 1, 4, 6)
        >>> guided_filter_matting(image, trimap)[0, 0, 0].round(decimals=2)
        tensor([0.0000, 0.3300, 0.3300, 0.6700, 0.6700, 1.0000])

    Source:
        As `guided_filter`, there to smooth the edges of a trimap; the prior is ours.
    """
    check_inputs(image, trimap)
    if prior is not None:
        check_shapes(trimap=(trimap, "B C H W"), prior=(prior, "B C H W"))
        check_float(prior=prior)
        check_unit_range(prior=prior)
    known, seeds = known_pixels(trimap)
    present = (trimap > 0).flatten(2).any(2)
    index, valid = present_classes(present)
    if prior is None:
        expected = (1 / (1 + valid.sum(1)))[:, None, None, None].to(trimap)
    else:
        expected = _share(clamp_keeping_slope(gather_present(prior, index).to(trimap), low=0), 1)
    seeds = gather_present(seeds, index)
    alpha = guided_filter(image, seeds.where(known, expected), radius=radius, eps=eps)
    alpha = alpha.masked_fill(~valid[:, :, None, None], 0)
    return scatter_present(join_mattes(alpha, known, seeds), index, valid, trimap.shape[1])


def guided_filter(image: Tensor, maps: Tensor, *, radius: int = 60, eps: float = 1e-5) -> Tensor:
    """Smooth maps along the edges of an image.

    In each window of `2 radius + 1` pixels a side, cut off at the border of the image, the map `p` is fitted
    by a linear function of the colour `I`, and a pixel takes the mean of the fits of all its windows:

        a_k = (S_k + eps 1)^-1 cov_k(I, p),   b_k = mean_k(p) - a_k . mean_k(I)
        out_i = mean(a)_i . I_i + mean(b)_i        means over the windows with the pixel i

    with the mean and the covariance `S_k` of the colours of window k. The cost does not depend on the radius.
    Channels are filtered one by one, linearly: constant maps stay as they are, and maps that sum to 1 still
    do. Values may leave [0, 1] a little at edges. With the closed-form matting Laplacian `L` of the same
    windows, and the number `n_i` of windows with the pixel i, this is one damped step: `out = p - L p / n`.

    Gradients flow to both arguments. Sums are taken in float64 (on a device without it, in float32).

    Args:
        image: Images (B,3,H,W) in [0, 1].
        maps: Maps (B,K,H,W), such as class maps, scores or a trimap.
        radius: Half the side of a window, in pixels, >= 1. The default is wide enough for maps of a network
            of stride 16, and blurs small objects away; for maps as fine as the image a few pixels do.
        eps: How much the colours must vary for an edge to count, as a variance, > 0. Small values follow weak
            edges and texture; large ones blur.

    Returns:
        Maps like ``maps``.

    Raises:
        TypeError: If ``image`` or ``maps`` is not a floating-point tensor.
        ValueError: If shapes do not fit, ``image`` leaves [0, 1], ``maps`` are not finite, or a setting is
            out of range.

    Examples:
        >>> import torch
        >>> image = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(1, 3, 1, 4)
        >>> guided_filter(image, torch.tensor([[[[0.0, 0.4, 0.6, 1.0]]]]), radius=3)  # finds the edge
        tensor([[[[0.2000, 0.2000, 0.8000, 0.8000]]]])

    Source:
        He, Sun and Tang, "Guided Image Filtering", ECCV 2010 (TPAMI 2013), with colour guidance. That it is
        one damped step of closed-form matting is checked by a test.
    """
    check_shapes(image=(image, "B 3 H W"), maps=(maps, "B K H W"))
    check_float(image=image, maps=maps)
    check_settings(radius, eps)
    check_unit_range(image=image)
    check_finite(maps=maps)
    exact = exact_dtype(image.device)
    return local_fits(image.to(exact), radius, eps)(maps.to(exact)).to(maps.dtype)


def local_fits(guide: Tensor, radius: int, eps: float) -> Callable[[Tensor], Tensor]:
    """The filter of given images: what depends on them alone is computed once."""
    share = 1 / _window_sum(torch.ones_like(guide[:, :1]), radius)
    colour = _window_sum(guide, radius) * share
    inverse = _inverse(_covariances(guide, colour, share, radius), eps)
    inverse = inverse[:, :, :, None] * share[:, None, None]
    guide, colour = guide[:, :, None], colour[:, :, None]

    def filtered(p: Tensor) -> Tensor:
        total = _window_sum(p, radius)
        # (B,3,K,H,W): colours by maps
        scatter = _window_sum(guide * p[:, None], radius) - colour * total[:, None]
        slope = torch.stack([_dot(row, scatter) for row in inverse.unbind(1)], 1)
        offset = total * share - _dot(slope, colour)
        return (_dot(_window_sum(slope, radius), guide) + _window_sum(offset, radius)) * share

    return filtered


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Sums over the colours of products (B,3,...). Faster than products of many small matrices."""
    return (x[:, 0] * y[:, 0]).addcmul(x[:, 1], y[:, 1]).addcmul(x[:, 2], y[:, 2])


def _window_sum(x: Tensor, radius: int) -> Tensor:
    """Sums over the windows around each pixel, of any size in the same time: differences of running sums."""
    for dim in (-2, -1):
        side = x.shape[dim]
        reach = min(radius, side - 1)
        running = F.pad(x, (0, 0, reach + 1, reach) if dim == -2 else (reach + 1, reach)).cumsum_(dim)
        x = running.narrow(dim, 2 * reach + 1, side) - running.narrow(dim, 0, side)
    return x


def _covariances(guide: Tensor, mean: Tensor, share: Tensor, radius: int) -> Tensor:
    """The six different entries (B,6,H,W) of the covariance of the colours in each window."""
    row, column = torch.triu_indices(3, 3, device=guide.device)
    return _window_sum(guide[:, row] * guide[:, column], radius) * share - mean[:, row] * mean[:, column]


def _inverse(covariance: Tensor, eps: float) -> Tensor:
    """Inverse (B,3,3,H,W) of the symmetric matrices `S + eps 1`, by their cofactors."""
    rr, rg, rb, gg, gb, bb = covariance.unbind(1)
    rr, gg, bb = rr + eps, gg + eps, bb + eps
    c_rr, c_rg, c_rb = gg * bb - gb * gb, gb * rb - rg * bb, rg * gb - gg * rb
    c_gg, c_gb, c_bb = rr * bb - rb * rb, rb * rg - rr * gb, rr * gg - rg * rg
    determinant = rr * c_rr + rg * c_rg + rb * c_rb
    rows = [(c_rr, c_rg, c_rb), (c_rg, c_gg, c_gb), (c_rb, c_gb, c_bb)]
    return torch.stack([torch.stack(row, 1) for row in rows], 1) / determinant[:, None, None]


def check_settings(radius: int, eps: float) -> None:
    """Check what the window methods are set to."""
    check_count(radius=radius)
    check_number("eps", eps, above=0)
