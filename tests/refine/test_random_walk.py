"""The random walk and its affinities: section 6.4 of the PMM specification."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from pseudolabel.refine import (
    RandomWalk,
    affinity_from_features,
    affinity_labels,
    affinity_offsets,
    random_walk,
)
from pseudolabel.refine.random_walk import _pairs

CPU = torch.device("cpu")
seeds = st.integers(0, 1000)


def case(
    seed: int = 0, size: tuple[int, int] = (7, 9), radius: int = 3, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(2, 3, *size, generator=generator, dtype=dtype)
    features = 0.3 * torch.randn(2, 4, *size, generator=generator, dtype=dtype)
    return scores, affinity_from_features(features, radius)


def tensors(data: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in data.items() if value.ndim}


def pairs_of(affinity: torch.Tensor, radius: int) -> list[tuple[int, int, int]]:
    """Channel, start and end pixel of each pair inside the map, one after the other."""
    height, width = affinity.shape[-2:]
    return [
        (channel, y * width + x, (y + dy) * width + x + dx)
        for channel, (dy, dx) in enumerate(affinity_offsets(radius))
        for y in range(height)
        for x in range(width)
        if y + dy < height and 0 <= x + dx < width
    ]


def dense(affinity: torch.Tensor, radius: int) -> torch.Tensor:
    """The matrix (N,N) of one image's affinities (O,h,w), pair by pair."""
    pixels = affinity[0].numel()
    matrix = torch.eye(pixels, dtype=affinity.dtype)
    flat = affinity.flatten(1)
    for channel, start, end in pairs_of(affinity, radius):
        matrix[start, end] = matrix[end, start] = flat[channel, start]
    return matrix


def dense_walk(scores: torch.Tensor, matrix: torch.Tensor, beta: float, log_steps: int) -> torch.Tensor:
    transition = matrix**beta
    transition = transition / transition.sum(0, keepdim=True)
    for _ in range(log_steps):
        transition = transition @ transition
    return (scores.flatten(1) @ transition).view_as(scores)


# ------------------------------------------------------------------------------------------ golden files


@pytest.mark.parametrize("number", range(4))
def test_golden_pairs(golden: Callable, number: int) -> None:
    data = golden("pmm/public_affinity")
    radius, (height, width) = int(data[f"pairs{number}_radius"]), data[f"pairs{number}_hw"].tolist()
    inner = _pairs((height, width), radius, True, CPU)
    assert torch.equal(inner, inner[:1].expand_as(inner)), "an inner pixel has all of its partners"
    start = inner[0].flatten().nonzero()[:, 0]
    np.testing.assert_array_equal(start, data[f"pairs{number}_from"])
    end = torch.cat([start + dy * width + dx for dy, dx in affinity_offsets(radius)])
    np.testing.assert_array_equal(end, data[f"pairs{number}_to"])


@pytest.mark.parametrize("number", range(2))
def test_golden_labels(golden: Callable, number: int) -> None:
    data = golden("pmm/public_affinity")
    radius, mask = int(data[f"lab{number}_radius"]), torch.from_numpy(data[f"lab{number}_label"])[None]
    labels = affinity_labels(mask, radius, inner_only=True)
    inner = _pairs(mask.shape[1:], radius, True, CPU)[0]
    for label, name in enumerate(("bg", "fg", "neg")):
        np.testing.assert_array_equal(labels[0][:, inner] == label, data[f"lab{number}_{name}"] == 1)
    assert labels[0][:, ~inner].eq(255).all()


@pytest.mark.parametrize("number", range(2))
def test_golden_walk(golden: Callable, number: int) -> None:
    """From the network's taps to the walked scores; the second map is small, its radius shrinks to 3."""
    data = tensors(golden("pmm/public_affinity"))
    taps = [F.elu(F.conv2d(data[f"aff{number}_conv{k + 1}"], data[f"w_f8_{k}"])) for k in (3, 4, 5)]
    features = F.elu(F.conv2d(torch.cat(taps, 1), data["w_f9"]))
    affinity = affinity_from_features(features, inner_only=True)
    radius = {34: 5, 12: 3}[affinity.shape[1]]
    assert radius == (5, 3)[number]

    size = affinity.shape[2:]
    inner = _pairs(size, radius, True, CPU)[0]
    torch.testing.assert_close(affinity[:, :, inner], data[f"aff{number}_aff"], atol=4e-6, rtol=0)
    assert affinity[:, :, ~inner].eq(0).all()
    torch.testing.assert_close(dense(affinity[0], radius), data[f"aff{number}_dense"], atol=4e-6, rtol=0)

    # 64 steps in float32 and six squarings in float32 are each about 1e-5 from the result in float64.
    pixels = math.prod(size)
    each_pixel = torch.eye(pixels).view(1, pixels, *size)
    transition = random_walk(each_pixel, affinity).flatten(2)[0]
    torch.testing.assert_close(transition, data[f"aff{number}_trans_b8_t6"], atol=2e-5, rtol=0)
    walked = random_walk(data[f"aff{number}_score8"][None], affinity)[0]
    torch.testing.assert_close(walked, data[f"aff{number}_rw"], atol=2e-5, rtol=0)


# ------------------------------------------------------------------------------------------ offsets, pairs


def test_offsets() -> None:
    assert affinity_offsets(3) == [
        *[(0, 1), (0, 2)],
        *[(1, -2), (1, -1), (1, 0), (1, 1), (1, 2)],
        *[(2, -2), (2, -1), (2, 0), (2, 1), (2, 2)],
    ]
    assert [len(affinity_offsets(radius)) for radius in (2, 3, 5)] == [4, 12, 34]
    offsets = affinity_offsets(6)
    both = {*offsets, *((-dy, -dx) for dy, dx in offsets)}
    assert len(both) == 2 * len(offsets), "each pair once"
    assert both == {(dy, dx) for dy in range(-5, 6) for dx in range(-5, 6) if 0 < dy * dy + dx * dx < 36}


def test_hand_computed_affinity() -> None:
    features = torch.tensor([[[[0.0, 1.0], [3.0, 3.0]], [[0.0, 1.0], [0.0, 2.0]]]])
    affinity = affinity_from_features(features, 2)  # offsets: right, below left, below, below right
    distance = torch.full((4, 2, 2), math.inf)
    distance[0, 0, 0], distance[0, 1, 0] = 1.0, 1.0
    distance[1, 0, 1] = 1.5
    distance[2, 0, 0], distance[2, 0, 1] = 1.5, 1.5
    distance[3, 0, 0] = 2.5
    torch.testing.assert_close(affinity[0], torch.exp(-distance))


def test_hand_computed_labels() -> None:
    mask = torch.tensor([[[0, 0, 2], [1, 255, 2]]])
    right, below_left, below, below_right = affinity_labels(mask, 2)[0].tolist()
    assert right == [[0, 2, 255], [255, 255, 255]]
    assert below_left == [[255, 2, 255], [255, 255, 255]]
    assert below == [[2, 255, 1], [255, 255, 255]]
    assert below_right == [[255, 2, 255], [255, 255, 255]]


def test_other_ignore_index() -> None:
    mask = torch.tensor([[[0, -1, 4, 4, 255, 255]]])
    assert affinity_labels(mask, 2, ignore_index=-1)[0, 0, 0].tolist() == [-1, -1, 1, 2, 1, -1]


@given(seed=seeds, size=st.tuples(st.integers(1, 12), st.integers(1, 12)), radius=st.integers(2, 5))
def test_all_pairs(seed: int, size: tuple[int, int], radius: int) -> None:
    """Against a loop over pairs, for maps smaller than the radius too."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(1, 3, *size, generator=generator, dtype=torch.float64)
    mask = torch.tensor([0, 1, 2, 255])[torch.randint(0, 4, (1, *size), generator=generator)]
    affinity = affinity_from_features(features, radius)[0]
    labels = affinity_labels(mask, radius)[0].flatten(1)
    expected, expected_labels = torch.zeros_like(affinity).flatten(1), torch.full_like(labels, 255)
    f, m = features.flatten(2)[0], mask.flatten()
    for channel, start, end in pairs_of(affinity, radius):
        expected[channel, start] = torch.exp(-(f[:, start] - f[:, end]).abs().mean())
        if 255 not in (m[start], m[end]):
            expected_labels[channel, start] = 2 if m[start] != m[end] else int(m[start] > 0)
    torch.testing.assert_close(affinity.flatten(1), expected)
    assert torch.equal(labels, expected_labels)


def test_inner_pairs_are_some_of_all_pairs() -> None:
    features = torch.randn(1, 3, 12, 13)
    everywhere, inner = (affinity_from_features(features, 5, inner_only=only) for only in (False, True))
    assert torch.equal(inner[inner > 0], everywhere[inner > 0])
    assert 0 < (inner > 0).sum() < (everywhere > 0).sum()
    assert dense(inner[0], 5)[0].sum() == 1, "the official pairs leave the first pixel alone"


def test_inner_pairs_start_where_the_neighbourhood_is_whole() -> None:
    for size, radius, expected in (
        ((7, 8), 3, (slice(0, 5), slice(2, 6))),  # two pixels to the left, to the right and below
        ((6, 8), 2, (slice(0, 5), slice(1, 7))),  # 6 rows are too few for a radius of 3
    ):
        starts = affinity_from_features(torch.rand(1, 2, *size), 3, inner_only=True)[0] > 0
        inside = torch.zeros(size, dtype=torch.bool)
        inside[expected] = True
        assert torch.equal(starts, inside.expand(len(affinity_offsets(radius)), -1, -1))


@pytest.mark.parametrize(("size", "offsets"), [((11, 12), 34), ((10, 30), 22), ((7, 7), 12), ((5, 9), 4)])
def test_radius_shrinks_for_inner_pairs(size: tuple[int, int], offsets: int) -> None:
    assert affinity_from_features(torch.rand(1, 2, *size), 5, inner_only=True).shape[1] == offsets
    labels = affinity_labels(torch.zeros(1, *size, dtype=torch.uint8), 5, inner_only=True)
    assert labels.shape == (1, offsets, *size)
    assert labels.eq(0).any()
    assert affinity_from_features(torch.rand(1, 2, *size), 5).shape[1] == 34


# ------------------------------------------------------------------------------------------ the walk


def test_hand_computed_walk() -> None:
    # Two pixels with affinity 0.5: T = [[2, 1], [1, 2]] / 3 for beta = 1, one step, then two.
    affinity = torch.zeros(1, 4, 1, 2)
    affinity[0, 0, 0, 0] = 0.5
    scores = torch.tensor([[[[1.0, 0.0]]]])
    walk = lambda **settings: random_walk(scores, affinity, **settings).flatten()  # noqa: E731
    torch.testing.assert_close(walk(beta=1, log_steps=0), torch.tensor([2 / 3, 1 / 3]))
    torch.testing.assert_close(walk(beta=1, log_steps=1), torch.tensor([5 / 9, 4 / 9]))
    torch.testing.assert_close(walk(beta=2, log_steps=0), torch.tensor([0.8, 0.2]))
    torch.testing.assert_close(walk(beta=1, log_steps=6), torch.tensor([0.5, 0.5]))


@given(
    seed=seeds,
    size=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    radius=st.integers(2, 5),
    beta=st.sampled_from([0.5, 1, 8]),
    log_steps=st.integers(0, 4),
)
def test_equals_the_dense_walk(
    seed: int, size: tuple[int, int], radius: int, beta: float, log_steps: int
) -> None:
    scores, affinity = case(seed, size, radius)
    walked = random_walk(scores, affinity, beta=beta, log_steps=log_steps)
    for image in range(2):
        expected = dense_walk(scores[image], dense(affinity[image], radius), beta, log_steps)
        torch.testing.assert_close(walked[image], expected)


@given(seed=seeds, log_steps=st.integers(0, 6))
def test_properties(seed: int, log_steps: int) -> None:
    scores, affinity = case(seed)
    walk = lambda maps: random_walk(maps, affinity, log_steps=log_steps)  # noqa: E731
    walked = walk(scores)
    assert (walked <= scores.amax((2, 3), keepdim=True) + 1e-12).all()
    assert (walked >= scores.amin((2, 3), keepdim=True) - 1e-12).all()
    torch.testing.assert_close(walk(torch.full_like(scores, 0.7)), torch.full_like(scores, 0.7))
    other = scores.flip(2).sqrt()
    torch.testing.assert_close(walk(2 * scores - other), 2 * walked - walk(other))
    assert torch.equal(walk(scores.flip(1)), walked.flip(1))


@given(seed=seeds)
def test_mirrored_image(seed: int) -> None:
    """All pairs inside the map have no preferred side. (The official inner pairs have one.)"""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(1, 3, 6, 8, generator=generator, dtype=torch.float64)
    scores = torch.rand(1, 2, 6, 8, generator=generator, dtype=torch.float64)
    walk = lambda f, s: random_walk(s, affinity_from_features(f, 3))  # noqa: E731
    walked = walk(features, scores)
    for axes in ([2], [3], [2, 3]):
        torch.testing.assert_close(walk(features.flip(axes), scores.flip(axes)), walked.flip(axes))


def test_no_way_across_an_edge() -> None:
    features = torch.zeros(1, 1, 6, 10)
    features[..., 5:] = 50.0
    scores = torch.zeros(1, 1, 6, 10)
    scores[..., 2, 2] = 1
    walked = random_walk(scores, affinity_from_features(features), log_steps=8)
    assert walked[..., 5:].max() < 1e-12
    assert walked[..., :5].std() < 1e-3, "and it is level on its side"


def test_no_pairs_and_single_pixel() -> None:
    scores, affinity = case()
    assert torch.equal(random_walk(scores, torch.zeros_like(affinity)), scores)
    one = torch.rand(1, 2, 1, 1)
    torch.testing.assert_close(random_walk(one, affinity_from_features(torch.rand(1, 3, 1, 1))), one)
    assert random_walk(scores[:0], affinity[:0]).shape == (0, 3, 7, 9)


def test_pairs_that_leave_the_map_are_not_read() -> None:
    scores, affinity = case()
    full = affinity.where(_pairs(affinity.shape[2:], 3, False, CPU), 0.9)
    assert not torch.equal(full, affinity)
    assert torch.equal(random_walk(scores, full), random_walk(scores, affinity))


def test_labels() -> None:
    scores, affinity = case()
    labels = torch.tensor([[0, 1], [1, 1]])
    walked = random_walk(scores, affinity, labels)
    everything = random_walk(scores, affinity)
    assert walked[0, 1].eq(0).all()
    torch.testing.assert_close(walked[0, ::2], everything[0, ::2])
    torch.testing.assert_close(walked[1], everything[1])
    torch.testing.assert_close(
        random_walk(scores, affinity, torch.zeros(2, 2))[:, 0], everything[:, 0], msg="the background walks"
    )


@pytest.mark.parametrize("beta", [0.5, 1.0, 8.0])
def test_gradcheck(beta: float) -> None:
    scores, affinity = (value[:1] for value in case(size=(3, 4), radius=2))
    affinity = affinity.clone()
    affinity[0, 0, 0, 0] = 0  # no pair, where a root has no finite slope
    scores, affinity = scores.requires_grad_(), affinity.requires_grad_()
    walk = lambda s, a: random_walk(s, a.where(a > 0, 0), beta=beta, log_steps=2)  # noqa: E731
    walk(scores, affinity).sum().backward()
    assert affinity.grad.isfinite().all()
    inside = affinity.detach() > 0
    assert torch.autograd.gradcheck(
        lambda s, a: walk(s, torch.zeros_like(affinity).masked_scatter(inside, a)),
        (scores, affinity.detach()[inside].requires_grad_()),
    )


def test_gradient_reaches_the_features() -> None:
    features = torch.rand(1, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda f: affinity_from_features(f, 3), (features,))
    assert torch.autograd.gradcheck(lambda f: affinity_from_features(f, 2, inner_only=True), (features,))


def test_inputs_stay_as_they_are() -> None:
    scores, affinity = case()
    before = scores.clone(), affinity.clone()
    random_walk(scores, affinity)
    assert torch.equal(scores, before[0])
    assert torch.equal(affinity, before[1])


def test_batch_equals_singles() -> None:
    scores, affinity = case()
    walked = random_walk(scores, affinity)
    features, mask = torch.rand(2, 3, 6, 7), torch.randint(0, 3, (2, 6, 7))
    for one in range(2):
        some = slice(one, one + 1)
        torch.testing.assert_close(walked[some], random_walk(scores[some], affinity[some]))
        assert torch.equal(affinity_from_features(features)[some], affinity_from_features(features[some]))
        assert torch.equal(affinity_labels(mask)[some], affinity_labels(mask[some]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    scores, affinity = case(dtype=torch.float32)
    scores, affinity = scores.to(dtype), affinity.to(dtype)
    walked = random_walk(scores, affinity)
    assert walked.dtype == dtype
    exact = random_walk(scores.double(), affinity.double())
    torch.testing.assert_close(walked.double(), exact, atol=4e-3, rtol=4e-3)
    features = torch.rand(1, 3, 6, 7).to(dtype)
    ours = affinity_from_features(features)
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(ours.double(), affinity_from_features(features.double()))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_mask_dtypes(dtype: torch.dtype) -> None:
    mask = torch.randint(0, 3, (1, 6, 7))
    mask[0, 0, 0] = 255
    labels = affinity_labels(mask.to(dtype))
    assert labels.dtype == torch.int64
    assert torch.equal(labels, affinity_labels(mask))


def test_compiles_to_one_graph() -> None:
    scores, affinity = case(dtype=torch.float32)
    features, mask = torch.rand(1, 3, 6, 7), torch.randint(0, 3, (1, 6, 7))
    compiled = torch.compile(random_walk, fullgraph=True, backend="eager")
    torch.testing.assert_close(
        compiled(scores, affinity, log_steps=1), random_walk(scores, affinity, log_steps=1)
    )
    for function, value in ((affinity_from_features, features), (affinity_labels, mask)):
        compiled = torch.compile(function, fullgraph=True, backend="eager")
        assert torch.equal(compiled(value, 3), function(value, 3))


def test_module_equals_function() -> None:
    scores, affinity = case()
    labels = torch.tensor([[0, 1], [1, 1]])
    module = RandomWalk(beta=2, log_steps=1)
    assert torch.equal(
        module(scores, affinity, labels), random_walk(scores, affinity, labels, beta=2, log_steps=1)
    )
    assert torch.equal(RandomWalk()(scores, affinity), random_walk(scores, affinity))
    assert not torch.allclose(module(scores, affinity), RandomWalk()(scores, affinity))
    assert repr(module) == "RandomWalk(beta=2, log_steps=1)"


def test_devices(device: torch.device) -> None:
    scores, affinity = case(dtype=torch.float32)
    features, mask = torch.rand(1, 3, 6, 7), torch.randint(0, 3, (1, 6, 7))
    labels = torch.tensor([[0, 1], [1, 1]])
    walked = random_walk(scores.to(device), affinity.to(device), labels.to(device))
    assert walked.device.type == device.type
    torch.testing.assert_close(walked.cpu(), random_walk(scores, affinity, labels), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        affinity_from_features(features.to(device)).cpu(), affinity_from_features(features)
    )
    assert torch.equal(affinity_labels(mask.to(device)).cpu(), affinity_labels(mask))


SCORES, AFFINITY = case()
FEATURES, MASK = torch.rand(1, 2, 6, 6), torch.zeros(1, 6, 6, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: random_walk(SCORES[0], AFFINITY), ValueError, r"scores: expected shape \(B, K, h, w\)"),
        (lambda: random_walk(SCORES[..., 1:], AFFINITY), ValueError, "scores: .* with w=9 from affinity"),
        (lambda: random_walk(SCORES.long(), AFFINITY), TypeError, "scores: expected a floating-point"),
        (lambda: random_walk(SCORES, AFFINITY > 0), TypeError, "affinity: expected a floating-point"),
        (
            lambda: random_walk(SCORES, AFFINITY[:, 1:]),
            ValueError,
            r"affinity: expected a channel for each offset of a radius \(\[4, 12, .* for 2..6\), got 11",
        ),
        (lambda: random_walk(SCORES, AFFINITY[:, :0]), ValueError, "affinity: expected a channel .* got 0"),
        (lambda: random_walk(SCORES, 2 * AFFINITY), ValueError, r"affinity: expected values in \[0, 1\]"),
        (lambda: random_walk(SCORES, AFFINITY / 0), ValueError, r"affinity: expected values in \[0, 1\]"),
        (lambda: random_walk(SCORES, AFFINITY, beta=0), ValueError, "beta: expected a finite number > 0"),
        (
            lambda: random_walk(SCORES, AFFINITY, log_steps=-1),
            ValueError,
            "log_steps: expected an integer >= 0",
        ),
        (lambda: RandomWalk(log_steps=1.5), ValueError, "log_steps: expected an integer >= 0"),
        (lambda: RandomWalk(beta=-1), ValueError, "beta: expected a finite number > 0"),
        (
            lambda: random_walk(SCORES, AFFINITY, torch.ones(2, 3)),
            ValueError,
            "scores: expected 4 channels, the background and the classes of labels, got 3",
        ),
        (lambda: random_walk(SCORES, AFFINITY, torch.ones(1, 2)), ValueError, "labels: .* with B=2"),
        (lambda: random_walk(SCORES, AFFINITY, torch.full((2, 2), 3)), ValueError, "labels: .* multi-hot"),
        (lambda: affinity_offsets(1), ValueError, "radius: expected an integer >= 2, got 1"),
        (lambda: affinity_from_features(FEATURES[0]), ValueError, r"features: expected shape \(B, D, h, w\)"),
        (lambda: affinity_from_features(FEATURES.long()), TypeError, "features: expected a floating-point"),
        (lambda: affinity_from_features(FEATURES, 2.0), ValueError, "radius: expected an integer >= 2"),
        (
            lambda: affinity_from_features(FEATURES[..., :4], inner_only=True),
            ValueError,
            r"features: expected sides of at least 5 for pairs with inner_only, got \(6, 4\)",
        ),
        (lambda: affinity_labels(MASK[0]), ValueError, r"mask: expected shape \(B, H, W\)"),
        (lambda: affinity_labels(MASK.float()), TypeError, "mask: expected an integer tensor"),
        (lambda: affinity_labels(MASK - 1), ValueError, "mask: expected labels >= 0 or ignore_index 255"),
        (lambda: affinity_labels(MASK, 1), ValueError, "radius: expected an integer >= 2"),
        (lambda: affinity_labels(MASK, ignore_index=2), ValueError, "ignore_index: expected another value"),
        (
            lambda: affinity_labels(MASK[:, :4], inner_only=True),
            ValueError,
            "mask: expected sides of at least",
        ),
    ],
)
def test_errors(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


def test_features_that_have_no_affinity() -> None:
    with pytest.raises(ValueError, match=r"features: expected finite values, got 0 NaN and 1 infinite"):
        affinity_from_features(torch.tensor([[[[0.0, math.inf, 1.0]]]]), 2)
    with pytest.raises(ValueError, match=r"features: expected at least one channel, got \(1, 0, 3, 3\)"):
        affinity_from_features(torch.rand(1, 0, 3, 3), 2)
