"""Views of an image at several scales and mirrored, and the merging of their maps."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from pseudolabel._checks import (
    check_callable,
    check_choice,
    check_float,
    check_labels,
    check_number,
    check_sequence,
    check_shapes,
    check_size,
)
from pseudolabel._maps import gather_present, present_classes, resize, scatter_present, working_dtype
from pseudolabel.cam.gradient_cam import GradCAM

__all__ = ["FlipMerge", "check_scales", "make_views", "merge_views", "multi_scale_cam"]

FlipMerge = Literal["sum", "max"]

_MAX_SCALE = 64  # of both sides: an image of 500 x 500 pixels becomes one of 10^9


def make_views(
    image: Tensor, scales: Sequence[float] = (0.5, 1.0, 1.5, 2.0), flip: bool = True
) -> list[Tensor]:
    """Resize an image to each scale, each plain and then mirrored left to right.

    Resizing is bicubic with anti-aliasing, as the photo libraries of the published programs do it; a side of
    `n` pixels becomes `max(1, round(n * scale))`.

    Args:
        image: Images (B,3,H,W), normalised for the network or not.
        scales: Factors of both sides, > 0.
        flip: Let a mirrored view follow each plain one.

    Returns:
        Views (B,3,h,w) in the order plain, mirrored of the first scale, then of the second, ...

    Raises:
        TypeError: If ``image`` is not a floating-point tensor.
        ValueError: If ``image`` is not (B,3,H,W), or there is no scale, or one is not positive.

    Examples:
        >>> import torch
        >>> [tuple(view.shape[2:]) for view in make_views(torch.rand(1, 3, 6, 8), scales=(0.5, 1.0))]
        [(3, 4), (3, 4), (6, 8), (6, 8)]
    """
    check_shapes(image=(image, "B 3 H W"))
    check_float(image=image)
    check_scales(scales)
    views = []
    for scale in scales:
        view = _rescale(image, scale)
        views += [view, view.flip(-1)] if flip else [view]
    return views


def merge_views(
    cams: Sequence[Tensor],
    size: tuple[int, int],
    labels: Tensor | None = None,
    *,
    flip: bool = True,
    flip_merge: FlipMerge = "sum",
) -> Tensor:
    """Merge the maps of the views of `make_views`: mirror back, resize to one size, sum over the scales.

    Args:
        cams: Maps (B,C,h_i,w_i) in the order of the views: plain and mirrored by turns where ``flip`` is set.
        size: Size (H,W) of the merged maps.
        labels: Image-level labels (B,C). Maps of absent classes are 0, and cost nothing.
        flip: Whether every second view is mirrored.
        flip_merge: A plain map and its mirrored partner are joined by `sum` (IRN, SEAM, PMM) or by the
            larger value at each pixel, `max` (AFA, ToCo).

    Returns:
        Raw maps (B,C,H,W): normalise them once, after merging (`normalize_cam`).

    Raises:
        TypeError: If a map is not a floating-point tensor.
        ValueError: If there are no maps, an odd number of them with ``flip``, or shapes that do not fit.

    Examples:
        >>> import torch
        >>> plain = torch.tensor([[[[0.0, 1.0]]]])
        >>> merge_views([plain, plain.flip(-1)], size=(1, 2))
        tensor([[[[0., 2.]]]])
    """
    check_sequence(cams=cams)
    check_size(size=size)
    step = 2 if flip else 1
    if not cams or len(cams) % step:
        wanted = "an even number of maps, plain and mirrored by turns" if flip else "at least one map"
        raise ValueError(f"cams: expected {wanted}, got {len(cams)}")
    for number, cam in enumerate(cams):
        check_shapes(**{"cams[0]": (cams[0], "B C h w"), f"cams[{number}]": (cam, "B C hi wi")})
        check_float(**{f"cams[{number}]": cam})
    check_choice("flip_merge", flip_merge, FlipMerge)
    if labels is not None:
        check_shapes(labels=(labels, "B C"), **{"cams[0]": (cams[0], "B C h w")})
        check_labels(labels)
        index, valid = present_classes(labels)
        num_classes = cams[0].shape[1]
        cams = [gather_present(cam, index) for cam in cams]

    merged = cams[0].new_zeros(*cams[0].shape[:2], *size, dtype=working_dtype(cams[0]))
    for first in range(0, len(cams), step):
        cam = cams[first].to(merged.dtype)
        if flip:
            mirrored = cams[first + 1].to(merged.dtype).flip(-1)
            # Resizing is linear: sums are taken before it, at the small size.
            cam = (
                cam + mirrored
                if flip_merge == "sum"
                else torch.maximum(resize(cam, size), resize(mirrored, size))
            )
        merged = merged + resize(cam, size)
    merged = merged.to(cams[0].dtype)
    return merged if labels is None else scatter_present(merged, index, valid, num_classes)


def multi_scale_cam(
    cam_fn: Callable[[Tensor], Tensor],
    image: Tensor,
    labels: Tensor | None = None,
    scales: Sequence[float] = (0.5, 1.0, 1.5, 2.0),
    flip: bool = True,
    *,
    flip_merge: FlipMerge = "sum",
) -> Tensor:
    """Maps of an image seen at several scales and mirrored, summed at the image's size.

    The network runs once a scale: on a batch of the plain images followed by the mirrored ones.
    A gradient CAM (`GradCAM` and its kin) gets the labels of that batch as well: ``labels``, twice over.

    Args:
        cam_fn: Callable from images (N,3,h,w) to raw maps (N,C,h',w'), such as `CAM`; or a `GradCAM`. N is
            2B with ``flip``: a function of your own that needs ``labels`` takes `labels.repeat(2, 1)`.
        image: Images (B,3,H,W) of one size, as ``cam_fn`` wants them (normalised for the network).
        labels: Image-level labels (B,C). Maps of absent classes are 0, and cost nothing after the network.
        scales: Factors of both sides, > 0.
        flip: See each scale mirrored as well.
        flip_merge: How the two are joined, `sum` or `max`.

    Returns:
        Raw maps (B,C,H,W): normalise them with `normalize_cam`.

    Raises:
        TypeError: If ``image`` is not a floating-point tensor.
        ValueError: If shapes do not fit, ``cam_fn`` returns no maps, or a setting is unknown.

    Examples:
        >>> import torch
        >>> brightness = lambda x: x.mean(1, keepdim=True)
        >>> multi_scale_cam(brightness, torch.ones(2, 3, 8, 8), scales=(0.5, 1.0)).shape
        torch.Size([2, 1, 8, 8])

    Source:
        The official PMM program (`infer_multi_scale` at 134ad33), as in IRN and SEAM before it.
    """
    check_shapes(image=(image, "B 3 H W"))
    check_float(image=image)
    check_callable(cam_fn=cam_fn)
    check_scales(scales)
    cams: list[Tensor] = []
    for scale in scales:
        views = torch.cat(make_views(image, (scale,), flip))
        if labels is not None and isinstance(cam_fn, GradCAM):  # gradients are of present classes only
            maps = cam_fn(views, labels.repeat(2 if flip else 1, 1))
        else:
            maps = cam_fn(views)
        check_shapes(**{"image": (views, "B 3 H W"), "cam_fn(image)": (maps, "B C h w")})
        check_float(**{"cam_fn(image)": maps})
        cams += maps.chunk(2 if flip else 1)
    return merge_views(cams, (image.shape[2], image.shape[3]), labels, flip=flip, flip_merge=flip_merge)


def check_scales(scales: Sequence[float]) -> None:
    """Check that there are scales, all positive, and none that no memory holds."""
    check_sequence(scales=scales)
    if not len(scales):
        raise ValueError("scales: expected at least one scale, got none")
    for scale in scales:
        check_number("scales", scale, above=0)
        if scale > _MAX_SCALE:
            raise ValueError(f"scales: expected scales of at most {_MAX_SCALE}, got {scale!r}")


def _rescale(image: Tensor, scale: float) -> Tensor:
    size = [max(1, round(side * scale)) for side in image.shape[2:]]
    if size == list(image.shape[2:]):
        return image
    # Half precision is resized in float32: PyTorch has no such kernel for it on a CPU.
    view = F.interpolate(
        image.to(working_dtype(image)), size=size, mode="bicubic", align_corners=False, antialias=True
    )
    return view.to(image.dtype)
