"""`recipes.infercam`."""

import pytest
import torch
from torch import Tensor, nn

from pseudolabel.cam import CAM, infer_response_map
from pseudolabel.masks import constant_background, scores_to_mask
from pseudolabel.recipes import infercam

LABELS = torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 0]])


@pytest.fixture
def image(generator: torch.Generator) -> Tensor:
    return torch.rand(3, 3, 24, 30, generator=generator)


def colours(x: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(x, 3)


def test_is_its_parts(image: Tensor) -> None:
    mask = infercam(image, colours, LABELS)
    maps = infer_response_map(colours, image, LABELS).response
    assert torch.equal(mask, scores_to_mask(constant_background(maps, 0.2)))
    assert [set(one.unique().tolist()) - {0} for one in mask] == [{1, 3}, {2}, set()]


def test_settings_arrive(image: Tensor) -> None:
    settings = {"scales": (1.0,), "split": False, "max_passes": 2, "flip": False}
    mask = infercam(image, colours, LABELS, background=0.6, **settings)
    maps = infer_response_map(colours, image, LABELS, **settings).response
    assert torch.equal(mask, scores_to_mask(constant_background(maps, 0.6)))
    assert not torch.equal(mask, infercam(image, colours, LABELS))


def test_refiner_gets_image_and_maps_and_adds_no_class(image: Tensor) -> None:
    maps = infer_response_map(colours, image, LABELS).response

    def refine(photo: Tensor, found: Tensor) -> Tensor:
        assert photo is image
        assert torch.equal(found, maps)
        return 1 - found / 2

    expected = (1 - maps / 2) * LABELS[:, :, None, None]
    mask = infercam(image, colours, LABELS, refine=refine)
    assert torch.equal(mask, scores_to_mask(constant_background(expected, 0.2)))
    assert not mask[2].any()


def test_a_classifier_of_normalised_images(image: Tensor) -> None:
    torch.manual_seed(0)
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), pool, nn.Linear(6, 3)).train()
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    cam = CAM(net)
    mask = infercam(image, lambda x: cam((x - mean) / std), LABELS)
    maps = infer_response_map(cam, (image - mean) / std, LABELS).response
    same = scores_to_mask(constant_background(maps, 0.2))
    # Resizing and normalising may be exchanged, up to rounding.
    assert (mask == same).double().mean() > 0.995
    assert net.training


def test_errors(image: Tensor) -> None:
    with pytest.raises(ValueError, match="labels: expected shape"):
        infercam(image, colours, LABELS[:2])
    with pytest.raises(ValueError, match="background: expected a finite number >= 0 and <= 1, got -1"):
        infercam(image, colours, LABELS, background=-1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'scale'"):
        infercam(image, colours, LABELS, scale=(1.0,))
