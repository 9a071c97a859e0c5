"""From scores to label maps: argmax, and the double threshold that leaves doubtful pixels out."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pseudolabel._checks import (
    check_boxes,
    check_count,
    check_finite,
    check_float,
    check_ignore_index,
    check_integer,
    check_labels,
    check_number,
    check_probability,
    check_shapes,
)
from pseudolabel._maps import gather_present, label_places, present_classes, resize, working_dtype
from pseudolabel.masks.background import constant_background

__all__ = ["DualThresholdMask", "dual_threshold_mask", "scores_to_mask"]

Refiner = Callable[[Tensor, Tensor], Tensor]


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
    check_ignore_index(ignore_index)
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
    labels: Tensor | None = None,
    boxes: Tensor | None = None,
    high: float = 0.30,
    low: float = 0.05,
    refine: Refiner | None = None,
    softmax: bool = False,
    downscale: int = 1,
    ignore_index: int = 255,
) -> Tensor:
    """Label the pixels that a strict and a loose background agree on, and ignore the rest.

        z_b = [b, cam],  or softmax [b, cam]
        y_b = argmax refine(image, z_b)
        mask = y_high where y_high > 0;  0 where y_high = y_low = 0;  ignore elsewhere and outside of the box

    With ``softmax``, ``downscale`` 2, ``high`` 0.55, ``low`` 0.2 and `varm` it is the online pseudo mask of
    RTC, made anew in each step of the training (its parents AFA and SCD have ``low`` 0.35).

    Args:
        cam: Normalised maps (B,C,h,w), in [0, 1].
        image: Images (B,3,H,W) for ``refine``; the maps are resized to them.
        labels: Image-level labels (B,C). With them the present classes alone take part: absent ones cost
            nothing, whatever their maps, and an image without a label is background.
        boxes: Box (B,4) of the real image inside each padded crop, integer: top, left, bottom, right in
            pixels of the mask, the ends exclusive. Pixels outside are ignored.
        high: Background score that a class must exceed to be labelled.
        low: Background score that no class may exceed where background is labelled.
        refine: Refiner `(image, scores) -> scores` of both score sets, such as `DenseCRF` or `VARM`. With
            ``labels`` it gets the background and as many channels as the image with the most labels has
            classes; channels that other images do not need are 0, and are not read afterwards.
        softmax: Turn the scores of each pixel into probabilities before ``refine``.
        downscale: Refine so many times smaller, rounded down, and resize the scores back.
        ignore_index: Label of the pixels left out.

    Returns:
        Mask (B,H,W) int64: 0 background, c+1 class c, ``ignore_index`` where undecided.

    Raises:
        TypeError: If ``cam`` is not a floating-point or ``boxes`` no integer tensor.
        ValueError: If shapes do not fit, ``cam`` leaves [0, 1], ``labels`` are not multi-hot, a box is empty
            or leaves the image, ``low`` exceeds ``high``, another setting is out of range, or ``refine``
            comes without ``image``.

    Examples:
        >>> import torch
        >>> dual_threshold_mask(torch.tensor([[[[0.9, 0.2, 0.0]]]]))
        tensor([[[  1, 255,   0]]])
        >>> dual_threshold_mask(torch.tensor([[[[0.9, 0.2, 0.0]]]]), boxes=torch.tensor([[0, 1, 1, 3]]))
        tensor([[[255, 255,   0]]])

    Source:
        Ahn et al., "Weakly Supervised Learning of Instance Segmentation with Inter-pixel Relations", CVPR
        2019: `cam_to_ir_label` of the official program, thresholds included. With the settings above and
        `varm` it matches `refine_cams_with_bkg_v1` of the official RTC program (arXiv 2309.00871) at 9c777e0;
        that one gives a box as top, bottom, left, right.
    """
    check_shapes(cam=(cam, "B C h w"))
    check_float(cam=cam)
    _check_settings(high, low, downscale)
    _check_ignore_index(ignore_index, num_classes=1 + cam.shape[1])
    if refine is not None and image is None:
        raise ValueError("image: expected the images that refine works on, got None")
    height, width = cam.shape[2:]
    if image is not None:
        check_shapes(cam=(cam, "B C h w"), image=(image, "B 3 H W"))
        height, width = image.shape[2:]
    if boxes is not None:
        check_shapes(cam=(cam, "B C h w"), boxes=(boxes, "B 4"))
        check_integer(boxes=boxes)
    size, small = (height, width), (max(height // downscale, 1), max(width // downscale, 1))

    cam = cam.detach()  # labels have no gradient, so the refiner need not keep a graph
    unused = None  # channels that only other images of the batch need
    if labels is not None:
        check_shapes(cam=(cam, "B C h w"), labels=(labels, "B C"))
        check_labels(labels)
        index, valid = present_classes(labels)
        cam = gather_present(cam, index).masked_fill(~valid[:, :, None, None], 0)
        unused = F.pad(~valid, (1, 0), value=False)[:, :, None, None]
    cam = resize(cam, small)
    image = None if image is None else resize(image, small)

    def label(background: float) -> Tensor:
        scores = constant_background(cam, background)
        if softmax:
            scores = _drop(scores, unused).softmax(1, dtype=working_dtype(scores))
        if refine is not None and image is not None:
            scores = refine(image, scores)
        mask = scores_to_mask(_drop(resize(scores, size), unused))
        return mask if labels is None else label_places(mask, index)

    strict, loose = label(high), label(low)
    mask = torch.where((strict == 0) & (loose > 0), ignore_index, strict)
    return mask if boxes is None else mask.where(_inside(boxes, size, mask.device), ignore_index)


class DualThresholdMask(nn.Module):
    """Module twin of `dual_threshold_mask`: `make(cam, image, labels, boxes)`."""

    def __init__(
        self,
        *,
        high: float = 0.30,
        low: float = 0.05,
        refine: Refiner | None = None,
        softmax: bool = False,
        downscale: int = 1,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        _check_settings(high, low, downscale)
        self.high = high
        self.low = low
        self.refine = refine
        self.softmax = softmax
        self.downscale = downscale
        self.ignore_index = ignore_index

    def forward(
        self,
        cam: Tensor,
        image: Tensor | None = None,
        labels: Tensor | None = None,
        boxes: Tensor | None = None,
    ) -> Tensor:
        """See `dual_threshold_mask`."""
        return dual_threshold_mask(
            cam,
            image,
            labels=labels,
            boxes=boxes,
            high=self.high,
            low=self.low,
            refine=self.refine,
            softmax=self.softmax,
            downscale=self.downscale,
            ignore_index=self.ignore_index,
        )

    def extra_repr(self) -> str:
        """Settings, for `print`."""
        return f"high={self.high}, low={self.low}, softmax={self.softmax}, downscale={self.downscale}"


def _drop(scores: Tensor, unused: Tensor | None) -> Tensor:
    """Let the unused channels win nowhere."""
    return scores if unused is None else scores.masked_fill(unused, torch.finfo(scores.dtype).min)


def _inside(boxes: Tensor, size: tuple[int, int], device: torch.device) -> Tensor:
    """Which pixels (B,H,W) lie in the box of their image."""
    check_boxes(boxes, size)
    height, width = size
    boxes = boxes.to(device, torch.int64)
    top, left, bottom, right = boxes.T[:, :, None, None]
    y, x = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
    inside: Tensor = (y >= top) & (y < bottom) & (x >= left) & (x < right)
    return inside


def _check_settings(high: float, low: float, downscale: int) -> None:
    check_probability("high", high)
    check_number("low", low, at_least=0, at_most=high)
    check_count(downscale=downscale)


def _check_ignore_index(ignore_index: int, num_classes: int) -> None:
    check_ignore_index(ignore_index)
    if 0 <= ignore_index < num_classes:
        raise ValueError(
            f"ignore_index: expected a label outside the {num_classes} classes (background included), "
            f"got {ignore_index}"
        )
