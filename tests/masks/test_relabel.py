"""`relabel`, `average_views` and `slide_logits`: section 6.5 of the PMM specification."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pseudolabel.masks import average_views, relabel, slide_logits

RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


def golden_views(data: dict[str, np.ndarray], case: int) -> tuple[torch.Tensor, list[torch.Tensor], Callable]:
    """Image in [0, 1], the twelve network inputs, and the recorded network."""
    image = torch.from_numpy(data[f"c{case}_img"]).permute(2, 0, 1)[None].float()
    weight = torch.from_numpy(data[f"c{case}_net_w"])
    views = []
    for ratio in RATIOS:
        size = [int(side * ratio + 0.5) for side in image.shape[2:]]
        view = F.interpolate(image / 64 - 2, size=size, mode="bilinear", align_corners=False)
        views += [view, view.flip(-1)]
    return image / 255, views, lambda x: F.conv2d(x, weight, padding=1)


def test_golden(golden: Callable) -> None:
    data = golden("pmm/public_seg_tta")
    for case in range(int(data["n_cases"])):
        image, views, net = golden_views(data, case)
        window, stride = (tuple(data[f"c{case}_{name}"].tolist()) for name in ("crop", "stride"))
        logits = [slide_logits(net, view, window, stride) for view in views]
        size = tuple(image.shape[2:])
        for number in (0, 1, 6):
            torch.testing.assert_close(views[number][0], torch.from_numpy(data[f"c{case}_view{number}_x"]))
            at_size = F.interpolate(logits[number], size=size, mode="bilinear", align_corners=False)[0]
            expected = torch.from_numpy(data[f"c{case}_view{number}_slide_logits"])
            torch.testing.assert_close(at_size, expected, atol=2e-5, rtol=1e-5)
            pair = [logits[number]] * 2 if number % 2 == 0 else [logits[number].flip(-1), logits[number]]
            probs = average_views(pair, size, flip=number % 2 == 1)[0]
            torch.testing.assert_close(
                probs, torch.from_numpy(data[f"c{case}_view{number}_prob"]), atol=4e-6, rtol=0
            )
        probs = average_views(logits, size)
        torch.testing.assert_close(probs[0], torch.from_numpy(data[f"c{case}_mean_prob"]), atol=4e-6, rtol=0)

        expected = data[f"c{case}_mask_nocrf"]
        clear = np.diff(np.sort(data[f"c{case}_mean_prob"], 0)[-2:], axis=0)[0] > 1e-5
        assert clear.mean() > 0.99
        np.testing.assert_array_equal(relabel(image, logits, crf=None)[0].numpy()[clear], expected[clear])

        expected = data[f"c{case}_cyclic_mask"]
        clear = np.diff(np.sort(data[f"c{case}_crf_out"], 0)[-2:], axis=0)[0] > 4e-3
        assert clear.mean() > 0.95
        np.testing.assert_array_equal(relabel(image, logits)[0].numpy()[clear], expected[clear])


def test_golden_crf_replayed(golden: Callable) -> None:
    data = golden("pmm/public_seg_tta")
    for case in range(int(data["n_cases"])):
        image, views, net = golden_views(data, case)
        recorded = torch.from_numpy(data[f"c{case}_crf_out"])[None]
        mask = relabel(image, [net(view) for view in views], crf=lambda *_: recorded)  # noqa: B023
        np.testing.assert_array_equal(mask[0].numpy(), data[f"c{case}_cyclic_mask"])


def test_windows() -> None:
    seen = []

    def net(x: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(x.shape))
        return x[:, :1]

    image = torch.arange(30.0).expand(1, 3, 20, 30)
    out = slide_logits(net, image, window=(16, 12), stride=(10, 8), batch_size=3)
    torch.testing.assert_close(out, image[:, :1])
    # Rows at 0 and 4; columns at 0, 8, 16 and 18: eight windows in batches of three.
    assert seen == [(3, 3, 16, 12), (3, 3, 16, 12), (2, 3, 16, 12)]


def test_overlaps_are_averaged() -> None:
    first = lambda x: (x[:, :1] - x[:, :1, :1, :1]).sign()  # noqa: E731  (0 in a window's first column, else 1)
    image = torch.arange(6.0).expand(1, 3, 1, 6)
    out = slide_logits(first, image, window=(1, 4), stride=(1, 2))
    assert out.flatten().tolist() == [0, 1, 0.5, 1, 1, 1]


def test_small_images_are_one_window() -> None:
    shapes = []
    slide_logits(
        lambda x: shapes.append(tuple(x.shape)) or x, torch.rand(2, 3, 7, 1), window=(9, 9), stride=(3, 3)
    )
    assert shapes == [(2, 3, 7, 1)]


def test_windows_side_by_side_leave_no_gap() -> None:
    image = torch.rand(1, 3, 21, 22)
    assert torch.equal(slide_logits(lambda x: x, image, window=(5, 4), stride=(5, 4)), image)


def test_logits_of_stride_are_resized() -> None:
    image = torch.rand(2, 3, 20, 24)
    out = slide_logits(lambda x: F.avg_pool2d(x, 4), image, window=(12, 12), stride=(8, 12))
    assert out.shape == image.shape


def test_batch_equals_singles(generator: torch.Generator) -> None:
    image = torch.rand(2, 3, 18, 22, generator=generator)
    weight = torch.randn(4, 3, 3, 3, generator=generator) * 3
    net = lambda x: F.conv2d(x, weight, padding=1)  # noqa: E731
    slide = lambda x: slide_logits(net, x, (10, 10), (6, 6), batch_size=3)  # noqa: E731
    labels = torch.tensor([[1, 0, 1], [0, 1, 0]])
    together = relabel(image, [slide(image), slide(image.flip(-1))], labels)
    for b in range(2):
        one = image[b : b + 1]
        assert torch.equal(relabel(one, [slide(one), slide(one.flip(-1))], labels[b : b + 1])[0], together[b])


def test_flip_equivariant_network_gives_mirrored_masks(generator: torch.Generator) -> None:
    image = torch.rand(1, 3, 9, 12, generator=generator)
    net = lambda x: x * torch.tensor([5.0, 3, 4]).view(1, 3, 1, 1)  # noqa: E731
    run = lambda x: relabel(x, [net(x), net(x.flip(-1))], crf=None)  # noqa: E731
    assert torch.equal(run(image.flip(-1)), run(image).flip(-1))


def test_labels_restrict(generator: torch.Generator) -> None:
    image, logits = (
        torch.rand(2, 3, 8, 8, generator=generator),
        9 * torch.rand(2, 5, 8, 8, generator=generator),
    )
    labels = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0]])
    free = relabel(image, [logits], flip=False)
    assert set(free[0].unique().tolist()) - {0, 2, 4}, "without labels absent classes are predicted"
    for crf in (None, lambda _, probs: probs.flip(1)):  # a CRF that brings absent classes back
        mask = relabel(image, [logits], labels, flip=False, crf=crf)
        assert set(mask[0].unique().tolist()) <= {0, 2, 4}
        assert mask[1].eq(0).all()


def test_a_fitted_network_returns_its_training_mask() -> None:
    mask = torch.randint(0, 4, (1, 10, 10))
    logits = 20.0 * F.one_hot(mask, 4).permute(0, 3, 1, 2)
    assert torch.equal(relabel(torch.rand(1, 3, 10, 10), [logits, logits.flip(-1)], crf=None), mask)


def test_identity_is_argmax(generator: torch.Generator) -> None:
    logits = torch.randn(2, 4, 6, 7, generator=generator)
    mask = relabel(torch.rand(2, 3, 6, 7), [logits], flip=False, crf=None)
    assert torch.equal(mask, logits.argmax(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype, generator: torch.Generator) -> None:
    logits = torch.randn(1, 4, 6, 7, generator=generator).to(dtype)
    probs = average_views([logits, logits.flip(-1)], (6, 7))
    assert probs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(probs, logits.to(probs.dtype).softmax(1))


def test_devices(device: torch.device) -> None:
    image = torch.rand(1, 3, 8, 8, device=device)
    assert (
        relabel(image, [slide_logits(lambda x: x, image, (6, 6), (4, 4))], flip=False).device.type
        == device.type
    )


IMAGE, LOGITS = torch.rand(1, 3, 6, 6), torch.rand(1, 4, 6, 6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: relabel(IMAGE[0], [LOGITS], flip=False), r"image: expected shape \(B, 3, H, W\)"),
        (lambda: relabel(IMAGE, []), "logits: expected an even number of views.* got 0"),
        (lambda: relabel(IMAGE, [LOGITS]), "logits: expected an even number of views.* got 1"),
        (lambda: relabel(IMAGE, [], flip=False), "logits: expected at least one view, got 0"),
        (lambda: relabel(IMAGE, [LOGITS, LOGITS[:, :2]]), r"logits\[1\]: .* with N=4"),
        (lambda: relabel(IMAGE, [LOGITS[0]], flip=False), r"logits\[0\]: expected shape"),
        (
            lambda: relabel(IMAGE, [LOGITS.repeat(2, 1, 1, 1)], flip=False),
            r"logits\[0\]: .* with B=1 from image",
        ),
        (lambda: relabel(IMAGE, [LOGITS], torch.ones(1, 4), flip=False), "labels: .* with C=3"),
        (lambda: relabel(IMAGE, [LOGITS], torch.full((1, 3), 2), flip=False), "labels: expected a multi-hot"),
        (
            lambda: relabel(IMAGE, [LOGITS * torch.nan], flip=False, crf=None),
            r"logits\[0\]: expected finite values",
        ),
        (lambda: slide_logits(lambda x: x, IMAGE, (0, 4)), r"window: expected two integers .* got \(0, 4\)"),
        (lambda: slide_logits(lambda x: x, IMAGE, stride=(4, 0)), "stride: expected two integers"),
        (
            lambda: slide_logits(lambda x: x, IMAGE, (4, 4), (5, 4)),
            r"stride: expected at most window \(4, 4\).* got \(5, 4\)",
        ),
        (lambda: slide_logits(lambda x: x, IMAGE, (4, 4), (4, 5)), r"stride: .* window \(4, 4\)"),
        (lambda: slide_logits(lambda x: x, IMAGE, batch_size=0), "batch_size: expected an integer >= 1"),
        (lambda: slide_logits(lambda x: x.mean(), IMAGE), r"segmenter\(crops\): expected shape"),
    ],
)
def test_errors(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_no_image_and_no_number() -> None:
    with pytest.raises(ValueError, match=r"image: expected at least one image"):
        slide_logits(lambda x: x, torch.rand(0, 3, 4, 4))
    with pytest.raises(TypeError, match=r"segmenter: expected a callable, got NoneType None"):
        slide_logits(None, torch.rand(1, 3, 4, 4))
    with pytest.raises(TypeError, match=r"segmenter\(crops\): expected a floating-point tensor"):
        slide_logits(lambda x: x.long(), torch.rand(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"logits\[1\]: expected finite values, got 1 NaN"):
        average_views([torch.zeros(1, 2, 1, 1), torch.tensor([0, torch.nan]).view(1, 2, 1, 1)], (1, 1))
    with pytest.raises(TypeError, match=r"logits: expected a list or tuple, got a float32 tensor"):
        average_views(torch.zeros(1, 2, 1, 1), (1, 1), flip=False)
