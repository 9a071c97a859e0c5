"""The solvers of the optional package pymatting, behind the interface of this room."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pseudolabel._checks import check_choice, check_number
from pseudolabel.matting._classes import check_inputs, join_mattes, known_pixels

__all__ = ["PymattingSolver", "pymatting_matting"]

PymattingSolver = Literal["cf", "knn", "lbdm", "lkm", "rw", "sm"]
Solver = Callable[[np.ndarray, np.ndarray], np.ndarray]


def pymatting_matting(
    image: Tensor,
    trimap: Tensor,
    *,
    solver: PymattingSolver = "cf",
    rtol: float = 1e-7,
    max_iter: int = 10_000,
    **settings: Any,
) -> Tensor:
    """Solve for mattes with the package pymatting: on the CPU, one class of one image after the other.

    What it leaves to its users is done here: one thread; float64; the last iterate and a warning where the
    solver does not converge; known pixels as the trimap has them. A class without foreground has the matte 0,
    one with nothing but foreground known 1, one with nothing known 0.5. Where mattes of several classes sum
    to more than 1 they are divided by their sum.

    | ``solver`` | |
    |---|---|
    | `cf` | closed form (Levin et al. 2008) |
    | `knn` | k nearest neighbours (Chen et al. 2012) |
    | `lbdm` | learning based (Zheng and Kambhamettu 2009) |
    | `lkm` | large kernel (He et al. 2010) |
    | `rw` | random walk (Grady et al. 2005) |
    | `sm` | shared sampling (Gastal and Oliveira 2010) |

    Args:
        image: Images (B,3,H,W) in [0, 1].
        trimap: Trimaps (B,C,H,W): 1 foreground, 0 background, 0.5 unknown; see `closed_form_matting`.
        solver: Which of them.
        rtol: Relative residual at which it stops, > 0. Not for `sm`.
        max_iter: Most iterations, >= 1. Not for `sm`.
        **settings: Of the Laplacian, or of `sm`, such as `epsilon=1e-5`: see pymatting. The setting `sigma`
            of `rw` is refused, as version 1.1.16 ignores it.

    Returns:
        Mattes (B,C,H,W) in [0, 1], in the dtype and on the device of ``trimap``. No gradients.

    Raises:
        ImportError: If pymatting cannot be imported.
        TypeError: If a tensor is not floating-point, or ``settings`` are none of pymatting's.
        ValueError: If shapes or values do not fit, ``solver`` is unknown, or a setting is out of range.

    Source:
        pymatting (Germer et al. 2020, MIT licence): the extra `matting`. Its first import compiles, which
        takes a while.
    """
    check_inputs(image, trimap)
    check_choice("solver", solver, PymattingSolver)
    check_number("rtol", rtol, above=0)
    check_number("max_iter", max_iter, at_least=1)
    if solver == "rw" and "sigma" in settings:
        raise ValueError("sigma: expected none, pymatting does not read it with this solver")
    known, seeds = known_pixels(trimap.detach())
    present = (trimap > 0).flatten(2).any(2) & ~known.flatten(2).all(2)
    if not bool(present.any()):
        return seeds
    pixels, classes = (
        maps.double().cpu().contiguous().numpy()
        for maps in (image.detach().permute(0, 2, 3, 1), seeds.where(known, 0.5))
    )
    alpha = np.zeros_like(classes)
    solve = _solver(solver, rtol, int(max_iter), settings)
    with _one_thread():
        for b, c in present.nonzero().tolist():
            alpha[b, c] = _solve_one(solve, pixels[b], classes[b, c])
    return join_mattes(torch.from_numpy(alpha).to(trimap), known, seeds)


def _solve_one(solve: Solver, pixels: np.ndarray, trimap: np.ndarray) -> np.ndarray:
    """Matte (H,W) of one class."""
    has_foreground, has_background = bool((trimap > 0.5).any()), bool((trimap < 0.5).any())
    if has_foreground and has_background:
        return solve(pixels, trimap)
    return np.full_like(trimap, 0.5 + 0.5 * has_foreground - 0.5 * has_background)


def _solver(name: PymattingSolver, rtol: float, max_iter: int, settings: dict[str, Any]) -> Solver:
    """The function of pymatting, made to give its last iterate where it would raise an error."""
    try:
        import pymatting  # noqa: PLC0415 - an extra
    except Exception as error:
        raise ImportError(
            f"pymatting cannot be imported ({type(error).__name__}: {error}). "
            'Install it by pip install "pseudolabel[matting]", or take another method, which needs nothing'
        ) from error
    estimate = getattr(pymatting, f"estimate_alpha_{name}")
    if name == "sm":
        return lambda pixels, trimap: estimate(pixels, trimap, **settings).clip(0, 1)

    def solve(pixels: np.ndarray, trimap: np.ndarray) -> np.ndarray:
        iterates: list[np.ndarray] = []

        def keep(_a: object, x: np.ndarray, *_rest: object) -> None:
            iterates[:] = [x]

        options = {"rtol": rtol, "maxiter": max_iter, "callback": keep}
        try:
            return np.asarray(estimate(pixels, trimap, laplacian_kwargs=settings, cg_kwargs=options))
        except ValueError as error:
            if not iterates:
                raise
            warnings.warn(f"pymatting, {name}: {error}. The last iterate is taken", stacklevel=4)
        unknown = (trimap > 0.1) & (trimap < 0.9)
        alpha = trimap.copy()  # `cf` solves for the unknown pixels, the others for all
        alpha[unknown] = iterates[0] if name == "cf" else iterates[0].reshape(trimap.shape)[unknown]
        return alpha.clip(0, 1)

    return solve


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep numba and BLAS to one thread: for vectors of this size threads cost more than they give."""
    import numba  # noqa: PLC0415 - comes with pymatting

    try:
        from threadpoolctl import threadpool_limits  # noqa: PLC0415 - an extra
    except ImportError:
        threadpool_limits = nullcontext
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        numba.set_num_threads(before)
