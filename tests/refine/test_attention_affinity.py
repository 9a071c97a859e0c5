"""Affinities of attention and features, maps spread along them, boxes around parts."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor

from pseudolabel.refine import (
    AttentionAffinity,
    attention_affinity,
    box_mask,
    feature_affinity,
    pixel_correlation,
    propagate_affinity,
)

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
seeds = st.integers(0, 1000)


def attention(seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Three layers of two heads, 2 + 3 x 4 tokens: (B,L,heads,N,N)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 2, 14, 14, generator=generator, dtype=torch.float64).softmax(-1).to(dtype)


def maps(seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(2, 3, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        dtype
    )


def features(seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 5, 3, 4, generator=generator, dtype=torch.float64).to(dtype)


LABELS = torch.tensor([[1, 0, 1], [0, 1, 0]])

# ------------------------------------------------------------------------------------------ attention


def test_hand_computed_affinity() -> None:
    # Columns of [[1, 3], [1, 1]] / 8 sum to 1/4 and 1/2: [[1/2, 3/4], [1/2, 1/4]], rows to 5/4 and 3/4.
    given_ = torch.tensor([[1.0, 3.0], [1.0, 1.0]], dtype=torch.float64).view(1, 1, 2, 2) / 8
    once = torch.tensor([[[2 / 5, 3 / 5], [2 / 3, 1 / 3]]], dtype=torch.float64)
    settings = {"num_prefix_tokens": 0, "iterations": 1}
    torch.testing.assert_close(attention_affinity(given_, symmetric=False, **settings), once)
    symmetric = torch.tensor([[[2 / 5, 19 / 30], [19 / 30, 1 / 3]]], dtype=torch.float64)
    torch.testing.assert_close(attention_affinity(given_, **settings), symmetric)
    torch.testing.assert_close(attention_affinity(given_, power=2, **settings), symmetric @ symmetric)
    plain = attention_affinity(given_, num_prefix_tokens=0, iterations=0, symmetric=False)
    torch.testing.assert_close(plain, given_[:, 0])


def test_steps_as_published() -> None:
    """Loops over layers, with the sums in the published order: columns, then rows; three times."""
    a = attention()
    matrix = sum(a[:, layer, head, 2:, 2:] for layer in (1, 2) for head in (0, 1)) / 4
    for _ in range(3):
        matrix = matrix / matrix.sum(1, keepdim=True)
        matrix = matrix / matrix.sum(2, keepdim=True)
    matrix = (matrix + matrix.mT) / 2
    found = attention_affinity(a, layers=range(-2, 0), num_prefix_tokens=2)
    torch.testing.assert_close(found, matrix)
    for other in (list(a.unbind(1)), a.unbind(1), list(a.unbind(1))[-2:]):
        layers = range(-2, 0)
        torch.testing.assert_close(attention_affinity(other, layers=layers, num_prefix_tokens=2), matrix)
    single = attention_affinity(a[:, 2], num_prefix_tokens=2)
    torch.testing.assert_close(single, attention_affinity(a, layers=[2], num_prefix_tokens=2))


@given(seed=seeds)
def test_many_iterations_give_sums_of_one(seed: int) -> None:
    affinity = attention_affinity(attention(seed), num_prefix_tokens=2, iterations=60)
    one = torch.ones(2, 12, dtype=affinity.dtype)
    torch.testing.assert_close(affinity.sum(1), one)
    torch.testing.assert_close(affinity.sum(2), one)
    torch.testing.assert_close(affinity, affinity.mT)


@given(seed=seeds)
def test_patches_and_heads_may_change_places(seed: int) -> None:
    a = attention(seed)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    with_prefix = torch.cat([torch.arange(2), 2 + order])
    found = attention_affinity(a, num_prefix_tokens=2)
    moved = attention_affinity(a.flip(1, 2)[..., with_prefix, :][..., with_prefix], num_prefix_tokens=2)
    torch.testing.assert_close(moved, found[:, order][:, :, order])


def test_batch_equals_singles() -> None:
    a = attention()
    together = attention_affinity(a, num_prefix_tokens=2)
    singles = [attention_affinity(a[b : b + 1], num_prefix_tokens=2) for b in range(2)]
    torch.testing.assert_close(together, torch.cat(singles))


def test_patch_that_nothing_attends_to() -> None:
    a = torch.full((1, 1, 3, 3), 1 / 3, dtype=torch.float64)
    a[..., 2] = 0
    found = attention_affinity(a, num_prefix_tokens=0)
    assert found.isfinite().all()
    assert found[0, :2, :2].eq(0.5).all()


def test_gradient_of_rows_without_attention() -> None:
    attention = torch.tensor([[[[0.5, 0.5, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]]], requires_grad=True)
    attention_affinity(attention, num_prefix_tokens=0).sum().backward()
    assert attention.grad.isfinite().all()


def test_module_equals_function() -> None:
    settings = {"layers": [0, -1], "num_prefix_tokens": 2, "iterations": 2, "symmetric": False, "power": 3}
    module = AttentionAffinity(**settings)
    assert torch.equal(module(attention()), attention_affinity(attention(), **settings))
    assert repr(module) == (
        "AttentionAffinity(layers=(0, -1), num_prefix_tokens=2, iterations=2, symmetric=False, power=3)"
    )
    assert torch.equal(AttentionAffinity(num_prefix_tokens=2)(attention()).mT, AttentionAffinity(
        layers=iter([0, 1, 2]), num_prefix_tokens=2)(attention()))  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": [3]}, r"layers: expected indices in -3..2 of the 3 layers of attention, got \[3\]"),
        ({"num_prefix_tokens": -1}, "num_prefix_tokens: expected an integer >= 0, got -1"),
        ({"num_prefix_tokens": 14}, "attention: expected patches behind 14 tokens in front, got 14 tokens"),
        ({"iterations": -1}, "iterations: expected an integer >= 0, got -1"),
        ({"iterations": 1.5}, "iterations: expected an integer >= 0, got 1.5"),
        ({"power": 0}, "power: expected an integer >= 1, got 0"),
    ],
)
def test_attention_errors(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_affinity(attention(), **change)


def test_scores_are_no_probabilities() -> None:
    with pytest.raises(ValueError, match=r"attention: expected values in \[0, 1\], got values from -"):
        attention_affinity(torch.randn(1, 2, 5, 5))


# ------------------------------------------------------------------------------------------ features


@given(seed=seeds, threshold=st.floats(0, 0.9), power=st.floats(0.3, 4))
def test_affinity_of_features(seed: int, threshold: float, power: float) -> None:
    f = features(seed)
    found = feature_affinity(f, threshold, power, normalize=False)
    rows = feature_affinity(f, threshold, power)
    torch.testing.assert_close(rows.sum(2), torch.ones(2, 12, dtype=f.dtype))
    torch.testing.assert_close(rows, found / found.sum(2, keepdim=True))
    torch.testing.assert_close(found, found.mT)
    assert found.diagonal(dim1=1, dim2=2).eq(1).all()
    flat = f.flatten(2)
    for i, j in ((0, 1), (3, 11), (7, 2)):
        cosine = torch.cosine_similarity(flat[:, :, i], flat[:, :, j])
        expected = torch.where(cosine >= threshold, cosine.clamp(min=0) ** power, 0)
        torch.testing.assert_close(found[:, i, j], expected)
    torch.testing.assert_close(feature_affinity(f * 7, threshold, power), rows)


def test_pixel_correlation_is_one_of_them() -> None:
    found = propagate_affinity(maps(), feature_affinity(features()), times=1)
    torch.testing.assert_close(found, pixel_correlation(maps(), features(), eps=1e-12))


def test_places_without_features() -> None:
    f = features()
    f[:, :, 1, 2] = 0
    affinity = feature_affinity(f)
    assert affinity.isfinite().all()
    assert torch.equal(affinity[:, 6], torch.eye(12, dtype=f.dtype)[6].expand(2, -1))
    torch.testing.assert_close(propagate_affinity(maps(), affinity)[:, :, 1, 2], maps()[:, :, 1, 2])


def test_feature_errors() -> None:
    with pytest.raises(ValueError, match="threshold: expected a finite number >= 0 and <= 1, got"):
        feature_affinity(features(), -0.1)
    with pytest.raises(ValueError, match="power: expected a finite number > 0, got 0"):
        feature_affinity(features(), power=0)
    with pytest.raises(ValueError, match=r"features: expected shape \(B, D, h, w\)"):
        feature_affinity(features().flatten(2))
    with pytest.raises(TypeError, match="features: expected a floating-point tensor"):
        feature_affinity(features().long())


# ------------------------------------------------------------------------------------------ spreading


@given(seed=seeds, times=st.integers(1, 4))
def test_spreading_is_a_power_of_the_matrix(seed: int, times: int) -> None:
    affinity = attention_affinity(attention(seed), num_prefix_tokens=2, symmetric=False)
    found = propagate_affinity(maps(seed), affinity, times=times)
    power = torch.linalg.matrix_power(affinity, times)
    expected = torch.einsum("bij,bcj->bci", power, maps(seed).flatten(2)).view_as(found)
    torch.testing.assert_close(found, expected)
    whole = attention_affinity(attention(seed), num_prefix_tokens=2, symmetric=False, power=times)
    torch.testing.assert_close(propagate_affinity(maps(seed), whole, times=1), found)


def test_boxes_as_published() -> None:
    """The squared matrix, its columns outside of the boxes set to 0, times the map; class by class."""
    affinity, x = attention_affinity(attention(), num_prefix_tokens=2), maps()
    boxes = box_mask(x, 0.9)
    assert 0 < boxes.sum() < boxes.numel()
    found = propagate_affinity(x, affinity, boxes=boxes)
    for b in range(2):
        for c in range(3):
            matrix = (affinity[b] @ affinity[b]) * boxes[b, c].view(1, -1)
            torch.testing.assert_close(found[b, c].flatten(), matrix @ x[b, c].flatten())
    weights = boxes.to(x.dtype)
    torch.testing.assert_close(propagate_affinity(x, affinity, boxes=weights), found)


def test_present_classes_alone() -> None:
    affinity, x = attention_affinity(attention(), num_prefix_tokens=2), maps()
    boxes = box_mask(x, 0.7)
    every = propagate_affinity(x, affinity, boxes=boxes)
    some = propagate_affinity(x, affinity, LABELS, boxes=boxes)
    torch.testing.assert_close(some, every * LABELS[:, :, None, None])
    assert propagate_affinity(x, affinity, LABELS * 0).eq(0).all()
    assert torch.equal(box_mask(x, 0.7, LABELS), boxes & LABELS.bool()[:, :, None, None])
    assert not box_mask(x, 0.7, LABELS * 0).any()


def test_constant_maps_stay() -> None:
    affinity = feature_affinity(features())
    constant = torch.full((2, 1, 3, 4), 0.37, dtype=torch.float64)
    torch.testing.assert_close(propagate_affinity(constant, affinity, times=5), constant)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"maps": torch.zeros(2, 3, 4, 4)},
            r"affinity: expected \(B, P, P\) with P = 4 x 4 = 16 places of maps, got \(2, 12, 12\)",
        ),
        ({"maps": torch.zeros(3, 3, 3, 4)}, "affinity: expected shape"),
        ({"maps": torch.full((2, 3, 3, 4), torch.nan)}, "maps: expected finite values, got 72 NaN"),
        ({"times": 0}, "times: expected an integer >= 1, got 0"),
        ({"boxes": torch.ones(2, 1, 3, 4)}, "boxes: expected shape"),
        ({"labels": torch.ones(2, 2)}, "labels: expected shape"),
        ({"labels": torch.full((2, 3), 2)}, "labels: expected a multi-hot tensor"),
    ],
)
def test_spreading_errors(change: dict, message: str) -> None:
    affinity = attention_affinity(attention(), num_prefix_tokens=2)
    with pytest.raises(ValueError, match=message):
        propagate_affinity(**{"maps": maps(), "affinity": affinity, **change})


# ------------------------------------------------------------------------------------------ boxes


def boxes_one_by_one(x: np.ndarray, threshold: float) -> np.ndarray:
    high = (x > threshold * x.max()) & (x > 0)
    parts, _ = ndimage.label(high, np.ones((3, 3)))
    mask = np.zeros(x.shape, bool)
    for part in ndimage.find_objects(parts):
        mask[part] = True
    return mask


@given(
    seed=seeds, size=st.tuples(st.integers(1, 12), st.integers(1, 12)), threshold=st.floats(0, 0.95),
)  # fmt: skip
def test_boxes_against_a_loop(seed: int, size: tuple[int, int], threshold: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(2, 3, *size, generator=generator, dtype=torch.float64) ** 3 - 0.05
    found = box_mask(x, threshold)
    for b in range(2):
        for c in range(3):
            np.testing.assert_array_equal(found[b, c], boxes_one_by_one(x[b, c].numpy(), threshold))


def test_box_of_a_winding_part() -> None:
    """A snake of one place in width, far longer than a side: its box is the whole map but the margin."""
    snake = torch.zeros(14, 13)
    snake[1:-1:2, 1:-1] = 1
    for row, column in zip(range(2, 12, 2), [11, 1] * 3, strict=False):
        snake[row, column] = 1
    expected = torch.zeros_like(snake, dtype=torch.bool)
    expected[1:12, 1:12] = True
    assert torch.equal(box_mask(snake[None, None])[0, 0, :13], expected[:13])
    np.testing.assert_array_equal(box_mask(snake[None, None])[0, 0], boxes_one_by_one(snake.numpy(), 0.4))


def test_maps_without_anything() -> None:
    x = torch.stack([torch.zeros(3, 4), -torch.rand(3, 4), torch.ones(3, 4)])[None]
    assert box_mask(x).flatten(2).sum(2).tolist() == [[0, 0, 12]]
    assert box_mask(torch.zeros(2, 0, 3, 4)).shape == (2, 0, 3, 4)
    assert box_mask(torch.zeros(0, 3, 3, 4)).shape == (0, 3, 3, 4)


def test_box_errors() -> None:
    with pytest.raises(ValueError, match=r"threshold: expected a number in \[0, 1\), got 1"):
        box_mask(maps(), 1)
    with pytest.raises(ValueError, match="threshold: expected a finite number >= 0, got -1"):
        box_mask(maps(), -1)
    with pytest.raises(ValueError, match="maps: expected finite values"):
        box_mask(maps() * torch.inf)


# ------------------------------------------------------------------------------------------ all of them

ALIKE, BOXES = feature_affinity(features()), maps(1) > 0.5
CALLS = {
    "attention": (lambda a: attention_affinity(a, num_prefix_tokens=2), attention),
    "attention, power": (lambda a: attention_affinity(a, num_prefix_tokens=2, power=3), attention),
    "features": (lambda f: feature_affinity(f, 0.2, 0.5), features),
    "spreading, maps": (lambda x: propagate_affinity(x, ALIKE), maps),
    "spreading, boxes": (
        lambda x: propagate_affinity(x, ALIKE, boxes=BOXES),
        maps,
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_gradcheck(name: str) -> None:
    function, make = CALLS[name]
    assert torch.autograd.gradcheck(function, make().requires_grad_())


def test_gradients_to_affinity_and_present_maps() -> None:
    affinity = feature_affinity(features()).detach().requires_grad_()
    x = maps().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, a: propagate_affinity(x, a, LABELS), (x, affinity))


def test_no_gradient_is_infinite() -> None:
    f = features()
    f[:, :, 0] = 0
    f.requires_grad_()
    feature_affinity(f, 0.3, 0.5).square().sum().backward()
    assert f.grad.isfinite().all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes_and_devices(dtype: torch.dtype, device: torch.device) -> None:
    working = torch.float64 if dtype == torch.float64 else torch.float32
    a, f, x = (make(dtype=dtype).to(device) for make in (attention, features, maps))
    by_attention, by_features = attention_affinity(a, num_prefix_tokens=2), feature_affinity(f, 0.1)
    assert by_attention.dtype == by_features.dtype == working
    assert by_attention.device == by_features.device == a.device
    torch.testing.assert_close(by_attention, attention_affinity(a.to(working), num_prefix_tokens=2))
    torch.testing.assert_close(by_features, feature_affinity(f.to(working), 0.1))
    out = propagate_affinity(x, by_features, boxes=box_mask(x))
    assert (out.dtype, out.device) == (dtype, x.device)
    exact = propagate_affinity(x.to(working), by_features, boxes=box_mask(x.to(working)))
    torch.testing.assert_close(out, exact.to(dtype))


def test_autocast_changes_nothing() -> None:
    x, affinity = maps(dtype=torch.float32), feature_affinity(features(dtype=torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(propagate_affinity(x, affinity), propagate_affinity(x.clone(), affinity))
        inside = propagate_affinity(x, affinity)
    assert torch.equal(inside, propagate_affinity(x, affinity))


@pytest.mark.parametrize("name", CALLS)
def test_compiles_to_one_graph(name: str) -> None:
    function, make = CALLS[name]
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(make()), function(make()))


def test_features_and_heads_are_there() -> None:
    with pytest.raises(ValueError, match=r"features: expected finite values, got 1 NaN"):
        feature_affinity(torch.tensor([0.0, torch.nan]).view(1, 1, 1, 2))
    with pytest.raises(ValueError, match=r"attention: expected at least one head, got \(1, 0, 5, 5\)"):
        attention_affinity(torch.rand(1, 0, 5, 5))
    with pytest.raises(TypeError, match=r"attention: expected a list or tuple, got NoneType"):
        attention_affinity(None)
