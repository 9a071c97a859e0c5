"""Proportional pseudo-masks: each class finds its foreground alone, shares decide where they meet."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from pseudolabel._checks import (
    check_choice,
    check_finite,
    check_float,
    check_labels,
    check_number,
    check_probability,
    check_shapes,
    check_unit_range,
)
from pseudolabel._maps import gather_present, label_places, present_classes, resize, working_dtype
from pseudolabel.refine import CRF_PRESETS, DenseCRF, coefficient_of_variation_smoothing

__all__ = [
    "ProportionalPseudoMask",
    "ShareOver",
    "class_foreground",
    "proportional_argmax",
    "proportional_pseudo_mask",
]

ShareOver = Literal["foreground", "all"]
ShareOf = Literal["raw", "smoothed"]
Refiner = Callable[[Tensor, Tensor], Tensor]

_pmm_crf = DenseCRF(**CRF_PRESETS["pmm"])


def class_foreground(
    image: Tensor, cam: Tensor, *, alpha: float = 11, crf: Refiner | None = _pmm_crf, cut: float = 0.5
) -> Tensor:
    """Find the foreground of each class alone, as a problem of two labels.

        background b = (1 - cam)^alpha,  Q = crf(image, [b, cam]),  foreground where Q[cam] > cut

    Args:
        image: Images (B,3,H,W) in [0, 1].
        cam: Normalised or smoothed maps (B,C,H,W), in [0, 1].
        alpha: Exponent of the background, > 0: larger gives more foreground.
        crf: Refiner `(image, probs) -> probs` on (B,C,2,H,W), C problems over one image. By default
            `dense_crf` with the `pmm` settings; None only normalises each pair to sum 1.
        cut: Foreground starts above it.

    Returns:
        Foreground (B,C,H,W) bool. Classes may overlap.

    Raises:
        TypeError: If ``cam`` is not a floating-point tensor.
        ValueError: If shapes do not fit, ``cam`` leaves [0, 1], or a setting is out of range.

    Examples:
        >>> import torch
        >>> class_foreground(torch.rand(1, 3, 1, 3), torch.tensor([[[[0.0, 0.1, 0.2]]]]), crf=None)
        tensor([[[[False, False,  True]]]])

    Source:
        As `proportional_pseudo_mask`.
    """
    check_shapes(image=(image, "B 3 H W"), cam=(cam, "B C H W"))
    check_float(image=image, cam=cam)
    check_unit_range(cam=cam)
    check_number("alpha", alpha, above=0)
    check_probability("cut", cut)
    cam = cam.to(working_dtype(cam)).clamp(0, 1)
    probs = torch.stack([(1 - cam) ** alpha, cam], dim=2)
    probs = probs / probs.sum(2, keepdim=True) if crf is None else crf(image, probs)
    return probs[:, :, 1] > cut


def proportional_argmax(
    cam: Tensor, foreground: Tensor, *, offset: float = 1.0, share_over: ShareOver = "foreground"
) -> Tensor:
    """Label each pixel with the class whose share of its own total is largest there.

        share_c(p) = cam_c(p) / (offset + sum of cam_c over its foreground),  0 outside the foreground
        mask(p) = c + 1 of the largest share, 0 where no share is positive

    Where several classes claim a pixel, the one with the smaller total response wins at equal activation: a
    small object stands in front of a large one. Ties go to the lowest class.

    Args:
        cam: Normalised maps (B,C,H,W).
        foreground: Foreground of each class (B,C,H,W) bool, as from `class_foreground`.
        offset: Added to each total, >= 0. Official: 1.
        share_over: Total over the `foreground` (official) or over `all` pixels. The caption of the paper's
            Fig. 1 leaves open which is meant.

    Returns:
        Mask (B,H,W) int64: 0 background, c+1 class c.

    Raises:
        TypeError: If ``cam`` is not floating-point.
        ValueError: If shapes do not fit, ``cam`` is not finite, or a setting is out of range.

    Examples:
        >>> import torch
        >>> cam = torch.tensor([[[[0.9, 0.9, 0.8]], [[0.0, 0.0, 0.5]]]])
        >>> proportional_argmax(cam, cam > 0.1)
        tensor([[[1, 1, 2]]])

    Source:
        As `proportional_pseudo_mask`.
    """
    check_shapes(cam=(cam, "B C H W"), foreground=(foreground, "B C H W"))
    check_float(cam=cam)
    if foreground.dtype != torch.bool:
        raise TypeError(f"foreground: expected a bool tensor, got {foreground.dtype}")
    check_number("offset", offset, at_least=0)
    check_choice("share_over", share_over, ShareOver)
    check_finite(cam=cam)
    cam = cam.to(working_dtype(cam))
    claimed = cam.where(foreground, 0)
    total = (claimed if share_over == "foreground" else cam).sum((-2, -1), keepdim=True)
    share = (claimed / (offset + total)).nan_to_num()  # 0 / 0: a class without any response, offset 0
    background = share.new_zeros(share.shape[0], 1, *share.shape[2:])
    return torch.cat([background, share], dim=1).argmax(1)


def proportional_pseudo_mask(
    image: Tensor,
    cam: Tensor,
    labels: Tensor,
    *,
    alpha: float = 11,
    scale: float = 0.3,
    threshold: float = 0.05,
    crf: Refiner | None = _pmm_crf,
    cut: float = 0.5,
    offset: float = 1.0,
    share_over: ShareOver = "foreground",
    share_of: ShareOf = "raw",
) -> Tensor:
    """Make a mask from class maps: smooth, find each class's foreground alone, let the larger share decide.

        u = coefficient_of_variation_smoothing(cam)      widen
        F_c = class_foreground(image, u)_c               each present class against its own background
        mask = proportional_argmax(cam, F)               the share of the raw maps decides

    Only the present classes are computed. The exponent belongs to the maps: 11 is published for maps of a
    SEAM classifier; broader maps want a smaller one (choose it on scored images).

    Args:
        image: Images (B,3,H,W) in [0, 1].
        cam: Normalised maps (B,C,h,w), in [0, 1]; resized to the images.
        labels: Image-level labels (B,C). Without a label an image is background everywhere.
        alpha: Exponent of the background, > 0: larger gives more foreground.
        scale: Scale of the coefficient of variation, >= 0.
        threshold: Map values below it are dropped, >= 0.
        crf: Refiner `(image, probs) -> probs` on (B,P,2,H,W), the P present classes' problems over one image.
            By default `dense_crf` with the `pmm` settings; None goes without.
        cut: Foreground starts above it.
        offset: Added to each class's total response.
        share_over: Total response over the `foreground` (official) or `all` pixels.
        share_of: Shares of the `raw` maps (official) or the `smoothed` ones.

    Returns:
        Mask (B,H,W) int64: 0 background, c+1 class c. No pixel is ignored.

    Raises:
        TypeError: If ``image`` or ``cam`` is not floating-point.
        ValueError: If shapes do not fit, ``image`` or ``cam`` leaves [0, 1], ``labels`` are not multi-hot, or
            a setting is out of range.

    Examples:
        >>> import torch
        >>> image = torch.zeros(1, 3, 1, 4)
        >>> cam = torch.tensor([[[[0.9, 0.8, 0.6, 0.0]], [[0.0, 0.0, 0.5, 0.1]], [[0.9, 0.9, 0.9, 0.9]]]])
        >>> proportional_pseudo_mask(image, cam, torch.tensor([[1, 1, 0]]), crf=None)
        tensor([[[1, 1, 2, 2]]])

    Source:
        Li et al., "Pseudo-mask Matters in Weakly-supervised Semantic Segmentation", ICCV 2021; matches the
        official implementation at 134ad33 (the paper's own equations were not at hand).
    """
    check_shapes(image=(image, "B 3 H W"), cam=(cam, "B C h w"), labels=(labels, "B C"))
    check_float(image=image, cam=cam)
    check_labels(labels)
    check_choice("share_of", share_of, ShareOf)
    check_unit_range(image=image, cam=cam)
    index, valid = present_classes(labels)
    raw = resize(gather_present(cam, index), (image.shape[2], image.shape[3]))
    raw = raw.masked_fill(~valid[:, :, None, None], 0)
    smoothed = coefficient_of_variation_smoothing(raw, scale, threshold)
    foreground = class_foreground(image, smoothed, alpha=alpha, crf=crf, cut=cut)
    shared = raw if share_of == "raw" else smoothed
    mask = proportional_argmax(shared, foreground, offset=offset, share_over=share_over)
    return label_places(mask, index)


class ProportionalPseudoMask(nn.Module):
    """Module twin of `proportional_pseudo_mask`."""

    def __init__(
        self,
        *,
        alpha: float = 11,
        scale: float = 0.3,
        threshold: float = 0.05,
        crf: Refiner | None = _pmm_crf,
        cut: float = 0.5,
        offset: float = 1.0,
        share_over: ShareOver = "foreground",
        share_of: ShareOf = "raw",
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.scale = scale
        self.threshold = threshold
        self.crf = crf
        self.cut = cut
        self.offset = offset
        self.share_over: ShareOver = share_over
        self.share_of: ShareOf = share_of

    def forward(self, image: Tensor, cam: Tensor, labels: Tensor) -> Tensor:
        """See `proportional_pseudo_mask`."""
        return proportional_pseudo_mask(
            image,
            cam,
            labels,
            alpha=self.alpha,
            scale=self.scale,
            threshold=self.threshold,
            crf=self.crf,
            cut=self.cut,
            offset=self.offset,
            share_over=self.share_over,
            share_of=self.share_of,
        )

    def extra_repr(self) -> str:
        """Settings, for `print`."""
        return f"alpha={self.alpha}, scale={self.scale}, threshold={self.threshold}, cut={self.cut}"
