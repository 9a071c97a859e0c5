"""The V-cycle: what coarser and coarser grids know about the solution, as a preconditioner.

On each level one Jacobi step damps what is rough of an error, before and after the coarser level has removed
what is smooth. With A the stencil of a level, and P bilinear interpolation cut to the active pixels, the
coarser stencil is the Galerkin product `P^T A P`: it reaches as far in coarse pixels as A does in fine ones.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pseudolabel.matting._cholesky import banded_cholesky, is_narrow
from pseudolabel.matting._pixels import MARGIN, Pixels, sparse_rows
from pseudolabel.matting._solver import LinearMap

__all__ = ["VCycle", "jacobi_step"]

MOST_WORK = 6e4, 3e7  # multiplications for a Cholesky factor: a pixel on the finest level, in all on another
LARGEST = 2e10  # multiplications for any factor, for the sake of memory
DENSE = 200  # unknowns of a last level of which the inverse is written out
DAMPING = 0.8
CHUNK = 4096  # coarse pixels at a time, so that what is gathered for them stays in the cache


class Level(NamedTuple):
    """A grid with what leads to the next coarser one."""

    matrix: Tensor
    """A (n,n), sparse."""
    step: Tensor
    """What a Jacobi step multiplies a residual with, like a residual."""
    down: Tensor
    """P^T (m,n), sparse."""
    up: Tensor
    """P (n,m), sparse."""


class VCycle:
    """One V-cycle on residuals (n,) or (n,K): a symmetric positive definite preconditioner.

    Args:
        stencil: Rows (n,k) of the matrix over the square around each pixel; 0 at pixels that are not active.
        matrix: The same as a sparse matrix (n,n).
        pixels: The active pixels.
        columns: K, or None for vectors.
    """

    def __init__(self, stencil: Tensor, matrix: Tensor, pixels: Pixels, columns: int | None = None) -> None:
        self.levels: list[Level] = []
        while (last := _direct(stencil, pixels, columns, finest=not self.levels)) is None:
            down, up, coarse_pixels = _transfer(pixels, stencil.dtype)
            self.levels.append(Level(matrix, jacobi_step(stencil, columns), down, up))
            stencil, pixels = _galerkin(stencil, pixels, coarse_pixels), coarse_pixels
            matrix = matrix_of(stencil, pixels)
        self.last = last

    def __call__(self, residual: Tensor) -> Tensor:
        return self._cycle(residual, 0)

    def _cycle(self, r: Tensor, depth: int) -> Tensor:
        if depth == len(self.levels):
            return self.last(r)
        level = self.levels[depth]
        add_product = torch.addmv if r.ndim == 1 else torch.addmm
        x = level.step * r
        coarse = self._cycle(level.down @ add_product(r, level.matrix, x, alpha=-1), depth + 1)
        x = add_product(x, level.up, coarse)
        return x.addcmul_(level.step, add_product(r, level.matrix, x, alpha=-1))


def matrix_of(stencil: Tensor, pixels: Pixels) -> Tensor:
    """The sparse matrix (n,n) of a stencil."""
    return sparse_rows(pixels.neighbours(_radius(stencil)).clamp(min=0), stencil, len(pixels))


def jacobi_step(stencil: Tensor, columns: int | None = None) -> Tensor:
    """Factors (n,) or (n,columns) of a Jacobi step, damped: more so where errors could grow otherwise.

    Steps `x + D^-1 (rhs - A x)` never let the energy of an error grow if `2 D - A` is positive definite: as
    it is where every entry of D is above half the sum of the absolute values of its row of A.
    """
    diagonal = stencil[:, stencil.shape[1] // 2]
    scale = torch.maximum(diagonal / DAMPING, stencil.abs().sum(1) / 2)
    step = (1 / scale).where(scale > 0, 0)
    # Expanded, as products of tensors of one layout are many times faster than with few columns broadcast.
    return step if columns is None else step[:, None].repeat(1, columns)


def _radius(stencil: Tensor) -> int:
    return int(stencil.shape[1] ** 0.5) // 2


def _transfer(fine: Pixels, dtype: torch.dtype) -> tuple[Tensor, Tensor, Pixels]:
    """P^T, P and the pixels of the grid of every other row and column."""
    coarse = Pixels(_coarse_active(fine.active))

    # Up: a pixel lies on a coarse row, or halfway between two; columns alike.
    row, column = fine.rows_and_columns()
    odd_row, odd_column = row & 1, column & 1
    corner = ((row >> 1) + MARGIN) * coarse.width + (column >> 1) + MARGIN
    below = corner + odd_row * coarse.width
    places = torch.stack([corner, corner + odd_column, below, below + odd_column], 1)
    y, x = 0.5 * odd_row.to(dtype), 0.5 * odd_column.to(dtype)
    weights = torch.stack([(1 - y) * (1 - x), (1 - y) * x, y * (1 - x), y * x], 1)
    up = sparse_rows(coarse.number.index_select(0, places.flatten()).view_as(places), weights, len(coarse))

    # Down: a coarse pixel gathers the square around it.
    near = _fine_square(fine, coarse)
    hat = torch.tensor([0.5, 1, 0.5], dtype=dtype, device=near.device)
    weights = (hat[:, None] * hat).flatten() * (near >= 0)
    return sparse_rows(near.clamp(min=0), weights, len(fine)), up, coarse


def _coarse_active(active: Tensor) -> Tensor:
    """Which coarse pixels have an active fine pixel in the square around them."""
    height, width = (side // 2 + 1 for side in active.shape)
    active = F.pad(active, (1, 2, 1, 2))
    left, middle, right = (active[:, start : start + 2 * width - 1 : 2] for start in range(3))
    active = left | middle | right
    above, middle, below = (active[start : start + 2 * height - 1 : 2] for start in range(3))
    return above | middle | below


def _fine_square(fine: Pixels, coarse: Pixels) -> Tensor:
    """Numbers (m,9) of the fine pixels in the square around each coarse one, -1 where not active."""
    row, column = coarse.rows_and_columns()
    places = ((2 * row + MARGIN) * fine.width + 2 * column + MARGIN)[:, None] + fine.steps(1)
    return fine.number.index_select(0, places.flatten()).view_as(places)


def _galerkin(stencil: Tensor, fine: Pixels, coarse: Pixels) -> Tensor:
    """Stencil (m,k) of `P^T A P`: a fixed linear map of the nine fine rows around each coarse pixel."""
    near = _fine_square(fine, coarse)
    near = near.where(near >= 0, len(fine))
    stencil = F.pad(stencil, (0, 0, 0, 1))  # a row of zeros for pixels that are not active
    to_coarse = _galerkin_map(_radius(stencil), stencil)
    parts = [
        stencil.index_select(0, some.flatten()).view(len(some), -1) @ to_coarse
        for some in torch.split(near, CHUNK)
    ]
    return torch.cat(parts)


def _galerkin_map(radius: int, like: Tensor) -> Tensor:
    """(9k,k): what the entry of a fine pixel's stencil adds to which entry of the coarse stencil.

    In one dimension, fine pixel `a` (-1, 0, 1 from the coarse pixel's own) and its neighbour at `a + d` have
    weights of interpolation from the coarse pixels around them; the map is the product over both dimensions.
    """
    reach = torch.arange(-radius, radius + 1, dtype=like.dtype, device=like.device)
    a, d = reach.new_tensor([-1, 0, 1])[:, None, None], reach[:, None]
    line = _hat(a) * _hat(a + d - 2 * reach)
    both = torch.einsum("adc,bef->abdecf", line, line)
    return both.reshape(9 * len(reach) ** 2, len(reach) ** 2)


def _hat(distance: Tensor) -> Tensor:
    return (1 - distance.abs() / 2).clamp(min=0)


def _direct(stencil: Tensor, pixels: Pixels, columns: int | None, *, finest: bool) -> LinearMap | None:
    """The inverse of a matrix; None where that takes too much, and a coarser level is wanted."""
    small = len(pixels) <= DENSE
    several = finest and columns is not None and columns > 1  # which share a factor, and pay for steps
    banded = stencil.device.type == "cpu" and (several or is_narrow(pixels.active))
    if not small and not banded:
        return None
    most_work = MOST_WORK[1]
    if finest:
        costly = several and stencil.shape[1] > 9  # random walks take fewer and cheaper steps
        most_work = min(MOST_WORK[0] * len(pixels) * (4 if costly else 1), LARGEST)
    else:
        # Few fine pixels may have more coarse ones around them than they can tell apart. A little shift makes
        # the matrix definite all the same.
        stencil = stencil.clone()
        stencil[:, stencil.shape[1] // 2] *= 1 + torch.finfo(stencil.dtype).eps ** 0.5
    factor = banded_cholesky(stencil, pixels, most_work) if banded else None
    return factor if factor is not None or not small else _inverse(stencil, pixels)


def _inverse(stencil: Tensor, pixels: Pixels) -> LinearMap:
    """The inverse written out; where there is none, that of the diagonal."""
    unit = torch.eye(len(pixels), dtype=stencil.dtype, device=stencil.device)
    factor, failed = torch.linalg.cholesky_ex(matrix_of(stencil, pixels) @ unit)
    works = failed == 0
    inverse = torch.cholesky_inverse(factor.where(works, unit))
    return inverse.where(works, torch.diag(jacobi_step(stencil))).matmul
