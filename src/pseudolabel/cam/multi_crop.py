"""Multi-crop inference: magnified windows of an image go through the network, their maps are merged."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pseudolabel._checks import (
    check_boxes,
    check_callable,
    check_count,
    check_float,
    check_integer,
    check_labels,
    check_probability,
    check_shapes,
    check_size,
    check_unit_range,
)
from pseudolabel._maps import gather_present, present_classes, resize, scatter_present, working_dtype
from pseudolabel.cam.views import check_scales

__all__ = ["crop_labels", "multi_crop_boxes", "multi_crop_cam"]

_SCALES = (0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0)

Box = tuple[int, int, int, int]


def multi_crop_boxes(
    size: tuple[int, int],
    scales: Sequence[float] = _SCALES,
    crop_size: int = 448,
    stride: int = 300,
    *,
    full_windows: bool = False,
) -> Tensor:
    """Windows over an image that is thought of as enlarged by each scale, in pixels of the image itself.

    Along an axis of `L` pixels at scale `s`, with `l = int(L s)`:

        n = 1 + ceil(max(0, l - crop_size) / stride)
        window i < n - 1:  from i stride  to  min(l, (i + 1) stride)
        the last window:   from max(0, l - crop_size)  to  l

    all divided by `s` and cut to integers. So all windows but the last of each axis are only ``stride`` wide,
    do not overlap each other, and are magnified more than the scale says; the last row or column of the image
    may lie in no window of a scale. With ``full_windows``, a variant of ours, window i reaches
    to `i stride + crop_size`, ends are rounded up, and the last window ends where the image does: windows
    overlap, and each scale covers the whole image.

    Args:
        size: Size (H,W) of the image.
        scales: Factors of both sides, > 0. The boxes of one scale come from a call with that scale alone.
        crop_size: Side of a window in the enlarged image.
        stride: Step between windows in the enlarged image. With ``full_windows`` at most ``crop_size``.
        full_windows: Let all windows be ``crop_size`` wide.

    Returns:
        Boxes (n,4) int64 on the CPU, a row being top, left, bottom, right, the ends exclusive:
        `image[..., top:bottom, left:right]`. They are ordered by scale, then left to right, then top to
        bottom. Each holds a pixel at least and lies in the image.

    Raises:
        ValueError: If a size or the stride is no integer >= 1, there is no scale or one is not positive, or
            ``stride`` would leave gaps between full windows.

    Examples:
        >>> multi_crop_boxes((4, 10), scales=(1.0,), crop_size=4, stride=3)
        tensor([[ 0,  0,  4,  3],
                [ 0,  3,  4,  6],
                [ 0,  6,  4, 10]])
        >>> multi_crop_boxes((4, 10), scales=(1.0,), crop_size=4, stride=3, full_windows=True)
        tensor([[ 0,  0,  4,  4],
                [ 0,  3,  4,  7],
                [ 0,  6,  4, 10]])

    Source:
        Li et al., "Pseudo-mask Matters in Weakly-supervised Semantic Segmentation", ICCV 2021; matches the
        official implementation at 134ad33. That one fails where a box comes out empty (an image of one pixel
        at scale 0.75); here such a box is widened to a pixel.
    """
    return torch.tensor(_boxes(size, scales, crop_size, stride, full_windows), dtype=torch.int64)


def multi_crop_cam(  # noqa: PLR0917
    cam_fn: Callable[[Tensor], Tensor],
    image: Tensor,
    labels: Tensor | None = None,
    scales: Sequence[float] = _SCALES,
    crop_size: int = 448,
    stride: int = 300,
    *,
    flip: bool = True,
    full_windows: bool = False,
    batch_size: int = 16,
) -> Tensor:
    """Maps of an image seen through the windows of `multi_crop_boxes`, averaged where windows overlap.

    Each window is resized to a square of ``crop_size``, whatever its aspect (bilinear, anti-aliased where
    that makes it smaller, as the photo library of the official program does it), and goes through the network
    plain and mirrored. Its maps are resized to the window, mirrored back and added up:

        cam(p) = sum of the maps whose window holds p / max(their number, 1)

    A photo of 375 x 500 has 87 windows at the default settings, that is 174 forward passes. Memory is that of
    ``batch_size`` crops in the network and of the result, however many windows there are, when no gradient
    is recorded.

    The official program normalises these maps by `(x - m) / (M - m + 1e-5)` after setting to zero what lies
    below `m + 1e-5`, with their minimum `m` and maximum `M`. For the maps of a network without negative
    outputs that is `normalize_cam(cam, "minmax")`: once the official values are clipped at 0, the two differ
    by less than `1e-5 / (M - m + 1e-5)`, and only at pixels within 1e-5 of the minimum.

    Args:
        cam_fn: Callable from images (N,3,h,w) to raw maps (N,C,h',w'), such as `CAM`.
        image: Images (B,3,H,W) of one size, as ``cam_fn`` wants them (normalised for the network).
        labels: Image-level labels (B,C). Maps of absent classes are 0, and cost nothing after the network.
        scales: Factors of both sides, > 0.
        crop_size: Side of the crops that the network sees.
        stride: Step between windows in the enlarged image.
        flip: See each window mirrored as well.
        full_windows: Let all windows be ``crop_size`` wide, see `multi_crop_boxes`.
        batch_size: Crops that go through the network at once.

    Returns:
        Raw maps (B,C,H,W), 0 where no window lies: normalise them with `normalize_cam(cam, "minmax")`.

    Raises:
        TypeError: If ``image`` is not a floating-point tensor.
        ValueError: If shapes do not fit, there is no image, ``cam_fn`` returns no maps, or a setting is out
            of range.

    Examples:
        >>> import torch
        >>> brightness = lambda x: x.mean(1, keepdim=True)
        >>> multi_crop_cam(brightness, torch.ones(2, 3, 8, 12), crop_size=8, stride=6).shape
        torch.Size([2, 1, 8, 12])

    Source:
        Li et al., "Pseudo-mask Matters in Weakly-supervised Semantic Segmentation", ICCV 2021; matches the
        official implementation (`infer_multi_crop` at 134ad33).
    """
    check_shapes(image=(image, "B 3 H W"))
    check_float(image=image)
    check_callable(cam_fn=cam_fn)
    check_count(batch_size=batch_size, **{"image: number of images": len(image)})
    size = (image.shape[2], image.shape[3])
    boxes = _boxes(size, scales, crop_size, stride, full_windows)
    if labels is not None:
        check_shapes(image=(image, "B 3 H W"), labels=(labels, "B C"))
        check_labels(labels)
        index, valid = present_classes(labels)
    views = [(owner, box) for box in boxes for owner in range(len(image))]
    total: Tensor | None = None
    for first in range(0, len(views), batch_size):
        part = views[first : first + batch_size]
        owners = [owner for owner, _ in part]
        crops = torch.cat([_crop(image[owner : owner + 1], box, crop_size) for owner, box in part])
        cam = _run(cam_fn, crops)
        dtype, num_classes = cam.dtype, cam.shape[1]
        cam = cam.to(working_dtype(cam))
        if flip:  # resizing is linear: the two are added before it, at the small size
            cam = cam + _run(cam_fn, crops.flip(-1)).to(cam.dtype).flip(-1)
        if labels is not None:
            check_shapes(labels=(labels, "B C"), **{"cam_fn(crops)": (cam, "N C hi wi")})
            cam = gather_present(cam, index[owners])
        if total is None:
            total = cam.new_zeros(len(image), cam.shape[1], *size)
        # Windows of one size could be resized together; measured, that is no faster than one by one.
        for (owner, (top, left, bottom, right)), one in zip(part, cam, strict=True):
            total[owner, :, top:bottom, left:right] += resize(one[None], (bottom - top, right - left))[0]
    assert total is not None  # noqa: S101  (there is a box at least)
    count = total.new_zeros(size)
    for top, left, bottom, right in boxes:
        count[top:bottom, left:right] += 2 if flip else 1
    merged = (total / count.clamp(min=1)).to(dtype)
    return merged if labels is None else scatter_present(merged, index, valid, num_classes)


def crop_labels(
    scores: Tensor, boxes: Tensor, *, score_threshold: float = 0.9, overlap: float = 0.1
) -> Tensor:
    """Labels of crops, for training a classifier on the windows of `multi_crop_boxes`.

    With the sure region `R = {score > score_threshold}` of a class in the image and the box `B`:

        present  iff  |R and B| / |R| > overlap   or   |R and B| / |B| > overlap

    so a crop has a class when it holds a part of the object, or the object fills a part of it. A class
    whose `R` is empty is in no crop. In the official training a scale is drawn, then boxes of that scale
    until one has a class; the scores are those of a dense CRF over the maps of a first classifier.

    Args:
        scores: Scores (B,1+C,H,W) in [0, 1], background first; those of absent classes 0.
        boxes: Boxes (n,4), integers: top, left, bottom, right, as `multi_crop_boxes` makes them. They go for
            each image of the batch.
        score_threshold: Score above which a pixel is sure, in [0, 1].
        overlap: Least share of the region or of the box, in [0, 1].

    Returns:
        Labels (B,n,C) bool, multi-hot.

    Raises:
        TypeError: If ``scores`` are not floating-point or ``boxes`` not integers.
        ValueError: If shapes do not fit, a box is empty or leaves the image, or a value is out of range.

    Examples:
        >>> import torch
        >>> scores = torch.tensor([[[[1.0, 0.0, 0.0, 0.0]], [[0.0, 1.0, 1.0, 1.0]]]])
        >>> crop_labels(scores, torch.tensor([[0, 0, 1, 1], [0, 0, 1, 2]]))
        tensor([[[False],
                 [ True]]])

    Source:
        Li et al., "Pseudo-mask Matters in Weakly-supervised Semantic Segmentation", ICCV 2021; matches the
        official implementation (`update_label` at 134ad33).
    """
    check_shapes(scores=(scores, "B N H W"), boxes=(boxes, "n 4"))
    check_float(scores=scores)
    check_integer(boxes=boxes)
    check_probability("score_threshold", score_threshold)
    check_probability("overlap", overlap)
    check_unit_range(scores=scores)
    check_boxes(boxes, (scores.shape[2], scores.shape[3]))
    top, left, bottom, right = boxes.to(scores.device, torch.int64).unbind(1)
    # The integral image holds at (y, x) how many sure pixels lie above and left of there. A count of pixels
    # fits int32, and this is the largest tensor of the function.
    sure = F.pad((scores[:, 1:] > score_threshold).to(torch.int32), (1, 0, 1, 0))
    integral = sure.cumsum(-1, dtype=torch.int32).cumsum(-2, dtype=torch.int32)
    inside = (
        integral[..., bottom, right]
        - integral[..., top, right]
        - integral[..., bottom, left]
        + integral[..., top, left]
    ).double()
    region = integral[..., -1:, -1].double()
    area = ((bottom - top) * (right - left)).double()
    present = (inside / region.clamp(min=1) > overlap) | (inside / area > overlap)
    return present.transpose(1, 2)


def _boxes(
    size: tuple[int, int], scales: Sequence[float], crop_size: int, stride: int, full_windows: bool
) -> list[Box]:
    check_size(size=size)
    check_count(crop_size=crop_size, stride=stride)
    check_scales(scales)
    if full_windows and stride > crop_size:
        raise ValueError(f"stride: expected at most crop_size {crop_size} for full windows, got {stride}")
    boxes = []
    for scale in scales:
        rows, columns = (_windows(side, scale, crop_size, stride, full_windows) for side in size)
        boxes += [(top, left, bottom, right) for left, right in columns for top, bottom in rows]
    return boxes


def _windows(
    length: int, scale: float, crop_size: int, stride: int, full_windows: bool
) -> list[tuple[int, int]]:
    """Spans of the windows along one axis, from the enlarged image back to its own pixels."""
    scaled = max(1, int(length * scale))
    count = 1 + math.ceil(max(0, scaled - crop_size) / stride)
    reach = crop_size if full_windows else stride
    spans = [(number * stride, min(scaled, number * stride + reach)) for number in range(count - 1)]
    spans.append((max(0, scaled - crop_size), scaled))
    to_end = math.ceil if full_windows else int
    windows = [(int(start / scale), min(length, to_end(end / scale))) for start, end in spans]
    if full_windows:
        windows[-1] = (windows[-1][0], length)
    return [(start, max(start + 1, end)) for start, end in windows]


def _run(cam_fn: Callable[[Tensor], Tensor], crops: Tensor) -> Tensor:
    maps = cam_fn(crops)
    check_shapes(**{"crops": (crops, "N 3 h w"), "cam_fn(crops)": (maps, "N C hi wi")})
    check_float(**{"cam_fn(crops)": maps})
    return maps


def _crop(image: Tensor, box: Box, size: int) -> Tensor:
    top, left, bottom, right = box
    crop = image[:, :, top:bottom, left:right]
    # Half precision is resized in float32, as in `make_views`.
    crop = F.interpolate(
        crop.to(working_dtype(crop)), size=(size, size), mode="bilinear", align_corners=False, antialias=True
    )
    return crop.to(image.dtype)
