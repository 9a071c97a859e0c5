"""Trimaps from maps and from masks, with every guard: section 1.4 of the Mat-Label specification."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from pseudolabel.masks import (
    TRIMAP_PRESETS,
    TrimapBuilder,
    dual_threshold_mask,
    trimap_areas,
    trimap_from_cam,
    trimap_from_mask,
)

BARE = {"fallback": 0.0}


def seeds_of(trimap: torch.Tensor) -> torch.Tensor:
    """Label map (B,H,W) of a trimap's known pixels, 255 on unknown ones."""
    unknown = (trimap == 0.5).any(1)
    highest, place = trimap.max(1)
    return torch.where(highest == 1, place + 1, 0).masked_fill(unknown, 255)


def random_case(seed: int, size=(7, 9), images=2, classes=3):
    generator = torch.Generator().manual_seed(seed)
    cam = torch.rand(images, classes, *size, generator=generator)
    labels = torch.rand(images, classes, generator=generator) < 0.6
    return cam, labels


# ------------------------------------------------------------------------------------------ from maps


def test_presets_are_the_published_pairs() -> None:
    pairs = {name: (s["foreground"], s["background"]) for name, s in TRIMAP_PRESETS.items()}
    assert pairs == {"irn": (0.3, 0.05), "wavecam": (0.35, 0.1), "scd": (0.55, 0.35), "posterior": (0.8, 0.8)}
    assert TRIMAP_PRESETS["posterior"]["margin"] == 0.2


def test_cam_by_hand() -> None:
    # sure 0, sure 1, both high, between, at the thresholds, background
    cam = torch.tensor([[[[0.9, 0.1, 0.6, 0.4, 0.55, 0.35, 0.0]], [[0.0, 0.8, 0.7, 0.2, 0.0, 0.0, 0.1]]]])
    trimap = trimap_from_cam(cam, torch.tensor([[1, 1]]), **TRIMAP_PRESETS["scd"])
    assert trimap[0, 0, 0].tolist() == [1, 0, 0, 0.5, 0.5, 0, 0]
    assert trimap[0, 1, 0].tolist() == [0, 1, 1, 0.5, 0.5, 0, 0]
    close = trimap_from_cam(cam, torch.tensor([[1, 1]]), **TRIMAP_PRESETS["scd"], margin=0.2)
    assert close[0, :, 0, 2].tolist() == [0.5, 0.5]
    assert torch.equal(close[..., [0, 1, 3, 4, 5, 6]], trimap[..., [0, 1, 3, 4, 5, 6]])


def test_posterior_by_hand() -> None:
    # sure class, one at the threshold, too low, sure background, background too low
    q = torch.tensor([0.9, 0.8, 0.7, 0.1, 0.4])
    scores = torch.stack([1 - q, q])[None, :, None]
    trimap = trimap_from_cam(scores, torch.tensor([[1]]), **TRIMAP_PRESETS["posterior"])
    assert trimap[0, 0, 0].tolist() == [1, 1, 0.5, 0, 0.5]


def test_posterior_needs_its_lead_over_background_too() -> None:
    scores = torch.tensor([[[[0.45, 0.8]], [[0.55, 0.2]]]])
    settings = {"kind": "posterior", "foreground": 0.5, "background": 0.8}
    labels = torch.tensor([[1]])
    assert trimap_from_cam(scores, labels, **settings, margin=0.05)[0, 0, 0].tolist() == [1, 0]
    assert trimap_from_cam(scores, labels, **settings, margin=0.2, fallback=0)[0, 0, 0].tolist() == [0.5, 0]


def test_posterior_with_low_thresholds_keeps_foreground() -> None:
    """Where both thresholds are met, the class that wins keeps the pixel; a losing class never has one."""
    scores = torch.tensor([[[[0.4, 0.6]], [[0.6, 0.4]]]])
    trimap = trimap_from_cam(
        scores, torch.tensor([[1]]), kind="posterior", foreground=0.3, background=0.3, fallback=0
    )
    assert trimap[0, 0, 0].tolist() == [1, 0]


@given(seed=st.integers(0, 10**6), pair=st.sampled_from(["irn", "wavecam", "scd"]))
def test_known_pixels_are_those_of_the_dual_threshold(seed: int, pair: str) -> None:
    cam, labels = random_case(seed)
    present = cam * labels[:, :, None, None]
    settings = TRIMAP_PRESETS[pair]
    mask = dual_threshold_mask(present, high=settings["foreground"], low=settings["background"])
    assert torch.equal(seeds_of(trimap_from_cam(cam, labels, **settings, **BARE)), mask)


@given(
    seed=st.integers(0, 10**6),
    posterior=st.booleans(),
    min_area=st.integers(0, 4),
    erode=st.integers(0, 2),
    margin=st.floats(0, 0.5),
    max_unknown=st.one_of(st.just(1.0), st.floats(0, 1)),
)
def test_what_holds_of_every_trimap(
    seed: int, posterior: bool, min_area: int, erode: int, margin: float, max_unknown: float
) -> None:
    cam, labels = random_case(seed)
    if posterior:
        cam = torch.cat([torch.rand(2, 1, 7, 9), cam], 1)
    trimap = trimap_from_cam(
        cam,
        labels,
        kind="posterior" if posterior else "cam",
        foreground=0.6,
        background=0.3,
        margin=margin,
        min_area=min_area,
        erode=erode,
        max_unknown=max_unknown,
    )
    assert trimap.shape == (2, 3, 7, 9)
    assert trimap.unique().tolist() == [v for v in (0, 0.5, 1) if (trimap == v).any()]
    assert not trimap[~labels].any()
    # An unknown pixel is unknown to all present classes; a known one belongs to one class, or to none.
    unknown = (trimap == 0.5).any(1)
    assert (trimap == 0.5).sum(1)[unknown].eq(labels.sum(1)[:, None, None].expand(2, 7, 9)[unknown]).all()
    assert ((trimap == 1).sum(1) + unknown.long()).max() <= 1
    areas = trimap_areas(trimap)
    assert torch.equal(areas.foreground.sum(1) + areas.background + areas.unknown, torch.full((2,), 63))
    assert (areas.unknown <= int(max_unknown * 63)).all()
    one = labels.sum(1) == 1  # no rival for its pixels
    if max_unknown == 1 and not posterior:
        assert (areas.foreground.sum(1) > 0)[one].all()
        assert (areas.background > 0)[one].all()


def test_absent_classes_decide_nothing() -> None:
    cam, _ = random_case(1)
    labels = torch.tensor([[0, 1, 0], [0, 1, 0]])
    only = trimap_from_cam(cam[:, 1:2], labels[:, 1:2], margin=0.1)
    assert torch.equal(trimap_from_cam(cam, labels, margin=0.1)[:, 1:2], only)


def test_no_labels_is_all_background() -> None:
    cam, _ = random_case(2)
    assert not trimap_from_cam(cam, torch.zeros(2, 3)).any()
    one = trimap_from_cam(cam, torch.tensor([[1, 1, 1], [0, 0, 0]]))
    assert one[0].any()
    assert not one[1].any()


def test_batch_equals_singles() -> None:
    cam, labels = random_case(3, images=4)
    settings = {"erode": 1, "min_area": 3, "max_unknown": 0.4, "margin": 0.1}
    together = trimap_from_cam(cam, labels, **settings)
    alone = [trimap_from_cam(cam[i : i + 1], labels[i : i + 1], **settings) for i in range(4)]
    assert torch.equal(together, torch.cat(alone))


def test_maps_are_resized_first() -> None:
    cam = torch.tensor([[[[0.0, 1.0]]]])
    trimap = trimap_from_cam(cam, torch.tensor([[1]]), size=(2, 8), foreground=0.7, background=0.3)
    # Bilinear, pixel centres: 0, 0, 1/8, 3/8, 5/8, 7/8, 1, 1.
    assert trimap[0, 0].tolist() == [[0, 0, 0, 0.5, 0.5, 1, 1, 1]] * 2


# ------------------------------------------------------------------------------------------ guards


def test_small_components_become_unknown() -> None:
    cam = torch.zeros(1, 1, 5, 8)
    cam[0, 0, 1:3, 1:3] = 0.9
    cam[0, 0, 3, 3] = 0.9  # touches the square at a corner: the same component
    cam[0, 0, 1, 6] = 0.9  # alone
    labels = torch.tensor([[1]])
    trimap = trimap_from_cam(cam, labels, min_area=5)
    assert trimap[0, 0, 1, 6] == 0.5
    assert (trimap == 1).sum() == 5
    assert trimap_areas(trimap_from_cam(cam, labels, min_area=6, **BARE)).foreground.item() == 0
    assert trimap_areas(trimap_from_cam(cam, labels, min_area=1)).foreground.item() == 6


def test_small_background_becomes_unknown_too() -> None:
    cam = torch.full((1, 1, 6, 6), 0.9)
    cam[0, 0, 2, 2] = 0.0
    cam[0, 0, 4:, :] = 0.0
    trimap = trimap_from_cam(cam, torch.tensor([[1]]), min_area=2)
    assert trimap[0, 0, 2, 2] == 0.5
    assert trimap[0, 0, 4:].eq(0).all()


def test_components_of_other_classes_and_images_are_others() -> None:
    """Each of the four planes holds a piece of three pixels, all at one place."""
    cam = torch.zeros(2, 2, 3, 6)
    cam[:, 0, 0, :3] = cam[:, 1, 1, :3] = 0.9
    assert trimap_areas(trimap_from_cam(cam, torch.ones(2, 2), min_area=4, **BARE)).foreground.sum() == 0
    assert trimap_areas(trimap_from_cam(cam, torch.ones(2, 2), min_area=3)).foreground.sum() == 12


@pytest.mark.parametrize("radius", [0, 1, 2, 3])
def test_erosion_is_that_of_a_square(radius: int) -> None:
    cam, _ = random_case(5, size=(19, 23), images=1, classes=1)
    cam = torch.nn.functional.avg_pool2d(cam, 9, 1, 4, count_include_pad=False)
    cam = (cam - cam.min()) / (cam.max() - cam.min())
    settings = {"foreground": 0.55, "background": 0.45, **BARE}
    labels = torch.tensor([[1]])
    plain = trimap_from_cam(cam, labels, **settings)[0, 0]
    eroded = trimap_from_cam(cam, labels, erode=radius, **settings)[0, 0]
    square = torch.ones(2 * radius + 1, 2 * radius + 1).numpy()
    for value in (0, 1):
        expected = ndimage.binary_erosion((plain == value).numpy(), square, border_value=1)
        assert torch.equal(eroded == value, torch.from_numpy(expected))


def test_an_empty_foreground_takes_its_highest_pixels() -> None:
    cam = torch.rand(1, 2, 20, 20, generator=torch.Generator().manual_seed(0))
    cam[0, 1] = 0.25 * cam[0, 1]  # never above the threshold
    trimap = trimap_from_cam(cam, torch.ones(1, 2), **TRIMAP_PRESETS["irn"])
    highest = cam[0, 1].flatten().argsort(descending=True)[:4]  # 1 % of 400 pixels
    assert sorted((trimap[0, 1] == 1).flatten().nonzero()[:, 0].tolist()) == sorted(highest.tolist())
    assert not (trimap[0, 0].flatten()[highest] != 0).any(), "they are background for the other class"
    bare = trimap_from_cam(cam, torch.ones(1, 2), **TRIMAP_PRESETS["irn"], **BARE)
    assert not (bare[0, 1] == 1).any()


def test_an_empty_background_takes_the_lowest_pixels() -> None:
    cam = 0.5 + 0.5 * torch.rand(1, 1, 20, 20, generator=torch.Generator().manual_seed(0))
    trimap = trimap_from_cam(cam, torch.ones(1, 1))
    lowest = cam.flatten().argsort()[:4]
    assert sorted((trimap == 0).flatten().nonzero()[:, 0].tolist()) == sorted(lowest.tolist())
    assert (trimap == 1).sum() == 396


def test_a_class_below_another_everywhere_still_gets_foreground() -> None:
    cam = torch.rand(1, 1, 20, 20, generator=torch.Generator().manual_seed(0))
    areas = trimap_areas(trimap_from_cam(torch.cat([cam, 0.99 * cam], 1), torch.ones(1, 2)))
    assert areas.foreground[0, 0] > 4
    assert areas.foreground[0, 1] == 4


def test_two_empty_classes_do_not_share_pixels() -> None:
    cam = torch.rand(1, 1, 20, 20, generator=torch.Generator().manual_seed(0)) * 0.2
    trimap = trimap_from_cam(torch.cat([cam, 0.5 * cam], 1), torch.ones(1, 2))
    assert trimap_areas(trimap).foreground.tolist() == [[4, 0]], "the higher map takes what both want"


def test_a_dead_map_gets_no_foreground() -> None:
    trimap = trimap_from_cam(torch.zeros(1, 1, 4, 4), torch.ones(1, 1))
    assert not trimap.any()


def test_a_constant_map() -> None:
    """Ties are broken by position, so that the share holds."""
    assert trimap_areas(trimap_from_cam(torch.ones(1, 1, 20, 20), torch.ones(1, 1))).background.item() == 4
    dim = trimap_areas(trimap_from_cam(torch.full((1, 1, 20, 20), 0.6), torch.ones(1, 1), foreground=0.7))
    assert (dim.foreground.item(), dim.background.item(), dim.unknown.item()) == (4, 0, 396), (
        "both want the same pixels, the higher value takes them"
    )


def test_a_cap_settles_the_clearest_pixels() -> None:
    cam = torch.tensor([[[[1.0, 0.5, 0.45, 0.42, 0.38, 0.35, 0.3, 0.0]]]])
    labels = torch.tensor([[1]])
    free = trimap_from_cam(cam, labels, foreground=0.6, background=0.2)
    assert free[0, 0, 0].tolist() == [1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0]
    # The middle is 0.4: 0.5 and 0.3 are the clearest, then 0.45 and 0.35.
    capped = trimap_from_cam(cam, labels, foreground=0.6, background=0.2, max_unknown=0.5)
    assert capped[0, 0, 0].tolist() == [1, 1, 0.5, 0.5, 0.5, 0.5, 0, 0]
    none = trimap_from_cam(cam, labels, foreground=0.6, background=0.2, max_unknown=0)
    assert none[0, 0, 0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]


def test_a_cap_on_a_posterior() -> None:
    q = torch.tensor([0.95, 0.75, 0.6, 0.45, 0.3, 0.05])
    scores = torch.stack([1 - q, q])[None, :, None]
    capped = trimap_from_cam(scores, torch.tensor([[1]]), **TRIMAP_PRESETS["posterior"], max_unknown=0.4)
    assert capped[0, 0, 0].tolist() == [1, 1, 0.5, 0.5, 0, 0]


# ------------------------------------------------------------------------------------------ from a mask


def test_mask_by_hand() -> None:
    mask = torch.tensor([[[0, 0, 0, 0, 2, 2, 2, 255, 1, 1, 1]]])
    trimap = trimap_from_mask(mask, num_classes=4, erode=1)
    assert trimap[0, :, 0].tolist() == [
        [0, 0, 0, 0.5, 0.5, 0, 0.5, 0.5, 0.5, 1, 1],
        [0, 0, 0, 0.5, 0.5, 1, 0.5, 0.5, 0.5, 0, 0],
        [0] * 11,
    ]


def test_mask_without_erosion_comes_back(generator: torch.Generator) -> None:
    mask = torch.randint(0, 4, (2, 6, 7), generator=generator)
    mask[torch.rand(2, 6, 7, generator=generator) < 0.2] = 255
    trimap = trimap_from_mask(mask, num_classes=4, erode=0)
    assert torch.equal(seeds_of(trimap), mask)


def test_what_would_vanish_stays() -> None:
    mask = torch.zeros(1, 9, 9, dtype=torch.long)
    mask[0, 4, 4] = 1
    trimap = trimap_from_mask(mask, num_classes=2, erode=2)
    assert trimap[0, 0, 4, 4] == 1
    assert trimap_areas(trimap).foreground.item() == 1
    everything = trimap_from_mask(torch.ones(1, 9, 9, dtype=torch.long), num_classes=2)
    assert everything.eq(1).all()
    assert trimap_from_mask(mask, num_classes=2, min_area=3)[0, 0, 4, 4] == 1


def test_mask_with_labels() -> None:
    mask = torch.tensor([[[0, 1, 2]]])
    trimap = trimap_from_mask(mask, 4, torch.tensor([[1, 0, 1]]), erode=0)
    assert trimap[0, :, 0].tolist() == [[0, 1, 0.5], [0, 0, 0], [0, 0, 0.5]]


def test_empty_batch() -> None:
    cam, labels = random_case(0)
    assert trimap_from_cam(cam[:0], labels[:0], min_area=2).shape == (0, 3, 7, 9)
    mask = torch.zeros(0, 7, 9, dtype=torch.int64)
    for known in (None, labels[:0]):
        assert trimap_from_mask(mask, 4, known, erode=1, min_area=2).shape == (0, 3, 7, 9)


def test_mask_of_background_or_nothing() -> None:
    assert not trimap_from_mask(torch.zeros(1, 4, 4, dtype=torch.long), 3).any()
    assert not trimap_from_mask(torch.full((1, 4, 4), 255), 3).any()
    assert trimap_from_mask(torch.full((1, 4, 4), 255), 3, torch.tensor([[1, 0]]))[0, 0].eq(0.5).all()
    assert trimap_from_mask(torch.zeros(1, 4, 4, dtype=torch.uint8), 3, dtype=torch.float64).dtype == (
        torch.float64
    )


# ------------------------------------------------------------------------------------------ the rest


def test_areas_by_hand() -> None:
    trimap = torch.tensor([[[[1, 0, 0.5, 0]], [[0, 1, 0.5, 0]], [[0, 0, 0, 0]]], [[[0] * 4]] * 3])
    areas = trimap_areas(trimap)
    assert areas.foreground.tolist() == [[1, 1, 0], [0, 0, 0]]
    assert areas.background.tolist() == [1, 4]
    assert areas.unknown.tolist() == [1, 0]
    assert all(count.dtype == torch.int64 for count in areas)


def test_module_equals_function() -> None:
    cam, labels = random_case(8)
    settings = {
        "foreground": 0.7,
        "background": 0.4,
        "margin": 0.05,
        "min_area": 2,
        "erode": 1,
        "fallback": 0.05,
        "max_unknown": 0.5,
    }
    builder = TrimapBuilder(**settings)
    assert torch.equal(builder(cam, labels), trimap_from_cam(cam, labels, **settings))
    assert torch.equal(
        builder(cam, labels, size=(14, 18)), trimap_from_cam(cam, labels, size=(14, 18), **settings)
    )
    scores = torch.cat([1 - cam.amax(1, keepdim=True), cam], 1)
    assert torch.equal(
        TrimapBuilder(**TRIMAP_PRESETS["posterior"])(scores, labels),
        trimap_from_cam(scores, labels, **TRIMAP_PRESETS["posterior"]),
    )
    assert repr(builder) == (
        "TrimapBuilder(kind='cam', foreground=0.7, background=0.4, margin=0.05, min_area=2, erode=1, "
        "fallback=0.05, max_unknown=0.5)"
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_and_devices(dtype: torch.dtype, device: torch.device) -> None:
    cam, labels = random_case(9)
    cam = (cam * 16).round() / 16  # exact in every dtype
    settings = {"foreground": 0.625, "background": 0.25, "erode": 1, "min_area": 2, "max_unknown": 0.5}
    found = trimap_from_cam(cam.to(device, dtype), labels.to(device), **settings)
    assert (found.dtype, found.device.type) == (dtype, device.type)
    assert torch.equal(found.cpu().float(), trimap_from_cam(cam, labels, **settings))
    mask = torch.tensor([[[0, 1, 1, 255]]], device=device)
    assert trimap_from_mask(mask, 2, erode=1, dtype=dtype).dtype == dtype


CAM, LABELS = torch.full((1, 2, 4, 4), 0.5), torch.ones(1, 2)
MASK = torch.zeros(1, 4, 4, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: trimap_from_cam(CAM[0], LABELS), ValueError, r"cam: expected shape \(B, C, h, w\)"),
        (lambda: trimap_from_cam(CAM, LABELS[:, :1]), ValueError, "labels: .* with C=2 from cam"),
        (
            lambda: trimap_from_cam(CAM, LABELS, kind="posterior"),
            ValueError,
            "cam: expected 3 channels, the background and the classes of labels, got 2",
        ),
        (lambda: trimap_from_cam(CAM, LABELS, kind="logits"), ValueError, "kind: expected one of"),
        (lambda: trimap_from_cam(CAM.long(), LABELS), TypeError, "cam: expected a floating-point"),
        (lambda: trimap_from_cam(CAM * 3, LABELS), ValueError, r"cam: expected values in \[0, 1\]"),
        (lambda: trimap_from_cam(CAM, LABELS * 2), ValueError, "labels: expected a multi-hot"),
        (
            lambda: trimap_from_cam(CAM, LABELS, foreground=0.2, background=0.4),
            ValueError,
            "background: .* <= 0.2, got 0.4",
        ),
        (lambda: trimap_from_cam(CAM, LABELS, foreground=1.5), ValueError, "foreground: expected"),
        (lambda: trimap_from_cam(CAM, LABELS, margin=-1), ValueError, "margin: expected"),
        (lambda: trimap_from_cam(CAM, LABELS, min_area=2.5), ValueError, "min_area: expected an integer"),
        (lambda: trimap_from_cam(CAM, LABELS, erode=-1), ValueError, "erode: expected an integer >= 0"),
        (lambda: trimap_from_cam(CAM, LABELS, fallback=2), ValueError, "fallback: expected"),
        (lambda: trimap_from_cam(CAM, LABELS, max_unknown=2), ValueError, "max_unknown: expected"),
        (lambda: TrimapBuilder(foreground=0.2, background=0.4), ValueError, "background: expected"),
        (lambda: TrimapBuilder(kind="scores"), ValueError, "kind: expected one of"),
        (lambda: trimap_from_mask(MASK[0], 2), ValueError, r"mask: expected shape \(B, H, W\)"),
        (lambda: trimap_from_mask(MASK.float(), 2), TypeError, "mask: expected an integer tensor"),
        (lambda: trimap_from_mask(MASK + 3, 2), ValueError, "mask: expected classes 0..1"),
        (lambda: trimap_from_mask(MASK, 4, LABELS), ValueError, "labels: expected 3 columns"),
        (lambda: trimap_from_mask(MASK, 2, erode=1.0), ValueError, "erode: expected an integer"),
        (lambda: trimap_from_mask(MASK, 2, ignore_index=1), ValueError, "ignore_index: expected"),
        (lambda: trimap_areas(CAM[0]), ValueError, "trimap: expected shape"),
        (lambda: trimap_areas(CAM.long()), TypeError, "trimap: expected a floating-point"),
    ],
)
def test_errors(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -1.0, 2.0])
def test_areas_of_no_trimap(value: float) -> None:
    with pytest.raises(ValueError, match=r"trimap: expected values in \[0, 1\]"):
        trimap_areas(torch.full((1, 1, 2, 2), value))
