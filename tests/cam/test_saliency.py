"""`saliency_from_features`, on planted objects."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pseudolabel.cam import saliency_from_features

BOXES = {
    "middle": (4, 8, 5, 11),
    "off-centre": (1, 5, 10, 15),
    "touches one border": (6, 12, 3, 9),
    "thin": (5, 6, 2, 14),
    "one position": (3, 4, 4, 5),
}


def planted(
    box: tuple[int, int, int, int], *, noise: float = 0.1, seed: int = 0, sign: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (1,16,12,16) of a background, and of an object in another direction; and where it is."""
    generator = torch.Generator().manual_seed(seed)
    background, other = torch.randn(2, 16, 1, 1, generator=generator, dtype=torch.float64)
    top, bottom, left, right = box
    inside = torch.zeros(12, 16, dtype=torch.bool)
    inside[top:bottom, left:right] = True
    features = background + sign * inside * other
    features = features + noise * torch.randn(features.shape, generator=generator, dtype=torch.float64)
    return features[None], inside


def contrast_along_the_first_component(features: torch.Tensor) -> torch.Tensor:
    """`y` of the docstring for infinitely many steps, by an eigendecomposition."""
    at_border = torch.ones(features.shape[1:], dtype=torch.bool)
    at_border[1:-1, 1:-1] = False
    x = features.flatten(1) - features[:, at_border].mean(1, keepdim=True)
    y = torch.linalg.eigh(x @ x.T).eigenvectors[:, -1] @ x
    return (y * y.mean().sign()).view(features.shape[1:])


# --------------------------------------------------------------------------------------- planted objects


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
def test_finds_the_object(box: tuple[int, int, int, int], noise: float) -> None:
    features, inside = planted(box, noise=noise if box != BOXES["one position"] else noise / 4)
    found = saliency_from_features(features)[0] >= 0.5
    assert (found & inside).sum() / (found | inside).sum() > 0.9


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_the_object_is_salient_whatever_its_sign(sign: float, noise: float) -> None:
    """What differs from the border is foreground, be its features larger or smaller."""
    features, inside = planted(BOXES["off-centre"], noise=noise, sign=sign)
    saliency = saliency_from_features(features)[0]
    assert saliency[inside].min() > saliency[~inside].max()


def test_the_sign_is_that_of_the_mean_deviation() -> None:
    """Of two opposed objects the larger is salient, the smaller has saliency 0."""
    features = torch.zeros(1, 2, 8, 12)
    features[0, 0, 2:6, 2:7] = -1
    features[0, 0, 2:6, 8:11] = 1
    saliency = saliency_from_features(features)[0]
    assert (saliency[2:6, 2:7] > 0.5).all()
    assert saliency[2:6, 8:11].eq(0).all()


def test_two_objects_of_one_direction() -> None:
    features = torch.zeros(1, 3, 8, 12)
    features[0, 1, 2:6, 2:4] = 1
    features[0, 1, 3:5, 8:10] = 1
    found = saliency_from_features(features)[0] > 0.5
    assert torch.equal(found, features[0, 1] == 1)


def test_a_larger_share_of_the_border_than_of_the_image_is_background() -> None:
    """The documented limit: a square in a corner has 11 of 52 positions of the border, and 36 of all 192."""
    features, inside = planted((0, 6, 0, 6), noise=0.0)
    saliency = saliency_from_features(features)[0]
    assert saliency[inside].eq(0).all()
    assert saliency[~inside].gt(0).all()


def test_what_covers_the_whole_border_is_background() -> None:
    features, inside = planted((1, 11, 1, 15), noise=0.0)
    saliency = saliency_from_features(features)[0]
    assert torch.equal(saliency > 0.4, inside), "large, but clear of the border"
    ring = ~inside * torch.ones(1, 3, 1, 1)
    assert torch.equal(saliency_from_features(ring)[0] > 0, inside), "a frame is never salient"


# ------------------------------------------------------------------------------------------- the formula


def test_hand_computed() -> None:
    """One channel: y is the value itself, its mean square (9 + 16) / 12."""
    features = torch.zeros(1, 1, 3, 4)
    features[0, 0, 1, 1:3] = torch.tensor([3.0, 4.0])
    energy = 25 / 12
    saliency = saliency_from_features(features + 7)
    expected = torch.zeros(1, 3, 4)
    expected[0, 1, 1:3] = torch.tensor([9 / (9 + energy), 16 / (16 + energy)])
    torch.testing.assert_close(saliency, expected)


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
def test_ends_at_the_first_principal_component(box: tuple[int, int, int, int]) -> None:
    features, _ = planted(box)
    y = contrast_along_the_first_component(features[0])
    expected = y.clamp(min=0).square() / (y.clamp(min=0).square() + y.square().mean())
    torch.testing.assert_close(saliency_from_features(features, steps=100)[0], expected)


def test_one_step_starts_at_the_mean_deviation() -> None:
    features = torch.zeros(1, 2, 3, 4, dtype=torch.float64)
    features[0, :, 1, 1] = torch.tensor([3.0, 1.0])
    features[0, :, 1, 2] = torch.tensor([-1.0, 1.0])
    # The deviations (3, 1) and (-1, 1) add up to (2, 2); X X^T = [[10, 2], [2, 2]] sends (1, 1) to (12, 4).
    y = torch.zeros(3, 4, dtype=torch.float64)
    y[1, 1], y[1, 2] = 3 * 3 + 1, -3 + 1
    expected = y.clamp(min=0).square() / (y.clamp(min=0).square() + y.square().mean())
    torch.testing.assert_close(saliency_from_features(features, steps=1)[0], expected)


def test_border_of_two() -> None:
    """An object within the border is part of the background's mean; one inside of it is not."""
    features = torch.zeros(1, 1, 8, 8)
    features[0, 0, 3:5, 3:5] = 1
    features[0, 0, 1, 1:7] = -1  # 6 of the 48 positions of a border of width 2
    y = features[0, 0] + 6 / 48
    y = y * y.mean().sign()
    expected = y.clamp(min=0).square() / (y.clamp(min=0).square() + y.square().mean())
    torch.testing.assert_close(saliency_from_features(features, border=2)[0], expected)
    assert not torch.allclose(saliency_from_features(features, border=1)[0], expected)


# -------------------------------------------------------------------------------------------- properties

seeds = st.integers(0, 1000)
boxes = st.sampled_from(list(BOXES.values()))


@given(seed=seeds, box=boxes)
def test_in_unit_range(seed: int, box: tuple[int, int, int, int]) -> None:
    saliency = saliency_from_features(planted(box, seed=seed, noise=1.0)[0])
    assert saliency.min() >= 0
    assert saliency.max() < 1


@given(seed=seeds, box=boxes, scale=st.floats(1e-3, 1e3), shift=st.floats(-10, 10))
def test_scale_and_constant_do_not_matter(
    seed: int, box: tuple[int, int, int, int], scale: float, shift: float
) -> None:
    features, _ = planted(box, seed=seed)
    expected = saliency_from_features(features)
    constant = shift * torch.randn(
        16, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    torch.testing.assert_close(saliency_from_features(scale * features + constant), expected)
    torch.testing.assert_close(saliency_from_features(-scale * features), expected)


@given(seed=seeds, box=boxes)
def test_rotations_of_the_channels_do_not_matter(seed: int, box: tuple[int, int, int, int]) -> None:
    features, _ = planted(box, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64, generator=generator)).Q
    torch.testing.assert_close(
        saliency_from_features(torch.einsum("ij,bjhw->bihw", rotation, features)),
        saliency_from_features(features),
    )
    more = torch.cat([features, torch.zeros(1, 5, 12, 16, dtype=torch.float64)], 1)
    torch.testing.assert_close(saliency_from_features(more), saliency_from_features(features))


@given(seed=seeds, box=boxes, axes=st.sampled_from([(-1,), (-2,), (-1, -2)]))
def test_flips_with_the_features(seed: int, box: tuple[int, int, int, int], axes: tuple[int, ...]) -> None:
    features, _ = planted(box, seed=seed)
    torch.testing.assert_close(
        saliency_from_features(features.flip(axes)), saliency_from_features(features).flip(axes)
    )


@given(seed=seeds)
def test_images_are_independent(seed: int) -> None:
    features = torch.cat(
        [(1 + 9 * number) * planted(box, seed=seed + number)[0] for number, box in enumerate(BOXES.values())]
    )
    single = torch.cat([saliency_from_features(one[None]) for one in features])
    torch.testing.assert_close(saliency_from_features(features), single)


# -------------------------------------------------------------------------------------------- edge cases


@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_features_have_no_saliency(value: float, dtype: torch.dtype) -> None:
    """Also where the mean of equal values is not that value, and beside an image that has an object."""
    channels = value * torch.rand(1, 16, 1, 1, dtype=dtype, generator=torch.Generator().manual_seed(0))
    constant = channels.expand(1, 16, 12, 16)
    features = torch.cat([constant, planted(BOXES["middle"])[0].to(dtype)])
    saliency = saliency_from_features(features)
    assert saliency[0].eq(0).all()
    assert saliency[1].max() > 0.5


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_neither_overflow_nor_vanish(scale: float) -> None:
    features = planted(BOXES["middle"])[0].float()
    torch.testing.assert_close(saliency_from_features(scale * features), saliency_from_features(features))


def test_gradient_is_finite_without_any_contrast() -> None:
    features = torch.ones(1, 3, 4, 5, requires_grad=True)
    saliency_from_features(features).sum().backward()
    assert features.grad.isfinite().all()


def test_gradients() -> None:
    features = planted(BOXES["middle"])[0][:, :4, 2:9, 3:12].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: saliency_from_features(x, steps=3), (features,))


def test_smallest_map_and_empty_batch() -> None:
    features = torch.zeros(1, 2, 3, 3)
    features[0, 1, 1, 1] = 5
    assert saliency_from_features(features)[0, 1, 1].item() == pytest.approx(9 / 10)
    assert saliency_from_features(torch.zeros(0, 2, 3, 3)).shape == (0, 3, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(dtype: torch.dtype) -> None:
    features = planted(BOXES["middle"])[0].float()
    low = saliency_from_features((1000 * features).to(dtype))  # squares of which overflow float16
    assert low.dtype == dtype
    torch.testing.assert_close(low.float(), saliency_from_features(features), atol=0.02, rtol=0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = saliency_from_features(features)
    assert torch.equal(inside, saliency_from_features(features))


def test_compiles() -> None:
    features = planted(BOXES["middle"])[0]
    compiled = torch.compile(saliency_from_features, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(features), saliency_from_features(features))


def test_channels_last_and_views() -> None:
    features = planted(BOXES["middle"])[0]
    expected = saliency_from_features(features)
    torch.testing.assert_close(
        saliency_from_features(features.contiguous(memory_format=torch.channels_last)), expected
    )
    torch.testing.assert_close(saliency_from_features(features.mT.contiguous().mT), expected)


def test_devices(device: torch.device) -> None:
    features = planted(BOXES["middle"])[0].float()
    saliency = saliency_from_features(features.to(device))
    assert saliency.device.type == device.type
    torch.testing.assert_close(saliency.cpu(), saliency_from_features(features), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("features", "settings", "error", "message"),
    [
        (torch.rand(3, 6, 6), {}, ValueError, r"features: expected shape \(B, D, h, w\), got \(3, 6, 6\)"),
        (torch.ones(1, 3, 6, 6, dtype=torch.int64), {}, TypeError, "features: expected a floating-point"),
        (torch.full((1, 3, 6, 6), math.nan), {}, ValueError, "features: expected finite values, got 108 NaN"),
        (torch.rand(1, 0, 6, 6), {}, ValueError, "features: expected at least one channel"),
        (torch.rand(1, 3, 2, 9), {}, ValueError, "sides above 2 with a border of 1"),
        (torch.rand(1, 3, 9, 6), {"border": 3}, ValueError, "sides above 6 with a border of 3, got"),
        (torch.rand(1, 3, 6, 6), {"border": 0}, ValueError, "border: expected an integer >= 1, got 0"),
        (torch.rand(1, 3, 6, 6), {"border": True}, ValueError, "border: expected an integer >= 1, got True"),
        (torch.rand(1, 3, 6, 6), {"steps": 0}, ValueError, "steps: expected an integer >= 1, got 0"),
        (torch.rand(1, 3, 6, 6), {"steps": 2.0}, ValueError, "steps: expected an integer >= 1, got 2.0"),
    ],
)
def test_errors(features, settings, error, message) -> None:
    with pytest.raises(error, match=message):
        saliency_from_features(features, **settings)
