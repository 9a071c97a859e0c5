"""`affinity_loss`: section 6.4 of the PMM specification."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pseudolabel.losses import affinity_loss
from pseudolabel.refine import affinity_from_features, affinity_labels


def case(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    affinity = 0.05 + 0.9 * torch.rand(2, 4, 5, 6, generator=generator, dtype=dtype)
    labels = torch.tensor([0, 1, 2, 255])[torch.randint(0, 4, (2, 4, 5, 6), generator=generator)]
    return affinity, labels


def test_hand_computed() -> None:
    affinity = torch.tensor([0.5, 0.8, 0.9, 0.2, 0.6, 0.7]).view(1, 1, 1, 6)
    labels = torch.tensor([0, 0, 1, 2, 2, 255]).view(1, 1, 1, 6)
    log = math.log
    expected = -(log(0.5) + log(0.8)) / 2 / 4 - log(0.9) / 4 - (log(0.8) + log(0.4)) / 2 / 2
    assert affinity_loss(affinity, labels).item() == pytest.approx(expected, abs=1e-4)


def test_guards_are_those_of_the_official_program() -> None:
    affinity = torch.tensor(0.3, dtype=torch.float64).view(1, 1, 1, 1)
    for kind, weight, inside in ((0, 0.25, 0.3 + 1e-5), (1, 0.25, 0.3 + 1e-5), (2, 0.5, 0.7 + 1e-5)):
        expected = -weight * math.log(inside) / (1 + 1e-5)
        loss = affinity_loss(affinity, torch.tensor(kind).view(1, 1, 1, 1)).item()
        assert loss == pytest.approx(expected, rel=1e-7)


def test_guards() -> None:
    """An affinity of 0 or 1 and a kind without pairs are finite."""
    affinity, labels = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2), torch.tensor([1, 2]).view(1, 1, 1, 2)
    loss = affinity_loss(affinity.requires_grad_(), labels)
    assert loss.item() == pytest.approx(-math.log(1e-5) * 3 / 4, rel=1e-3)
    loss.backward()
    assert affinity.grad.isfinite().all()


def test_no_labelled_pair() -> None:
    affinity, labels = case()
    affinity.requires_grad_()
    loss = affinity_loss(affinity, torch.full_like(labels, 255))
    assert loss == 0
    loss.backward()
    assert affinity.grad.eq(0).all()


@given(seed=st.integers(0, 1000))
def test_properties(seed: int) -> None:
    affinity, labels = case(seed)
    loss = affinity_loss(affinity, labels)
    assert loss > 0
    better = torch.where(labels == 2, affinity * 0.9, affinity + 0.1 * (1 - affinity))
    assert affinity_loss(better, labels) < loss
    other = affinity.where(labels != 255, 0.5)
    assert torch.equal(affinity_loss(other, labels), loss)
    assert torch.equal(affinity_loss(other, labels.where(labels != 255, -1)), loss)
    # Each kind is a mean: twice the batch is the same loss, but for the guard of 1e-5 pairs.
    torch.testing.assert_close(
        affinity_loss(affinity.repeat(2, 1, 1, 1), labels.repeat(2, 1, 1, 1)), loss, atol=1e-5, rtol=0
    )


def test_it_teaches_features() -> None:
    """Some steps on free features make alike what the mask holds alike."""
    mask = torch.zeros(1, 6, 8, dtype=torch.int64)
    mask[:, :, 4:] = 1
    features = 0.1 * torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    features.requires_grad_()
    optimizer = torch.optim.Adam([features], lr=0.1)
    labels = affinity_labels(mask, 3)
    losses = []
    for _ in range(30):
        loss = affinity_loss(affinity_from_features(features, 3), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_gradcheck() -> None:
    affinity, labels = case()
    assert torch.autograd.gradcheck(lambda a: affinity_loss(a, labels), (affinity.requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    affinity, labels = case(dtype=torch.float32)
    low = affinity_loss(affinity.to(dtype), labels)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, affinity_loss(affinity, labels), atol=0.02, rtol=0.02)


def test_compiles_to_one_graph() -> None:
    affinity, labels = case()
    compiled = torch.compile(affinity_loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(affinity, labels), affinity_loss(affinity, labels))


def test_devices(device: torch.device) -> None:
    affinity, labels = case()
    loss = affinity_loss(affinity.to(device), labels.to(device))
    assert loss.device.type == device.type
    torch.testing.assert_close(loss.cpu(), affinity_loss(affinity, labels))


AFFINITY, LABELS = case()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f: f(AFFINITY[0], LABELS), ValueError, r"affinity: expected shape \(B, O, h, w\)"),
        (lambda f: f(AFFINITY, LABELS[:, 1:]), ValueError, "pair_labels: .* with O=4 from affinity"),
        (lambda f: f(AFFINITY.long(), LABELS), TypeError, "affinity: expected a floating-point"),
        (lambda f: f(AFFINITY, LABELS.float()), TypeError, "pair_labels: expected an integer tensor"),
    ],
)
def test_errors(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call(affinity_loss)


@pytest.mark.parametrize("value", [-0.5, 1.5, math.nan])
def test_no_affinities(value: float) -> None:
    with pytest.raises(ValueError, match=r"affinity: expected values in \[0, 1\]"):
        affinity_loss(torch.full((1, 4, 1, 1), value), torch.zeros(1, 4, 1, 1).long())
