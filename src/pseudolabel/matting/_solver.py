"""Preconditioned conjugate gradients, and the derivative of what they find.

    solve(matvec, rhs, preconditioner=..., x0=..., rtol=..., max_iter=...) -> Solution
    differentiable(x, residual, solve) -> x with a gradient

Vectors are (N,), or columns (N,K): the N unknowns of one image, and K classes that share its matrix.
``matvec`` and ``preconditioner`` map them to new ones of the same shape, linearly and symmetrically. Every
column takes its own steps and stops on its own. A batch is solved image by image: each converges in its own
time, and none changes another's result.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["LinearMap", "Solution", "differentiable", "solve"]

LinearMap = Callable[[Tensor], Tensor]


class Solution(NamedTuple):
    """What `solve` found, and how well."""

    x: Tensor
    """Like ``rhs``, finite."""
    iterations: Tensor
    """() int64, steps of the slowest column; up to 7 more on an accelerator, which is asked every 8 steps."""
    residual: Tensor
    """(), `|rhs - A x| / |rhs|` of the worst column; where ``rhs`` is 0, relative to that of the start."""
    converged: Tensor
    """() bool, whether every column reached ``rtol``."""


def solve(
    matvec: LinearMap,
    rhs: Tensor,
    *,
    preconditioner: LinearMap | None = None,
    x0: Tensor | None = None,
    rtol: float = 1e-4,
    max_iter: int = 200,
) -> Solution:
    """Solve `A x = rhs` for a symmetric positive (semi)definite A, to `|rhs - A x| <= rtol |rhs|`.

    Never raises for slow convergence: the last iterate comes back with a flag. A column whose search breaks
    down (a direction without curvature, as in a singular system that rounding has made inconsistent) stops
    where it is. On an accelerator the only synchronisation is one look at the flags every eight steps.
    """
    x = torch.zeros_like(rhs) if x0 is None else x0.clone()
    r = rhs.clone() if x0 is None else rhs - matvec(x)
    left = _norm(r)
    size = _norm(rhs)
    size = size.where(size > 0, left)
    steps, before = 0, torch.full_like(left, torch.inf)
    # The residual that the steps carry along drifts from the true one. Start again with that, until it is
    # small or rounding keeps it from halving.
    while steps < max_iter and bool(((left > rtol * size) & (left < before / 2)).any()):
        steps += _descend(matvec, preconditioner, x, r, goal=rtol * size, max_iter=max_iter - steps)
        r = rhs - matvec(x)
        left, before = _norm(r), left
    residual = (left / size).where(size > 0, 0)
    return Solution(x, torch.tensor(steps, device=x.device), residual.max(), (residual <= rtol).all())


def _descend(
    matvec: LinearMap,
    preconditioner: LinearMap | None,
    x: Tensor,
    r: Tensor,
    *,
    goal: Tensor,
    max_iter: int,
) -> int:
    """Take steps until the residual of each column is at its goal. Changes x and r; returns the steps."""
    look_every = 1 if x.device.type == "cpu" else 8
    p, rz = torch.zeros_like(x), torch.ones_like(goal)
    active = _norm(r) > goal
    for step in range(1, max_iter + 1):
        z = r if preconditioner is None else preconditioner(r)
        rz_before, rz = rz, _dot(r, z)
        p = p.mul_((rz / rz_before).where(active, 0)).add_(z)
        q = matvec(p)
        curvature = _dot(p, q)
        active = active & (curvature > 0)
        length = (rz / curvature).where(active, 0)
        x.addcmul_(length, p)
        r.addcmul_(length, q, value=-1)
        active = active & (_norm(r) > goal)
        if step % look_every == 0 and not bool(active.any()):
            return step
    return max_iter


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return torch.dot(x, y) if x.ndim == 1 else (x * y).sum(0)


def _norm(x: Tensor) -> Tensor:
    return _dot(x, x).sqrt()


def differentiable(x: Tensor, residual: Tensor, solve: LinearMap) -> Tensor:
    """Give the solution of `A x = b` the gradient that belongs to it, without a graph of the steps.

    From `A x - b = 0` follows `A dx = -d(A x - b)`, the right side at a fixed x. So a gradient g of x becomes
    the gradient `-A^-1 g` of the residual, whose own graph leads on to whatever A and b were made of.

    Args:
        x: The solution, without a graph.
        residual: `A x - b` computed from ``x``, with a graph to what A and b depend on.
        solve: Solves `A y = g` (A is symmetric).
    """
    result: Tensor = _Implicit.apply(residual, x, solve)  # type: ignore[no-untyped-call]
    return result


class _Implicit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, x: Tensor, solve: LinearMap) -> Tensor:  # noqa: ARG004
        ctx.solve = solve
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return -ctx.solve(gradient), None, None
