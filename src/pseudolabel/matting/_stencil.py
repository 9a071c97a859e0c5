"""Matting Laplacians that are stencils: each pixel is joined to those of a small square around it."""

from typing import Literal

import torch
from torch import Tensor

from pseudolabel.matting._multigrid import VCycle, jacobi_step, matrix_of
from pseudolabel.matting._pixels import Pixels, pad
from pseudolabel.matting._solver import LinearMap
from pseudolabel.matting._system import Laplacian

__all__ = ["Preconditioner", "stencil_laplacian"]

Preconditioner = Literal["v-cycle", "jacobi"]


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
        stencil = torch.where(pixels.neighbours(radius) >= 0, entries.t(), 0).contiguous()
        if confidence is not None:
            stencil[:, len(entries) // 2] += confidence
        matrix = matrix_of(stencil, pixels)
        precondition: LinearMap
        if preconditioner == "v-cycle":
            precondition = VCycle(stencil, matrix, pixels, columns)
        else:
            step = jacobi_step(stencil, columns)
            precondition = lambda r: step * r  # noqa: E731
    return Laplacian(rows, lambda x: matrix @ x, precondition)
