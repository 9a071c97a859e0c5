"""`infer_response_map`, `class_conditional_response`, `class_center_boxes`, `ClassConditionalInference`."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from pseudolabel.cam import (
    CAM,
    ClassConditionalInference,
    class_center_boxes,
    class_conditional,
    class_conditional_response,
    infer_response_map,
    make_views,
    multi_scale_cam,
    normalize_cam,
)

MEAN, STD = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
TAU = 0.7


# ------------------------------------------------------------------------------------------ golden


def golden_network(data: dict[str, np.ndarray], case: str) -> nn.Module:
    def layer(name: str, **settings: int) -> nn.Conv2d:
        weight = torch.from_numpy(data[f"{case}_w_{name}_weight"])
        bias = data.get(f"{case}_w_{name}_bias")
        outputs, inputs, size, _ = weight.shape
        conv = nn.Conv2d(inputs, outputs, size, bias=bias is not None, **settings)
        conv.weight.data = weight
        if bias is not None:
            conv.bias.data = torch.from_numpy(bias)
        return conv

    strided = {"stride": 2, "padding": 1}
    first, second = layer("conv1", **strided), layer("conv2", **strided)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), layer("fc8"), nn.ReLU())


def normalized(pixels: np.ndarray) -> Tensor:
    return (torch.tensor(pixels).permute(2, 0, 1)[None] / 255 - MEAN) / STD


def pillow_views(image: Tensor, scales: Sequence[float], flip: bool) -> list[Tensor]:
    """The views of the official program: Pillow's bicubic resizing of the 8-bit image."""
    assert not flip
    height, width = image.shape[2:]
    views = []
    for scale in scales:
        pixels = ((image * STD + MEAN) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        size = (round(width * scale), round(height * scale))
        resized = [np.asarray(Image.fromarray(one).resize(size, Image.Resampling.BICUBIC)) for one in pixels]
        views.append(torch.cat([normalized(one) for one in resized]))
    return views


def official_seen(views: Sequence[Tensor], keep: Tensor | None, flip: bool) -> Iterator[Tensor]:
    """D1 and D2: mirrored views get the mask as it is, and a scale gets that of the scale before it."""
    for view in views:
        both = [view, view.flip(-1)] if flip else [view]
        if keep is not None:
            keep = class_conditional._nearest(keep, *view.shape[2:])
            both = [one.where(keep[:, None], view.mean((2, 3), keepdim=True)) for one in both]
        yield torch.cat(both)


CANONICAL = [
    ("plain", "one"),
    ("plain", "two"),
    ("stop001", "one"),
    ("stop001", "two"),
    ("edge", "const"),
    ("edge", "dead"),
    ("edge", "alldead"),
]
WITH_SLIPS = [("msf_one", "one"), ("msf_two", "two"), ("msf_three", "three")]


@pytest.fixture(params=[*CANONICAL, *WITH_SLIPS], ids="-".join)
def recorded(request, golden: Callable, monkeypatch: pytest.MonkeyPatch) -> tuple[dict, str]:
    """A recorded run; those of the whole program need its two slips put back."""
    file, case = request.param
    if request.param in WITH_SLIPS:
        monkeypatch.setattr(class_conditional, "_seen", official_seen)
    return golden(f"infercam/public_infer_{file}"), case


def recorded_settings(data: dict, case: str) -> dict[str, Any]:
    return {"flip": bool(data[f"{case}_flip"]), "stop_fraction": float(data[f"{case}_stop_threshold"])}


def recorded_boxes(data: dict, case: str) -> Tensor:
    return torch.from_numpy(data[f"{case}_boxes"])[:, [0, 2, 1, 3]]  # y0, y1, x0, x1


def test_golden_passes(recorded) -> None:
    """Each patch from its recorded views: maps and masks after every pass."""
    data, case = recorded
    net, label = golden_network(data, case), torch.from_numpy(data[f"{case}_label"])[None]
    classes = torch.from_numpy(data[f"{case}_class_ids"])
    for patch in (f"{case}_p{k}" for k in (1, 2, 3, 4)):
        scales = len(data[f"{case}_scales"])
        views = [torch.from_numpy(data[f"{patch}_in_s{j}"])[None] for j in range(scales)]
        maps = torch.from_numpy(data[f"{patch}_norm_cam"]).cummax(0).values
        total = int(data[f"{patch}_niter"])
        for passes in range(1, 6):
            found = class_conditional_response(
                net,
                views,
                label,
                tuple(maps.shape[2:]),
                max_passes=passes,
                **recorded_settings(data, case),
            )
            last = min(passes, total)
            assert found.passes.tolist() == [[last]]
            torch.testing.assert_close(found.response[0, classes], maps[last - 1], atol=1e-5, rtol=0)
            keep = torch.from_numpy(data[f"{patch}_left_area"][last - 1]) != 0
            assert torch.equal(found.response[0].amax(0) < TAU, keep)
        assert torch.equal(maps[-1], torch.from_numpy(data[f"{patch}_map"]))
        assert not found.response[label == 0].any()


def test_golden_whole_program(recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the photo on. The official boxes are those of all views, also where fewer were recorded."""
    data, case = recorded
    monkeypatch.setattr(class_conditional, "make_views", pillow_views)
    net, image = golden_network(data, case), normalized(data[f"{case}_image"])
    label, classes = torch.from_numpy(data[f"{case}_label"])[None], data[f"{case}_class_ids"]
    boxes = infer_response_map(net, image, label, max_passes=1).boxes
    assert torch.equal(boxes[0], recorded_boxes(data, case))

    monkeypatch.setattr(class_conditional, "_boxes", lambda *_: boxes)
    settings = recorded_settings(data, case)
    found = infer_response_map(net, image, label, scales=data[f"{case}_scales"].tolist(), **settings)
    assert found.passes[0].tolist() == [int(data[f"{case}_p{k}_niter"]) for k in (1, 2, 3, 4)]
    final = torch.from_numpy(data[f"{case}_final"])
    torch.testing.assert_close(found.response[0, classes], final, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("file", "slips"), [("plain", False), ("msf_one", True)])
def test_golden_erased_views(
    golden: Callable, monkeypatch: pytest.MonkeyPatch, file: str, slips: bool
) -> None:
    """What the network sees in the second pass."""
    data = golden(f"infercam/public_infer_{file}")
    if slips:
        monkeypatch.setattr(class_conditional, "_seen", official_seen)
    net, seen = golden_network(data, "one"), []
    label, patch = torch.from_numpy(data["one_label"])[None], f"one_p{int(data['one_erased_patch'])}"
    views = [torch.from_numpy(data[f"{patch}_in_s{j}"])[None] for j in range(len(data["one_scales"]))]
    record = lambda x: (seen.append(x), net(x))[1]  # noqa: E731
    size = tuple(data[f"{patch}_map"].shape[1:])
    settings = recorded_settings(data, "one")
    class_conditional_response(record, views, label, size, max_passes=2, **settings)
    second = torch.arange(len(seen)) >= len(seen) // 2
    inputs = [one for batch, late in zip(seen, second, strict=True) if late for one in batch]
    assert len(inputs) == len(views) * (2 if settings["flip"] else 1)
    for number, one in enumerate(inputs):
        expected = torch.from_numpy(data[f"one_erased_it1_i{number}"])
        torch.testing.assert_close(one, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("case", ["one", "two", "three", "dead", "wrap"])
def test_golden_split(golden: Callable, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """Maps of the whole image and the boxes; `wrap` is D4, where ours end at the border of the image."""
    data = golden("infercam/public_split")
    label = torch.from_numpy(data[f"{case}_label"])[None]
    maps = torch.from_numpy(data[f"{case}_norm_cam"])
    cam = torch.zeros(1, 20, *maps.shape[1:])
    cam[0, data[f"{case}_class_ids"]] = maps
    boxes, expected = class_center_boxes(cam, label), recorded_boxes(data, case)
    if case == "wrap":  # centre (7, 23), margin 10
        assert expected.tolist() == [[0, 0, 17, 33], [0, 13, 17, 58], [45, 0, 48, 33], [45, 13, 48, 58]]
        expected[2:, 0] = 0
    assert torch.equal(boxes[0], expected)

    monkeypatch.setattr(class_conditional, "make_views", pillow_views)
    net, image = golden_network(data, case), normalized(data[f"{case}_image"])
    whole = infer_response_map(net, image, label, split=False, max_passes=1)
    torch.testing.assert_close(whole.response, cam, atol=1e-5, rtol=0)
    assert torch.equal(infer_response_map(net, image, label, max_passes=1).boxes, boxes)


# ------------------------------------------------------------------------------------------ boxes


def test_boxes_hand_computed() -> None:
    cam = torch.zeros(4, 3, 100, 60)
    cam[:, 0, 50, 20] = 2.0
    cam[:, 0, 53, 31] = 1.0  # (51, 23.67) -> (51, 23)
    cam[:, 1, 30, 40] = 1.0
    labels = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 1], [1, 1, 1]])
    boxes = class_center_boxes(cam, labels)
    assert boxes.tolist() == [
        [[0, 0, 61, 33], [0, 13, 61, 60], [41, 0, 100, 33], [41, 13, 100, 60]],
        [[0, 0, 71, 60], [0, 3, 71, 60], [10, 0, 100, 60], [10, 3, 100, 60]],
        [[0, 0, 60, 40], [0, 20, 60, 60], [40, 0, 100, 40], [40, 20, 100, 60]],  # no response: the middle
        [[0, 0, 100, 60]] * 4,
    ]
    assert class_center_boxes(cam[:, :, ::2], torch.zeros(4, 3)).tolist() == [[[0, 0, 50, 60]] * 4] * 4
    three = class_center_boxes(cam[3:], labels[3:], margins={3: 1})
    assert three.tolist() == [[[0, 0, 52, 41], [0, 22, 52, 60], [29, 0, 100, 41], [29, 22, 100, 60]]]


@given(
    seed=st.integers(0, 1000),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    present=st.integers(1, 2),
    margin=st.integers(1, 12),
)
def test_boxes_cover_the_image_and_hold_the_centers(seed, size, present, margin) -> None:
    generator = torch.Generator().manual_seed(seed)
    cam = torch.rand(1, 2, *size, generator=generator) ** 8
    boxes = class_center_boxes(cam, torch.tensor([[1, present - 1]]), margins={1: margin, 2: margin})
    cover = torch.zeros(size)
    for top, left, bottom, right in boxes[0].tolist():
        assert 0 <= top < bottom <= size[0]
        assert 0 <= left < right <= size[1]
        cover[top:bottom, left:right] += 1
        for k in range(present):
            y, x = (
                (cam[0, k].double().sum(axis) @ torch.arange(n).double())
                for axis, n in ((1, size[0]), (0, size[1]))
            )
            total = cam[0, k].double().sum()
            assert top <= int(y / total) < bottom
            assert left <= int(x / total) < right
    assert cover.min() >= 1


# ------------------------------------------------------------------------------------------ properties


def small_network(seed: int = 0, classes: int = 4, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Stride 2, maps without negative values; its weights are drawn from the seed."""
    net = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, classes, 3, 1, 1), nn.ReLU())
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5
    return net.to(dtype)


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Smooth random images."""
    coarse = torch.randn(*shape[:2], 5, 6, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size=shape[2:], mode="bilinear")


class Recorder:
    """A network that keeps what it was given."""

    def __init__(self, net: Callable[[Tensor], Tensor]) -> None:
        self.net = net
        self.seen: list[Tensor] = []

    def __call__(self, views: Tensor) -> Tensor:
        self.seen.append(views.clone())
        return self.net(views)

    @property
    def views(self) -> int:
        return sum(len(batch) for batch in self.seen)


seeds = st.integers(0, 200)
some_labels = st.lists(st.booleans(), min_size=4, max_size=4).filter(any)


@given(seed=seeds, labels=some_labels, stop=st.sampled_from([0.005, 0.02, 0.1]))
def test_passes(seed, labels, stop) -> None:
    """Maps only grow, masks only shrink, and a run ends at the first small erasure."""
    net, image, labels = small_network(seed), noise(1, 3, 17, 22, seed=seed), torch.tensor([labels])
    settings = {"scales": (1.0, 0.5), "split": False, "stop_fraction": stop}
    runs = [infer_response_map(net, image, labels, max_passes=most, **settings) for most in range(1, 6)]
    keeps = [torch.ones(1, 17, 22, dtype=torch.bool)]
    total = int(runs[-1].passes)
    assert 1 <= total <= 5
    for most, run in enumerate(runs, start=1):
        assert int(run.passes) == min(most, total)
        assert run.response.min() >= 0
        assert run.response.max() < 1
        keeps.append(run.response.amax(1) < TAU)
        assert not (keeps[-1] & ~keeps[-2]).any()
    for before, after in pairwise(runs):
        assert (after.response >= before.response).all()
    erased = [(a & ~b).double().mean().item() for a, b in pairwise(keeps)]
    assert sum(erased) == pytest.approx(1 - keeps[-1].double().mean().item())
    assert all(part >= stop for part in erased[: total - 1])
    assert total == 5 or erased[total - 1] < stop


def test_runs_of_any_length_are_among_them() -> None:
    """The property above would hold for runs that all end at once."""
    images = (noise(1, 3, 17, 22, seed=seed) for seed in range(40))
    runs = (
        infer_response_map(small_network(seed), image, LABELS[-1:], split=False)
        for seed, image in enumerate(images)
    )
    assert {2, 3, 4, 5} <= {int(run.passes) for run in runs}


@given(seed=seeds, labels=some_labels, flip=st.booleans())
def test_one_pass_is_the_normalized_multi_scale_cam(seed, labels, flip) -> None:
    net, image, labels = small_network(seed), noise(1, 3, 15, 20, seed=seed), torch.tensor([labels])
    found = infer_response_map(net, image, labels, flip=flip, split=False, max_passes=1)
    with torch.no_grad():
        expected = normalize_cam(multi_scale_cam(net, image, labels, (1.0, 0.5, 1.5, 2.0), flip))
    torch.testing.assert_close(found.response, expected, atol=1e-6, rtol=1e-5)


@given(seed=seeds)
def test_thresholds_out_of_reach(seed) -> None:
    net, image, labels = small_network(seed), noise(1, 3, 15, 20, seed=seed), torch.tensor([[1, 0, 1, 0]])
    once = infer_response_map(net, image, labels, max_passes=1)
    for settings in ({"erase_threshold": 1.1}, {"stop_fraction": 1.1}):
        found = infer_response_map(net, image, labels, **settings)
        assert (found.passes == 1).all()
        assert torch.equal(found.response, once.response)
    for stop in (0.0, -1.0):
        assert (infer_response_map(net, image, labels, stop_fraction=stop).passes == 5).all()


@given(seed=seeds, joint=st.booleans())
def test_absent_classes_are_zero_and_have_no_influence(seed, joint) -> None:
    net, image, labels = (
        small_network(seed),
        noise(2, 3, 15, 20, seed=seed),
        torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0]]),
    )
    found = infer_response_map(net, image, labels, joint=joint)
    assert not found.response[labels == 0].any()
    first = infer_response_map(net, image[:1], labels[:1], joint=joint)
    net[2].weight.data[[1, 3]] = 7.0
    net[2].bias.data[[1, 3]] = 7.0
    again = infer_response_map(net, image[:1], labels[:1], joint=joint)
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)


@given(seed=seeds, order=st.permutations(range(4)))
def test_classes_may_come_in_any_order(seed, order) -> None:
    net, image, labels = small_network(seed), noise(1, 3, 15, 20, seed=seed), torch.tensor([[1, 1, 0, 0]])
    found = infer_response_map(net, image, labels)
    permuted = infer_response_map(lambda x: net(x)[:, order], image, labels[:, order])
    assert torch.equal(permuted.response, found.response[:, order])
    assert torch.equal(permuted.boxes, found.boxes)


@given(seed=seeds, labels=some_labels)
def test_classes_alone_do_not_know_of_each_other(seed, labels) -> None:
    """With `joint=False`, and the same patches, each class is as if it were the only one."""
    net, image = small_network(seed), noise(1, 3, 15, 20, seed=seed)
    labels = torch.tensor([labels]).float()
    found = infer_response_map(net, image, labels, joint=False, split=False)
    passes = []
    for c in labels[0].nonzero()[:, 0].tolist():
        only = F.one_hot(torch.tensor([c]), 4)
        alone = infer_response_map(net, image, only, split=False)
        torch.testing.assert_close(found.response[:, c], alone.response[:, c], atol=1e-5, rtol=0)
        passes.append(int(alone.passes))
    assert int(found.passes) == max(passes)


@given(seed=seeds, power=st.integers(-8, 8))
def test_scaled_maps_change_nothing(seed, power) -> None:
    """To the last bit, without the guard of the division; a class without a response stays out of it."""
    net, image = small_network(seed), noise(1, 3, 15, 20, seed=seed)
    labels = torch.tensor([[1, 1, 0, 0]])
    net[2].weight.data[1], net[2].bias.data[1] = 0, 0
    found = infer_response_map(net, image, labels, eps=0.0)
    scaled = infer_response_map(lambda x: 2.0**power * net(x), image, labels, eps=0.0)
    for one, other in zip(found, scaled, strict=True):
        assert torch.equal(one, other)
    assert not found.response[:, 1].any()
    assert found.response.isfinite().all()


@given(seed=seeds)
def test_scaled_maps_change_little_beside_the_guard(seed) -> None:
    net, image = small_network(seed), noise(1, 3, 15, 20, seed=seed)
    labels = torch.tensor([[1, 0, 0, 0]])
    found, scaled = (
        infer_response_map(lambda x: a * net(x), image, labels, split=False, max_passes=1)  # noqa: B023
        for a in (1.0, 3.0)
    )
    torch.testing.assert_close(found.response, scaled.response, atol=1e-3, rtol=0)


def mirror_error(seed: int) -> tuple[float, int]:
    net, view = small_network(seed), noise(1, 3, 16, 20, seed=seed)
    labels, settings = torch.tensor([[1, 0, 1, 0]]), {"max_passes": 3, "stop_fraction": 0.0}
    found, mirrored = (
        class_conditional_response(net, [one], labels, (16, 20), **settings) for one in (view, view.flip(-1))
    )
    return (found.response - mirrored.response.flip(-1)).abs().max().item(), int(found.passes)


def test_d1_a_mirrored_image_gives_mirrored_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(8):
        error, passes = mirror_error(seed)
        assert error < 1e-5
        assert passes == 3
    monkeypatch.setattr(class_conditional, "_seen", official_seen)
    assert max(mirror_error(seed)[0] for seed in range(8)) > 0.01


def test_d2_the_order_of_scales_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    def error(seed: int) -> float:
        net, image = small_network(seed), noise(1, 3, 16, 20, seed=seed)
        labels, settings = torch.tensor([[1, 0, 1, 0]]), {"split": False, "flip": False}
        one, other = (
            infer_response_map(net, image, labels, scales=scales, **settings).response
            for scales in ((1.0, 0.5, 1.5, 2.0), (2.0, 1.5, 0.5, 1.0))
        )
        return (one - other).abs().max().item()

    assert max(error(seed) for seed in range(8)) < 1e-5
    monkeypatch.setattr(class_conditional, "_seen", official_seen)
    assert max(error(seed) for seed in range(8)) > 0.01


def test_d4_patches_end_at_the_border() -> None:
    """A centre nearer to the border than the margin."""
    cam = torch.zeros(1, 1, 50, 60)
    cam[0, 0, 3, 57] = 1
    assert class_center_boxes(cam, torch.ones(1, 1)).tolist() == [
        [[0, 0, 13, 60], [0, 47, 13, 60], [0, 0, 50, 60], [0, 47, 50, 60]]
    ]
    corner = noise(1, 3, 50, 60) * 0.1
    corner[:, :, :6, 54:] += 5
    found = infer_response_map(lambda x: x.mean(1, keepdim=True).clamp(min=0) ** 4, corner, torch.ones(1, 1))
    assert found.boxes[0, 2:, 0].tolist() == [0, 0]
    assert found.boxes[0, :, 3].tolist() == [60] * 4
    assert found.response.isfinite().all()


def test_d8_an_image_without_labels_gives_zeros_and_calls_nothing() -> None:
    network = Recorder(small_network())
    image, none = noise(2, 3, 16, 20), torch.zeros(2, 4)
    for found in (
        infer_response_map(network, image, none),
        class_conditional_response(network, [image], none, (16, 20)),
    ):
        assert not found.response.any()
        assert found.response.shape == (2, 4, 16, 20)
        assert not found.passes.any()
        assert (found.boxes == torch.tensor([0, 0, 16, 20])).all()
    assert not network.seen
    # Nor does it leave a trace in a batch.
    labels = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0]])
    found = infer_response_map(network, image, labels)
    alone = infer_response_map(network, image[1:], labels[1:])
    torch.testing.assert_close(found.response[1:], alone.response, atol=1e-5, rtol=0)
    assert not found.response[0].any()
    assert found.passes[0].tolist() == [0] * 4
    assert found.passes[1:].tolist() == alone.passes.tolist()


@given(seed=seeds, labels=some_labels)
def test_fusion_takes_the_larger_response(seed, labels) -> None:
    """Each patch by itself, from views of the caller, in any order."""
    net, image, labels = small_network(seed), noise(1, 3, 30, 36, seed=seed), torch.tensor([labels])
    settings = {"scales": (1.0, 0.5)}
    found = infer_response_map(net, image, labels, **settings)
    fused = torch.zeros_like(found.response)
    for k in (3, 1, 1, 0, 2):
        top, left, bottom, right = found.boxes[0, k].tolist()
        views = make_views(image[:, :, top:bottom, left:right], flip=False, **settings)
        patch = class_conditional_response(net, views, labels, (bottom - top, right - left))
        assert int(patch.passes) == int(found.passes[0, k])
        there = fused[:, :, top:bottom, left:right]
        there.copy_(torch.maximum(there, patch.response))
    torch.testing.assert_close(found.response, fused, atol=1e-5, rtol=0)
    if labels.sum() > 2:
        whole = infer_response_map(net, image, labels, split=False, **settings)
        assert torch.equal(found.response, whole.response)
        assert found.passes.unique().tolist() == whole.passes[0].tolist()


@given(seed=seeds, flip=st.booleans())
def test_erased_views(seed, flip) -> None:
    """Kept pixels reach the network unchanged, erased ones have the mean colour of the clean view."""
    network, image = Recorder(small_network(seed)), noise(1, 3, 16, 21, seed=seed)
    labels, scales = torch.tensor([[1, 0, 0, 1]]), (1.0, 0.5, 1.5)
    settings = {"scales": scales, "split": False, "flip": flip}
    first = infer_response_map(network.net, image, labels, max_passes=1, **settings)
    keep = first.response[0].amax(0) < TAU
    infer_response_map(network, image, labels, max_passes=2, stop_fraction=0.0, **settings)
    clean, erased = network.seen[:3], network.seen[3:]
    assert [len(batch) for batch in network.seen] == [1 + flip] * 6
    for before, after in zip(clean, erased, strict=True):
        height, width = before.shape[2:]
        mask = torch.tensor(
            [[bool(keep[y * 16 // height, x * 21 // width]) for x in range(width)] for y in range(height)]
        )
        for one, other, m in zip(before, after, (mask, mask.flip(-1)), strict=False):
            assert torch.equal(one[:, m], other[:, m])
            mean = one.mean((1, 2))[:, None].expand(3, int((~m).sum()))
            torch.testing.assert_close(other[:, ~m], mean, atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------------------ edge cases


def strip(*values: float) -> Tensor:
    """A view (1,3,1,n) whose first channel is a map already."""
    view = torch.zeros(1, 3, 1, len(values))
    view[0, 0, 0] = torch.tensor(values)
    return view


def red(views: Tensor) -> Tensor:
    return views[:, :1]


def look(view: Tensor, labels: Tensor | None = None, net=red, **settings: Any) -> tuple[Tensor, int]:
    labels = torch.ones(1, 1) if labels is None else labels
    found = class_conditional_response(net, [view], labels, tuple(view.shape[2:]), **settings)
    return found.response[0], int(found.passes)


def test_passes_hand_computed() -> None:
    """Mean colour 1.6: 8 is erased at first, then 4, 3 and 1.6 and so on."""
    view = strip(8, 5, 2, 1, 0, 0, 0, 0, 0, 0)
    response, passes = look(view, max_passes=1, eps=0.0)
    torch.testing.assert_close(response[0, 0], view[0, 0, 0] / 8)
    response, passes = look(view, max_passes=2, eps=0.0)  # the network sees 1.6 5 2 1 0 ...
    torch.testing.assert_close(response[0, 0, :4], torch.tensor([1.0, 1.0, 0.4, 0.2]))
    response, passes = look(view, max_passes=3, eps=0.0)  # 1.6 1.6 2 1 0 ...
    torch.testing.assert_close(response[0, 0, :4], torch.tensor([1.0, 1.0, 1.0, 0.5]))
    response, passes = look(view, eps=0.0)  # 1.6 1.6 1.6 1 0: nothing new, and that is the last
    torch.testing.assert_close(response[0, 0, :5], torch.tensor([1.0, 1.0, 1.0, 0.625, 0.0]))
    assert passes == 4


def test_a_class_never_confident() -> None:
    """Its maximum m lies below eps tau / (1 - tau), so m / (m + eps) stays below tau."""
    response, passes = look(strip(2.3e-5, 1e-5, 0, 0), flip=False)
    assert passes == 1
    assert 0.69 < response.max() < TAU
    response, passes = look(strip(2.4e-5, 1e-5, 0, 0), flip=False)
    assert response.max() >= TAU
    assert passes > 1


def test_a_dead_class() -> None:
    net = lambda x: torch.cat([x[:, :1], 0 * x[:, :1]], 1)  # noqa: E731
    alone, passes = look(strip(8, 5, 2, 1, 0, 0))
    both, same = look(strip(8, 5, 2, 1, 0, 0), torch.ones(1, 2), net)
    assert torch.equal(both[:1], alone)
    assert not both[1].any()
    assert passes == same > 1
    response, passes = look(strip(8, 5, 2), torch.tensor([[0, 1]]), net, eps=0.0)
    assert passes == 1
    assert not response.any()


def test_all_pixels_erased() -> None:
    """Then the network sees one colour; what it says of that is brought to 1."""
    response, passes = look(strip(4, 4, 4, 3))
    assert passes == 2
    assert (response > 0.99).all()


def test_a_response_at_the_threshold_is_erased() -> None:
    view = strip(4, 2, 1, 0)
    for threshold, expected in ((0.5, 3), (0.5001, 2)):
        network = Recorder(red)
        look(view, net=network, erase_threshold=threshold, eps=0.0, flip=False, max_passes=2, stop_fraction=0)
        erased = network.seen[1] != network.seen[0]
        assert 1 + int(erased.sum()) == expected, threshold


def test_the_number_of_passes_at_the_ends() -> None:
    view = torch.zeros(1, 3, 1, 100)
    view[0, 0, 0, 0] = 9
    network = Recorder(red)
    assert (
        look(view, net=network, stop_fraction=0.0101)[1] == 1
    )  # the first finds 0.01, and nothing is erased
    assert all(torch.equal(one[:1], view) for one in network.seen)
    view[0, 0, 0, :99] = 9
    view[0, 0, 0, 99] = 1
    assert look(view)[1] == 2  # the second can find 0.01 at most


def test_a_pixel_erased_for_one_class_is_hidden_from_the_other() -> None:
    net = lambda x: x[:, :2]  # noqa: E731
    view = torch.zeros(1, 3, 1, 40)
    view[0, 0, 0, 0] = 9
    view[0, 1, 0, :3] = torch.tensor([5.0, 9.0, 4.0])
    settings = {"net": net, "eps": 0.0, "max_passes": 2}
    both, _ = look(view, torch.ones(1, 2), **settings)
    alone, _ = look(view, torch.ones(1, 2), joint=False, **settings)
    # Second class: 9 is erased, then it is brought to 1 by 4, or by the 5 that the first class hides.
    torch.testing.assert_close(both[1, 0, :3], torch.tensor([5 / 9, 1.0, 1.0]))
    torch.testing.assert_close(alone[1, 0, :3], torch.tensor([1.0, 1.0, 4 / 5]))


def test_least_response() -> None:
    """With views summed, 4 and its mirror image count 8."""
    net = lambda x: x[:, :2]  # noqa: E731
    view = torch.zeros(1, 3, 1, 8)
    view[0, 0, 0, 0], view[0, 1, 0, 7] = 4, 1
    for least, counts in (
        (0.0, [True, True]),
        (2.0, [True, True]),
        (2.1, [True, False]),
        (8.1, [False, False]),
    ):
        response, passes = look(view, torch.ones(1, 2), net, min_response=least)
        assert response.flatten(1).any(1).tolist() == counts, least
        assert passes > 1 or not any(counts)
    # In a later pass as well: without the 4 there is but its trace in the mean colour.
    kept, _ = look(view, torch.tensor([[1, 0]]), net, min_response=2.1)
    raised, _ = look(view, torch.tensor([[1, 0]]), net)
    assert torch.equal(kept, raised)
    view[0, 0, 0, 3] = 1
    kept, _ = look(view, torch.tensor([[1, 0]]), net, min_response=2.1)
    raised, _ = look(view, torch.tensor([[1, 0]]), net)
    assert kept[0, 0, 3] == pytest.approx(0.25, abs=1e-4)
    assert raised[0, 0, 3] == pytest.approx(1, abs=1e-4)


def test_negative_maps_count_as_zero() -> None:
    net = small_network()[:-1]  # without its last ReLU
    image, labels = noise(1, 3, 16, 20), torch.tensor([[1, 1, 0, 0]])
    signed, clamped = (infer_response_map(one, image, labels) for one in (net, small_network()))
    assert net(image).min() < 0
    for one, other in zip(signed, clamped, strict=True):
        assert torch.equal(one, other)
    assert not look(strip(-3, -1, -2))[0].any()


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 2)])
@pytest.mark.parametrize("dead", [False, True])
def test_small_images(size, dead) -> None:
    net = small_network(classes=1, dtype=torch.float64)
    net[2].weight.data.mul_(not dead).abs_()
    net[2].bias.data.fill_(not dead)
    found = infer_response_map(net, noise(2, 3, *size).double(), torch.ones(2, 1))
    assert found.response.dtype == torch.float64
    assert found.response.isfinite().all()
    assert bool(found.response.any()) != dead


# ------------------------------------------------------------------------------------------ batches, calls


LABELS = torch.tensor([[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1], [1, 1, 1, 1]])


@pytest.mark.parametrize(
    "settings",
    [{}, {"joint": False}, {"flip": False}, {"split": False}, {"include_full_image": True}],
    ids=str,
)
def test_batch_equals_singles(settings) -> None:
    net, image = small_network(3), noise(6, 3, 34, 40, seed=3)
    found = infer_response_map(net, image, LABELS, **settings)
    assert len(found.passes.unique()) > 2
    for b in range(6):
        one = infer_response_map(net, image[b : b + 1], LABELS[b : b + 1], **settings)
        torch.testing.assert_close(found.response[b : b + 1], one.response, atol=1e-5, rtol=0)
        assert torch.equal(found.boxes[b], one.boxes[0])
        assert torch.equal(found.passes[b], one.passes[0])


@pytest.mark.parametrize("pixels", [1, 2000, 10**7])
def test_max_pixels_bounds_the_batches_and_changes_nothing(pixels) -> None:
    net, image = small_network(3), noise(6, 3, 34, 40, seed=3)
    network = Recorder(net)
    found = infer_response_map(network, image, LABELS, max_pixels=pixels)
    expected = infer_response_map(net, image, LABELS)
    torch.testing.assert_close(found.response, expected.response, atol=1e-5, rtol=0)
    assert torch.equal(found.passes, expected.passes)
    for batch in network.seen:
        assert len(batch) == 1 or len(batch) * batch.shape[2:].numel() <= pixels
    assert max(len(batch) for batch in network.seen) > 6 or pixels < 10**7


def test_nothing_is_computed_twice() -> None:
    """Plain and mirrored at two scales make four views; the first pass of a split image is one more look."""
    net, image = small_network(3), noise(1, 3, 62, 70, seed=3)
    for labels, split in ((LABELS[:1], True), (LABELS[1:2], True), (LABELS[3:4], True), (LABELS[:1], False)):
        network = Recorder(net)
        found = infer_response_map(network, image, labels, scales=(1.0, 0.5), split=split)
        different = {
            tuple(box): int(n) for box, n in zip(found.boxes[0].tolist(), found.passes[0], strict=True)
        }
        several = len(different) > 1
        assert several == (split and labels.sum() < 3)
        assert network.views == 4 * (sum(different.values()) + several)
    # All patches of an image smaller than the margin are the image.
    network = Recorder(net)
    found = infer_response_map(network, image[..., :8, :9], LABELS[:1], scales=(1.0, 0.5))
    assert found.boxes.unique(dim=1).tolist() == [[[0, 0, 8, 9]]]
    assert network.views == 4 * (1 + int(found.passes[0, 0]))


def test_images_of_one_size_share_calls_and_leave_when_done() -> None:
    net, image = small_network(3), noise(6, 3, 34, 40, seed=3)
    network = Recorder(net)
    found = infer_response_map(
        network, image, torch.ones(6, 4), scales=(1.0,), stop_fraction=0.06, max_pixels=10**7
    )
    passes = found.passes[:, 0]
    assert len(passes.unique()) > 1
    assert [len(batch) for batch in network.seen] == [
        2 * int((passes > t).sum()) for t in range(int(passes.max()))
    ]


def test_classes_alone_share_the_clean_look() -> None:
    network = Recorder(small_network(3))
    image = noise(1, 3, 34, 40, seed=3)
    infer_response_map(network, image, LABELS[-1:], scales=(1.0,), joint=False, max_passes=1)
    assert network.views == 2


def test_the_full_image_as_a_fifth_patch() -> None:
    net, image = small_network(3), noise(4, 3, 34, 40, seed=3)
    labels = LABELS[:4]
    parts, whole = (infer_response_map(net, image, labels, split=split) for split in (True, False))
    found = infer_response_map(net, image, labels, include_full_image=True)
    assert torch.equal(found.response, torch.maximum(parts.response, whole.response))
    assert torch.equal(found.boxes, torch.cat([parts.boxes, whole.boxes], 1))
    assert torch.equal(found.passes, torch.cat([parts.passes, whole.passes], 1))
    same = infer_response_map(net, image, labels, include_full_image=True, split=False)
    assert torch.equal(same.boxes, whole.boxes)


def test_margins_say_what_is_split() -> None:
    net, image = small_network(3), noise(4, 3, 34, 40, seed=3)
    found = infer_response_map(net, image, LABELS[:4], margins={3: 2})
    whole = infer_response_map(net, image, LABELS[:4], split=False)
    assert torch.equal(found.response[:3], whole.response[:3])
    assert len(found.boxes[3].unique(dim=0)) == 4


def test_the_callers_views_may_be_anything(generator: torch.Generator) -> None:
    """Views need not be resized copies of one another; each is seen plain and mirrored."""
    views = [torch.rand(2, 3, 9, 5, generator=generator), torch.rand(2, 3, 4, 11, generator=generator)]
    labels = torch.tensor([[1, 0, 1], [0, 1, 0]])
    found = class_conditional_response(lambda x: x, views, labels, (8, 10), max_passes=1)
    resized = sum(
        F.interpolate(view + view.flip(-1).flip(-1), size=(8, 10), mode="bilinear") for view in views
    )
    expected = resized / (resized.amax((2, 3), keepdim=True) + 1e-5) * labels[:, :, None, None]
    torch.testing.assert_close(found.response, expected)


# ------------------------------------------------------------------------------------------ networks


class Switching(nn.Module):
    """Batch norm and dropout, which show in which mode the network is."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(8, 4)
        self.modes: list[tuple[bool, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append((self.training, torch.is_grad_enabled()))
        features = self.body(x)
        self.head(self.pool(features).flatten(1))
        return F.conv2d(features, self.head.weight[:, :, None, None])


def test_a_network_is_left_as_it_was() -> None:
    net, image, labels = Switching(), noise(2, 3, 16, 20), torch.ones(2, 4)
    net.train()
    net.body[3].eval()
    modes = [module.training for module in net.modules()]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    image.requires_grad_()
    found = infer_response_map(net, image, labels)
    assert set(net.modes) == {(False, False)}
    assert not found.response.requires_grad
    assert torch.is_grad_enabled()
    assert [module.training for module in net.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())
    with pytest.raises(ValueError, match="cam_fn"):
        infer_response_map(net, image, torch.ones(2, 5))
    assert [module.training for module in net.modules()] == modes
    assert torch.is_grad_enabled()


def test_with_cam() -> None:
    """`CAM` of a classifier, or the same maps from a module."""

    class Classifier(Switching):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.pool(self.body(x)).flatten(1))

    torch.manual_seed(0)
    net, image, labels = Classifier().train(), noise(2, 3, 16, 20), torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0]])
    maps = Switching()
    maps.load_state_dict(net.state_dict())
    found = infer_response_map(CAM(net), image, labels)
    expected = infer_response_map(maps, image, labels)
    torch.testing.assert_close(found.response, expected.response, atol=1e-5, rtol=0)
    assert net.training
    assert net.body.training


class TinyViT(nn.Module):
    """Tokens of 4 x 4 pixels, positions of a 6 x 6 grid interpolated to what the image has."""

    def __init__(self, classes: int, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 4, 4)
        self.positions = nn.Parameter(torch.randn(1, width, 6, 6))
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + F.interpolate(self.positions, size=x.shape[2:], mode="bicubic")
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        tokens = tokens + self.mlp(tokens)
        return self.head(tokens.transpose(1, 2).view_as(x))


def test_a_vision_transformer() -> None:
    torch.manual_seed(0)
    net, image = TinyViT(4), noise(6, 3, 34, 45, seed=1)
    found = infer_response_map(net, image, LABELS)
    assert found.response.isfinite().all()
    assert torch.equal(found.response.amax((2, 3)) > 0.9, LABELS > 0)
    assert len(found.passes.unique()) > 2
    one = infer_response_map(net, image[3:4], LABELS[3:4])
    torch.testing.assert_close(found.response[3:4], one.response, atol=1e-4, rtol=0)


def test_views_below_the_stride_are_named() -> None:
    image, labels = noise(1, 3, 9, 14), torch.ones(1, 4)
    with pytest.raises(ValueError, match=r"image: cam_fn fails on a view of 2 x 4 pixels .*Kernel size"):
        infer_response_map(TinyViT(4), image, labels, scales=(1.0, 0.25))
    strided = lambda x: x[:, :1, 3::8, 3::8].repeat(1, 4, 1, 1)  # noqa: E731
    with pytest.raises(ValueError, match="image: cam_fn returns an empty map for a view of 2 x 4 pixels"):
        infer_response_map(strided, image, labels, scales=(1.0, 0.25))


# ------------------------------------------------------------------------------------------ the rest


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    image, labels = noise(2, 3, 16, 20), torch.tensor([[1, 0, 0], [0, 1, 1]])
    net = lambda x: x  # noqa: E731
    settings = {"scales": (1.0,), "split": False, "max_passes": 1}
    found = infer_response_map(net, image.to(dtype), labels, **settings)
    assert found.response.dtype == dtype
    assert found.passes.dtype == found.boxes.dtype == torch.int64
    expected = infer_response_map(net, image, labels, **settings).response
    torch.testing.assert_close(found.response.float(), expected, atol=0.02, rtol=0.02)
    views = class_conditional_response(net, [image.to(dtype)], labels, (16, 20), max_passes=1)
    assert torch.equal(views.response, found.response)
    boxes = class_center_boxes(image.to(dtype), labels)
    assert (boxes - class_center_boxes(image, labels)).abs().max() <= 1


@pytest.mark.parametrize("labels", [torch.bool, torch.int64, torch.float64])
def test_labels_of_any_dtype(labels: torch.dtype) -> None:
    net, image = small_network(), noise(6, 3, 16, 20)
    one, other = (infer_response_map(net, image, LABELS.to(dtype)) for dtype in (labels, torch.float32))
    assert torch.equal(one.response, other.response)


def test_devices(device: torch.device) -> None:
    net, image = small_network(3), noise(6, 3, 34, 40, seed=3)
    expected = infer_response_map(net, image, LABELS)
    found = infer_response_map(net.to(device), image.to(device), LABELS.to(device))
    assert {part.device.type for part in found} == {device.type}
    assert (found.response.cpu() - expected.response).abs().mean() < 1e-3
    assert class_center_boxes(image.to(device), LABELS[:, :3].to(device)).device.type == device.type


def test_module_equals_function() -> None:
    net, image = small_network(3), noise(6, 3, 34, 40, seed=3)
    settings = {
        "scales": (1.0, 0.5),
        "flip": False,
        "split": True,
        "margins": {1: 3},
        "include_full_image": True,
        "joint": False,
        "max_passes": 3,
        "erase_threshold": 0.6,
        "stop_fraction": 0.05,
        "min_response": 0.01,
        "eps": 1e-3,
        "max_pixels": 1000,
    }
    module = ClassConditionalInference(net, **settings)
    expected = infer_response_map(net, image, LABELS, **settings)
    for one, other in zip(module(image, LABELS), expected, strict=True):
        assert torch.equal(one, other)
    default = ClassConditionalInference(net)(image, LABELS)
    assert torch.equal(default.response, infer_response_map(net, image, LABELS).response)
    assert not torch.equal(default.response, expected.response)
    assert list(module.parameters()) == list(net.parameters())
    assert "max_passes=3, erase_threshold=0.6" in repr(module)
    assert module.train()(image, LABELS).response.equal(expected.response)


NET, IMAGE, ONES = small_network(), noise(1, 3, 16, 20), torch.ones(1, 4)
VIEW = [noise(1, 3, 8, 10)]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: infer_response_map(NET, IMAGE[0], ONES),
            ValueError,
            r"image: expected shape \(B, 3, H, W\)",
        ),
        (lambda: infer_response_map(NET, IMAGE, ONES[0]), ValueError, r"labels: expected shape \(B, C\)"),
        (
            lambda: infer_response_map(NET, IMAGE, ONES.repeat(2, 1)),
            ValueError,
            "labels: .* with B=1 from image",
        ),
        (lambda: infer_response_map(NET, IMAGE, 2 * ONES), ValueError, "labels: expected a multi-hot"),
        (lambda: infer_response_map(NET, IMAGE.byte(), ONES), TypeError, "image: expected a floating-point"),
        (
            lambda: infer_response_map(NET, IMAGE, torch.ones(1, 3)),
            ValueError,
            r"cam_fn\(image\): expected 3 maps, as labels, got 4",
        ),
        (
            lambda: infer_response_map(lambda x: NET(x).mean((2, 3)), IMAGE, ONES),
            ValueError,
            r"cam_fn\(image\): expected shape \(N, C, hi, wi\)",
        ),
        (
            lambda: infer_response_map(lambda x: NET(x)[:1], IMAGE, ONES),
            ValueError,
            r"cam_fn\(image\): expected .* with N=2 from image",
        ),
        (
            lambda: infer_response_map(lambda x: NET(x) > 0, IMAGE, ONES),
            TypeError,
            r"cam_fn\(image\): expected a floating-point",
        ),
        (
            lambda: infer_response_map(lambda x: NET(x) / 0, IMAGE, ONES),
            ValueError,
            r"cam_fn\(image\): expected finite values",
        ),
        (lambda: infer_response_map(NET, IMAGE / 0, ONES), ValueError, r"cam_fn\(image\): expected finite"),
        (
            lambda: infer_response_map(NET, IMAGE, ONES, scales=()),
            ValueError,
            "scales: expected at least one",
        ),
        (lambda: infer_response_map(NET, IMAGE, ONES, scales=(0,)), ValueError, "scales: expected a finite"),
        (
            lambda: infer_response_map(NET, IMAGE, ONES, margins={1: 0}),
            ValueError,
            r"margins\[1\]: expected an integer >= 1, got 0",
        ),
        (
            lambda: infer_response_map(NET, IMAGE, ONES, margins={0: 10}),
            ValueError,
            "margins: number of classes: expected an integer >= 1, got 0",
        ),
        (
            lambda: infer_response_map(NET, IMAGE, ONES, max_passes=0),
            ValueError,
            "max_passes: .* >= 1, got 0",
        ),
        (
            lambda: infer_response_map(NET, IMAGE, ONES, max_pixels=0),
            ValueError,
            "max_pixels: .* >= 1, got 0",
        ),
        (
            lambda: infer_response_map(NET, IMAGE, ONES, erase_threshold=0),
            ValueError,
            "erase_threshold: .* > 0",
        ),
        (
            lambda: infer_response_map(NET, IMAGE, ONES, stop_fraction=float("nan")),
            ValueError,
            "stop_fraction: expected a finite",
        ),
        (lambda: infer_response_map(NET, IMAGE, ONES, min_response=-1), ValueError, "min_response: .* >= 0"),
        (
            lambda: infer_response_map(NET, IMAGE, ONES, eps=-1),
            ValueError,
            "eps: expected a finite number >= 0",
        ),
        (
            lambda: class_conditional_response(NET, [], ONES, (8, 8)),
            ValueError,
            "views: expected at least one",
        ),
        (
            lambda: class_conditional_response(NET, [VIEW[0], IMAGE.repeat(2, 1, 1, 1)], ONES, (8, 8)),
            ValueError,
            r"views\[1\]: expected .* with B=1 from labels",
        ),
        (
            lambda: class_conditional_response(NET, [VIEW[0].byte()], ONES, (8, 8)),
            TypeError,
            r"views\[0\]: expected a floating-point",
        ),
        (
            lambda: class_conditional_response(NET, VIEW, ONES, (8, 0)),
            ValueError,
            r"size: expected two integers .* got \(8, 0\)",
        ),
        (lambda: class_conditional_response(NET, VIEW, ONES, (8, 8), eps=-1), ValueError, "eps"),
        (lambda: class_conditional_response(NET, VIEW, 2 * ONES, (8, 8)), ValueError, "labels"),
        (lambda: class_center_boxes(IMAGE[0], ONES), ValueError, r"cam: expected shape \(B, C, H, W\)"),
        (lambda: class_center_boxes(IMAGE, ONES), ValueError, "labels: .* with C=3 from cam"),
        (lambda: class_center_boxes(IMAGE / 0, ONES[:, :3]), ValueError, "cam: expected finite values"),
        (lambda: class_center_boxes(IMAGE.long(), ONES[:, :3]), TypeError, "cam: expected a floating-point"),
        (lambda: class_center_boxes(IMAGE, ONES[:, :3], margins={1: 0.5}), ValueError, r"margins\[1\]"),
        (
            lambda: ClassConditionalInference(NET, max_passes=1.5),
            ValueError,
            "max_passes: expected an integer",
        ),
        (lambda: ClassConditionalInference(NET, scales=()), ValueError, "scales: expected at least one"),
        (lambda: ClassConditionalInference(NET, margins={1: -2}), ValueError, r"margins\[1\]"),
    ],
)
def test_errors(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
