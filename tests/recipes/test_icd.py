"""`recipes.icd`: section 7 of the ICD specification."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pseudolabel.masks import icd_seed
from pseudolabel.recipes import icd
from pseudolabel.refine import dense_crf, probs_from_mask

CASES = ["k1", "k2", "k3", "allneg", "allpos", "zero", "negcam"]


def official(golden: Callable, name: str) -> tuple[dict[str, Tensor], dict[str, np.ndarray]]:
    """Arguments of the recipe, and the official masks (H,W)."""
    data = golden("icd/public_seed")
    data = {key.removeprefix(f"{name}_"): value for key, value in data.items() if key.startswith(f"{name}_")}
    classes = torch.from_numpy(data["classes"])
    height, width = data["image"].shape[:2]

    def all_classes(maps: np.ndarray) -> Tensor:
        return torch.zeros(1, 20, height, width).index_copy(1, classes, torch.from_numpy(maps)[None])

    arguments = {
        "image": torch.from_numpy(data["image"]).permute(2, 0, 1)[None] / 255,
        "logits": all_classes(data["icd_resized"]),
        "cam": all_classes(data["cam_resized"]),
        "labels": torch.zeros(1, 20).index_fill(1, classes, 1),
    }
    return arguments, data


def case(seed: int = 0, classes: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(2, 3, 16, 24, generator=generator)
    logits, cam = torch.randn(2, 2, classes, 6, 9, generator=generator)
    labels = torch.rand(2, classes, generator=generator) < 0.5
    labels[:, 0] = True
    return image, logits, cam, labels


@pytest.mark.parametrize("name", CASES)
def test_golden(golden: Callable, name: str) -> None:
    arguments, masks = official(golden, name)
    np.testing.assert_array_equal(icd(**arguments, crf=None)[0], masks["seed_nocrf"])
    assert (icd(**arguments)[0].numpy() == masks["seed_crf"]).mean() >= 0.995
    for kind in ("sal", "saltiny"):
        saliency = torch.from_numpy(masks[kind])[None] / 255
        np.testing.assert_array_equal(icd(**arguments, saliency=saliency)[0], masks[f"seed_{kind}"])


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_golden_crf_matters(golden: Callable, name: str) -> None:
    """The bound of 99.5 % tells apart: no CRF, and another confidence."""
    arguments, masks = official(golden, name)
    assert (masks["seed_nocrf"] == masks["seed_crf"]).mean() < 0.98
    assert (icd(**arguments, confidence=0.99)[0].numpy() == masks["seed_crf"]).mean() < 0.98


def test_golden_native_maps(golden: Callable) -> None:
    """Maps of the padded canvas: resized there, cut to the image."""
    arguments, masks = official(golden, "k3")
    canvas, (height, width) = int(masks["infer_size"]), masks["image"].shape[:2]
    classes = torch.from_numpy(masks["classes"])
    for name, key in (("logits", "icd"), ("cam", "cam")):
        maps = torch.from_numpy(masks[key])[None]
        maps = torch.nn.functional.interpolate(maps, (canvas, canvas), mode="bilinear")[..., :height, :width]
        arguments[name] = torch.zeros(1, 20, height, width).index_copy(1, classes, maps)
    mask = icd(**arguments, crf=None)[0].numpy()
    assert (mask == masks["seed_nocrf"]).mean() > 0.995


@given(seed=st.integers(0, 1000))
def test_is_its_parts(seed: int) -> None:
    image, logits, cam, labels = case(seed)
    mask = icd(image, logits, cam, labels)
    found = icd_seed(logits, cam, labels, size=(16, 24))
    assert torch.equal(icd(image, logits, cam, labels, crf=None), found)
    probs = dense_crf(image, probs_from_mask(found, 4, confidence=4 / 7))
    certain = probs.sort(1).values[:, -1] - probs.sort(1).values[:, -2] > 1e-4
    assert torch.equal(mask[certain], probs.argmax(1)[certain])
    assert certain.float().mean() > 0.9
    for one in range(2):
        assert set(mask[one].unique().tolist()) <= {0, 255, *(1 + labels[one].nonzero()[:, 0]).tolist()}


def test_what_the_crf_is_given() -> None:
    image, logits, cam, labels = case(classes=20)
    seen = []

    def crf(image: Tensor, probs: Tensor) -> Tensor:
        seen.append(probs)
        return probs

    found = icd(image, logits, cam, labels, crf=None)
    mask = icd(image, logits, cam, labels, crf=crf)
    assert torch.equal(mask, found), "without spreading the seeds stay, the ignored ones too"
    assert found.eq(255).any()
    soft = torch.full((21,), 0.5 / 21)
    soft[0] = 0.5
    expected = (soft / soft.sum()).sort().values
    known = seen[0].movedim(1, -1)[found != 255]
    torch.testing.assert_close(known.sort(1).values, expected.expand_as(known))
    assert seen[0].movedim(1, -1)[found == 255].eq(1 / 21).all()


@pytest.mark.parametrize("classes", [1, 2, 5, 20])
def test_ignored_everywhere_stays_ignored(classes: int) -> None:
    image, logits, cam, _ = case(classes=classes)
    mask = icd(image, torch.zeros_like(logits), cam, torch.ones(2, classes))
    assert mask.eq(255).all()


def test_doubt_is_ignored() -> None:
    image, logits, cam, labels = case(classes=20)
    half = lambda image, probs: 0.5 * probs  # noqa: E731
    assert icd(image, logits, cam, labels, crf=half).eq(icd(image, logits, cam, labels, crf=None)).all()
    assert icd(image, logits, cam, labels, crf=half, min_probability=0.3).eq(255).all()


def test_absent_classes_do_not_win() -> None:
    image, logits, cam, labels = case()
    labels = torch.tensor([[1, 0, 0], [0, 1, 0]])
    wrong = lambda image, probs: probs.flip(1)  # noqa: E731
    mask = icd(image, logits, cam, labels, crf=wrong)
    assert set(mask[0].unique().tolist()) <= {0, 1, 255}
    assert set(mask[1].unique().tolist()) <= {0, 2, 255}


def test_saliency_has_no_crf_unless_asked_for() -> None:
    image, logits, cam, labels = case()
    saliency = torch.rand(2, 16, 24, generator=torch.Generator().manual_seed(1)).round()
    seed = icd_seed(logits, cam, labels, size=(16, 24), saliency=saliency)
    assert torch.equal(icd(image, logits, cam, labels, saliency=saliency), seed)
    refined = icd(image, logits, cam, labels, saliency=saliency, crf_with_saliency=True)
    assert refined.eq(255).sum() < seed.eq(255).sum()


def test_no_label_is_background() -> None:
    image, logits, cam, _ = case()
    assert icd(image, logits, cam, torch.zeros(2, 3)).eq(0).all()


def test_batch_equals_singles() -> None:
    image, logits, cam, labels = case()
    mask = icd(image, logits, cam, labels)
    for one in (slice(0, 1), slice(1, 2)):
        assert torch.equal(icd(image[one], logits[one], cam[one], labels[one]), mask[one])


def test_other_ignore_index() -> None:
    image, logits, cam, labels = case()
    for crf in ({"crf": None}, {}):
        mask = icd(image, logits, cam, labels, **crf)
        other = icd(image, logits, cam, labels, **crf, ignore_index=9)
        assert torch.equal(other.masked_fill(other == 9, 255), mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    image, logits, cam, labels = case()
    mask = icd(image.to(dtype), logits.to(dtype), cam.to(dtype), labels)
    assert mask.dtype == torch.int64
    assert (mask == icd(image, logits, cam, labels)).float().mean() > 0.98


def test_devices(device: torch.device) -> None:
    arguments = case()
    mask = icd(*(value.to(device) for value in arguments))
    assert mask.device.type == device.type
    assert (mask.cpu() == icd(*arguments)).float().mean() > 0.995


@pytest.mark.xfail(torch.__version__ < (2, 10), reason="older releases cannot trace a count of classes")
def test_compiles_to_one_graph() -> None:
    image, logits, cam, labels = case()
    image = image[..., :6, :9]  # maps of the image's size: resizing looks at the number of present classes
    call = lambda z: icd(image, z, cam, labels, crf=None)  # noqa: E731
    torch.compiler.reset()
    assert torch.equal(torch.compile(call, fullgraph=True, backend="eager")(logits), call(logits))


IMAGE, LOGITS, CAM, LABELS = case()


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "message"),
    [
        ((IMAGE[0], LOGITS, CAM, LABELS), {}, ValueError, r"image: expected shape \(B, 3, H, W\)"),
        ((IMAGE, LOGITS[1:], CAM, LABELS), {}, ValueError, "logits: .* with B=2 from image"),
        ((IMAGE, LOGITS.long(), CAM, LABELS), {}, TypeError, "logits: expected a floating-point"),
        ((IMAGE, LOGITS, CAM[:, 1:], LABELS), {}, ValueError, "cam: .* with C=3"),
        ((IMAGE, LOGITS, CAM, LABELS[:, 1:]), {}, ValueError, "labels: .* with C=3"),
        ((IMAGE, LOGITS, CAM, LABELS * 2), {}, ValueError, "labels: expected a multi-hot"),
        ((2 * IMAGE, LOGITS, CAM, LABELS), {}, ValueError, r"image: expected values in \[0, 1\]"),
        (
            (IMAGE, LOGITS, CAM, LABELS),
            {"confidence": 1.0},
            ValueError,
            "confidence: expected a finite number",
        ),
        ((IMAGE, LOGITS, CAM, LABELS), {"confidence": 0}, ValueError, "confidence: expected a finite number"),
        (
            (IMAGE, LOGITS, CAM, LABELS),
            {"min_probability": 2},
            ValueError,
            "min_probability: expected a finite",
        ),
        ((IMAGE, LOGITS, CAM, LABELS), {"ignore_index": 2}, ValueError, "ignore_index: expected"),
    ],
)
def test_errors(arguments, settings, error, message) -> None:
    with pytest.raises(error, match=message):
        icd(*arguments, **settings)
