"""Fully connected CRF: maps that follow the edges of the image."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import ReadOnly, TypedDict

from pseudolabel._checks import (
    check_choice,
    check_float,
    check_ignore_index,
    check_integer,
    check_number,
    check_shapes,
    check_unit_range,
    values_unchecked,
)
from pseudolabel.refine._permutohedral import PermutohedralFilter

__all__ = ["CRF_PRESETS", "CRFBackend", "CRFSettings", "DenseCRF", "dense_crf", "probs_from_mask"]

CRFBackend = Literal["torch", "pydensecrf"]


class CRFSettings(TypedDict):
    """Keyword arguments of `dense_crf` that a preset sets."""

    gaussian: ReadOnly[tuple[float, float] | None]
    bilateral: ReadOnly[tuple[float, float, float] | None]
    iterations: ReadOnly[int]


CRF_PRESETS: Mapping[str, CRFSettings] = MappingProxyType(
    {
        # PSA, SEAM, AFA, ToCo, on softmax scores
        "psa": {"gaussian": (3.0, 3.0), "bilateral": (80.0, 13.0, 10.0), "iterations": 10},
        # IRN, AFA, on label maps: `probs_from_mask(mask, num_classes, confidence=0.7)`
        "irn_label": {"gaussian": (3.0, 3.0), "bilateral": (50.0, 5.0, 10.0), "iterations": 10},
        # DeepLab, CLIP-ES, WeCLIP, the test time of ToCo, on softmax scores
        "deeplab": {"gaussian": (1.0, 3.0), "bilateral": (67.0, 3.0, 4.0), "iterations": 10},
        # PMM, on the two maps (background, class) of one class at a time
        "pmm": {"gaussian": (3.0, 10.0), "bilateral": (80.0, 13.0, 10.0), "iterations": 10},
    }
)

_Filter = tuple[PermutohedralFilter, float]  # a kernel and its compatibility
_CPU_BLOCK = 1 << 18  # numbers worked on at a time: they stay in the cache
_NARROW = 32 / 256  # an image that spans less has few levels left after rounding to 8 bits

# The lattices of positions that are kept, the last used last. A pixel takes 61 bytes with the kernels of most
# programs, and up to 316 with narrow ones: four photos of a camera would take gigabytes.
_MOST_KEPT, _MOST_BYTES_KEPT = 4, 256 * 10**6
_kept: dict[tuple[int, int, int, float, torch.device], PermutohedralFilter] = {}


def dense_crf(
    image: Tensor,
    probs: Tensor,
    *,
    gaussian: tuple[float, float] | None = (3.0, 3.0),
    bilateral: tuple[float, float, float] | None = (80.0, 13.0, 10.0),
    iterations: int = 10,
    backend: CRFBackend = "torch",
) -> Tensor:
    """Mean-field marginals of the fully connected CRF with Potts compatibility.

    With `U = -log(clip(probs, 1e-5, 1))` and kernels `K_m(i, j) = exp(-|f_i - f_j|^2 / 2)` on the features

        gaussian:   f = (x, y) / sxy
        bilateral:  f = ((x, y) / sxy, (r, g, b) / srgb)        r, g, b in 0..255

    normalised to `K'_m = D^(-1/2) K_m D^(-1/2)`, where `D` are the row sums of `K_m`, it repeats

        Q <- softmax(-U + sum_m compat_m K'_m Q),        Q = softmax(-U) at the start.

    Both kernels are applied on the permutohedral lattice, as in the C++ program of the authors, which the
    results match up to float32 rounding. Nothing is differentiable here: the result carries no graph.

    Two labels cost less than three, and P problems over one image, given as (B,P,L,H,W), share its lattice
    and cost far less than P calls. On a CPU the images of a batch run one by one, on other devices together.
    The lattice of the Gaussian kernel is kept for the last four image sizes, 256 MB at most. Thread settings
    are left alone; many images go fastest through several Python threads with one torch thread each.

    Args:
        image: Photos (B,3,H,W), float in [0, 1]. They are rounded to 8 bits first, because the method is
            defined on such images. One that spans less than 32 of the 256 levels, as 12-bit data divided by
            65535 do, is taken with a `UserWarning`, unless it is constant or `bilateral` is None.
        probs: Maps (B,L,H,W), or (B,P,L,H,W) for P independent problems over the same image, in [0, 1].
            They need not sum to 1 over the labels and are not renormalised.
        gaussian: (sxy in pixels, compat) of the smoothness kernel, or None to leave it out.
        bilateral: (sxy in pixels, srgb in grey levels, compat) of the appearance kernel, or None.
        iterations: Mean-field updates. 0 gives `softmax(-U)`, the clipped maps normalised over the labels.
        backend: `torch` (this library's own, needs nothing, runs on any device), or `pydensecrf` (the C++
            program by way of the extra `pseudolabel[crf]`, on the CPU).

    Returns:
        Probabilities like ``probs`` (shape, dtype, device), summing to 1 over the labels. They are computed
        in float32 whatever the dtype. With one label they are 1.

    Raises:
        TypeError: If an argument is not a floating-point tensor.
        ValueError: If shapes disagree, values are outside [0, 1] or not finite, or a setting is out of range.
        ImportError: If the backend is `pydensecrf` and it cannot be imported.

    Examples:
        A noisy map of a photo with a dark and a bright half:

        >>> import torch
        >>> image = torch.zeros(1, 3, 4, 6)
        >>> image[..., 3:] = 1.0
        >>> bright = torch.tensor([0.2, 0.6, 0.1, 0.9, 0.4, 0.8]).expand(1, 1, 4, 6)
        >>> refined = dense_crf(image, torch.cat([1 - bright, bright], 1), **CRF_PRESETS["psa"])
        >>> refined.argmax(1)[0, 0]
        tensor([0, 0, 0, 1, 1, 1])

    Source: Krähenbühl and Koltun, "Efficient inference in fully connected CRFs with Gaussian edge
    potentials", NIPS 2011. Matches pydensecrf with diagonal kernels and symmetric normalisation.
    """
    _check_settings(gaussian, bilateral, iterations, backend)
    check_float(image=image, probs=probs)
    check_shapes(image=(image, "B 3 H W"), probs=(probs, "B L H W" if probs.dim() == 4 else "B P L H W"))
    if image.device != probs.device:
        raise ValueError(f"probs: expected the device of image, {image.device}, got {probs.device}")
    _check_image(image, compared=bilateral is not None)
    check_unit_range(probs=probs)
    with torch.no_grad(), torch.autocast(image.device.type, enabled=False):
        if probs.numel() == 0 or probs.shape[-3] == 1:
            return torch.ones_like(probs)
        problems = probs.reshape(len(probs), -1, *probs.shape[-3:])
        pixels = (image.float() * 255).round_().clamp_(0, 255)
        run: Callable[..., Tensor] = _mean_field
        if backend == "pydensecrf":
            from pseudolabel.refine._pydensecrf import mean_field as run  # noqa: PLC0415 - an extra

        together = 1 if image.device.type == "cpu" else len(image)
        result = torch.empty_like(problems, memory_format=torch.contiguous_format)
        for start in range(0, len(image), together):
            part = slice(start, start + together)
            result[part] = run(pixels[part], problems[part], gaussian, bilateral, iterations)
        return result.view(probs.shape)


def _check_image(image: Tensor, *, compared: bool) -> None:
    """Check the range of the images, and warn of one that uses little of it if its colours are compared."""
    if values_unchecked(image):
        return
    extremes = torch.stack([torch.stack(torch.aminmax(one)) for one in image.detach()]).cpu()
    check_unit_range(image=extremes)
    spans = extremes[:, 1] - extremes[:, 0]
    narrow = ((spans > 0) & (spans < _NARROW)).nonzero().flatten().tolist()
    if compared and narrow:
        low, high = extremes[narrow[0]].tolist()
        others = f", as do {len(narrow) - 1} more" if narrow[1:] else ""
        warnings.warn(
            f"image: image {narrow[0]} of the batch spans only {low:g} to {high:g} of [0, 1]{others}, so that"
            " few of the 256 levels tell colours apart. Divide it by the range in use: 12-bit data by 4095, "
            "not by 65535",
            stacklevel=3,
        )


def _check_settings(
    gaussian: tuple[float, float] | None,
    bilateral: tuple[float, float, float] | None,
    iterations: int,
    backend: str,
) -> None:
    check_choice("backend", backend, CRFBackend)
    if not isinstance(iterations, int) or isinstance(iterations, bool) or iterations < 0:
        raise ValueError(f"iterations: expected a whole number >= 0, got {iterations!r}")
    kernels: dict[str, tuple[Sequence[float] | None, tuple[str, ...]]] = {
        "gaussian": (gaussian, ("sxy", "compat")),
        "bilateral": (bilateral, ("sxy", "srgb", "compat")),
    }
    for kernel, (values, names) in kernels.items():
        if values is None:
            continue
        if not isinstance(values, tuple | list) or len(values) != len(names):
            raise ValueError(f"{kernel}: expected ({', '.join(names)}) or None, got {values!r}")
        for name, value in zip(names, values, strict=True):
            if name == "compat":
                check_number(f"{kernel} {name}", value, at_least=0)
            else:
                check_number(f"{kernel} {name}", value, above=0)


def _mean_field(
    pixels: Tensor,
    probs: Tensor,
    gaussian: tuple[float, float] | None,
    bilateral: tuple[float, float, float] | None,
    iterations: int,
) -> Tensor:
    """Run (B,3,H,W) pixels of 0..255 and (B,P,L,H,W) maps over one lattice a kernel."""
    images, problems, labels, height, width = probs.shape
    filters: list[_Filter] = []
    if iterations > 0:
        if gaussian is not None:
            sxy, compat = gaussian
            filters.append((_spatial_filter(images, height, width, sxy, pixels.device), compat))
        if bilateral is not None:
            *widths, compat = bilateral
            filters.append((_bilateral_filter(pixels, *widths), compat))

    # Pixels first, labels last: the lattice moves all labels of a pixel at once.
    pixel_count, channels = height * width, problems * labels
    logits = pixels.new_empty(images, pixel_count, channels)
    for rows, maps in zip(logits, probs.flatten(1, 2).flatten(2), strict=True):
        for block in _blocks(rows):
            rows[block].copy_(maps[:, block].T).clamp_(1e-5, 1).log_()  # -U
    iterate = _two_labels if labels == 2 else _many_labels
    marginals = iterate(logits.view(-1, problems, labels), filters, iterations if filters else 0)
    return marginals.view(images, pixel_count, channels).transpose(1, 2).view(probs.shape)


def _blocks(rows: Tensor) -> list[slice]:
    """Slices of rows that stay in the cache of a processor; on other devices one of them all."""
    count, channels = rows.shape
    size = max(1, _CPU_BLOCK // channels) if rows.device.type == "cpu" else count
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _two_labels(logits: Tensor, filters: list[_Filter], iterations: int) -> Tensor:
    """Mean field on the difference of two logits: one channel a problem, and no softmax.

    The kernels are linear, so their messages differ by `K'(Q_1 - Q_0)`, and `Q_1 - Q_0 = 2 sigmoid(x) - 1`.
    """
    difference = logits[..., 1] - logits[..., 0]
    x = _iterate(difference, filters, iterations, lambda x: x.sigmoid_().mul_(2).sub_(1))
    return torch.stack([-x, x], 2).sigmoid_()


def _many_labels(logits: Tensor, filters: list[_Filter], iterations: int) -> Tensor:
    """Mean field on the logits of all labels, to the base 2 because `exp2` is the faster exponential."""
    labels = logits.shape[2]
    logits = logits.flatten(1).mul_(1 / math.log(2))
    filters = [(kernel, compat / math.log(2)) for kernel, compat in filters]
    # A normalised kernel answers Q in [0, 1] by about 1 at most: no overflow, even without a row maximum.
    bounded = sum(compat for _, compat in filters) <= 60

    def softmax(x: Tensor) -> Tensor:
        return _softmax2_(x, labels, bounded)

    x = _iterate(logits, filters, iterations, softmax)
    for block in _blocks(x):
        softmax(x[block])
    return x


def _iterate(
    start: Tensor, filters: list[_Filter], iterations: int, activate: Callable[[Tensor], Tensor]
) -> Tensor:
    """Repeat `x <- start + sum_m compat_m K'_m activate(x)` on (n,C) and return the last x."""
    x = start.clone()
    for _ in range(iterations):
        for block in _blocks(x):
            activate(x[block])
        lattices = [kernel.splat_and_blur(x) for kernel, _ in filters]
        for block in _blocks(x):
            rows = x[block].copy_(start[block])
            for (kernel, compat), lattice in zip(filters, lattices, strict=True):
                rows.add_(kernel.slice(lattice, block), alpha=compat)
    return x


def _softmax2_(logits: Tensor, labels: int, bounded: bool) -> Tensor:
    """`2^x` normalised over groups of labels, in place; `torch.softmax` is far slower on short rows."""
    rows = logits.view(-1, labels)
    if not bounded:
        rows -= rows.amax(1, keepdim=True)
    total = rows.exp2_() @ rows.new_ones(labels, 1)
    rows *= total.reciprocal_()
    return logits


def _spatial_filter(
    images: int, height: int, width: int, sxy: float, device: torch.device
) -> PermutohedralFilter:
    """The kernel of positions, which all images of one size share."""
    size = (images, height, width, sxy, device)
    if not _makes_plain_tensors(device):
        return _new_spatial_filter(*size)
    # Each step is atomic, so that threads need no lock.
    kernel = _kept.pop(size, None) or _new_spatial_filter(*size)
    if kernel.nbytes <= _MOST_BYTES_KEPT:
        _kept[size] = kernel
    for oldest in list(_kept):
        kept = list(_kept.values())
        if len(kept) <= _MOST_KEPT and sum(one.nbytes for one in kept) <= _MOST_BYTES_KEPT:
            break
        _kept.pop(oldest, None)
    return kernel


def _makes_plain_tensors(device: torch.device) -> bool:
    """Whether tensors made now are plain numbers: those of tracers and of `torch.func` are no use later."""
    if torch.compiler.is_dynamo_compiling():
        return False
    new = torch.zeros(1, device=device)
    try:
        return type(new) is Tensor and new.data_ptr() != 0
    except RuntimeError:  # it wraps another one
        return False


def _new_spatial_filter(
    images: int, height: int, width: int, sxy: float, device: torch.device
) -> PermutohedralFilter:
    positions = _positions(height, width, sxy, device).flatten(1)
    return PermutohedralFilter(positions.repeat(1, images), (width / sxy, height / sxy), images)


def _bilateral_filter(pixels: Tensor, sxy: float, srgb: float) -> PermutohedralFilter:
    images, _, height, width = pixels.shape
    positions = _positions(height, width, sxy, pixels.device)[:, None].expand(-1, images, -1, -1)
    colours = _divide(pixels, srgb).transpose(0, 1)
    extent = (width / sxy, height / sxy, 255 / srgb, 255 / srgb, 255 / srgb)
    return PermutohedralFilter(torch.cat([positions, colours]).flatten(1), extent, images)


def _positions(height: int, width: int, sxy: float, device: torch.device) -> Tensor:
    y, x = torch.arange(height, device=device), torch.arange(width, device=device)
    x, y = _divide(x, sxy), _divide(y, sxy)
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)])


def _divide(values: Tensor, width: float) -> Tensor:
    """Divide by a tensor: by a number, an accelerator would multiply by the rounded inverse."""
    return values / torch.tensor(width, dtype=torch.float32, device=values.device)


def probs_from_mask(
    mask: Tensor, num_classes: int, confidence: float = 0.7, ignore_index: int = 255
) -> Tensor:
    """Turn a label map into maps for `dense_crf` that trust the labels by ``confidence``.

        probs[label] = confidence,   probs[other] = (1 - confidence) / (num_classes - 1)

    Pixels with ``ignore_index`` are uniform, `1 / num_classes`.

    Args:
        mask: Label maps (B,H,W), integer, 0 to num_classes - 1 or ``ignore_index``.
        num_classes: Number of labels L, background included, at least 2.
        confidence: Probability of the given label, strictly between 0 and 1.
        ignore_index: Value of pixels without a label.

    Returns:
        Maps (B,L,H,W) float32 that sum to 1 over the labels.

    Raises:
        TypeError: If ``mask`` is not an integer tensor.
        ValueError: If ``mask`` is not (B,H,W) or holds another label, or a setting is out of range.

    Examples:
        >>> import torch
        >>> probs_from_mask(torch.tensor([[[0, 2, 255]]]), num_classes=4)[0, :, 0]
        tensor([[0.7000, 0.1000, 0.2500],
                [0.1000, 0.1000, 0.2500],
                [0.1000, 0.7000, 0.2500],
                [0.1000, 0.1000, 0.2500]])

    Source: `unary_from_labels(..., zero_unsure=False)` of pydensecrf, as IRN uses it.
    """
    check_shapes(mask=(mask, "B H W"))
    check_integer(mask=mask)
    check_number("num_classes", num_classes, at_least=2)
    check_ignore_index(ignore_index)
    check_number("confidence", confidence, above=0, at_most=1 - 1e-6)
    ignored = mask == ignore_index
    labels = mask.masked_fill(ignored, 0).long()
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        found = sorted(set(labels.flatten().tolist()) - set(range(num_classes)))
        raise ValueError(
            f"mask: expected labels 0 to {num_classes - 1} or {ignore_index}, got {found[:8]} as well"
        )
    shape = (mask.shape[0], num_classes, *mask.shape[1:])
    other = (1 - confidence) / (num_classes - 1)
    probs = torch.full(shape, other, dtype=torch.float32, device=mask.device)
    probs.scatter_(1, labels[:, None], confidence)
    return probs.masked_fill_(ignored[:, None], 1 / num_classes)


class DenseCRF(nn.Module):
    """`dense_crf` with its settings, a refiner `(image, maps) -> maps`."""

    def __init__(
        self,
        gaussian: tuple[float, float] | None = (3.0, 3.0),
        bilateral: tuple[float, float, float] | None = (80.0, 13.0, 10.0),
        iterations: int = 10,
        backend: CRFBackend = "torch",
    ) -> None:
        super().__init__()
        _check_settings(gaussian, bilateral, iterations, backend)
        self.gaussian = gaussian
        self.bilateral = bilateral
        self.iterations = iterations
        self.backend: CRFBackend = backend

    def forward(self, image: Tensor, probs: Tensor) -> Tensor:
        """Apply `dense_crf`."""
        return dense_crf(
            image,
            probs,
            gaussian=self.gaussian,
            bilateral=self.bilateral,
            iterations=self.iterations,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """Settings, as printed."""
        return (
            f"gaussian={self.gaussian}, bilateral={self.bilateral}, iterations={self.iterations}, "
            f"backend={self.backend!r}"
        )
