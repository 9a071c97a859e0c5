import pytest
import torch

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


def test_every_class_is_a_solid_object(scenes):
    _, masks, labels = scenes
    for index in range(len(CLASSES) - 1):
        alone = labels[:, index] & (labels.sum(1) == 1)
        covered = (masks[alone] == index + 1).double().mean()
        assert 0.02 < covered < 0.4


def test_seeded_and_without_a_trace_in_the_global_generator():
    before = torch.random.get_rng_state()
    one, two, other = (draw_scenes(3, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0], other[0])
