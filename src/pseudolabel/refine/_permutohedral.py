"""Gaussian filtering in many dimensions on the permutohedral lattice (Adams, Baek, Davis 2010).

Wanted is `out_i = sum_j exp(-|f_i - f_j|^2 / 2) in_j` over all pairs of pixels, `f` being the d features of a
pixel, such as position and colour. Three steps, each linear in the number of pixels, come close:

    splat   every pixel spreads its value over the d + 1 corners of the lattice cell that holds its features;
    blur    values on the lattice are blurred by [1/2 1 1/2] along each of the d + 1 lattice directions;
    slice   every pixel gathers the blurred values of the corners of its cell.

Each is a product with a sparse matrix. What is left is to find the cells, corners and neighbours.

The lattice. Features are scaled and lifted into the plane `x_0 + ... + x_d = 0` of d + 1 dimensions. A vertex
is an integer point of that plane whose coordinates are all congruent modulo d + 1. The shortest steps between
vertices are the d + 1 directions of the blur: step `j` adds 1 to every coordinate and takes d + 1 from
coordinate `j`. All of them together, in any order, lead back to the start, and the d + 1 vertices met on the
way are the corners of one cell: a cell is a vertex and an order of the steps.

The trick that makes this fast without a hash table: a vertex is named by one integer that is *linear* in its
coordinates, so that every step adds a constant to the name (`_name_steps`). Finding the vertices is then a
sort, and finding the neighbours of all of them a binary search for `names + constant`.

Rounding. A pixel on the border of two cells belongs to either with weight zero, yet the vertices that exist
steer the blur. `_locate` therefore takes the float32 operations in the order of the authors' C++ program
(Krähenbühl and Koltun 2011), and must not fuse a multiplication with an addition.
"""

import itertools
import math
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from scipy.sparse import csr_array

__all__ = ["PermutohedralFilter"]

_CPU_BLOCK = 1 << 15  # pixels located at a time: the working set stays in the processor's cache


def _float32(value: float) -> float:
    return float(np.float32(value))


def _lift_scales(d: int) -> list[float]:
    """Factor of each feature on its way into the plane; the filter then has standard deviation 1."""
    spread = _float32(math.sqrt(2 / 3) * (d + 1))
    return [_float32(spread / math.sqrt(j * (j + 1))) for j in range(1, d + 1)]


def _name_steps(extent: Sequence[float]) -> tuple[list[int], int]:
    """What each step adds to the name of a vertex, and the number of names that one image can need.

    A vertex `p` is pinned down by `p_d` and the d - 1 integers `(p_{i-1} - p_i) / (d + 1)`. These are the
    digits of its name, in a number system with a range for each digit: what features in `[0, extent]` can
    reach, and a margin for the corners of a cell and for the neighbours asked for.
    """
    d = len(extent)
    length = [scale * size for scale, size in zip(_lift_scales(d), extent, strict=True)]
    place = [1]  # value of each digit, `p_d` first
    span = math.ceil(d * length[-1]) + 4 * (d + 1)
    for i in range(1, d):
        place.append(span)
        reach = (i + 1) * length[i - 1] + ((i - 1) * length[i - 2] if i > 1 else 0.0)
        span *= math.ceil(reach / (d + 1)) + 7
    # Step j adds 1 to p_d, and takes d + 1 from p_j: one from the digit (p_j - p_{j+1}) / (d + 1), and so on.
    lost = [0] * (d + 1)
    for i in range(1, d):
        lost[i - 1] += place[i]
        lost[i] -= place[i]
    lost[d] = d + 1
    return [1 - change for change in lost], span


def _locate(features: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Find the cell of each of (d,n) features, (n,) int64, and the weights of its corners (d+1,n).

    A cell is `first * (d + 1)! + order`: the name of its first vertex, and the number of its order of steps.
    The walk from the first vertex takes the last step of the order first; the corner weights are listed in
    the same order, so the first vertex has the last weight.
    """
    d, n = features.shape
    lifted = features.new_empty(d + 1, n)
    total = torch.zeros_like(features[0])
    for j, scale in zip(range(d, 0, -1), reversed(_lift_scales(d)), strict=True):
        scaled = features[j - 1] * scale
        torch.sub(total, scaled * j, out=lifted[j])
        total += scaled
    lifted[0] = total

    # The nearest point with coordinates divisible by d + 1. It may lie off the plane by `rounded.sum()`;
    # `-sum_j rounded_j step_j` is that point brought back along (1, ..., 1).
    rounded = (lifted * _float32(1 / (d + 1))).round_()
    rest = lifted.sub_(rounded * (d + 1))
    first = torch.zeros(n, dtype=steps.dtype, device=features.device)
    for coordinate, step in zip(rounded.to(steps.dtype), steps, strict=True):
        first -= coordinate.mul_(step)

    # Largest rest first is the order of the steps (ties keep their order). Its number among all orders in the
    # dictionary counts, for each coordinate, the later ones that come before it.
    order = torch.zeros(n, dtype=torch.int16, device=features.device)
    ordered = list(rest)
    for i, j in itertools.combinations(range(d + 1), 2):
        order.add_(rest[i] < rest[j], alpha=math.factorial(d - i))
        ordered[i], ordered[j] = torch.maximum(ordered[i], ordered[j]), torch.minimum(ordered[i], ordered[j])

    heights = torch.stack(ordered).mul_(_float32(1 / (d + 1)))
    weights = torch.empty_like(heights)
    torch.sub(heights[:-1], heights[1:], out=weights[:-1])
    torch.sub(heights[-1] + 1, heights[0], out=weights[-1])
    return first.long().mul_(math.factorial(d + 1)).add_(order), weights


@lru_cache
def _step_orders(d: int) -> np.ndarray:  # no tensor, of which the modes of its first caller would decide
    """All orders of the d + 1 steps, ((d+1)!,d+1): row i of the dictionary of ranks, turned into an order."""
    return np.array(list(itertools.permutations(range(d + 1)))).argsort(1)


class _SparseRows:
    """A sparse matrix by rows: row r holds `weight[start[r]:start[r + 1]]` in columns `index[...]`."""

    def __init__(self, index: Tensor, start: Tensor, weight: Tensor, columns: int) -> None:
        self.index, self.start, self.weight, self.columns = index, start, weight, columns

    @classmethod
    def from_table(cls, index: Tensor, weight: Tensor, columns: int) -> "_SparseRows":
        """From a table with as many entries in every row."""
        rows, width = index.shape
        start = torch.arange(0, rows * width + 1, width, dtype=torch.int32, device=index.device)
        return cls(index.flatten(), start, weight.flatten(), columns)

    @cached_property
    def scipy(self) -> "csr_array":
        """The same numbers as a SciPy matrix, on the CPU."""
        from scipy.sparse import csr_array  # noqa: PLC0415 - slow to import

        parts = (self.weight.numpy(), self.index.numpy(), self.start.numpy())
        return csr_array(parts, shape=(len(self.start) - 1, self.columns))

    def transposed(self) -> "_SparseRows":
        if self.index.device.type != "cpu":
            return self._transposed_by_sorting()
        turned = self.scipy.tocsc()  # a counting sort, in a third of the time and memory
        index, start, weight = (torch.from_numpy(x) for x in (turned.indices, turned.indptr, turned.data))
        return _SparseRows(index, start, weight, len(self.start) - 1)

    def _transposed_by_sorting(self) -> "_SparseRows":
        column, entry = torch.sort(self.index, stable=True)
        edges = torch.arange(self.columns + 1, dtype=torch.int32, device=column.device)
        start = torch.searchsorted(column, edges, out_int32=True)
        row = torch.searchsorted(self.start, entry.to(torch.int32), right=True, out_int32=True) - 1
        return _SparseRows(row, start, self.weight.index_select(0, entry), len(self.start) - 1)

    def __matmul__(self, values: Tensor) -> Tensor:
        """Multiply by (columns,C) values."""
        if values.shape[1] == 1 and values.device.type == "cpu":  # half the time of what follows
            return torch.from_numpy(self.scipy @ values.numpy())
        return F.embedding_bag(
            self.index,
            values,
            self.start,
            mode="sum",
            per_sample_weights=self.weight,
            include_last_offset=True,
        )


class PermutohedralFilter:
    """The Gaussian filter `D^(-1/2) K D^(-1/2)` of fixed pixel features, D being K's answer to ones.

    Args:
        features: (d,n) float32, in [0, extent]. For several images their pixels follow one another.
        extent: Upper bounds of the d features.
        images: Number of images that the n pixels belong to. Pixels of different images do not mix.
    """

    def __init__(self, features: Tensor, extent: Sequence[float], images: int = 1) -> None:
        d, n = features.shape
        device = features.device
        step_list, span = _name_steps(extent)
        orders = math.factorial(d + 1)
        if span * images * orders >= 2**63 or n * (d + 1) >= 2**31:
            raise ValueError(
                f"image: {n} pixels with features up to {[round(size, 1) for size in extent]} standard "
                "deviations are too many for the lattice; use a smaller image or a wider kernel"
            )
        # Sorting names is the dearest part: 32 bits halve it where they suffice.
        dtype = torch.int32 if span * images < 2**31 else torch.int64
        steps = torch.tensor(step_list, dtype=dtype, device=device)

        cell = torch.empty(n, dtype=torch.int64, device=device)
        weight = features.new_empty(n, d + 1)
        block = _CPU_BLOCK if device.type == "cpu" else n
        for begin in range(0, n, block):
            part = slice(begin, begin + block)
            cell[part], weights = _locate(features[:, part], steps)
            weight[part] = weights.T
        if images > 1:
            cell.view(images, -1).add_(torch.arange(images, device=device)[:, None] * (span * orders))

        # Neighbouring pixels share cells and cells share corners, so both are named once.
        cells, cell_of_pixel = torch.unique(cell, return_inverse=True)
        first = torch.div(cells, orders, rounding_mode="floor")
        walks = steps[torch.tensor(_step_orders(d), device=device)]
        offsets = walks.sum(1, keepdim=True, dtype=dtype) - walks.cumsum(1, dtype=dtype)
        corners = first.to(dtype)[:, None] + offsets.index_select(0, cells - first * orders)
        vertices, corner_vertex = torch.unique(corners, return_inverse=True)
        index = corner_vertex.to(torch.int32).index_select(0, cell_of_pixel)
        del cell, cells, first, corners, corner_vertex, cell_of_pixel

        # One vertex more stands for all that do not exist: no pixel splats on it, so it stays zero.
        self._slice = _SparseRows.from_table(index, weight, len(vertices) + 1)
        self._splat = self._slice.transposed()
        self._blurs = _blurs(vertices, steps)
        self._normalize(n)

    def _normalize(self, n: int) -> None:
        """Fold `D^(-1/2)` into splat and slice. Any constant factor of the blur drops out with it."""
        total = self._slice @ self.splat_and_blur(self._slice.weight.new_ones(n, 1))
        norm = total.add_(1e-20).rsqrt_()
        self._slice.weight.view(n, -1).mul_(norm)
        self._splat.weight.mul_(norm.view(-1).index_select(0, self._splat.index))

    @property
    def nbytes(self) -> int:
        """Memory that it takes, at most: blurs share some of it."""
        matrices = (self._slice, self._splat, *self._blurs)
        return sum(part.nbytes for rows in matrices for part in (rows.index, rows.start, rows.weight))

    def splat_and_blur(self, values: Tensor) -> Tensor:
        """Bring (n,C) float32 values of pixels to the lattice and blur them there, each channel by itself."""
        values = self._splat @ values
        for blur in self._blurs:
            values = blur @ values
        return values

    def slice(self, on_lattice: Tensor, pixels: slice) -> Tensor:
        """Read the filtered values of some pixels, a slice with start and stop, off the lattice."""
        whole, corners = self._slice, len(self._blurs)
        entries = slice(pixels.start * corners, pixels.stop * corners)
        start = whole.start[: pixels.stop - pixels.start + 1]
        return _SparseRows(whole.index[entries], start, whole.weight[entries], whole.columns) @ on_lattice


def _blurs(vertices: Tensor, steps: Tensor) -> list[_SparseRows]:
    """For each step the matrix that adds half of the vertices before and after to every vertex."""
    count = len(vertices)
    own = torch.arange(count + 1, dtype=torch.int32, device=vertices.device)
    weight = torch.tensor([1, 0.5, 0.5], dtype=torch.float32, device=vertices.device).repeat(count + 1, 1)
    blurs = []
    for step in steps:
        wanted = vertices + step
        at = torch.searchsorted(vertices, wanted, out_int32=True).clamp_(max=count - 1)
        found = vertices.index_select(0, at) == wanted
        after = F.pad(torch.where(found, at, count), (0, 1), value=count)
        before = torch.full_like(own, count).scatter_(0, after.long(), own)
        before[count] = count  # where all that have no next vertex wrote
        blurs.append(_SparseRows.from_table(torch.stack([own, after, before], 1), weight, count + 1))
    return blurs
