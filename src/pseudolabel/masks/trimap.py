"""Trimaps: the pixels that maps, or a mask, are sure of, and the unknown ones between them."""

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pseudolabel._checks import (
    check_channels,
    check_choice,
    check_classes,
    check_count,
    check_float,
    check_labels,
    check_number,
    check_probability,
    check_shapes,
    check_unit_range,
)
from pseudolabel._maps import gather_present, present_classes, resize, scatter_present

__all__ = [
    "TRIMAP_PRESETS",
    "TrimapAreas",
    "TrimapBuilder",
    "TrimapKind",
    "trimap_areas",
    "trimap_from_cam",
    "trimap_from_mask",
]

TrimapKind = Literal["cam", "posterior"]

# Read off the official programs of IRN (CVPR 2019), WaveCAM (2023) and SCD (AAAI 2023). The pair for a
# posterior is ours.
TRIMAP_PRESETS: dict[str, dict[str, float | TrimapKind]] = {
    "irn": {"foreground": 0.30, "background": 0.05},
    "wavecam": {"foreground": 0.35, "background": 0.10},
    "scd": {"foreground": 0.55, "background": 0.35},
    "posterior": {"kind": "posterior", "foreground": 0.8, "background": 0.8, "margin": 0.2},
}

UNKNOWN = -1  # in a map of seeds: otherwise 0 background, p+1 the present class in place p


class TrimapAreas(NamedTuple):
    """Pixels of each kind in a trimap, as from `trimap_areas`."""

    foreground: Tensor
    """(B,C) int64."""
    background: Tensor
    """(B,) int64."""
    unknown: Tensor
    """(B,) int64."""


def trimap_from_cam(
    cam: Tensor,
    labels: Tensor,
    *,
    size: tuple[int, int] | None = None,
    kind: TrimapKind = "cam",
    foreground: float = 0.30,
    background: float = 0.05,
    margin: float = 0.0,
    min_area: int = 0,
    erode: int = 0,
    fallback: float = 0.01,
    max_unknown: float = 1.0,
) -> Tensor:
    """Cut maps into sure foreground of each class, sure background, and unknown pixels.

    With the present class `c` that is highest at a pixel, and the runner-up `second`:

    | ``kind`` | maps | foreground `F_c` | background `B` | `second` is the highest of |
    |---|---|---|---|---|
    | `cam` | (B,C,h,w) | `cam_c > foreground` | `cam_c <= background` | the other present classes |
    | `posterior` | (B,1+C,h,w) | `q_c >= foreground` | `q_0 >= background` | those and the background |

    where a pixel of `F_c` also needs `first - second >= margin`. The trimap of class c is then

        1 on F_c,   0 on B and on the foreground of the other classes,   0.5 elsewhere

    so that all present classes share the same unknown pixels. Then, in this order:

    1. components (8 neighbours) of fewer than ``min_area`` pixels become unknown;
    2. foregrounds and background lose the pixels within ``erode`` of their border;
    3. a class that has no foreground left gets the share ``fallback`` of the pixels where its map is highest
       (and positive), whoever had them; so does a missing background where the highest map is lowest;
    4. of more unknown pixels than the share ``max_unknown``, the clearest (by the gap of the two highest
       values, the middle of the two thresholds being the background's) go to the highest value.

    Without these guards, and with ``margin`` 0, the known pixels are those of `dual_threshold_mask`.

    Args:
        cam: Normalised maps (B,C,h,w), or with ``kind`` "posterior" probabilities (B,1+C,h,w), background
            first, of background and present classes; in [0, 1].
        labels: Image-level labels (B,C).
        size: Size (H,W) of the trimap, to which the maps are resized first. By default that of the maps.
        kind: What ``cam`` holds.
        foreground: Threshold of the foreground, in [0, 1].
        background: Threshold of the background, in [0, 1]; for ``kind`` "cam" at most ``foreground``.
        margin: Smallest lead over the runner-up, in [0, 1].
        min_area: Smallest component that is kept, in pixels, >= 0.
        erode: Radius in pixels, >= 0. 0 suits maps of a coarse network: resizing has blurred them already.
        fallback: Share of the image, in [0, 1]. 0 leaves empty what is empty.
        max_unknown: Largest share of unknown pixels, in [0, 1].

    Returns:
        Trimap (B,C,H,W) in the dtype of ``cam``: 1, 0 or 0.5. Absent classes are 0 everywhere.

    Raises:
        TypeError: If ``cam`` is not a floating-point tensor.
        ValueError: If shapes do not fit, ``cam`` leaves [0, 1], ``labels`` are not multi-hot, or a setting is
            out of range.

    Examples:
        >>> import torch
        >>> cam = torch.tensor([[[[0.9, 0.2, 0.0, 0.3]], [[0.1, 0.4, 0.0, 0.3]], [[0.9, 0.9, 0.9, 0.9]]]])
        >>> trimap = trimap_from_cam(cam, torch.tensor([[1, 1, 0]]), **TRIMAP_PRESETS["wavecam"])
        >>> trimap[0, :, 0]
        tensor([[1.0000, 0.0000, 0.0000, 0.5000],
                [0.0000, 1.0000, 0.0000, 0.5000],
                [0.0000, 0.0000, 0.0000, 0.0000]])

    Source:
        The idea is that of Wang et al., "Treating Pseudo-labels Generation as Image Matting for Weakly
        Supervised Semantic Segmentation" (Mat-Label), ICCV 2023. Its rule and thresholds are not public: the
        rule and its guards are ours. Thresholds of ``kind`` "cam" are published ones: see `TRIMAP_PRESETS`.
    """
    check_choice("kind", kind, TrimapKind)
    posterior = kind == "posterior"
    check_shapes(cam=(cam, "B 1+C h w" if posterior else "B C h w"), labels=(labels, "B C"))
    if posterior:
        check_channels(labels.shape[1], "labels", cam=cam)
    check_float(cam=cam)
    check_labels(labels)
    _check_settings(
        kind=kind,
        foreground=foreground,
        background=background,
        margin=margin,
        min_area=min_area,
        erode=erode,
        fallback=fallback,
        max_unknown=max_unknown,
    )
    check_unit_range(cam=cam)

    index, valid = present_classes(labels)
    size = (cam.shape[2], cam.shape[3]) if size is None else size
    classes = resize(gather_present(cam[:, 1:] if posterior else cam, index), size)
    classes = classes.masked_fill(~valid[:, :, None, None], 0)
    if index.shape[1] == 0:  # no class anywhere: all is background
        return cam.new_zeros(len(labels), labels.shape[1], *size)

    highest = classes.amax(1, keepdim=True)
    if posterior:
        empty_score = resize(cam[:, :1], size)
        winner, lead = _winner(torch.cat([empty_score, classes], 1))
        winner = winner - 1
        sure = (classes >= foreground) & (lead >= margin)
        sure_background = empty_score >= background
    else:
        empty_score = torch.full_like(highest, (foreground + background) / 2)
        winner, lead = _winner(classes)
        sure = (classes > foreground) & (lead >= margin)
        sure_background = highest <= background
    places = torch.arange(index.shape[1], device=cam.device)[:, None, None]
    sure = sure & (winner == places)
    planes = torch.cat([sure_background & ~sure.any(1, keepdim=True), sure], 1)
    seeds = _seeds(_erode(_drop_small(planes, min_area), erode))

    held = torch.cat([torch.ones_like(valid[:, :1]), valid], 1)
    seeds = _fill_empty(seeds, torch.cat([1 - highest, classes], 1), held, fallback)
    seeds = _settle(seeds, torch.cat([empty_score, classes], 1), max_unknown)
    return _trimap(seeds, index, valid, labels.shape[1], cam.dtype)


def trimap_from_mask(
    mask: Tensor,
    num_classes: int,
    labels: Tensor | None = None,
    *,
    erode: int = 10,
    min_area: int = 0,
    ignore_index: int = 255,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Loosen a mask into a trimap: what lies deep enough inside a label is known, the rest is unknown.

    Components (8 neighbours) of fewer than ``min_area`` pixels become unknown, then all within ``erode``
    pixels of another label. A class, or the background, of which nothing would remain keeps all its pixels.

    Args:
        mask: Label map (B,H,W), integer: 0 background, c+1 class c. Ignored pixels are unknown.
        num_classes: Number of classes with the background, 1 + C.
        labels: Image-level labels (B,C); pixels of absent classes are unknown. By default a class is present
            where the mask has it.
        erode: Half the side of a square, in pixels, >= 0. The border of the image erodes nothing.
        min_area: Smallest component that is kept, in pixels, >= 0.
        ignore_index: Label of the pixels without a label.
        dtype: Of the result.

    Returns:
        Trimap (B,C,H,W): 1 foreground, 0 background or another class, 0.5 unknown. Absent classes are 0
        everywhere.

    Raises:
        TypeError: If ``mask`` is not an integer tensor.
        ValueError: If shapes do not fit, ``mask`` has labels outside of the classes, ``labels`` are not
            multi-hot, or a setting is out of range.

    Examples:
        >>> import torch
        >>> mask = torch.tensor([[[0, 0, 0, 1, 1, 1, 255]]])
        >>> trimap_from_mask(mask, num_classes=2, erode=1)
        tensor([[[[0.0000, 0.0000, 0.5000, 0.5000, 1.0000, 0.5000, 0.5000]]]])

    Source:
        Common practice of matting tools (rembg erodes by 10 pixels); the rule for what would vanish is ours.
    """
    check_shapes(mask=(mask, "B H W"))
    check_classes(num_classes, ignore_index, mask=mask)
    check_count(at_least=0, erode=erode, min_area=min_area)
    known = mask.long().masked_fill(mask == ignore_index, 0)
    if labels is None:
        present = torch.zeros(len(mask), num_classes, dtype=torch.bool, device=mask.device)
        labels = present.scatter(1, known.flatten(1), value=True)[:, 1:]
    check_shapes(mask=(mask, "B H W"), labels=(labels, "B C"))
    check_labels(labels)
    if labels.shape[1] != num_classes - 1:
        raise ValueError(
            f"labels: expected {num_classes - 1} columns, the classes without background, got "
            f"{labels.shape[1]}"
        )
    index, valid = present_classes(labels)
    value = torch.cat([index.new_zeros(len(index), 1), (index + 1).where(valid, UNKNOWN)], 1)
    planes = (mask[:, None] == value[:, :, None, None]) & (mask != ignore_index)[:, None]
    inner = _erode(_drop_small(planes, min_area), erode)
    planes = inner.where(inner.flatten(2).any(2)[:, :, None, None], planes)
    return _trimap(_seeds(planes), index, valid, num_classes - 1, dtype)


def trimap_areas(trimap: Tensor) -> TrimapAreas:
    """Count the pixels of each kind, to log what matting is given.

    Args:
        trimap: Trimap (B,C,H,W).

    Returns:
        Foreground of each class (B,C), background (B,) and unknown pixels (B,) in pixels, int64; they sum to
        `H W`.

    Raises:
        TypeError: If ``trimap`` is not a floating-point tensor.
        ValueError: If ``trimap`` is not (B,C,H,W).

    Examples:
        >>> import torch
        >>> trimap_areas(torch.tensor([[[[1.0, 0.5, 0.0, 0.0]], [[0.0, 0.5, 1.0, 0.0]]]]))
        TrimapAreas(foreground=tensor([[1, 1]]), background=tensor([1]), unknown=tensor([1]))
    """
    sizes = check_shapes(trimap=(trimap, "B C H W"))
    check_float(trimap=trimap)
    check_unit_range(trimap=trimap)
    foreground = (trimap == 1).sum((2, 3))
    unknown = ((trimap > 0) & (trimap < 1)).any(1).sum((1, 2))
    return TrimapAreas(foreground, sizes["H"] * sizes["W"] - foreground.sum(1) - unknown, unknown)


class TrimapBuilder(nn.Module):
    """Module twin of `trimap_from_cam`: `builder = TrimapBuilder(**TRIMAP_PRESETS["irn"])`."""

    def __init__(
        self,
        *,
        kind: TrimapKind = "cam",
        foreground: float = 0.30,
        background: float = 0.05,
        margin: float = 0.0,
        min_area: int = 0,
        erode: int = 0,
        fallback: float = 0.01,
        max_unknown: float = 1.0,
    ) -> None:
        super().__init__()
        check_choice("kind", kind, TrimapKind)
        _check_settings(
            kind=kind,
            foreground=foreground,
            background=background,
            margin=margin,
            min_area=min_area,
            erode=erode,
            fallback=fallback,
            max_unknown=max_unknown,
        )
        self.kind: TrimapKind = kind
        self.foreground = foreground
        self.background = background
        self.margin = margin
        self.min_area = min_area
        self.erode = erode
        self.fallback = fallback
        self.max_unknown = max_unknown

    def forward(self, cam: Tensor, labels: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """See `trimap_from_cam`."""
        return trimap_from_cam(
            cam,
            labels,
            size=size,
            kind=self.kind,
            foreground=self.foreground,
            background=self.background,
            margin=self.margin,
            min_area=self.min_area,
            erode=self.erode,
            fallback=self.fallback,
            max_unknown=self.max_unknown,
        )

    def extra_repr(self) -> str:
        """Settings, for `print`."""
        return (
            f"kind={self.kind!r}, foreground={self.foreground}, background={self.background}, "
            f"margin={self.margin}, min_area={self.min_area}, erode={self.erode}, "
            f"fallback={self.fallback}, max_unknown={self.max_unknown}"
        )


def _winner(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Highest channel (B,1,H,W), ties to the first, and its lead over the runner-up, if there is one."""
    first, winner = scores.max(1, keepdim=True)
    second = scores.scatter(1, winner, -torch.inf).amax(1, keepdim=True)
    return winner, first - second


def _drop_small(planes: Tensor, min_area: int) -> Tensor:
    """Drop the components of fewer pixels from bool planes (B,K,H,W)."""
    if min_area <= 1 or planes.numel() == 0:
        return planes
    from scipy import ndimage  # noqa: PLC0415 - not needed by most, and not free to import

    neighbours = np.zeros((3, 3, 3), dtype=bool)
    neighbours[1] = True  # none across planes, so that one call labels them all
    component, _ = ndimage.label(planes.flatten(0, 1).cpu().numpy(), neighbours)
    kept = np.bincount(component.ravel()) >= min_area
    kept[0] = False
    return torch.from_numpy(kept[component]).to(planes.device).view_as(planes)


def _erode(planes: Tensor, radius: int) -> Tensor:
    """Take from bool planes what is within a square around a pixel outside of them."""
    if radius == 0:
        return planes
    outside = (~planes).to(torch.float32)
    outside = F.max_pool2d(outside, (2 * radius + 1, 1), stride=1, padding=(radius, 0))
    outside = F.max_pool2d(outside, (1, 2 * radius + 1), stride=1, padding=(0, radius))
    return outside == 0


def _seeds(planes: Tensor) -> Tensor:
    """Join disjoint bool planes (B,1+P,H,W) to a map (B,H,W) of places or `UNKNOWN`."""
    return planes.to(torch.uint8).argmax(1).where(planes.any(1), UNKNOWN)


def _fill_empty(seeds: Tensor, strength: Tensor, held: Tensor, share: float) -> Tensor:
    """Give the strongest pixels of the image to each place that should have some, and has none."""
    places = torch.arange(strength.shape[1], device=seeds.device)
    empty = held & ~(seeds[:, None] == places[:, None, None]).flatten(2).any(2)
    if share == 0 or not bool(empty.any()):
        return seeds
    flat = strength.flatten(2)
    image, place = empty.nonzero(as_tuple=True)
    value = flat[image, place]
    count = max(1, int(share * value.shape[1]))
    best = value.argsort(dim=1, descending=True, stable=True)[:, :count]
    taken = torch.zeros_like(value, dtype=torch.bool).scatter(1, best, value=True)
    taken &= (value > 0) | (place == 0)[:, None]  # a dead map stays without foreground
    claim = torch.full_like(flat, -torch.inf)
    claim[image, place] = value.where(taken, -torch.inf)
    strongest, owner = claim.max(1)  # of two claims the stronger one wins
    return owner.where(strongest > -torch.inf, seeds.flatten(1)).view_as(seeds)


def _settle(seeds: Tensor, scores: Tensor, max_unknown: float) -> Tensor:
    """Label the clearest unknown pixels by their highest score, until few enough are left."""
    if max_unknown == 1:
        return seeds
    winner, lead = _winner(scores)
    unknown = (seeds == UNKNOWN).flatten(1)
    excess = unknown.sum(1, keepdim=True) - int(max_unknown * unknown.shape[1])
    clearest = lead.flatten(1).where(unknown, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(clearest)
    rank.scatter_(1, clearest, torch.arange(clearest.shape[1], device=rank.device).expand_as(clearest))
    return winner[:, 0].where((rank < excess).view_as(seeds), seeds)


def _trimap(seeds: Tensor, index: Tensor, valid: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    places = torch.arange(1, 1 + index.shape[1], device=seeds.device)[:, None, None]
    own = (seeds[:, None] == places).to(dtype)
    return scatter_present(own.masked_fill((seeds == UNKNOWN)[:, None], 0.5), index, valid, num_classes)


def _check_settings(
    *,
    kind: TrimapKind,
    foreground: float,
    background: float,
    margin: float,
    min_area: int,
    erode: int,
    fallback: float,
    max_unknown: float,
) -> None:
    check_probability("foreground", foreground)
    if kind == "cam":
        check_number("background", background, at_least=0, at_most=foreground)
    else:
        check_probability("background", background)
    check_probability("margin", margin)
    check_count(at_least=0, min_area=min_area, erode=erode)
    check_probability("fallback", fallback)
    check_probability("max_unknown", max_unknown)
