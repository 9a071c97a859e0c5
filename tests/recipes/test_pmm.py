"""`recipes.pmm`."""

import torch

from pseudolabel.cam import normalize_cam
from pseudolabel.masks import proportional_pseudo_mask
from pseudolabel.recipes import pmm


def test_is_its_parts(generator: torch.Generator) -> None:
    image, cam = torch.rand(2, 3, 9, 7, generator=generator), 5 * torch.randn(2, 3, 9, 7, generator=generator)
    labels = torch.tensor([[1, 0, 1], [0, 1, 0]])
    mask = pmm(image, cam, labels, alpha=4)
    expected = proportional_pseudo_mask(image, normalize_cam(cam, "minmax-zero"), labels, alpha=4)
    assert torch.equal(mask, expected)
    assert set(mask[0].unique().tolist()) <= {0, 1, 3}


def test_settings_arrive(generator: torch.Generator) -> None:
    image, cam = torch.rand(1, 3, 9, 7, generator=generator), torch.randn(1, 2, 9, 7, generator=generator)
    labels = torch.ones(1, 2)
    settings = {"alpha": 2, "scale": 0.1, "threshold": 0.3, "crf": None}
    expected = proportional_pseudo_mask(image, normalize_cam(cam, "minmax-zero"), labels, **settings)
    assert torch.equal(pmm(image, cam, labels, **settings), expected)
