"""Matting Laplacians that are stencils: each pixel is joined to those of a small square around it."""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from pseudolabel.matting._cholesky import banded_cholesky
from pseudolabel.matting._multigrid import VCycle, jacobi_step, matrix_of
from pseudolabel.matting._pixels import Pixels, pad
from pseudolabel.matting._solver import LinearMap
from pseudolabel.matting._system import Laplacian

__all__ = ["PRECONDITIONERS", "Preconditioner", "stencil_laplacian"]

Preconditioner = Literal["auto", "v-cycle", "cholesky", "jacobi"]
PRECONDITIONERS = get_args(Preconditioner)

NARROW = 8  # an unknown zone is narrow where no pixel of it is farther than this from known ones


def stencil_laplacian(
    entries: Tensor,
    pixels: Pixels,
    confidence: Tensor | None,
    columns: int | None,
    preconditioner: Preconditioner,
) -> Laplacian:
    """The operator with entries (k,n): those of each unknown pixel's row over the square around it."""
    radius = int(len(entries) ** 0.5) // 2

    def rows(maps: Tensor) -> Tensor:
        padded = pad(maps)
        result = entries.new_zeros(len(maps), len(pixels))
        for entry, step in zip(entries, pixels.steps(radius), strict=True):
            result = result.addcmul(entry, padded.index_select(1, pixels.place + step))
        return result.t()

    with torch.no_grad():
        stencil = entries.t().clone(memory_format=torch.contiguous_format)
        stencil.masked_fill_(pixels.neighbours(radius) < 0, 0)
        if confidence is not None:
            stencil[:, len(entries) // 2] += confidence
        matrix = matrix_of(stencil, pixels)
        precondition = _preconditioner(preconditioner, stencil, matrix, pixels, columns)
    return Laplacian(rows, lambda x: matrix @ x, precondition)


def _preconditioner(
    kind: Preconditioner, stencil: Tensor, matrix: Tensor, pixels: Pixels, columns: int | None
) -> LinearMap:
    on_cpu = stencil.device.type == "cpu"
    if kind == "auto":
        kind = "v-cycle" if not _is_narrow(pixels.active) else "cholesky" if on_cpu else "jacobi"
    if kind == "cholesky" and (factor := banded_cholesky(stencil, pixels)) is not None:
        return factor
    if kind == "jacobi":
        step = jacobi_step(stencil, columns)
        return lambda r: step * r
    return VCycle(stencil, matrix, pixels, columns)


def _is_narrow(active: Tensor) -> bool:
    """Whether each active pixel has one that is not within reach. Beyond the border there is none."""
    active = F.pad(active, (NARROW,) * 4, value=True)
    for reach in (1, 2, 4, 8, 1):  # twice NARROW together
        active = active[:, reach:] & active[:, :-reach]
        active = active[reach:] & active[:-reach]
    return not bool(active.any())
