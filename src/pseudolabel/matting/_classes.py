"""For methods that know nothing of classes, or of systems: trimaps taken apart, mattes put together."""

import torch
from torch import Tensor

from pseudolabel._checks import check_float, check_shapes, check_unit_range
from pseudolabel.matting._system import _clip, _seeds

__all__ = ["check_inputs", "join_mattes", "known_pixels"]


def check_inputs(image: Tensor, trimap: Tensor) -> None:
    """Check what every method is given."""
    check_shapes(image=(image, "B 3 H W"), trimap=(trimap, "B C H W"))
    check_float(image=image, trimap=trimap)
    check_unit_range(image=image, trimap=trimap)


def known_pixels(trimap: Tensor) -> tuple[Tensor, Tensor]:
    """Which pixels (B,1,H,W) are known, and the mattes (B,C,H,W) there; 0 elsewhere."""
    if trimap.numel() == 0:  # no image, or no class
        return torch.ones_like(trimap.sum(1, keepdim=True), dtype=torch.bool), trimap
    known, seeds = zip(*map(_seeds, trimap), strict=True)
    return torch.stack(known)[:, None], torch.stack(seeds)


def join_mattes(alpha: Tensor, known: Tensor, seeds: Tensor) -> Tensor:
    """Mattes in [0, 1] that sum to at most 1, and are the seeds on known pixels."""
    return seeds.where(known, _clip(alpha))
