"""`icd_seed`: sections 7, 8 and 9 of the ICD specification."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from pseudolabel.masks import icd_seed, scores_to_mask
from pseudolabel.refine import CRF_PRESETS, dense_crf, probs_from_mask

KINDS = ["k1", "k2", "k3", "allneg", "allpos", "zero", "negcam"]
NUM_CLASSES = 20
LABELS = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]])
seeds = st.integers(0, 10_000)


def case(
    seed: int = 0, size: tuple[int, int] = (5, 7), dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Maps away from 0, CAMs of which some are silent, labels."""
    generator = torch.Generator().manual_seed(seed)
    icd_map, cam = torch.randn(2, 4, 4, *size, generator=generator, dtype=torch.float64)
    return (icd_map + 0.1 * icd_map.sign()).to(dtype), cam.to(dtype), LABELS


def by_image(
    icd_map: torch.Tensor, cam: torch.Tensor, labels: torch.Tensor, saliency: torch.Tensor | None = None
) -> torch.Tensor:
    """Section 7, image by image."""
    masks = []
    for number, present in enumerate(labels.bool()):
        ids = present.nonzero()[:, 0]
        if len(ids) == 0:
            masks.append(torch.zeros(icd_map.shape[2:], dtype=torch.int64))
            continue
        z, m = icd_map[number, ids].double().numpy(), cam[number, ids].double().numpy()
        p = np.stack([np.maximum(k, 0) / max(k.max(), 1e-5) for k in z])
        b = np.stack([np.minimum(k, 0) / min(k.min(), -1e-5) for k in z])
        positive, background = p > 1e-5, (b > 1e-5).all(0)
        chosen = positive.argmax(0)
        foreground = positive.any(0)
        if saliency is not None:
            silent = saliency[number].numpy() < 0.01
            background = silent if (~silent).mean() >= 0.01 else silent & background
        ignored = foreground == background
        if len(ids) > 1:
            m = np.maximum(m, 0)
            m = (m - m.min()) / max(m.max() - m.min(), 1e-5)
            support = m * p
            chosen = np.where(positive.sum(0) > 1, support.argmax(0), chosen)
            ignored |= foreground & (support.max(0) - support.min(0) <= 1e-5)
        mask = ids[torch.from_numpy(chosen)] + 1
        mask[torch.from_numpy(background)] = 0
        mask[torch.from_numpy(ignored)] = 255
        masks.append(mask)
    return torch.stack(masks)


def row(icd_map: list[list[float]], cam: list[list[float]] | None = None, **settings: object) -> list[int]:
    """The seed of one row of pixels, every class being present."""
    maps = torch.tensor(icd_map)[None, :, None]
    cams = torch.zeros_like(maps) if cam is None else torch.tensor(cam)[None, :, None]
    return icd_seed(maps, cams, torch.ones(1, len(icd_map)), **settings)[0, 0].tolist()


# ------------------------------------------------------------------------------------------ golden files


class Golden:
    """One case of the golden file, its classes among all 20."""

    def __init__(self, data: dict[str, np.ndarray], kind: str) -> None:
        self.data = {
            name.removeprefix(f"{kind}_"): value for name, value in data.items() if name.startswith(kind)
        }
        self.labels = torch.zeros(1, NUM_CLASSES)
        self.labels[0, self.data["classes"]] = 1

    def maps(self, name: str) -> torch.Tensor:
        value = torch.from_numpy(self.data[name])
        full = torch.full((1, NUM_CLASSES, *value.shape[1:]), 7.0)  # absent classes are not looked at
        full[0, self.data["classes"]] = value
        return full

    def mask(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.data[name])[None].long()

    @property
    def resized(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.maps("icd_resized"), self.maps("cam_resized")


@pytest.mark.parametrize("kind", KINDS)
def test_golden(golden: Callable, kind: str) -> None:
    expected = Golden(golden("icd/public_seed"), kind)
    assert torch.equal(icd_seed(*expected.resized, expected.labels), expected.mask("seed_nocrf"))


@pytest.mark.parametrize("name", ["sal", "saltiny"])
@pytest.mark.parametrize("kind", KINDS)
def test_golden_with_saliency(golden: Callable, kind: str, name: str) -> None:
    expected = Golden(golden("icd/public_seed"), kind)
    saliency = torch.from_numpy(expected.data[name])[None] / 255
    seed = icd_seed(*expected.resized, expected.labels, saliency=saliency)
    assert torch.equal(seed, expected.mask(f"seed_{name}"))


@pytest.mark.parametrize("kind", KINDS)
def test_golden_resizing(golden: Callable, kind: str) -> None:
    """From the maps of the network: resized to the canvas and cut to the photo."""
    expected = Golden(golden("icd/public_seed"), kind)
    side, (height, width) = int(expected.data["infer_size"]), expected.data["sal"].shape
    maps = [
        F.interpolate(expected.maps(name), size=(side, side), mode="bilinear")[..., :height, :width]
        for name in ("icd", "cam")
    ]
    assert torch.equal(icd_seed(*maps, expected.labels), expected.mask("seed_nocrf"))


@pytest.mark.parametrize("kind", KINDS)
def test_golden_crf(golden: Callable, kind: str) -> None:
    """The seed's label weighs 0.5, the other labels 0.5 / 21 each: 21 to 1, so a confidence of 21 / 41."""
    expected = Golden(golden("icd/public_seed"), kind)
    image = torch.from_numpy(expected.data["image"]).permute(2, 0, 1)[None] / 255
    seed = icd_seed(*expected.resized, expected.labels)
    labels = 1 + NUM_CLASSES
    probs = probs_from_mask(seed, labels, confidence=labels / (2 * labels - 1))
    refined = scores_to_mask(dense_crf(image, probs, **CRF_PRESETS["psa"]), confidence=0.1)
    assert (refined == expected.mask("seed_crf")).double().mean() >= 0.995


# ------------------------------------------------------------------------------------------ by hand


def test_the_sign_finds_the_foreground() -> None:
    assert row([[3.0, 0.001, -0.001, -3.0]]) == [1, 1, 0, 0]
    assert row([[3.0, 1e-6, -1e-6, 0.0, -3.0]]) == [1, 255, 255, 255, 0], "up to eps a value is 0"
    assert row([[3.0, 0.001, -0.001, -3.0]], eps=0.01) == [1, 255, 255, 0]


def test_cam_settles_conflicts() -> None:
    icd_map = [[4.0, 4.0, 2.0, -1.0, -1.0], [-1.0, 2.0, 2.0, 2.0, -1.0]]
    cam = [[5.0, 1.0, 3.0, 0.0, 0.0], [0.0, 3.0, 1.0, 1.0, 9.0]]
    assert row(icd_map, cam) == [1, 2, 1, 2, 0]


def test_a_conflict_without_a_winner_goes_to_the_first_class() -> None:
    """All three claim the pixel, the last two with the same support."""
    icd_map, cam = [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]], [[0.0, 0.0], [1.0, 2.0], [1.0, 2.0]]
    assert row(icd_map, cam) == [2, 2]


def test_silent_cam_is_ignored_in_images_of_several_classes() -> None:
    """Contested or not; with one class CAM plays no part."""
    icd_map = [[1.0, 1.0, -1.0, -1.0], [-1.0, 1.0, 1.0, -1.0]]
    assert row(icd_map) == [255, 255, 255, 0]
    assert row(icd_map, [[-2.0] * 4, [-1.0] * 4]) == [255, 255, 255, 0], "negative CAM is silent"
    assert row(icd_map, [[1.0, 0.0, 0.0, 0.0], [0.0] * 4]) == [1, 255, 255, 0]
    assert row(icd_map[:1]) == [1, 1, 0, 0]


def test_one_range_for_all_cams() -> None:
    """The first class has the lower CAM everywhere, so that it has nothing left where the minimum is."""
    icd_map = [[1.0, 1.0, -1.0], [-1.0, 1.0, 1.0]]
    assert row(icd_map, [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]) == [255, 2, 2]
    assert row(icd_map, [[1.0, 3.0, 1.0], [2.0, 2.0, 2.0]]) == [255, 1, 2]


def test_all_negative_all_positive_zero() -> None:
    assert row([[-1.0, -2.0], [-3.0, -1.0]]) == [0, 0]
    assert row([[1.0, 2.0], [3.0, 1.0]], [[1.0, 0.5], [0.0, 0.0]]) == [1, 1], "no background"
    assert row([[0.0, 0.0]]) == [255, 255]


def test_no_label() -> None:
    icd_map, cam, labels = case()
    for saliency in (None, torch.ones(4, 5, 7)):
        assert icd_seed(icd_map, cam, labels, saliency=saliency)[2].eq(0).all()
        assert icd_seed(icd_map, cam, labels * 0, saliency=saliency).eq(0).all()
    assert icd_seed(icd_map[:, :0], cam[:, :0], labels[:, :0]).eq(0).all()
    assert icd_seed(icd_map[:0], cam[:0], labels[:0], size=(9, 8)).shape == (0, 9, 8)


def test_saliency() -> None:
    """Salient and positive, salient and negative, neither, positive alone."""
    saliency = torch.tensor([[[1.0, 0.02, 0.0, 0.005]]])
    assert row([[2.0, -1.0, -1.0, 1.0]], saliency=saliency) == [1, 255, 0, 255]
    assert row([[2.0, -1.0, -1.0, 1.0]], saliency=saliency, saliency_threshold=0.5) == [1, 0, 0, 255]
    eighths = torch.tensor([[[0.0, 2, 3, 255]]]) / 255
    assert row([[1.0, 1.0, 1.0, 1.0]], saliency=eighths) == [255, 255, 1, 1], (
        "grey values 0 to 2 are not salient"
    )


def test_hardly_any_saliency() -> None:
    """One of four pixels is salient: enough, or not, and then the maps have to agree on the background."""
    saliency = torch.tensor([[[1.0, 0.0, 0.0, 0.0]]])
    icd_map = [[2.0, 1.0, -1.0, 0.0]]
    assert row(icd_map, saliency=saliency, min_salient_fraction=0.25) == [1, 255, 0, 0]
    assert row(icd_map, saliency=saliency, min_salient_fraction=0.26) == [1, 1, 0, 255]


def test_each_image_has_its_own_saliency() -> None:
    icd_map, cam, labels = case()
    saliency = torch.zeros(4, 5, 7)
    saliency[0, :3] = 1
    seed = icd_seed(icd_map, cam, labels, saliency=saliency)
    assert torch.equal(seed, by_image(icd_map, cam, labels, saliency))


def test_size() -> None:
    icd_map, cam, labels = case(dtype=torch.float32)
    resized = [F.interpolate(maps, size=(16, 21), mode="bilinear") for maps in (icd_map, cam)]
    seed = icd_seed(icd_map, cam, labels, size=(16, 21))
    assert seed.shape == (4, 16, 21)
    assert torch.equal(seed, icd_seed(*resized, labels))


def test_ignore_index() -> None:
    icd_map, cam, labels = case()
    seed, other = icd_seed(icd_map, cam, labels), icd_seed(icd_map, cam, labels, ignore_index=-1)
    assert (seed == 255).any()
    assert torch.equal(other, seed.where(seed != 255, -1))


# ------------------------------------------------------------------------------------------ invariants


@given(seeds, st.booleans())
def test_equals_the_images_one_by_one(seed: int, salient: bool) -> None:
    icd_map, cam, labels = case(seed)
    saliency = None
    if salient:
        saliency = torch.rand(4, 5, 7, generator=torch.Generator().manual_seed(seed)) ** 4
        saliency[1] = saliency[1] * 0.009
    found = icd_seed(icd_map, cam, labels, saliency=saliency)
    assert torch.equal(found, by_image(icd_map, cam, labels, saliency))


@given(seeds)
def test_values(seed: int) -> None:
    icd_map, cam, labels = case(seed)
    found = icd_seed(icd_map, cam, labels)
    for mask, present in zip(found, labels, strict=True):
        assert set(mask.unique().tolist()) <= {0, 255, *(present.nonzero()[:, 0] + 1).tolist()}
    negative = ((icd_map < 0) | (labels == 0)[..., None, None]).all(1)
    assert torch.equal(found == 0, negative), "background is where all present maps are negative"


@given(seeds, st.lists(st.floats(0.01, 100), min_size=4, max_size=4), st.floats(0.01, 100))
def test_scales(seed: int, scales: list[float], cam_scale: float) -> None:
    """Each map by its own factor, all CAMs by one."""
    icd_map, cam, labels = case(seed)
    found = icd_seed(icd_map, cam, labels)
    factors = torch.tensor(scales, dtype=torch.float64)[:, None, None]
    assert torch.equal(icd_seed(icd_map * factors, cam * cam_scale, labels), found)


@given(seeds)
def test_one_label_needs_no_cam(seed: int) -> None:
    icd_map, cam, _ = case(seed)
    labels = torch.eye(4)
    assert torch.equal(icd_seed(icd_map, cam, labels), icd_seed(icd_map, cam * 0, labels))


@given(seeds)
def test_saliency_adds_no_foreground(seed: int) -> None:
    icd_map, cam, labels = case(seed)
    saliency = torch.rand(4, 5, 7, generator=torch.Generator().manual_seed(seed)) ** 4
    without, found = (icd_seed(icd_map, cam, labels, saliency=given) for given in (None, saliency))
    foreground = (found > 0) & (found != 255)
    assert torch.equal(found[foreground], without[foreground])


@given(seeds, st.permutations(range(4)))
def test_classes_permute(seed: int, order: list[int]) -> None:
    icd_map, cam, labels = case(seed)
    found = icd_seed(icd_map[:, order], cam[:, order], labels[:, order])
    back = torch.arange(256)
    back[1:5] = torch.tensor(order) + 1
    assert torch.equal(back[found], icd_seed(icd_map, cam, labels))


# ------------------------------------------------------------------------------------------ all


def test_batch_equals_singles() -> None:
    icd_map, cam, labels = case()
    found = icd_seed(icd_map, cam, labels, size=(9, 9))
    for image in range(4):
        some = slice(image, image + 1)
        one = icd_seed(icd_map[some], cam[some], labels[some], size=(9, 9))
        assert torch.equal(one, found[some])


def test_inputs_stay_as_they_are() -> None:
    icd_map, cam, labels = case()
    before = icd_map.clone(), cam.clone()
    icd_seed(icd_map, cam, labels)
    assert torch.equal(icd_map, before[0])
    assert torch.equal(cam, before[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    icd_map, cam, labels = case(dtype=dtype)
    found = icd_seed(icd_map, cam, labels, size=(9, 11))
    assert found.dtype == torch.int64
    assert torch.equal(found, icd_seed(icd_map.double(), cam.double(), labels, size=(9, 11)))
    assert torch.equal(icd_seed(icd_map, cam, labels.bool()), icd_seed(icd_map, cam, labels.float()))


@pytest.mark.xfail(torch.__version__ < (2, 10), reason="older releases cannot trace a count of classes")
def test_compiles_to_one_graph() -> None:
    icd_map, cam, labels = case()
    compiled = torch.compile(icd_seed, fullgraph=True, backend="eager")
    assert torch.equal(compiled(icd_map, cam, labels), icd_seed(icd_map, cam, labels))
    saliency = torch.rand(4, 5, 7) ** 4
    assert torch.equal(
        compiled(icd_map, cam, labels, saliency=saliency), icd_seed(icd_map, cam, labels, saliency=saliency)
    )


def test_devices(device: torch.device) -> None:
    icd_map, cam, labels = case(dtype=torch.float32)
    saliency = torch.rand(4, 5, 7) ** 4
    there = [value.to(device) for value in (icd_map, cam, labels)]
    found = icd_seed(*there, saliency=saliency.to(device))
    assert found.device.type == device.type
    assert torch.equal(found.cpu(), icd_seed(icd_map, cam, labels, saliency=saliency))


MAP, CAM, _ = case()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: icd_seed(MAP[0], CAM, LABELS), ValueError, r"icd_map: expected shape \(B, C, h, w\)"),
        (lambda: icd_seed(MAP, CAM[:, :2], LABELS), ValueError, "cam: .* with C=4 from icd_map"),
        (lambda: icd_seed(MAP, CAM[..., 1:], LABELS), ValueError, "cam: .* with w=7 from icd_map"),
        (lambda: icd_seed(MAP, CAM, LABELS[1:]), ValueError, "labels: .* with B=4 from icd_map"),
        (lambda: icd_seed(MAP.long(), CAM, LABELS), TypeError, "icd_map: expected a floating-point tensor"),
        (lambda: icd_seed(MAP, CAM > 0, LABELS), TypeError, "cam: expected a floating-point tensor"),
        (lambda: icd_seed(MAP * math.nan, CAM, LABELS), ValueError, "icd_map: expected finite values"),
        (lambda: icd_seed(MAP, CAM * math.inf, LABELS), ValueError, "cam: expected finite values"),
        (lambda: icd_seed(MAP, CAM, LABELS + 1), ValueError, "labels: expected a multi-hot tensor"),
        (
            lambda: icd_seed(MAP, CAM, LABELS, saliency=torch.zeros(4, 5, 6)),
            ValueError,
            r"saliency: expected shape \(B, 5, 7\), got \(4, 5, 6\)",
        ),
        (
            lambda: icd_seed(MAP, CAM, LABELS, size=(9, 8), saliency=torch.zeros(4, 5, 7)),
            ValueError,
            r"saliency: expected shape \(B, 9, 8\), got \(4, 5, 7\)",
        ),
        (
            lambda: icd_seed(MAP, CAM, LABELS, saliency=torch.full((4, 5, 7), 255.0)),
            ValueError,
            r"saliency: expected values in \[0, 1\]",
        ),
        (
            lambda: icd_seed(MAP, CAM, LABELS, saliency=torch.zeros(4, 5, 7, dtype=torch.uint8)),
            TypeError,
            "saliency: expected a floating-point tensor",
        ),
        (
            lambda: icd_seed(MAP, CAM, LABELS, saliency_threshold=3),
            ValueError,
            "saliency_threshold: .* got 3",
        ),
        (lambda: icd_seed(MAP, CAM, LABELS, min_salient_fraction=-1), ValueError, "min_salient_fraction: "),
        (lambda: icd_seed(MAP, CAM, LABELS, eps=0), ValueError, "eps: expected a finite number > 0, got 0"),
        (lambda: icd_seed(MAP, CAM, LABELS, ignore_index=4), ValueError, "ignore_index: .* got 4"),
    ],
)
def test_errors(call: Callable, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
