"""The lattice filter against its definition, against exact Gaussian sums, and in its own symmetries."""

import itertools
import math
from collections import defaultdict

import numpy as np
import pytest
import torch

from pseudolabel.refine import _permutohedral
from pseudolabel.refine._permutohedral import PermutohedralFilter, _name_steps, _SparseRows


def apply(kernel: PermutohedralFilter, values: torch.Tensor) -> torch.Tensor:
    return kernel.slice(kernel.splat_and_blur(values), slice(0, len(values)))


def slow_filter(features: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The textbook algorithm, one pixel at a time, with a dictionary of vertices."""
    n, d = features.shape
    spread = np.float32(math.sqrt(2 / 3) * (d + 1))
    corners, weights = [], []
    for feature in features.astype(np.float32):
        lifted = np.zeros(d + 1, np.float32)
        total = np.float32(0)
        for j in range(d, 0, -1):
            scaled = np.float32(feature[j - 1] * np.float32(float(spread) / math.sqrt(j * (j + 1))))
            lifted[j] = total - np.float32(j) * scaled
            total = np.float32(total + scaled)
        lifted[0] = total
        nearest = np.round(lifted * np.float32(1 / (d + 1))) * (d + 1)
        excess = int(nearest.sum()) // (d + 1)
        rest = lifted - nearest
        rank = np.array(
            [
                sum(rest[j] > rest[i] or (rest[j] == rest[i] and j < i) for j in range(d + 1))
                for i in range(d + 1)
            ]
        )
        rank += excess
        nearest[rank > d] -= d + 1
        nearest[rank < 0] += d + 1
        rank %= d + 1
        sorted_rest = np.empty(d + 1)
        sorted_rest[rank] = (lifted - nearest) / (d + 1)
        weight = [1 + sorted_rest[d] - sorted_rest[0]]
        weight += [sorted_rest[d - r] - sorted_rest[d + 1 - r] for r in range(1, d + 1)]
        corners.append(
            [tuple((nearest + np.where(rank <= d - r, r, r - d - 1)).astype(int)) for r in range(d + 1)]
        )
        weights.append(weight)

    def run(inputs: np.ndarray) -> np.ndarray:
        lattice: dict[tuple[int, ...], np.ndarray] = defaultdict(lambda: np.zeros(inputs.shape[1]))
        for pixel in range(n):
            for corner, weight in zip(corners[pixel], weights[pixel], strict=True):
                lattice[corner] = lattice[corner] + weight * inputs[pixel]
        for axis in range(d + 1):
            step = np.ones(d + 1, int)
            step[axis] -= d + 1
            old, lattice = dict(lattice), {}
            nothing = np.zeros(inputs.shape[1])
            for vertex, value in old.items():
                after, before = tuple(np.add(vertex, step)), tuple(np.subtract(vertex, step))
                lattice[vertex] = value + 0.5 * (old.get(after, nothing) + old.get(before, nothing))
        gain = 1 / (1 + 2.0**-d)
        return np.stack(
            [
                gain * sum(w * lattice[c] for c, w in zip(corners[i], weights[i], strict=True))
                for i in range(n)
            ]
        )

    norm = 1 / np.sqrt(run(np.ones((n, 1))) + 1e-20)
    return norm * run(norm * values)


@pytest.mark.parametrize("d", [1, 2, 3, 5])
@pytest.mark.parametrize("channels", [1, 3])
def test_equals_the_textbook_algorithm(d, channels, generator, device):
    features = torch.rand(d, 60, generator=generator) * 6
    features[:, :20] = features[:, :20].round()  # ties and repeated pixels
    values = torch.rand(60, channels, generator=generator)
    kernel = PermutohedralFilter(features.to(device), [6.0] * d)
    expected = slow_filter(features.T.numpy(), values.double().numpy())
    np.testing.assert_allclose(apply(kernel, values.to(device)).cpu().numpy(), expected, rtol=2e-5, atol=2e-6)


def test_is_close_to_the_exact_gaussian(generator):
    features = torch.rand(2, 400, generator=generator) * 8
    values = torch.rand(400, 1, generator=generator)
    exact = torch.exp(-0.5 * torch.cdist(features.T, features.T) ** 2)
    norm = exact.sum(1).rsqrt()
    exact = norm[:, None] * exact * norm
    answer = apply(PermutohedralFilter(features, [8.0, 8.0]), values)
    assert torch.corrcoef(torch.cat([answer, exact @ values], 1).T)[0, 1] > 0.97
    assert (answer - exact @ values).abs().mean() < 0.03


def test_is_symmetric_and_leaves_no_pixel_out(generator):
    features = torch.rand(5, 40, generator=generator) * 4
    matrix = apply(PermutohedralFilter(features, [4.0] * 5), torch.eye(40))
    # The blur runs over the axes in one order, so the lattice filter is symmetric only nearly.
    assert torch.corrcoef(torch.stack([matrix.flatten(), matrix.T.flatten()]))[0, 1] > 0.99
    assert float(matrix.min()) >= 0
    assert bool((matrix.diagonal() > 0).all())


def test_images_of_a_batch_do_not_mix(generator):
    features = torch.rand(2, 5, 90, generator=generator) * 5
    values = torch.rand(2, 90, 3, generator=generator)
    together = PermutohedralFilter(features.transpose(0, 1).flatten(1), [5.0] * 5, images=2)
    answer = apply(together, values.flatten(0, 1)).view(2, 90, 3)
    for image in range(2):
        alone = apply(PermutohedralFilter(features[image], [5.0] * 5), values[image])
        assert torch.equal(answer[image], alone)


@pytest.mark.parametrize("extent", [[0.5], [3.0, 2.0], [6.0, 4.5, 19.6, 19.6, 19.6], [300.0, 2.0, 80.0]])
def test_names_are_unique_within_reach(extent, generator):
    """No two vertices that pixels or the search for neighbours can touch share a name."""
    d = len(extent)
    steps, span = _name_steps(extent)
    assert sum(steps) == 0
    edge = torch.tensor(list(itertools.product(*[(0.0, size) for size in extent]))).T
    inside = torch.rand(d, 3000, generator=generator) * torch.tensor(extent)[:, None]
    features = torch.cat([edge, inside], 1)
    names, _ = _permutohedral._locate(features, torch.tensor(steps))
    first = torch.div(names, math.factorial(d + 1), rounding_mode="floor")
    order = torch.from_numpy(_permutohedral._step_orders(d))[names - first * math.factorial(d + 1)]
    # The same walk in coordinates: rounded points are not returned, so recover them from the features.
    unit = torch.ones(d + 1, d + 1, dtype=torch.long) - (d + 1) * torch.eye(d + 1, dtype=torch.long)
    lifted = _lift(features)
    nearest = torch.round(lifted / (d + 1)).long()
    vertex = -(nearest.T[:, :, None] * unit[None]).sum(1)
    points, called = [vertex], [first]
    for k in range(d, 0, -1):
        vertex = vertex + unit[order[:, k]]
        first = first + torch.tensor(steps)[order[:, k]]
        points.append(vertex)
        called.append(first)
    points_, called_ = torch.cat(points), torch.cat(called)
    for sign, axis in itertools.product((1, -1), range(d + 1)):  # and all their neighbours
        points.append(points_ + sign * unit[axis])
        called.append(called_ + sign * steps[axis])
    points_, called_ = torch.cat(points), torch.cat(called)
    assert bool((points_.sum(1) == 0).all())
    assert len(torch.unique(points_, dim=0)) == len(torch.unique(called_))
    assert len(torch.unique(torch.cat([points_, called_[:, None]], 1), dim=0)) == len(torch.unique(called_))
    assert int(called_.max() - called_.min()) < span


def _lift(features):
    d = len(features)
    lifted, total = [], torch.zeros_like(features[0])
    for j, scale in zip(range(d, 0, -1), reversed(_permutohedral._lift_scales(d)), strict=True):
        scaled = features[j - 1] * scale
        lifted.insert(0, total - scaled * j)
        total = total + scaled
    return torch.stack([total, *lifted])


def test_wide_names_give_the_same_answer(generator):
    """Names of 64 bits, taken where 32 do not suffice."""
    features = torch.rand(5, 200, generator=generator) * 3
    values = torch.rand(200, 2, generator=generator)
    assert _name_steps([3.0] * 5)[1] < 2**31 < _name_steps([300.0] * 5)[1]
    narrow = apply(PermutohedralFilter(features, [3.0] * 5), values)
    wide = apply(PermutohedralFilter(features, [300.0] * 5), values)
    torch.testing.assert_close(narrow, wide, rtol=1e-5, atol=1e-6)


def test_names_reach_far_enough_for_large_photos():
    steps, span = _name_steps(
        [8000 / 3, 6000 / 3, 255 / 3, 255 / 3, 255 / 3]
    )  # 48 megapixels, narrow kernels
    assert span * math.factorial(len(steps)) < 2**63


def test_names_that_cannot_be_told_apart_are_refused():
    with pytest.raises(ValueError, match="too many for the lattice; use a smaller image or a wider kernel"):
        PermutohedralFilter(torch.zeros(5, 4), [1e6] * 5)


def test_blocks_do_not_change_the_answer(generator, monkeypatch):
    features, values = torch.rand(5, 300, generator=generator) * 4, torch.rand(300, 2, generator=generator)
    whole = PermutohedralFilter(features, [4.0] * 5)
    monkeypatch.setattr(_permutohedral, "_CPU_BLOCK", 37)
    blocks = PermutohedralFilter(features, [4.0] * 5)
    lattice = whole.splat_and_blur(values)
    assert torch.equal(lattice, blocks.splat_and_blur(values))
    assert torch.equal(whole.slice(lattice, slice(11, 42)), apply(whole, values)[11:42])


def test_sparse_rows_turned_round(generator, device):
    dense = torch.rand(7, 5, generator=generator) * (torch.rand(7, 5, generator=generator) > 0.5)
    rows, columns = dense.nonzero(as_tuple=True)
    start = torch.searchsorted(rows, torch.arange(8), out_int32=True)
    parts = [part.to(device) for part in (columns.int(), start, dense[rows, columns])]
    matrix = _SparseRows(*parts, columns=5)
    for channels in (1, 3):
        right = torch.rand(5, channels, generator=generator)
        left = torch.rand(7, channels, generator=generator)
        torch.testing.assert_close((matrix @ right.to(device)).cpu(), dense @ right)
        torch.testing.assert_close((matrix.transposed() @ left.to(device)).cpu(), dense.T @ left)
        sort = matrix._transposed_by_sorting()
        torch.testing.assert_close((sort @ left.to(device)).cpu(), dense.T @ left)


def test_float32_operations_are_those_of_the_reference(device, generator):
    """Bit for bit: a fused multiplication or another rounding of a constant makes other vertices."""
    width, (sxy, srgb) = 97, (np.float32(67), np.float32(3))
    pixel = np.arange(width * 71)
    colours = torch.randint(0, 256, (3, len(pixel)), generator=generator).numpy().astype(np.float32) / srgb
    features = np.stack(
        [(pixel % width).astype(np.float32) / sxy, (pixel // width).astype(np.float32) / sxy, *colours]
    )
    spread = np.float32(math.sqrt(2 / 3) * 6)
    lifted, total = np.empty((6, len(pixel)), np.float32), np.zeros(len(pixel), np.float32)
    for j in range(5, 0, -1):
        scaled = features[j - 1] * np.float32(1 / math.sqrt((j + 1) * j) * float(spread))
        lifted[j] = total - np.float32(j) * scaled
        total = total + scaled
    lifted[0] = total
    inverse = np.float32(1 / 6)
    rest = lifted - np.round(inverse * lifted) * np.float32(6)
    height = np.sort(rest, 0)[::-1] * inverse
    steps, _ = _name_steps([float(row.max()) + 1 for row in features])
    _, weights = _permutohedral._locate(torch.from_numpy(features).to(device), torch.tensor(steps).to(device))
    np.testing.assert_array_equal(weights[:-1].cpu().numpy(), height[:-1] - height[1:])
    np.testing.assert_array_equal(weights[-1].cpu().numpy(), height[-1] + np.float32(1) - height[0])
