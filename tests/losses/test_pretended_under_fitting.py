"""`pretended_under_fitting_loss`: section 4 of the PMM specification."""

import importlib
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from pseudolabel.losses import PretendedUnderFittingLoss, pretended_under_fitting_loss
from pseudolabel.losses.pretended_under_fitting import gate_mean, gate_terms

# The package holds the function and the Module, not the file of this name.
module = importlib.import_module("pseudolabel.losses.pretended_under_fitting")

# The tests of the warning start from a process that has not been told; to the others it is noise.
pytestmark = pytest.mark.filterwarnings("ignore:pretended under-fitting:UserWarning")

MODES = ["clamp", "ignore", "pow"]
OFFICIAL = {"gate_over": "all", "mean_over": "all"}


def case(
    seed: int = 0, ignored: bool = True, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that fit most pixels of a mask, and some not at all."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.randint(0, 4, (2, 5, 6), generator=generator)
    logits = 4 * F.one_hot(mask, 4).permute(0, 3, 1, 2) + torch.randn(2, 4, 5, 6, generator=generator)
    logits[:, :, 0] *= -1
    if ignored:
        mask[:, -1] = 255
    return logits.to(dtype), mask


def loss_and_gradient(
    logits: torch.Tensor, mask: torch.Tensor, **settings
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = logits.clone().requires_grad_()
    loss = pretended_under_fitting_loss(logits, mask, **settings)
    loss.sum().backward()
    assert logits.grad is not None
    return loss.detach(), logits.grad


def test_golden(golden: Callable) -> None:
    data = golden("pmm/public_pus")
    gates = {"b050k050": (0.5, 0.5), "b080k080": (0.8, 0.8), "b050k080": (0.5, 0.8)}
    gates |= {"always_k050": (math.inf, 0.5), "never_k050": (0.0, 0.5)}
    for number in range(int(data["n_cases"])):
        logits = torch.from_numpy(data[f"c{number}_logits"])
        mask = torch.from_numpy(data[f"c{number}_label"])
        plain, gradient = loss_and_gradient(logits, mask, beta=0, mean_over="all")
        np.testing.assert_allclose(plain.item(), data[f"c{number}_plain_loss"], atol=4e-6)
        np.testing.assert_allclose(gradient.numpy(), data[f"c{number}_plain_grad"], atol=1e-7)
        for mode in MODES:
            for name, (beta, k) in gates.items():
                loss, gradient = loss_and_gradient(logits, mask, mode=mode, beta=beta, k=k, **OFFICIAL)
                key = f"c{number}_{mode}_{name}"
                np.testing.assert_allclose(loss.item(), data[f"{key}_loss"], atol=4e-6, err_msg=key)
                np.testing.assert_allclose(gradient.numpy(), data[f"{key}_grad"], atol=1e-6, err_msg=key)
        settings = {"beta": math.inf, "k": 0.5, **OFFICIAL}
        for reduction in ("sum", "none"):
            loss = pretended_under_fitting_loss(logits, mask, reduction=reduction, **settings)
            expected = data[f"c{number}_clamp_always_k050_reduction_{reduction}"]
            np.testing.assert_allclose(loss.numpy(), expected, rtol=1e-5, atol=4e-6)
        weighted = 0.4 * pretended_under_fitting_loss(
            logits,
            mask,
            beta=0.8,
            k=0.8,
            class_weight=torch.from_numpy(data[f"c{number}_class_weight"]),
            pixel_weight=torch.from_numpy(data[f"c{number}_weight"]),
            **OFFICIAL,
        )
        np.testing.assert_allclose(weighted.item(), data[f"c{number}_weighted_loss"], atol=4e-6)


def test_hand_computed() -> None:
    # Two labels, logit difference d: cross-entropy log(1 + exp(-d)).
    logits = torch.tensor([[[[0.0, math.log(3.0)]], [[0.0, 0.0]]]])
    mask = torch.zeros(1, 1, 2, dtype=torch.int64)
    ce = [math.log(2), math.log(4 / 3)]  # 0.693 and 0.288, mean 0.490
    run = lambda **settings: pretended_under_fitting_loss(logits, mask, reduction="none", **settings)  # noqa: E731
    assert run().flatten().tolist() == pytest.approx([0.5, ce[1]])
    assert run(beta=0.49).flatten().tolist() == pytest.approx(ce)
    assert run(mode="ignore").flatten().tolist() == pytest.approx([0, ce[1]])
    assert run(mode="pow").flatten().tolist() == pytest.approx([ce[0] ** 0.5, ce[1] ** 0.5])


def test_closed_gate_is_cross_entropy() -> None:
    logits, mask = case()
    for mode in MODES:
        loss, gradient = loss_and_gradient(logits, mask, mode=mode, beta=0)
        own = logits.clone().requires_grad_()
        expected = F.cross_entropy(own, mask, ignore_index=255)
        expected.backward()
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(gradient, own.grad)


def test_clamp_and_ignore_have_one_gradient() -> None:
    logits, mask = case()
    clamp, ignore = (
        loss_and_gradient(logits, mask, mode=mode, beta=9, k=0.5)[1] for mode in ("clamp", "ignore")
    )
    assert torch.equal(clamp, ignore)
    assert clamp[:, :, 0].eq(0).all(), "the badly fitted row is let go"
    assert clamp[:, :, 1].abs().sum() > 0


def test_one_gradient_at_the_level(flat_clamp: Callable) -> None:
    """A pixel with a loss of exactly k still learns."""
    logits, mask = torch.zeros(1, 2, 1, 1), torch.zeros(1, 1, 1, dtype=torch.int64)
    settings = {"beta": math.inf, "k": F.cross_entropy(logits, mask).item()}
    with flat_clamp():
        clamp, ignore = (
            loss_and_gradient(logits, mask, mode=mode, **settings)[1] for mode in ("clamp", "ignore")
        )
    assert clamp.flatten().tolist() == ignore.flatten().tolist() == [-0.5, 0.5]


@given(seed=st.integers(0, 1000), k=st.floats(0.05, 2))
def test_order_of_the_modes(seed: int, k: float) -> None:
    logits, mask = case(seed)
    run = lambda **settings: pretended_under_fitting_loss(logits, mask, k=k, **settings)  # noqa: E731
    plain = run(beta=0)
    assert run(mode="ignore", beta=math.inf) <= run(mode="clamp", beta=math.inf) <= plain
    assert run(mode="clamp", beta=math.inf, reduction="none").max() <= k


@given(seed=st.integers(0, 1000))
def test_ignored_pixels_have_no_gradient(seed: int) -> None:
    logits, mask = case(seed)
    for mode in MODES:
        for mean_over in ("valid", "all"):
            gradient = loss_and_gradient(logits, mask, mode=mode, beta=9, mean_over=mean_over)[1]
            assert gradient[:, :, -1].eq(0).all()
            assert gradient.isfinite().all()


@given(seed=st.integers(0, 1000))
def test_pixel_order_does_not_matter(seed: int) -> None:
    logits, mask = case(seed)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(seed))
    shuffled = logits.flatten(2)[..., order].view_as(logits), mask.flatten(1)[:, order].view_as(mask)
    for mode in MODES:
        torch.testing.assert_close(
            pretended_under_fitting_loss(*shuffled, mode=mode),
            pretended_under_fitting_loss(logits, mask, mode=mode),
        )


def test_gate_equal_to_beta_is_closed() -> None:
    logits, mask = case(ignored=False)
    m = F.cross_entropy(logits, mask).item()
    assert pretended_under_fitting_loss(logits, mask, gate_value=m, beta=m).item() == pytest.approx(m)
    assert pretended_under_fitting_loss(logits, mask, gate_value=m, beta=m + 1e-9).item() < m


def test_gate_over_all_or_valid_pixels() -> None:
    logits, mask = case()
    ce = F.cross_entropy(logits, mask, ignore_index=255, reduction="none")
    everywhere, valid = ce.mean(), ce[mask != 255].mean()
    between = float((everywhere + valid) / 2)
    plain = pretended_under_fitting_loss(logits, mask, beta=0)
    assert pretended_under_fitting_loss(logits, mask, beta=between, gate_over="all") < plain
    assert pretended_under_fitting_loss(logits, mask, beta=between, gate_over="valid") == plain


def test_gate_over_classes() -> None:
    """Ten pixels of background fit, and two of class 1 do not: the mean over pixels hides them."""
    mask = torch.tensor([0] * 10 + [1, 1, 255, 255]).view(1, 2, 7)
    logits = torch.stack([torch.full(mask.shape, 3.0), torch.zeros(mask.shape)], 1)
    fits, fails = math.log1p(math.exp(-3)), math.log1p(math.exp(3))
    gates = {"all": (10 * fits + 2 * fails) / 14, "valid": (10 * fits + 2 * fails) / 12}
    gates["classes"] = (fits + fails) / 2
    assert gates["valid"] < 0.6 < 1.5 < gates["classes"]
    for gate_over, gate in gates.items():
        run = lambda beta: pretended_under_fitting_loss(logits, mask, beta=beta, k=0.1, gate_over=gate_over)  # noqa: B023, E731
        plain = pretended_under_fitting_loss(logits, mask, beta=0)
        assert run(gate - 1e-4) == plain
        assert run(gate + 1e-4) < plain


def test_gate_over_classes_counts_weights_and_no_absent_class() -> None:
    logits, mask = case()
    mask[mask == 2] = 0
    weight = torch.tensor([0.5, 2, 1, 3], dtype=torch.float64)
    loss = F.cross_entropy(logits, mask, weight, ignore_index=255, reduction="none")
    gate = float(sum(loss[mask == c].mean() for c in (0, 1, 3)) / 3)
    settings = {"class_weight": weight, "k": 0.1, "gate_over": "classes"}
    plain = pretended_under_fitting_loss(logits, mask, beta=0, class_weight=weight)
    assert pretended_under_fitting_loss(logits, mask, beta=gate - 1e-9, **settings) == plain
    assert pretended_under_fitting_loss(logits, mask, beta=gate + 1e-9, **settings) < plain


@pytest.mark.parametrize("gate_over", ["all", "valid", "classes"])
def test_gate_of_parts_is_that_of_the_batch(gate_over: str) -> None:
    """What processes add up."""
    logits, mask = case()
    mask[0][mask[0] == 3] = 255
    loss = F.cross_entropy(logits, mask, ignore_index=255, reduction="none")
    terms = lambda part: gate_terms(loss[part], mask[part], mask[part] != 255, gate_over, 4)  # noqa: E731
    whole = gate_mean(terms(slice(None)))
    torch.testing.assert_close(gate_mean(terms(slice(1)) + terms(slice(1, 2))), whole)
    for shift, expected in ((1e-9, True), (-1e-9, False)):
        loss = pretended_under_fitting_loss(
            logits, mask, beta=float(whole) + shift, k=0.1, gate_over=gate_over
        )
        assert (loss < pretended_under_fitting_loss(logits, mask, beta=0)) == expected


@pytest.mark.parametrize(
    ("settings", "k"),
    [
        ({}, 0.5),
        ({"beta": 0.8}, 0.8),
        ({"beta": 0.8, "mode": "ignore"}, 0.8),
        ({"beta": 0.8, "mode": "pow"}, 0.5),
        ({"beta": math.inf, "mode": "pow"}, 0.5),
        ({"beta": 0.8, "k": 0.3}, 0.3),
    ],
)
def test_default_of_k(settings: dict, k: float) -> None:
    """The official pairs are equal; an exponent has nothing to do with the gate."""
    logits, mask = case()
    assert PretendedUnderFittingLoss(**settings).k == k
    gate = {"gate_value": 0.0, "reduction": "none"}
    assert torch.equal(
        pretended_under_fitting_loss(logits, mask, **settings, **gate),
        pretended_under_fitting_loss(logits, mask, **{**settings, "k": k}, **gate),
    )


def test_a_larger_beta_alone_does_not_stop_everything() -> None:
    """Two classes at the first step have a loss of log 2: below beta, and with it below the level."""
    logits, mask = torch.zeros(1, 2, 4, 4), torch.randint(0, 2, (1, 4, 4))
    assert loss_and_gradient(logits, mask, beta=0.8)[1].abs().sum() > 0


def test_gate_from_outside() -> None:
    logits, mask = case()
    shut, open_ = (
        pretended_under_fitting_loss(logits, mask, beta=0, k=0.5, gate_value=gate) for gate in (1.0, -1.0)
    )
    assert shut == pretended_under_fitting_loss(logits, mask, beta=0)
    assert open_ == pretended_under_fitting_loss(logits, mask, beta=math.inf, k=0.5)
    as_tensor = pretended_under_fitting_loss(logits, mask, beta=0, k=0.5, gate_value=torch.tensor(-1.0))
    assert as_tensor == open_


def test_no_gradient_through_the_gate() -> None:
    logits, mask = case()
    gate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    loss = pretended_under_fitting_loss(logits.requires_grad_(), mask, gate_value=gate)
    loss.backward()
    assert gate.grad is None


def test_power_of_one() -> None:
    logits, mask = case(ignored=False)
    loss = pretended_under_fitting_loss(logits, mask, mode="pow", k=1, beta=math.inf)
    assert loss.item() == pytest.approx(F.cross_entropy(logits, mask).item() + 1e-9, abs=1e-12)


@pytest.mark.parametrize("mean_over", ["valid", "all"])
@pytest.mark.parametrize("mode", MODES)
def test_all_ignored(mode: str, mean_over: str) -> None:
    logits, mask = case()
    loss, gradient = loss_and_gradient(logits, torch.full_like(mask, 255), mode=mode, mean_over=mean_over)
    assert loss.item() == pytest.approx(1e-9**0.5 if (mode, mean_over) == ("pow", "all") else 0)
    assert gradient.eq(0).all()


def test_means() -> None:
    logits, mask = case()
    none = pretended_under_fitting_loss(logits, mask, reduction="none")
    assert none.shape == mask.shape
    assert none[mask == 255].eq(0).all()
    total = pretended_under_fitting_loss(logits, mask, reduction="sum")
    torch.testing.assert_close(total, none.sum())
    torch.testing.assert_close(pretended_under_fitting_loss(logits, mask), total / (mask != 255).sum())
    torch.testing.assert_close(
        pretended_under_fitting_loss(logits, mask, mean_over="all"), total / mask.numel()
    )


def test_logits_are_resized_to_the_mask() -> None:
    logits, mask = case()
    small = F.avg_pool2d(logits, 2)
    expected = F.interpolate(small, size=mask.shape[1:], mode="bilinear", align_corners=False)
    torch.testing.assert_close(
        pretended_under_fitting_loss(small, mask), pretended_under_fitting_loss(expected, mask)
    )


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode: str) -> None:
    logits, mask = case()
    ce = F.cross_entropy(logits, mask, ignore_index=255, reduction="none")
    assert (ce - 0.5).abs().min() > 1e-3, "away from the corner of the clamp"
    assert torch.autograd.gradcheck(
        lambda x: pretended_under_fitting_loss(x, mask, mode=mode, gate_value=0.0), (logits.requires_grad_(),)
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(mode: str, dtype: torch.dtype) -> None:
    logits, mask = case(dtype=torch.float32)
    exact = pretended_under_fitting_loss(logits, mask, mode=mode)
    low = pretended_under_fitting_loss(logits.to(dtype), mask, mode=mode)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, exact, atol=0.02, rtol=0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(pretended_under_fitting_loss(logits, mask, mode=mode), exact)


@pytest.mark.parametrize("gate_over", ["all", "valid", "classes"])
@pytest.mark.parametrize("mode", MODES)
def test_compiles_to_one_graph(mode: str, gate_over: str) -> None:
    logits, mask = case(dtype=torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(pretended_under_fitting_loss, fullgraph=True, backend="eager")
    settings = {"mode": mode, "gate_over": gate_over}
    torch.testing.assert_close(
        compiled(logits, mask, **settings), pretended_under_fitting_loss(logits, mask, **settings)
    )


def test_module_equals_function() -> None:
    logits, mask = case()
    settings = {
        "mode": "pow",
        "beta": 9.0,
        "k": 0.3,
        "gate_over": "valid",
        "reduction": "sum",
        "mean_over": "all",
    }
    module = PretendedUnderFittingLoss(**settings)
    weights = {"pixel_weight": torch.rand(mask.shape), "class_weight": torch.rand(4), "gate_value": 0.2}
    assert module(logits, mask, **weights) == pretended_under_fitting_loss(
        logits, mask, **settings, **weights
    )
    assert repr(module) == "PretendedUnderFittingLoss(mode='pow', beta=9.0, k=0.3, gate_over='valid')"
    assert PretendedUnderFittingLoss()(logits, mask) == pretended_under_fitting_loss(logits, mask)


def test_devices(device: torch.device) -> None:
    logits, mask = (value.to(device) for value in case(dtype=torch.float32))
    assert pretended_under_fitting_loss(logits, mask).device.type == device.type


# ------------------------------------------------------------------------------------ who learns nothing


@pytest.fixture
def untold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_told_of_dead_class", False)


def imbalanced() -> tuple[torch.Tensor, torch.Tensor]:
    """All is taken for background, of which nearly all is."""
    mask = torch.zeros(1, 4, 5, dtype=torch.int64)
    mask[0, 0, :2], mask[0, 3] = 1, 255
    logits = torch.stack([torch.full(mask.shape, 4.0), torch.zeros(mask.shape)], 1)
    return logits.requires_grad_(), mask


@pytest.mark.parametrize("mode", ["clamp", "ignore"])
def test_a_class_without_a_gradient_is_told_once(mode: str, untold: None) -> None:
    logits, mask = imbalanced()
    call = lambda _: pretended_under_fitting_loss(logits, mask, mode=mode)  # noqa: E731
    with pytest.warns(UserWarning, match=r"mask label 1 has a loss above k=0\.5") as told:
        losses = [*map(call, range(3))]
    assert len(told) == 1
    losses[-1].backward()
    assert logits.grad[:, :, 0, :2].eq(0).all(), "it is as the warning says"


def test_module_tells_as_well(untold: None) -> None:
    with pytest.warns(UserWarning, match="gate_over='classes'"):
        PretendedUnderFittingLoss()(*imbalanced())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "pow"},  # its weights are never 0
        {"beta": 0.05},  # closed
        {"gate_over": "classes"},  # closed
        {"gate_value": 9.0},  # closed
        {"k": 4.1},  # all pixels are below it
    ],
)
def test_nothing_to_tell(settings: dict, untold: None) -> None:
    logits, mask = imbalanced()
    pretended_under_fitting_loss(logits, mask, **settings).backward()
    assert logits.grad[:, :, 0, :2].ne(0).all(), "the class learns"


@pytest.mark.filterwarnings("error")
def test_nobody_looks_where_no_gradient_is_wanted(untold: None) -> None:
    logits, mask = imbalanced()
    pretended_under_fitting_loss(logits.detach(), mask)
    with torch.no_grad():
        pretended_under_fitting_loss(logits, mask)
    one_pixel_learns = logits.detach().clone()
    one_pixel_learns[0, 1, 0, 0] = 9
    pretended_under_fitting_loss(one_pixel_learns.requires_grad_(), mask)
    pretended_under_fitting_loss(logits, torch.full_like(mask, 255))
    torch.compile(pretended_under_fitting_loss, fullgraph=True, backend="eager")(logits, mask)


# ------------------------------------------------------------------------------------------ errors


LOGITS, MASK = case(dtype=torch.float32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f: f(LOGITS[0], MASK), ValueError, r"logits: expected shape \(B, N, h, w\)"),
        (lambda f: f(LOGITS, MASK[:1]), ValueError, "mask: .* with B=2 from logits"),
        (lambda f: f(LOGITS.long(), MASK), TypeError, "logits: expected a floating-point tensor"),
        (lambda f: f(LOGITS, MASK.float()), TypeError, "mask: expected an integer tensor"),
        (
            lambda f: f(LOGITS, MASK.clamp(max=9)),
            ValueError,
            r"mask: expected classes 0\.\.3 or ignore_index 255",
        ),
        (lambda f: f(LOGITS, MASK, mode="drop"), ValueError, "mode: expected one of"),
        (lambda f: f(LOGITS, MASK, beta=-1), ValueError, "beta: expected a finite number >= 0"),
        (lambda f: f(LOGITS, MASK, beta=math.nan), ValueError, "beta: expected a finite number"),
        (lambda f: f(LOGITS, MASK, k=0), ValueError, "k: expected a finite number > 0"),
        (lambda f: f(LOGITS, MASK, beta=math.inf), ValueError, "k: expected a number beside beta=inf"),
        (lambda f: f(LOGITS, MASK, gate_over="some"), ValueError, "gate_over: expected one of"),
        (lambda f: f(LOGITS, MASK, mean_over="some"), ValueError, "mean_over: expected one of"),
        (lambda f: f(LOGITS, MASK, reduction="max"), ValueError, "reduction: expected one of"),
        (lambda f: f(LOGITS, MASK, class_weight=torch.rand(3)), ValueError, "class_weight: .* with N=4"),
        (
            lambda f: f(LOGITS, MASK, pixel_weight=torch.rand(2, 5, 5)),
            ValueError,
            "pixel_weight: .* with W=6",
        ),
    ],
)
def test_errors(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call(pretended_under_fitting_loss)
