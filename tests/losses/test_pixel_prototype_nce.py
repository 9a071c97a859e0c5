"""Pixel-prototype contrast: sections 6, 12, 13 of the RTC specification."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from pseudolabel.losses import PixelPrototypeNCE, pixel_prototype_nce

seeds = st.integers(0, 1000)
HALVES = {
    "loss_intra_nce_1": ("feat1", "pseudo1", "prototypes1"),
    "loss_intra_nce_2": ("feat2", "pseudo2", "prototypes2"),
    "loss_cross_nce1_1": ("feat1", "pseudo2", "prototypes1"),
    "loss_cross_nce1_2": ("feat2", "pseudo1", "prototypes2"),
    "loss_cross_nce2_1": ("feat1", "pseudo1", "prototypes2"),
    "loss_cross_nce2_2": ("feat2", "pseudo2", "prototypes1"),
}


def case(seed: int = 0, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    features = torch.rand(2, 5, 3, 4, generator=generator, dtype=dtype)
    targets = torch.randint(0, 4, (2, 3, 4), generator=generator)
    prototypes = F.normalize(torch.randn(4, 5, generator=generator, dtype=dtype), dim=1)
    return features, targets, prototypes


@pytest.mark.parametrize("name", HALVES)
def test_golden(golden: Callable, name: str) -> None:
    data = golden("rtc/public_nce")
    features, targets, prototypes = (torch.from_numpy(data[key]) for key in HALVES[name])
    loss = pixel_prototype_nce(features, targets[:, 0], prototypes, temperature=float(data["temperature"]))
    assert loss.item() == pytest.approx(float(data[name]), rel=1e-5)


@pytest.mark.parametrize("term", ["intra_nce", "cross_nce1", "cross_nce2"])
def test_golden_gradients(golden: Callable, term: str) -> None:
    """The weighted halves of a term: one a view."""
    data = golden("rtc/public_nce")
    for view in (1, 2):
        values = (torch.from_numpy(data[key]) for key in HALVES[f"loss_{term}_{view}"])
        features, targets, prototypes = values
        loss = 0.05 * pixel_prototype_nce(features.requires_grad_(), targets[:, 0], prototypes)
        loss.backward()
        expected = torch.from_numpy(data[f"grad{view}_loss_{term}"])
        torch.testing.assert_close(features.grad, expected, atol=1e-7, rtol=1e-3)


# ------------------------------------------------------------------------------------------ by hand


def test_hand_computed() -> None:
    features = torch.tensor([[[[2.0, 0.0, 3.0]], [[0.0, 5.0, 4.0]]]])
    targets = torch.tensor([[[0, 0, 1]]])
    cosines = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    expected = [
        math.log(sum(map(math.exp, c / 0.5))) - c[t] / 0.5 for c, t in zip(cosines, [0, 0, 1], strict=True)
    ]
    loss = pixel_prototype_nce(features, targets, torch.eye(2), temperature=0.5, reduction="none")
    torch.testing.assert_close(loss.flatten(), torch.stack(expected))
    for reduction, value in (("sum", sum(expected)), ("mean", sum(expected) / 3)):
        loss = pixel_prototype_nce(features, targets, torch.eye(2), temperature=0.5, reduction=reduction)
        torch.testing.assert_close(loss, value)


def test_ignored_pixels() -> None:
    features, targets, prototypes = case()
    known = targets.clone()
    known[0] = 255
    loss = pixel_prototype_nce(features.requires_grad_(), known, prototypes)
    torch.testing.assert_close(loss, pixel_prototype_nce(features[1:], targets[1:], prototypes))
    loss.backward()
    assert features.grad[0].eq(0).all()
    assert features.grad[1].ne(0).any()
    other = known.where(known != 255, -1)
    torch.testing.assert_close(pixel_prototype_nce(features, other, prototypes, ignore_index=-1), loss)


def test_all_ignored() -> None:
    features, targets, prototypes = case()
    loss = pixel_prototype_nce(features.requires_grad_(), torch.full_like(targets, 255), prototypes)
    assert loss == 0
    loss.backward()
    assert features.grad.eq(0).all()


def test_absent_classes_as_negatives() -> None:
    """All are by default; `valid` leaves some out, but never the class of the pixel."""
    features, targets, prototypes = case()
    features.requires_grad_()
    targets = targets % 2
    valid = torch.tensor([True, True, False, False])
    loss = pixel_prototype_nce(features, targets, prototypes, valid=valid)
    torch.testing.assert_close(loss, pixel_prototype_nce(features, targets, prototypes[:2]))
    assert loss < pixel_prototype_nce(features, targets, prototypes)
    loss.backward()
    assert features.grad.isfinite().all()
    everything = pixel_prototype_nce(features, targets, prototypes, valid=torch.ones(4, dtype=torch.bool))
    torch.testing.assert_close(everything, pixel_prototype_nce(features, targets, prototypes))
    none = torch.zeros(4, dtype=torch.bool)
    torch.testing.assert_close(
        pixel_prototype_nce(features, targets, prototypes, valid=none),
        torch.zeros(()).double(),
        atol=1e-12,
        rtol=0,
    )


def test_valid_with_ignored_pixels() -> None:
    features, targets, prototypes = case()
    targets = targets % 2 + 2
    targets[0, 0] = 255
    valid = torch.tensor([False, False, True, True])
    loss = pixel_prototype_nce(features.requires_grad_(), targets, prototypes, valid=valid)
    shifted = (targets - 2).where(targets != 255, 255)
    torch.testing.assert_close(loss, pixel_prototype_nce(features, shifted, prototypes[2:]))
    loss.backward()
    assert features.grad.isfinite().all()


def test_zero_feature_vector() -> None:
    features, targets, prototypes = case()
    features[0, :, 0, 0] = 0
    loss = pixel_prototype_nce(features.requires_grad_(), targets, prototypes, reduction="none")
    assert loss[0, 0, 0].item() == pytest.approx(math.log(4))
    loss.sum().backward()
    assert features.grad.isfinite().all()


def test_no_confident_pixel() -> None:
    """All background: the loss still runs."""
    features, targets, prototypes = case()
    loss = pixel_prototype_nce(features, torch.zeros_like(targets), prototypes)
    assert 0 < loss < math.inf


# ------------------------------------------------------------------------------------------ properties


@given(seed=seeds, temperature=st.sampled_from([0.05, 0.1, 1.0]))
def test_properties(seed: int, temperature: float) -> None:
    features, targets, prototypes = case(seed)
    run = lambda *a: pixel_prototype_nce(*a, temperature=temperature, reduction="none")  # noqa: E731
    loss = run(features, targets, prototypes)
    assert loss.min() >= 0
    assert loss.max() <= math.log(4) + 2 / temperature
    cosines = torch.einsum("kd,bdhw->bkhw", prototypes, features / features.norm(dim=1, keepdim=True))
    torch.testing.assert_close(loss, F.cross_entropy(cosines / temperature, targets, reduction="none"))
    lengths = 0.1 + torch.rand(2, 1, 3, 4, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(run(features * lengths, targets, prototypes), loss)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(run(features, order.argsort()[targets], prototypes[order]), loss)


def test_gradient_goes_to_the_features_alone() -> None:
    features, targets, prototypes = case()
    pixel_prototype_nce(features.requires_grad_(), targets, prototypes.requires_grad_()).backward()
    assert features.grad.abs().sum() > 0
    assert prototypes.grad is None


def test_gradcheck() -> None:
    features, targets, prototypes = case()
    targets[0, 0, 0] = 255
    valid = torch.tensor([True, False, True, True])
    for arguments in ({}, {"valid": valid}, {"reduction": "none"}):
        assert torch.autograd.gradcheck(
            lambda x: pixel_prototype_nce(x, targets, prototypes, **arguments),  # noqa: B023
            (features.requires_grad_(),),
        )


def test_batch_equals_singles() -> None:
    features, targets, prototypes = case()
    together = pixel_prototype_nce(features, targets, prototypes, reduction="none")
    for one in (slice(0, 1), slice(1, 2)):
        alone = pixel_prototype_nce(features[one], targets[one], prototypes, reduction="none")
        torch.testing.assert_close(together[one], alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    features, targets, prototypes = case(dtype=torch.float32)
    features, prototypes = features.to(dtype), prototypes.to(dtype)
    loss = pixel_prototype_nce(features, targets.to(torch.uint8), prototypes)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = pixel_prototype_nce(features.double(), targets, prototypes.double())
    torch.testing.assert_close(loss.double(), exact, atol=1e-5, rtol=1e-5)


def test_autocast_changes_nothing() -> None:
    arguments = case(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = pixel_prototype_nce(*arguments)
    assert torch.equal(inside, pixel_prototype_nce(*arguments))


def test_devices(device: torch.device) -> None:
    arguments = case(dtype=torch.float32)
    loss = pixel_prototype_nce(*(value.to(device) for value in arguments))
    assert loss.device.type == device.type
    torch.testing.assert_close(loss.cpu(), pixel_prototype_nce(*arguments), atol=1e-5, rtol=1e-4)


def test_compiles_to_one_graph() -> None:
    arguments = case(dtype=torch.float32)
    valid = torch.tensor([True, True, True, False])
    compiled = torch.compile(pixel_prototype_nce, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*arguments), pixel_prototype_nce(*arguments))
    torch.testing.assert_close(
        compiled(*arguments, valid=valid), pixel_prototype_nce(*arguments, valid=valid)
    )


def test_module_equals_function() -> None:
    features, targets, prototypes = case()
    targets[0, 0] = 9
    settings = {"temperature": 0.3, "ignore_index": 9, "reduction": "sum"}
    module = PixelPrototypeNCE(**settings)
    valid = torch.tensor([True, False, True, True])
    assert module(features, targets, prototypes) == pixel_prototype_nce(
        features, targets, prototypes, **settings
    )
    assert module(features, targets, prototypes, valid=valid) == pixel_prototype_nce(
        features, targets, prototypes, valid=valid, **settings
    )
    assert repr(module) == "PixelPrototypeNCE(temperature=0.3, reduction='sum')"


X, Y, P = case()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pixel_prototype_nce(X[0], Y, P), ValueError, r"features: expected shape \(B, D, h, w\)"),
        (lambda: pixel_prototype_nce(X, Y[:, 1:], P), ValueError, "targets: .* with h=3 from features"),
        (lambda: pixel_prototype_nce(X, Y, P[:, 1:]), ValueError, "prototypes: .* with D=5 from features"),
        (lambda: pixel_prototype_nce(X.long(), Y, P), TypeError, "features: expected a floating-point"),
        (lambda: pixel_prototype_nce(X, Y.double(), P), TypeError, "targets: expected an integer"),
        (
            lambda: pixel_prototype_nce(X, Y + 1, P),
            ValueError,
            "targets: expected classes 0..3 or ignore_index",
        ),
        (lambda: pixel_prototype_nce(X, Y, P, ignore_index=2), ValueError, "ignore_index: expected"),
        (lambda: pixel_prototype_nce(X, Y, P, temperature=0), ValueError, "temperature: expected a finite"),
        (lambda: pixel_prototype_nce(X, Y, P, reduction="max"), ValueError, "reduction: expected one of"),
        (
            lambda: pixel_prototype_nce(X, Y, P, valid=torch.ones(3, dtype=torch.bool)),
            ValueError,
            "valid: .* with K=4 from prototypes",
        ),
        (
            lambda: pixel_prototype_nce(X, Y, P, valid=torch.ones(4)),
            TypeError,
            "valid: expected a bool tensor",
        ),
        (lambda: PixelPrototypeNCE(temperature=-1), ValueError, "temperature: expected a finite number > 0"),
        (lambda: PixelPrototypeNCE(reduction="max"), ValueError, "reduction: expected one of"),
    ],
)
def test_errors(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
