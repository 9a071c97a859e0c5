"""Large-kernel matting. What it shares with closed-form matting is tested there."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pseudolabel.matting import closed_form_matting, large_kernel_matting
from pseudolabel.matting._pixels import Pixels
from pseudolabel.matting.large_kernel import _laplacian

seeds = st.integers(0, 2**31 - 1)
EXACT = {"rtol": 1e-12, "max_iter": 2000}


def laplacian(image: Tensor, radius: int, eps: float) -> Tensor:
    """The dense Laplacian (HW,HW), window by window, windows cut off at the border."""
    _, height, width = image.shape
    colours, index = image.flatten(1).T, torch.arange(height * width).view(height, width)
    matrix = image.new_zeros(height * width, height * width)
    for y in range(height):
        for x in range(width):
            window = index[max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1].flatten()
            count = len(window)
            centred = colours[window] - colours[window].mean(0)
            ridge = eps / (2 * radius + 1) ** 2 * torch.eye(3, dtype=image.dtype)
            fit = (1 + centred @ torch.linalg.inv(centred.T @ centred / count + ridge) @ centred.T) / count
            matrix[window[:, None], window] += torch.eye(count, dtype=image.dtype) - fit
    return matrix


def smooth(seed: int, channels: int, size: tuple[int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(1, channels, 4, 4, generator=generator, dtype=torch.float64)
    noise = torch.rand(1, channels, *size, generator=generator, dtype=torch.float64)
    return 0.9 * torch.nn.functional.interpolate(small, size, mode="bicubic").clamp(0, 1) + 0.1 * noise


def case(seed: int = 0, classes: int = 1, size: tuple[int, int] = (11, 9)) -> tuple[Tensor, Tensor]:
    """An image, and a trimap of stripes of the classes, with an unknown zone around their ends."""
    label = torch.arange(size[1]) * (classes + 1) // size[1]
    known = torch.ones(size, dtype=torch.bool)
    known[2:-2, 1:-1] = (
        torch.rand(size[0] - 4, size[1] - 2, generator=torch.Generator().manual_seed(seed)) < 0.2
    )
    trimap = torch.stack([(label == number + 1).expand(size) for number in range(classes)]).double()
    return smooth(seed, 3, size), trimap.where(known, 0.5)[None]


def dense_mattes(matrix: Tensor, trimap: Tensor) -> Tensor:
    u = ((trimap != 1).all(0) & (trimap != 0).any(0)).flatten()
    x = trimap.where(trimap == 1, 0).flatten(1).T.clone()
    x[u] = torch.linalg.solve(matrix[u][:, u], -matrix[u][:, ~u] @ x[~u])
    return x.T.view_as(trimap)


@pytest.mark.parametrize("radius", [1, 2, 5, 20])
@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_equals_the_dense_laplacian(radius: int, eps: float) -> None:
    image, _ = case()
    pixels = Pixels(torch.ones(11, 9, dtype=torch.bool))
    operator = _laplacian(image[0], pixels, None, radius, eps)
    matrix = laplacian(image[0], radius, eps)
    x = torch.randn(99, 2, dtype=torch.float64)
    torch.testing.assert_close(operator.matvec(x), matrix @ x, rtol=1e-8, atol=1e-7)
    torch.testing.assert_close(operator.rows(x.T.reshape(2, 11, 9)), matrix @ x, rtol=1e-8, atol=1e-7)
    torch.testing.assert_close(operator.matvec(x[:, 0].contiguous()), matrix @ x[:, 0], rtol=1e-8, atol=1e-7)


@pytest.mark.parametrize("radius", [1, 2, 3])
@pytest.mark.parametrize("corner", [(0, 0), (14, 0), (9, 15), (20, 26)])
def test_part_of_the_image_suffices(radius: int, corner: tuple[int, int]) -> None:
    """The rows of some pixels need no more than what is near, at borders as well as inside."""
    image = smooth(0, 3, (24, 30))[0]
    active = torch.zeros(24, 30, dtype=torch.bool)
    active[corner[0] : corner[0] + 4, corner[1] : corner[1] + 4] = True
    confidence = torch.rand(int(active.sum()), dtype=torch.float64)
    operator = _laplacian(image, Pixels(active), confidence, radius, 1e-4)
    matrix, u = laplacian(image, radius, 1e-4), active.flatten()
    x = torch.randn(720, dtype=torch.float64)
    expected = matrix[u][:, u] @ x[u] + confidence * x[u]
    torch.testing.assert_close(operator.matvec(x[u]), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(operator.rows(x.view(1, 24, 30))[:, 0], (matrix @ x)[u], rtol=1e-6, atol=1e-6)


@given(seed=seeds, classes=st.integers(1, 3), radius=st.sampled_from([1, 2, 4]))
def test_equals_the_dense_solution(seed: int, classes: int, radius: int) -> None:
    image, trimap = case(seed, classes)
    expected = dense_mattes(laplacian(image[0], radius, 1e-2), trimap[0])
    for levels in (0, 2):
        raw, report = large_kernel_matting(
            image,
            trimap,
            radius=radius,
            eps=1e-2,
            coarse_levels=levels,
            clip=False,
            return_report=True,
            **EXACT,
        )
        torch.testing.assert_close(raw[0], expected, rtol=0, atol=1e-6)
        assert report.converged.all()


def test_smallest_windows_are_those_of_closed_form() -> None:
    """Away from the border, where only this one has windows that are cut off."""
    image, trimap = case(size=(12, 14))
    trimap[..., :2], trimap[..., -2:], trimap[..., :2, :], trimap[..., -2:, :] = 1, 0, 0, 0
    torch.testing.assert_close(
        large_kernel_matting(image, trimap, radius=1, clip=False, **EXACT),
        closed_form_matting(image, trimap, clip=False, **EXACT),
        rtol=0,
        atol=1e-6,
    )


def test_wide_windows_need_fewer_steps() -> None:
    image = smooth(0, 3, (48, 64))
    trimap = torch.full((1, 1, 48, 64), 0.5, dtype=torch.float64)
    trimap[..., :4], trimap[..., -4:] = 1, 0
    steps = []
    for radius in (1, 8):
        _, report = large_kernel_matting(
            image, trimap, radius=radius, coarse_levels=0, max_iter=2000, return_report=True
        )
        assert report.converged
        steps.append(int(report.iterations))
    assert steps[1] < steps[0] / 4
    start = large_kernel_matting(image, trimap, radius=8, coarse_levels=2, return_report=True)[1]
    assert start.iterations < steps[1]


def test_mattes_in_range() -> None:
    image, trimap = case(classes=3)
    alpha = large_kernel_matting(image, trimap, radius=3)
    assert alpha.min() >= 0
    assert alpha.sum(1).max() <= 1 + 1e-12
    assert torch.equal(alpha[trimap == 1], torch.ones_like(alpha[trimap == 1]))


@pytest.mark.parametrize("classes", [1, 2])
def test_gradcheck(classes: int) -> None:
    image, trimap = case(0, classes, (7, 6))
    soft = trimap.where(trimap == 0.5, 0.02 + 0.94 * trimap)
    prior = torch.rand_like(trimap) / 3
    weight = torch.rand_like(trimap[:, 0]) + 0.1

    def call(image: Tensor, trimap: Tensor, prior: Tensor, weight: Tensor) -> Tensor:
        return large_kernel_matting(
            image,
            trimap,
            radius=2,
            eps=0.5,
            prior=prior,
            prior_weight=weight,
            coarse_levels=0,
            clip=False,
            rtol=1e-13,
            max_iter=500,
        )

    arguments = [each.requires_grad_() for each in (0.1 + 0.8 * image, soft, prior, weight)]
    assert torch.autograd.gradcheck(call, arguments, fast_mode=True)


def test_prior_at_the_limit() -> None:
    image, trimap = case()
    prior, weight = torch.rand_like(trimap), torch.full_like(trimap[:, 0], 1e9)
    alpha = large_kernel_matting(image, trimap, radius=2, prior=prior, prior_weight=weight)
    torch.testing.assert_close(alpha[trimap == 0.5], prior[trimap == 0.5], rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(1, 6), (6, 1), (2, 3), (1, 1)])
def test_small_images(size: tuple[int, int]) -> None:
    trimap = torch.full((1, 1, *size), 0.5)
    trimap[..., 0, 0] = 1
    torch.testing.assert_close(large_kernel_matting(torch.rand(1, 3, *size), trimap), torch.ones(1, 1, *size))


def test_nothing_known_and_nothing_unknown() -> None:
    image, trimap = case(classes=2)
    assert large_kernel_matting(image, torch.full_like(trimap, 0.5)).eq(1 / 3).all()
    known = trimap.where(trimap != 0.5, 0)
    assert torch.equal(large_kernel_matting(image, known), known)
    assert large_kernel_matting(image, 0 * trimap).eq(0).all()


def test_slow_convergence_is_told() -> None:
    image, trimap = case(size=(20, 20))
    _, report = large_kernel_matting(image, trimap, radius=2, max_iter=1, coarse_levels=0, return_report=True)
    assert report.iterations == 1
    assert not report.converged


def test_batch_equals_singles() -> None:
    image, trimap = (torch.cat(each) for each in zip(case(0, 2), case(1, 2), strict=True))
    alpha = large_kernel_matting(image, trimap, radius=2)
    for number in range(2):
        some = slice(number, number + 1)
        assert torch.equal(alpha[some], large_kernel_matting(image[some], trimap[some], radius=2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    image, trimap = case(classes=2)
    image = image.to(dtype)
    alpha = large_kernel_matting(image, trimap.to(dtype), radius=2)
    assert alpha.dtype == dtype
    exact = large_kernel_matting(image.double(), trimap, radius=2)
    torch.testing.assert_close(alpha.double(), exact, rtol=0, atol=4e-3)


def test_devices(device: torch.device) -> None:
    image, trimap = case(classes=2)
    alpha = large_kernel_matting(image.to(device), trimap.to(device), radius=2, rtol=1e-8)
    assert alpha.device.type == device.type
    expected = large_kernel_matting(image, trimap, radius=2, rtol=1e-8)
    torch.testing.assert_close(alpha.cpu(), expected, rtol=0, atol=1e-5)


IMAGE, TRIMAP = torch.rand(1, 3, 6, 7), torch.full((1, 2, 6, 7), 0.5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: large_kernel_matting(IMAGE[0], TRIMAP), ValueError, r"image: expected shape \(B, 3, H, W\)"),
        (lambda: large_kernel_matting(IMAGE, TRIMAP[..., 1:]), ValueError, "trimap: .* with W=7 from image"),
        (lambda: large_kernel_matting(IMAGE.long(), TRIMAP), TypeError, "image: expected a floating-point"),
        (lambda: large_kernel_matting(9 * IMAGE, TRIMAP), ValueError, r"image: expected values in \[0, 1\]"),
        (
            lambda: large_kernel_matting(IMAGE, TRIMAP, radius=0),
            ValueError,
            "radius: expected an integer >= 1",
        ),
        (lambda: large_kernel_matting(IMAGE, TRIMAP, eps=0), ValueError, "eps: expected a finite number > 0"),
        (
            lambda: large_kernel_matting(IMAGE, TRIMAP, rtol=0),
            ValueError,
            "rtol: expected a finite number > 0",
        ),
        (
            lambda: large_kernel_matting(IMAGE, TRIMAP, coarse_levels=-1),
            ValueError,
            "coarse_levels: expected an integer >= 0, got -1",
        ),
        (
            lambda: large_kernel_matting(IMAGE, TRIMAP, prior=3 * TRIMAP),
            ValueError,
            "prior: expected values in",
        ),
    ],
)
def test_errors(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
