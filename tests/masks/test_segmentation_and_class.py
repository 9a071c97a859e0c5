"""Segmentation gated by the classifier: section 10 (inference) of the RTC specification."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from pseudolabel.cam import merge_views
from pseudolabel.masks import constant_background, fuse_segmentation_and_class, scores_to_mask

seeds = st.integers(0, 1000)


def case(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 4, 5, 7, generator=generator, dtype=dtype)
    return logits, torch.randn(2, 3, 3, 4, generator=generator, dtype=dtype)


def test_golden(golden: Callable) -> None:
    """Eight views: the averaged scores and the mask."""
    data = golden("rtc/public_infer")
    views = [
        fuse_segmentation_and_class(
            torch.from_numpy(data[f"seg_logits_{view}"]),
            torch.from_numpy(data[f"cam_low_{view}"])[:, 1:],
            tuple(data[f"size_{view}"].tolist()),
        )
        for view in range(8)
    ]
    scores = merge_views(views, tuple(data["orig_size"].tolist())) / 8
    torch.testing.assert_close(scores[0], torch.from_numpy(data["score"]), atol=1e-5, rtol=1e-4)
    mask = scores_to_mask(constant_background(scores, float(data["alpha"])))
    assert (mask[0].numpy() == data["pred"]).mean() >= 0.999


def test_hand_computed() -> None:
    logits = torch.tensor([2.0, 0.0, 1.0]).log1p().view(1, 3, 1, 1)  # 3, 1 and 2 of 6
    cam = torch.tensor([[[[0.0, 4.0]], [[-9.0, 9.0]]]])
    scores = fuse_segmentation_and_class(logits, cam, (1, 5))
    gate = 1 / (1 + torch.tensor(-2.0).exp())
    torch.testing.assert_close(scores[0, 0, 0], (gate / 6).expand(5))
    torch.testing.assert_close(scores[0, 1, 0], torch.full((5,), 1 / 6))


def test_is_its_formula() -> None:
    logits, cam = case()
    up = lambda maps: F.interpolate(maps, (11, 13), mode="bilinear", align_corners=True)  # noqa: E731
    expected = up(logits).softmax(1)[:, 1:] * up(cam).mean((2, 3)).sigmoid()[:, :, None, None]
    torch.testing.assert_close(fuse_segmentation_and_class(logits, cam, (11, 13)), expected)


@given(seed=seeds)
def test_properties(seed: int) -> None:
    logits, cam = case(seed)
    scores = fuse_segmentation_and_class(logits, cam, (9, 12))
    assert scores.min() >= 0
    assert scores.sum(1).max() <= 1
    mirrored = fuse_segmentation_and_class(logits.flip(3), cam.flip(3), (9, 12))
    torch.testing.assert_close(mirrored.flip(3), scores)
    masks = [scores_to_mask(constant_background(scores, value)) for value in (0.1, 0.2, 0.4)]
    for low, high in pairwise(masks):
        assert (high[low == 0] == 0).all(), "raising the background never removes it"
    for one in (slice(0, 1), slice(1, 2)):
        torch.testing.assert_close(fuse_segmentation_and_class(logits[one], cam[one], (9, 12)), scores[one])


def test_gradcheck() -> None:
    logits, cam = (value.requires_grad_() for value in case())
    assert torch.autograd.gradcheck(lambda a, b: fuse_segmentation_and_class(a, b, (4, 6)), (logits, cam))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    logits, cam = (value.to(dtype) for value in case(dtype=torch.float32))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scores = fuse_segmentation_and_class(logits, cam, (9, 12))
    assert scores.dtype == wide
    torch.testing.assert_close(scores, fuse_segmentation_and_class(logits.to(wide), cam.to(wide), (9, 12)))


def test_devices(device: torch.device) -> None:
    logits, cam = case(dtype=torch.float32)
    scores = fuse_segmentation_and_class(logits.to(device), cam.to(device), (9, 12))
    assert scores.device.type == device.type
    torch.testing.assert_close(
        scores.cpu(), fuse_segmentation_and_class(logits, cam, (9, 12)), atol=1e-5, rtol=1e-4
    )


def test_compiles_to_one_graph() -> None:
    logits, cam = case(dtype=torch.float32)
    compiled = torch.compile(fuse_segmentation_and_class, fullgraph=True, backend="eager")
    torch.testing.assert_close(
        compiled(logits, cam, (9, 12)), fuse_segmentation_and_class(logits, cam, (9, 12))
    )


LOGITS, CAM = case()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((LOGITS[0], CAM, (4, 4)), ValueError, r"logits: expected shape \(B, 1\+C, h, w\)"),
        ((LOGITS, CAM[:1], (4, 4)), ValueError, "cam: .* with B=2 from logits"),
        ((LOGITS[:, 1:], CAM, (4, 4)), ValueError, "logits: expected 4 channels, .* got 3"),
        ((LOGITS.long(), CAM, (4, 4)), TypeError, "logits: expected a floating-point"),
        (
            (LOGITS, CAM, (4, 0)),
            ValueError,
            r"size: expected two integers .* got \(4, 0\)",
        ),
    ],
)
def test_errors(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        fuse_segmentation_and_class(*arguments)
