"""`scores_to_mask` and `dual_threshold_mask`."""

import pytest
import torch

from pseudolabel.masks import constant_background, dual_threshold_mask, scores_to_mask

SCORES = torch.tensor([[[[0.5, 0.2, 0.4]], [[0.5, 0.7, 0.1]], [[0.5, 0.7, 0.5]]]])


def test_highest_score_wins_and_ties_go_first() -> None:
    assert scores_to_mask(SCORES).tolist() == [[[0, 1, 2]]]
    assert scores_to_mask(SCORES).dtype == torch.int64


def test_confidence() -> None:
    assert scores_to_mask(SCORES, confidence=0.6).tolist() == [[[255, 1, 255]]]
    assert scores_to_mask(SCORES, confidence=0.6, ignore_index=-1).tolist() == [[[-1, 1, -1]]]
    assert scores_to_mask(SCORES, confidence=0.5).tolist() == [[[0, 1, 2]]], "a score equal to it is kept"


def test_dual_threshold_hand_computed() -> None:
    cam = torch.tensor([[[[0.9, 0.2, 0.05, 0.0]], [[0.0, 0.1, 0.0, 0.31]]]])
    assert dual_threshold_mask(cam).tolist() == [[[1, 255, 0, 2]]]
    assert dual_threshold_mask(cam, high=0.15, low=0.15).tolist() == [[[1, 1, 0, 2]]]


def test_dual_threshold_agrees_with_its_two_masks(generator: torch.Generator) -> None:
    cam = torch.rand(2, 3, 6, 6, generator=generator) ** 3
    mask = dual_threshold_mask(cam, high=0.4, low=0.2)
    strict, loose = (scores_to_mask(constant_background(cam, value)) for value in (0.4, 0.2))
    assert torch.equal(mask[mask != 255], strict[mask != 255])
    assert torch.equal(mask == 255, (strict == 0) & (loose > 0))


def test_dual_threshold_resizes_to_the_image_and_refines() -> None:
    cam, image = torch.rand(1, 2, 3, 4), torch.rand(1, 3, 6, 8)
    seen = []

    def refine(given: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append((given is image, scores[0, 0, 0, 0].item()))
        return scores.flip(-1)

    mask = dual_threshold_mask(cam, image, high=0.5, low=0.25, refine=refine)
    assert seen == [(True, 0.5), (True, 0.25)]
    assert torch.equal(mask, dual_threshold_mask(cam, image, high=0.5, low=0.25).flip(-1))


def test_compiles() -> None:
    compiled = torch.compile(scores_to_mask, fullgraph=True, backend="eager")
    assert torch.equal(compiled(SCORES), scores_to_mask(SCORES))


CAM = torch.rand(1, 2, 4, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: scores_to_mask(SCORES[0]), ValueError, r"scores: expected shape \(B, N, H, W\)"),
        (lambda: scores_to_mask(SCORES[:, :0]), ValueError, "scores: expected a background channel"),
        (lambda: scores_to_mask(SCORES * torch.nan), ValueError, "scores: expected finite values"),
        (lambda: scores_to_mask(SCORES.long()), TypeError, "scores: expected a floating-point tensor"),
        (
            lambda: scores_to_mask(SCORES, confidence=0.5, ignore_index=2),
            ValueError,
            "ignore_index: .* got 2",
        ),
        (lambda: dual_threshold_mask(CAM, high=0.1, low=0.2), ValueError, "low: expected .* <= 0.1, got 0.2"),
        (lambda: dual_threshold_mask(CAM, high=2), ValueError, "high: expected a finite number"),
        (lambda: dual_threshold_mask(CAM, refine=lambda i, m: m), ValueError, "image: expected the images"),
        (lambda: dual_threshold_mask(CAM, torch.rand(2, 3, 4, 4)), ValueError, "image: .* with B=1 from cam"),
        (
            lambda: dual_threshold_mask(CAM, ignore_index=1),
            ValueError,
            "ignore_index: expected a label outside",
        ),
    ],
)
def test_errors(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
