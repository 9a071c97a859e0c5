"""Seeds from intra-class discriminator maps: their sign finds the foreground, CAM settles conflicts."""

import torch
from torch import Tensor
from torch.nn import functional as F

from pseudolabel._checks import (
    check_finite,
    check_float,
    check_labels,
    check_number,
    check_probability,
    check_shapes,
    check_unit_range,
)
from pseudolabel._maps import gather_present, label_places, present_classes, resize, working_dtype
from pseudolabel.masks.thresholds import _check_ignore_index

__all__ = ["icd_seed"]


def icd_seed(
    icd_map: Tensor,
    cam: Tensor,
    labels: Tensor,
    *,
    size: tuple[int, int] | None = None,
    saliency: Tensor | None = None,
    saliency_threshold: float = 0.01,
    min_salient_fraction: float = 0.01,
    eps: float = 1e-5,
    ignore_index: int = 255,
) -> Tensor:
    """Make a mask from signed class maps: foreground where a map is above 0, background where all are below.

    With the map Z and the CAM M of each present class k of an image:

        p_k = max(Z_k, 0) / max(max Z_k, eps)          b_k = min(Z_k, 0) / min(min Z_k, -eps)
        m   = max(M, 0) to [0, 1], by the one minimum and maximum of all K maps together
        foreground = any p_k > eps                     background = all b_k > eps
        class      = the k with p_k > eps; of several, the largest m_k p_k, ties: first
        ignored    = where the map is 0, neither foreground nor background;
                     with several labels, foreground where m_k p_k is the same, up to eps, for all k

    The last line leaves out all foreground of an image with several labels where CAM is silent, contested or
    not: the CAM has to be the real one. With one label the CAM plays no part.

    With saliency the background is where that is below ``saliency_threshold``, whatever the maps say; salient
    pixels without a class, and pixels of a class that are not salient, are ignored. If hardly anything of an
    image is salient, its background has to be below 0 in all maps as well.

    Args:
        icd_map: Signed maps (B,C,h,w), such as the logits of the head. Above 0 is foreground.
        cam: Class activation maps (B,C,h,w), not normalised.
        labels: Image-level labels (B,C). Without a label an image is background everywhere.
        size: Size (H,W) to which both maps are resized. None: theirs. Cut off padding first.
        saliency: Class-agnostic saliency (B,H,W) in [0, 1], or None.
        saliency_threshold: Pixels below it are background. Published: 0.01, so 0 to 2 of 255.
        min_salient_fraction: Part of the pixels below which the saliency of an image is not trusted alone.
        eps: Values up to it count as 0, > 0.
        ignore_index: Label of the pixels left out.

    Returns:
        Mask (B,H,W) int64: 0 background, c+1 class c, ``ignore_index`` where undecided.

    Raises:
        TypeError: If a map is not a floating-point tensor.
        ValueError: If shapes do not fit, maps are not finite, ``saliency`` leaves [0, 1], ``labels`` are not
            multi-hot, or a setting is out of range.

    Examples:
        >>> import torch
        >>> icd_map = torch.tensor([[[[3.0, 2.0, -1.0, 0.0]], [[-1.0, 1.0, -1.0, -1.0]]]])
        >>> cam = torch.tensor([[[[1.0, 0.2, 0.0, 0.0]], [[0.0, 0.9, 0.0, 0.0]]]])
        >>> icd_seed(icd_map, cam, torch.tensor([[1, 1]]))
        tensor([[[  1,   2,   0, 255]]])

    Source:
        Fan et al., "Learning Integral Objects With Intra-Class Discriminator for Weakly-Supervised Semantic
        Segmentation" (ICD), CVPR 2020. Matches `_generate_seed` of the official implementation at f78286a;
        the formula is read off that code, the equations of the paper were not at hand. Without saliency that
        implementation goes on to a dense CRF, with saliency it does not.
    """
    check_shapes(icd_map=(icd_map, "B C h w"), cam=(cam, "B C h w"), labels=(labels, "B C"))
    check_float(icd_map=icd_map, cam=cam)
    check_finite(icd_map=icd_map, cam=cam)
    check_labels(labels)
    check_probability("saliency_threshold", saliency_threshold)
    check_probability("min_salient_fraction", min_salient_fraction)
    check_number("eps", eps, above=0)
    _check_ignore_index(ignore_index, num_classes=1 + labels.shape[1])
    height, width = (icd_map.shape[2], icd_map.shape[3]) if size is None else size
    if saliency is not None:
        check_shapes(icd_map=(icd_map, "B C h w"), saliency=(saliency, f"B {height} {width}"))
        check_float(saliency=saliency)
        check_unit_range(saliency=saliency)

    index, valid = present_classes(labels)
    present = valid[:, :, None, None]
    z, m = (
        resize(gather_present(maps, index).to(working_dtype(maps)), (height, width)).where(present, 0)
        for maps in (icd_map, cam)
    )

    p = z.clamp(min=0) / z.amax((2, 3), keepdim=True).clamp(min=eps)
    b = z.clamp(max=0) / z.amin((2, 3), keepdim=True).clamp(max=-eps)
    positive = p > eps
    foreground = positive.any(1)
    background = ((b > eps) | ~present).all(1)
    if saliency is not None:
        silent = saliency < saliency_threshold
        trusted = (~silent).to(z.dtype).mean((1, 2), keepdim=True) >= min_salient_fraction
        background = silent & (background | trusted)

    # A place in front of the present classes, for none of them.
    support = F.pad(p * _joint_unit_range(m.clamp(min=0), present, eps), (0, 0, 0, 0, 1, 0))
    claims = F.pad(positive, (0, 0, 0, 0, 1, 0)).to(support.dtype)
    place = torch.where(claims.sum(1, keepdim=True) > 1, support, claims).argmax(1)
    alike = ((support.amax(1, keepdim=True) - support[:, 1:] <= eps) | ~present).all(1)
    labelled, several = ((valid.sum(1) > count)[:, None, None] for count in (0, 1))

    mask = label_places(place, index).masked_fill(background, 0)
    ignored = (foreground == background) | (several & foreground & alike)
    return mask.masked_fill(ignored, ignore_index).where(labelled, 0)


def _joint_unit_range(maps: Tensor, present: Tensor, eps: float) -> Tensor:
    """Bring maps (B,P,h,w) >= 0 to [0, 1], by the extremes of all present ones of an image together."""
    lows, highs = maps.where(present, torch.inf).amin((2, 3)), maps.amax((2, 3))
    high = F.pad(highs, (0, 1)).amax(1)[:, None, None, None]
    low = F.pad(lows, (0, 1), value=torch.inf).amin(1)[:, None, None, None].minimum(high)
    return (maps - low) / (high - low).clamp(min=eps)
