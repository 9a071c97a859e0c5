import pytest
import torch

from pseudolabel.cli import _scenes
from pseudolabel.cli._scenes import CLASSES, draw_scenes


@pytest.fixture(scope="module")
def scenes():
    return draw_scenes(200, (64, 80), generator=torch.Generator().manual_seed(1))


def test_shapes_and_ranges(scenes):
    images, masks, labels = scenes
    assert images.shape == (200, 3, 64, 80)
    assert 0 <= images.min() < 0.2
    assert 0.8 < images.max() <= 1
    assert masks.shape == (200, 64, 80)
    assert masks.dtype == torch.int64
    assert labels.shape == (200, len(CLASSES) - 1)
    assert labels.dtype == torch.bool


def test_labels_are_what_the_masks_show(scenes):
    _, masks, labels = scenes
    for mask, row in zip(masks, labels, strict=True):
        assert (mask.unique()[1:] - 1).tolist() == row.nonzero()[:, 0].tolist()
        assert 1 <= row.sum() <= 3


def test_classes_are_imbalanced_and_two_co_occur(scenes):
    labels = scenes[2].double()
    share = labels.mean(0)
    assert share.max() > 3 * share.min() > 0
    beetle, leaf = labels[:, 1], labels[:, 3]
    assert leaf[beetle == 1].mean() > 1.5 * leaf[beetle == 0].mean()


@pytest.mark.parametrize(
    ("shape", "inside", "outside"),
    [
        (_scenes._fish, [(0, 0), (-0.9, 0.2), (0.9, 0)], [(-0.5, 0.4), (-1.1, 0), (0.3, 0.6)]),
        (_scenes._beetle, [(0, 0), (0.9, 0), (0, -0.6)], [(0, 0.8), (0.8, 0.6)]),
        (_scenes._star, [(0, 0), (0.9, 0), (-0.4, 0)], [(-0.7, 0), (0.8, 0.3)]),
        (_scenes._leaf, [(0, 0), (0.9, 0), (0, 0.5)], [(0, 0.6), (0.9, 0.3)]),
        (_scenes._ring, [(0.7, 0), (0, -0.7), (-0.9, 0)], [(0, 0), (1, 0), (0.3, 0.1)]),
        (_scenes._house, [(0, 0), (0.6, 0.8), (0, -0.9)], [(0.6, -0.5), (0, -1.05), (0.8, 0.5)]),
    ],
)
def test_shapes_at_points(shape, inside, outside):
    body, mark, pattern = shape(*torch.tensor(inside + outside).float().T)
    assert (body[: len(inside)] < 0).all()
    assert (body[len(inside) :] > 0).all()
    assert ((pattern >= 0) & (pattern <= 1)).all()
    u, v = torch.linspace(-1.2, 1.2, 200).expand(200, 200), torch.linspace(-1.2, 1.2, 200)[:, None]
    body, mark, _ = shape(u, v.expand(200, 200))
    assert 0.05 < ((mark < 0) & (body < 0)).sum() / (body < 0).sum() < 0.5  # the mark is the smaller part


def test_a_mask_covers_the_body_not_the_mark_alone(scenes):
    _, masks, labels = scenes
    alone = labels.sum(1) == 1
    for index in range(len(CLASSES) - 1):
        covered = (masks[alone & labels[:, index]] == index + 1).double().mean()
        assert 0.04 < covered < 0.3, CLASSES[index + 1]


def test_seeded_and_without_a_trace_in_the_global_generator():
    before = torch.random.get_rng_state()
    one, two, other = (draw_scenes(3, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0], other[0])
