"""Cholesky factors of a matrix whose pixels form a narrow band, wherever it bends, as a preconditioner.

Numbered along the band, in the reverse Cuthill-McKee order, neighbours have numbers near to each other. So
the matrix has few diagonals, and its factor has no more. It is for the CPU: SciPy orders and factorises.
"""

import numpy as np
import torch
from torch import Tensor

from pseudolabel.matting._pixels import Pixels

__all__ = ["BandedCholesky", "banded_cholesky"]

MOST_WORK = 3e8  # multiplications; where a band takes more, the V-cycle is faster


class BandedCholesky:
    """Maps residuals (n,) or (n,K) to `A^-1 r`, up to rounding."""

    def __init__(self, factor: np.ndarray, order: Tensor) -> None:
        self.factor = factor
        self.order = order

    def __call__(self, residual: Tensor) -> Tensor:
        from scipy.linalg import cho_solve_banded  # noqa: PLC0415 - slow to import

        ordered = residual.index_select(0, self.order).numpy()
        x = torch.from_numpy(cho_solve_banded((self.factor, True), ordered, check_finite=False))
        return torch.empty_like(residual).index_copy_(0, self.order, x)


def banded_cholesky(stencil: Tensor, pixels: Pixels) -> BandedCholesky | None:
    """The factor of the matrix with rows (n,k), or None where it has too many diagonals, or none."""
    from scipy.linalg import LinAlgError, cholesky_banded  # noqa: PLC0415 - slow to import

    neighbours = pixels.neighbours(int(stencil.shape[1] ** 0.5) // 2)
    order = _along_the_band(neighbours)
    number = torch.empty(len(order), dtype=torch.int32)
    number[order] = torch.arange(len(order), dtype=torch.int32)

    column = number.index_select(0, neighbours.clamp(min=0).flatten())
    diagonal = (number[:, None] - column.view_as(neighbours)).flatten()
    below = ((neighbours.flatten() >= 0) & (diagonal >= 0)).nonzero()[:, 0]
    column, diagonal = column[below], diagonal[below]
    width = int(diagonal.max())
    if len(order) * width**2 > MOST_WORK:
        return None
    band = stencil.new_zeros(width + 1, len(order))
    band[diagonal.long(), column.long()] = stencil.flatten()[below]
    try:
        factor = cholesky_banded(band.numpy(), lower=True, overwrite_ab=True, check_finite=False)
    except LinAlgError:
        return None
    return BandedCholesky(factor, order)


def _along_the_band(neighbours: Tensor) -> Tensor:
    """Order (n,) of the pixels, from their neighbours' numbers (n,k), -1 where there is none."""
    from scipy.sparse import csr_array  # noqa: PLC0415 - slow to import
    from scipy.sparse.csgraph import reverse_cuthill_mckee  # noqa: PLC0415

    count, entries = neighbours.shape
    itself = torch.arange(count, dtype=torch.int32)[:, None]
    ends = neighbours.where(neighbours >= 0, itself).flatten().numpy()
    starts = np.arange(0, count * entries + 1, entries, dtype=np.int32)
    graph = csr_array((np.ones(len(ends), np.float32), ends, starts), (count, count))
    return torch.from_numpy(reverse_cuthill_mckee(graph, symmetric_mode=True).astype(np.int64))
