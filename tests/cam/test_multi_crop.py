"""`multi_crop_boxes`, `multi_crop_cam`, `crop_labels`: sections 6.1 and 6.2 of the PMM specification."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

from pseudolabel.cam import crop_labels, multi_crop_boxes, multi_crop_cam, normalize_cam

XYXY = [1, 0, 3, 2]  # top, left, bottom, right <-> the official x1, y1, x2, y2: the same exchange both ways


# ------------------------------------------------------------------------------------------ boxes


def test_golden_boxes(golden: Callable) -> None:
    data = golden("pmm/public_crop_boxes")
    for case in range(int(data["n_cases"])):
        size, scales = tuple(data[f"c{case}_hw"].tolist()), data[f"c{case}_scales"].tolist()
        crop_size, stride = int(data[f"c{case}_crop_size"]), int(data[f"c{case}_stride"])
        boxes = multi_crop_boxes(size, scales, crop_size, stride)
        assert boxes.dtype == torch.int64
        xyxy = boxes.numpy()[:, XYXY]
        np.testing.assert_array_equal(xyxy, data[f"c{case}_train_xyxy"])
        xywh = np.concatenate([xyxy[:, :2], xyxy[:, 2:] - xyxy[:, :2]], 1)
        np.testing.assert_array_equal(xywh, data[f"c{case}_infer_xywh"])
        per_scale = [multi_crop_boxes(size, (scale,), crop_size, stride) for scale in scales]
        assert [len(one) for one in per_scale] == data[f"c{case}_train_per_scale"].tolist()
        assert torch.equal(torch.cat(per_scale), boxes)


def test_boxes_hand_computed() -> None:
    # Scale 2 of (3, 7) is (6, 14); along 14: windows 0..5, 5..10 and 6..14, along 6 one; halved and cut.
    boxes = multi_crop_boxes((3, 7), scales=(2.0,), crop_size=8, stride=5)
    assert boxes.tolist() == [[0, 0, 3, 2], [0, 2, 3, 5], [0, 3, 3, 7]]
    full = multi_crop_boxes((3, 7), scales=(2.0,), crop_size=8, stride=5, full_windows=True)
    assert full.tolist() == [[0, 0, 3, 4], [0, 2, 3, 7], [0, 3, 3, 7]]


def test_a_stride_beyond_the_window_ends_at_the_enlarged_image() -> None:
    """int(11 x 0.75) = 8: windows 0..5, 5..8 (not 10) and 6..8."""
    boxes = multi_crop_boxes((1, 11), scales=(0.75,), crop_size=2, stride=5)
    assert boxes[:, [1, 3]].tolist() == [[0, 6], [6, 10], [8, 10]]


def test_boxes_go_down_before_right() -> None:
    boxes = multi_crop_boxes((4, 4), scales=(1.0,), crop_size=2, stride=2)
    assert boxes[:, :2].tolist() == [[0, 0], [2, 0], [0, 2], [2, 2]]


def test_default_grid_of_a_photo() -> None:
    assert len(multi_crop_boxes((375, 500))) == 87
    assert len(multi_crop_boxes((375, 500), full_windows=True)) == 87


def test_official_windows_may_miss_the_last_row() -> None:
    """int(375 x 0.75) = 281, and 281 / 0.75 = 374.67: row 374 is in no window of this scale."""
    assert multi_crop_boxes((375, 500), (0.75,)).tolist() == [[0, 0, 374, 500]]
    assert multi_crop_boxes((375, 500), (0.75,), full_windows=True).tolist() == [[0, 0, 375, 500]]


@pytest.mark.parametrize("full_windows", [False, True])
def test_tiny_images(full_windows: bool) -> None:
    """Also where the enlarged image has no pixel (scale 0.3), or a window less than one of the image's."""
    for scales in ((0.3,), (1.0,), (3.0,)):
        boxes = multi_crop_boxes((1, 1), scales, crop_size=2, stride=1, full_windows=full_windows)
        assert set(map(tuple, boxes.tolist())) == {(0, 0, 1, 1)}
    assert multi_crop_boxes((3, 2), (0.2,), full_windows=full_windows).tolist() == [[0, 0, 3, 2]]


@given(
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    scale=st.floats(0.1, 4),
    crop_size=st.integers(1, 20),
    stride=st.integers(1, 25),
    full_windows=st.booleans(),
)
def test_boxes_lie_in_the_image(size, scale, crop_size, stride, full_windows) -> None:
    stride = min(stride, crop_size) if full_windows else stride
    boxes = multi_crop_boxes(size, (scale,), crop_size, stride, full_windows=full_windows)
    top, left, bottom, right = boxes.unbind(1)
    assert ((top >= 0) & (top < bottom) & (bottom <= size[0])).all()
    assert ((left >= 0) & (left < right) & (right <= size[1])).all()
    assert top.min() == left.min() == 0
    if full_windows:
        cover = torch.zeros(size)
        for y1, x1, y2, x2 in boxes.tolist():
            cover[y1:y2, x1:x2] += 1
        assert cover.min() >= 1
        # Windows are crop_size wide in the enlarged image; the last one takes the rest of a pixel there too.
        for lengths, side in ((bottom - top, size[0]), (right - left, size[1])):
            assert (lengths >= min(side, int(crop_size / scale))).all()
            assert (lengths < (crop_size + 1) / scale + 2).all()


def test_full_windows_overlap() -> None:
    left, right = multi_crop_boxes((100, 100), (6.0,), 448, 300, full_windows=True).unique(dim=0)[:, [1, 3]].T
    left, right = left.unique(), right.unique()
    assert left.tolist() == [0, 25]  # scaled 600: windows 0..448 and 152..600
    assert right.tolist() == [75, 100]


# ------------------------------------------------------------------------------------------ maps


def golden_case(data: dict[str, np.ndarray], case: int) -> dict[str, object]:
    return {
        "labels": torch.from_numpy(data[f"c{case}_label"])[None],
        "scales": data[f"c{case}_scales"].tolist(),
        "crop_size": int(data[f"c{case}_crop_size"]),
        "stride": int(data[f"c{case}_stride"]),
    }


def test_golden_multi_crop(golden: Callable) -> None:
    """Recorded network outputs; the official maps are clamped to 0 as we decide, and rounded to float16."""
    data = golden("pmm/public_multi_crop")
    for case in range(int(data["n_cases"])):
        image = torch.zeros(1, 3, *data[f"c{case}_image"].shape[:2])
        recorded = torch.from_numpy(data[f"c{case}_crop_cams"])[:, None, 1:]
        views = iter(recorded)
        cam = multi_crop_cam(lambda _: next(views), image, **golden_case(data, case), batch_size=1)  # noqa: B023
        assert next(views, None) is None
        keys = torch.from_numpy(data[f"c{case}_norm_keys"])
        expected = torch.from_numpy(data[f"c{case}_norm_cam_f16"]).float().clamp(min=0)
        normalised = normalize_cam(cam, "minmax")[0]
        torch.testing.assert_close(normalised[keys], expected, atol=5e-4, rtol=0)
        absent = torch.ones(len(normalised), dtype=torch.bool).index_fill(0, keys, False)
        assert cam[0, absent].eq(0).all()

        # The official formula without float16: equal but within 1e-5 of the minimum.
        kept = cam[0, keys].double()
        low, high = kept.amin((1, 2), keepdim=True), kept.amax((1, 2), keepdim=True)
        official = (kept.masked_fill(kept < low + 1e-5, 0) - low) / (high - low + 1e-5)
        near = (1e-5 / (high - low + 1e-5)).expand_as(kept) * (kept < low + 1e-5)
        assert ((normalised[keys] - official.clamp(min=0)).abs() <= near + 1e-6).all()


def test_golden_whole_program(golden: Callable) -> None:
    """The recorded network from the photo on: crops differ by the official 8-bit rounding."""
    data = golden("pmm/public_multi_crop")
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for case in range(int(data["n_cases"])):
        pool = int(data[f"c{case}_net_pool"])
        weight, bias = (torch.from_numpy(data[f"c{case}_net_{name}"]) for name in "wb")
        image = torch.from_numpy(data[f"c{case}_image"]).permute(2, 0, 1)[None] / 255
        seen = []

        def net(x: torch.Tensor) -> torch.Tensor:
            maps = F.relu(F.conv2d(F.avg_pool2d(x, pool, ceil_mode=True), weight, bias))  # noqa: B023
            seen.append(maps)  # noqa: B023
            return maps[:, 1:]

        x = (image - mean[:, None, None]) / std[:, None, None]
        settings = golden_case(data, case)
        cam = normalize_cam(multi_crop_cam(net, x, **settings, batch_size=1), "minmax")
        recorded = torch.from_numpy(data[f"c{case}_crop_cams"])
        torch.testing.assert_close(torch.cat(seen), recorded, atol=0.02, rtol=0)
        keys = torch.from_numpy(data[f"c{case}_norm_keys"])
        expected = torch.from_numpy(data[f"c{case}_norm_cam_f16"]).float().clamp(min=0)
        assert (cam[0, keys] - expected).abs().max() < 0.01


def test_shrunken_crops_are_those_of_the_photo_library() -> None:
    """Scale 0.5 shrinks the image: anti-aliased, as Pillow does it (which rounds to 8 bits)."""
    photo = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    crops = []
    image = torch.from_numpy(photo).permute(2, 0, 1)[None].float()
    multi_crop_cam(lambda x: crops.append(x) or x, image, scales=(0.5,), crop_size=20, stride=20, flip=False)
    assert [tuple(crop.shape) for crop in crops] == [(2, 3, 20, 20)]
    boxes = multi_crop_boxes((40, 56), (0.5,), 20, 20).tolist()
    for crop, (top, left, bottom, right) in zip(crops[0], boxes, strict=True):
        window = Image.fromarray(photo[top:bottom, left:right])
        expected = np.asarray(window.resize((20, 20), Image.Resampling.BILINEAR), np.float32)
        np.testing.assert_allclose(crop.permute(1, 2, 0), expected, atol=1.01)


def slow(net: Callable, image: torch.Tensor, flip: bool, **settings) -> torch.Tensor:
    """The published order for one image: crop, resize, network, resize, mirror back, add, divide."""
    size, crop_size = tuple(image.shape[2:]), settings["crop_size"]
    total, count = 0, torch.zeros(size)
    for top, left, bottom, right in multi_crop_boxes(size, **settings).tolist():
        crop = F.interpolate(
            image[:, :, top:bottom, left:right], (crop_size, crop_size), mode="bilinear", antialias=True
        )
        for mirrored in (False, True) if flip else (False,):
            cam = net(crop.flip(-1) if mirrored else crop)
            cam = F.interpolate(cam, (bottom - top, right - left), mode="bilinear", align_corners=False)
            pad = (left, size[1] - right, top, size[0] - bottom)
            total = total + F.pad(cam.flip(-1) if mirrored else cam, pad)
            count += F.pad(torch.ones(bottom - top, right - left), pad)
    return total / count.clamp(min=1)


SETTINGS = {"scales": (0.75, 1.0, 2.3), "crop_size": 12, "stride": 8}


def network(generator: torch.Generator, classes: int = 4) -> Callable[[torch.Tensor], torch.Tensor]:
    weight = torch.randn(classes, 3, 3, 3, generator=generator)
    return lambda x: F.conv2d(x, weight.to(x), stride=2)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("full_windows", [False, True])
@pytest.mark.parametrize("size", [(21, 30), (7, 9), (25, 5)])
def test_the_published_order(
    flip: bool, full_windows: bool, size: tuple[int, int], generator: torch.Generator
) -> None:
    net, image = network(generator), torch.rand(1, 3, *size, generator=generator)
    cam = multi_crop_cam(net, image, **SETTINGS, flip=flip, full_windows=full_windows)
    expected = slow(net, image, flip, **SETTINGS, full_windows=full_windows)
    torch.testing.assert_close(cam, expected, atol=1e-5, rtol=1e-5)


def test_overlaps_are_averaged() -> None:
    """Window by window the maps are 1, 2, 3; windows 0..3, 3..6 and 6..10 of width 10, then full ones."""
    image, settings = torch.zeros(1, 3, 4, 10), {"scales": (1.0,), "crop_size": 4, "stride": 3, "flip": False}
    number = lambda x: torch.arange(1.0, len(x) + 1).view(-1, 1, 1, 1)  # noqa: E731
    cam = multi_crop_cam(number, image, **settings)
    assert cam[0, 0].tolist() == [[1, 1, 1, 2, 2, 2, 3, 3, 3, 3]] * 4
    cam = multi_crop_cam(number, image, **settings, full_windows=True)
    assert cam[0, 0].tolist() == [[1, 1, 1, 1.5, 2, 2, 2.5, 3, 3, 3]] * 4


def test_uncovered_pixels_are_zero() -> None:
    cam = multi_crop_cam(
        lambda x: torch.ones_like(x[:, :1]), torch.zeros(1, 3, 5, 4), scales=(0.75,), crop_size=4, stride=3
    )
    # int(5 x 0.75) = 3, and 3 / 0.75 = 4: row 4 is in no window.
    assert cam[0, 0].tolist() == [[1] * 4] * 4 + [[0] * 4]


def test_constant_maps_stay_constant() -> None:
    cam = multi_crop_cam(
        lambda x: torch.full_like(x[:, :2], 0.25), torch.zeros(1, 3, 17, 23), **SETTINGS, full_windows=True
    )
    torch.testing.assert_close(cam, torch.full((1, 2, 17, 23), 0.25))


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (5, 1)])
def test_tiny_images_have_maps(size: tuple[int, int]) -> None:
    cam = multi_crop_cam(lambda x: x[:, :1], torch.full((1, 3, *size), 0.5), crop_size=4, stride=3)
    torch.testing.assert_close(cam, torch.full((1, 1, *size), 0.5))


def test_batches_of_the_network(generator: torch.Generator) -> None:
    """No more than `batch_size` crops at once, all of one size, and the result is the same."""
    image, net, shapes = torch.rand(3, 3, 15, 20, generator=generator), network(generator), []

    def recorded(x: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(x.shape))
        return net(x)

    results = [
        multi_crop_cam(recorded, image, scales=(1.0, 1.5), crop_size=12, stride=8, batch_size=batch_size)
        for batch_size in (16, 5, 1)
    ]
    # Per image 2 x 2 windows at scale 1 (15 x 20) and 3 x 4 at scale 1.5 (22 x 30).
    number = 3 * 16
    sizes = [min(n, number - first) for n in (16, 5, 1) for first in range(0, number, n) for _ in range(2)]
    assert shapes == [(n, 3, 12, 12) for n in sizes]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=1e-5, rtol=1e-5)


def test_batch_equals_singles(generator: torch.Generator) -> None:
    image, net = torch.rand(3, 3, 14, 18, generator=generator), network(generator)
    labels = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 0]])
    together = multi_crop_cam(net, image, labels, **SETTINGS, batch_size=4)
    singles = [multi_crop_cam(net, image[b : b + 1], labels[b : b + 1], **SETTINGS) for b in range(3)]
    torch.testing.assert_close(together, torch.cat(singles), atol=1e-5, rtol=1e-5)


def test_labels_zero_the_absent_classes(generator: torch.Generator) -> None:
    image, net = torch.rand(3, 3, 14, 18, generator=generator), network(generator)
    labels = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 1]])
    every = multi_crop_cam(net, image, **SETTINGS)
    some = multi_crop_cam(net, image, labels, **SETTINGS)
    torch.testing.assert_close(some, every * labels[:, :, None, None])
    assert torch.equal(multi_crop_cam(net, image, labels.bool(), **SETTINGS), some)
    assert torch.equal(multi_crop_cam(net, image, labels * 0, **SETTINGS), torch.zeros_like(some))


def test_mirrored_image_gives_mirrored_maps(generator: torch.Generator) -> None:
    """Where the windows themselves are symmetric: one window, or two that meet in the middle."""
    net, image = network(generator), torch.rand(1, 3, 9, 16, generator=generator)
    run = lambda x: multi_crop_cam(net, x, scales=(1.0, 2.0), crop_size=16, stride=16)  # noqa: E731
    torch.testing.assert_close(run(image.flip(-1)), run(image).flip(-1), atol=1e-5, rtol=1e-5)


def test_gradients(generator: torch.Generator) -> None:
    weight = torch.randn(2, 3, 1, 1, generator=generator, dtype=torch.float64)
    image = torch.rand(2, 3, 5, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[1, 0], [1, 1]])
    run = lambda x, w: multi_crop_cam(  # noqa: E731
        lambda crop: F.conv2d(crop, w).relu(), x, labels, (1.0, 1.5), 4, 3, batch_size=3
    )
    assert torch.autograd.gradcheck(run, (image, weight.requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype, generator: torch.Generator) -> None:
    image = torch.rand(1, 3, 15, 20, generator=generator)
    pooled = lambda x: x[:, :2, ::2, ::2] * 100  # noqa: E731
    cam = multi_crop_cam(pooled, image.to(dtype), torch.ones(1, 2), **SETTINGS)
    assert cam.dtype == dtype
    torch.testing.assert_close(cam.float(), multi_crop_cam(pooled, image, **SETTINGS), atol=1.0, rtol=0.02)


def test_half_precision_sums_do_not_overflow() -> None:
    """Ten windows a pixel, mirrored: their sum is beyond float16, their mean is not."""
    image = torch.full((1, 3, 4, 4), 30000.0, dtype=torch.float16)
    cam = multi_crop_cam(lambda x: x[:, :1], image, scales=(1.0,) * 10, crop_size=4, stride=4)
    assert torch.equal(cam, image[:, :1])


def test_compiles(generator: torch.Generator) -> None:
    net, image = network(generator), torch.rand(2, 3, 14, 18, generator=generator)
    run = lambda x: multi_crop_cam(net, x, **SETTINGS)  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(image), run(image))


# ------------------------------------------------------------------------------------------ labels


def test_golden_crop_labels(golden: Callable) -> None:
    data = golden("pmm/public_crop_labels")
    for case in range(int(data["n_cases"])):
        heat, keys = (torch.from_numpy(data[f"c{case}_{name}"]) for name in ("heat", "keys"))
        scores = heat.new_zeros(1, 1 + int(data[f"c{case}_num_fg"]), *heat.shape[1:])
        scores[0, 0], scores[0, 1 + keys] = heat[0], heat[1:]
        boxes = torch.from_numpy(data[f"c{case}_boxes"])[:, XYXY]
        for name, overlap in (("t010", 0.1), ("t050", 0.5)):
            labels = crop_labels(scores, boxes, overlap=overlap)
            np.testing.assert_array_equal(labels[0].numpy(), data[f"c{case}_new_label_{name}"])
        assert torch.equal(crop_labels(scores, boxes), crop_labels(scores, boxes, overlap=0.1))


def test_crop_labels_hand_computed() -> None:
    """A region of 10 pixels in an image of 10 x 10, row 2."""
    scores = torch.zeros(1, 3, 10, 10)
    scores[0, 1, 2] = 0.95
    boxes = torch.tensor(
        [
            [2, 0, 3, 1],  # 1/10 of the region, but the whole box
            [0, 0, 10, 1],  # 1/10 of both: not more than the tenth
            [0, 0, 10, 2],  # 2/10 of the region
            [3, 0, 10, 10],  # beside it
            [0, 0, 10, 10],  # all of it
        ]
    )
    labels = crop_labels(scores, boxes)
    assert labels.dtype == torch.bool
    assert labels[0, :, 0].tolist() == [True, False, True, False, True]
    assert not labels[0, :, 1].any(), "a class without a sure pixel is in no crop"
    assert crop_labels(scores, boxes, overlap=0.2)[0, :, 0].tolist() == [True, False, False, False, True]
    assert not crop_labels(scores, boxes, score_threshold=0.95).any(), "the threshold itself is not above it"


def test_the_background_has_no_label() -> None:
    scores = torch.zeros(1, 3, 4, 4)
    scores[:, 0] = 1
    assert not crop_labels(scores, torch.tensor([[0, 0, 4, 4]])).any()


@given(seed=st.integers(0, 2**31 - 1), height=st.integers(1, 9), width=st.integers(1, 9))
def test_crop_labels_are_the_formula(seed: int, height: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(2, 4, height, width, generator=generator) ** 0.2
    boxes = multi_crop_boxes((height, width), (1.0, 1.7), crop_size=4, stride=3)
    labels = crop_labels(scores, boxes, overlap=0.25)
    sure = scores.numpy() > np.float32(0.9)
    for image in range(2):
        for number, (top, left, bottom, right) in enumerate(boxes.tolist()):
            for label in range(3):
                region = sure[image, 1 + label]
                inside = region[top:bottom, left:right]
                found = region.any() and (inside.sum() / region.sum() > 0.25 or inside.mean() > 0.25)
                assert bool(labels[image, number, label]) == found


def test_the_whole_image_has_its_labels(generator: torch.Generator) -> None:
    scores = torch.rand(2, 6, 9, 9, generator=generator)
    scores[0, 3] = 0
    labels = crop_labels(scores, torch.tensor([[0, 0, 9, 9]]), overlap=0.99)
    assert torch.equal(labels[:, 0], (scores[:, 1:] > 0.9).flatten(2).any(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_label_dtypes(dtype: torch.dtype, generator: torch.Generator) -> None:
    scores = torch.randint(0, 2, (1, 4, 9, 9), generator=generator)
    boxes = multi_crop_boxes((9, 9), (1.0,), 4, 3)
    assert torch.equal(crop_labels(scores.to(dtype), boxes.int()), crop_labels(scores.float(), boxes))


def test_no_box_no_label() -> None:
    assert crop_labels(torch.rand(2, 4, 5, 5), torch.zeros(0, 4, dtype=torch.int64)).shape == (2, 0, 3)


def test_labels_compile(generator: torch.Generator) -> None:
    scores, boxes = torch.rand(1, 4, 9, 9, generator=generator), multi_crop_boxes((9, 9), (1.0,), 4, 3)
    compiled = torch.compile(crop_labels, fullgraph=True, backend="eager")
    assert torch.equal(compiled(scores, boxes), crop_labels(scores, boxes))


# ------------------------------------------------------------------------------------------ errors, devices

IMAGE, SCORES = torch.rand(1, 3, 8, 8), torch.rand(1, 3, 8, 8)
BOX = torch.tensor([[0, 0, 8, 8]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: multi_crop_boxes((0, 8)), r"size: expected two integers .* got \(0, 8\)"),
        (lambda: multi_crop_boxes((8, 2.5)), r"size: expected two integers .* got \(8, 2.5\)"),
        (lambda: multi_crop_boxes((8, 8), ()), "scales: expected at least one scale"),
        (lambda: multi_crop_boxes((8, 8), (1, 0)), "scales: expected a finite number > 0, got 0"),
        (lambda: multi_crop_boxes((8, 8), crop_size=0), "crop_size: expected an integer >= 1, got 0"),
        (lambda: multi_crop_boxes((8, 8), stride=0.5), "stride: expected an integer >= 1, got 0.5"),
        (
            lambda: multi_crop_boxes((8, 8), crop_size=4, stride=5, full_windows=True),
            "stride: expected at most crop_size 4 for full windows, got 5",
        ),
        (lambda: multi_crop_cam(lambda x: x, IMAGE[0]), r"image: expected shape \(B, 3, H, W\)"),
        (lambda: multi_crop_cam(lambda x: x, IMAGE[:0]), "number of images: expected an integer >= 1, got 0"),
        (lambda: multi_crop_cam(lambda x: x, IMAGE, batch_size=0), "batch_size: expected an integer >= 1"),
        (lambda: multi_crop_cam(lambda x: x, IMAGE, crop_size=True), "crop_size: expected an integer >= 1"),
        (lambda: multi_crop_cam(lambda x: x, IMAGE, torch.ones(2, 3)), r"labels: .* with B=1 from image"),
        (
            lambda: multi_crop_cam(lambda x: x, IMAGE, torch.ones(1, 2)),
            r"cam_fn\(crops\): .* with C=2 from labels",
        ),
        (
            lambda: multi_crop_cam(lambda x: x, IMAGE, torch.full((1, 3), 0.5)),
            "labels: expected a multi-hot",
        ),
        (lambda: multi_crop_cam(lambda x: x.mean((2, 3)), IMAGE), r"cam_fn\(crops\): expected shape"),
        (lambda: multi_crop_cam(lambda x: x[:1], IMAGE), r"cam_fn\(crops\): .* from crops"),
        (lambda: crop_labels(SCORES[0], BOX), r"scores: expected shape \(B, N, H, W\)"),
        (lambda: crop_labels(SCORES, BOX[0]), r"boxes: expected shape \(n, 4\), got \(4,\)"),
        (lambda: crop_labels(SCORES * 2 + 1, BOX), r"scores: expected values in \[0, 1\]"),
        (lambda: crop_labels(SCORES, BOX, overlap=1.5), "overlap: expected a finite number"),
        (lambda: crop_labels(SCORES, BOX, score_threshold=-1), "score_threshold: expected a finite number"),
        (
            lambda: crop_labels(SCORES, BOX + torch.tensor([0, 0, 1, 0])),
            r"boxes: .* bottom <= 8 .* got \[0, 0, 9, 8\]",
        ),
        (lambda: crop_labels(SCORES, BOX + torch.tensor([0, 0, 0, 1])), r"right <= 8, got \[0, 0, 8, 9\]"),
        (lambda: crop_labels(SCORES, BOX - torch.tensor([1, 0, 0, 0])), r"got \[-1, 0, 8, 8\]"),
        (lambda: crop_labels(SCORES, BOX - torch.tensor([0, 1, 0, 0])), r"got \[0, -1, 8, 8\]"),
        (lambda: crop_labels(SCORES, BOX * 0), r"boxes: expected .* got \[0, 0, 0, 0\]"),
        (lambda: crop_labels(SCORES, torch.tensor([[4, 0, 4, 8]])), r"boxes: expected .* got \[4, 0, 4, 8\]"),
        (lambda: crop_labels(SCORES, torch.tensor([[0, 4, 8, 4]])), r"boxes: expected .* got \[0, 4, 8, 4\]"),
    ],
)
def test_errors(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: multi_crop_cam(lambda x: x, IMAGE.byte()), "image: expected a floating-point tensor"),
        (lambda: multi_crop_cam(lambda x: x.int(), IMAGE), r"cam_fn\(crops\): expected a floating-point"),
        (lambda: crop_labels(SCORES.int(), BOX), "scores: expected a floating-point tensor"),
        (lambda: crop_labels(SCORES, BOX.float()), "boxes: expected an integer tensor"),
    ],
)
def test_type_errors(call, message) -> None:
    with pytest.raises(TypeError, match=message):
        call()


def test_devices(device: torch.device, generator: torch.Generator) -> None:
    net, image = network(generator), torch.rand(2, 3, 14, 18, generator=generator)
    labels = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0]])
    cam = multi_crop_cam(net, image.to(device), labels.to(device), **SETTINGS)
    assert cam.device.type == device.type
    torch.testing.assert_close(
        cam.cpu(), multi_crop_cam(net, image, labels, **SETTINGS), atol=1e-3, rtol=1e-3
    )
    scores, boxes = torch.rand(2, 4, 9, 9, generator=generator) ** 0.2, multi_crop_boxes((9, 9), (1.0,), 4, 3)
    found = crop_labels(scores.to(device), boxes)
    assert found.device.type == device.type
    assert torch.equal(found.cpu(), crop_labels(scores, boxes))
