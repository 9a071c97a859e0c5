"""`activation_aware_mask_loss`: section 5 of the InferCam specification."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from pseudolabel.losses import ActivationAwareMaskLoss, activation_aware_mask_loss, refine_saliency_target

MODES = ["complete", "ignore", "soft", "none"]
Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def case(seed: int = 0, dtype: torch.dtype = torch.float64) -> Case:
    """Logits, saliency, activation (an absent class is activated too) and labels of two images."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2, 4, 5, 6, generator=generator, dtype=torch.float64)
    saliency = torch.rand(2, 5, 6, generator=generator, dtype=torch.float64)
    activation = torch.rand(2, 3, 5, 6, generator=generator, dtype=torch.float64)
    labels = torch.tensor([[1, 0, 1], [0, 1, 0]])
    return logits.to(dtype), saliency.to(dtype), activation.to(dtype), labels


def loss_and_gradient(
    logits: torch.Tensor, *rest: torch.Tensor, **settings
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = logits.clone().requires_grad_()
    loss = activation_aware_mask_loss(logits, *rest, **settings)
    loss.sum().backward()
    assert logits.grad is not None
    return loss.detach(), logits.grad


# --------------------------------------------------------------------------------------------- golden


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_golden(golden: Callable, mode: str, dtype: torch.dtype) -> None:
    data = golden("infercam/public_aamr_spec")
    names = ("logits", "saliency", "activation", "label")
    inputs = [torch.from_numpy(data[name]).to(dtype) for name in names]
    settings = {
        "mode": mode,
        "saliency_threshold": float(data["saliency_threshold"]),
        "activation_threshold": float(data["activation_threshold"]),
    }
    valid = torch.from_numpy(data["valid"])
    target, weight = refine_saliency_target(*inputs[1:], **settings)
    np.testing.assert_array_equal(target.numpy(), data[f"{mode}_target"])
    # The recorded arrays are float32.
    np.testing.assert_array_equal((weight * valid).float().numpy(), data[f"{mode}_weight"])
    loss, gradient = loss_and_gradient(*inputs, valid=valid, **settings)
    exact = dtype == torch.float64
    np.testing.assert_allclose(loss.item(), data[f"{mode}_loss"], rtol=1e-9 if exact else 1e-6)
    np.testing.assert_allclose(gradient.numpy(), data[f"{mode}_grad"], atol=1e-10 if exact else 2e-9)


def test_golden_defaults(golden: Callable) -> None:
    data = golden("infercam/public_aamr_spec")
    inputs = [torch.from_numpy(data[name]) for name in ("logits", "saliency", "activation", "label")]
    loss = activation_aware_mask_loss(*inputs, valid=torch.from_numpy(data["valid"]))
    np.testing.assert_allclose(loss.item(), data["complete_loss"], rtol=1e-6)


def test_golden_of_the_sister_program(golden: Callable) -> None:
    """Its binary cross-entropy of the background, computed by the official GETAM program, is mode `none`."""
    data = golden("infercam/public_sister_alc")
    for number in range(4):
        logits, saliency, cam, labels = (
            torch.from_numpy(data[f"c{number}_{name}"])[None]
            for name in ("logits", "saliency_out", "cam", "label")
        )
        loss = activation_aware_mask_loss(logits, saliency.clamp(max=1), cam, labels, mode="none")
        np.testing.assert_allclose(loss.item(), data[f"c{number}_bce_intended"], rtol=1e-6)


# --------------------------------------------------------------------------------- hand-computed values


def test_hand_computed() -> None:
    """A salient, an activated and a remaining pixel; p = 1/2, 3/4, 3/4."""
    logits = torch.log(torch.tensor([[[[1.0, 1.0, 1.0]], [[1.0, 1.0, 3.0]], [[0.0, 2.0, 0.0]]]]) + 1e-12)
    saliency = torch.tensor([[[0.6, 0.2, 0.0]]])
    activation = torch.tensor([[[[0.0, 0.8, 0.4]], [[1.0, 1.0, 1.0]]]])  # the second class is absent
    labels = torch.tensor([[True, False]])
    half, wrong, right = math.log(2), math.log(4), math.log(4 / 3)
    expected = {
        "none": ([half, wrong, wrong], 3),
        "complete": ([half, right, wrong], 3),
        "ignore": ([half, 0, wrong], 2),
        "soft": ([half, 0.2 * wrong, 0.6 * wrong], 1.8),
    }
    for mode, (values, weight) in expected.items():
        inputs = (logits, saliency, activation, labels)
        pixels = activation_aware_mask_loss(*inputs, mode=mode, reduction="none")
        assert pixels.flatten().tolist() == pytest.approx(values)
        assert activation_aware_mask_loss(*inputs, mode=mode, reduction="sum").item() == pytest.approx(
            sum(values)
        )
        assert activation_aware_mask_loss(*inputs, mode=mode).item() == pytest.approx(sum(values) / weight)


def test_thresholds_are_reached_at_equality() -> None:
    saliency, activation = torch.tensor([[[0.5, 0.25, 0.25]]]), torch.tensor([[[[0.0, 0.75, 0.5]]]])
    target, _ = refine_saliency_target(
        saliency, activation, torch.tensor([[1]]), saliency_threshold=0.5, activation_threshold=0.75
    )
    assert target.tolist() == [[[1, 1, 0]]]


@pytest.mark.parametrize("mode", MODES)
def test_matches_the_probabilities(mode: str) -> None:
    """The stable form equals the formula of the docstring."""
    logits, *rest = case()
    target, weight = refine_saliency_target(*rest, mode=mode)
    p = logits.softmax(1)[:, 1:].sum(1)
    expected = weight * F.binary_cross_entropy(p, target, reduction="none")
    torch.testing.assert_close(
        activation_aware_mask_loss(logits, *rest, mode=mode, reduction="none"), expected
    )
    torch.testing.assert_close(
        activation_aware_mask_loss(logits, *rest, mode=mode), expected.sum() / weight.sum()
    )


@pytest.mark.parametrize("mode", MODES)
def test_gradient_formula(mode: str) -> None:
    """Section 5.4: the background moves alone, the classes by their shares of the foreground."""
    logits, *rest = case()
    target, weight = refine_saliency_target(*rest, mode=mode)
    gradient = loss_and_gradient(logits, *rest, mode=mode)[1]
    probs = logits.softmax(1)
    q, p = probs[:, 0], probs[:, 1:].sum(1)
    w = weight / weight.sum()
    torch.testing.assert_close(gradient[:, 0], w * (q - (1 - target)))
    share = probs[:, 1:] / p[:, None]
    torch.testing.assert_close(gradient[:, 1:], (w * ((1 - target) - q))[:, None] * share)
    torch.testing.assert_close(gradient.sum(1), torch.zeros_like(q))


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode: str) -> None:
    logits, *rest = case()
    assert torch.autograd.gradcheck(
        lambda x: activation_aware_mask_loss(x, *rest, mode=mode), (logits.requires_grad_(),)
    )


def test_saliency_and_activation_are_constants() -> None:
    logits, saliency, activation, labels = case()
    for value in (logits, saliency, activation):
        value.requires_grad_()
    for mode in MODES:
        activation_aware_mask_loss(logits, saliency, activation, labels, mode=mode).backward()
    assert saliency.grad is None
    assert activation.grad is None
    assert not any(value.requires_grad for value in refine_saliency_target(saliency, activation, labels))


# ----------------------------------------------------------------------------------------- edge cases


@pytest.mark.parametrize("mode", MODES)
def test_saliency_all_zero(mode: str) -> None:
    """Kept: everything but what is activated becomes background. Skipped: nothing is learnt."""
    logits, saliency, activation, labels = case()
    saliency[1] = 0
    target, weight = refine_saliency_target(saliency, activation, labels, mode=mode)
    activated = activation[1, 1] >= 0.7
    assert torch.equal(target[1] == 1, activated if mode == "complete" else torch.zeros_like(activated))
    if mode == "ignore":
        assert torch.equal(weight[1] == 0, activated)
    skipped = refine_saliency_target(saliency, activation, labels, mode=mode, empty_saliency="skip")[1]
    assert skipped[1].eq(0).all()
    assert torch.equal(skipped[0], weight[0])
    alone = activation_aware_mask_loss(logits[:1], saliency[:1], activation[:1], labels[:1], mode=mode)
    both = activation_aware_mask_loss(logits, saliency, activation, labels, mode=mode, empty_saliency="skip")
    torch.testing.assert_close(both, alone)


def test_saliency_all_one_makes_all_modes_equal() -> None:
    logits, saliency, activation, labels = case()
    losses = [
        activation_aware_mask_loss(logits, torch.ones_like(saliency), activation, labels, mode=mode)
        for mode in MODES
    ]
    expected = -logits.softmax(1)[:, 1:].sum(1).log().mean()
    for loss in losses:
        torch.testing.assert_close(loss, expected)


def test_activation_all_zero_makes_all_modes_equal() -> None:
    logits, saliency, activation, labels = case()
    losses = [
        activation_aware_mask_loss(logits, saliency, torch.zeros_like(activation), labels, mode=mode)
        for mode in MODES
    ]
    assert losses.count(losses[-1]) == len(MODES)


def test_no_label_is_no_activation() -> None:
    logits, saliency, activation, labels = case()
    for mode in MODES:
        assert activation_aware_mask_loss(
            logits, saliency, activation, torch.zeros_like(labels), mode=mode
        ) == activation_aware_mask_loss(logits, saliency, activation, labels, mode="none")


def test_activation_all_above_the_threshold() -> None:
    """`complete` has no background term at all, `ignore` learns the salient pixels alone."""
    _, saliency, activation, labels = case()
    activation = activation.clamp(min=0.7)
    target, weight = refine_saliency_target(saliency, activation, labels, mode="complete")
    assert target.eq(1).all()
    assert weight.eq(1).all()
    target, weight = refine_saliency_target(saliency, activation, labels, mode="ignore")
    assert torch.equal(weight, target)
    assert torch.equal(target == 1, saliency >= 0.5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_weight_gives_zero_with_a_graph(mode: str, reduction: str) -> None:
    logits, *rest = case()
    nothing = torch.zeros(2, 5, 6, dtype=torch.bool)
    loss, gradient = loss_and_gradient(logits, *rest, mode=mode, valid=nothing, reduction=reduction)
    assert loss.eq(0).all()
    assert gradient.eq(0).all()


def test_the_mean_divides_by_weights_below_one() -> None:
    """Three pixels of weight 1/64 have the mean of three of weight 1."""
    logits, saliency, activation, labels = case()
    valid = torch.zeros(2, 5, 6, dtype=torch.bool)
    valid[0, 0, :3] = True
    activation = torch.full_like(activation, 1 - 1 / 64)
    inputs = (logits, saliency * 0, activation, labels)
    torch.testing.assert_close(
        activation_aware_mask_loss(*inputs, mode="soft", valid=valid),
        activation_aware_mask_loss(*inputs, mode="none", valid=valid),
    )


def test_a_fully_activated_image_has_no_weight() -> None:
    logits, saliency, activation, labels = case()
    loss, gradient = loss_and_gradient(
        logits, saliency * 0, activation * 0 + 1, labels, mode="soft"
    )  # weight 1 - a
    assert loss == 0
    assert gradient.eq(0).all()


def test_invalid_pixels_have_no_part() -> None:
    logits, *rest = case()
    valid = torch.ones(2, 5, 6, dtype=torch.bool)
    valid[:, 1] = False
    for mode in MODES:
        loss, gradient = loss_and_gradient(logits, *rest, mode=mode, valid=valid)
        assert gradient[:, :, 1].eq(0).all()
        changed = logits.clone()
        changed[:, :, 1] = 9
        assert activation_aware_mask_loss(changed, *rest, mode=mode, valid=valid) == loss
        _, weight = refine_saliency_target(*rest, mode=mode)
        pixels = activation_aware_mask_loss(logits, *rest, mode=mode, reduction="none")
        torch.testing.assert_close(loss, (pixels * valid).sum() / (weight * valid).sum())


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("mode", MODES)
def test_saturated_logits_are_finite(mode: str, sign: int) -> None:
    """Logits of 1e4: the loss of a correct pixel is 0, that of a wrong one the distance of the logits."""
    _, saliency, activation, labels = case(dtype=torch.float32)
    logits = torch.full((2, 4, 5, 6), -2e4)
    logits[:, 0] = -sign * 1e4
    logits[:, 2] = sign * 1e4
    loss, gradient = loss_and_gradient(logits, saliency, activation, labels, mode=mode, reduction="none")
    target, weight = refine_saliency_target(saliency, activation, labels, mode=mode)
    torch.testing.assert_close(loss, weight * 2e4 * (target != (sign > 0)))
    assert gradient.isfinite().all()


# --------------------------------------------------------------------------------------------- properties


@given(seed=st.integers(0, 1000), mode=st.sampled_from(MODES))
def test_is_positive_and_not_above_none(seed: int, mode: str) -> None:
    """Leaving pixels alone never costs more than calling them background."""
    logits, *rest = case(seed)
    pixels = activation_aware_mask_loss(logits, *rest, mode=mode, reduction="none")
    assert pixels.min() >= 0
    plain = activation_aware_mask_loss(logits, *rest, mode="none", reduction="none")
    if mode in ("ignore", "soft"):
        assert (pixels <= plain).all()
    salient = rest[0] >= 0.5
    assert torch.equal(pixels[salient], plain[salient])


@given(seed=st.integers(0, 1000))
def test_none_and_ignore_agree_where_nothing_is_ignored(seed: int) -> None:
    logits, saliency, activation, labels = case(seed)
    none, ignore = (
        loss_and_gradient(logits, saliency, activation, labels, mode=mode, reduction="sum")[1]
        for mode in ("none", "ignore")
    )
    strongest = (activation * labels[:, :, None, None]).amax(1)
    ignored = (saliency < 0.5) & (strongest >= 0.7)
    same = (none == ignore).all(1)
    assert torch.equal(same, ~ignored)
    assert ignore.abs().sum(1)[ignored].eq(0).all()


@given(seed=st.integers(0, 1000), mode=st.sampled_from(MODES))
def test_class_order_does_not_matter(seed: int, mode: str) -> None:
    logits, saliency, activation, labels = case(seed)
    order = torch.randperm(3, generator=torch.Generator().manual_seed(seed))
    shuffled = torch.cat([logits[:, :1], logits[:, 1:][:, order]], 1)
    torch.testing.assert_close(
        activation_aware_mask_loss(shuffled, saliency, activation[:, order], labels[:, order], mode=mode),
        activation_aware_mask_loss(logits, saliency, activation, labels, mode=mode),
    )


@given(seed=st.integers(0, 1000), mode=st.sampled_from(MODES))
def test_a_constant_added_to_all_logits_of_a_pixel_changes_nothing(seed: int, mode: str) -> None:
    logits, *rest = case(seed)
    shift = torch.randn(2, 1, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        activation_aware_mask_loss(logits + 10 * shift, *rest, mode=mode),
        activation_aware_mask_loss(logits, *rest, mode=mode),
    )


@given(seed=st.integers(0, 1000), mode=st.sampled_from(MODES))
def test_absent_classes_are_not_looked_at(seed: int, mode: str) -> None:
    logits, saliency, activation, labels = case(seed)
    other = activation.where(labels[:, :, None, None] != 0, 1 - activation)
    assert not torch.equal(other, activation)
    assert activation_aware_mask_loss(
        logits, saliency, other, labels, mode=mode
    ) == activation_aware_mask_loss(logits, saliency, activation, labels, mode=mode)


@given(seed=st.integers(0, 1000), mode=st.sampled_from(MODES))
def test_batch_equals_single_images(seed: int, mode: str) -> None:
    """The mean over the batch weighs each image by its weights."""
    inputs = case(seed)
    weight = refine_saliency_target(*inputs[1:], mode=mode)[1].sum((1, 2))
    single = torch.stack(
        [activation_aware_mask_loss(*(value[k : k + 1] for value in inputs), mode=mode) for k in range(2)]
    )
    torch.testing.assert_close(
        activation_aware_mask_loss(*inputs, mode=mode), (weight * single).sum() / weight.sum()
    )
    if mode in ("complete", "none"):  # of equal weights
        torch.testing.assert_close(activation_aware_mask_loss(*inputs, mode=mode), single.mean())


@given(seed=st.integers(0, 1000))
def test_target_and_weight(seed: int) -> None:
    _, saliency, activation, labels = case(seed)
    for mode in MODES:
        target, weight = refine_saliency_target(saliency, activation, labels, mode=mode)
        assert set(target.unique().tolist()) <= {0, 1}
        assert weight.min() >= 0
        assert weight.max() <= 1
        assert (target[saliency >= 0.5] == 1).all()
        assert (weight[saliency >= 0.5] == 1).all()


# ----------------------------------------------------------------------------------------- everything else


def test_logits_are_resized_to_the_saliency() -> None:
    logits, *rest = case()
    small = F.avg_pool2d(logits, 2)
    expected = F.interpolate(small, size=(5, 6), mode="bilinear", align_corners=False)
    torch.testing.assert_close(
        activation_aware_mask_loss(small, *rest), activation_aware_mask_loss(expected, *rest)
    )


def test_rounding_noise_of_maps_leaves_no_negative_weight() -> None:
    _, saliency, activation, labels = case()
    weight = refine_saliency_target(saliency, activation.clamp(min=1) + 5e-4, labels, mode="soft")[1]
    assert weight.min() == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(mode: str, dtype: torch.dtype) -> None:
    logits, saliency, activation, labels = case(dtype=torch.float32)
    settled = [(4 * value).floor() / 4 + 0.125 for value in (saliency, activation)]  # exact in half precision
    exact = activation_aware_mask_loss(logits, *settled, labels, mode=mode)
    low = activation_aware_mask_loss(
        logits.to(dtype), *(value.to(dtype) for value in settled), labels, mode=mode
    )
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, exact, atol=0.02, rtol=0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(activation_aware_mask_loss(logits, *settled, labels, mode=mode), exact)
    target, weight = refine_saliency_target(settled[0].to(dtype), settled[1].to(dtype), labels, mode=mode)
    assert target.dtype == weight.dtype == dtype


def test_labels_may_be_bool_or_float() -> None:
    logits, saliency, activation, labels = case()
    assert (
        activation_aware_mask_loss(logits, saliency, activation, labels.bool())
        == activation_aware_mask_loss(logits, saliency, activation, labels.float())
        == activation_aware_mask_loss(logits, saliency, activation, labels)
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("empty_saliency", ["keep", "skip"])
def test_compiles_to_one_graph(mode: str, empty_saliency: str) -> None:
    inputs = case(dtype=torch.float32)
    settings = {"mode": mode, "empty_saliency": empty_saliency, "valid": torch.rand(2, 5, 6) < 0.5}
    compiled = torch.compile(activation_aware_mask_loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs, **settings), activation_aware_mask_loss(*inputs, **settings))


def test_module_equals_function() -> None:
    inputs = case()
    settings = {
        "mode": "ignore",
        "saliency_threshold": 0.3,
        "activation_threshold": 0.4,
        "empty_saliency": "skip",
        "reduction": "sum",
    }
    inputs[1][1] = 0.1
    valid = inputs[1] < 0.9
    module = ActivationAwareMaskLoss(**settings)
    assert module(*inputs, valid) == activation_aware_mask_loss(*inputs, valid=valid, **settings)
    assert repr(module) == (
        "ActivationAwareMaskLoss(mode='ignore', saliency_threshold=0.3, activation_threshold=0.4, "
        "empty_saliency='skip')"
    )
    assert ActivationAwareMaskLoss()(*inputs) == activation_aware_mask_loss(*inputs)


@pytest.mark.parametrize("mode", MODES)
def test_devices(device: torch.device, mode: str) -> None:
    inputs = [value.to(device) for value in case(dtype=torch.float32)]
    loss = activation_aware_mask_loss(*inputs, mode=mode, valid=inputs[1] < 0.9)
    assert loss.device.type == device.type
    torch.testing.assert_close(
        loss.cpu(),
        activation_aware_mask_loss(*(v.cpu() for v in inputs), mode=mode, valid=(inputs[1] < 0.9).cpu()),
    )


LOGITS, SALIENCY, ACTIVATION, LABELS = INPUTS = case(dtype=torch.float32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f: f(LOGITS[0], *INPUTS[1:]), ValueError, r"logits: expected shape \(B, N, h, w\)"),
        (lambda f: f(LOGITS[:1], *INPUTS[1:]), ValueError, "saliency: .* with B=1 from logits"),
        (
            lambda f: f(LOGITS, SALIENCY, ACTIVATION[..., :-1], LABELS),
            ValueError,
            "activation: .* with W=6 from saliency",
        ),
        (lambda f: f(LOGITS, SALIENCY, ACTIVATION, LABELS[:, :2]), ValueError, "labels: .* with C=3"),
        (
            lambda f: f(LOGITS[:, :3], *INPUTS[1:]),
            ValueError,
            "logits: expected 4 channels, the background and the classes of labels, got 3",
        ),
        (
            lambda f: f(LOGITS[:, :1], SALIENCY, ACTIVATION[:, :0], LABELS[:, :0]),
            ValueError,
            "activation: expected at least one class",
        ),
        (lambda f: f(LOGITS.long(), *INPUTS[1:]), TypeError, "logits: expected a floating-point tensor"),
        (
            lambda f: f(LOGITS, SALIENCY.long(), ACTIVATION, LABELS),
            TypeError,
            "saliency: expected a floating-point tensor",
        ),
        (
            lambda f: f(LOGITS, SALIENCY, ACTIVATION > 0.5, LABELS),
            TypeError,
            "activation: expected a floating-point tensor",
        ),
        (lambda f: f(LOGITS, 255 * SALIENCY, ACTIVATION, LABELS), ValueError, r"saliency: .* in \[0, 1\]"),
        (lambda f: f(LOGITS, SALIENCY, ACTIVATION - 1, LABELS), ValueError, r"activation: .* in \[0, 1\]"),
        (
            lambda f: f(LOGITS, SALIENCY * math.nan, ACTIVATION, LABELS),
            ValueError,
            r"saliency: .* in \[0, 1\]",
        ),
        (lambda f: f(LOGITS, SALIENCY, ACTIVATION, LABELS * 2), ValueError, "labels: expected a multi-hot"),
        (lambda f: f(*INPUTS, valid=SALIENCY), TypeError, "valid: expected a bool tensor, got float32"),
        (lambda f: f(*INPUTS, valid=SALIENCY[:1] > 0), ValueError, "valid: .* with B=2 from saliency"),
        (lambda f: f(*INPUTS, mode="flip"), ValueError, "mode: expected one of"),
        (lambda f: f(*INPUTS, saliency_threshold=1.5), ValueError, "saliency_threshold: .* <= 1"),
        (lambda f: f(*INPUTS, activation_threshold=-0.1), ValueError, "activation_threshold: .* >= 0"),
        (lambda f: f(*INPUTS, empty_saliency="drop"), ValueError, "empty_saliency: expected one of"),
        (lambda f: f(*INPUTS, reduction="max"), ValueError, "reduction: expected one of"),
    ],
)
def test_errors(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call(activation_aware_mask_loss)


def test_module_checks_its_settings_at_once() -> None:
    with pytest.raises(ValueError, match="mode: expected one of"):
        ActivationAwareMaskLoss(mode="flip")
    with pytest.raises(ValueError, match="reduction: expected one of"):
        ActivationAwareMaskLoss(reduction="max")
