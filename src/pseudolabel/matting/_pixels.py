"""The pixels that a system of equations runs over, and sparse matrices with as many entries in every row.

A trimap leaves few pixels unknown, so that all work is done on a list of them: vectors have one row for each,
and matrices are stencils, the same neighbours for every pixel.
"""

import warnings
from contextlib import suppress

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["MARGIN", "Pixels", "pad", "sparse_rows"]

MARGIN = 2  # of nothing around a grid, so that the widest stencil finds a place for all its neighbours


class Pixels:
    """The active pixels of a grid, in reading order.

    Attributes:
        active: Grid (h,w) bool.
        index: Indices (n,) int64 of the active pixels in the flattened grid.
        place: Indices (n,) int32 of the same in the flattened grid with its margin.
        width: Width of the grid with its margin.
        number: For each place with the margin the number of the active pixel there, -1 for none.
    """

    def __init__(self, active: Tensor) -> None:
        height, width = active.shape
        self.active = active
        self.width = width + 2 * MARGIN
        self.index = active.flatten().nonzero()[:, 0]
        row, column = self.rows_and_columns()
        self.place = (row + MARGIN) * self.width + column + MARGIN
        places = (height + 2 * MARGIN) * self.width
        self.number = torch.full((places,), -1, dtype=torch.int32, device=active.device)
        self.number[self.place.long()] = torch.arange(len(self), dtype=torch.int32, device=active.device)
        self._neighbours: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.index)

    def rows_and_columns(self) -> tuple[Tensor, Tensor]:
        """Row and column (n,) int32 of each pixel."""
        index, width = self.index.int(), self.active.shape[1]
        row = torch.div(index, width, rounding_mode="floor")
        return row, index - row * width

    def steps(self, radius: int) -> Tensor:
        """Steps (k,) int32 from a place to those of the square around it, in reading order."""
        side = torch.arange(-radius, radius + 1, dtype=torch.int32, device=self.place.device)
        return (side[:, None] * self.width + side).flatten()

    def neighbours(self, radius: int) -> Tensor:
        """Numbers (n,k) int32 of the pixels in the square around each, -1 for those that are not active."""
        if radius not in self._neighbours:
            places = self.place[:, None] + self.steps(radius)
            self._neighbours[radius] = self.number.index_select(0, places.flatten()).view_as(places)
        return self._neighbours[radius]

    def pick(self, maps: Tensor) -> Tensor:
        """Values (n,K) of maps (K,h,w)."""
        return maps.flatten(1).index_select(1, self.index).t()

    def put(self, maps: Tensor, values: Tensor) -> Tensor:
        """Maps (K,h,w) with other values (n,K)."""
        return maps.flatten(1).index_copy(1, self.index, values.t()).view_as(maps)


def pad(maps: Tensor) -> Tensor:
    """Maps (K,h,w) with the margin, flattened (K,p), so that places are indices."""
    return F.pad(maps, (MARGIN,) * 4).flatten(1)


# "Beta state", said once a process. A tracer that imports this makes no such tensor.
with warnings.catch_warnings(), suppress(RuntimeError):
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 1], [0], [1.0], device="cpu")


def sparse_rows(index: Tensor, value: Tensor, columns: int) -> Tensor:
    """Sparse matrix (n,columns) with k entries in each row: ``value`` (n,k) at ``index`` (n,k) int32."""
    rows, entries = index.shape
    start = torch.arange(0, rows * entries + 1, entries, dtype=torch.int32, device=index.device)
    return torch.sparse_csr_tensor(
        start, index.flatten(), value.flatten(), (rows, columns), device=value.device
    )
