"""From scores to label maps: argmax, and the double threshold that leaves doubtful pixels out."""

from collections.abc import Callable

import torch
from torch import Tensor

from pseudolabel._checks import check_finite, check_float, check_number, check_probability, check_shapes
from pseudolabel._maps import resize
from pseudolabel.masks.background import constant_background

__all__ = ["dual_threshold_mask", "scores_to_mask"]


def scores_to_mask(scores: Tensor, *, confidence: float | None = None, ignore_index: int = 255) -> Tensor:
    """Label each pixel with its highest score; ties go to the first channel, background before classes.

    Args:
        scores: Scores or probabilities (B,1+C,H,W), background first.
        confidence: Pixels whose highest score is below it become ``ignore_index`` (CLIP-ES: 0.95 on the
            probabilities of the dense CRF). None labels every pixel.
        ignore_index: Label of the pixels left out.

    Returns:
        Mask (B,H,W) int64: 0 background, c+1 class c.

    Raises:
        TypeError: If ``scores`` is not a floating-point tensor.
        ValueError: If ``scores`` is not (B,1+C,H,W) or not finite, or a setting is out of range.

    Examples:
        >>> import torch
        >>> scores = torch.tensor([[[[0.2, 0.5, 0.4]], [[0.8, 0.5, 0.6]]]])
        >>> scores_to_mask(scores)
        tensor([[[1, 0, 1]]])
        >>> scores_to_mask(scores, confidence=0.55)
        tensor([[[  1, 255,   1]]])
    """
    check_shapes(scores=(scores, "B N H W"))
    check_float(scores=scores)
    if scores.shape[1] == 0:
        raise ValueError(f"scores: expected a background channel in front, got {tuple(scores.shape)}")
    check_finite(scores=scores)
    highest, mask = scores.max(1)
    if confidence is None:
        return mask
    check_number("confidence", confidence)
    _check_ignore_index(ignore_index, num_classes=scores.shape[1])
    return mask.masked_fill(highest < confidence, ignore_index)


def dual_threshold_mask(
    cam: Tensor,
    image: Tensor | None = None,
    *,
    high: float = 0.30,
    low: float = 0.05,
    refine: Callable[[Tensor, Tensor], Tensor] | None = None,
    ignore_index: int = 255,
) -> Tensor:
    """Label the pixels that a strict and a loose background agree on, and ignore the rest.

        strict = argmax [high, cam],  loose = argmax [low, cam]
        mask = strict where strict > 0;  0 where strict = loose = 0;  ignore elsewhere

    Args:
        cam: Normalised maps (B,C,h,w), in [0, 1].
        image: Images (B,3,H,W) for ``refine``; the maps are resized to them.
        high: Background score that a class must exceed to be labelled.
        low: Background score that no class may exceed where background is labelled.
        refine: Refiner `(image, scores) -> scores` of both score sets, such as `DenseCRF`.
        ignore_index: Label of the pixels left out.

    Returns:
        Mask (B,H,W) int64: 0 background, c+1 class c, ``ignore_index`` where undecided.

    Raises:
        TypeError: If ``cam`` is not a floating-point tensor.
        ValueError: If shapes do not fit, ``cam`` leaves [0, 1], ``low`` exceeds ``high``, or ``refine`` comes
            without ``image``.

    Examples:
        >>> import torch
        >>> dual_threshold_mask(torch.tensor([[[[0.9, 0.2, 0.0]]]]))
        tensor([[[  1, 255,   0]]])

    Source:
        Ahn et al., "Weakly Supervised Learning of Instance Segmentation with Inter-pixel Relations", CVPR
        2019: `cam_to_ir_label` of the official program, thresholds included.
    """
    check_shapes(cam=(cam, "B C h w"))
    check_probability("high", high)
    check_number("low", low, at_least=0, at_most=high)
    _check_ignore_index(ignore_index, num_classes=1 + cam.shape[1])
    if refine is not None and image is None:
        raise ValueError("image: expected the images that refine works on, got None")
    if image is not None:
        check_shapes(cam=(cam, "B C h w"), image=(image, "B 3 H W"))
        cam = resize(cam, (image.shape[2], image.shape[3]))

    def label(background: float) -> Tensor:
        scores = constant_background(cam, background)
        return scores_to_mask(scores if refine is None or image is None else refine(image, scores))

    strict, loose = label(high), label(low)
    return torch.where((strict == 0) & (loose > 0), ignore_index, strict)


def _check_ignore_index(ignore_index: int, num_classes: int) -> None:
    if 0 <= ignore_index < num_classes:
        raise ValueError(
            f"ignore_index: expected a label outside the {num_classes} classes (background included), "
            f"got {ignore_index}"
        )
