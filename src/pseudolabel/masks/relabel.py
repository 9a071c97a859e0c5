"""Cyclic masks: a trained segmentation network labels its own training images anew."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pseudolabel._checks import (
    check_callable,
    check_count,
    check_finite,
    check_float,
    check_labels,
    check_sequence,
    check_shapes,
    check_size,
)
from pseudolabel._maps import resize, working_dtype
from pseudolabel.masks.thresholds import scores_to_mask
from pseudolabel.refine import CRF_PRESETS, DenseCRF

__all__ = ["average_views", "relabel", "slide_logits"]

Refiner = Callable[[Tensor, Tensor], Tensor]

_segmentation_crf = DenseCRF(**CRF_PRESETS["deeplab"])


def slide_logits(
    segmenter: Callable[[Tensor], Tensor],
    image: Tensor,
    window: tuple[int, int] = (512, 512),
    stride: tuple[int, int] = (480, 480),
    *,
    batch_size: int = 8,
) -> Tensor:
    """Logits of a large image, averaged over overlapping windows that the network sees one size of.

    Along an axis of length `L` there are `max(ceil((L - window) / stride), 0) + 1` windows, one stride apart,
    the last one moved inside. An image smaller than the window is one window of its own size, not padded.

    Args:
        segmenter: Callable from images (N,3,h,w), normalised as it wants them, to logits (N,1+C,h',w').
        image: Images (B,3,H,W) of one size, as ``segmenter`` wants them.
        window: Size (H,W) of a window.
        stride: Steps (down, right) between windows, at most ``window``, or pixels between windows would be
            seen by none.
        batch_size: Windows that go through the network at once.

    Returns:
        Logits (B,1+C,H,W).

    Raises:
        TypeError: If ``image`` is not a floating-point tensor.
        ValueError: If ``image`` is not (B,3,H,W), the segmenter returns no maps, a size is below 1, or
            ``stride`` above ``window``.

    Examples:
        >>> import torch
        >>> slide_logits(lambda x: x[:, :2], torch.rand(1, 3, 30, 40), window=(16, 16), stride=(8, 8)).shape
        torch.Size([1, 2, 30, 40])

    Source:
        `slide_inference` of the official PMM segmentation program at 2cbb54e (MMSegmentation).
    """
    check_shapes(image=(image, "B 3 H W"))
    check_float(image=image)
    check_callable(segmenter=segmenter)
    check_size(window=window, stride=stride)
    check_count(batch_size=batch_size)
    if stride[0] > window[0] or stride[1] > window[1]:
        raise ValueError(
            f"stride: expected at most window {tuple(window)}, or pixels between windows would be seen by "
            f"none, got {tuple(stride)}"
        )
    height, width = min(window[0], image.shape[2]), min(window[1], image.shape[3])
    corners = [
        (top, left)
        for top in _window_starts(image.shape[2], height, stride[0])
        for left in _window_starts(image.shape[3], width, stride[1])
    ]
    if len(image) == 0:
        raise ValueError(f"image: expected at least one image, got {tuple(image.shape)}")
    places = [(b, top, left) for top, left in corners for b in range(len(image))]
    total: Tensor | None = None
    count = image.new_zeros(1, 1, *image.shape[2:])
    for first in range(0, len(places), batch_size):
        part = places[first : first + batch_size]
        crops = torch.stack([image[b, :, y : y + height, x : x + width] for b, y, x in part])
        logits = segmenter(crops)
        check_shapes(**{"crops": (crops, "B 3 h w"), "segmenter(crops)": (logits, "B N hi wi")})
        check_float(**{"segmenter(crops)": logits})
        logits = resize(logits.to(working_dtype(logits)), (height, width))
        if total is None:
            total = logits.new_zeros(len(image), logits.shape[1], *image.shape[2:])
        for (b, y, x), one in zip(part, logits, strict=True):
            total[b, :, y : y + height, x : x + width] += one
    for y, x in corners:
        count[:, :, y : y + height, x : x + width] += 1
    assert total is not None  # noqa: S101  (there is a window at least)
    return total / count.to(total.dtype)


def average_views(logits: Sequence[Tensor], size: tuple[int, int], *, flip: bool = True) -> Tensor:
    """Mean class probabilities of the views of one image: resize, softmax, mirror back, average.

    Args:
        logits: Logits (B,1+C,h_i,w_i) in the order of `make_views`, plain and mirrored by turns.
        size: Size (H,W) of the image.
        flip: Whether every second view is mirrored.

    Returns:
        Probabilities (B,1+C,H,W), float32 for half precision.

    Raises:
        TypeError: If a view is not a floating-point tensor.
        ValueError: If there are no views, an odd number of them with ``flip``, or shapes do not fit.

    Examples:
        >>> import torch
        >>> view = torch.tensor([[[[0.0, 9.0]], [[9.0, 0.0]]]])
        >>> average_views([view, view.flip(-1)], (1, 2)).argmax(1)
        tensor([[[1, 0]]])

    Source:
        `aug_test` of the official PMM segmentation program at 2cbb54e (MMSegmentation).
    """
    check_sequence(logits=logits)
    check_size(size=size)
    if not logits or (flip and len(logits) % 2):
        wanted = "an even number of views, plain and mirrored by turns" if flip else "at least one view"
        raise ValueError(f"logits: expected {wanted}, got {len(logits)}")
    total: Tensor | None = None
    for number, view in enumerate(logits):
        check_shapes(**{"logits[0]": (logits[0], "B N h w"), f"logits[{number}]": (view, "B N hi wi")})
        check_float(**{f"logits[{number}]": view})
        check_finite(**{f"logits[{number}]": view})
        probs = resize(view.to(working_dtype(view)), size).softmax(1)
        probs = probs.flip(-1) if flip and number % 2 else probs
        total = probs if total is None else total + probs
    assert total is not None  # noqa: S101  (there is a view at least)
    return total / len(logits)


def relabel(
    image: Tensor,
    logits: Sequence[Tensor],
    labels: Tensor | None = None,
    *,
    flip: bool = True,
    crf: Refiner | None = _segmentation_crf,
) -> Tensor:
    """Label images anew from what a segmentation network says of their views: the cyclic pseudo-mask.

        p = average_views(logits),  Q = crf(image, p),  mask = argmax Q

    The network that made the logits was trained on the masks of the round before; the masks of this round
    replace them as a whole, and the next network starts from the beginning. The official program takes 12
    views (ratios 0.5 to 1.75, mirrored), one round, and checkpoints that were chosen on true masks.

    Args:
        image: Images (B,3,H,W) in [0, 1].
        logits: Logits (B,1+C,h_i,w_i) of each view, as `average_views` takes them; one view is enough.
        labels: Image-level labels (B,C). With them, absent classes get no probability before the CRF. The
            official program does without, although the labels of training images are known.
        flip: Whether every second view is mirrored.
        crf: Refiner `(image, probs) -> probs`. By default `dense_crf` with the `deeplab` settings; None goes
            without.

    Returns:
        Mask (B,H,W) int64: 0 background, c+1 class c. No pixel is ignored.

    Raises:
        TypeError: If ``image`` or a view is not floating-point.
        ValueError: If shapes do not fit, values are out of range, or ``labels`` are not multi-hot.

    Examples:
        >>> import torch
        >>> logits = torch.tensor([[[[2.0, 0.0]], [[0.0, 3.0]], [[1.0, 4.0]]]])
        >>> image = torch.zeros(1, 3, 1, 2)
        >>> relabel(image, [logits], flip=False, crf=None)
        tensor([[[0, 2]]])
        >>> relabel(image, [logits], torch.tensor([[1, 0]]), flip=False, crf=None)
        tensor([[[0, 1]]])

    Source:
        Li et al., "Pseudo-mask Matters in Weakly-supervised Semantic Segmentation", ICCV 2021; matches the
        official implementation at 2cbb54e (the paper's own equations were not at hand).
    """
    check_shapes(image=(image, "B 3 H W"))
    check_float(image=image)
    probs = average_views(logits, (image.shape[2], image.shape[3]), flip=flip)
    check_shapes(image=(image, "B 3 H W"), **{"logits[0]": (logits[0], "B N h w")})
    if labels is not None:
        check_shapes(**{"logits[0]": (logits[0][:, 1:], "B C h w")}, labels=(labels, "B C"))
        check_labels(labels)
        allowed = torch.cat([torch.ones_like(labels[:, :1]), labels], dim=1) != 0
        probs = probs * allowed[:, :, None, None]
        probs = probs / probs.sum(1, keepdim=True).clamp(min=torch.finfo(probs.dtype).tiny)
    mask = scores_to_mask(probs if crf is None else crf(image, probs))
    if labels is None or crf is None:
        return mask
    # The CRF clips zeros: where all present classes are far off, an absent one could come back.
    return mask.where(allowed.gather(1, mask.flatten(1)).view_as(mask), 0)


def _window_starts(length: int, window: int, stride: int) -> list[int]:
    count = max(-(-(length - window) // stride), 0) + 1
    return [min(number * stride, length - window) for number in range(count)]
