"""Class-conditional inference: the network looks again at what is left once its first finds are erased."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pseudolabel._checks import (
    check_callable,
    check_count,
    check_finite,
    check_float,
    check_labels,
    check_number,
    check_sequence,
    check_shapes,
    check_size,
)
from pseudolabel._maps import gather_present, present_classes, scatter_present, working_dtype
from pseudolabel.cam._network import EvalMode
from pseudolabel.cam.views import check_scales, make_views, merge_views

__all__ = [
    "ClassConditionalInference",
    "ResponseMap",
    "class_center_boxes",
    "class_conditional_response",
    "infer_response_map",
]

CamFn = Callable[[Tensor], Tensor]
Box = tuple[int, int, int, int]
_Patch = tuple[int, Box]  # number of its image, and where it lies there

_SCALES = (1.0, 0.5, 1.5, 2.0)
_MARGINS = {1: 10, 2: 20}


class ResponseMap(NamedTuple):
    """What class-conditional inference finds.

    Attributes:
        response: Maps (B,C,H,W) in [0, 1]; 0 for absent classes.
        passes: How often the network looked at each patch, (B,P) int64; 0 for an image without labels.
        boxes: The patches (B,P,4) int64, a row being top, left, bottom, right, the ends exclusive.
    """

    response: Tensor
    passes: Tensor
    boxes: Tensor


@torch.no_grad()
def infer_response_map(
    cam_fn: CamFn,
    image: Tensor,
    labels: Tensor,
    *,
    scales: Sequence[float] = _SCALES,
    flip: bool = True,
    split: bool = True,
    margins: Mapping[int, int] = _MARGINS,
    include_full_image: bool = False,
    joint: bool = True,
    max_passes: int = 5,
    erase_threshold: float = 0.7,
    stop_fraction: float = 0.02,
    min_response: float = 0.0,
    eps: float = 1e-5,
    max_pixels: int | None = None,
) -> ResponseMap:
    """Find where classes are: split the image around their centres, look, erase and look again, fuse.

        box_1..4 = class_center_boxes(multi-scale maps of the image)
        R_k = class_conditional_response of the patch in box_k
        response(p) = max of R_k(p) over the patches k that hold p

    An image with one or two classes is split; one with more is a single patch. The maps of the whole image
    tell the centres only, they are not part of the result.

    Only present classes are computed after the network, nothing is for images without labels, and nothing
    twice: equal patches of an image are one. Patches of one size go through the network together, and leave
    the batch when they are done.

    Args:
        cam_fn: Callable from images (N,3,h,w) to maps (N,C,h',w'), such as `CAM` or an `nn.Module`. Negative
            values are set to 0. A module is in eval mode meanwhile, and all modules inside get their own mode
            back; a callable that wraps a network has to see to that (`CAM` does). No gradient is recorded.
        image: Images (B,3,H,W) of one size, as ``cam_fn`` wants them (normalised for the network).
        labels: Image-level labels (B,C).
        scales: Factors of both sides at which a patch is seen, > 0.
        flip: See each scale mirrored as well.
        split: False takes each image as a single patch.
        margins: Number of present classes -> pixels by which the patches reach beyond the centres, see
            `class_center_boxes`. Images with other numbers are not split.
        include_full_image: Let the whole image be a fifth patch.
        joint: Erase what any class responds to. False looks for each class alone, with a mask of its own.
        max_passes: Looks at a patch at most. The first one, at the clean patch, counts.
        erase_threshold: A pixel is erased where a response reaches this value, > 0. Above 1 nothing is.
        stop_fraction: A patch is done when a pass newly erases less than this part of it; at 0 or below it
            gets all passes. The official program has 0.02 today, and had 0.01 when the paper appeared.
        min_response: A class whose maps, summed over the views, stay below this value in a pass counts for
            nothing there. By default 0, off: the strongest place of a present class then is nearly 1 in every
            patch, whether the patch shows the class or not.
        eps: Guard of the division by the maximum, >= 0.
        max_pixels: What goes through the network at once, in pixels of its views; a larger view goes alone.
            By default 2^17 on a CPU, where larger batches are slower, and 2^21 elsewhere. Memory follows it,
            the result does not.

    Returns:
        `ResponseMap`: maps (B,C,H,W) in the dtype of ``image``; passes (B,P) and boxes (B,P,4) of P = 4
        patches, 1 without ``split``, with the full image one more. The patches of an image that is not
        split are the same.

    Raises:
        TypeError: If ``image`` or what ``cam_fn`` returns is not a floating-point tensor.
        ValueError: If shapes do not fit, ``cam_fn`` cannot take a view (the message names its size) or
            returns values that are not finite, or a setting is out of range.

    Examples:
        >>> import torch
        >>> image = torch.rand(2, 3, 40, 60, generator=torch.Generator().manual_seed(0))
        >>> labels = torch.tensor([[1, 1, 0], [0, 0, 0]])
        >>> colour = lambda x: torch.nn.functional.avg_pool2d(x, 5)  # "classes" red, green, blue
        >>> found = infer_response_map(colour, image, labels, scales=(1.0, 0.5))
        >>> found.response.shape, found.response.amax((2, 3)).round(decimals=3).tolist()
        (torch.Size([2, 3, 40, 60]), [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
        >>> found.boxes[0].tolist()
        [[0, 0, 39, 49], [0, 9, 39, 60], [0, 0, 40, 49], [0, 9, 40, 60]]

    Source:
        Sun, Zhang and Barnes, "Inferring the Class Conditional Response Map for Weakly Supervised Semantic
        Segmentation", WACV 2022. Read off the official implementation at 96ba7d8 (`split_img.py` and
        `infer_cam.py`); what the paper's text says beyond its abstract was not at hand. Where this differs
        from that program: mirrored views are erased where the mirrored object is; the mask of a view comes
        from the patch's own, not through the scale before; boxes end at the border of the image; an image
        without labels gives zeros. ``joint=False``, ``include_full_image`` and ``min_response`` are ours.
    """
    sizes = check_shapes(image=(image, "B 3 H W"), labels=(labels, "B C"))
    check_float(image=image)
    check_labels(labels)
    check_callable(cam_fn=cam_fn)
    check_scales(scales)
    _check_margins(margins)
    _check_settings(max_passes, erase_threshold, stop_fraction, min_response, eps, max_pixels)
    size, whole = (sizes["H"], sizes["W"]), (0, 0, sizes["H"], sizes["W"])
    pixels = _pixels_at_once(max_pixels, image.device)
    views_of = partial(make_views, scales=scales, flip=False)
    index, valid = present_classes(labels)
    classes: list[int] = valid.sum(1).tolist()
    response = image.new_zeros(len(image), labels.shape[1], *size)
    boxes = torch.tensor(whole, device=image.device).repeat(len(image), 4 if split else 1, 1)
    looks: dict[_Patch, int] = {}

    with _network(cam_fn, labels.shape[1], pixels) as network:
        if split:
            wholes = [(number, whole) for number, count in enumerate(classes) if count in margins]
            for _, patches in _same_size(wholes, pixels):
                some = [number for number, _ in patches]
                clean = _seen(views_of(image[some]), None, flip)
                maps = _multi_view_cam(network, clean, index[some], size, flip)
                boxes[some] = _boxes(maps, valid[some], margins)
            if include_full_image:
                boxes = torch.cat([boxes, boxes.new_tensor(whole).expand(len(image), 1, 4)], 1)

        rows: list[list[Box]] = [[tuple(box) for box in row] for row in boxes.tolist()]
        different = {(number, box): None for number, row in enumerate(rows) for box in row if classes[number]}
        for shape, patches in _same_size(different, pixels):
            some = [number for number, _ in patches]
            most = max(classes[number] for number in some)
            found, passes = _respond(
                network,
                views_of(torch.stack([_cut(image[number], box) for number, box in patches])),
                index[some, :most],
                valid[some, :most],
                shape,
                flip=flip,
                joint=joint,
                max_passes=max_passes,
                erase_threshold=erase_threshold,
                stop_fraction=stop_fraction,
                min_response=min_response,
                eps=eps,
            )
            looks.update(zip(patches, passes.tolist(), strict=True))
            for (number, box), maps in zip(patches, found.to(response.dtype), strict=True):
                shown = index[number, : classes[number]]
                there = _cut(response[number], box)
                there[shown] = torch.maximum(there[shown], maps[: len(shown)])
    passes = boxes.new_tensor(
        [[looks.get((number, box), 0) for box in row] for number, row in enumerate(rows)]
    )
    return ResponseMap(response, passes, boxes)


@torch.no_grad()
def class_conditional_response(
    cam_fn: CamFn,
    views: Sequence[Tensor],
    labels: Tensor,
    size: tuple[int, int],
    *,
    flip: bool = True,
    joint: bool = True,
    max_passes: int = 5,
    erase_threshold: float = 0.7,
    stop_fraction: float = 0.02,
    min_response: float = 0.0,
    eps: float = 1e-5,
    max_pixels: int | None = None,
) -> ResponseMap:
    """Look at images several times, each time without what has been found so far.

    At the start `A = 0`, and nothing is erased. A pass sums the maps of the views and of their mirror images
    at the size of the result, `S`, one map a present class, and goes on:

        N = S / (max of S over the pixels + eps)         each class is brought to nearly 1 anew
        A <- max(A, N)
        erased = [ max of A over the classes >= erase_threshold ]
        stop if the newly erased part of the pixels is < stop_fraction

    In the next pass, the erased pixels of each clean view have the mean colour of that view.

    `infer_response_map` does this with patches of an image. Views are made by the caller, in any way; those
    of `make_views(image, scales, flip=False)` will do.

    Args:
        cam_fn: See `infer_response_map`.
        views: Images (B,3,h,w) at each scale, not mirrored, as ``cam_fn`` wants them.
        labels: Image-level labels (B,C).
        size: Size (H,W) of the maps.
        flip: See each view mirrored as well.
        joint: See `infer_response_map`, and so for those that follow.
        max_passes: Passes at most, the first included.
        erase_threshold: Response from which on a pixel is erased.
        stop_fraction: Least newly erased part for another pass.
        min_response: Least maximum of `S` for a class to count in a pass.
        eps: Guard of the division.
        max_pixels: What goes through the network at once.

    Returns:
        `ResponseMap`: maps (B,C,H,W) in the dtype of the views; passes (B,1), with ``joint=False`` those of
        the class that took most; boxes (B,1,4), the whole images.

    Raises:
        TypeError: If a view or what ``cam_fn`` returns is not a floating-point tensor.
        ValueError: As `infer_response_map`.

    Examples:
        >>> import torch
        >>> red = lambda x: x[:, :1]
        >>> view = torch.zeros(1, 3, 1, 100)
        >>> view[:, 0, 0, :4] = torch.tensor([8.0, 6.0, 2.0, 1.0])
        >>> found = class_conditional_response(red, [view], torch.ones(1, 1), (1, 100))
        >>> found.response[0, 0, 0, :5]  # without 8 and 6, the 2 is the highest
        tensor([1.0000, 0.7500, 1.0000, 0.5000, 0.0000])
        >>> found.passes  # the second pass erases one pixel of 100, too few for a third
        tensor([[2]])

    Source:
        As `infer_response_map`.
    """
    sizes = check_shapes(labels=(labels, "B C"))
    check_labels(labels)
    check_callable(cam_fn=cam_fn)
    check_sequence(views=views)
    if not len(views):
        raise ValueError("views: expected at least one view, got none")
    for number, view in enumerate(views):
        check_shapes(labels=(labels, "B C"), **{f"views[{number}]": (view, "B 3 h w")})
        check_float(**{f"views[{number}]": view})
    check_size(size=size)
    _check_settings(max_passes, erase_threshold, stop_fraction, min_response, eps, max_pixels)
    boxes = torch.tensor([0, 0, *size], device=labels.device).repeat(sizes["B"], 1, 1)
    response = views[0].new_zeros(*labels.shape, *size)
    passes = torch.zeros_like(boxes[..., 0])
    index, valid = present_classes(labels)
    pixels = _pixels_at_once(max_pixels, views[0].device)
    some = [number for number, count in enumerate(valid.sum(1).tolist()) if count]
    if some:
        with _network(cam_fn, labels.shape[1], pixels) as network:
            found, passes[some, 0] = _respond(
                network,
                [view[some] for view in views],
                index[some],
                valid[some],
                size,
                flip=flip,
                joint=joint,
                max_passes=max_passes,
                erase_threshold=erase_threshold,
                stop_fraction=stop_fraction,
                min_response=min_response,
                eps=eps,
            )
        response[some] = scatter_present(found, index[some], valid[some], sizes["C"]).to(response.dtype)
    return ResponseMap(response, passes, boxes)


@torch.no_grad()
def class_center_boxes(cam: Tensor, labels: Tensor, *, margins: Mapping[int, int] = _MARGINS) -> Tensor:
    """Four patches of an image that all hold the centres of its classes.

    The centre of a class is the mean place of the pixels, weighted by its map and cut to integers; that of a
    map of zeros is the middle of the image. With the extremes `y0, y1, x0, x1` of the centres of the present
    classes and the margin `b` for their number:

        top left      rows 0 .. y1 + b,   columns 0 .. x1 + b
        top right     rows 0 .. y1 + b,   columns x0 - b .. W
        bottom left   rows y0 - b .. H,   columns 0 .. x1 + b
        bottom right  rows y0 - b .. H,   columns x0 - b .. W

    ends exclusive, and inside the image: where it ends before them, so do the patches.

    Args:
        cam: Maps (B,C,H,W) at the size of the image; negative values count as 0.
        labels: Image-level labels (B,C).
        margins: Number of present classes -> margin in pixels, >= 1. Images with another number of classes
            are not split: their four patches are the whole image.

    Returns:
        Boxes (B,4,4) int64, a row being top, left, bottom, right, the ends exclusive.

    Raises:
        TypeError: If ``cam`` is not a floating-point tensor.
        ValueError: If shapes do not fit, ``cam`` is not finite, or a margin is out of range.

    Examples:
        >>> import torch
        >>> cam = torch.zeros(1, 1, 50, 80)
        >>> cam[0, 0, 20, 30:33] = 1.0
        >>> class_center_boxes(cam, torch.ones(1, 1))
        tensor([[[ 0,  0, 30, 41],
                 [ 0, 21, 30, 80],
                 [10,  0, 50, 41],
                 [10, 21, 50, 80]]])

    Source:
        As `infer_response_map` (`split_img.py`); there a patch that should begin before the image begins
        near its other end, since negative numbers count from there.
    """
    check_shapes(cam=(cam, "B C H W"), labels=(labels, "B C"))
    check_float(cam=cam)
    check_labels(labels)
    check_finite(cam=cam)
    _check_margins(margins)
    index, valid = present_classes(labels)
    return _boxes(gather_present(cam, index).clamp(min=0), valid, margins)


# From here on maps (N,P,h,w) are of the present classes alone: `index` (N,P) names them, and where `valid`
# (N,P) is not set an image has fewer than others.


def _respond(
    network: CamFn,
    views: Sequence[Tensor],
    index: Tensor,
    valid: Tensor,
    size: tuple[int, int],
    *,
    flip: bool,
    joint: bool,
    max_passes: int,
    erase_threshold: float,
    stop_fraction: float,
    min_response: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Responses (N,P,h,w) of N patches, and the passes (N,) that they took."""
    maps = _multi_view_cam(network, _seen(views, None, flip), index, size, flip)
    # A run is a patch, or a class of a patch: it has a mask of its own. All runs of a patch begin alike.
    run = torch.arange(len(valid), device=valid.device)
    shown = valid
    if not joint:
        run, place = valid.nonzero(as_tuple=True)
        maps, index, valid = maps[run, place, None], index[run, place, None], valid[run, place, None]
    response = torch.zeros_like(maps)
    keep = torch.ones_like(maps[:, 0], dtype=torch.bool)
    passes = torch.zeros_like(run)
    active = torch.arange(len(run), device=run.device)
    while True:
        response[active] = torch.maximum(
            response[active], _normalized(maps, valid[active], min_response, eps)
        )
        left = response[active].amax(1) < erase_threshold
        newly_erased = (keep[active] & ~left).sum((1, 2)).double() / left[0].numel()
        keep[active] = left
        passes[active] += 1
        active = active[(newly_erased >= stop_fraction) & (passes[active] < max_passes)]
        if not len(active):
            break
        seen = _seen((view[run[active]] for view in views), keep[active], flip)
        maps = _multi_view_cam(network, seen, index[active], size, flip)
    if not joint:
        each = response.new_zeros(*shown.shape, *size)
        each[shown] = response[:, 0]
        return each, passes.new_zeros(shown.shape).masked_scatter(shown, passes).amax(1)
    return response, passes


def _seen(views: Iterable[Tensor], keep: Tensor | None, flip: bool) -> Iterator[Tensor]:
    """Each view (N,3,h,w), erased where `keep` (N,H,W) is not set, and then its mirror images (2N,3,h,w)."""
    for view in views:
        seen = view if keep is None else _erased(view, keep)
        yield torch.cat([seen, seen.flip(-1)]) if flip else seen


def _erased(view: Tensor, keep: Tensor) -> Tensor:
    """The view (N,3,h,w) with its mean colour where the nearest pixel of `keep` (N,H,W) is not set."""
    keep = _nearest(keep, view.shape[2], view.shape[3])
    return view.where(keep[:, None], view.mean((2, 3), keepdim=True))


def _nearest(keep: Tensor, height: int, width: int) -> Tensor:
    """Resize (N,H,W) by taking for pixel i of n the pixel floor(i N / n) of N, in exact integers."""
    rows = torch.arange(height, device=keep.device) * keep.shape[1] // height
    columns = torch.arange(width, device=keep.device) * keep.shape[2] // width
    return keep[:, rows[:, None], columns]


def _multi_view_cam(
    network: CamFn, seen: Iterable[Tensor], index: Tensor, size: tuple[int, int], flip: bool
) -> Tensor:
    """Sum (N,P,H,W) of the maps of all views."""
    sides = 2 if flip else 1
    cams: list[Tensor] = []
    for view in seen:
        maps = gather_present(network(view), index.repeat(sides, 1)).clamp(min=0)
        cams += maps.to(working_dtype(maps)).chunk(sides)
    return merge_views(cams, size, flip=flip)


def _normalized(maps: Tensor, valid: Tensor, min_response: float, eps: float) -> Tensor:
    high = maps.amax((2, 3), keepdim=True)
    alive = valid[:, :, None, None] & (high > 0) & (high >= min_response)
    return (maps / (high + eps)).where(alive, 0)


def _boxes(maps: Tensor, valid: Tensor, margins: Mapping[int, int]) -> Tensor:
    """Boxes (N,4,4) around the centres of maps (N,P,H,W) without negative values."""
    count = valid.sum(1)
    height, width = (torch.full_like(count, side) for side in maps.shape[2:])
    zero = margin = torch.zeros_like(count)
    whole = torch.stack([zero, zero, height, width], 1)[:, None]
    for classes, pixels in margins.items():
        margin = margin.masked_fill(count == classes, pixels)
    y0, y1 = _extreme_centers(maps.sum(3, dtype=torch.float64), valid)
    x0, x1 = _extreme_centers(maps.sum(2, dtype=torch.float64), valid)
    top, bottom = (y0 - margin).clamp(min=0), (y1 + margin).minimum(height)
    left, right = (x0 - margin).clamp(min=0), (x1 + margin).minimum(width)
    patches = [
        torch.stack(corners, 1)
        for corners in (
            (zero, zero, bottom, right),
            (zero, left, bottom, width),
            (top, zero, height, right),
            (top, left, height, width),
        )
    ]
    return torch.stack(patches, 1).where((margin > 0)[:, None, None], whole)


def _extreme_centers(weights: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest centre (N,) of the present classes along an axis, from weights (N,P,L) there."""
    length = weights.shape[2]
    total = weights.sum(2)
    center = (weights * torch.arange(length, device=weights.device)).sum(2) / total
    center = center.floor().where(total > 0, length // 2).long()
    # Beside one that is no extreme: there may be no class at all.
    low, high = (F.pad(center.masked_fill(~valid, no), (0, 1), value=no) for no in (length, -1))
    return low.amin(1), high.amax(1)


def _cut(maps: Tensor, box: Box) -> Tensor:
    top, left, bottom, right = box
    return maps[..., top:bottom, left:right]


def _same_size(patches: Iterable[_Patch], pixels: int) -> Iterator[tuple[tuple[int, int], list[_Patch]]]:
    """Patches of one size at a time, as many as have that number of pixels, but one at least."""
    groups: dict[tuple[int, int], list[_Patch]] = {}
    for number, (top, left, bottom, right) in patches:
        groups.setdefault((bottom - top, right - left), []).append((number, (top, left, bottom, right)))
    for (height, width), group in groups.items():
        step = max(1, pixels // (height * width))
        for first in range(0, len(group), step):
            yield (height, width), group[first : first + step]


@contextmanager
def _network(cam_fn: CamFn, num_classes: int, pixels: int) -> Iterator[CamFn]:
    """The network in eval mode, its maps checked, given no more pixels at a time than stated."""

    def look(views: Tensor) -> Tensor:
        height, width = views.shape[2:]
        size = f"a view of {height} x {width} pixels (the image, or a patch of it, at one of the scales)"
        try:
            maps = cam_fn(views)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise ValueError(f"image: cam_fn fails on {size}: {error}") from error
        check_shapes(image=(views, "N 3 h w"), **{"cam_fn(image)": (maps, "N C hi wi")})
        check_float(**{"cam_fn(image)": maps})
        if maps.shape[1] != num_classes:
            raise ValueError(f"cam_fn(image): expected {num_classes} maps, as labels, got {maps.shape[1]}")
        if not maps.shape[2:].numel():
            raise ValueError(f"image: cam_fn returns an empty map for {size}, too small for its stride")
        check_finite(**{"cam_fn(image)": maps})
        return maps

    def look_by_parts(views: Tensor) -> Tensor:
        step = max(1, pixels // views.shape[2:].numel())
        return torch.cat([look(part) for part in torch.split(views, step)])

    with EvalMode(cam_fn) if isinstance(cam_fn, nn.Module) else nullcontext():
        yield look_by_parts


def _pixels_at_once(max_pixels: int | None, device: torch.device) -> int:
    if max_pixels is None:
        return 2**17 if device.type == "cpu" else 2**21
    return max_pixels


class ClassConditionalInference(nn.Module):
    """Module twin of `infer_response_map`: `infer(image, labels)`."""

    def __init__(
        self,
        cam_fn: CamFn,
        *,
        scales: Sequence[float] = _SCALES,
        flip: bool = True,
        split: bool = True,
        margins: Mapping[int, int] = _MARGINS,
        include_full_image: bool = False,
        joint: bool = True,
        max_passes: int = 5,
        erase_threshold: float = 0.7,
        stop_fraction: float = 0.02,
        min_response: float = 0.0,
        eps: float = 1e-5,
        max_pixels: int | None = None,
    ) -> None:
        super().__init__()
        check_scales(scales)
        _check_margins(margins)
        _check_settings(max_passes, erase_threshold, stop_fraction, min_response, eps, max_pixels)
        self.cam_fn = cam_fn
        self.settings: dict[str, Any] = {
            "scales": tuple(scales),
            "flip": flip,
            "split": split,
            "margins": dict(margins),
            "include_full_image": include_full_image,
            "joint": joint,
            "max_passes": max_passes,
            "erase_threshold": erase_threshold,
            "stop_fraction": stop_fraction,
            "min_response": min_response,
            "eps": eps,
            "max_pixels": max_pixels,
        }

    def forward(self, image: Tensor, labels: Tensor) -> ResponseMap:
        """See `infer_response_map`."""
        return infer_response_map(self.cam_fn, image, labels, **self.settings)

    def extra_repr(self) -> str:
        """Settings, for `print`."""
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())


def _check_settings(  # noqa: PLR0917
    max_passes: int,
    erase_threshold: float,
    stop_fraction: float,
    min_response: float,
    eps: float,
    max_pixels: int | None,
) -> None:
    check_count(max_passes=max_passes)
    if max_pixels is not None:
        check_count(max_pixels=max_pixels)
    check_number("erase_threshold", erase_threshold, above=0)
    check_number("stop_fraction", stop_fraction)
    check_number("min_response", min_response, at_least=0)
    check_number("eps", eps, at_least=0)


def _check_margins(margins: Mapping[int, int]) -> None:
    for classes, pixels in margins.items():
        check_count(**{"margins: number of classes": classes, f"margins[{classes!r}]": pixels})
