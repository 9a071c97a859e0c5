"""Conjugate gradients, the V-cycle, and the derivative of a solution."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pseudolabel.matting import _multigrid
from pseudolabel.matting._cholesky import banded_cholesky
from pseudolabel.matting._multigrid import VCycle, jacobi_step, matrix_of
from pseudolabel.matting._pixels import Pixels, sparse_rows
from pseudolabel.matting._solver import differentiable, solve
from pseudolabel.matting.closed_form import _entries as closed_form_entries
from pseudolabel.matting.random_walk import _entries as random_walk_entries

seeds = st.integers(0, 2**31 - 1)


def spd(seed: int, size: int = 12, spread: float = 2.0) -> tuple[Tensor, torch.Generator]:
    """A symmetric positive definite matrix with eigenvalues from 1 to 10^spread."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    values = torch.logspace(0, spread, size, dtype=torch.float64)
    return basis @ torch.diag(values) @ basis.T, generator


def stencil(
    seed: int = 0, size: tuple[int, int] = (30, 40), share: float = 0.8, kind: str = "closed form"
) -> tuple[Tensor, Pixels]:
    """Rows of a matting Laplacian on some unknown pixels, for float64."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(3, *size, generator=generator, dtype=torch.float64)
    coarse = torch.rand(1, 1, size[0] // 5, size[1] // 5, generator=generator)
    blobs = torch.nn.functional.interpolate(coarse, size, mode="bilinear")[0, 0]
    pixels = Pixels(blobs < blobs.flatten().quantile(share))
    entries = (
        closed_form_entries(image, pixels, 1e-3)
        if kind == "closed form"
        else random_walk_entries(image, pixels, 3.0)
    )
    radius = 2 if kind == "closed form" else 1
    return entries.t().contiguous().masked_fill_(pixels.neighbours(radius) < 0, 0), pixels


def v_cycle(stencil: Tensor, pixels: Pixels, columns: int | None = None) -> VCycle:
    return VCycle(stencil, matrix_of(stencil, pixels), pixels, columns)


def dense(matrix: Tensor) -> Tensor:
    return matrix @ torch.eye(matrix.shape[1], dtype=matrix.dtype)


# ------------------------------------------------------------------------------ conjugate gradients


@given(seed=seeds, columns=st.sampled_from([None, 1, 3]))
def test_solves(seed: int, columns: int | None) -> None:
    matrix, generator = spd(seed)
    shape = (12,) if columns is None else (12, columns)
    rhs = torch.randn(shape, generator=generator, dtype=torch.float64)
    found = solve(lambda x: matrix @ x, rhs, rtol=1e-10)
    torch.testing.assert_close(found.x, torch.linalg.solve(matrix, rhs), rtol=1e-7, atol=1e-7)
    assert found.converged
    assert found.residual <= 1e-10
    assert 0 < found.iterations <= 60


def test_hand_computed_steps() -> None:
    """Two unknowns: two steps, of which the first is steepest descent."""
    matrix, rhs = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([2.0, 1.0])
    one = solve(lambda x: matrix @ x, rhs, max_iter=1)
    torch.testing.assert_close(one.x, 5 / 9 * rhs)  # (r.r) / (r.A r) r
    torch.testing.assert_close(one.residual, torch.tensor([2 - 20 / 9, 1 - 5 / 9]).norm() / 5**0.5)
    assert not one.converged
    two = solve(lambda x: matrix @ x, rhs)
    torch.testing.assert_close(two.x, torch.ones(2))
    assert two.iterations == 2
    assert two.converged


def test_columns_do_not_meet() -> None:
    """A column is solved as if alone; a column of zeros stays so."""
    matrix, generator = spd(0)
    rhs = torch.randn(12, 3, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 1e6, 0.0])
    rhs[:, 0] = matrix @ torch.ones(12, dtype=torch.float64) * 1e-3
    together = solve(lambda x: matrix @ x, rhs, rtol=1e-8)
    for column in range(3):
        alone = solve(lambda x: matrix @ x, rhs[:, column : column + 1], rtol=1e-8)
        torch.testing.assert_close(together.x[:, column : column + 1], alone.x)
    assert together.x[:, 2].eq(0).all()
    assert together.converged


def test_exact_preconditioner_takes_one_step() -> None:
    matrix, generator = spd(0)
    rhs = torch.randn(12, 2, generator=generator, dtype=torch.float64)
    found = solve(lambda x: matrix @ x, rhs, preconditioner=torch.linalg.inv(matrix).matmul, rtol=1e-10)
    assert found.iterations == 1


def test_start() -> None:
    matrix, generator = spd(0)
    rhs = torch.randn(12, generator=generator, dtype=torch.float64)
    solution = torch.linalg.solve(matrix, rhs)
    found = solve(lambda x: matrix @ x, rhs, x0=solution)
    assert found.iterations == 0
    assert found.converged
    assert torch.equal(found.x, solution)
    near = solve(lambda x: matrix @ x, rhs, x0=solution + 1e-3)
    assert near.iterations < solve(lambda x: matrix @ x, rhs).iterations
    start = torch.zeros(12, dtype=torch.float64)
    solve(lambda x: matrix @ x, rhs, x0=start)
    assert start.eq(0).all(), "what came in is left as it was"


def test_slow_convergence_is_told() -> None:
    matrix, generator = spd(0, spread=6)
    rhs = torch.randn(12, 2, generator=generator, dtype=torch.float64)
    found = solve(lambda x: matrix @ x, rhs, rtol=1e-12, max_iter=3)
    assert found.iterations == 3
    assert not found.converged
    residual = (rhs - matrix @ found.x).norm(dim=0) / rhs.norm(dim=0)
    torch.testing.assert_close(found.residual, residual.max())


def test_rounding_is_told() -> None:
    """What float32 cannot reach is not claimed, and not tried for ever."""
    matrix, generator = spd(0, spread=5)
    matrix, rhs = matrix.float(), torch.randn(12, generator=generator)
    found = solve(lambda x: matrix @ x, rhs, rtol=1e-12, max_iter=10_000)
    assert not found.converged
    assert found.iterations < 1000
    assert found.residual < 1e-1
    assert found.x.isfinite().all()


def test_nothing_to_find() -> None:
    found = solve(lambda x: x, torch.zeros(5, 2))
    assert found.x.eq(0).all()
    assert found.converged
    assert found.iterations == 0
    assert found.residual == 0


def test_singular() -> None:
    """With a matrix that has no inverse: solved where it can be, finite everywhere."""
    matrix = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    found = solve(lambda x: matrix @ x, torch.tensor([1.0, -1.0, 0.0]))
    torch.testing.assert_close(found.x, torch.tensor([0.5, -0.5, 0.0]))
    assert found.converged
    impossible = solve(lambda x: matrix @ x, torch.tensor([1.0, 1.0, 1.0]))
    assert impossible.x.isfinite().all()
    assert not impossible.converged
    still = solve(lambda x: 0 * x, torch.ones(3, 2), x0=torch.full((3, 2), 0.5))
    assert still.x.eq(0.5).all()
    assert not still.converged


def test_devices(device: torch.device) -> None:
    matrix, generator = spd(0)
    rhs = torch.randn(12, 2, generator=generator, dtype=torch.float64)
    matrix, there = matrix.to(device), rhs.to(device)
    found = solve(lambda x: matrix @ x, there, rtol=1e-8)
    assert found.x.device.type == device.type
    here = solve(lambda x: matrix.cpu() @ x, rhs, rtol=1e-8)
    torch.testing.assert_close(found.x.cpu(), here.x)
    assert found.iterations.cpu() == here.iterations


# --------------------------------------------------------------------------------------- derivative


def test_derivative() -> None:
    """Against the derivative of the dense solution, to the matrix and to the right side."""
    matrix, generator = spd(0, size=5)
    factor = torch.linalg.cholesky(matrix).requires_grad_()
    rhs = torch.randn(5, 2, generator=generator, dtype=torch.float64, requires_grad=True)

    def ours(factor: Tensor, rhs: Tensor) -> Tensor:
        matrix = factor @ factor.T
        run = lambda b: solve(lambda x: matrix.detach() @ x, b, rtol=1e-13).x  # noqa: E731
        x = run(rhs.detach())
        return differentiable(x, matrix @ x - rhs, run)

    assert torch.autograd.gradcheck(ours, (factor, rhs))
    weight = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    got = torch.autograd.grad((ours(factor, rhs) * weight).sum(), (factor, rhs))
    direct = torch.linalg.solve(factor @ factor.T, rhs)
    for one, other in zip(got, torch.autograd.grad((direct * weight).sum(), (factor, rhs)), strict=True):
        torch.testing.assert_close(one, other)


# ------------------------------------------------------------------------------- pixels and V-cycle


def test_pixels() -> None:
    active = torch.tensor([[0, 1, 0], [1, 1, 0]], dtype=torch.bool)
    pixels = Pixels(active)
    assert len(pixels) == 3
    assert [part.tolist() for part in pixels.rows_and_columns()] == [[0, 1, 1], [1, 0, 1]]
    assert pixels.neighbours(1).tolist() == [
        [-1, -1, -1, -1, 0, -1, 1, 2, -1],
        [-1, -1, 0, -1, 1, 2, -1, -1, -1],
        [-1, 0, -1, 1, 2, -1, -1, -1, -1],
    ]
    maps = torch.arange(12.0).view(2, 2, 3)
    assert pixels.pick(maps).tolist() == [[1, 7], [3, 9], [4, 10]]
    assert torch.equal(pixels.put(maps, pixels.pick(maps)), maps)
    assert pixels.put(maps, torch.zeros(3, 2)).tolist() == [[[0, 0, 2], [0, 0, 5]], [[6, 0, 8], [0, 0, 11]]]


def test_sparse_rows_sum_what_they_hold_twice() -> None:
    matrix = sparse_rows(
        torch.tensor([[0, 0], [2, 1]], dtype=torch.int32), torch.tensor([[1.0, 2], [3, 4]]), 3
    )
    assert dense(matrix).tolist() == [[3, 0, 0], [0, 4, 3]]
    assert (matrix @ torch.tensor([1.0, 10, 100])).tolist() == [3, 340]


LAST_LEVELS = ("cholesky", "dense")


@pytest.fixture(params=LAST_LEVELS)
def last_level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last level as on a CPU, and as on an accelerator; the finest one is never the last."""
    monkeypatch.setattr(_multigrid, "MOST_WORK", (0, 3e7))
    if request.param == "dense":
        monkeypatch.setattr(_multigrid, "is_narrow", lambda _: False)


@pytest.mark.usefixtures("last_level")
@pytest.mark.parametrize("kind", ["closed form", "random walk"])
def test_levels_are_galerkin_products(kind: str) -> None:
    """Each level's matrix is P^T A P of the level before, P bilinear interpolation cut to the pixels."""
    entries, pixels = stencil(kind=kind)
    cycle = v_cycle(entries, pixels)
    assert cycle.levels
    torch.testing.assert_close(dense(cycle.levels[0].matrix), dense(matrix_of(entries, pixels)))
    for level, matrix in zip(
        cycle.levels, [*(coarse.matrix for coarse in cycle.levels[1:]), None], strict=True
    ):
        up, down = dense(level.up), dense(level.down)
        torch.testing.assert_close(up, down.T)
        torch.testing.assert_close(up.sum(1), torch.ones(len(up), dtype=up.dtype))
        product = down @ dense(level.matrix) @ up
        if matrix is None:
            shifted = product + 2**-26 * torch.diag(product.diagonal())
            identity = torch.eye(len(product), dtype=product.dtype)
            torch.testing.assert_close(cycle.last(shifted), identity, atol=1e-8, rtol=0)
        else:
            torch.testing.assert_close(dense(matrix), product, atol=1e-12, rtol=1e-10)


def test_interpolation_is_bilinear() -> None:
    """On a whole grid a linear function on coarse pixels stays linear."""
    pixels = Pixels(torch.ones(9, 12, dtype=torch.bool))
    _, up, coarse = _multigrid._transfer(pixels, torch.float64)
    row, column = coarse.rows_and_columns()
    fine_row, fine_column = pixels.rows_and_columns()
    linear = (3 * row + 5 * column).double()
    torch.testing.assert_close(up @ linear, (3 * fine_row + 5 * fine_column).double() / 2)


@given(seed=seeds, share=st.floats(0.3, 1), kind=st.sampled_from(["closed form", "random walk"]))
@pytest.mark.usefixtures("last_level")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_cycle_is_symmetric_and_positive(seed: int, share: float, kind: str) -> None:
    entries, pixels = stencil(seed, (24, 33), share, kind)
    cycle = v_cycle(entries, pixels)
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, len(pixels), generator=generator, dtype=torch.float64)
    torch.testing.assert_close(cycle(x) @ y, x @ cycle(y))
    assert cycle(x) @ x > 0
    step = jacobi_step(entries)
    assert (step > 0).all()
    torch.testing.assert_close(v_cycle(entries, pixels, 2)(torch.stack([x, y], 1))[:, 1], cycle(y))


def test_cycle_beats_jacobi() -> None:
    """On a smooth image with a wide unknown zone, where labels have a long way to go."""
    y, x = torch.meshgrid(torch.linspace(0, 1, 60), torch.linspace(0, 1, 80), indexing="ij")
    image = torch.stack([x * y, (3 * x).sin(), (2 * y).cos()]).double()
    active = torch.ones(60, 80, dtype=torch.bool)
    active[:, 0] = active[:, -1] = False
    pixels = Pixels(active)
    entries = closed_form_entries(image, pixels, 1e-3).t().contiguous()
    entries = entries.masked_fill_(pixels.neighbours(2) < 0, 0)
    matrix, step = matrix_of(entries, pixels), jacobi_step(entries)
    rhs = torch.ones(len(pixels), dtype=torch.float64)
    cycle = solve(lambda x: matrix @ x, rhs, preconditioner=v_cycle(entries, pixels), rtol=1e-6)
    jacobi = solve(lambda x: matrix @ x, rhs, preconditioner=lambda r: step * r, rtol=1e-6, max_iter=1000)
    assert cycle.converged
    assert cycle.iterations < jacobi.iterations / 10
    torch.testing.assert_close(cycle.x, jacobi.x, rtol=0, atol=1e-3 * float(cycle.x.abs().max()))


def test_jacobi_steps_never_grow_an_error() -> None:
    """2 D - A is positive definite, where plain damping would not do."""
    for kind in ("closed form", "random walk"):
        entries, pixels = stencil(3, (12, 14), kind=kind)
        matrix = dense(matrix_of(entries, pixels))
        assert torch.linalg.eigvalsh(2 * torch.diag(1 / jacobi_step(entries)) - matrix).min() > -1e-10
    # A matrix whose plain step would grow: off-diagonal entries as large as the diagonal.
    entries = torch.tensor(
        [[0.0, 0, 0, 0, 1, 0.9, 0, 0, 0], [0, 0, 0, 0.9, 1, 0.9, 0, 0, 0], [0, 0, 0, 0.9, 1, 0, 0, 0, 0]]
    )
    matrix = torch.tensor([[1.0, 0.9, 0], [0.9, 1, 0.9], [0, 0.9, 1]])
    assert torch.linalg.eigvalsh(2 * torch.diag(1 / jacobi_step(entries)) - matrix).min() > -1e-6
    assert torch.linalg.eigvalsh(2 * torch.eye(3) / 0.8 - matrix).min() > 0.2
    assert jacobi_step(torch.zeros(2, 9)).eq(0).all()


@pytest.mark.usefixtures("last_level")
def test_singular_last_level() -> None:
    """A matrix of zeros has no inverse: nothing is made of nothing, and nothing is infinite."""
    pixels = Pixels(torch.ones(4, 5, dtype=torch.bool))
    assert v_cycle(torch.zeros(20, 9), pixels)(torch.ones(20)).eq(0).all()
    constant = torch.full((20, 9), -1.0).masked_fill(pixels.neighbours(1) < 0, 0)
    constant[:, 4] = 0
    constant[:, 4] = -constant.sum(1)  # all of its rows sum to 0
    assert v_cycle(constant, pixels)(torch.randn(20)).isfinite().all()


# ----------------------------------------------------------------------------------------- Cholesky


def ring(size: int = 60, inner: float = 20, outer: float = 24) -> Pixels:
    """A band that bends."""
    y, x = torch.meshgrid(torch.arange(size) - size / 2, torch.arange(size) - size / 2, indexing="ij")
    radius = (y**2 + x**2).sqrt()
    return Pixels((radius > inner) & (radius < outer))


@pytest.mark.parametrize("columns", [None, 1, 3])
def test_banded_cholesky(columns: int | None) -> None:
    pixels = ring()
    image = torch.rand(3, 60, 60, dtype=torch.float64)
    entries = closed_form_entries(image, pixels, 1e-3).t().contiguous()
    entries = entries.masked_fill_(pixels.neighbours(2) < 0, 0)
    solver = banded_cholesky(entries, pixels, most_work=1e9)
    rhs = torch.randn((len(pixels),) if columns is None else (len(pixels), columns), dtype=torch.float64)
    before = rhs.clone()
    torch.testing.assert_close(matrix_of(entries, pixels) @ solver(rhs), rhs)
    assert torch.equal(rhs, before)
    assert len(solver.factor) < 60, "few diagonals, though the band bends"
    assert banded_cholesky(entries, pixels, most_work=1e4) is None


def test_banded_cholesky_of_what_is_not_definite() -> None:
    pixels = Pixels(torch.ones(4, 5, dtype=torch.bool))
    assert banded_cholesky(torch.zeros(20, 9), pixels, most_work=1e9) is None


def test_banded_cholesky_of_separate_pixels() -> None:
    active = torch.zeros(9, 9, dtype=torch.bool)
    active[::4, ::4] = True
    pixels = Pixels(active)
    entries = torch.zeros(len(pixels), 25)
    entries[:, 12] = torch.arange(1.0, 1 + len(pixels))
    solver = banded_cholesky(entries, pixels, most_work=1e9)
    torch.testing.assert_close(solver(entries[:, 12]), torch.ones(len(pixels)))
