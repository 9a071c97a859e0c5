"""Gaussian filtering in many dimensions on the permutohedral lattice (Adams, Baek, Davis 2010).

Wanted is `out_i = sum_j exp(-|f_i - f_j|^2 / 2) in_j` for all pairs of pixels, `f` being the d features of a
pixel, such as position and colour. Three steps, each linear in the number of pixels, come close:

    splat   every pixel spreads its value over the d + 1 corners of the lattice cell that holds its features;
    blur    values on the lattice are blurred by [1/2 1 1/2] along each of the d + 1 lattice directions;
    slice   every pixel gathers the blurred values of the corners of its cell.

The lattice. Features are scaled and lifted into the plane `x_0 + ... + x_d = 0` of d + 1 dimensions. A vertex is
an integer point of that plane whose coordinates are all congruent modulo d + 1. The shortest steps from vertex to
vertex are the d + 1 directions of the blur: step `j` adds 1 to every coordinate and takes d + 1 from coordinate
`j`. Doing all of them once, in any order, leads back to the start, and the d + 1 vertices met on the way are the
corners of one cell: a cell is a vertex and an order of the steps.

The trick that makes this fast without a hash table: a vertex is named by one integer that is *linear* in its
coordinates, so that every step adds a constant to the name (`_name_steps`). Finding the vertices is then a sort,
and finding the neighbours of all of them a binary search for `names + constant`.

Rounding. A pixel on the border of two cells belongs to either with weight zero, yet the vertices that exist steer
the blur. `_locate` therefore takes the float32 operations in the order of the C++ program that everybody uses
(Krähenbühl and Koltun 2011), and must not fuse a multiplication with an addition.
"""

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["PermutohedralFilter"]

_CPU_BLOCK = 1 << 15  # pixels located at a time: the working set stays in the processor's cache
_DEVICE_BLOCK = 1 << 24


def _float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))


def _lift_scales(d: int) -> list[float]:
    """Factor of each feature on its way into the plane; the filter then has standard deviation 1."""
    spread = _float32(math.sqrt(2 / 3) * (d + 1))
    return [_float32(spread / math.sqrt(j * (j + 1))) for j in range(1, d + 1)]


def _name_steps(extent: Sequence[float]) -> tuple[list[int], int]:
    """What each step adds to the name of a vertex, and the number of names that one image can need.

    A vertex `p` is pinned down by `p_d` and the d - 1 integers `(p_{i-1} - p_i) / (d + 1)`. These are the digits
    of its name, in a number system with a range for each digit: what features in `[0, extent]` can reach, and
    a margin for the corners of a cell and for the neighbours asked for.
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


def _locate(features: Tensor, steps: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Find the cell of each of (d,n) features: its name (n,) int64, and the pixel's corner weights (d+1,n).

    A cell's name is `first * (d + 1)! + order`: the name of its first vertex, and the number of the order of steps.
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
    first = torch.zeros(n, dtype=torch.int64, device=features.device)
    for coordinate, step in zip(rounded.to(torch.int64), steps, strict=True):
        first.sub_(coordinate, alpha=step)

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
    return first.mul_(math.factorial(d + 1)).add_(order), weights


def _corner_offsets(steps: Sequence[int]) -> list[list[int]]:
    """Names of the corners of a cell relative to its first vertex, one row for each order of the steps."""
    rows = []
    for rank in itertools.permutations(range(len(steps))):
        walk = [steps[rank.index(k)] for k in range(len(steps))]
        rows.append([sum(walk[k + 1 :]) for k in range(len(steps))])
    return rows


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
        steps, span = _name_steps(extent)
        orders = math.factorial(d + 1)
        if span * images * orders >= 2**63 or n * (d + 1) >= 2**31:
            raise ValueError(
                f"image: {n} pixels with features up to {[round(size, 1) for size in extent]} standard "
                "deviations are too many for the lattice; use a smaller image or a wider kernel"
            )

        cell = torch.empty(n, dtype=torch.int64, device=device)
        self.weight = torch.empty(n, d + 1, device=device)
        block = _CPU_BLOCK if device.type == "cpu" else _DEVICE_BLOCK
        for start in range(0, n, block):
            part = slice(start, start + block)
            cell[part], weights = _locate(features[:, part], steps)
            self.weight[part] = weights.T
        if images > 1:
            cell.view(images, -1).add_(torch.arange(images, device=device)[:, None] * (span * orders))

        # Neighbouring pixels share cells and cells share corners, so both are named once. Sorting is the
        # dearest part: names of 32 bits halve it where they suffice.
        dtype = torch.int32 if span * images < 2**31 else torch.int64
        offsets = torch.tensor(_corner_offsets(steps), dtype=dtype, device=device)
        cells, cell_of_pixel = torch.unique(cell, return_inverse=True)
        first = torch.div(cells, orders, rounding_mode="floor")
        corners = first.to(dtype)[:, None] + offsets.index_select(0, cells - first * orders)
        vertices, corner_vertex = torch.unique(corners, return_inverse=True)
        del cell, cells, first, corners
        self.index = corner_vertex.to(torch.int32).index_select(0, cell_of_pixel)
        del corner_vertex, cell_of_pixel

        self._set_blur(vertices, steps)
        self._set_splat(len(vertices))
        self._normalize()

    def _set_blur(self, vertices: Tensor, steps: Sequence[int]) -> None:
        """For each step a table of rows (vertex, the next, the one before); a missing one is vertex `count`."""
        count = len(vertices)
        own = torch.arange(count + 1, dtype=torch.int32, device=vertices.device)
        self.neighbours = []
        for step in steps:
            wanted = vertices + step
            at = torch.searchsorted(vertices, wanted, out_int32=True).clamp_(max=count - 1)
            found = vertices.index_select(0, at) == wanted
            after = F.pad(torch.where(found, at, count), (0, 1), value=count)
            before = torch.full_like(own, count).scatter_(0, after.long(), own)
            before[count] = count
            self.neighbours.append(torch.stack([own, after, before], 1))
        self.blur_weight = torch.tensor([1, 0.5, 0.5], device=vertices.device).expand(count + 1, 3).contiguous()

    def _set_splat(self, count: int) -> None:
        """Turn the table pixel -> corners round: the pixels of each vertex, with an empty vertex `count`."""
        n, corners = self.index.shape
        if self.index.device.type == "cpu":
            from scipy.sparse import csr_array  # noqa: PLC0415 - slow to import

            rows = torch.arange(0, n * corners + 1, corners, dtype=torch.int32).numpy()
            table = (self.weight.view(-1).numpy(), self.index.view(-1).numpy(), rows)
            turned = csr_array(table, shape=(n, count + 1)).tocsc()
            self.splat_pixel, self.splat_start, self.splat_weight = (
                torch.from_numpy(part) for part in (turned.indices, turned.indptr, turned.data)
            )
        else:
            vertex, entry = torch.sort(self.index.view(-1), stable=True)
            start = torch.arange(count + 2, dtype=torch.int32, device=vertex.device)
            self.splat_start = torch.searchsorted(vertex, start, out_int32=True)
            self.splat_pixel = torch.div(entry, corners, rounding_mode="floor").to(torch.int32)
            self.splat_weight = self.weight.view(-1).index_select(0, entry)

    def _normalize(self) -> None:
        """Fold `D^(-1/2)`, and the constant factor that the blur has left, into splat and slice."""
        n, corners = self.weight.shape
        gain = 1 / (1 + 2.0 ** (1 - corners))
        total = self(self.weight.new_ones(n, 1)).view(-1)
        norm = total.mul_(gain).add_(1e-20).rsqrt_().mul_(math.sqrt(gain))
        self.weight *= norm[:, None]
        self.splat_weight *= norm.index_select(0, self.splat_pixel)

    def __call__(self, values: Tensor) -> Tensor:
        """Filter (n,C) float32 values, every channel by itself."""
        on_lattice = F.embedding_bag(
            self.splat_pixel,
            values,
            self.splat_start,
            mode="sum",
            per_sample_weights=self.splat_weight,
            include_last_offset=True,
        )
        for rows in self.neighbours:
            on_lattice = F.embedding_bag(rows, on_lattice, mode="sum", per_sample_weights=self.blur_weight)
        return F.embedding_bag(self.index, on_lattice, mode="sum", per_sample_weights=self.weight)
