"""Pseudo-mask Matters (ICCV 2021): from a classifier's maps to masks."""

from collections.abc import Callable

from torch import Tensor

from pseudolabel.cam import normalize_cam
from pseudolabel.masks import proportional_pseudo_mask
from pseudolabel.refine import CRF_PRESETS, DenseCRF

__all__ = ["pmm"]

_crf = DenseCRF(**CRF_PRESETS["pmm"])


def pmm(
    image: Tensor,
    cam: Tensor,
    labels: Tensor,
    *,
    alpha: float = 11,
    scale: float = 0.3,
    threshold: float = 0.05,
    crf: Callable[[Tensor, Tensor], Tensor] | None = _crf,
) -> Tensor:
    """Turn raw maps of a classifier into masks as the official PMM program does.

        cam -> normalize_cam("minmax-zero") -> proportional_pseudo_mask

    Hand in the maps of `multi_scale_cam`, which sees the image at scales 0.5, 1, 1.5, 2, plain and mirrored.

    Args:
        image: Images (B,3,H,W) in [0, 1].
        cam: Raw maps (B,C,h,w), summed over the views.
        labels: Image-level labels (B,C).
        alpha: Exponent of the background, > 0. The official 11 suits the maps of a SEAM classifier; broader
            maps want less: choose it on scored images.
        scale: Scale of the coefficient of variation.
        threshold: Normalised map values below it are dropped.
        crf: Refiner `(image, probs) -> probs`; None goes without.

    Returns:
        Mask (B,H,W) int64: 0 background, c+1 class c.

    Raises:
        TypeError: If ``image`` or ``cam`` is not floating-point.
        ValueError: If shapes do not fit, values are out of range, or a setting is.

    Examples:
        >>> import torch
        >>> cam = torch.tensor([[[[4.0, 2.0, 0.1, 0.0]]]])
        >>> pmm(torch.zeros(1, 3, 1, 4), cam, torch.tensor([[1]]), crf=None)
        tensor([[[1, 1, 0, 0]]])

    Source:
        Li et al., "Pseudo-mask Matters in Weakly-supervised Semantic Segmentation", ICCV 2021; defaults of
        the official implementation at 134ad33.
    """
    cam = normalize_cam(cam, "minmax-zero")
    return proportional_pseudo_mask(
        image, cam, labels, alpha=alpha, scale=scale, threshold=threshold, crf=crf
    )
