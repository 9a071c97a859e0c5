"""Cross-transform regularisation: sections 3, 6, 12, 13 of the RTC specification."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from pseudolabel.cam import normalize_cam
from pseudolabel.heads import (
    CrossTransformRegularization,
    TopK,
    assign_pseudo_labels,
    confidence_scores,
    cross_transform_contrast,
    prototype_separation,
    prototypes_from_topk,
    topk_pixels,
)
from pseudolabel.losses import pixel_prototype_nce

EPS = 1e-5
seeds = st.integers(0, 1000)
LABELS = torch.tensor([[1, 0, 1], [0, 1, 0]])
TERMS = {"intra_view": "intra_nce", "cross_label": "cross_nce1", "cross_prototype": "cross_nce2"}


def tensors(data: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in data.items()}


def case(seed: int = 0, dtype: torch.dtype = torch.float64):
    """Refined maps and features of two views on one grid."""
    generator = torch.Generator().manual_seed(seed)
    refined = torch.rand(2, 2, 4, 4, 6, generator=generator, dtype=dtype)
    features = torch.rand(2, 2, 5, 4, 6, generator=generator, dtype=dtype)
    return *refined, *features


def contrast_case(seed: int = 0):
    refined1, refined2, x1, x2 = case(seed)
    s1, s2 = confidence_scores(refined1), confidence_scores(refined2)
    p1, p2 = prototypes_from_topk(x2, topk_pixels(s1)), prototypes_from_topk(x1, topk_pixels(s2))
    return x1, x2, assign_pseudo_labels(s1, LABELS), assign_pseudo_labels(s2, LABELS), p1, p2


# ------------------------------------------------------------------------------------------ golden files


def test_golden_scores(golden: Callable) -> None:
    """`normal` of the program, with a map of zeros, a constant one and one with a high floor."""
    data = tensors(golden("rtc/public_camnorm"))
    labels = data["normal_label"][:, 1:]
    scores = confidence_scores(data["normal_in"], background=float(data["normal_bg"]))
    torch.testing.assert_close(scores, data["normal_out"], atol=1e-4, rtol=1e-3)
    assert torch.equal(assign_pseudo_labels(scores, labels), data["normal_pseudo"][:, 0])
    nothing = torch.zeros_like(labels)
    assert torch.equal(assign_pseudo_labels(scores, nothing), data["normal_pseudo_nolabel"][:, 0])


@pytest.mark.parametrize("name", ["ctr", "ctr_edge"])
@pytest.mark.parametrize(("view", "other"), [(1, 2), (2, 1)])
def test_golden_prototypes(golden: Callable, name: str, view: int, other: int) -> None:
    data = tensors(golden(f"rtc/public_{name}"))
    scores = confidence_scores(data[f"cam{view}"], background=float(data["bg_threshold"]))
    torch.testing.assert_close(scores, data[f"norm_cam{view}"], atol=1e-4, rtol=1e-3)
    assert torch.equal(assign_pseudo_labels(scores, data["label"]), data[f"pseudo{view}"][:, 0])

    found, tied = topk_pixels(scores), data[f"tie{view}"]
    official = TopK(data[f"top_values{view}"], data[f"top_indices{view}"])
    assert found.indices.shape == official.indices.shape
    torch.testing.assert_close(found.values, official.values, atol=1e-4, rtol=1e-3)
    assert tied[0]
    assert not tied.all()
    assert torch.equal(found.indices[~tied], official.indices[~tied])

    features = data[f"feat{other}"]
    expected = data[f"prototypes{view}"]
    torch.testing.assert_close(prototypes_from_topk(features, official), expected, atol=1e-5, rtol=1e-4)
    same_view = prototypes_from_topk(data[f"feat{view}"], official)
    assert not torch.allclose(same_view, expected, atol=0.05), "the features are those of the other view"


def test_golden_contrast(golden: Callable) -> None:
    data = tensors(golden("rtc/public_nce"))
    features = [data[f"feat{view}"].requires_grad_() for view in (1, 2)]
    targets = [data[f"pseudo{view}"][:, 0] for view in (1, 2)]
    prototypes = [data[f"prototypes{view}"] for view in (1, 2)]
    losses = cross_transform_contrast(
        *features, *targets, *prototypes, temperature=float(data["temperature"])
    )
    assert list(losses) == list(TERMS)
    losses["all"] = sum(losses.values())
    for ours, theirs in (*TERMS.items(), ("all", "nce")):
        torch.testing.assert_close(losses[ours], data[f"loss_{theirs}"], atol=1e-6, rtol=1e-5)
        gradients = torch.autograd.grad(losses[ours], features, retain_graph=True)
        for view, gradient in zip((1, 2), gradients, strict=True):
            expected = data[f"grad{view}_loss_{theirs}"]
            torch.testing.assert_close(gradient, expected, atol=1e-7, rtol=1e-3)


def test_golden_separation(golden: Callable) -> None:
    data = tensors(golden("rtc/public_nce"))
    present = F.pad(data["label"].amax(0), (1, 0), value=1)
    found = prototype_separation(data["prototypes1"], data["prototypes2"], present)
    torch.testing.assert_close(found, data["loss_class_relation"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["ctr", "ctr_edge"])
def test_golden_module(golden: Callable, name: str) -> None:
    """With the tied pixels handed in, the module makes the official scores, labels and prototypes."""
    data = tensors(golden(f"rtc/public_{name}"))
    topk = tuple(TopK(data[f"top_values{view}"], data[f"top_indices{view}"]) for view in (1, 2))
    out = CrossTransformRegularization()(
        data["cam1"], data["cam2"], data["feat1"], data["feat2"], data["label"], topk=topk
    )
    for view, scores, targets, prototypes in (
        (1, out.scores1, out.targets1, out.prototypes1),
        (2, out.scores2, out.targets2, out.prototypes2),
    ):
        torch.testing.assert_close(scores, data[f"norm_cam{view}"], atol=1e-4, rtol=1e-3)
        assert torch.equal(targets, data[f"pseudo{view}"][:, 0])
        torch.testing.assert_close(prototypes, data[f"prototypes{view}"], atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------ scores


def test_hand_computed_scores() -> None:
    refined = torch.tensor([[[[9.0, 9.0, 9.0]], [[0.1, 0.5, 0.9]], [[-3.0, 0.0, 2.0]]]])
    scores = confidence_scores(refined, background=0.3)
    assert scores[0, 0].eq(0.3).all(), "their own background is not used"
    span = 0.8 + EPS
    expected = torch.tensor([-(0.1 + EPS) / span, (0.4 - EPS) / span, (0.8 - EPS) / span])
    torch.testing.assert_close(scores[0, 1, 0], expected)
    torch.testing.assert_close(scores[0, 2, 0], torch.tensor([0.0, 0.0, 1.0]), atol=2e-5, rtol=0)


def test_scores_at_the_floor_are_not_zero() -> None:
    """A map of zeros is -1, a constant map far below, one from 0.8 to 0.9 reaches -8."""
    zeros, constant = torch.zeros(1, 2, 2, 3), torch.full((1, 2, 2, 3), 0.7)
    torch.testing.assert_close(confidence_scores(zeros)[0, 1], torch.full((2, 3), -1.0))
    expected = torch.full((2, 3), -(0.7 + EPS) / EPS)
    torch.testing.assert_close(confidence_scores(constant)[0, 1], expected, rtol=1e-4, atol=0)
    high = torch.linspace(0.8, 0.9, 6).view(1, 1, 2, 3).expand(-1, 2, -1, -1)
    assert confidence_scores(high)[0, 1].min().item() == pytest.approx(-8, rel=1e-3)


def test_scores_are_the_usual_ones_above_the_floor() -> None:
    refined = case()[0]
    scores, usual = confidence_scores(refined)[:, 1:], normalize_cam(refined[:, 1:], "minmax-zero")
    above = scores >= 0
    assert 0 < (~above).sum() <= 6
    torch.testing.assert_close(scores[above], usual[above])
    assert usual[~above].eq(0).all()


@given(seed=seeds)
def test_score_properties(seed: int) -> None:
    refined = case(seed)[0] - 0.3
    scores = confidence_scores(refined)
    assert scores.max() <= 1
    torch.testing.assert_close(confidence_scores(5 * refined), scores, atol=1e-3, rtol=1e-3)
    order = [0, 3, 1, 2]
    torch.testing.assert_close(confidence_scores(refined[:, order]), scores[:, order])
    for one in (slice(0, 1), slice(1, 2)):
        assert torch.equal(confidence_scores(refined[one]), scores[one])


@given(seed=seeds, low=st.floats(0.01, 0.5), more=st.floats(0, 0.5))
def test_label_properties(seed: int, low: float, more: float) -> None:
    refined = case(seed)[0]
    targets = assign_pseudo_labels(confidence_scores(refined, background=low), LABELS)
    for one in range(2):
        assert set(targets[one].unique().tolist()) <= {0, *(1 + LABELS[one].nonzero()[:, 0]).tolist()}
    higher = assign_pseudo_labels(confidence_scores(refined, background=low + more), LABELS)
    assert (higher[targets == 0] == 0).all(), "raising the background never removes it"


def test_hand_computed_labels() -> None:
    scores = torch.tensor([[[[0.2, 0.2, 0.2]], [[0.9, 0.1, 0.3]], [[1.0, 0.8, 0.4]]]])
    run = lambda *labels: assign_pseudo_labels(scores, torch.tensor([labels])).flatten().tolist()  # noqa: E731
    assert run(1, 1) == [2, 2, 2]
    assert run(1, 0) == [1, 0, 1]
    assert run(0, 0) == [0, 0, 0]


def test_absent_classes_win_nowhere() -> None:
    scores = torch.full((1, 3, 2, 2), -1.0)
    assert assign_pseudo_labels(scores, torch.tensor([[0, 0]])).eq(0).all()


# ------------------------------------------------------------------------------------------ top pixels


def test_hand_computed_topk() -> None:
    scores = torch.tensor([[[[0.2, 0.2]], [[0.9, 0.1]]], [[[0.2, 0.2]], [[0.3, 0.7]]]])
    topk = topk_pixels(scores, k=2)
    assert topk.indices[1].tolist() == [0, 3], "positions in (image, row, column)"
    torch.testing.assert_close(topk.values[1], torch.tensor([0.9, 0.7]))
    assert topk.values[0].tolist() == pytest.approx([0.2, 0.2])


def test_number_of_pixels() -> None:
    """`floor(ratio h w)`, whatever the batch, and one at least."""
    for size, expected in (((16, 16), 32), ((5, 5), 3), ((1, 7), 1), ((1, 1), 1)):
        for batch in (1, 3):
            assert topk_pixels(torch.rand(batch, 3, *size)).indices.shape == (3, expected)
    assert topk_pixels(torch.rand(2, 3, 4, 4), ratio=0.5).indices.shape == (3, 8)
    assert topk_pixels(torch.rand(2, 3, 4, 4), k=32).indices.shape == (3, 32)


def test_background_prototype_is_an_accident() -> None:
    """By default the pixels of the background are a pure tie; `complement` ranks them."""
    scores = confidence_scores(case()[0])
    official, ranked = topk_pixels(scores), topk_pixels(scores, background="complement")
    assert official.values[0].eq(0.2).all()
    assert ranked.values[0].eq(0.2).all()
    for one, other in zip(official, ranked, strict=True):
        assert torch.equal(one[1:], other[1:])
    strongest = scores[:, 1:].amax(1).flatten()
    expected = strongest.argsort(stable=True)[: len(ranked.indices[0])]
    assert torch.equal(ranked.indices[0], expected)
    tied = torch.zeros(2, 3, 2, 2)
    assert topk_pixels(tied, k=3, background="complement").indices[0].tolist() == [0, 1, 2]
    alone = topk_pixels(scores[:, :1], background="complement")
    assert alone.indices.shape == (1, 3)


# ------------------------------------------------------------------------------------------ prototypes


def test_hand_computed_prototypes() -> None:
    features = torch.tensor([[[[4.0, 0.0, 1.0]], [[0.0, 8.0, 1.0]]]])
    topk = TopK(torch.tensor([[0.75, 0.5], [1.0, 0.0]]), torch.tensor([[0, 1], [2, 0]]))
    expected = torch.tensor([[0.6, 0.8], [0.5**0.5, 0.5**0.5]])
    torch.testing.assert_close(prototypes_from_topk(features, topk), expected)


def test_all_zero_map_of_a_present_class() -> None:
    """All scores are -1: the sign cancels, no pixel is labelled with it, nothing is NaN."""
    refined, _, x, _ = case()
    refined[:, 2] = 0
    scores = confidence_scores(refined)
    topk = topk_pixels(scores)
    torch.testing.assert_close(topk.values[2], torch.full_like(topk.values[2], -1))
    prototypes = prototypes_from_topk(x, topk)
    rows = x.movedim(1, -1).flatten(0, 2)[topk.indices[2]]
    torch.testing.assert_close(prototypes[2], F.normalize(rows.mean(0), dim=0))
    assert not assign_pseudo_labels(scores, torch.ones(2, 3)).eq(2).any()


def test_negative_weights() -> None:
    """Official: they push the prototype away, and may turn it around; `clamp_negative` leaves them out."""
    features = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
    topk = TopK(torch.tensor([[1.0, -2.0], [1.0, -1.0], [-1.0, -3.0]]), torch.tensor([[0, 1]] * 3))
    official = prototypes_from_topk(features, topk)
    torch.testing.assert_close(official[0], F.normalize(torch.tensor([-1.0, 2.0]), dim=0))
    assert official[1].eq(0).all(), "weights that add up to 0 make no prototype"
    torch.testing.assert_close(official[2], F.normalize(torch.tensor([1.0, 3.0]), dim=0))
    clamped = prototypes_from_topk(features, topk, clamp_negative=True)
    assert clamped.tolist() == [[1, 0], [1, 0], [0, 0]]


@given(seed=seeds)
def test_prototype_properties(seed: int) -> None:
    refined, _, x, _ = case(seed)
    scores = confidence_scores(refined)
    prototypes = prototypes_from_topk(x.requires_grad_(), topk_pixels(scores, background="complement"))
    assert not prototypes.requires_grad
    torch.testing.assert_close(prototypes.norm(dim=1), torch.ones(4).double())
    larger = prototypes_from_topk(7 * x, topk_pixels(scores, background="complement"))
    torch.testing.assert_close(larger, prototypes)
    swapped = prototypes_from_topk(x.flip(0), topk_pixels(scores.flip(0)))
    torch.testing.assert_close(swapped[1:], prototypes[1:])


def test_zero_features_make_no_prototype() -> None:
    prototypes = prototypes_from_topk(
        torch.zeros(1, 3, 2, 2), TopK(torch.ones(2, 2), torch.tensor([[0, 1]] * 2))
    )
    assert prototypes.eq(0).all()


def test_batch_of_one() -> None:
    refined1, refined2, x1, x2 = (value[:1] for value in case())
    out = CrossTransformRegularization()(refined1, refined2, x1, x2, LABELS[:1])
    assert out.topk1.indices.max() < 24
    assert all(loss.isfinite() for loss in out.losses.values())


def test_separation() -> None:
    p = torch.eye(3)
    p[2] = torch.tensor([0.6, 0.8, 0.0])
    pairs = [0, 0, -math.log(0.4), -math.log(0.2)]  # (0, 1), (1, 0), (0, 2) and (1, 2), the last two twice
    expected = (pairs[0] + pairs[1] + 2 * pairs[2] + 2 * pairs[3]) / 6 / 2
    assert prototype_separation(p, p, torch.ones(3)).item() == pytest.approx(expected)
    assert prototype_separation(p, p, torch.tensor([1, 0, 1])).item() == pytest.approx(pairs[2] / 2)


def test_separation_of_nothing() -> None:
    """NaN without a pair of classes, infinite where two prototypes are the same."""
    p = F.normalize(torch.rand(3, 4), dim=1)
    assert prototype_separation(p, p, torch.tensor([1, 0, 0])).isnan()
    assert prototype_separation(p[:1].expand(2, -1), p[:1].expand(2, -1), torch.ones(2)) > 5
    same = torch.tensor([[1.0, 0.0]] * 2)
    assert prototype_separation(same, same, torch.ones(2)).isposinf()


# ------------------------------------------------------------------------------------------ contrast


def test_contrast_is_its_table() -> None:
    x1, x2, y1, y2, p1, p2 = contrast_case()
    settings = {"temperature": 0.3, "valid": torch.tensor([True, False, True, True]), "ignore_index": 9}
    y1[0, 0] = 9
    losses = cross_transform_contrast(x1, x2, y1, y2, p1, p2, weights=(0.1, 0.2, 0.3), **settings)
    nce = lambda *a: pixel_prototype_nce(*a, **settings)  # noqa: E731
    expected = {
        "intra_view": 0.1 * (nce(x1, y1, p1) + nce(x2, y2, p2)) / 2,
        "cross_label": 0.2 * (nce(x1, y2, p1) + nce(x2, y1, p2)) / 2,
        "cross_prototype": 0.3 * (nce(x1, y1, p2) + nce(x2, y2, p1)) / 2,
    }
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name])


@given(seed=seeds)
def test_contrast_properties(seed: int) -> None:
    x1, x2, y1, y2, p1, p2 = contrast_case(seed)
    losses = cross_transform_contrast(x1, x2, y1, y2, p1, p2)
    swapped = cross_transform_contrast(x2, x1, y2, y1, p2, p1)
    for name in losses:
        torch.testing.assert_close(losses[name], swapped[name])
    same = list(cross_transform_contrast(x1, x1, y1, y1, p1, p1).values())
    torch.testing.assert_close(same[0], same[1])
    torch.testing.assert_close(same[0], same[2])


def test_chance_level() -> None:
    """Features without a direction: a tenth of log K each."""
    _, _, y1, y2, p1, p2 = contrast_case()
    x = torch.zeros(2, 5, 4, 6, dtype=torch.float64)
    for loss in cross_transform_contrast(x, x, y1, y2, p1, p2).values():
        assert loss.item() == pytest.approx(0.1 * math.log(4))


def test_contrast_gradient() -> None:
    x1, x2, y1, y2, p1, p2 = contrast_case()
    p1.requires_grad_()
    total = sum(cross_transform_contrast(x1.requires_grad_(), x2.requires_grad_(), y1, y2, p1, p2).values())
    total.backward()
    assert x1.grad.abs().sum() > 0
    assert x2.grad.abs().sum() > 0
    assert p1.grad is None
    assert torch.autograd.gradcheck(
        lambda a, b: tuple(cross_transform_contrast(a, b, y1, y2, p1, p2).values()), (x1, x2)
    )


# ------------------------------------------------------------------------------------------ module


def test_module_is_its_parts() -> None:
    refined1, refined2, x1, x2 = case()
    settings = {
        "background": 0.4,
        "topk_ratio": 0.25,
        "background_ranking": "complement",
        "clamp_negative": True,
    }
    contrast = {"temperature": 0.2, "weights": (1.0, 0.5, 0.25)}
    out = CrossTransformRegularization(**settings, **contrast, absent_negatives=False)(
        refined1, refined2, x1, x2, LABELS * torch.tensor([1, 0, 1])
    )
    s1, s2 = (confidence_scores(refined, background=0.4) for refined in (refined1, refined2))
    t1, t2 = (topk_pixels(scores, ratio=0.25, background="complement") for scores in (s1, s2))
    y1, y2 = (assign_pseudo_labels(scores, LABELS * torch.tensor([1, 0, 1])) for scores in (s1, s2))
    p1 = prototypes_from_topk(x2, t1, clamp_negative=True)
    p2 = prototypes_from_topk(x1, t2, clamp_negative=True)
    valid = torch.tensor([True, True, False, True])
    losses = cross_transform_contrast(x1, x2, y1, y2, p1, p2, valid=valid, **contrast)
    for name, loss in losses.items():
        torch.testing.assert_close(out.losses[name], loss)
    pairs = [(out.scores1, s1), (out.scores2, s2), (out.targets1, y1), (out.targets2, y2)]
    pairs += [(out.prototypes1, p1), (out.prototypes2, p2), (out.features1, x1), (out.features2, x2)]
    for found, expected in (*pairs, *zip(out.topk1, t1, strict=True), *zip(out.topk2, t2, strict=True)):
        assert torch.equal(found, expected)


def test_absent_class_is_a_negative() -> None:
    """By default prototypes of absent classes are; leaving them out changes the loss and only lowers it."""
    refined1, refined2, x1, x2 = case()
    labels = torch.tensor([[1, 0, 0], [1, 0, 0]])
    official = CrossTransformRegularization()(refined1, refined2, x1, x2, labels)
    alternative = CrossTransformRegularization(absent_negatives=False)(refined1, refined2, x1, x2, labels)
    assert official.prototypes1[3].norm().item() == pytest.approx(1)
    for name in TERMS:
        assert alternative.losses[name] < official.losses[name]


def test_views_meet_on_the_smaller_grid() -> None:
    _, refined2, _, x2 = case()
    generator = torch.Generator().manual_seed(5)
    refined1 = torch.rand(2, 4, 9, 11, generator=generator, dtype=torch.float64)
    x1 = torch.rand(2, 5, 9, 11, generator=generator, dtype=torch.float64)
    head = CrossTransformRegularization()
    shrink = lambda maps: F.interpolate(maps, (4, 6), mode="bilinear", align_corners=True)  # noqa: E731
    expected = head(shrink(refined1), refined2, shrink(x1), x2, LABELS)
    for out in (
        head(refined1, refined2, x1.requires_grad_(), x2, LABELS),
        head(refined1, refined2, shrink(x1), x2, LABELS),
    ):
        torch.testing.assert_close(out.prototypes1, expected.prototypes1)
        assert torch.equal(out.targets1, expected.targets1)
        for name in TERMS:
            torch.testing.assert_close(out.losses[name], expected.losses[name])
    swapped = head(refined2, refined1, x2, x1, LABELS[:])
    torch.testing.assert_close(swapped.prototypes2, expected.prototypes1)


def test_who_gets_a_gradient() -> None:
    refined1, refined2, x1, x2 = (value.requires_grad_() for value in case())
    out = CrossTransformRegularization()(refined1, refined2, x1, x2, LABELS)
    sum(out.losses.values()).backward()
    assert refined1.grad is None
    assert refined2.grad is None
    assert x1.grad.abs().sum() > 0
    assert x2.grad.abs().sum() > 0
    constant = (
        out.scores1,
        out.scores2,
        out.prototypes1,
        out.prototypes2,
        out.topk1.values,
        out.topk2.values,
    )
    assert not any(value.requires_grad for value in constant)
    assert not list(CrossTransformRegularization().state_dict())


def test_image_without_label() -> None:
    """No confident pixel: all background, and the loss still runs."""
    refined1, refined2, x1, x2 = case()
    out = CrossTransformRegularization()(refined1, refined2, x1, x2, torch.zeros(2, 3))
    assert out.targets1.eq(0).all()
    assert all(loss.isfinite() for loss in out.losses.values())


def test_classifier_without_classes() -> None:
    refined1, refined2, x1, x2 = case()
    out = CrossTransformRegularization(background_ranking="complement")(
        refined1[:, :1], refined2[:, :1], x1, x2, torch.zeros(2, 0)
    )
    assert all(loss == 0 for loss in out.losses.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    values = [value.to(dtype) for value in case(dtype=torch.float32)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    out = CrossTransformRegularization()(*values, LABELS)
    exact = CrossTransformRegularization()(*(value.to(wide) for value in values), LABELS)
    assert out.prototypes1.dtype == out.scores1.dtype == wide
    assert torch.equal(out.targets1, exact.targets1)
    for name in TERMS:
        assert out.losses[name].dtype == wide
        torch.testing.assert_close(out.losses[name], exact.losses[name])


def test_devices(device: torch.device) -> None:
    values = case(dtype=torch.float32)
    head = CrossTransformRegularization(background_ranking="complement")
    expected = head(*values, LABELS)
    out = head(*(value.to(device) for value in values), LABELS.to(device))
    assert out.prototypes1.device.type == device.type
    torch.testing.assert_close(out.prototypes1.cpu(), expected.prototypes1, atol=1e-5, rtol=1e-4)
    assert torch.equal(out.targets2.cpu(), expected.targets2)
    for name in TERMS:
        torch.testing.assert_close(out.losses[name].cpu(), expected.losses[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("ranking", ["official", "complement"])
def test_compiles_to_one_graph(ranking: str) -> None:
    values = case(dtype=torch.float32)
    head = CrossTransformRegularization(background_ranking=ranking, absent_negatives=False)
    compiled = torch.compile(head, fullgraph=True, backend="eager")
    out, expected = compiled(*values, LABELS), head(*values, LABELS)
    torch.testing.assert_close(out.losses, expected.losses)
    torch.testing.assert_close(out.prototypes1, expected.prototypes1)


def test_prints_its_settings() -> None:
    assert repr(CrossTransformRegularization()) == (
        "CrossTransformRegularization(temperature=0.1, weights=(0.1, 0.1, 0.1), topk_ratio=0.125, "
        "background=0.2, background_ranking='official', clamp_negative=False, absent_negatives=True)"
    )


R1, R2, X1, X2 = case()
S1 = confidence_scores(R1)
T1 = topk_pixels(S1)
ARGUMENTS = contrast_case()
HEAD = CrossTransformRegularization()


def replaced(number: int, value: torch.Tensor, **settings):
    return lambda: cross_transform_contrast(*ARGUMENTS[:number], value, *ARGUMENTS[number + 1 :], **settings)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: confidence_scores(R1[0]), ValueError, r"refined: expected shape \(B, 1\+C, h, w\)"),
        (lambda: confidence_scores(R1[:, :0]), ValueError, "refined: expected a background channel"),
        (lambda: confidence_scores(R1.long()), TypeError, "refined: expected a floating-point"),
        (lambda: confidence_scores(R1, background=2), ValueError, "background: expected a finite number"),
        (lambda: confidence_scores(R1, eps=0), ValueError, "eps: expected a finite number > 0"),
        (lambda: assign_pseudo_labels(S1, LABELS[:, 1:]), ValueError, "labels: .* with C=3 from scores"),
        (lambda: assign_pseudo_labels(S1, 2 * LABELS), ValueError, "labels: expected a multi-hot"),
        (lambda: assign_pseudo_labels(S1.log(), LABELS), ValueError, "scores: expected finite values"),
        (lambda: topk_pixels(S1[0]), ValueError, r"scores: expected shape \(B, K, h, w\)"),
        (lambda: topk_pixels(S1, ratio=0), ValueError, "ratio: expected a finite number > 0"),
        (lambda: topk_pixels(S1, k=0), ValueError, "k: expected an integer >= 1"),
        (lambda: topk_pixels(S1, k=49), ValueError, "k: expected at most the 48 pixels of scores, got 49"),
        (lambda: topk_pixels(S1, background="best"), ValueError, "background: expected one of"),
        (lambda: prototypes_from_topk(X1[0], T1), ValueError, r"features: expected shape \(B, D, h, w\)"),
        (lambda: prototypes_from_topk(X1.long(), T1), TypeError, "features: expected a floating-point"),
        (
            lambda: prototypes_from_topk(X1, TopK(T1.values[:, 1:], T1.indices)),
            ValueError,
            r"topk.indices: expected shape \(K, k\) with k=2 from topk.values",
        ),
        (
            lambda: prototypes_from_topk(X1, TopK(T1.values, T1.values)),
            TypeError,
            "topk.indices: expected an integer",
        ),
        (
            lambda: prototypes_from_topk(X1[:1], TopK(T1.values, T1.indices * 0 + 24)),
            ValueError,
            "topk.indices: expected pixels 0..23, got 24..24",
        ),
        (
            lambda: prototypes_from_topk(X1, TopK(T1.values, -T1.indices - 1)),
            ValueError,
            "topk.indices: expected pixels 0..47, got -",
        ),
        (
            lambda: prototype_separation(X1[0, 0], X1[0, 0], torch.ones(3)),
            ValueError,
            r"present: expected shape \(K\) with K=4 from prototypes1",
        ),
        (replaced(1, X1[:, 1:]), ValueError, "features2: .* with D=5 from features1"),
        (replaced(2, ARGUMENTS[2] + 9), ValueError, "targets1: expected classes 0..3 or ignore_index"),
        (replaced(3, ARGUMENTS[3].double()), TypeError, "targets2: expected an integer"),
        (replaced(5, ARGUMENTS[5][1:]), ValueError, "prototypes2: .* with K=4 from prototypes1"),
        (replaced(0, X1, temperature=0), ValueError, "temperature: expected a finite number > 0"),
        (replaced(0, X1, weights=(1.0, 1.0)), ValueError, "weights: expected three numbers"),
        (replaced(0, X1, weights=(1.0, 1.0, -1.0)), ValueError, "weights: expected a finite number >= 0"),
        (replaced(0, X1, valid=torch.ones(4)), TypeError, "valid: expected a bool tensor"),
        (lambda: HEAD(R1, R2[:, 1:], X1, X2, LABELS), ValueError, r"refined2: .* with 1\+C=4 from refined1"),
        (lambda: HEAD(R1, R2, X1, X2[:, 1:], LABELS), ValueError, "features2: .* with D=5 from features1"),
        (lambda: HEAD(R1, R2, X1.long(), X2, LABELS), TypeError, "features1: expected a floating-point"),
        (lambda: HEAD(R1, R2, X1, X2, LABELS[:1]), ValueError, "labels: .* with B=2 from scores"),
        (lambda: CrossTransformRegularization(temperature=0), ValueError, "temperature: expected"),
        (lambda: CrossTransformRegularization(topk_ratio=2), ValueError, "topk_ratio: expected"),
        (lambda: CrossTransformRegularization(background=-1), ValueError, "background: expected"),
        (lambda: CrossTransformRegularization(weights=()), ValueError, "weights: expected three"),
        (
            lambda: CrossTransformRegularization(background_ranking="best"),
            ValueError,
            "background_ranking: expected one of",
        ),
    ],
)
def test_errors(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


def test_separation_of_no_classes() -> None:
    with pytest.raises(ValueError, match=r"present: expected a multi-hot tensor"):
        prototype_separation(torch.rand(2, 3), torch.rand(2, 3), torch.tensor([0.5, 1]))
