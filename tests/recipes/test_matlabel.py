"""`recipes.matlabel`: sections 1.4 to 1.6 of the Mat-Label specification. There are no golden files."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from pseudolabel.masks import TrimapBuilder, alpha_to_mask, trimap_from_cam
from pseudolabel.matting import closed_form_matting, guided_filter
from pseudolabel.recipes import matlabel
from pseudolabel.refine import CRF_PRESETS, dense_crf

LABELS = torch.tensor([[1, 0, 1], [0, 1, 0]])


def case(seed: int = 0, labels: Tensor = LABELS) -> tuple[Tensor, Tensor]:
    """Images with soft blobs of colour, and a posterior among background and labelled classes."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(len(labels), 3, 5, 7, generator=generator)
    image = F.interpolate(image, size=(24, 32), mode="bicubic").clamp(0, 1)
    logits = 3 * torch.randn(len(labels), 1 + labels.shape[1], 4, 6, generator=generator)
    allowed = F.pad(labels != 0, (1, 0), value=True)[:, :, None, None]
    return image, logits.masked_fill(~allowed, -torch.inf).softmax(1)


def test_is_its_parts() -> None:
    """On each image alone, with the parts called one by one on its present classes."""
    image, posterior = case()
    mask = matlabel(image, posterior, LABELS)
    for number, labels in enumerate(LABELS):
        present = labels.nonzero()[:, 0]
        places = torch.cat([present.new_zeros(1), present + 1])
        one, everyone = image[number : number + 1], torch.ones(1, len(present))
        q = F.interpolate(posterior[number : number + 1, places], size=(24, 32), mode="bilinear")
        q = dense_crf(one, q, **CRF_PRESETS["deeplab"])
        trimap = trimap_from_cam(
            q, everyone, kind="posterior", foreground=0.8, background=0.8, margin=0.2, erode=10
        )
        alpha = closed_form_matting(one, trimap, prior=q[:, 1:])
        expected = alpha_to_mask(alpha, confidence=0.5, margin=0.1)[0]
        expected = torch.where(expected == 255, 255, places[expected.clamp(max=len(present))])
        assert (expected == mask[number]).double().mean() >= 0.99


@given(st.integers(0, 100))
def test_only_labelled_classes(seed: int) -> None:
    image, posterior = case(seed)
    mask = matlabel(image, posterior, LABELS, refine=guided_filter)
    for found, labels in zip(mask, LABELS, strict=True):
        assert set(found.unique().tolist()) <= {0, 255, *(labels.nonzero()[:, 0] + 1).tolist()}


def test_classes_that_are_absent_change_nothing() -> None:
    image, posterior = case()
    mask = matlabel(image, posterior, LABELS)
    wide = torch.cat([posterior, torch.zeros(2, 2, 4, 6)], 1)
    assert torch.equal(matlabel(image, wide, F.pad(LABELS, (0, 2))), mask)
    order = torch.tensor([2, 0, 1])
    moved = matlabel(image, posterior[:, [0, 3, 1, 2]], LABELS[:, order])
    back = torch.cat([torch.tensor([0, 3, 1, 2]), torch.full((252,), 255)])
    assert (back[moved] == mask).double().mean() >= 0.99


def test_batch_equals_singles() -> None:
    image, posterior = case()
    mask = matlabel(image, posterior, LABELS)
    for number in range(2):
        part = slice(number, number + 1)
        assert (
            matlabel(image[part], posterior[part], LABELS[part])[0] == mask[number]
        ).double().mean() >= 0.99


def test_sure_everywhere_needs_no_matting() -> None:
    """A posterior of zeros and ones is its own mask, whatever the solver would do."""
    image, posterior = case()
    certain = F.one_hot(posterior.argmax(1), 4).permute(0, 3, 1, 2).float()
    certain = F.interpolate(certain, size=(24, 32))

    def fail(*_: Tensor) -> Tensor:
        raise AssertionError

    def matting(image: Tensor, trimap: Tensor, prior: Tensor) -> Tensor:
        return fail() if bool((trimap == 0.5).any()) else closed_form_matting(image, trimap, prior=prior)

    trimap = TrimapBuilder(kind="posterior", foreground=0.8, background=0.8, fallback=0.0)
    mask = matlabel(image, certain, LABELS, refine=None, trimap=trimap, matting=matting)
    assert torch.equal(mask, certain.argmax(1))


def test_undecided_pixels_are_left_out() -> None:
    image = torch.full((1, 3, 6, 8), 0.5)
    posterior = torch.full((1, 2, 6, 8), 0.5)
    trimap = TrimapBuilder(kind="posterior", foreground=0.8, background=0.8, fallback=0.0)
    labels = torch.ones(1, 1)
    assert (matlabel(image, posterior, labels, refine=None, trimap=trimap) == 255).all()
    assert (matlabel(image, posterior, labels, refine=None, trimap=trimap, ignore_index=-1) == -1).all()
    decided = matlabel(image, posterior, labels, refine=None, trimap=trimap, confidence=None, margin=None)
    assert (decided != 255).all()


@pytest.mark.parametrize("labels", [torch.zeros(2, 3), torch.tensor([[0, 0, 0], [1, 0, 0]])])
def test_image_without_a_label(labels: Tensor) -> None:
    image, posterior = case(labels=labels)
    mask = matlabel(image, posterior, labels)
    assert (mask[0] == 0).all()


def test_parts_are_swapped() -> None:
    image, posterior = case()
    seen = []

    def refine(image: Tensor, maps: Tensor) -> Tensor:
        seen.append(("refine", tuple(maps.shape)))
        return maps

    def trimap(scores: Tensor, labels: Tensor) -> Tensor:
        seen.append(("trimap", tuple(scores.shape)))
        return TrimapBuilder(kind="posterior", foreground=0.8, background=0.8)(scores, labels)

    def matting(image: Tensor, trimap: Tensor, prior: Tensor) -> Tensor:
        seen.append(("matting", tuple(prior.shape)))
        return trimap

    matlabel(image, posterior, LABELS, refine=refine, trimap=trimap, matting=matting)
    shapes = [("refine", (2, 3, 24, 32)), ("trimap", (2, 4, 24, 32)), ("matting", (2, 3, 24, 32))]
    assert seen == shapes  # two places for the classes of an image, and three classes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype, device: torch.device) -> None:
    image, posterior = case()
    mask = matlabel(image.to(device, dtype), posterior.to(device, dtype), LABELS.to(device), refine=None)
    assert mask.dtype == torch.int64
    exact = matlabel(image.double(), posterior.double(), LABELS, refine=None)
    assert (mask.cpu() == exact).double().mean() > (0.9 if dtype.itemsize == 2 else 0.99)


def test_errors() -> None:
    image, posterior = case()
    with pytest.raises(ValueError, match="posterior: expected 4 channels, the background and the classes"):
        matlabel(image, posterior[:, 1:], LABELS)
    with pytest.raises(ValueError, match=r"posterior: expected values in \[0, 1\]"):
        matlabel(image, 2 * posterior, LABELS)
    with pytest.raises(ValueError, match="labels: expected a multi-hot"):
        matlabel(image, posterior, 2 * LABELS)
    with pytest.raises(TypeError, match="posterior: expected a floating-point tensor"):
        matlabel(image, (posterior > 0.5).long(), LABELS)
    with pytest.raises(ValueError, match="confidence: expected a finite number >= 0 and <= 1"):
        matlabel(image, posterior, LABELS, confidence=2)
    with pytest.raises(TypeError, match="matting: expected a callable, got None"):
        matlabel(image, posterior, LABELS, matting=None)
