"""Intra-Class Discriminator (CVPR 2020): from the maps of its head to masks."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from pseudolabel._checks import check_float, check_number, check_probability, check_shapes
from pseudolabel.masks import icd_seed
from pseudolabel.refine import CRF_PRESETS, DenseCRF, probs_from_mask

__all__ = ["icd"]

_crf = DenseCRF(**CRF_PRESETS["psa"])


def icd(
    image: Tensor,
    logits: Tensor,
    cam: Tensor,
    labels: Tensor,
    *,
    saliency: Tensor | None = None,
    confidence: float = 0.5,
    min_probability: float = 0.1,
    crf: Callable[[Tensor, Tensor], Tensor] | None = _crf,
    crf_with_saliency: bool = False,
    ignore_index: int = 255,
) -> Tensor:
    """Turn the logits of an intra-class discriminator and the CAM of its classifier into masks.

        seed  = icd_seed(logits, cam, labels)              the sign of the logits; CAM settles conflicts
        probs = probs_from_mask(seed)                      `confidence` in the seed, the same in all others
        Q     = crf(image, probs)
        mask  = argmax of Q,  ignored where max Q < min_probability or no better than chance

    All C labels and the background run through the CRF, as in the official program: the absent ones share
    what a seed leaves open. None of them ends in the mask.

    Hand in maps that cover the image, with padding cut off.

    Args:
        image: Images (B,3,H,W) in [0, 1].
        logits: Signed maps (B,C,h,w), above 0 on the object: `ICDOutput.logits`, or its bottom-up scores.
        cam: Raw maps of the classifier (B,C,h,w).
        labels: Image-level labels (B,C). Without a label an image is background everywhere.
        saliency: Saliency (B,H,W) in [0, 1], which then decides on the background, or None.
        confidence: Weight `k` of the seed's label, in (0, 1): it gets `k`, each of the L - 1 other labels
            `(1 - k) / L`, brought to sum 1. Official: 0.5.
        min_probability: What the best label has to reach after the CRF. Official: 0.1. (With 21 labels an
            ignored pixel without a seed around it has 1 / 21. With ten labels or fewer 0.1 would not catch
            it, hence "no better than chance", which is ours.)
        crf: Refiner `(image, probs) -> probs` on (B,1+C,H,W); None returns the seeds.
        crf_with_saliency: Run the CRF with saliency as well. The official program does not.
        ignore_index: Label of the pixels that are left out.

    Returns:
        Mask (B,H,W) int64: 0 background, c+1 class c, ``ignore_index`` where undecided.

    Raises:
        TypeError: If a map is not a floating-point tensor.
        ValueError: If shapes do not fit, values are out of range, or a setting is.

    Examples:
        >>> import torch
        >>> logits = torch.tensor([[[[4.0, 2.0, 0.0, -3.0]]]])
        >>> icd(torch.zeros(1, 3, 1, 4), logits, logits, torch.tensor([[1]]), crf=None)
        tensor([[[  1,   1, 255,   0]]])

    Source:
        Fan, Zhang, Song and Tan, "Learning Integral Objects With Intra-Class Discriminator for
        Weakly-Supervised Semantic Segmentation", CVPR 2020; matches `_generate_seed` of the official
        implementation at f78286a, its CRF up to float32 rounding.
    """
    sizes = check_shapes(image=(image, "B 3 H W"), logits=(logits, "B C h w"), labels=(labels, "B C"))
    check_float(image=image, logits=logits)
    check_number("confidence", confidence, above=0, at_most=1 - 1e-6)
    check_probability("min_probability", min_probability)
    seed = icd_seed(
        logits, cam, labels, size=(sizes["H"], sizes["W"]), saliency=saliency, ignore_index=ignore_index
    )
    if crf is None or (saliency is not None and not crf_with_saliency):
        return seed

    count = 1 + sizes["C"]
    share = confidence / (confidence + (count - 1) * (1 - confidence) / count)
    probs = crf(image, probs_from_mask(seed, count, share, ignore_index))
    allowed = F.pad(labels != 0, (1, 0), value=True)[:, :, None, None]
    best, mask = probs.where(allowed, 0).max(1)
    chance = (1 + 1e-3) / count
    return mask.masked_fill((best < min_probability) | (best <= chance), ignore_index)
