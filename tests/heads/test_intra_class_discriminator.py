"""The intra-class discriminator: sections 2, 3, 5, 8, 9 and 11 of the ICD specification."""

import copy
import itertools
import math
import subprocess
import sys
import textwrap
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from pseudolabel.heads import (
    FixedScaleBatchNorm2d,
    ICDBottomUp,
    ICDTopDown,
    IntraClassDiscriminator,
    icd_bottom_up_loss,
    icd_orient,
    icd_project,
    icd_side_statistics,
    icd_targets,
    icd_top_down_loss,
    icd_update_sides,
    icd_warmup,
)
from pseudolabel.refine import superpixel_refine

seeds = st.integers(0, 1000)
LABELS = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 1], [0, 0, 0]])  # single, single, two, none
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def case(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Features (4,6,5,7), directions (3,6) and a CAM (4,3,5,7)."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(4, 6, 5, 7, generator=generator, dtype=dtype)
    directions = torch.randn(3, 6, generator=generator, dtype=dtype)
    return features, directions, torch.randn(4, 3, 5, 7, generator=generator, dtype=dtype)


def tensors(data: dict[str, np.ndarray], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    found = {name: torch.from_numpy(np.asarray(value)) for name, value in data.items()}
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in found.items()}


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Within a share of the largest magnitude of the array."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def gradient(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


# -------------------------------------------------------------------------------------------- golden files


@pytest.mark.parametrize("name", ["unit", "small", "tiny", "gs1"])
def test_golden_bottom_up(golden: Callable, name: str) -> None:
    data = tensors(golden("icd/public_bottomup"), torch.float64)
    features, labels = data["feat"].requires_grad_(), data["label"]
    directions = data[f"weight_{name}"].requires_grad_()
    assert_near(icd_project(features, directions), data[f"score_{name}"], 2e-6)

    scale = float(data[f"grad_scale_{name}"])
    loss = len(features) * icd_bottom_up_loss(features, directions, labels, scale=scale)
    assert loss.item() == pytest.approx(float(data[f"loss64_{name}"]), rel=1e-12)
    loss.backward()
    assert features.grad is None
    exact = data[f"grad_exact64_{name}"]
    if name == "tiny":  # at length 0.002 the 1e-10 inside the root shows, which the exact gradient leaves out
        assert_near(directions.grad, exact, 1e-4)
    else:
        torch.testing.assert_close(directions.grad, exact, rtol=1e-5, atol=0)
    if name in ("unit", "gs1"):
        assert_near(directions.grad, data[f"grad_{name}"], 1e-4)


@pytest.mark.parametrize("prefix", ["m09", "m05"])
def test_golden_orientation(golden: Callable, prefix: str) -> None:
    data = {
        name.removeprefix(f"{prefix}_"): value for name, value in tensors(golden("icd/public_accum")).items()
    }
    sides, momentum = torch.zeros(data["state"].shape[1:]), float(data["momentum"])
    assert momentum == pytest.approx({"m09": 0.9, "m05": 0.5}[prefix])
    for step, scores in enumerate(data["score"]):
        statistics = icd_side_statistics(scores, data["cam"][step], data["label"][step])
        sides = icd_update_sides(sides, *statistics, momentum=momentum)
        torch.testing.assert_close(sides, data["state"][step], rtol=1e-5, atol=0)
        assert torch.equal(icd_orient(scores, sides), data["out"][step])
    assert torch.equal(icd_orient(data["eval_score"], sides), data["eval_out"])
    assert sides[-1].eq(0).all(), "the last class was never there"


@pytest.mark.parametrize("kind", ["sp", "dense"])
def test_golden_top_down(golden: Callable, kind: str) -> None:
    data = tensors(golden("icd/public_topdown"))
    logits, scores, labels = data["logit"].requires_grad_(), data[f"score_{kind}"], data["label"]
    target, valid = icd_targets(scores)
    assert torch.equal(target.double(), data[f"target64_{kind}"].double())
    assert torch.equal(valid.double(), data[f"valid64_{kind}"].double())
    torch.testing.assert_close(logits.sigmoid(), data["prob"])

    def grad(weight: float = 1.0) -> Tensor:
        (found,) = gradient(len(logits) * icd_top_down_loss(logits, scores, labels, weight=weight), logits)
        return found

    torch.testing.assert_close(grad(), data[f"grad_{kind}"], rtol=1e-5, atol=0)
    torch.testing.assert_close(grad(2.5), data[f"grad_gs2p5_{kind}"], rtol=1e-5, atol=0)
    for step, expected in enumerate(data[f"grad_warm4_{kind}"]):
        torch.testing.assert_close(grad(icd_warmup(step, 4)), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["const", "zerofeat", "zerodir", "multi", "nolabel"])
def test_golden_edges_bottom_up(golden: Callable, name: str) -> None:
    data = {
        key.removeprefix(f"bu_{name}_"): value for key, value in tensors(golden("icd/public_edge")).items()
    }
    features, labels, directions = data["feat"], data["label"], data["weight"].requires_grad_()
    assert_near(icd_project(features, directions), data["score"], 1e-5)
    loss = len(features) * icd_bottom_up_loss(features, directions, labels)
    (found,) = gradient(loss, directions)
    if name == "const":
        assert_near(found, data["grad"], 1e-4)
    else:
        assert data["grad"].eq(0).all()
        assert found.eq(0).all()
    if name == "multi":  # all images have several labels: they train when they are let
        several = icd_bottom_up_loss(features, directions, labels, single_label_only=False)
        assert several < 0 == loss


@pytest.mark.parametrize("name", ["allpos", "allneg", "zeroscore", "negcam", "nolabel"])
def test_golden_edges_orientation(golden: Callable, name: str) -> None:
    data = {
        key.removeprefix(f"acc_{name}_"): value for key, value in tensors(golden("icd/public_edge")).items()
    }
    statistics = icd_side_statistics(data["score"], data["cam"], data["label"])
    sides = icd_update_sides(torch.zeros_like(data["state"]), *statistics)
    torch.testing.assert_close(sides, data["state"], rtol=1e-5, atol=0)
    assert torch.equal(icd_orient(data["score"], sides), data["out"])


@pytest.mark.parametrize("name", ["zero", "pos", "neg", "tiny", "margin", "nolabel"])
def test_golden_edges_top_down(golden: Callable, name: str) -> None:
    data = {
        key.removeprefix(f"td_{name}_"): value for key, value in tensors(golden("icd/public_edge")).items()
    }
    logits = data["logit"].requires_grad_()
    loss = len(logits) * icd_top_down_loss(logits, data["score"], data["label"])
    (found,) = gradient(loss, logits)
    torch.testing.assert_close(found, data["grad"], rtol=1e-5, atol=0)


def test_golden_training(golden: Callable) -> None:
    """A whole training: standardise, bottom-up, orientation, superpixels, top-down, SGD."""
    data = tensors(golden("icd/public_head_train"))
    classes, channels = data["init_icd_bu_weight"].shape
    head = IntraClassDiscriminator(
        channels,
        classes,
        hidden=len(data["init_fc6_ft_bias"]),
        norm=FixedScaleBatchNorm2d(channels, biased_running_var=True),
        bottom_up=ICDBottomUp(channels, classes, scale=float(data["bu_grad_scale"])),
    )
    parameters = {
        "icd_bu_weight": head.bottom_up.directions,
        "fc6_ft_weight": head.top_down.conv1.weight,
        "fc6_ft_bias": head.top_down.conv1.bias,
        "fc7_ft_weight": head.top_down.conv2.weight,
        "fc7_ft_bias": head.top_down.conv2.bias,
        "conv_ft_weight": head.top_down.classifier.weight,
        "feat_bn_beta": head.norm.beta,
    }
    assert set(parameters.values()) == set(head.parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(data[f"init_{name}"])
    lr, momentum, decay, mult = (
        float(data[name]) for name in ("lr", "momentum", "weight_decay", "td_lr_mult")
    )
    optimizer = torch.optim.SGD(
        head.param_groups(lr, weight_decay=decay, head_lr_mult=mult), lr=lr, momentum=momentum
    )

    for step, images in enumerate(data["feat"]):
        features = images.requires_grad_()
        out = head(
            features,
            data["cam"][step],
            data["label"][step],
            data["superpixel"][step],
            td_weight=icd_warmup(step, int(data["warmup"])),
        )
        assert_near(out.bottom_up, data["step_bu"][step], 1e-3)
        assert_near(out.refined, data["step_sp"][step], 1e-3)
        assert_near(out.logits, data["step_td_logit"][step], 1e-5)
        optimizer.zero_grad()
        (out.loss_bu + out.loss_td).backward()
        assert_near(len(features) * features.grad, data["step_grad_feat"][step], 1e-5)
        for name in ("icd_bu_weight", "conv_ft_weight", "feat_bn_beta"):
            tolerance = 1e-3 if name == "icd_bu_weight" else 1e-5
            assert_near(len(features) * parameters[name].grad, data[f"step_grad_{name}"][step], tolerance)
        optimizer.step()
        for name, parameter in parameters.items():
            assert_near(parameter, data[f"after_{name}"][step], 1e-3 if name == "icd_bu_weight" else 1e-5)
        assert_near(head.norm.running_mean, data["after_feat_bn_moving_mean"][step], 1e-5)
        assert_near(head.norm.running_var, data["after_feat_bn_moving_var"][step], 1e-5)
        assert_near(head.bottom_up.sides, data["after_icd_accum_resign_moving_mean"][step], 1e-5)

    head.eval()
    out = head(data["feat"][0], None, data["label"][0], data["superpixel"][0])
    assert_near(head.norm(data["feat"][0]), data["eval_bn"], 1e-5)
    assert_near(out.bottom_up, data["eval_bu"], 1e-3)
    assert_near(out.refined, data["eval_sp"], 1e-3)
    assert_near(out.logits, data["eval_td_logit"], 1e-5)
    torch.testing.assert_close(out.logits.sigmoid(), data["eval_td_prob"], rtol=1e-3, atol=0)


# ----------------------------------------------------------------------------------------------- bottom-up


@given(seed=seeds)
def test_bottom_up_properties(seed: int) -> None:
    x, w, _ = case(seed)
    generator = torch.Generator().manual_seed(seed)
    x, w = x.requires_grad_(), w.requires_grad_()
    loss = icd_bottom_up_loss(x, w, LABELS, detach_features=False)
    grad_x, grad_w = gradient(loss, x, w)
    assert grad_x[:2].ne(0).any()

    torch.testing.assert_close(icd_project(x, 3.5 * w), icd_project(x, w))
    torch.testing.assert_close(icd_bottom_up_loss(x, 3.5 * w, LABELS), loss)
    torch.testing.assert_close(icd_bottom_up_loss(x, -w, LABELS), loss)
    mirrored = (-w.detach()).requires_grad_()
    torch.testing.assert_close(gradient(icd_bottom_up_loss(x, mirrored, LABELS), mirrored)[0], -grad_w)
    radial = (grad_w * w).sum(1)
    torch.testing.assert_close(radial, torch.zeros_like(radial), rtol=0, atol=1e-9)

    images, pixels = torch.randperm(4, generator=generator), torch.randperm(35, generator=generator)
    shuffled = x[images].flatten(2)[:, :, pixels].view_as(x)
    torch.testing.assert_close(icd_bottom_up_loss(shuffled, w, LABELS[images]), loss)

    other = w.detach().clone()
    other[1] = torch.randn(6, generator=generator)  # rows are independent
    other.requires_grad_()
    (changed,) = gradient(icd_bottom_up_loss(x, other, LABELS), other)
    assert torch.equal(changed[[0, 2]], grad_w[[0, 2]])
    assert grad_w[2].eq(0).all(), "the third class has no image of its own"


@given(seed=seeds)
def test_bottom_up_is_bounded_by_the_leading_axes(seed: int) -> None:
    x, w, _ = case(seed)
    bound, axes = 0.0, w.clone()
    for c, image in ((0, x[0]), (1, x[1])):
        pixels = image.flatten(1)
        values, vectors = torch.linalg.eigh(pixels @ pixels.T)
        bound -= 10 / (2 * 35 * 4) * values[-1].item()
        axes[c] = vectors[:, -1]
    assert bound <= icd_bottom_up_loss(x, w, LABELS).item() <= 0
    assert icd_bottom_up_loss(x, axes, LABELS).item() == pytest.approx(bound, rel=1e-9)


def test_converges_to_the_leading_axis() -> None:
    x, w, _ = case()
    x = x * torch.linspace(0.5, 2, 6, dtype=x.dtype)[:, None, None]  # uncentred, and no tie
    w = w.requires_grad_()
    optimizer = torch.optim.SGD([w], lr=0.5)
    for _ in range(1500):
        optimizer.zero_grad()
        icd_bottom_up_loss(x, w, LABELS).backward()
        optimizer.step()
    for c in (0, 1):
        pixels = x[c].flatten(1)
        axis = torch.linalg.eigh(pixels @ pixels.T).eigenvectors[:, -1]
        assert abs(F.cosine_similarity(w[c], axis, dim=0)) > 1 - 1e-6


def test_tied_eigenvalue() -> None:
    """Any axis of the plane is as good as another."""
    x = torch.zeros(1, 3, 1, 4, dtype=torch.float64)
    x[0, :2, 0] = torch.tensor([[2.0, -2.0, 0.0, 0.0], [0.0, 0.0, 2.0, -2.0]])
    x[0, 2, 0, 0] = 0.1
    x = x - 0.025 * torch.tensor([0.0, 0.0, 1.0]).view(1, 3, 1, 1)
    w = torch.tensor([[0.3, 0.5, 0.8]], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=0.3)
    for _ in range(200):
        optimizer.zero_grad()
        icd_bottom_up_loss(x, w, torch.ones(1, 1)).backward()
        optimizer.step()
    assert w.isfinite().all()
    assert F.normalize(w, dim=1)[0, :2].norm() > 0.998


def test_single_labels_alone_train() -> None:
    x, w, _ = case()
    expected = 0.0
    for image, c in ((0, 0), (1, 1)):
        unit = w[c] / w[c].norm()
        expected -= 5 * (unit @ x[image].flatten(1)).square().mean().item() / 4  # of all four images
    assert icd_bottom_up_loss(x, w, LABELS).item() == pytest.approx(expected, rel=1e-9)
    assert icd_bottom_up_loss(x, w, LABELS.bool(), scale=1.0).item() == pytest.approx(expected / 10, rel=1e-9)
    more = icd_bottom_up_loss(x, w, LABELS, single_label_only=False).item()
    for c in (0, 2):
        expected -= 5 * (w[c] / w[c].norm() @ x[2].flatten(1)).square().mean().item() / 4
    assert more == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("labels", [torch.zeros(4, 3), torch.ones(4, 3)], ids=["no label", "several each"])
def test_no_image_that_trains(labels: Tensor) -> None:
    x, w, _ = case()
    loss = icd_bottom_up_loss(x, w.requires_grad_(), labels)
    assert loss.item() == 0
    assert gradient(loss, w)[0].eq(0).all()


def test_zero_direction() -> None:
    x, w, cam = case()
    w[0] = 0
    w = w.requires_grad_()
    assert icd_project(x, w)[:, 0].eq(0).all()
    (grad,) = gradient(icd_bottom_up_loss(x, w, LABELS), w)
    assert grad[0].eq(0).all()
    assert grad[1].ne(0).any()
    statistics = icd_side_statistics(icd_project(x, w), cam, LABELS)
    assert statistics[0][0].eq(0).all(), "what is 0 is on neither side"


def test_equal_features() -> None:
    """Before standardisation the axis is the feature itself; after it nothing is left but the shift."""
    feature = torch.tensor([1.0, 2.0, 0.5])
    x = feature[None, :, None, None].expand(2, 3, 4, 5)
    labels = torch.ones(2, 1)
    along, across = feature[None], torch.tensor([[2.0, -1.0, 0.0]])
    assert icd_bottom_up_loss(x, along, labels).item() == pytest.approx(-5 * feature.square().sum().item())
    assert icd_bottom_up_loss(x, across, labels).item() == pytest.approx(0, abs=1e-12)
    assert icd_project(x, along).gt(0).all(), "one sign everywhere"

    head = IntraClassDiscriminator(3, 1, hidden=2)
    out = head(x, torch.rand(2, 1, 4, 5), labels)
    assert head.norm(x).abs().max() < 1e-5
    assert out.loss_bu.item() == pytest.approx(0, abs=1e-6)
    (out.loss_bu + out.loss_td).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in head.parameters())
    head.norm.beta.data = torch.tensor([0.5, -1.0, 2.0])
    torch.testing.assert_close(head.norm(x)[0, :, 0, 0], head.norm.beta, atol=1e-4, rtol=0)


@given(seed=seeds)
def test_reductions(seed: int) -> None:
    x, w, _ = case(seed)
    scores = icd_project(x, w).roll(1, 0)
    calls = (
        partial(icd_bottom_up_loss, x, w, LABELS),
        partial(icd_top_down_loss, icd_project(x, w), scores, LABELS, weight=0.7),
    )
    for call in calls:
        each = call(reduction="none")
        assert each.shape == (4, 3, 5, 7)
        assert each[:, :, 0, 0][LABELS == 0].eq(0).all()
        torch.testing.assert_close(call(reduction="sum"), each.sum())
        torch.testing.assert_close(call(), each.sum() / 4 / 35)


# --------------------------------------------------------------------------------------------- orientation


def test_hand_computed_sides() -> None:
    scores = torch.tensor([[[[1.0, 2.0, -1.0, 0.0]]], [[[1.0, -1.0, -2.0, -3.0]]], [[[9.0, 9.0, 9.0, 9.0]]]])
    cam = torch.tensor([[[[0.2, 0.4, 0.9, 5.0]]], [[[0.5, 0.3, 0.6, -7.0]]], [[[9.0, 9.0, 9.0, 9.0]]]])
    sums, counts = icd_side_statistics(scores, cam, torch.tensor([[1], [1], [0]]))
    torch.testing.assert_close(sums, torch.tensor([[0.3 + 0.5, 0.9 + 0.3]]))
    assert counts.tolist() == [2]
    state = icd_update_sides(torch.tensor([[1.0, 1.0]]), sums, counts, momentum=0.75)
    torch.testing.assert_close(state, torch.tensor([[0.75 + 0.25 * 0.4, 0.75 + 0.25 * 0.6]]))
    assert torch.equal(icd_orient(scores, state), -scores)
    assert torch.equal(icd_orient(scores, torch.tensor([[0.5, 0.5]])), scores), "a tie keeps the sign"


@given(seed=seeds)
def test_orientation_properties(seed: int) -> None:
    x, w, cam = case(seed)
    scores = icd_project(x, w)
    before = torch.rand(3, 2, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    update = lambda s, m, a: icd_update_sides(a, *icd_side_statistics(s, m, LABELS))  # noqa: E731
    after = update(scores, cam, before)
    oriented = icd_orient(scores, after)
    assert torch.equal(oriented.abs(), scores.abs())
    # Turning a direction around swaps the sides and leaves the result.
    torch.testing.assert_close(update(-scores, cam, before.flip(1)), after.flip(1))
    assert torch.equal(icd_orient(-scores, after.flip(1)), oriented)
    # From the start the scale of the CAM plays no part.
    fresh = torch.zeros_like(before)
    for factor in (0.01, 50.0):
        assert torch.equal(
            icd_orient(scores, update(scores, factor * cam, fresh)),
            icd_orient(scores, update(scores, cam, fresh)),
        )
    torch.testing.assert_close(update(scores, cam.clamp(min=0), before), after)


def test_constant_input_converges_at_the_momentum() -> None:
    x, w, cam = case()
    sums, counts = icd_side_statistics(icd_project(x, w), cam, LABELS)
    current = sums / counts[:, None]
    state = torch.zeros(3, 2, dtype=x.dtype)
    for step in range(1, 6):
        state = icd_update_sides(state, sums, counts, momentum=0.8)
        torch.testing.assert_close(state, (1 - 0.8**step) * current)
    assert torch.equal(icd_update_sides(state, sums, counts, momentum=1.0), state), "1 freezes the sides"


def test_absent_class_keeps_its_state() -> None:
    x, w, cam = case()
    labels = torch.tensor([[1, 0, 0]] * 4)
    state = torch.rand(3, 2, dtype=x.dtype)
    moved = icd_update_sides(state, *icd_side_statistics(icd_project(x, w), cam, labels))
    assert torch.equal(moved[1:], state[1:])
    assert moved[0].ne(state[0]).all()
    loss = icd_bottom_up_loss(x, w.requires_grad_(), labels)
    assert gradient(loss, w)[0][1:].eq(0).all()


def test_all_negative_scores_flip() -> None:
    scores, cam = -torch.rand(1, 1, 3, 4) - 0.1, torch.rand(1, 1, 3, 4)
    sums, counts = icd_side_statistics(scores, cam, torch.ones(1, 1))
    assert sums[0, 0] == 0
    assert icd_orient(scores, icd_update_sides(torch.zeros(1, 2), sums, counts)).gt(0).all()


def test_silent_cam_of_a_present_class() -> None:
    scores, cam = torch.randn(1, 1, 3, 4), -torch.rand(1, 1, 3, 4)
    statistics = icd_side_statistics(scores, cam, torch.ones(1, 1))
    state = torch.tensor([[0.2, 0.6]])
    for _ in range(20):
        state = icd_update_sides(state, *statistics)
    torch.testing.assert_close(state, 0.9**20 * torch.tensor([[0.2, 0.6]]))
    assert torch.equal(icd_orient(scores, state), -scores), "the order stays, and the sign with it"
    fresh = icd_update_sides(torch.zeros(1, 2), *statistics)
    assert torch.equal(icd_orient(scores, fresh), scores)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_broken_step_keeps_the_state(wrong: float) -> None:
    """In mixed precision a step may overflow; the scaler skips it, and so do the sides."""
    x, w, cam = case()
    cam[0, 0, 0] = wrong
    state = torch.rand(3, 2, dtype=x.dtype)
    moved = icd_update_sides(state, *icd_side_statistics(icd_project(x, w), cam, LABELS))
    assert torch.equal(moved[0], state[0])
    assert moved[1:].isfinite().all()
    assert moved[1:].ne(state[1:]).all()


# ------------------------------------------------------------------------------------------------ top-down


def test_hand_computed_target() -> None:
    scores = torch.tensor([[[[10.0, 2.0, 2.1, 0.0, -0.04, -0.2, -0.041]]]])
    target, valid = icd_targets(scores)
    assert target.flatten().tolist() == [True, True, True, False, False, False, False]
    assert valid.flatten().tolist() == [True, False, True, False, False, True, True], "strictly above 0.2"
    logits = torch.tensor([[[[0.3, 1.0, -0.7, 1.0, 1.0, 0.9, 1.0]]]])
    terms = [math.log1p(math.exp(z)) for z in (-0.3, 0.7, 0.9, 1.0)]
    loss = icd_top_down_loss(logits, scores, torch.ones(1, 1), weight=2.0)
    assert loss.item() == pytest.approx(2 * sum(terms) / 7, rel=1e-6)


@given(seed=seeds)
def test_top_down_properties(seed: int) -> None:
    x, w, scores = case(seed)
    logits = icd_project(x, 3 * w).detach().requires_grad_()
    scores = scores.requires_grad_()
    loss = icd_top_down_loss(logits, scores, LABELS, weight=0.3)
    (grad,) = gradient(loss, logits)
    with pytest.raises(RuntimeError, match="not have been used"):
        gradient(icd_top_down_loss(logits, scores, LABELS), scores)
    target, valid = icd_targets(scores)
    counts = valid & (LABELS != 0)[:, :, None, None]
    assert torch.equal(grad != 0, counts)
    assert grad.abs().max() <= 0.3 / (35 * 4)
    assert torch.equal(grad[counts] < 0, target[counts]), "logits rise on the object"

    scaled = torch.where(scores > 0, 7 * scores, 0.01 * scores)
    for found, expected in zip(icd_targets(scaled), (target, valid), strict=True):
        assert torch.equal(found, expected)


def test_warmup() -> None:
    weights = [icd_warmup(step, 50) for step in range(60)]
    assert weights[0] == pytest.approx(math.exp(-10))
    assert weights[25] == pytest.approx(math.exp(-5))
    assert all(a < b for a, b in itertools.pairwise(weights[:51]))
    assert set(weights[50:]) == {1.0}
    assert icd_warmup(0, 0) == 1
    assert icd_warmup(0, 10, sharpness=0) == 1


def test_no_positive_region() -> None:
    """The refined score is nowhere positive: the top-down head learns negatives only."""
    superpixels = torch.arange(3).repeat_interleave(4).view(1, 3, 4)
    scores = torch.where(torch.arange(12).view(1, 1, 3, 4) % 4 == 0, 1.0, -1.0)
    refined = superpixel_refine(scores, superpixels, torch.ones(1, 1))
    assert refined.max() <= 0
    logits = torch.zeros(1, 1, 3, 4, requires_grad=True)
    (grad,) = gradient(icd_top_down_loss(logits, refined, torch.ones(1, 1)), logits)
    assert grad.gt(0).all()


@pytest.mark.parametrize("scale", [0.0, 1.9e-6])
def test_nothing_is_confident(scale: float) -> None:
    scores = scale * torch.tensor([[[[1.0, -1.0, 0.5, 0.0]]]])
    logits = torch.randn(1, 1, 1, 4, requires_grad=True)
    loss = icd_top_down_loss(logits, scores, torch.ones(1, 1))
    assert loss.item() == 0
    assert gradient(loss, logits)[0].eq(0).all()
    assert not icd_targets(scores)[1].any()


@pytest.mark.parametrize("sign", [1, -1])
def test_one_side_only(sign: int) -> None:
    scores = sign * torch.tensor([[[[5.0, 1.1, 0.9]]]])
    target, valid = icd_targets(scores)
    assert valid.flatten().tolist() == [True, True, False]
    assert target.eq(sign > 0).all()


def test_empty_inputs() -> None:
    none = torch.zeros(0, 3, 4, 5)
    assert icd_top_down_loss(none, none, torch.zeros(0, 3)).item() == 0
    assert icd_bottom_up_loss(none, torch.ones(3, 3), torch.zeros(0, 3)).item() == 0
    assert icd_targets(none)[0].shape == none.shape
    assert icd_side_statistics(none, none, torch.zeros(0, 3))[0].eq(0).all()


# ------------------------------------------------------------------------------------------- standardising


@pytest.mark.parametrize("momentum", [0.1, 1.0])
def test_norm_is_batch_norm_of_scale_1(momentum: float) -> None:
    features, _, _ = case()
    features = 3 * features + 2
    ours = FixedScaleBatchNorm2d(6, momentum=momentum).double()
    theirs = nn.BatchNorm2d(6, momentum=momentum).double()
    shift = torch.randn(6, dtype=torch.float64)
    ours.beta.data, theirs.bias.data = shift.clone(), shift.clone()
    for _ in range(3):
        a, b = (features.clone().requires_grad_() for _ in range(2))
        first, second = ours(a), theirs(b)
        torch.testing.assert_close(first, second)
        weight = torch.randn_like(first)
        torch.testing.assert_close(gradient((first * weight).sum(), a), gradient((second * weight).sum(), b))
        torch.testing.assert_close(ours.running_mean, theirs.running_mean)
        torch.testing.assert_close(ours.running_var, theirs.running_var)
        features = features.roll(1, 1) - 0.3
    ours.eval()
    theirs.eval()
    torch.testing.assert_close(ours(features), theirs(features))


def test_norm_settings() -> None:
    features, _, _ = case()
    biased = FixedScaleBatchNorm2d(6, biased_running_var=True, momentum=1.0).double()
    biased(features)
    torch.testing.assert_close(biased.running_var, features.var((0, 2, 3), correction=0))
    plain = FixedScaleBatchNorm2d(6, shift=False).double()
    assert not list(plain.parameters())
    normed = plain(features)
    torch.testing.assert_close(normed.mean((0, 2, 3)), torch.zeros(6, dtype=torch.float64))
    torch.testing.assert_close(normed.var((0, 2, 3), correction=0), torch.ones(6).double(), atol=1e-4, rtol=0)
    assert "shift=False" in repr(plain)


def test_norm_of_padding_alone() -> None:
    norm = FixedScaleBatchNorm2d(6)
    before = copy.deepcopy(norm.state_dict())
    assert norm(torch.randn(2, 6, 3, 4), torch.zeros(2, 3, 4, dtype=torch.bool)).isfinite().all()
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


# ------------------------------------------------------------------------------------------------- padding


class Pointwise(nn.Module):
    """A top-down head that looks at one position: padding cannot reach it sideways."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(x)


@given(seed=seeds)
def test_padding_changes_nothing(seed: int) -> None:
    features, directions, cam = case(seed)
    superpixels = torch.arange(35).view(1, 5, 7).expand(4, -1, -1) // 4
    valid = F.pad(torch.ones(4, 5, 7, dtype=torch.bool), (0, 2, 0, 3))
    heads = [IntraClassDiscriminator(6, 3, top_down=Pointwise()).double() for _ in range(2)]
    heads[0].bottom_up.directions.data = directions
    heads[1].load_state_dict(heads[0].state_dict())
    plain = heads[0](features, cam, LABELS, superpixels)
    padded = heads[1](
        F.pad(features, (0, 2, 0, 3), value=9.0),
        F.pad(cam, (0, 2, 0, 3), value=9.0),
        LABELS,
        F.pad(superpixels, (0, 2, 0, 3), value=77),
        valid_mask=valid,
    )
    for name in ("logits", "bottom_up", "refined"):
        torch.testing.assert_close(getattr(padded, name)[:, :, :5, :7], getattr(plain, name), msg=name)
    assert padded.refined.masked_select(~valid[:, None]).eq(0).all()
    torch.testing.assert_close(padded.loss_bu, plain.loss_bu)
    torch.testing.assert_close(padded.loss_td, plain.loss_td)
    torch.testing.assert_close(heads[1].state_dict(), heads[0].state_dict())
    for out in (plain, padded):
        (out.loss_bu + out.loss_td).backward()
    for a, b in zip(heads[0].parameters(), heads[1].parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_each_image_divides_by_its_own_positions() -> None:
    x, w, cam = case()
    valid = torch.ones(4, 5, 7, dtype=torch.bool)
    valid[0, 2:] = False
    valid[3] = False
    parts = [icd_bottom_up_loss(x[:1, :, :2], w, LABELS[:1]), icd_bottom_up_loss(x[1:2], w, LABELS[1:2])]
    torch.testing.assert_close(icd_bottom_up_loss(x, w, LABELS, valid_mask=valid), sum(parts) / 4)
    everything = torch.tensor([[1, 0, 0]] * 4)
    _, counts = icd_side_statistics(icd_project(x, w), cam, everything, valid_mask=valid)
    assert counts.tolist() == [3, 0, 0], "an image that is all padding is none"
    assert icd_top_down_loss(cam, cam, LABELS, valid_mask=torch.zeros_like(valid)).item() == 0
    scores = cam.masked_fill(~valid[:, None], 1e3)  # padding does not set the scale of the target
    half = cam[:1, :, :2]
    parts = [
        icd_top_down_loss(half, half, LABELS[:1]),
        2 * icd_top_down_loss(cam[1:3], cam[1:3], LABELS[1:3]),
    ]
    torch.testing.assert_close(icd_top_down_loss(cam, scores, LABELS, valid_mask=valid), sum(parts) / 4)


# ------------------------------------------------------------------------------------------------- modules


def head_and_inputs(dtype: torch.dtype = torch.float32) -> tuple[IntraClassDiscriminator, tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(3)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        head = IntraClassDiscriminator(6, 3, hidden=5).to(dtype)
    features, _, cam = case(dtype=dtype)
    superpixels = torch.randint(0, 12, (4, 17, 25), generator=generator)
    return head, (features.relu(), cam, LABELS, superpixels)


def test_module_equals_functions() -> None:
    head, (features, cam, labels, superpixels) = head_and_inputs(torch.float64)
    x = copy.deepcopy(head.norm)(features)
    w, top_down = head.bottom_up.directions, head.top_down
    for step in range(2):
        before = head.bottom_up.sides.clone()
        out = head(features, cam, labels, superpixels, td_weight=0.4)
        raw = icd_project(x, w)
        sides = icd_update_sides(before, *icd_side_statistics(raw, cam, labels))
        assert torch.equal(head.bottom_up.sides, sides)
        assert torch.equal(out.bottom_up, icd_orient(raw, sides))
        assert torch.equal(out.refined, superpixel_refine(out.bottom_up, superpixels, labels))
        torch.testing.assert_close(out.loss_bu, icd_bottom_up_loss(x, w, labels))
        first = F.relu(top_down.conv1(x))
        hidden = torch.cat([x, first, F.relu(top_down.conv2(first))], 1)
        torch.testing.assert_close(out.logits, F.conv2d(hidden, top_down.classifier.weight))
        torch.testing.assert_close(
            out.loss_td, icd_top_down_loss(out.logits, out.refined, labels, weight=0.4)
        )
        assert step == 0 or before.ne(0).any()
    bottom_up = ICDBottomUp(6, 3, scale=2.0, single_label_only=False, side_momentum=0.5).double()
    other = bottom_up(x, cam, labels)
    torch.testing.assert_close(
        other.loss,
        icd_bottom_up_loss(x, bottom_up.directions, labels, scale=2.0, single_label_only=False),
    )
    assert torch.equal(
        bottom_up.sides,
        icd_update_sides(
            torch.zeros(3, 2).double(), *icd_side_statistics(other.raw, cam, labels), momentum=0.5
        ),
    )


def test_who_learns_from_what() -> None:
    """Bottom-up: the directions alone. Top-down: its head, the shift, and the features."""
    head, (features, *rest) = head_and_inputs()
    features = features.requires_grad_()
    out = head(features, *rest)
    assert not out.bottom_up.requires_grad
    assert not out.refined.requires_grad
    bottom_up = head.bottom_up.directions
    others = {name: p for name, p in head.named_parameters() if p is not bottom_up}
    assert gradient(out.loss_bu, bottom_up)[0][:2].ne(0).any()
    for name, parameter in {**others, "features": features}.items():
        assert torch.autograd.grad(out.loss_bu, parameter, retain_graph=True, allow_unused=True) == (None,), (
            name
        )
        found = torch.autograd.grad(out.loss_td, parameter, retain_graph=True)[0]
        assert found.ne(0).any(), name
    assert torch.autograd.grad(out.loss_td, bottom_up, retain_graph=True, allow_unused=True) == (None,)


def test_evaluation_is_pure() -> None:
    head, (features, cam, labels, superpixels) = head_and_inputs()
    head(features, cam, labels, superpixels)
    head.eval()
    before = copy.deepcopy(head.state_dict())
    out = head(features)
    with_all = head(features, cam, labels, superpixels, td_weight=3.0)
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())
    assert (out.refined, out.loss_bu, out.loss_td) == (None, None, None)
    assert (with_all.loss_bu, with_all.loss_td) == (None, None)
    assert torch.equal(with_all.logits, out.logits)
    assert torch.equal(with_all.bottom_up, out.bottom_up)
    assert torch.equal(with_all.refined, superpixel_refine(out.bottom_up, superpixels, labels))
    for one in range(4):
        single = head(features[one : one + 1])
        torch.testing.assert_close(single.logits, out.logits[one : one + 1])
        torch.testing.assert_close(single.bottom_up, out.bottom_up[one : one + 1])


def test_checkpoint_restores_the_sides() -> None:
    head, inputs = head_and_inputs()
    for _ in range(3):
        head(*inputs)
    other, _ = head_and_inputs()
    assert head.bottom_up.sides.ne(0).any()
    other.load_state_dict(head.state_dict())
    assert torch.equal(other.bottom_up.sides, head.bottom_up.sides)
    assert torch.equal(other.eval()(inputs[0]).bottom_up, head.eval()(inputs[0]).bottom_up)


def test_without_superpixels_and_with_another_refiner() -> None:
    head, (features, cam, labels, superpixels) = head_and_inputs()
    plain = head(features, cam, labels)
    assert torch.equal(plain.refined, plain.bottom_up.where(labels[:, :, None, None] != 0, 0))
    head.refine = lambda scores, regions, given: scores.sign() * (regions[:, None, :5, :7] > 3)
    own = head(features, cam, labels, superpixels)
    expected = own.bottom_up.sign() * (superpixels[:, None, :5, :7] > 3) * labels[:, :, None, None]
    assert torch.equal(own.refined, expected)


def test_training_without_labels_scores_only() -> None:
    head, (features, *_) = head_and_inputs()
    out = head(features)
    assert (out.refined, out.loss_bu, out.loss_td) == (None, None, None)
    assert head.bottom_up.sides.eq(0).all()


def test_vit_tokens() -> None:
    tokens, labels = torch.randn(2, 1 + 5 * 7, 16, requires_grad=True), torch.tensor([[1, 0], [0, 1]])
    features = tokens[:, 1:].transpose(1, 2).unflatten(2, (5, 7))
    head = IntraClassDiscriminator(16, 2, hidden=4)
    out = head(features, torch.randn(2, 2, 5, 7), labels)
    (out.loss_bu + out.loss_td).backward()
    assert tokens.grad[:, 0].eq(0).all()
    assert tokens.grad[:, 1:].ne(0).any()
    contiguous = copy.deepcopy(head).eval()(features.contiguous())
    torch.testing.assert_close(head.eval()(features).logits, contiguous.logits)


def test_norm_and_parts_of_your_own() -> None:
    features, _, cam = case(dtype=torch.float32)
    head = IntraClassDiscriminator(
        6, 3, norm=nn.Identity(), bottom_up=ICDBottomUp(6, 3, scale=1.0), top_down=Pointwise()
    )
    out = head(features, cam, LABELS, valid_mask=torch.ones(4, 5, 7, dtype=torch.bool))
    torch.testing.assert_close(out.logits, head.top_down.classifier(features))
    torch.testing.assert_close(
        out.loss_bu, icd_bottom_up_loss(features, head.bottom_up.directions, LABELS, scale=1.0)
    )


def test_param_groups() -> None:
    head, _ = head_and_inputs()
    groups = head.param_groups(0.1, weight_decay=0.01, head_lr_mult=5)
    names = {id(p): name for name, p in head.named_parameters()}
    found = {
        (group["lr"], group["weight_decay"]): {names[id(p)] for p in group["params"]} for group in groups
    }
    assert found == {
        (0.1, 0.01): {"bottom_up.directions", "top_down.conv1.weight", "top_down.conv2.weight"},
        (0.1, 0.0): {"norm.beta", "top_down.conv1.bias", "top_down.conv2.bias"},
        (0.5, 0.01): {"top_down.classifier.weight"},
    }
    head.top_down.requires_grad_(requires_grad=False)
    rest = [names[id(p)] for group in head.param_groups(0.1) for p in group["params"]]
    assert sorted(rest) == ["bottom_up.directions", "norm.beta"]
    torch.optim.SGD(groups, lr=0.1, momentum=0.9)


def test_first_directions_are_not_zero() -> None:
    directions = ICDBottomUp(400, 20, init_std=0.02).directions
    assert directions.std().item() == pytest.approx(0.02, rel=0.05)
    assert ICDTopDown(400, 20, hidden=200).classifier.weight.std().item() == pytest.approx(0.01, rel=0.05)


def test_repr() -> None:
    head, _ = head_and_inputs()
    assert "margin=0.2" in repr(head)
    assert "6, 3, scale=10.0, side_momentum=0.9" in repr(head.bottom_up)


WORKER = """
    import sys
    import torch
    from torch import distributed as dist
    from pseudolabel.heads import ICDBottomUp, IntraClassDiscriminator

    rank, store = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    data = torch.load(sys.argv[3])
    mine = slice(0, 1) if rank == 0 else slice(1, 4)  # shares of unequal size
    head = ICDBottomUp(6, 3)
    head.load_state_dict(data["start"])
    for features, cam in data["steps"]:
        out = head(features[mine], cam[mine], data["labels"][mine])
    torch.testing.assert_close(head.sides, data["sides"])
    torch.testing.assert_close(out.scores, data["scores"][mine])

    alone = ICDBottomUp(6, 3, sync_sides=False)
    alone.load_state_dict(data["start"])
    alone(features[mine], cam[mine], data["labels"][mine])
    seen = data["labels"][mine].any(0)
    assert alone.sides[~seen].eq(0).all() and alone.sides[seen].ne(0).any()
    dist.destroy_process_group()
"""


@pytest.mark.skipif(
    not torch.distributed.is_available() or sys.platform == "win32",
    reason="needs torch.distributed with gloo",
)
def test_two_processes_are_one(tmp_path) -> None:
    """Two processes have the sides that one has with the joined batch."""
    torch.manual_seed(0)
    head = ICDBottomUp(6, 3)
    start = copy.deepcopy(head.state_dict())
    steps = [(torch.randn(4, 6, 5, 7), torch.randn(4, 3, 5, 7)) for _ in range(3)]
    for features, cam in steps:
        out = head(features, cam, LABELS)
    torch.save(
        {"start": start, "steps": steps, "labels": LABELS, "sides": head.sides, "scores": out.scores},
        tmp_path / "data",
    )
    command = [sys.executable, "-c", textwrap.dedent(WORKER)]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store"), str(tmp_path / "data")],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [worker.communicate(timeout=120)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(errors)


# ----------------------------------------------------------------------------------------- planted objects


def planted(generator: torch.Generator, count: int, world: Tensor) -> tuple[Tensor, ...]:
    """Scenes of 16 x 16 with objects of which the CAM sees the upper third: its features stand out.

    Returns features (B,16,16,16), CAM, labels, superpixels of two by two, and the objects (B,3,16,16).
    """
    look, part, ground = world[:3], world[3:6], world[6:10]
    draw = lambda low, high: int(torch.randint(low, high, (), generator=generator))  # noqa: E731
    y, x = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    labels, truth = torch.zeros(count, 3), torch.zeros(count, 3, 16, 16, dtype=torch.bool)
    features, seen = torch.zeros(count, 16, 16, 16), torch.zeros_like(truth)
    for image in range(count):
        left, right = (ground[draw(0, 4)][:, None, None] for _ in range(2))
        scene = torch.where(x < draw(4, 12), left, right)
        several = draw(0, 4) == 0
        for place, c in enumerate(torch.randperm(3, generator=generator)[: 1 + several].tolist()):
            height, width = draw(8, 13), draw(6, 8) if several else draw(8, 13)
            top, start = draw(0, 17 - height), 8 * place if several else draw(0, 17 - width)
            whole = (y >= top) & (y < top + height) & (x >= start) & (x < start + width)
            upper = whole & (y < top + height // 3)
            scene = torch.where(whole, look[c][:, None, None], scene)
            scene = torch.where(upper, scene + part[c][:, None, None], scene)
            labels[image, c], truth[image, c], seen[image, c] = 1, whole, upper
        features[image] = scene
    noise = torch.randn(features.shape, generator=generator)
    cam = F.avg_pool2d(seen.float(), 3, 1, 1) + 0.1 * torch.randn(seen.shape, generator=generator)
    superpixels = (y // 2 * 8 + x // 2).expand(count, -1, -1)
    return (features + 0.6 * noise + 1).relu(), cam, labels, superpixels, truth


def iou(mask: Tensor, truth: Tensor) -> float:
    return float((mask & truth).sum() / (mask | truth).sum())


@pytest.mark.parametrize("seed", range(6))
def test_planted_objects(seed: int) -> None:
    """What the CAM sees in part, bottom-up finds roughly, top-down whole, each clearly better."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    world = axes * torch.tensor([3.0] * 3 + [1.5] * 3 + [1.0] * 10)[:, None]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # Directions of length 1 turn slowly: one step is no power iteration.
        bottom_up = ICDBottomUp(16, 3, init_std=0.25)
        head = IntraClassDiscriminator(16, 3, hidden=16, bottom_up=bottom_up)
    optimizer = torch.optim.SGD(head.param_groups(0.02), momentum=0.9)
    for step in range(50):
        features, cam, labels, superpixels, _ = planted(generator, 8, world)
        out = head(features, cam, labels, superpixels, td_weight=icd_warmup(step, 15))
        optimizer.zero_grad()
        (out.loss_bu + out.loss_td).backward()
        optimizer.step()

    features, cam, labels, superpixels, truth = planted(generator, 16, world)
    out = head.eval()(features, None, labels, superpixels)
    present = (labels > 0)[:, :, None, None]
    best_cam = max(iou((cam > threshold) & present, truth) for threshold in torch.linspace(0, 1, 21))
    bottom_up, top_down = (iou((maps > 0) & present, truth) for maps in (out.bottom_up, out.logits))
    refined = iou(out.refined > 0, truth)
    assert best_cam < 0.4
    assert bottom_up > best_cam + 0.25
    assert refined > bottom_up + 0.03
    assert top_down > max(refined + 0.1, 0.9)


# ----------------------------------------------------------------------- gradients, dtypes, graphs, errors


def test_gradcheck() -> None:
    x, w, scores = (value[:3, ..., :2, :3] if value.ndim == 4 else value for value in case())
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    labels = LABELS[:3]
    valid = torch.rand(3, 2, 3, generator=torch.Generator().manual_seed(1)) > 0.3
    assert torch.autograd.gradcheck(icd_project, (x, w))
    for mask in (None, valid):
        assert torch.autograd.gradcheck(
            lambda a, b, mask=mask: icd_bottom_up_loss(a, b, labels, detach_features=False, valid_mask=mask),
            (x, w),
        )
        assert torch.autograd.gradcheck(
            lambda z, mask=mask: icd_top_down_loss(z, scores, labels, valid_mask=mask),
            scores.clone().requires_grad_(),
        )
        norm = FixedScaleBatchNorm2d(6).double()
        assert torch.autograd.gradcheck(lambda a, mask=mask, norm=norm: norm(a, mask), (x,))
    assert torch.autograd.gradcheck(
        lambda s: icd_orient(s, torch.tensor([[1.0, 0], [0, 1], [0, 0]])), scores.clone().requires_grad_()
    )


def test_batch_equals_singles() -> None:
    x, w, cam = case()
    scores = icd_project(x, w)
    alone = slice(0, 1), slice(1, 2), slice(2, 3), slice(3, 4)
    torch.testing.assert_close(torch.cat([icd_project(x[one], w) for one in alone]), scores)
    for whole, parts in zip(
        icd_targets(cam), zip(*(icd_targets(cam[one]) for one in alone), strict=True), strict=True
    ):
        assert torch.equal(whole, torch.cat(parts))
    bottom_up = [icd_bottom_up_loss(x[one], w, LABELS[one]) for one in alone]
    torch.testing.assert_close(icd_bottom_up_loss(x, w, LABELS), torch.stack(bottom_up).mean())
    top_down = [icd_top_down_loss(scores[one], cam[one], LABELS[one]) for one in alone]
    torch.testing.assert_close(icd_top_down_loss(scores, cam, LABELS), torch.stack(top_down).mean())
    statistics = [icd_side_statistics(scores[one], cam[one], LABELS[one]) for one in alone]
    sums, counts = icd_side_statistics(scores, cam, LABELS)
    torch.testing.assert_close(sums, torch.stack([each[0] for each in statistics]).sum(0))
    assert torch.equal(counts, torch.stack([each[1] for each in statistics]).sum(0))


def test_class_order() -> None:
    x, w, cam = case()
    order = torch.tensor([2, 0, 1])
    scores = icd_project(x, w)
    assert torch.equal(icd_project(x, w[order]), scores[:, order])
    torch.testing.assert_close(
        icd_bottom_up_loss(x, w[order], LABELS[:, order]), icd_bottom_up_loss(x, w, LABELS)
    )
    sums, counts = icd_side_statistics(scores, cam, LABELS)
    permuted = icd_side_statistics(scores[:, order], cam[:, order], LABELS[:, order])
    assert torch.equal(permuted[0], sums[order])
    assert torch.equal(permuted[1], counts[order])


@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes(dtype: torch.dtype) -> None:
    x, w, cam = (value.to(dtype) for value in case())
    working = torch.float64 if dtype == torch.float64 else torch.float32
    exact = [value.double() for value in (x, w, cam)]
    scores = icd_project(x, w)
    assert scores.dtype == working
    torch.testing.assert_close(scores.double(), icd_project(*exact[:2]), rtol=1e-5, atol=1e-5)
    for loss, expected in (
        (icd_bottom_up_loss(x, w, LABELS), icd_bottom_up_loss(*exact[:2], LABELS)),
        (icd_top_down_loss(cam, scores, LABELS), icd_top_down_loss(exact[2], scores, LABELS)),
    ):
        assert loss.dtype == working
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    sums, _ = icd_side_statistics(scores, cam, LABELS)
    assert sums.dtype == working
    torch.testing.assert_close(sums.double(), icd_side_statistics(scores, exact[2], LABELS)[0])
    assert icd_orient(cam, torch.zeros(3, 2)).dtype == dtype
    norm = FixedScaleBatchNorm2d(6)
    assert norm(x).dtype == dtype
    torch.testing.assert_close(
        norm(x).double(), FixedScaleBatchNorm2d(6).double()(exact[0]), rtol=0.01, atol=0.01
    )


def test_sums_do_not_overflow_in_half_precision() -> None:
    x = torch.full((1, 4, 64, 64), 200.0, dtype=torch.float16)
    w = torch.ones(1, 4, dtype=torch.float16)
    loss = icd_bottom_up_loss(x, w, torch.ones(1, 1))
    assert loss.item() == pytest.approx(-5 * 4 * 200**2, rel=1e-4)
    sums, _ = icd_side_statistics(icd_project(x, w), x[:, :1], torch.ones(1, 1))
    assert sums[0, 0].item() == pytest.approx(200)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    head, inputs = head_and_inputs()
    twin = copy.deepcopy(head)
    out = head(*inputs)
    with torch.autocast("cpu", dtype=dtype):
        mixed = twin(*inputs)
    assert mixed.logits.dtype == dtype
    assert mixed.bottom_up.dtype == mixed.loss_td.dtype == torch.float32
    assert torch.equal(mixed.bottom_up, out.bottom_up), "scores are not touched by autocast"
    assert torch.equal(mixed.loss_bu, out.loss_bu)
    assert torch.equal(twin.bottom_up.sides, head.bottom_up.sides)
    torch.testing.assert_close(mixed.loss_td, out.loss_td, rtol=0.01, atol=0)
    (mixed.loss_bu + mixed.loss_td).backward()


def test_functions_compile_to_one_graph() -> None:
    x, w, cam = case(dtype=torch.float32)
    scores, labels = icd_project(x, w), LABELS.float()
    state, valid = torch.rand(3, 2), torch.rand(4, 5, 7) > 0.2
    statistics = icd_side_statistics(scores, cam, labels)
    for function, arguments in (
        (icd_project, (x, w)),
        (partial(icd_bottom_up_loss, valid_mask=valid), (x, w, labels)),
        (partial(icd_side_statistics, valid_mask=valid), (scores, cam, labels)),
        (icd_update_sides, (state, *statistics)),
        (icd_orient, (scores, state)),
        (icd_targets, (scores,)),
        (partial(icd_top_down_loss, valid_mask=valid), (cam, scores, labels)),
    ):
        torch.compiler.reset()
        compiled = torch.compile(function, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(*arguments), function(*arguments))


@pytest.mark.xfail(torch.__version__ < (2, 10), reason="older releases cannot trace a count of classes")
def test_training_compiles_to_one_graph() -> None:
    head, (features, cam, labels, superpixels) = head_and_inputs()
    head.refine = partial(superpixel_refine, num_regions=12)
    twin = copy.deepcopy(head)
    torch.compiler.reset()
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for step in range(2):
        for extra in ({}, {"superpixels": superpixels}):
            expected = head(features, cam, labels, td_weight=icd_warmup(step, 2), **extra)
            out = compiled(features, cam, labels, td_weight=icd_warmup(step, 2), **extra)
            torch.testing.assert_close(out, expected)
            for module, found in ((head, expected), (twin, out)):
                module.zero_grad()
                (found.loss_bu + found.loss_td).backward()
            for a, b in zip(head.parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(a.grad, b.grad)
            torch.testing.assert_close(twin.state_dict(), head.state_dict())


def test_devices(device: torch.device) -> None:
    head, inputs = head_and_inputs()
    twin = copy.deepcopy(head).to(device)
    out, moved = head(*inputs), twin(*(value.to(device) for value in inputs))
    for found, expected in zip(moved, out, strict=True):
        assert found.device.type == device.type
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(twin.bottom_up.sides.cpu(), head.bottom_up.sides)
    (moved.loss_bu + moved.loss_td).backward()


def test_inputs_stay_as_they_are() -> None:
    head, inputs = head_and_inputs()
    before = [value.clone() for value in inputs]
    head(*inputs)
    assert all(torch.equal(value, old) for value, old in zip(inputs, before, strict=True))
    state, sums, counts = torch.rand(3, 2), torch.rand(3, 2), torch.ones(3)
    kept = state.clone()
    icd_update_sides(state, sums, counts)
    assert torch.equal(state, kept)


X, W, CAM = case(dtype=torch.float32)
STATE, SUMS, COUNTS = torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3)
VALID = torch.ones(4, 5, 7, dtype=torch.bool)
HEAD = IntraClassDiscriminator(6, 3, hidden=2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: icd_project(X[0], W), ValueError, r"features: expected shape \(B, D, h, w\)"),
        (lambda: icd_project(X, W[:, 1:]), ValueError, "directions: .* with D=6 from features"),
        (lambda: icd_project(X.long(), W), TypeError, "features: expected a floating-point"),
        (lambda: icd_project(X, W, eps=0), ValueError, "eps: expected a finite number > 0"),
        (lambda: icd_bottom_up_loss(X, W, LABELS[:, 1:]), ValueError, "labels: .* with C=3 from directions"),
        (lambda: icd_bottom_up_loss(X, W, LABELS[1:]), ValueError, "labels: .* with B=4 from features"),
        (lambda: icd_bottom_up_loss(X, W, 2 * LABELS), ValueError, "labels: expected a multi-hot"),
        (
            lambda: icd_bottom_up_loss(X, W, LABELS, scale=0),
            ValueError,
            "scale: expected a finite number > 0",
        ),
        (
            lambda: icd_bottom_up_loss(X, W, LABELS, reduction="batch"),
            ValueError,
            "reduction: expected one of",
        ),
        (
            lambda: icd_bottom_up_loss(X, W, LABELS, valid_mask=VALID[:, 1:]),
            ValueError,
            r"valid_mask: expected shape \(B, h, w\) with h=5",
        ),
        (
            lambda: icd_bottom_up_loss(X, W, LABELS, valid_mask=VALID.float()),
            TypeError,
            "valid_mask: expected a bool tensor, got torch.float32",
        ),
        (lambda: icd_side_statistics(CAM, CAM[:, 1:], LABELS), ValueError, "cam: .* with C=3 from scores"),
        (lambda: icd_side_statistics(CAM, CAM > 0, LABELS), TypeError, "cam: expected a floating-point"),
        (lambda: icd_side_statistics(CAM, CAM, 0.5 * LABELS), ValueError, "labels: expected a multi-hot"),
        (
            lambda: icd_update_sides(STATE.T, SUMS, COUNTS),
            ValueError,
            r"state: expected shape \(C, 2\), got \(2, 3\)",
        ),
        (lambda: icd_update_sides(STATE, SUMS, COUNTS[1:]), ValueError, "counts: .* with C=3 from state"),
        (
            lambda: icd_update_sides(STATE, SUMS, COUNTS, momentum=1.1),
            ValueError,
            "momentum: expected a finite number >= 0 and <= 1",
        ),
        (lambda: icd_orient(CAM, STATE[1:]), ValueError, "state: .* with C=3 from scores"),
        (lambda: icd_targets(CAM[0]), ValueError, r"scores: expected shape \(B, C, h, w\)"),
        (lambda: icd_targets(CAM.long()), TypeError, "scores: expected a floating-point"),
        (lambda: icd_targets(CAM, margin=-1), ValueError, "margin: expected a finite number >= 0 and <= 1"),
        (lambda: icd_targets(CAM, eps=0), ValueError, "eps: expected a finite number > 0"),
        (lambda: icd_top_down_loss(CAM, CAM[..., 1:], LABELS), ValueError, "scores: .* with w=7 from logits"),
        (lambda: icd_top_down_loss(CAM, CAM, LABELS[:, 1:]), ValueError, "labels: .* with C=3 from logits"),
        (lambda: icd_warmup(-1, 10), ValueError, "step: expected a finite number >= 0"),
        (lambda: icd_warmup(1, -10), ValueError, "total_steps: expected a finite number >= 0"),
        (lambda: icd_warmup(1, 10, sharpness=-1), ValueError, "sharpness: expected a finite number >= 0"),
        (lambda: FixedScaleBatchNorm2d(0), ValueError, "num_features: expected an integer >= 1"),
        (lambda: FixedScaleBatchNorm2d(5)(X), ValueError, "running_mean: .* with D=6 from features"),
        (lambda: FixedScaleBatchNorm2d(6)(X.long()), TypeError, "features: expected a floating-point"),
        (lambda: ICDBottomUp(6, 3, init_std=0), ValueError, "init_std: expected a finite number > 0"),
        (lambda: ICDBottomUp(6, 3, side_momentum=2), ValueError, "side_momentum: expected a finite number"),
        (lambda: ICDBottomUp(6, 0), ValueError, "num_foreground: expected an integer >= 1"),
        (lambda: ICDTopDown(6, 3, hidden=0), ValueError, "hidden: expected an integer >= 1"),
        (lambda: IntraClassDiscriminator(6, 3, margin=2), ValueError, "margin: expected a finite number"),
        (lambda: HEAD(X, CAM), ValueError, "labels: expected a tensor beside cam in training mode"),
        (lambda: HEAD(X, None, LABELS), ValueError, "cam: expected a tensor beside labels in training mode"),
        (lambda: HEAD(X, CAM, None, VALID.long()), ValueError, "labels: expected .* beside superpixels"),
        (lambda: HEAD(X, CAM[..., 1:], LABELS), ValueError, "cam: expected shape"),
        (lambda: HEAD(X[:, 1:], CAM, LABELS), ValueError, "running_mean: .* with D=5"),
        (lambda: HEAD.param_groups(-1), ValueError, "lr: expected a finite number >= 0"),
    ],
)
def test_errors(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_is_on_neither_side(value: float) -> None:
    scores, cam, labels = torch.ones(1, 2, 2, 2), torch.ones(1, 2, 2, 2), torch.tensor([[1, 0]])
    scores[:, 1] = value
    icd_side_statistics(scores, cam, labels)  # of an absent class: not looked at
    icd_top_down_loss(cam, scores, labels)
    for call in (
        lambda: icd_side_statistics(scores, cam, torch.ones(1, 2)),
        lambda: icd_top_down_loss(cam, scores, torch.ones(1, 2)),
        lambda: icd_targets(scores),
    ):
        with pytest.raises(ValueError, match=r"scores: expected finite values"):
            call()
    with pytest.raises(ValueError, match=r"state: expected finite values"):
        icd_orient(cam, torch.full((2, 2), value))
