"""Present classes gathered and scattered, and resizing."""

from collections.abc import Callable

import pytest
import torch

from pseudolabel._maps import (
    clamp_keeping_slope,
    gather_present,
    label_places,
    place_labels,
    present_classes,
    resize,
    scatter_present,
    stretch,
    stretched_mean,
    working_dtype,
)

LABELS = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]])


def test_present_classes_are_ascending_and_padded() -> None:
    index, valid = present_classes(LABELS)
    assert valid.tolist() == [[True, True], [False, False], [True, False]]
    assert index[valid].tolist() == [1, 3, 0]
    for labels in (LABELS.bool(), LABELS.float()):
        assert torch.equal(present_classes(labels)[0], index)


def test_many_classes_stay_in_order(generator: torch.Generator) -> None:
    labels = torch.rand(50, 200, generator=generator) < 0.3
    index, valid = present_classes(labels)
    for row, kept, label in zip(index, valid, labels, strict=True):
        assert torch.equal(row[kept], label.nonzero().flatten())


def test_nothing_present() -> None:
    for labels in (torch.zeros(2, 3), torch.zeros(2, 0), torch.zeros(0, 3)):
        index, valid = present_classes(labels)
        assert index.shape == valid.shape == (len(labels), 0)
        maps = torch.rand(*labels.shape, 4, 5)
        gathered = gather_present(maps, index)
        assert scatter_present(gathered, index, valid, labels.shape[1]).eq(0).all()


def test_scatter_undoes_gather() -> None:
    maps = torch.rand(3, 4, 2, 2)
    index, valid = present_classes(LABELS)
    back = scatter_present(gather_present(maps, index), index, valid, 4)
    assert torch.equal(back, maps * LABELS[:, :, None, None])


def test_resize() -> None:
    maps = torch.rand(1, 2, 3, 4)
    assert resize(maps, (3, 4)) is maps
    assert resize(maps, (6, 5)).shape == (1, 2, 6, 5)
    assert resize(maps[:, :0], (6, 5)).shape == (1, 0, 6, 5)


def test_working_dtype() -> None:
    for dtype, expected in ((torch.float16, torch.float32), (torch.bfloat16, torch.float32)):
        assert working_dtype(torch.zeros(1, dtype=dtype)) == expected
    assert working_dtype(torch.zeros(1, dtype=torch.float64)) == torch.float64


def test_stretch_from_corner_to_corner() -> None:
    maps = torch.tensor([[[[0.0, 0.9]]]])
    torch.testing.assert_close(stretch(maps, (1, 4))[0, 0, 0], torch.tensor([0.0, 0.3, 0.6, 0.9]))
    assert stretch(maps, (1, 2)) is maps
    assert stretch(torch.rand(2, 0, 3, 4), (6, 5)).shape == (2, 0, 6, 5)


def test_stretched_mean(generator: torch.Generator) -> None:
    maps = torch.rand(2, 3, 4, 7, generator=generator, dtype=torch.float64)
    for size in ((4, 7), (16, 16), (3, 20), (1, 1)):
        torch.testing.assert_close(stretched_mean(maps, size), stretch(maps, size).mean((2, 3)))


def test_places_become_labels() -> None:
    index, _ = present_classes(torch.tensor([[0, 1, 1], [1, 0, 0]]))
    assert place_labels(index)[0].tolist() == [0, 2, 3]
    mask = torch.tensor([[[0, 1, 2]], [[1, 1, 0]]])
    assert label_places(mask, index).tolist() == [[[0, 2, 3]], [[1, 1, 0]]]


BOUNDS = [(0, 1), (0, None), (None, 1), (None, None)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("low", "high"), BOUNDS)
def test_clamp_has_the_values_of_torch(low: int | None, high: int | None, dtype: torch.dtype) -> None:
    x = torch.tensor([-torch.inf, -1, 0, 0.3, 1, 1.5, torch.inf, torch.nan], dtype=dtype)
    expected = x if low is high is None else x.clamp(low, high)
    torch.testing.assert_close(clamp_keeping_slope(x, low, high), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("low", "high"), BOUNDS)
def test_clamp_has_a_slope_at_its_bounds(low: int | None, high: int | None, flat_clamp: Callable) -> None:
    x = torch.tensor([-1.0, 0, 0.3, 1, 1.5], requires_grad=True)
    inside = [low is None, True, True, True, high is None]
    with flat_clamp():
        (gradient,) = torch.autograd.grad(clamp_keeping_slope(x, low, high).sum(), x)
    assert gradient.tolist() == inside


def test_clamp_compiles_to_one_graph() -> None:
    compiled = torch.compile(clamp_keeping_slope, fullgraph=True, backend="eager")
    assert compiled(torch.tensor([-1.0, 0.5, 2]), 0, 1).tolist() == [0, 0.5, 1]
