"""`scores_to_mask`, and `dual_threshold_mask` with section 8 of the RTC specification."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from pseudolabel.masks import DualThresholdMask, constant_background, dual_threshold_mask, scores_to_mask
from pseudolabel.refine import dense_crf, pamr, varm

seeds = st.integers(0, 1000)
LABELS = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]])
BOXES = torch.tensor([[0, 0, 9, 12], [2, 1, 7, 10], [0, 3, 9, 12]])
ONLINE = {"high": 0.55, "low": 0.2, "softmax": True, "downscale": 2}


def online_case(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps and images of odd size; images have three, one and no label in `LABELS`."""
    generator = torch.Generator().manual_seed(seed)
    cam = torch.rand(3, 4, 5, 6, generator=generator, dtype=torch.float64)
    return cam, torch.rand(3, 3, 9, 12, generator=generator, dtype=torch.float64)


def few(image: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """A short VARM, for speed."""
    return varm(image, scores, [1, 2], 2)


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


def test_golden_online_mask(golden: Callable) -> None:
    data = golden("rtc/public_pseudolabel")
    image, cam, box = (torch.from_numpy(data[name]) for name in ("image", "cams", "img_box"))
    settings = {"high": float(data["bg_high"]), "low": float(data["bg_low"])}
    for labels, expected in (("label", "refined"), ("label_nofg", "refined_nofg")):
        mask = dual_threshold_mask(
            cam,
            image,
            labels=torch.from_numpy(data[labels]),
            boxes=box[:, [0, 2, 1, 3]],  # theirs is top, bottom, left, right
            refine=varm,
            softmax=True,
            downscale=int(data["down_scale"]),
            **settings,
        )
        assert torch.equal(mask, torch.from_numpy(data[expected]).long())
        assert mask.unique().numel() > 2


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("downscale", [1, 2])
def test_equals_one_image_at_a_time(softmax: bool, downscale: int) -> None:
    """With a refiner that is not linear, written down for each image with the classes it shows."""
    cam, image = online_case()
    refine = lambda i, s: dense_crf(i, s, iterations=2)  # noqa: E731
    settings = {"high": 0.55, "low": 0.45 if softmax else 0.2, "softmax": softmax, "downscale": downscale}
    mask = dual_threshold_mask(cam, image, labels=LABELS, boxes=BOXES, refine=refine, **settings)
    for one in range(3):
        keys = torch.tensor([0, *(LABELS[one].nonzero().flatten() + 1).tolist()])
        size = (9 // downscale, 12 // downscale)
        resize = lambda maps, size: F.interpolate(maps, size=size, mode="bilinear", align_corners=False)  # noqa: E731
        small = resize(image[one : one + 1], size)
        found = []
        for background in (settings["high"], settings["low"]):
            scores = torch.full((1, len(keys), *size), background, dtype=torch.float64)
            if len(keys) > 1:
                scores[:, 1:] = resize(cam[one : one + 1, keys[1:] - 1], size)
            scores = scores.softmax(1) if softmax else scores
            found.append(keys[resize(refine(small, scores), (9, 12)).argmax(1)[0]])
        expected = torch.where(found[0] > 0, found[0], torch.where(found[1] == 0, 0, 255))
        top, left, bottom, right = BOXES[one].tolist()
        inside = torch.zeros(9, 12, dtype=torch.bool)
        inside[top:bottom, left:right] = True
        assert torch.equal(mask[one], expected.where(inside, 255))
    assert len(mask[0].unique()) >= 3


def test_no_foreground_label() -> None:
    cam, image = online_case()
    mask = dual_threshold_mask(cam, image, labels=LABELS, boxes=BOXES, refine=few, **ONLINE)
    assert mask[2, :, 3:].eq(0).all(), "background inside of the box"
    assert mask[2, :, :3].eq(255).all()
    nothing = dual_threshold_mask(cam, image, labels=0 * LABELS, refine=few, **ONLINE)
    assert nothing.eq(0).all()
    assert dual_threshold_mask(cam[:, :0], image, labels=LABELS[:, :0], refine=few, **ONLINE).eq(0).all()


def test_outside_of_the_box() -> None:
    cam, image = online_case()
    settings = {"labels": LABELS, "refine": few, **ONLINE}
    everywhere = dual_threshold_mask(cam, image, **settings)
    for dtype in (torch.int16, torch.int64):
        mask = dual_threshold_mask(cam, image, boxes=BOXES.to(dtype), ignore_index=-1, **settings)
        for one, (top, left, bottom, right) in enumerate(BOXES.tolist()):
            inside = slice(top, bottom), slice(left, right)
            shown = everywhere[one][inside]
            assert torch.equal(mask[one][inside], shown.masked_fill(shown == 255, -1))
            assert mask[one].eq(-1).sum() == 9 * 12 - shown.ne(255).sum()


@given(seed=seeds)
def test_equal_thresholds_ignore_nothing(seed: int) -> None:
    cam, image = online_case(seed)
    settings = {**ONLINE, "low": 0.55}
    mask = dual_threshold_mask(cam, image, labels=LABELS, refine=few, **settings)
    assert mask.ne(255).all()
    boxed = dual_threshold_mask(cam, image, labels=LABELS, boxes=BOXES, refine=few, **settings)
    assert boxed[1, 2:7, 1:10].ne(255).all()


@given(seed=seeds)
def test_only_present_labels(seed: int) -> None:
    cam, image = online_case(seed)
    for refine in (few, None, lambda image, scores: -scores):
        mask = dual_threshold_mask(cam, image, labels=LABELS, boxes=BOXES, refine=refine, **ONLINE)
        for one, allowed in enumerate(([0, 1, 3, 4, 255], [0, 2, 255], [0, 255])):
            assert set(mask[one].unique().tolist()) <= set(allowed)


@given(seed=seeds, high=st.floats(0.3, 1), low=st.floats(0, 1), lower=st.floats(0, 1))
def test_lower_low_never_adds_background(seed: int, high: float, low: float, lower: float) -> None:
    """Exact for refiners with weights >= 0."""
    cam, image = online_case(seed)
    refine = lambda i, s: pamr(i, s, [1, 2], 2)  # noqa: E731
    masks = [
        dual_threshold_mask(
            cam, image, labels=LABELS, refine=refine, softmax=True, downscale=2, high=high, low=high * value
        )
        for value in (low, low * lower)
    ]
    assert not (masks[1].eq(0) & masks[0].ne(0)).any()
    assert torch.equal(masks[0].where(masks[0] != 255, 0), masks[1].where(masks[1] != 255, 0))


def test_absent_classes_cost_nothing_and_do_not_matter() -> None:
    cam, image = online_case()
    channels = []

    def refine(image: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        channels.append(scores.shape[1:])
        assert scores[1, 2:].eq(0).all(), "what only the first image needs"
        return few(image, scores)

    mask = dual_threshold_mask(cam, image, labels=LABELS, refine=refine, **ONLINE)
    assert channels == [(4, 4, 6), (4, 4, 6)]
    other = torch.where(LABELS[:, :, None, None] > 0, cam, 7.0)
    assert torch.equal(dual_threshold_mask(other, image, labels=LABELS, refine=few, **ONLINE), mask)
    assert torch.equal(dual_threshold_mask(cam, image, labels=LABELS.bool(), refine=few, **ONLINE), mask)


def test_refiner_keeps_no_graph() -> None:
    cam, image = online_case()
    seen = []

    def refine(image: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(scores.requires_grad)
        return few(image, scores)

    mask = dual_threshold_mask(cam.clone().requires_grad_(), image, labels=LABELS, refine=refine, **ONLINE)
    assert seen == [False, False]
    assert torch.equal(mask, dual_threshold_mask(cam, image, labels=LABELS, refine=few, **ONLINE))


def test_all_labels_are_no_labels() -> None:
    cam, image = online_case()
    with_labels = dual_threshold_mask(cam, image, labels=torch.ones(3, 4), refine=few, **ONLINE)
    assert torch.equal(with_labels, dual_threshold_mask(cam, image, refine=few, **ONLINE))


def test_downscale() -> None:
    cam, image = online_case()
    sizes = []

    def refine(image: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        sizes.append((image.shape[2:], scores.shape[2:]))
        return scores

    for factor, size in ((1, (9, 12)), (2, (4, 6)), (5, (1, 2)), (40, (1, 1))):
        mask = dual_threshold_mask(cam, image, refine=refine, downscale=factor)
        assert mask.shape == (3, 9, 12)
        assert sizes[-2:] == [(size, size)] * 2
    assert dual_threshold_mask(cam, downscale=2).shape == (3, 5, 6), "without an image, of the maps"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dual_threshold_dtypes(dtype: torch.dtype) -> None:
    cam, image = (value.to(dtype) for value in online_case())
    mask = dual_threshold_mask(cam, image, labels=LABELS, boxes=BOXES, refine=few, **ONLINE)
    exact = dual_threshold_mask(
        cam.double(), image.double(), labels=LABELS, boxes=BOXES, refine=few, **ONLINE
    )
    assert mask.dtype == torch.int64
    assert (mask == exact).double().mean() > 0.97, "near ties"


def test_dual_threshold_module_equals_function() -> None:
    cam, image = online_case()
    module = DualThresholdMask(refine=few, ignore_index=-1, **ONLINE)
    expected = dual_threshold_mask(
        cam, image, labels=LABELS, boxes=BOXES, refine=few, ignore_index=-1, **ONLINE
    )
    assert torch.equal(module(cam, image, LABELS, BOXES), expected)
    assert torch.equal(DualThresholdMask()(cam), dual_threshold_mask(cam))
    assert not torch.equal(module(cam, image, LABELS, BOXES), DualThresholdMask()(cam, image, LABELS, BOXES))
    assert repr(module) == "DualThresholdMask(high=0.55, low=0.2, softmax=True, downscale=2)"


def test_dual_threshold_devices(device: torch.device) -> None:
    cam, image = (value.float() for value in online_case())
    expected = dual_threshold_mask(cam, image, labels=LABELS, boxes=BOXES, refine=few, **ONLINE)
    mask = dual_threshold_mask(
        cam.to(device), image.to(device), labels=LABELS.to(device), boxes=BOXES, refine=few, **ONLINE
    )
    assert mask.device.type == device.type
    assert (mask.cpu() == expected).float().mean() > 0.99


def test_compiles() -> None:
    compiled = torch.compile(scores_to_mask, fullgraph=True, backend="eager")
    assert torch.equal(compiled(SCORES), scores_to_mask(SCORES))
    cam, image = online_case()
    compiled = torch.compile(dual_threshold_mask, fullgraph=True, backend="eager")
    settings = {"boxes": BOXES, "refine": few, **ONLINE}
    assert torch.equal(compiled(cam, image, **settings), dual_threshold_mask(cam, image, **settings))


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
        (lambda: dual_threshold_mask(CAM.long()), TypeError, "cam: expected a floating-point tensor"),
        (
            lambda: dual_threshold_mask(CAM, labels=torch.ones(1, 3)),
            ValueError,
            "labels: .* with C=2 from cam",
        ),
        (lambda: dual_threshold_mask(CAM, labels=torch.tensor([[0, 2]])), ValueError, "labels: .* multi-hot"),
        (
            lambda: dual_threshold_mask(CAM, boxes=torch.tensor([0, 0, 4, 4])),
            ValueError,
            r"boxes: expected shape \(B, 4\)",
        ),
        (
            lambda: dual_threshold_mask(CAM, boxes=torch.tensor([[0.0, 0.0, 4.0, 4.0]])),
            TypeError,
            "boxes: expected an integer tensor",
        ),
        (
            lambda: dual_threshold_mask(CAM, boxes=torch.tensor([[0, 4, 0, 4]])),  # top, bottom, left, right
            ValueError,
            r"boxes: expected top, left, bottom, right .* got \[0, 4, 0, 4\]",
        ),
        (
            lambda: dual_threshold_mask(CAM, torch.rand(1, 3, 5, 4), boxes=torch.tensor([[0, 0, 6, 4]])),
            ValueError,
            "boxes: .* top < bottom <= 5 and 0 <= left < right <= 4",
        ),
        (lambda: dual_threshold_mask(CAM, downscale=0), ValueError, "downscale: expected an integer >= 1"),
        (lambda: DualThresholdMask(low=0.5), ValueError, "low: expected a finite number"),
        (lambda: DualThresholdMask(downscale=1.5), ValueError, "downscale: expected an integer >= 1"),
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


@pytest.mark.parametrize("value", [None, "255", 255.0, torch.nan, True])
def test_label_of_ignored_pixels(value: object) -> None:
    with pytest.raises(ValueError, match=r"ignore_index: expected an integer, got"):
        scores_to_mask(torch.rand(1, 2, 3, 3), ignore_index=value)
    with pytest.raises(ValueError, match=r"ignore_index: expected an integer, got"):
        dual_threshold_mask(torch.rand(1, 2, 3, 3), ignore_index=value)
