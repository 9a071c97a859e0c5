"""`choose_background`."""

import pytest
import torch

from pseudolabel.masks import choose_background, constant_background, power_background, scores_to_mask
from pseudolabel.metrics import confusion_matrix, iou_from_confusion


def scored_images(generator: torch.Generator) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Objects of which the maps see a blurred part, in two batches of different size."""
    batches = []
    for size in (12, 17):
        truth = torch.randint(0, 4, (2, size, size), generator=generator)
        truth[:, :2] = 255
        cam = torch.rand(2, 3, size, size, generator=generator) * 0.5
        hot = torch.nn.functional.one_hot(truth.where(truth != 255, 0), 4).permute(0, 3, 1, 2)[:, 1:]
        batches.append(((cam + 0.5 * hot * torch.rand(cam.shape, generator=generator)).clamp(max=1), truth))
    return batches


@pytest.mark.parametrize("absent", ["nan", "skip"])
@pytest.mark.parametrize(
    ("rule", "background", "candidates"),
    [("constant", constant_background, [0.5, 0.1, 0.3]), ("power", power_background, [0.5, 4, 1, 11])],
)
def test_equals_trying_every_candidate(rule, background, candidates, absent, generator) -> None:
    images = scored_images(generator)
    choice = choose_background(iter(images), rule=rule, candidates=candidates, absent=absent)
    curve = []
    for candidate in candidates:
        confusion = sum(
            confusion_matrix(scores_to_mask(background(cam, candidate)), truth, 4) for cam, truth in images
        )
        curve.append(float(iou_from_confusion(confusion, absent=absent).nanmean()))
    assert choice.curve == pytest.approx(curve, abs=1e-9)
    assert choice.candidates == tuple(candidates)
    assert choice.value == candidates[curve.index(max(curve))]
    assert choice.miou == pytest.approx(max(curve))
    assert choice.rule == rule


def test_default_candidates(generator: torch.Generator) -> None:
    images = scored_images(generator)
    assert len(choose_background(images).candidates) == 60
    assert choose_background(images, rule="power").value in choose_background(images, rule="power").candidates


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scored": []}, "scored: expected pairs of maps and truth, got none"),
        ({"candidates": []}, "candidates: expected at least one value"),
        ({"candidates": [1.5]}, "candidates: expected a finite number >= 0 and <= 1, got 1.5"),
        ({"rule": "power", "candidates": [-1]}, "candidates: expected a finite number"),
        ({"rule": "linear"}, "rule: expected one of"),
    ],
)
def test_errors(arguments, message) -> None:
    scored = [(torch.rand(1, 1, 2, 2), torch.ones(1, 2, 2, dtype=torch.int64))]
    with pytest.raises(ValueError, match=message):
        choose_background(**({"scored": scored} | arguments))
