"""Tokens laid out as maps, position embeddings, class maps of patch tokens."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from pseudolabel.cam import (
    TopKPool,
    class_activation_map,
    interpolate_position_embedding,
    patch_token_cam,
    tokens_to_map,
    top_k_pool,
)

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
sides = st.integers(1, 7)


def case(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """Two prefix tokens and 3 x 4 patches of 5 channels; 4 classes and 2 backgrounds."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (2, 14, 5), (4, 5), (2, 5)
    tokens, weight, background = (torch.randn(s, generator=generator, dtype=dtype) for s in shapes)
    return tokens, weight, background, torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1]])


# ------------------------------------------------------------------------------------------ layout


@given(h=sides, w=sides, prefix=st.integers(0, 5))
def test_each_token_has_its_place(h: int, w: int, prefix: int) -> None:
    tokens = torch.arange(2.0 * (prefix + h * w) * 3).view(2, prefix + h * w, 3)
    maps = tokens_to_map(tokens, (h, w), num_prefix_tokens=prefix)
    assert maps.shape == (2, 3, h, w)
    for y in range(h):
        for x in range(w):
            assert torch.equal(maps[:, :, y, x], tokens[:, prefix + y * w + x])
    assert maps.data_ptr() == tokens[:, prefix:].data_ptr(), "a view"
    last = tokens[:, prefix:].view(2, h, w, 3)
    assert torch.equal(tokens_to_map(last), maps)
    assert torch.equal(tokens_to_map(last, (h, w), num_prefix_tokens=prefix), maps)


@given(rows=st.integers(1, 40), columns=st.integers(1, 40), patch=st.integers(4, 16), round_up=st.booleans())
def test_grid_of_a_size_is_the_true_one_or_an_error(
    rows: int, columns: int, patch: int, round_up: bool
) -> None:
    """Image sides that are no multiple of the patch are cut or padded."""
    size = (rows * patch + (rows * 7) % patch, columns * patch + (columns * 5) % patch)
    grid = tuple(math.ceil(side / patch) if round_up else side // patch for side in size)
    tokens = torch.zeros(1, 1 + grid[0] * grid[1], 1)
    try:
        found = str(tuple(tokens_to_map(tokens, size=size).shape[2:]))
    except ValueError as error:  # ambiguous: the true grid is among those named
        found = str(error)
    assert str(grid) in found


@pytest.mark.parametrize("scale", [0.5, 0.75, 1, 1.25, 1.5, 2])
def test_grid_of_a_size_for_scaled_views(scale: float) -> None:
    size = (375, 500)
    grid = tuple(int(side * scale) // 16 for side in size)
    assert tokens_to_map(torch.zeros(1, 1 + grid[0] * grid[1], 2), size=size).shape[2:] == grid


@pytest.mark.parametrize(
    ("count", "settings", "message"),
    [
        (26, {"grid": (4, 6)}, "expected 25 tokens, 1 in front and 4 x 6 = 24 patches, got 26; num_prefix"),
        (26, {"grid": (4, 6)}, "num_prefix_tokens=2 would fit this grid, grid=(5, 5) would fit 1 token in"),
        (29, {"grid": (4, 6), "num_prefix_tokens": 1}, "num_prefix_tokens=5 would fit this grid"),
        (
            24,
            {"grid": (4, 6)},
            "expected 25 tokens, 1 in front and 4 x 6 = 24 patches, got 24; num_",
        ),
        (24, {"grid": (4, 6)}, "num_prefix_tokens=0 would fit this grid"),
        (17, {"grid": (64, 64)}, "grid=(4, 4) would fit 1 token in front"),
        (18, {"grid": (64, 64)}, "got 18; is the grid the image size over the patch size?"),
        (18, {"grid": (4, 4), "num_prefix_tokens": 0}, "grid=(3, 6) would fit 0 tokens in front"),
        (17, {"size": (64, 128)}, "got 17, 1 in front and 16 patches, which make none; give grid"),
        (3, {"size": (64, 64)}, "which make [(1, 2), (2, 1)]; give grid, or another num_prefix_tokens"),
        (25, {}, "grid: expected exactly one of grid and size, got grid=None and size=None"),
        (25, {"grid": (4, 6), "size": (4, 6)}, "grid: expected exactly one of grid and size"),
        (25, {"grid": (0, 6)}, "grid: expected two integers (height, width) >= 1, got (0, 6)"),
        (25, {"size": (4,)}, "size: expected two integers (height, width) >= 1, got (4,)"),
        (
            25,
            {"grid": (4, 6), "num_prefix_tokens": -1},
            "num_prefix_tokens: expected an integer >= 0, got",
        ),
        (25, {"grid": (4, 6), "num_prefix_tokens": True}, "num_prefix_tokens: expected an integer >= 0"),
    ],
)
def test_wrong_counts_are_errors_with_all_numbers(count: int, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        tokens_to_map(torch.zeros(1, count, 2), **settings)


def test_wrong_layouts() -> None:
    with pytest.raises(ValueError, match=r"\(B, 4, 6, D\) for grid \(4, 6\), got \(1, 6, 4, 2\)"):
        tokens_to_map(torch.zeros(1, 6, 4, 2), (4, 6))
    with pytest.raises(ValueError, match=r"tokens: expected shape \(B, N, D\)"):
        tokens_to_map(torch.zeros(6, 4), (2, 3))
    with pytest.raises(TypeError, match="tokens: expected a floating-point tensor"):
        tokens_to_map(torch.zeros(1, 7, 4, dtype=torch.int64), (2, 3))


# ------------------------------------------------------------------------------------------ positions


def test_equal_grids_change_nothing() -> None:
    embedding = torch.randn(1, 13, 4)
    assert interpolate_position_embedding(embedding, (3, 4), (3, 4)) is embedding


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("new", [(5, 3), (2, 7), (4, 3), (1, 1)])
def test_positions_are_resized_maps(new: tuple[int, int], antialias: bool) -> None:
    embedding = torch.randn(1, 2 + 12, 4, dtype=torch.float64)
    found = interpolate_position_embedding(embedding, (3, 4), new, 2, antialias=antialias)
    assert torch.equal(found[:, :2], embedding[:, :2])
    maps = tokens_to_map(embedding, (3, 4), num_prefix_tokens=2)
    expected = F.interpolate(maps, size=new, mode="bicubic", antialias=antialias)
    torch.testing.assert_close(tokens_to_map(found, new, num_prefix_tokens=2), expected)
    single = interpolate_position_embedding(embedding[0], (3, 4), new, 2, antialias=antialias)
    assert torch.equal(single, found[0])


def test_positions_of_a_transposed_grid() -> None:
    """As many patches, another shape: not the embeddings as they are."""
    embedding = torch.randn(12, 4)
    found = interpolate_position_embedding(embedding, (3, 4), (4, 3), 0)
    assert found.shape == embedding.shape
    assert not torch.allclose(found, embedding)


def test_position_errors_and_gradient() -> None:
    embedding = torch.randn(1, 13, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda e: interpolate_position_embedding(e, (3, 4), (2, 5)), embedding)
    with pytest.raises(ValueError, match="embedding: expected 10 tokens, 1 in front and 3 x 3 = 9 patches"):
        interpolate_position_embedding(embedding, (3, 3), (4, 4))
    with pytest.raises(ValueError, match="new_grid: expected two integers"):
        interpolate_position_embedding(embedding, (3, 4), (0, 4))
    with pytest.raises(ValueError, match=r"embedding: expected shape \(1, N, D\)"):
        interpolate_position_embedding(torch.zeros(2, 13, 2), (3, 4), (4, 4))


# ------------------------------------------------------------------------------------------ class maps


def test_linear_maps_are_class_activation_maps() -> None:
    tokens, weight, _, labels = case()
    maps = tokens_to_map(tokens, (3, 4), num_prefix_tokens=2)
    bias = torch.randn(4, dtype=tokens.dtype)
    expected = class_activation_map(maps, weight, bias)
    torch.testing.assert_close(patch_token_cam(maps, weight, bias=bias), expected)
    convolution = weight[:, :, None, None]
    found = patch_token_cam(tokens, convolution, labels, grid=(3, 4), num_prefix_tokens=2, bias=bias)
    torch.testing.assert_close(found, expected * labels[:, :, None, None])


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("with_background", [False, True])
def test_softmax_over_present_and_background(cosine: bool, with_background: bool) -> None:
    tokens, weight, background, labels = case()
    background = background if with_background else None
    found = patch_token_cam(
        tokens, weight, labels, grid=(3, 4), num_prefix_tokens=2,
        cosine=cosine, background=background, temperature=0.3,
    )  # fmt: skip
    for b in range(2):
        for place in range(12):
            f, names, scores = tokens[b, 2 + place], [], []
            for c in labels[b].nonzero().flatten().tolist():
                names.append(c)
                scores.append(weight[c] @ f / (weight[c].norm() * f.norm() if cosine else 1))
            others = [] if background is None else list(background)
            scores += [row @ f / (row.norm() * f.norm() if cosine else 1) for row in others]
            shares = (torch.stack(scores) / 0.3).softmax(0)
            expected = torch.zeros(4, dtype=tokens.dtype)
            expected[names] = shares[: len(names)]
            torch.testing.assert_close(found[b, :, place // 4, place % 4], expected)


def test_absent_classes_take_no_share() -> None:
    tokens, weight, background, labels = case()
    settings = {"grid": (3, 4), "num_prefix_tokens": 2, "background": background, "temperature": 0.1}
    found = patch_token_cam(tokens, weight, labels, **settings)
    other = torch.where(labels.any(0)[:, None], weight, 1e6)
    torch.testing.assert_close(patch_token_cam(tokens, other, labels, **settings), found)
    alone = patch_token_cam(tokens[:1], weight[[0, 2]], **settings)
    torch.testing.assert_close(found[:1, [0, 2]], alone)


def test_images_without_classes() -> None:
    tokens, weight, background, labels = case()
    settings = {"grid": (3, 4), "num_prefix_tokens": 2, "temperature": 1e-4}
    for rows in (torch.zeros_like(labels), labels * torch.tensor([[1], [0]])):
        for texts in (None, background):
            found = patch_token_cam(tokens, weight, rows, background=texts, **settings)
            assert found.isfinite().all()
            assert not found[1].any()
    assert patch_token_cam(tokens, weight[:0], **settings).shape == (2, 0, 3, 4)


def test_cosine_knows_no_length() -> None:
    tokens, weight, _, _ = case()
    settings = {"grid": (3, 4), "num_prefix_tokens": 2, "cosine": True}
    found = patch_token_cam(tokens, weight, **settings)
    torch.testing.assert_close(patch_token_cam(3 * tokens, 7 * weight, **settings), found)
    assert found.abs().max() <= 1 + 1e-9
    assert patch_token_cam(torch.zeros_like(tokens), weight, **settings).eq(0).all()


def test_classes_and_images_may_change_places() -> None:
    tokens, weight, background, labels = case()
    settings = {"grid": (3, 4), "num_prefix_tokens": 2, "background": background, "temperature": 0.2}
    found = patch_token_cam(tokens, weight, labels, **settings)
    order = torch.tensor([3, 1, 0, 2])
    moved = patch_token_cam(tokens, weight[order], labels[:, order], **settings)
    torch.testing.assert_close(moved, found[:, order])
    singles = [patch_token_cam(tokens[b : b + 1], weight, labels[b : b + 1], **settings) for b in range(2)]
    torch.testing.assert_close(torch.cat(singles), found)


def test_cam_errors() -> None:
    tokens, weight, background, labels = case()
    grid = {"grid": (3, 4), "num_prefix_tokens": 2}
    with pytest.raises(ValueError, match="background: expected a temperature beside it"):
        patch_token_cam(tokens, weight, background=background, **grid)
    with pytest.raises(ValueError, match="bias: expected none with cosine"):
        patch_token_cam(tokens, weight, bias=weight[:, 0], cosine=True, **grid)
    with pytest.raises(ValueError, match="bias: expected none beside background"):
        patch_token_cam(tokens, weight, bias=weight[:, 0], background=background, temperature=1.0, **grid)
    with pytest.raises(ValueError, match="temperature: expected a finite number > 0, got 0"):
        patch_token_cam(tokens, weight, temperature=0, **grid)
    with pytest.raises(ValueError, match="features: expected 11 tokens, 2 in front and 3 x 3 = 9 patches"):
        patch_token_cam(tokens, weight, grid=(3, 3), num_prefix_tokens=2)
    with pytest.raises(ValueError, match=r"weight: expected shape \(C, D\) with D=5 from features"):
        patch_token_cam(tokens, weight[:, 1:], **grid)
    with pytest.raises(ValueError, match="labels: expected shape"):
        patch_token_cam(tokens, weight, labels[:, :3], **grid)
    with pytest.raises(ValueError, match="labels: expected a multi-hot tensor"):
        patch_token_cam(tokens, weight, labels * 2, **grid)
    with pytest.raises(ValueError, match=r"features: expected maps of grid \(4, 3\), got \(2, 5, 3, 4\)"):
        patch_token_cam(torch.zeros(2, 5, 3, 4), weight.float(), grid=(4, 3))
    with pytest.raises(TypeError, match="weight: expected a floating-point tensor"):
        patch_token_cam(tokens, weight.long(), **grid)


# ------------------------------------------------------------------------------------------ pooling


@given(seed=st.integers(0, 999), k=st.integers(1, 12), decay=st.floats(0.3, 1))
def test_pool_is_a_weighted_mean_of_the_highest(seed: int, k: int, decay: float) -> None:
    cam = torch.randn(2, 3, 3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = top_k_pool(cam, k, decay=decay)
    for b in range(2):
        for c in range(3):
            values = sorted(cam[b, c].flatten().tolist(), reverse=True)[:k]
            weights = [decay**rank for rank in range(k)]
            mean = sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
            assert found[b, c].item() == pytest.approx(mean)
    assert (found <= top_k_pool(cam, 1) + 1e-12).all()
    assert (found >= top_k_pool(cam) - 1e-12).all()


def test_pool_limits() -> None:
    cam = torch.randn(2, 3, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(top_k_pool(cam), cam.mean((2, 3)))
    torch.testing.assert_close(top_k_pool(cam, 12), cam.mean((2, 3)))
    assert torch.equal(top_k_pool(cam, 1), cam.amax((2, 3)))
    torch.testing.assert_close(top_k_pool(cam, decay=1e-12), cam.amax((2, 3)))
    assert torch.equal(TopKPool(4, decay=0.9)(cam), top_k_pool(cam, 4, decay=0.9))
    assert repr(TopKPool(4, decay=0.9)) == "TopKPool(k=4, decay=0.9)"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "k: expected an integer >= 1, got 0"),
        ({"k": 13}, r"k: expected at most the 12 places of cam \(1, 2, 3, 4\), got 13"),
        ({"k": 2.5}, "k: expected an integer >= 1, got 2.5"),
        ({"decay": 0}, "decay: expected a finite number > 0 and <= 1, got 0"),
        ({"decay": 1.5}, "decay: expected a finite number > 0 and <= 1, got 1.5"),
    ],
)
def test_pool_errors(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        top_k_pool(torch.zeros(1, 2, 3, 4), **settings)


# ------------------------------------------------------------------------------------------ all of them

CALLS = {
    "tokens_to_map": lambda t, w, g: tokens_to_map(t, (3, 4), num_prefix_tokens=2),
    "of a size": lambda t, w, g: tokens_to_map(t, size=(48, 64), num_prefix_tokens=2),
    "positions": lambda t, w, g: interpolate_position_embedding(t[0], (3, 4), (5, 6), 2),
    "linear": lambda t, w, g: patch_token_cam(t, w, grid=(3, 4), num_prefix_tokens=2),
    "text": lambda t, w, g: patch_token_cam(
        t, w, size=(48, 64), num_prefix_tokens=2, cosine=True, background=g, temperature=0.2
    ),
    "pool": lambda t, w, g: top_k_pool(t.view(2, 1, 14, 5), 6, decay=0.9),
}


@pytest.mark.parametrize("name", CALLS)
def test_gradcheck(name: str) -> None:
    tokens, weight, background, _ = case()
    assert torch.autograd.gradcheck(
        CALLS[name], [value.requires_grad_() for value in (tokens, weight, background)]
    )


def test_gradcheck_with_labels() -> None:
    tokens, weight, background, labels = case()

    def cam(t: torch.Tensor, w: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        settings = {"grid": (3, 4), "num_prefix_tokens": 2, "temperature": 0.5}
        return patch_token_cam(t, w, labels, background=g, **settings)

    assert torch.autograd.gradcheck(cam, [value.requires_grad_() for value in (tokens, weight, background)])


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes_and_devices(name: str, dtype: torch.dtype, device: torch.device) -> None:
    arguments = [value.to(device, dtype) for value in case()[:3]]
    found = CALLS[name](*arguments)
    assert found.dtype == dtype
    assert found.device == arguments[0].device
    exact = CALLS[name](*(value.double() for value in arguments)).to(dtype)
    tolerance = {} if dtype == torch.float64 else {"atol": 2e-3, "rtol": 1e-2}
    torch.testing.assert_close(found, exact, **tolerance)


@pytest.mark.parametrize("name", CALLS)
def test_compiles_to_one_graph(name: str) -> None:
    arguments = case(dtype=torch.float32)[:3]
    compiled = torch.compile(CALLS[name], fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*arguments), CALLS[name](*arguments))
