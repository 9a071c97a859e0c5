"""Large-kernel matting: closed-form matting with wide windows, whose matrix is never written."""

from typing import Literal, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from pseudolabel._checks import check_count, check_float, check_shapes, check_unit_range
from pseudolabel._maps import exact_dtype, resize
from pseudolabel.matting._pixels import Pixels
from pseudolabel.matting._system import Laplacian, MattingReport, check_request, matte
from pseudolabel.matting.guided_filter import check_settings, local_fits

__all__ = ["large_kernel_matting"]


@overload
def large_kernel_matting(
    image: Tensor,
    trimap: Tensor,
    *,
    radius: int = ...,
    eps: float = ...,
    rtol: float = ...,
    max_iter: int = ...,
    prior: Tensor | None = ...,
    prior_weight: float | Tensor = ...,
    x0: Tensor | None = ...,
    coarse_levels: int = ...,
    clip: bool = ...,
    return_report: Literal[False] = ...,
) -> Tensor: ...


@overload
def large_kernel_matting(
    image: Tensor,
    trimap: Tensor,
    *,
    radius: int = ...,
    eps: float = ...,
    rtol: float = ...,
    max_iter: int = ...,
    prior: Tensor | None = ...,
    prior_weight: float | Tensor = ...,
    x0: Tensor | None = ...,
    coarse_levels: int = ...,
    clip: bool = ...,
    return_report: Literal[True],
) -> tuple[Tensor, MattingReport]: ...


def large_kernel_matting(
    image: Tensor,
    trimap: Tensor,
    *,
    radius: int = 10,
    eps: float = 1e-5,
    rtol: float = 1e-4,
    max_iter: int = 200,
    prior: Tensor | None = None,
    prior_weight: float | Tensor = 1e-3,
    x0: Tensor | None = None,
    coarse_levels: int = 1,
    clip: bool = True,
    return_report: bool = False,
) -> Tensor | tuple[Tensor, MattingReport]:
    """Find the mattes of the unknown pixels, each a linear function of the colours in every wide window.

    The system is that of `closed_form_matting`, with windows of `2 radius + 1` pixels a side, cut off at the
    border of the image; so are classes, seeds, prior, gradients and report. The matrix has `(4 radius + 1)^2`
    entries a row and is never written. With the number `n_i` of windows that hold pixel i,

        (L x)_i = n_i (x_i - guided_filter(image, x)_i)

    at a cost that does not depend on the radius. Wide windows carry labels far in one step, through texture
    as well; but one linear function of the colours has to do for a wide window, so that objects which share
    a colour with their background come out worse than with narrow ones.

    Sums are taken in float64 (on a device without it, in float32, where ``eps`` should not be below 1e-2).

    Args:
        image: Images (B,3,H,W) in [0, 1].
        trimap: Trimaps (B,C,H,W): 1 foreground, 0 background, 0.5 unknown.
        radius: Half the side of a window, in pixels, >= 1.
        eps: How much the colours of a window must vary to tell foreground from background (added to their
            covariance as `eps / (2 radius + 1)^2`), > 0.
        rtol: Residual to reach, relative to the right side, > 0.
        max_iter: Steps to take at most, >= 1.
        prior: Expected mattes (B,C,H,W) in [0, 1].
        prior_weight: Confidence of the prior, >= 0: a number, or a map (B,H,W). Read with a prior only.
            For comparison: rows of L have about `(2 radius + 1)^2` on the diagonal.
        x0: Mattes (B,C,H,W) to start from.
        coarse_levels: How many times to halve the image for a solution to start from, >= 0. Read without
            ``x0`` only. It saves steps; what is looked for stays the same.
        clip: Bring mattes into [0, 1], as in `closed_form_matting`.
        return_report: Return a `MattingReport` as well, that of the full size.

    Returns:
        Mattes (B,C,H,W) in the dtype of ``trimap``, in [0, 1] and with a sum of at most 1 if clipped; with
        ``return_report`` the mattes and the report.

    Raises:
        TypeError: If ``image``, ``trimap``, ``prior`` or ``x0`` is not a floating-point tensor.
        ValueError: If shapes do not fit, values leave [0, 1], or a setting is out of range.

    Examples:
        >>> import torch
        >>> image = torch.tensor([0.1, 0.1, 0.1, 0.9, 0.9, 0.9]).expand(1, 3, 4, 6)
        >>> trimap = torch.tensor([0.0, 0.5, 0.5, 0.5, 0.5, 1.0]).expand(1, 1, 4, 6)
        >>> large_kernel_matting(image, trimap, radius=2)[0, 0, 0].round(decimals=3)
        tensor([0., 0., 0., 1., 1., 1.])

    Source:
        He, Sun and Tang, "Fast Matting Using Large Kernel Matting Laplacian Matrices", CVPR 2010. Windows
        cut off at the border, and known pixels that are fixed and not weighted, are ours.
    """
    check_shapes(image=(image, "B 3 H W"), trimap=(trimap, "B C H W"))
    check_float(image=image)
    check_unit_range(image=image)
    check_settings(radius, eps)
    check_count(at_least=0, coarse_levels=coarse_levels)
    check_request(trimap, rtol=rtol, max_iter=max_iter, prior=prior, prior_weight=prior_weight, x0=x0)
    exact = exact_dtype(image.device)
    if x0 is None and coarse_levels > 0 and min(image.shape[2:]) > 2 * radius:
        coarse = large_kernel_matting(
            _half(image.detach()),
            _half(trimap.detach()),
            radius=radius,
            eps=eps,
            rtol=rtol,
            max_iter=max_iter,
            prior=None if prior is None else _half(prior.detach()),
            prior_weight=_half(prior_weight.detach()) if isinstance(prior_weight, Tensor) else prior_weight,
            coarse_levels=coarse_levels - 1,
        )
        x0 = resize(coarse, (image.shape[2], image.shape[3]))

    def laplacian(number: int, unknown: Pixels, confidence: Tensor | None, _: int | None) -> Laplacian:
        return _laplacian(image[number].to(exact), unknown, confidence, radius, eps)

    alpha, report = matte(
        laplacian,
        trimap.to(exact),
        rtol=rtol,
        max_iter=max_iter,
        prior=prior,
        prior_weight=prior_weight,
        x0=x0,
        clip=clip,
        even=False,
    )
    alpha = alpha.to(trimap.dtype)
    return (alpha, report) if return_report else alpha


def _half(maps: Tensor) -> Tensor:
    """Means over squares of four pixels, at the border of fewer. What all of them know stays known."""
    return F.avg_pool2d(maps, 2, ceil_mode=True, count_include_pad=False)


def _laplacian(
    image: Tensor, unknown: Pixels, confidence: Tensor | None, radius: int, eps: float
) -> Laplacian:
    """The operator on the part of the image that the rows of the unknown pixels see."""
    rows, columns = (
        slice(max(0, int(place.min()) - 2 * radius), int(place.max()) + 2 * radius + 1)
        for place in unknown.rows_and_columns()
    )
    filtered = local_fits(image[None, :, rows, columns], radius, eps / (2 * radius + 1) ** 2)
    inner = Pixels(unknown.active[rows, columns])
    windows = inner.pick(_windows(inner.active, radius).to(image)[None])

    def apply(maps: Tensor) -> Tensor:
        return windows * inner.pick(maps - filtered(maps[None])[0])

    nothing = image.new_zeros(1, *inner.active.shape)
    own = 0 if confidence is None else confidence[:, None]

    def matvec(x: Tensor) -> Tensor:
        values = x.view(len(inner), -1)
        maps = inner.put(nothing.expand(values.shape[1], -1, -1), values)
        return (apply(maps) + own * values).reshape(x.shape)

    # One pixel has little say in the fit of a wide window: the diagonal is near to the number of windows.
    diagonal = windows + own
    return Laplacian(
        rows=lambda maps: apply(maps[:, rows, columns]),
        matvec=matvec,
        preconditioner=lambda r: (r.view(len(inner), -1) / diagonal).view_as(r),
    )


def _windows(active: Tensor, radius: int) -> Tensor:
    """How many windows (h,w) hold each pixel."""
    sides = []
    for side in active.shape:
        place = torch.arange(side, device=active.device)
        sides.append((place + radius).clamp(max=side - 1) - (place - radius).clamp(min=0) + 1)
    return sides[0][:, None] * sides[1]
