"""Random-walk matting: the chance that a walk between like neighbours meets a class's seeds first."""

from typing import Literal, overload

import torch
from torch import Tensor

from pseudolabel._checks import check_choice, check_finite, check_float, check_number, check_shapes
from pseudolabel._maps import working_dtype
from pseudolabel.matting._pixels import Pixels, pad
from pseudolabel.matting._stencil import Preconditioner, stencil_laplacian
from pseudolabel.matting._system import Laplacian, MattingReport, check_request, matte

__all__ = ["random_walk_matting"]

LEAST = 1e-6  # weight between pixels however unlike, so that no part of an image is cut off in float32


@overload
def random_walk_matting(
    guidance: Tensor,
    trimap: Tensor,
    *,
    beta: float = ...,
    rtol: float = ...,
    max_iter: int = ...,
    prior: Tensor | None = ...,
    prior_weight: float | Tensor = ...,
    x0: Tensor | None = ...,
    preconditioner: Preconditioner = ...,
    return_report: Literal[False] = ...,
) -> Tensor: ...


@overload
def random_walk_matting(
    guidance: Tensor,
    trimap: Tensor,
    *,
    beta: float = ...,
    rtol: float = ...,
    max_iter: int = ...,
    prior: Tensor | None = ...,
    prior_weight: float | Tensor = ...,
    x0: Tensor | None = ...,
    preconditioner: Preconditioner = ...,
    return_report: Literal[True],
) -> tuple[Tensor, MattingReport]: ...


def random_walk_matting(
    guidance: Tensor,
    trimap: Tensor,
    *,
    beta: float = 900,
    rtol: float = 1e-4,
    max_iter: int = 200,
    prior: Tensor | None = None,
    prior_weight: float | Tensor = 1e-3,
    x0: Tensor | None = None,
    preconditioner: Preconditioner = "v-cycle",
    return_report: bool = False,
) -> Tensor | tuple[Tensor, MattingReport]:
    """Find the mattes of the unknown pixels as chances of a random walk to meet each class's seeds first.

    A pixel is joined to its eight neighbours, the more the more alike they are in the guidance z:

        w_ij = exp(-beta |z_i - z_j|^2) + 1e-6,    L = D - W,    D the row sums of W

    and the system is that of `closed_form_matting`, with this L: classes, seeds, prior and report are as
    there. Each matte is a mean of its neighbours' mattes, weighted by likeness (and of the prior's), so that
    mattes are in [0, 1] by themselves. The guidance may be the photo, or features of a network in the size of
    the trimap. In texture, where neighbours are unlike, walks hardly move on, and labels follow the nearest
    seed; closed-form matting is the finer one at edges.

    Args:
        guidance: Images or features (B,D,H,W). Distances count as they are: scale features to your ``beta``.
        trimap: Trimaps (B,C,H,W): 1 foreground, 0 background, 0.5 unknown.
        beta: How fast likeness falls with the squared distance, >= 0. 900 is for colours in [0, 1].
        rtol: Residual to reach, relative to the right side, > 0.
        max_iter: Steps to take at most, >= 1.
        prior: Expected mattes (B,C,H,W) in [0, 1].
        prior_weight: Confidence of the prior, >= 0: a number, or a map (B,H,W). Read with a prior only.
        x0: Mattes (B,C,H,W) to start from.
        preconditioner: As in `closed_form_matting`.
        return_report: Return a `MattingReport` as well.

    Returns:
        Mattes (B,C,H,W) in the dtype of ``trimap``, in [0, 1] and with a sum of at most 1; with
        ``return_report`` the mattes and the report.

    Raises:
        TypeError: If ``guidance``, ``trimap``, ``prior`` or ``x0`` is not a floating-point tensor.
        ValueError: If shapes do not fit, ``guidance`` is not finite, a trimap or prior leaves [0, 1], or a
            setting is out of range.

    Examples:
        >>> import torch
        >>> guidance = torch.tensor([0.1, 0.1, 0.1, 0.9, 0.9, 0.9]).expand(1, 3, 4, 6)
        >>> trimap = torch.tensor([0.0, 0.5, 0.5, 0.5, 0.5, 1.0]).expand(1, 1, 4, 6)
        >>> random_walk_matting(guidance, trimap)[0, 0, 0].round(decimals=3)
        tensor([0., 0., 0., 1., 1., 1.])

    Source:
        Grady et al., "Random Walks for Interactive Alpha-Matting", VIIP 2005; eight neighbours and
        ``beta`` 900 are those of pymatting's `rw_laplacian`, the least weight is ours.
    """
    check_shapes(guidance=(guidance, "B D H W"), trimap=(trimap, "B C H W"))
    check_float(guidance=guidance)
    if guidance.shape[1] == 0:
        raise ValueError(f"guidance: expected at least one channel, got {tuple(guidance.shape)}")
    check_finite(guidance=guidance)
    check_number("beta", beta, at_least=0)
    check_choice("preconditioner", preconditioner, Preconditioner)
    check_request(trimap, rtol=rtol, max_iter=max_iter, prior=prior, prior_weight=prior_weight, x0=x0)
    dtype = torch.promote_types(working_dtype(guidance), working_dtype(trimap))

    def laplacian(number: int, unknown: Pixels, confidence: Tensor | None, columns: int | None) -> Laplacian:
        entries = _entries(guidance[number].to(dtype), unknown, beta)
        return stencil_laplacian(entries, unknown, confidence, columns, preconditioner)

    alpha, report = matte(
        laplacian,
        trimap.to(dtype),
        rtol=rtol,
        max_iter=max_iter,
        prior=prior,
        prior_weight=prior_weight,
        x0=x0,
    )
    alpha = alpha.to(trimap.dtype)
    return (alpha, report) if return_report else alpha


def _entries(guidance: Tensor, pixels: Pixels, beta: float) -> Tensor:
    """Entries (9,n) of L in the rows of the pixels, over the 3 x 3 square around each."""
    features, inside = pad(guidance), pad(torch.ones_like(guidance[:1]))[0]
    here = features.index_select(1, pixels.place)
    weights = []
    for step in pixels.steps(1):
        place = pixels.place + step
        distance = (features.index_select(1, place) - here).square().sum(0)
        weights.append((torch.exp(-beta * distance) + LEAST) * inside.index_select(0, place))
    weights[4] = -sum(weights[:4] + weights[5:], torch.zeros_like(weights[4]))
    return -torch.stack(weights)
