"""From trimaps to systems of equations and back: what the methods that solve for mattes do alike.

With the present classes and a rest as labels, seeds M on the known pixels K, a matting Laplacian L, and
possibly a prior Q with confidence Lambda, the mattes X of the unknown pixels U solve

    (L_UU + Lambda) X_U = -L_UK M_K + Lambda Q_U

Rows of L sum to 0, those of M and Q to 1. So the mattes and the rest sum to 1 as well, and the rest is not
solved for.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pseudolabel._checks import (
    check_count,
    check_finite,
    check_float,
    check_number,
    check_shapes,
    check_unit_range,
    values_unchecked,
)
from pseudolabel._maps import clamp_keeping_slope
from pseudolabel.matting._pixels import Pixels
from pseudolabel.matting._solver import LinearMap, Solution, differentiable, solve

__all__ = ["Laplacian", "MattingReport", "check_request", "matte"]

SURE = 0.1  # a trimap is known where it is this near to 0 or 1


class MattingReport(NamedTuple):
    """How well the system of each image was solved. Images without one have zeros, and are converged."""

    iterations: Tensor
    """(B,) int64, steps of the slowest class."""
    residual: Tensor
    """(B,), `|rhs - A x| / |rhs|` of the worst class, computed anew from the result."""
    converged: Tensor
    """(B,) bool, whether every class reached ``rtol``."""


class Laplacian(NamedTuple):
    """The matting Laplacian of one image, as the solver meets it."""

    rows: LinearMap
    """Maps (K,H,W) to `L x` (n,K) on the unknown pixels, with a graph."""
    matvec: LinearMap
    """x (n,) or (n,columns) to `(L_UU + Lambda) x`."""
    preconditioner: LinearMap
    """r like x to about `(L_UU + Lambda)^-1 r`."""


# Makes the operator of an image of the batch from its number, its unknown pixels, the confidence of the prior
# (n,) there, None without a prior, and the number of columns it will be applied to, None for a vector.
MakeLaplacian = Callable[[int, Pixels, Tensor | None, int | None], Laplacian]


def check_request(
    trimap: Tensor,
    *,
    rtol: float,
    max_iter: int,
    prior: Tensor | None,
    prior_weight: float | Tensor,
    x0: Tensor | None,
) -> None:
    """Check the arguments that all methods share."""
    check_float(trimap=trimap)
    check_unit_range(trimap=trimap)
    check_number("rtol", rtol, above=0)
    check_count(max_iter=max_iter)
    if x0 is not None:
        check_shapes(trimap=(trimap, "B C H W"), x0=(x0, "B C H W"))
        check_float(x0=x0)
        check_finite(x0=x0)
    if prior is not None:
        check_shapes(trimap=(trimap, "B C H W"), prior=(prior, "B C H W"))
        check_float(prior=prior)
        check_unit_range(prior=prior)
    if isinstance(prior_weight, Tensor):
        check_shapes(trimap=(trimap, "B C H W"), prior_weight=(prior_weight, "B H W"))
        check_float(prior_weight=prior_weight)
        check_finite(prior_weight=prior_weight)
        if not values_unchecked(prior_weight) and bool((prior_weight < 0).any()):
            raise ValueError(f"prior_weight: expected values >= 0, got {float(prior_weight.min()):g}")
    else:
        check_number("prior_weight", prior_weight, at_least=0)


def matte(
    laplacian: MakeLaplacian,
    trimap: Tensor,
    *,
    rtol: float,
    max_iter: int,
    prior: Tensor | None = None,
    prior_weight: float | Tensor = 0.0,
    x0: Tensor | None = None,
    clip: bool = True,
    even: bool = True,
) -> tuple[Tensor, MattingReport]:
    """Mattes (B,C,H,W) of a batch, in the dtype of ``trimap``.

    With ``even`` an odd number of columns is solved with one more of zeros: products with a sparse matrix are
    faster so.
    """
    weight = None
    if prior is not None:
        weight = torch.as_tensor(prior_weight, dtype=trimap.dtype, device=trimap.device)
        weight = weight.expand(len(trimap), *trimap.shape[2:])[:, None]
        prior = prior.to(trimap)
    solver = partial(solve, rtol=rtol, max_iter=max_iter)
    mattes, solutions = [], []
    with torch.autocast(trimap.device.type, enabled=False):
        for number, one in enumerate(trimap):
            alpha, solution = _matte_image(
                partial(laplacian, number),
                one,
                prior=_take(prior, number),
                weight=_take(weight, number),
                x0=_take(x0 if x0 is None else x0.to(trimap), number),
                solver=solver,
                clip=clip,
                even=even,
            )
            mattes.append(alpha)
            solutions.append(solution)
    if not mattes:
        none = trimap.new_zeros(0)
        return trimap.clone(), MattingReport(none.long(), none, none == 0)
    report = (torch.stack([getattr(one, name) for one in solutions]) for name in MattingReport._fields)
    return torch.stack(mattes), MattingReport(*report)


def _take(maps: Tensor | None, index: int | Tensor) -> Tensor | None:
    return None if maps is None else maps[index]


def _matte_image(
    laplacian: Callable[..., Laplacian],
    trimap: Tensor,
    *,
    prior: Tensor | None,
    weight: Tensor | None,
    x0: Tensor | None,
    solver: Callable[..., Solution],
    clip: bool,
    even: bool,
) -> tuple[Tensor, Solution]:
    """Mattes (C,H,W) of one image."""
    zero = trimap.new_zeros(())
    solution = Solution(zero, zero.long(), zero, zero == 0)  # of a system without equations
    present = (trimap.detach().amax((1, 2)) > 0).nonzero()[:, 0]
    if len(present) == 0:
        return torch.zeros_like(trimap), solution
    known, seeds = _seeds(trimap[present])
    unknown = Pixels(~known)
    if len(unknown) == 0:
        alpha = seeds
    elif len(unknown) == known.numel() and prior is None:
        alpha = torch.full_like(seeds, 1 / (1 + len(present)))
    else:
        prior, x0 = _take(prior, present), _take(x0, present)
        x, solution = _solve(
            laplacian, unknown, seeds, prior=prior, weight=weight, x0=x0, solver=solver, even=even
        )
        alpha = unknown.put(seeds, _clip(x) if clip else x)
    return torch.zeros_like(trimap).index_copy(0, present, alpha), solution


def _seeds(trimap: Tensor) -> tuple[Tensor, Tensor]:
    """Which pixels (H,W) are known, and the mattes (K,H,W) there; 0 elsewhere."""
    low, high = trimap <= SURE, trimap >= 1 - SURE
    known = high.any(0) | low.all(0)
    seeds = trimap.where(known & (low | high), 0)
    return known, seeds if len(seeds) == 1 else _share(seeds, 0)


def _share(x: Tensor, dim: int) -> Tensor:
    """Scale what sums to more than 1."""
    total = x.sum(dim, keepdim=True)
    return x / total.where(total > 1, 1)


def _clip(x: Tensor) -> Tensor:
    """Mattes (n,K,...) brought into [0,1], where they still sum to 1 with the rest."""
    rest = clamp_keeping_slope(1 - x.sum(1, keepdim=True), low=0)
    x = clamp_keeping_slope(x, low=0)
    return x / (x.sum(1, keepdim=True) + rest)


def _solve(
    laplacian: Callable[..., Laplacian],
    unknown: Pixels,
    seeds: Tensor,
    *,
    prior: Tensor | None,
    weight: Tensor | None,
    x0: Tensor | None,
    solver: Callable[..., Solution],
    even: bool,
) -> tuple[Tensor, Solution]:
    """Mattes (n,K) of the unknown pixels, as they come out of the system."""
    target = confidence = None
    if prior is not None and weight is not None:
        target, confidence = unknown.pick(prior), unknown.pick(weight)
        target = _share(target, 1)
    layout = _Layout(len(seeds), even=even, vectors=_has_vector_product(seeds.device))
    operator = laplacian(unknown, None if confidence is None else confidence.detach()[:, 0], layout.columns)

    def defect(maps: Tensor) -> Tensor:
        """`(L X)_U + Lambda (X_U - Q_U)`, which is 0 for the solution."""
        left = operator.rows(maps)
        if target is None or confidence is None:
            return left
        return left + confidence * (unknown.pick(maps) - target)

    def run(rhs: Tensor, start: Tensor | None = None) -> Solution:
        first = None if start is None else layout.pack(start)
        found = solver(operator.matvec, layout.pack(rhs), preconditioner=operator.preconditioner, x0=first)
        return found._replace(x=layout.unpack(found.x))

    rhs = -defect(seeds)
    with torch.no_grad():
        start = _start(unknown, seeds) if target is None else target
        solution = run(rhs, start if x0 is None else unknown.pick(x0))
    x = solution.x
    if rhs.requires_grad:
        x = differentiable(x, defect(unknown.put(seeds, x)), lambda gradient: run(gradient).x)
    return x, solution


def _start(unknown: Pixels, seeds: Tensor) -> Tensor:
    """0 everywhere; but where all seeds are of one class, the answer, which is 1."""
    share = seeds.sum((1, 2)) / (seeds[0].numel() - len(unknown))
    return (share == 1).to(seeds).expand(len(unknown), -1)


class _Layout:
    """Columns as the solver takes them: a single one as a vector, an odd number with one more of zeros."""

    def __init__(self, used: int, *, even: bool, vectors: bool) -> None:
        self.used = used
        self.columns = None if used == 1 and vectors else used + (used % 2 if even and used > 1 else 0)

    def pack(self, x: Tensor) -> Tensor:
        x = x[:, 0] if self.columns is None else F.pad(x, (0, self.columns - self.used))
        return x.contiguous()

    def unpack(self, x: Tensor) -> Tensor:
        return x[:, None] if self.columns is None else x[:, : self.used]


def _has_vector_product(device: torch.device) -> bool:
    """Whether PyTorch has the product of a sparse matrix and a vector there: on CPUs that is up to MKL."""
    return device.type != "cpu" or bool(torch.backends.mkl.is_available())  # type: ignore[no-untyped-call]
