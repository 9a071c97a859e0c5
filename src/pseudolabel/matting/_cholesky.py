"""Cholesky factors of a matrix whose pixels form a band, wherever it bends, as a preconditioner.

Numbered along the band, in the reverse Cuthill-McKee order, neighbours have numbers near to each other. So
the matrix has few diagonals, and its factor has no more. It is for the CPU: SciPy orders and factorises.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pseudolabel.matting._pixels import Pixels

__all__ = ["BandedCholesky", "banded_cholesky", "is_narrow"]

NARROW = 8  # pixels


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


def banded_cholesky(stencil: Tensor, pixels: Pixels, most_work: float) -> BandedCholesky | None:
    """The factor of the matrix with rows (n,k); None if it takes more multiplications, or is not definite."""
    from scipy.linalg import LinAlgError, cholesky_banded  # noqa: PLC0415 - slow to import

    order = _along_the_band(pixels.neighbours(1))
    number = torch.empty_like(order, dtype=torch.int32)
    number[order] = torch.arange(len(order), dtype=torch.int32, device=order.device)

    # The first half of each row holds every pair once, and the pixel itself. What is not active has entries
    # of 0, which change nothing on the diagonal.
    half = slice(stencil.shape[1] // 2 + 1)
    near = pixels.neighbours(int(stencil.shape[1] ** 0.5) // 2)[:, half]
    one = number[:, None]
    other = number.index_select(0, near.clamp(min=0).flatten()).view_as(near)
    diagonal, column = (one - other).abs() * (near >= 0), torch.minimum(one, other)
    width = int(diagonal.max())
    if len(order) * width**2 > most_work:
        return None
    band = stencil.new_zeros(len(order), width + 1)
    place = column.long() * (width + 1) + diagonal
    band.view(-1).scatter_add_(0, place.flatten(), stencil[:, half].flatten())
    try:
        factor = cholesky_banded(band.numpy().T, lower=True, overwrite_ab=True, check_finite=False)
    except LinAlgError:
        return None
    return BandedCholesky(factor, order)


def _along_the_band(neighbours: Tensor) -> Tensor:
    """Order (n,) of the pixels, from their neighbours' numbers (n,k), -1 where there is none."""
    from scipy.sparse import csr_array  # noqa: PLC0415 - slow to import
    from scipy.sparse.csgraph import reverse_cuthill_mckee  # noqa: PLC0415

    count, entries = neighbours.shape
    itself = torch.arange(count, dtype=torch.int32, device=neighbours.device)[:, None]
    ends = neighbours.where(neighbours >= 0, itself).flatten().numpy()
    starts = np.arange(0, count * entries + 1, entries, dtype=np.int32)
    graph = csr_array((np.ones(len(ends), np.float32), ends, starts), (count, count))
    return torch.from_numpy(reverse_cuthill_mckee(graph, symmetric_mode=True).astype(np.int64))


def is_narrow(active: Tensor) -> bool:
    """Whether each active pixel has one that is not within reach. Beyond the border there is none."""
    active = F.pad(active, (NARROW,) * 4, value=True)
    for reach in (1, 2, 4, 8, 1):  # twice NARROW together
        active = active[:, reach:] & active[:, :-reach]
        active = active[reach:] & active[:-reach]
    return not bool(active.any())
