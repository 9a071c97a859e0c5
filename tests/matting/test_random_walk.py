"""Random-walk matting. What it shares with closed-form matting is tested there."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pseudolabel.matting import MattingReport, random_walk_matting
from pseudolabel.matting._pixels import Pixels
from pseudolabel.matting._stencil import stencil_laplacian
from pseudolabel.matting.random_walk import _entries

seeds = st.integers(0, 2**31 - 1)
EXACT = {"rtol": 1e-12, "max_iter": 2000}


def laplacian(guidance: Tensor, beta: float) -> Tensor:
    """The dense Laplacian (HW,HW), pair by pair."""
    _, height, width = guidance.shape
    weights = guidance.new_zeros(height * width, height * width)
    for y in range(height):
        for x in range(width):
            for dy, dx in ((0, 1), (1, -1), (1, 0), (1, 1)):
                if y + dy < height and 0 <= x + dx < width:
                    distance = (guidance[:, y, x] - guidance[:, y + dy, x + dx]).square().sum()
                    i, j = y * width + x, (y + dy) * width + x + dx
                    weights[i, j] = weights[j, i] = torch.exp(-beta * distance) + 1e-6
    return torch.diag(weights.sum(1)) - weights


def case(
    seed: int = 0, classes: int = 2, size: tuple[int, int] = (9, 8), channels: int = 3
) -> tuple[Tensor, Tensor]:
    """Random guidance (1,D,H,W), and a trimap (1,C,H,W) with a few seeds of each class and of background."""
    generator = torch.Generator().manual_seed(seed)
    guidance = torch.rand(1, channels, *size, generator=generator, dtype=torch.float64)
    trimap = torch.full((1, classes, size[0] * size[1]), 0.5, dtype=torch.float64)
    places = torch.randperm(size[0] * size[1], generator=generator)[: 3 * (classes + 1)].view(-1, 3)
    trimap[..., places.flatten()] = 0
    for number in range(classes):
        trimap[:, number, places[number]] = 1
    return guidance, trimap.view(1, classes, *size)


@pytest.mark.parametrize("channels", [1, 3, 7])
def test_equals_the_dense_laplacian(channels: int) -> None:
    guidance, _ = case(channels=channels)
    pixels = Pixels(torch.ones(9, 8, dtype=torch.bool))
    operator = stencil_laplacian(_entries(guidance[0], pixels, 2.0), pixels, None, 3, "jacobi")
    matrix = laplacian(guidance[0], 2.0)
    x = torch.randn(72, 3, dtype=torch.float64)
    torch.testing.assert_close(operator.matvec(x), matrix @ x)
    torch.testing.assert_close(operator.rows(x.T.reshape(3, 9, 8)), matrix @ x)


@given(seed=seeds, classes=st.integers(1, 4), beta=st.sampled_from([0.0, 1.0, 30.0]))
def test_equals_the_dense_solution(seed: int, classes: int, beta: float) -> None:
    guidance, trimap = case(seed, classes)
    u = (trimap[0] == 0.5).all(0).flatten()
    matrix, x = laplacian(guidance[0], beta), trimap[0].flatten(1).T.clone()
    x[u] = torch.linalg.solve(matrix[u][:, u], -matrix[u][:, ~u] @ x[~u])
    alpha = random_walk_matting(guidance, trimap, beta=beta, **EXACT)[0]
    torch.testing.assert_close(alpha, x.T.view_as(alpha), rtol=0, atol=1e-7)


@given(seed=seeds, classes=st.integers(1, 4))
def test_in_range_and_sums(seed: int, classes: int) -> None:
    """Of themselves: nothing has to be cut off."""
    guidance, trimap = case(seed, classes)
    from pseudolabel.matting import _system

    clipped = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_system, "_clip", lambda x: clipped.append(x) or x)
        random_walk_matting(guidance, trimap, beta=5, **EXACT)
    (raw,) = clipped
    assert raw.min() >= -1e-9
    assert raw.sum(1).max() <= 1 + 1e-9


def test_hand_computed() -> None:
    """A line of like pixels with seeds at its ends: chances fall in a straight line."""
    guidance, trimap = torch.zeros(1, 2, 1, 5), torch.tensor([[[[1.0, 0.5, 0.5, 0.5, 0.0]]]])
    alpha = random_walk_matting(guidance, trimap, rtol=1e-6)
    torch.testing.assert_close(alpha, torch.tensor([[[[1, 0.75, 0.5, 0.25, 0]]]]))


def test_walks_stop_at_edges() -> None:
    guidance = torch.zeros(1, 1, 8, 20)
    guidance[..., 13:] = 1
    trimap = torch.full((1, 1, 8, 20), 0.5)
    trimap[..., 0], trimap[..., -1] = 1, 0
    alpha, report = random_walk_matting(guidance, trimap, return_report=True)
    assert alpha[..., :13].min() > 0.99
    assert alpha[..., 13:].max() < 0.01
    assert isinstance(report, MattingReport)
    assert report.converged.all()
    assert report.residual <= 1e-4


def test_pixels_cut_off_by_their_colour() -> None:
    """Likeness may be 0 in float32: there is an answer all the same."""
    guidance = torch.zeros(1, 3, 9, 9)
    guidance[..., 4, 4] = 1
    trimap = torch.full((1, 1, 9, 9), 0.5)
    trimap[..., 0], trimap[..., -1] = 1, 0
    for preconditioner in ("v-cycle", "jacobi"):
        alpha = random_walk_matting(guidance, trimap, beta=1e4, preconditioner=preconditioner, rtol=1e-6)
        torch.testing.assert_close(alpha[..., 4, 4], torch.tensor([[0.5]]), rtol=0, atol=1e-2)


@pytest.mark.parametrize("classes", [1, 3])
def test_preconditioners_agree(classes: int) -> None:
    guidance, trimap = case(1, classes, (40, 50))
    expected = random_walk_matting(guidance, trimap, beta=3, preconditioner="jacobi", **EXACT)
    found = random_walk_matting(guidance, trimap, beta=3, preconditioner="v-cycle", **EXACT)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("size", [(1, 6), (6, 1), (2, 3), (1, 1)])
def test_small_images(size: tuple[int, int]) -> None:
    trimap = torch.full((1, 1, *size), 0.5)
    trimap[..., 0, 0] = 1
    torch.testing.assert_close(random_walk_matting(torch.rand(1, 3, *size), trimap), torch.ones(1, 1, *size))


def test_gradcheck() -> None:
    """To the guidance, the seeds, the prior and its confidence."""
    guidance, trimap = case(0, 2, (5, 4))
    soft = trimap.where(trimap == 0.5, 0.02 + 0.94 * trimap)
    prior = torch.rand(1, 2, 5, 4, dtype=torch.float64) / 3
    weight = torch.rand(1, 5, 4, dtype=torch.float64) + 0.1

    def call(guidance: Tensor, trimap: Tensor, prior: Tensor, weight: Tensor) -> Tensor:
        return random_walk_matting(
            guidance, trimap, beta=2, prior=prior, prior_weight=weight, rtol=1e-13, max_iter=500
        )

    assert torch.autograd.gradcheck(call, [each.requires_grad_() for each in (guidance, soft, prior, weight)])


def test_prior_and_start() -> None:
    guidance, trimap = case()
    prior = torch.rand(1, 2, 9, 8, dtype=torch.float64) / 2
    alpha = random_walk_matting(guidance, trimap, prior=prior, prior_weight=1e9)
    torch.testing.assert_close(alpha[trimap == 0.5], prior[trimap == 0.5])
    cold = random_walk_matting(guidance, trimap)
    _, report = random_walk_matting(guidance, trimap, x0=cold, return_report=True)
    assert report.iterations == 0


def test_batch_equals_singles() -> None:
    guidance, trimap = (torch.cat(each) for each in zip(case(0), case(1), strict=True))
    alpha = random_walk_matting(guidance, trimap, beta=3)
    for number in range(2):
        some = slice(number, number + 1)
        assert torch.equal(alpha[some], random_walk_matting(guidance[some], trimap[some], beta=3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    guidance, trimap = case()
    guidance = guidance.to(dtype)
    alpha = random_walk_matting(guidance, trimap.to(dtype), beta=3)
    assert alpha.dtype == dtype
    exact = random_walk_matting(guidance.double(), trimap, beta=3, rtol=1e-8)
    torch.testing.assert_close(alpha.double(), exact, rtol=0, atol=4e-3)


def test_devices(device: torch.device) -> None:
    guidance, trimap = (each.float() for each in case())
    alpha = random_walk_matting(guidance.to(device), trimap.to(device), beta=3, rtol=1e-6)
    assert alpha.device.type == device.type
    expected = random_walk_matting(guidance, trimap, beta=3, rtol=1e-6)
    torch.testing.assert_close(alpha.cpu(), expected, rtol=0, atol=1e-4)


GUIDANCE, TRIMAP = torch.rand(1, 4, 6, 7), torch.full((1, 2, 6, 7), 0.5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: random_walk_matting(GUIDANCE[0], TRIMAP),
            ValueError,
            r"guidance: expected shape \(B, D, H, W\)",
        ),
        (lambda: random_walk_matting(GUIDANCE, TRIMAP[..., 1:]), ValueError, "trimap: .* W=7 from guidance"),
        (
            lambda: random_walk_matting(GUIDANCE.long(), TRIMAP),
            TypeError,
            "guidance: expected a floating-point",
        ),
        (lambda: random_walk_matting(GUIDANCE / 0, TRIMAP), ValueError, "guidance: expected finite values"),
        (
            lambda: random_walk_matting(GUIDANCE, 3 * TRIMAP),
            ValueError,
            r"trimap: expected values in \[0, 1\]",
        ),
        (
            lambda: random_walk_matting(GUIDANCE, TRIMAP, beta=-1),
            ValueError,
            "beta: expected a finite number >= 0",
        ),
        (
            lambda: random_walk_matting(GUIDANCE, TRIMAP, rtol=-1),
            ValueError,
            "rtol: expected a finite number > 0",
        ),
        (
            lambda: random_walk_matting(GUIDANCE, TRIMAP, max_iter=1.5),
            ValueError,
            "max_iter: expected an integer",
        ),
        (
            lambda: random_walk_matting(GUIDANCE, TRIMAP, preconditioner="none"),
            ValueError,
            "preconditioner: expected one of",
        ),
    ],
)
def test_errors(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


def test_settings_are_checked_without_a_prior() -> None:
    guidance, trimap = torch.rand(1, 3, 4, 4), torch.full((1, 1, 4, 4), 0.5)
    with pytest.raises(ValueError, match=r"prior_weight: expected a finite number >= 0, got nan"):
        random_walk_matting(guidance, trimap, prior_weight=torch.nan)
    with pytest.raises(ValueError, match=r"guidance: expected at least one channel"):
        random_walk_matting(guidance[:, :0], trimap)
