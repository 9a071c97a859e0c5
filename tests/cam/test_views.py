"""`make_views`, `merge_views`, `multi_scale_cam`."""

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from pseudolabel.cam import make_views, merge_views, multi_scale_cam, normalize_cam


def test_sizes_and_order() -> None:
    image = torch.rand(2, 3, 7, 10)
    views = make_views(image, (0.5, 1.0, 1.5))
    assert [tuple(view.shape[2:]) for view in views] == [(4, 5), (4, 5), (7, 10), (7, 10), (10, 15), (10, 15)]
    for plain, mirrored in zip(views[::2], views[1::2], strict=True):
        torch.testing.assert_close(mirrored, plain.flip(-1))
    assert views[2] is image
    assert len(make_views(image, (0.5, 1.0), flip=False)) == 2


def test_tiny_images_keep_a_pixel() -> None:
    assert make_views(torch.rand(1, 3, 1, 1), (0.1,))[0].shape == (1, 3, 1, 1)


def test_constant_images_stay_constant() -> None:
    for view in make_views(torch.full((1, 3, 9, 13), 0.25), (0.5, 0.75, 2.0)):
        torch.testing.assert_close(view, torch.full_like(view, 0.25))


def test_merge_hand_computed() -> None:
    plain = torch.tensor([[[[1.0, 4.0]]]])
    mirrored = torch.tensor([[[[3.0, 2.0]]]])
    assert merge_views([plain, mirrored], (1, 2)).tolist() == [[[[3.0, 7.0]]]]
    assert merge_views([plain, mirrored], (1, 2), flip_merge="max").tolist() == [[[[2.0, 4.0]]]]
    assert merge_views([plain, mirrored], (1, 2), flip=False).tolist() == [[[[4.0, 6.0]]]]


def test_merge_is_the_sum_of_resized_maps(generator: torch.Generator) -> None:
    """The published order: resize each view, mirror it back, add."""
    cams = [torch.rand(2, 3, h, w, generator=generator) for h, w in [(3, 4), (3, 4), (6, 8), (6, 8)]]
    size = (12, 16)

    def one(number: int) -> torch.Tensor:
        big = F.interpolate(cams[number], size=size, mode="bilinear", align_corners=False)
        return big.flip(-1) if number % 2 else big

    torch.testing.assert_close(merge_views(cams, size), one(0) + one(1) + one(2) + one(3))
    expected = torch.maximum(one(0), one(1)) + torch.maximum(one(2), one(3))
    torch.testing.assert_close(merge_views(cams, size, flip_merge="max"), expected)


def test_labels_zero_the_absent_classes(generator: torch.Generator) -> None:
    cams = [torch.rand(3, 4, 3, 4, generator=generator) for _ in range(2)]
    labels = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 1]])
    every = merge_views(cams, (5, 7))
    merged = merge_views(cams, (5, 7), labels)
    torch.testing.assert_close(merged, every * labels[:, :, None, None])
    torch.testing.assert_close(merge_views(cams, (5, 7), labels.bool()), merged)
    assert merge_views(cams, (5, 7), torch.zeros(3, 4)).eq(0).all()


def test_golden_multi_scale(golden: Callable) -> None:
    """Recorded network outputs of the eight views; the official maps are clamped to 0 as we decide."""
    data = golden("pmm/public_multi_scale")
    for case in range(int(data["n_cases"])):
        image, label = data[f"c{case}_image"], torch.from_numpy(data[f"c{case}_label"])[None]
        cams = [torch.from_numpy(data[f"c{case}_view{view}_cam"])[None, 1:] for view in range(8)]
        cam = normalize_cam(merge_views(cams, image.shape[:2], label), "minmax-zero")
        keys = torch.from_numpy(data[f"c{case}_norm_keys"])
        expected = torch.from_numpy(data[f"c{case}_norm_cam"]).clamp(min=0)
        torch.testing.assert_close(cam[0, keys], expected, atol=4e-6, rtol=0)
        assert torch.equal(keys, label[0].nonzero().flatten())


def test_golden_whole_program(golden: Callable) -> None:
    """The recorded network from the photo on: resizing differs by the official views' 8-bit rounding."""
    data = golden("pmm/public_multi_scale")
    for case in range(int(data["n_cases"])):
        pool = int(data[f"c{case}_net_pool"])
        weight = torch.from_numpy(data[f"c{case}_net_w"])
        bias = torch.from_numpy(data[f"c{case}_net_b"])
        image = torch.from_numpy(data[f"c{case}_image"]).permute(2, 0, 1)[None] / 255
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        shapes = []

        def net(x: torch.Tensor) -> torch.Tensor:
            maps = F.relu(F.conv2d(F.avg_pool2d(x, pool, ceil_mode=True), weight, bias))[:, 1:]  # noqa: B023
            shapes.append(tuple(maps.shape[2:]))  # noqa: B023
            return maps

        label = torch.from_numpy(data[f"c{case}_label"])[None]
        x = (image - mean[:, None, None]) / std[:, None, None]
        cam = multi_scale_cam(net, x, label, scales=data[f"c{case}_scales"].tolist())
        assert shapes == [data[f"c{case}_view{view}_cam"].shape[1:] for view in (0, 2, 4, 6)]
        cam = normalize_cam(cam, "minmax-zero")
        expected = torch.from_numpy(data[f"c{case}_norm_cam"]).clamp(min=0)
        keys = torch.from_numpy(data[f"c{case}_norm_keys"])
        assert (cam[0, keys] - expected).abs().max() < 0.03


def test_one_network_call_a_scale(generator: torch.Generator) -> None:
    batches = []

    def net(x: torch.Tensor) -> torch.Tensor:
        batches.append(x.shape[0])
        return x.mean(1, keepdim=True)

    multi_scale_cam(net, torch.rand(3, 3, 8, 8, generator=generator), scales=(0.5, 1, 2))
    assert batches == [6, 6, 6]


def test_batch_equals_singles(generator: torch.Generator) -> None:
    weight = torch.randn(4, 3, 3, 3, generator=generator)
    net = lambda x: F.conv2d(x, weight, stride=2)  # noqa: E731
    image = torch.rand(3, 3, 14, 18, generator=generator)
    labels = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 0]])
    singles = [multi_scale_cam(net, image[b : b + 1], labels[b : b + 1]) for b in range(3)]
    torch.testing.assert_close(multi_scale_cam(net, image, labels), torch.cat(singles), atol=1e-5, rtol=1e-5)


def test_mirrored_image_gives_mirrored_maps(generator: torch.Generator) -> None:
    weight = torch.randn(2, 3, 3, 3, generator=generator)
    net = lambda x: F.conv2d(x, weight, padding=1)  # noqa: E731
    image = torch.rand(1, 3, 12, 12, generator=generator)
    torch.testing.assert_close(
        multi_scale_cam(net, image.flip(-1)), multi_scale_cam(net, image).flip(-1), atol=1e-5, rtol=1e-5
    )


def test_differentiable() -> None:
    image = torch.rand(1, 3, 8, 8, requires_grad=True)
    multi_scale_cam(lambda x: x[:, :1], image, torch.ones(1, 1)).sum().backward()
    assert image.grad is not None
    assert image.grad[:, 0].abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_view_dtypes(dtype: torch.dtype, generator: torch.Generator) -> None:
    image = torch.rand(1, 3, 8, 8, generator=generator)
    for view, expected in zip(make_views(image.to(dtype)), make_views(image), strict=True):
        assert view.dtype == dtype
        torch.testing.assert_close(view.float(), expected, atol=0.01, rtol=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_merge_dtypes(dtype: torch.dtype, generator: torch.Generator) -> None:
    cams = [torch.rand(1, 2, 4, 4, generator=generator) for _ in range(2)]
    merged = merge_views([cam.to(dtype) for cam in cams], (8, 8), torch.ones(1, 2))
    assert merged.dtype == dtype
    torch.testing.assert_close(merged.float(), merge_views(cams, (8, 8)), atol=0.03, rtol=0.03)


def test_merge_compiles() -> None:
    cams = [torch.rand(1, 2, 4, 4) for _ in range(2)]
    compiled = torch.compile(lambda a, b: merge_views([a, b], (8, 8)), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*cams), merge_views(cams, (8, 8)))


IMAGE, MAP = torch.rand(1, 3, 8, 8), torch.rand(1, 2, 4, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_views(IMAGE[0]), r"image: expected shape \(B, 3, H, W\), got \(3, 8, 8\)"),
        (lambda: make_views(IMAGE[:, :1]), r"image: expected shape \(B, 3, H, W\), got \(1, 1, 8, 8\)"),
        (lambda: make_views(IMAGE, ()), "scales: expected at least one scale"),
        (lambda: make_views(IMAGE, (1, 0)), "scales: expected a finite number > 0, got 0"),
        (lambda: merge_views([], (8, 8)), "cams: expected an even number of maps.*got 0"),
        (lambda: merge_views([MAP] * 3, (8, 8)), "cams: expected an even number of maps.*got 3"),
        (lambda: merge_views([MAP, MAP[:, :1]], (8, 8)), r"cams\[1\]: .* with C=2 from cams\[0\]"),
        (lambda: merge_views([MAP, MAP], (8, 8), torch.ones(1, 3)), r"cams\[0\]: .* with C=3 from labels"),
        (lambda: merge_views([MAP, MAP], (8, 8), torch.full((1, 2), 0.5)), "labels: expected a multi-hot"),
        (lambda: merge_views([MAP, MAP], (8, 8), flip_merge="mean"), "flip_merge: expected one of"),
        (lambda: multi_scale_cam(lambda x: x.mean((2, 3)), IMAGE), r"cam_fn\(image\): expected shape"),
        (lambda: multi_scale_cam(lambda x: x[:1], IMAGE), r"cam_fn\(image\): .* with B=2 from image"),
    ],
)
def test_errors(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_eight_bit_images_are_refused() -> None:
    with pytest.raises(TypeError, match="image: expected a floating-point tensor, got a uint8 tensor"):
        make_views(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))


def test_devices(device: torch.device) -> None:
    image = torch.rand(1, 3, 8, 8, device=device)
    out = multi_scale_cam(lambda x: x[:, :2], image, torch.ones(1, 2, device=device))
    assert out.device.type == device.type
