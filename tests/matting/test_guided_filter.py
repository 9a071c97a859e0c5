"""Guided filter: against its definition, window by window, and against the matting Laplacian."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from skimage import data

from pseudolabel.matting import guided_filter, guided_filter_matting


def windows(height: int, width: int, radius: int) -> list[np.ndarray]:
    """Pixels of each window, cut off at the border."""
    index = np.arange(height * width).reshape(height, width)
    return [
        index[max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1].ravel()
        for y in range(height)
        for x in range(width)
    ]


def by_definition(image: torch.Tensor, p: torch.Tensor, radius: int, eps: float) -> np.ndarray:
    """One image (3,H,W) and one map (H,W), in plain loops."""
    colours, values = image.flatten(1).T.numpy(), p.flatten().numpy()
    found, count = np.zeros_like(values), np.zeros_like(values)
    for window in windows(*p.shape, radius):
        colour, value = colours[window], values[window]
        centred = colour - colour.mean(0)
        spread = centred.T @ centred / len(window) + eps * np.eye(3)
        slope = np.linalg.solve(spread, centred.T @ (value - value.mean()) / len(window))
        found[window] += centred @ slope + value.mean()
        count[window] += 1
    return (found / count).reshape(p.shape)


def matting_laplacian(image: torch.Tensor, radius: int, eps: float) -> np.ndarray:
    """Dense matrix of closed-form matting (Levin et al. 2008) on the same windows, with eps as it is."""
    colours = image.flatten(1).T.numpy()
    laplacian = np.zeros((len(colours), len(colours)))
    for window in windows(*image.shape[1:], radius):
        size = len(window)
        centred = colours[window] - colours[window].mean(0)
        spread = centred.T @ centred / size + eps * np.eye(3)
        alike = (1 + centred @ np.linalg.solve(spread, centred.T)) / size
        laplacian[np.ix_(window, window)] += np.eye(size) - alike
    return laplacian


def random_case(seed: int, size=(9, 7), images=1, maps=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(images, 3, *size, generator=generator, dtype=dtype)
    return image, torch.rand(images, maps, *size, generator=generator, dtype=dtype)


@pytest.mark.parametrize(("radius", "eps"), [(1, 1e-2), (2, 1e-5), (3, 1e-3), (20, 1e-3)])
def test_definition(radius: int, eps: float) -> None:
    image, maps = random_case(radius)
    expected = by_definition(image[0], maps[0, 0], radius, eps)
    np.testing.assert_allclose(guided_filter(image, maps, radius=radius, eps=eps)[0, 0], expected, atol=1e-10)


@pytest.mark.parametrize(("radius", "eps"), [(1, 1e-3), (2, 1e-5), (30, 1e-2)])
def test_one_damped_step_of_closed_form_matting(radius: int, eps: float) -> None:
    image, maps = random_case(7, size=(8, 10))
    laplacian = matting_laplacian(image[0], radius, eps)
    assert abs(laplacian.sum(1)).max() < 1e-9
    count = np.zeros(80)
    for window in windows(8, 10, radius):
        count[window] += 1
    p = maps.flatten().numpy()
    step = p - laplacian @ p / count
    np.testing.assert_allclose(guided_filter(image, maps, radius=radius, eps=eps).flatten(), step, atol=3e-10)


@given(seed=st.integers(0, 10**6), radius=st.integers(1, 12), eps=st.sampled_from([1e-6, 1e-3, 1.0]))
def test_linear_and_keeps_constants(seed: int, radius: int, eps: float) -> None:
    image, maps = random_case(seed, maps=3)
    maps = maps / maps.sum(1, keepdim=True)
    out = guided_filter(image, maps, radius=radius, eps=eps)
    torch.testing.assert_close(out.sum(1), torch.ones_like(out[:, 0]), rtol=0, atol=1e-9)
    scaled = guided_filter(image, 2 * maps - 5, radius=radius, eps=eps)
    torch.testing.assert_close(scaled, 2 * out - 5, rtol=0, atol=1e-8)
    alone = guided_filter(image, maps[:, 1:2], radius=radius, eps=eps)
    torch.testing.assert_close(alone, out[:, 1:2], rtol=0, atol=1e-12)


def test_edges_of_the_image_stay_and_others_go() -> None:
    image = torch.zeros(1, 3, 12, 12)
    image[..., 6:] = 1
    step, elsewhere = torch.zeros(1, 1, 12, 12), torch.zeros(1, 1, 12, 12)
    step[..., 6:] = 1
    elsewhere[..., 3:] = 1  # nothing in the image is there
    assert (guided_filter(image, step, radius=4, eps=1e-4) - step).abs().max() < 1e-3
    assert guided_filter(image, elsewhere, radius=4, eps=1e-4)[0, 0, 6, 2:5].diff().abs().max() < 0.3


def test_flat_image_is_a_twofold_box_mean() -> None:
    _, maps = random_case(1, size=(6, 6))
    out = guided_filter(torch.full((1, 3, 6, 6), 0.3, dtype=torch.float64), maps, radius=9)
    torch.testing.assert_close(out, maps.mean().expand(1, 1, 6, 6))


def test_large_eps_blurs_small_eps_copies() -> None:
    image, _ = random_case(2)
    maps = image[:, :1]
    blurred = guided_filter(image, maps, radius=30, eps=1e6)
    torch.testing.assert_close(blurred, maps.mean().expand_as(maps), rtol=0, atol=1e-4)
    torch.testing.assert_close(guided_filter(image, maps, radius=3, eps=1e-12), maps, rtol=0, atol=1e-9)


def test_single_precision_is_as_good_as_double(device: torch.device) -> None:
    """On a photo, where cov = E[II] - E[I]E[I] in float32 loses everything at such an eps."""
    photo = torch.from_numpy(data.astronaut()).permute(2, 0, 1)[None, :, ::2, ::2].double().div(255)
    maps = (photo.mean(1, keepdim=True) > 0.5).double()
    exact = guided_filter(photo, maps, radius=30, eps=1e-7)
    single = guided_filter(photo.float().to(device), maps.float().to(device), radius=30, eps=1e-7)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.cpu().double(), exact, rtol=0, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, device: torch.device) -> None:
    image, maps = random_case(3, maps=2, dtype=torch.float32)
    image, maps = image.to(device, dtype), maps.to(device, dtype)
    out = guided_filter(image, maps, radius=2)
    assert (out.dtype, out.device.type) == (dtype, device.type)
    torch.testing.assert_close(out, guided_filter(image.double(), maps.double(), radius=2).to(dtype))


def test_batch_equals_singles() -> None:
    image, maps = random_case(4, images=3, maps=2)
    together = guided_filter(image, maps, radius=2)
    alone = [guided_filter(image[i : i + 1], maps[i : i + 1], radius=2) for i in range(3)]
    assert torch.equal(together, torch.cat(alone))


def test_gradients() -> None:
    image, maps = random_case(5, size=(4, 5), maps=2)
    inputs = image.requires_grad_(), maps.requires_grad_()
    assert torch.autograd.gradcheck(lambda i, p: guided_filter(i, p, radius=2, eps=0.1), inputs)


def test_no_maps() -> None:
    image, _ = random_case(6)
    assert guided_filter(image, image[:, :0]).shape == (1, 0, 9, 7)


def test_compiles() -> None:
    image, maps = random_case(7)
    compiled = torch.compile(guided_filter, fullgraph=True, backend="eager")
    assert torch.equal(compiled(image, maps), guided_filter(image, maps))


# ------------------------------------------------------------------------------------------ matting


def two_classes(size=(9, 7)) -> torch.Tensor:
    """Left class 0, right class 2, top background, an unknown zone; class 1 is absent."""
    trimap = torch.full((1, 3, *size), 0.5, dtype=torch.float64)
    trimap[:, 1] = 0
    trimap[:, :, :2] = trimap[:, :, :, :2] = trimap[:, :, :, -2:] = 0
    trimap[:, 0, 2:, :2] = trimap[:, 2, 2:, -2:] = 1
    return trimap


def test_matting_is_a_filtered_trimap() -> None:
    image, _ = random_case(1)
    trimap = two_classes()[:, :1]
    unknown = trimap == 0.5
    alpha = guided_filter_matting(image, trimap, radius=2, eps=1e-3)
    filtered = guided_filter(image, trimap, radius=2, eps=1e-3).clamp(0, 1)
    torch.testing.assert_close(alpha[unknown], filtered[unknown])
    assert torch.equal(alpha[~unknown], trimap[~unknown])


def test_unknown_pixels_start_from_equal_shares_or_from_the_prior() -> None:
    image, prior = random_case(2, maps=3)
    trimap = two_classes()
    unknown = trimap[:, :1] == 0.5
    shares = torch.tensor([1 / 3, 0, 1 / 3], dtype=torch.float64)[None, :, None, None].expand_as(trimap)
    present = torch.tensor([1, 0, 1])[None, :, None, None]
    for given_prior, start in (
        (None, shares),
        (prior, present * prior / (present * prior).sum(1, keepdim=True).clamp(min=1)),
    ):
        alpha = guided_filter_matting(image, trimap, radius=2, eps=1e-2, prior=given_prior)
        out = guided_filter(image, start.where(unknown, trimap), radius=2, eps=1e-2)
        rest = (1 - out.sum(1, keepdim=True)).clamp(min=0)
        expected = out.clamp(min=0) / (out.clamp(min=0).sum(1, keepdim=True) + rest)
        torch.testing.assert_close(alpha, expected.where(unknown, trimap))
        assert not alpha[:, 1].any()


@given(seed=st.integers(0, 10**6), radius=st.integers(1, 9))
def test_mattes_stay_in_range(seed: int, radius: int) -> None:
    image, prior = random_case(seed, maps=3)
    trimap = (random_case(seed + 1, maps=3)[1] * 3).floor() / 2
    alpha = guided_filter_matting(image, trimap, radius=radius, eps=1e-6, prior=prior)
    assert alpha.min() >= 0
    assert alpha.sum(1).max() <= 1 + 1e-9


def test_matting_batch_of_different_images() -> None:
    image, _ = random_case(3, images=3)
    trimap = torch.cat([two_classes(), torch.zeros(1, 3, 9, 7), two_classes().flip(1)]).double()
    together = guided_filter_matting(image, trimap, radius=3)
    alone = [guided_filter_matting(image[i : i + 1], trimap[i : i + 1], radius=3) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-12)
    assert not together[1].any()


def test_matting_without_unknown_or_without_known_pixels() -> None:
    image, prior = random_case(4)
    known = (prior > 0.5).double()
    assert torch.equal(guided_filter_matting(image, known), known)
    nothing = torch.full_like(prior, 0.5)
    torch.testing.assert_close(guided_filter_matting(image, nothing), nothing)
    assert guided_filter_matting(image, prior[:, :0]).shape == (1, 0, 9, 7)


def test_matting_dtypes(device: torch.device) -> None:
    image, _ = random_case(5, dtype=torch.float32)
    exact = guided_filter_matting(image, two_classes().float(), radius=3)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        alpha = guided_filter_matting(image.to(device), two_classes().to(device, dtype), radius=3)
        assert (alpha.dtype, alpha.device.type) == (dtype, device.type)
        torch.testing.assert_close(alpha.cpu().float(), exact, rtol=0, atol=5 * torch.finfo(dtype).eps)


def test_matting_gradients() -> None:
    image, prior = random_case(6, size=(4, 5))
    trimap = torch.full((1, 1, 4, 5), 0.5, dtype=torch.float64)
    trimap[..., 0], trimap[..., -1] = 0, 1
    inputs = image.requires_grad_(), prior.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda i, q: guided_filter_matting(i, trimap, radius=2, eps=0.1, prior=q), inputs
    )


IMAGE, MAPS = random_case(0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: guided_filter(IMAGE[:, :1], MAPS), ValueError, r"image: expected shape \(B, 3, H, W\)"),
        (lambda: guided_filter(IMAGE, MAPS[..., :4]), ValueError, "maps: .* with W=7 from image"),
        (lambda: guided_filter(IMAGE * 255, MAPS), ValueError, r"image: .*divide 8-bit values"),
        (lambda: guided_filter(IMAGE, MAPS.long()), TypeError, "maps: expected a floating-point"),
        (lambda: guided_filter(IMAGE, MAPS * torch.nan), ValueError, "maps: expected finite values"),
        (lambda: guided_filter(IMAGE, MAPS, radius=0), ValueError, "radius: expected an integer >= 1"),
        (lambda: guided_filter(IMAGE, MAPS, radius=2.0), ValueError, "radius: expected an integer"),
        (lambda: guided_filter(IMAGE, MAPS, eps=0), ValueError, "eps: expected a finite number > 0"),
        (lambda: guided_filter_matting(IMAGE, MAPS[0]), ValueError, "trimap: expected shape"),
        (lambda: guided_filter_matting(IMAGE, MAPS.long()), TypeError, "trimap: expected a floating-point"),
        (lambda: guided_filter_matting(IMAGE, MAPS + 1), ValueError, r"trimap: expected values in \[0, 1\]"),
        (lambda: guided_filter_matting(IMAGE, MAPS, radius=0), ValueError, "radius: expected an integer"),
        (
            lambda: guided_filter_matting(IMAGE, MAPS, prior=IMAGE),
            ValueError,
            "prior: .* with C=1 from trimap",
        ),
        (lambda: guided_filter_matting(IMAGE, MAPS, prior=MAPS * 9), ValueError, "prior: expected values"),
    ],
)
def test_errors(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
