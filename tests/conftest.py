"""Fixtures of the whole suite: golden files, devices, seeded random numbers."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parents[1]

# Shared machines stall: a slow example is no failure, and a failure is found again from its printed blob.
settings.register_profile(
    "pseudolabel",
    deadline=None,
    max_examples=25,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("pseudolabel")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    """Load a golden file by name, such as ``pmm/public_cvs``, or skip."""
    folder = Path(os.environ.get("PSEUDOLABEL_GOLDEN", ROOT.parent / "shared" / "golden"))

    def load(name: str) -> dict[str, np.ndarray]:
        path = folder / f"{name}.npz"
        if not path.is_file():
            pytest.skip(
                f"golden file {name}.npz is not at hand: set PSEUDOLABEL_GOLDEN to the folder that holds it"
            )
        with np.load(path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}

    return load


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def flat_clamp() -> Callable[[], AbstractContextManager[None]]:
    """A context in which `Tensor.clamp` has no gradient at its bounds: releases of PyTorch differ in that."""
    clamp = torch.Tensor.clamp

    def flat(x: torch.Tensor, min: float | None = None, max: float | None = None) -> torch.Tensor:  # noqa: A002
        inside = torch.ones_like(x, dtype=torch.bool)
        for beyond in (() if min is None else (x <= min,)) + (() if max is None else (x >= max,)):
            inside = inside & ~beyond
        found = clamp(x, min=min, max=max)
        return found.where(inside, found.detach())

    @contextmanager
    def patched() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "clamp", flat)
            yield

    return patched
