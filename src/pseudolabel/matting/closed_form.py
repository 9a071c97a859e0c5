"""Closed-form matting: in each small window a matte is a linear function of the colours."""

from typing import Literal, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from pseudolabel._checks import (
    check_choice,
    check_finite,
    check_float,
    check_number,
    check_shapes,
    check_unit_range,
)
from pseudolabel._maps import working_dtype
from pseudolabel.matting._pixels import Pixels
from pseudolabel.matting._stencil import Preconditioner, stencil_laplacian
from pseudolabel.matting._system import Laplacian, MattingReport, check_request, matte

__all__ = ["closed_form_matting", "matting_energy"]


@overload
def closed_form_matting(
    image: Tensor,
    trimap: Tensor,
    *,
    eps: float = ...,
    rtol: float = ...,
    max_iter: int = ...,
    prior: Tensor | None = ...,
    prior_weight: float | Tensor = ...,
    x0: Tensor | None = ...,
    preconditioner: Preconditioner = ...,
    clip: bool = ...,
    return_report: Literal[False] = ...,
) -> Tensor: ...


@overload
def closed_form_matting(
    image: Tensor,
    trimap: Tensor,
    *,
    eps: float = ...,
    rtol: float = ...,
    max_iter: int = ...,
    prior: Tensor | None = ...,
    prior_weight: float | Tensor = ...,
    x0: Tensor | None = ...,
    preconditioner: Preconditioner = ...,
    clip: bool = ...,
    return_report: Literal[True],
) -> tuple[Tensor, MattingReport]: ...


def closed_form_matting(
    image: Tensor,
    trimap: Tensor,
    *,
    eps: float = 1e-5,
    rtol: float = 1e-4,
    max_iter: int = 200,
    prior: Tensor | None = None,
    prior_weight: float | Tensor = 1e-3,
    x0: Tensor | None = None,
    preconditioner: Preconditioner = "v-cycle",
    clip: bool = True,
    return_report: bool = False,
) -> Tensor | tuple[Tensor, MattingReport]:
    """Find the mattes of the unknown pixels, each a linear function of the colours in every 3 x 3 window.

    With the mean `mu_k` and covariance `S_k` of the colours in window k, the matting Laplacian is

        L_ij = sum over windows k with i and j of
               [i = j] - (1 + (I_i - mu_k) . (S_k + eps/9 1)^-1 (I_j - mu_k)) / 9

    and the mattes X of the unknown pixels U, with seeds M on the known pixels K, solve

        (L_UU + Lambda) X_U = -L_UK M_K + Lambda Q_U      without a prior Q: Lambda = 0

    **Classes.** All classes of an image are solved as one system with background: their mattes and that of
    the background sum to 1. A pixel is known where the trimap of some class is 1, or those of all present
    classes are 0, which makes it background; elsewhere it is unknown. Values within 0.1 of 0 or 1 count as
    known, and are seeds as they are. Where classes claim a pixel together they share it. A class whose trimap
    is 0 everywhere is absent: its matte is 0, and costs nothing.

    **The solver.** Conjugate gradients on the unknown pixels alone, preconditioned by a multigrid V-cycle. At
    the default ``rtol`` labels are those of the converged solution, but for about one unknown pixel in a
    thousand; at 1e-3 it can be one in fifty. Nothing is raised where ``max_iter`` does not suffice: see
    ``return_report``. Half precision is computed in float32, in which the residual comes down to about 1e-6,
    with a handful of seeds in a whole photo to 1e-4; for less give float64.

    **Seeds that are missing.** Where all seeds are background, so is everything, and alike for one class.
    Without any known pixel and without a prior nothing is determined: present classes and background share
    each pixel equally.

    Gradients flow to ``image``, to the seeds in ``trimap``, to ``prior`` and to ``prior_weight``, through the
    equations and not through the steps, at the cost of one more solution.

    Args:
        image: Images (B,3,H,W) in [0, 1], at least 3 pixels a side.
        trimap: Trimaps (B,C,H,W): 1 foreground, 0 background, 0.5 unknown.
        eps: How much the colours of a window must vary, as a variance, to tell foreground from background
            (added to the covariance as eps/9), > 0. Larger values give smoother mattes, and fewer steps.
        rtol: Residual to reach, relative to the right side, > 0.
        max_iter: Steps to take at most, >= 1.
        prior: Expected mattes (B,C,H,W) in [0, 1], such as a posterior. Where they sum to more than 1 they
            are scaled to sum 1.
        prior_weight: Confidence of the prior, >= 0: a number, or a map (B,H,W). Read with a prior only.
        x0: Mattes (B,C,H,W) to start from, such as those of a like image. It changes the steps that are
            needed, not what is looked for.
        preconditioner: `v-cycle`, or `jacobi`, which takes many more steps that are cheaper. On a CPU the
            V-cycle gives way to Cholesky factors, with which one step is all, where the unknown zone is a
            band: no pixel of it farther than 8 from known ones, or where several classes share the factors
            about 60, by its shape.
        clip: Raw mattes leave [0, 1] at some pixels. They are cut off there, and divided by their sum with
            the background's. False leaves them raw.
        return_report: Return a `MattingReport` as well.

    Returns:
        Mattes (B,C,H,W) in the dtype of ``trimap``, in [0, 1] and with a sum of at most 1 if clipped; with
        ``return_report`` the mattes and the report.

    Raises:
        TypeError: If ``image``, ``trimap``, ``prior`` or ``x0`` is not a floating-point tensor.
        ValueError: If shapes do not fit, values leave [0, 1], the image is too small, or a setting is out of
            range.

    Examples:
        >>> import torch
        >>> image = torch.tensor([0.1, 0.1, 0.1, 0.9, 0.9, 0.9]).expand(1, 3, 4, 6)
        >>> trimap = torch.tensor([0.0, 0.5, 0.5, 0.5, 0.5, 1.0]).expand(1, 1, 4, 6)
        >>> alpha, report = closed_form_matting(image, trimap, return_report=True)
        >>> alpha[0, 0, 0].round(decimals=3)
        tensor([0., 0., 0., 1., 1., 1.])
        >>> bool(report.converged)
        True

    Source:
        Levin, Lischinski and Weiss, "A Closed-Form Solution to Natural Image Matting", CVPR 2006 (TPAMI
        2008); the Laplacian is that of pymatting's `cf_laplacian`. The V-cycle on the unknown pixels, classes
        solved together and the soft prior are ours.
    """
    check_shapes(image=(image, "B 3 H W"), trimap=(trimap, "B C H W"))
    check_float(image=image)
    check_unit_range(image=image)
    _check_size(image)
    check_number("eps", eps, above=0)
    check_choice("preconditioner", preconditioner, Preconditioner)
    check_request(trimap, rtol=rtol, max_iter=max_iter, prior=prior, prior_weight=prior_weight, x0=x0)
    dtype = torch.promote_types(working_dtype(image), working_dtype(trimap))

    def laplacian(number: int, unknown: Pixels, confidence: Tensor | None, columns: int | None) -> Laplacian:
        entries = _entries(image[number].to(dtype), unknown, eps)
        return stencil_laplacian(entries, unknown, confidence, columns, preconditioner)

    alpha, report = matte(
        laplacian,
        trimap.to(dtype),
        rtol=rtol,
        max_iter=max_iter,
        prior=prior,
        prior_weight=prior_weight,
        x0=x0,
        clip=clip,
    )
    alpha = alpha.to(trimap.dtype)
    return (alpha, report) if return_report else alpha


def matting_energy(alpha: Tensor, image: Tensor, *, eps: float = 1e-5) -> Tensor:
    """How far mattes are from linear functions of the colours, summed over all 3 x 3 windows: `X^T L X`.

        E = sum over windows k  min over a, b  of  sum over i in k  (x_i - a . I_i - b)^2 + eps |a|^2

    with the Laplacian L of `closed_form_matting`. No system is solved: as a regulariser of soft masks in
    training it costs little, and gradients flow to both arguments. A constant matte has no energy.

    Args:
        alpha: Mattes or other soft masks (B,C,H,W).
        image: Images (B,3,H,W) in [0, 1], at least 3 pixels a side.
        eps: As in `closed_form_matting`, > 0.

    Returns:
        Energies (B,C), float32 or better, >= 0. They grow with the number of pixels.

    Raises:
        TypeError: If ``alpha`` or ``image`` is not a floating-point tensor.
        ValueError: If shapes do not fit, ``image`` leaves [0, 1] or is too small, ``alpha`` is not finite, or
            ``eps`` is out of range.

    Examples:
        >>> import torch
        >>> image = torch.tensor([0.1, 0.1, 0.1, 0.9, 0.9, 0.9]).expand(1, 3, 4, 6)
        >>> along, across = (image > 0.5)[:, :1].float(), torch.rand(1, 1, 4, 6)
        >>> bool(matting_energy(along, image) < 1e-3 * matting_energy(across, image))
        True

    Source:
        The objective of closed-form matting (CVPR 2006), before the trimap comes in.
    """
    check_shapes(alpha=(alpha, "B C H W"), image=(image, "B 3 H W"))
    check_float(alpha=alpha, image=image)
    check_finite(alpha=alpha)
    check_unit_range(image=image)
    _check_size(image)
    check_number("eps", eps, above=0)
    dtype = torch.promote_types(working_dtype(image), working_dtype(alpha))
    if alpha.numel() == 0:  # no image or no class, which `unfold` refuses
        return alpha.to(dtype).sum((2, 3))
    colours = F.unfold(image.to(dtype), 3).view(len(image), 3, 9, -1)
    x = F.unfold(alpha.to(dtype), 3).view(*alpha.shape[:2], 9, -1)
    x = x - x.mean(2, keepdim=True)
    explained = torch.einsum("bqam,bcam->bcqm", _whiten(colours, eps), x)
    energy: Tensor = x.square().sum((2, 3)) - explained.square().sum((2, 3))
    return energy


def _entries(image: Tensor, pixels: Pixels, eps: float) -> Tensor:
    """Entries (25,n) of L in the rows of the pixels, over the 5 x 5 square around each."""
    windows = Pixels(_windows(pixels.active))
    # A first window of zeros stands for those beyond the border.
    red, green, blue = F.pad(_whiten(_colours(image, windows), eps), (1, 0))
    mean = F.pad(image.new_full((len(windows),), 1 / 9), (1, 0))
    number = windows.number + 1
    entries = image.new_zeros(5, 5, len(pixels))
    for position, step in enumerate(windows.steps(1)):
        # What a window adds to the row of its pixel in this position.
        added = torch.addcmul(mean, red[position], red)
        added = added.addcmul_(green[position], green).addcmul_(blue[position], blue)
        added[position, 1:] -= 1
        window = number.index_select(0, pixels.place - step)
        row, column = 2 - position // 3, 2 - position % 3
        entries[row : row + 3, column : column + 3] -= added.index_select(1, window).view(3, 3, -1)
    return entries.flatten(0, 1)


def _windows(active: Tensor) -> Tensor:
    """Centres (H,W) of the windows inside the image that hold an active pixel."""
    columns = active[:, :-2] | active[:, 1:-1] | active[:, 2:]
    return F.pad(columns[:-2] | columns[1:-1] | columns[2:], (1, 1, 1, 1))


def _colours(image: Tensor, windows: Pixels) -> Tensor:
    """Colours (3,9,m) of the pixels of each window."""
    side = torch.arange(-1, 2, device=image.device)
    steps = (side[:, None] * image.shape[2] + side).flatten()
    places = (steps[:, None] + windows.index).flatten()
    # Channel by channel, which is much faster than all at once.
    colours = [channel.index_select(0, places) for channel in image.flatten(1)]
    return torch.stack(colours).view(3, 9, len(windows))


def _whiten(colours: Tensor, eps: float) -> Tensor:
    """Centred colours (...,3,9,m) of windows such that their dot products are those with `(9 S + eps 1)^-1`.

    That matrix is the scatter of the nine colours and of three more, off the mean by the root of eps in one
    channel each. The Gram-Schmidt process on the channels turns it into 1, with no small difference of large
    numbers, so that float32 will do.
    """
    ridge = eps**0.5 * torch.eye(3, dtype=colours.dtype, device=colours.device)[..., None]
    ridge = ridge.expand(*colours.shape[:-2], 3, colours.shape[-1])
    centred = colours - colours.mean(-2, keepdim=True)
    red, green, blue = torch.cat([centred, ridge], -2).unbind(-3)

    def along(unit: Tensor, x: Tensor) -> Tensor:
        return unit * (unit * x).sum(-2, keepdim=True)

    def normalise(x: Tensor) -> Tensor:
        return x * x.square().sum(-2, keepdim=True).rsqrt()

    first = normalise(red)
    second = normalise(green - along(first, green))
    blue = blue - along(first, blue)
    third = normalise(blue - along(second, blue))
    return torch.stack([first, second, third], -3)[..., :9, :]


def _check_size(image: Tensor) -> None:
    if min(image.shape[-2:]) < 3:
        raise ValueError(f"image: expected at least 3 pixels a side, got {tuple(image.shape)}")
