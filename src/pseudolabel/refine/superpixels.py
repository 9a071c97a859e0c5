"""Superpixels: scores become constant on regions of the image, and each region has one class at most."""

from collections.abc import Callable, Iterator
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from pseudolabel._checks import (
    check_count,
    check_finite,
    check_float,
    check_integer,
    check_labels,
    check_number,
    check_shapes,
    check_unit_range,
    values_unchecked,
)
from pseudolabel._maps import (
    clamp_keeping_slope,
    exact_dtype,
    gather_present,
    present_classes,
    scatter_present,
    working_dtype,
)

__all__ = [
    "felzenszwalb_superpixels",
    "merge_superpixels",
    "region_mean",
    "slic_superpixels",
    "superpixel_refine",
]


def superpixel_refine(
    scores: Tensor,
    superpixels: Tensor,
    labels: Tensor,
    *,
    num_regions: int | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Make signed scores constant on superpixels; a region is foreground of one class at most.

    With the scores f of the present classes (0 for the absent ones), and sums over the cells p of a region:

        vote_c = sum of sign(f_c)                      a region of any vote above eps is foreground
        won_c  = sum of max(f_c, 0) / max(max f, eps)  with the highest f at p; the largest, or first, is c*
        out_c  = mean of max(f_c, 0)                   on a foreground region, for c*
                 mean of min(f_c, 0)                   else

    So the other classes get 0 or less on a foreground region, and all classes on a background region. Both
    means run over all cells of the region, those of the other sign counting as 0.

    The superpixels may be finer than the scores: each cell then belongs to up to four regions, with the
    weights of bilinear interpolation between aligned corners, and to the one region at its pixel where the
    cells fall on pixels, such as 41 x 41 on 321 x 321. These weights are in all sums and in the result.

    Args:
        scores: Signed scores (B,C,h,w), above 0 where the class is.
        superpixels: Region ids (B,H,W), integer, >= 0. Gaps do no harm.
        labels: Image-level labels (B,C).
        num_regions: All ids are below it: they need no renumbering then, and `torch.compile` gets one graph.
            None: any ids.
        eps: Smallest vote of a foreground region, and the smallest divisor, > 0.

    Returns:
        Scores (B,C,h,w) of the dtype that went in, 0 for absent classes. The gradient is that of the means,
        with the decisions as they are.

    Raises:
        TypeError: If ``scores`` is not a floating-point tensor or ``superpixels`` not an integer one.
        ValueError: If shapes do not fit, scores are not finite, ids are negative or not below
            ``num_regions``, or ``labels`` are not multi-hot.

    Examples:
        >>> import torch
        >>> scores = torch.tensor([[[[3.0, 1.0, -1.0, -2.0, -2.0, 1.0]]]])
        >>> superpixel_refine(scores, torch.tensor([[[0, 0, 0, 1, 1, 1]]]), torch.ones(1, 1))
        tensor([[[[ 1.3333,  1.3333,  1.3333, -1.3333, -1.3333, -1.3333]]]])

    Source:
        Fan et al., "Learning Integral Objects With Intra-Class Discriminator for Weakly-Supervised Semantic
        Segmentation" (ICD), CVPR 2020. Matches `SPRefine` of the official implementation at f78286a; the
        formula is read off that code, the equations of the paper were not at hand. The official operator
        passes no gradient.
    """
    check_shapes(scores=(scores, "B C h w"), superpixels=(superpixels, "B H W"), labels=(labels, "B C"))
    check_float(scores=scores)
    check_finite(scores=scores)
    check_labels(labels)
    check_number("eps", eps, above=0)
    _check_ids(superpixels, num_regions)
    index, valid = present_classes(labels)
    size = (scores.shape[2], scores.shape[3])
    exact = exact_dtype(scores.device)  # one cell after the other is added
    taps = _taps(size, (superpixels.shape[1], superpixels.shape[2]), exact, scores.device)
    touched = [(superpixels[:, y, x].flatten(1).long(), weight) for y, x, weight in taps]
    if num_regions is None:
        used, places = torch.unique(torch.stack([ids for ids, _ in touched]), return_inverse=True)
        num_regions = len(used)
        touched = [(ids, weight) for ids, (_, weight) in zip(places, touched, strict=True)]

    f = gather_present(scores, index).to(exact).flatten(2).masked_fill(~valid[:, :, None], 0)
    f = F.pad(f, (0, 0, 0, 1))  # an absent class, so that there is one in any batch
    positive, negative = clamp_keeping_slope(f, low=0), clamp_keeping_slope(f, high=0)
    share = positive / positive.amax(1, keepdim=True).clamp(min=eps)
    vote, won, positive, negative, area = (
        _region_sum(values, touched, num_regions)
        for values in (f.sign(), share, positive, negative, torch.ones_like(f[:, :1]))
    )
    is_foreground = vote.amax(1, keepdim=True) > eps
    foreground = torch.zeros_like(vote, dtype=torch.bool)
    foreground = foreground.scatter(1, won.argmax(1, keepdim=True), is_foreground)
    value = torch.where(foreground, positive, negative) / area.clamp(min=eps)

    out = torch.zeros_like(f)
    for ids, weight in touched:
        out = out + weight * value.gather(2, ids[:, None].expand(-1, f.shape[1], -1))
    out = out[:, :-1].view(*index.shape, *size).to(scores.dtype)
    return scatter_present(out, index, valid, scores.shape[1])


def _region_sum(values: Tensor, touched: list[tuple[Tensor, Tensor]], num_regions: int) -> Tensor:
    """Sums (B,P,R) of values (B,P,N), where cell n is in the regions ids (B,N) with the weights (N)."""
    total = values.new_zeros(*values.shape[:2], num_regions)
    for ids, weight in touched:
        index = ids[:, None].expand_as(values)
        total = total.scatter_add(2, index, values * weight)
    return total


def region_mean(
    features: Tensor,
    superpixels: Tensor,
    *,
    num_regions: int | None = None,
    align_corners: bool = True,
) -> Tensor:
    """Mean features of each region, of features that are resized to the superpixels.

        out_r = mean over the pixels p of region r of resize(features)(p)

    The resized features never exist: a pixel is a weighted sum of four cells, so a region is one as well.

    Args:
        features: Features (B,D,h,w).
        superpixels: Region ids (B,H,W), integer, >= 0.
        num_regions: Number R of rows, above all ids. None: the highest id plus one.
        align_corners: Resize with aligned corners (official), or by half pixels.

    Returns:
        Features (B,R,D), float32 or better. A region without a pixel has zeros.

    Raises:
        TypeError: If ``features`` is not a floating-point tensor or ``superpixels`` not an integer one.
        ValueError: If shapes do not fit, or ids are negative or not below ``num_regions``.

    Examples:
        >>> import torch
        >>> features = torch.tensor([[[[0.0, 4.0]]]])  # 0, 1, 2, 3, 4 at five pixels
        >>> region_mean(features, torch.tensor([[[0, 0, 1, 1, 1]]]))
        tensor([[[0.5000],
                 [3.0000]]])

    Source:
        As `superpixel_refine`: the features of the offline superpixels. The official program resizes to a
        square canvas and cuts off what is not image; pad the superpixels with one more region for that.
    """
    check_shapes(features=(features, "B D h w"), superpixels=(superpixels, "B H W"))
    check_float(features=features)
    if num_regions is None:
        num_regions = 1 + int(superpixels.max()) if superpixels.numel() else 0
    _check_ids(superpixels, num_regions)
    size, source = ((value.shape[-2], value.shape[-1]) for value in (superpixels, features))
    ids = superpixels.flatten(1).long()
    cells = features.to(exact_dtype(features.device)).flatten(2)
    # How much each cell counts for each region; one pixel after the other is added.
    weights = cells.new_zeros(len(ids), num_regions * cells.shape[2])
    for y, x, weight in _taps(size, source, cells.dtype, cells.device, align_corners=align_corners):
        cell = (y * source[1] + x).flatten()
        weights.scatter_add_(1, ids * cells.shape[2] + cell, weight.expand_as(ids))
    weights = weights.view(len(ids), num_regions, cells.shape[2])
    pixels = weights.sum(2, keepdim=True)  # a whole number
    return (weights @ cells.transpose(1, 2) / pixels.clamp(min=0.5)).to(working_dtype(features))


def merge_superpixels(superpixels: Tensor, region_features: Tensor, max_regions: int = 64) -> Tensor:
    """Merge the most alike regions, one pair after the other, until few enough are left.

        likeness of i and j = cos(f_i, f_j) + 1 - (n_i + n_j) / (H W)

    with n pixels in a region. Of all pairs, neighbours or not, that of the highest likeness is merged; ties
    go to the lowest ids. The merged region has the mean feature of its pixels.

    The images are worked on one after the other on the CPU, in float64. After a merge only the pairs of the
    merged region are compared anew.

    Args:
        superpixels: Region ids (H,W) or (B,H,W), integer, >= 0. Gaps do no harm.
        region_features: Features (R,D) or (B,R,D) of the regions, row by id, as from `region_mean`.
        max_regions: Regions to keep, >= 1. Published: 64.

    Returns:
        Region ids like ``superpixels``, int64, from 0 to `min(max_regions, regions) - 1` without gaps, in the
        order of the lowest id that went into each.

    Raises:
        TypeError: If ``superpixels`` is not an integer tensor, or ``region_features`` not floating-point.
        ValueError: If shapes do not fit, features are not finite, an id is negative or has no row, or
            ``max_regions`` is no integer >= 1.

    Examples:
        >>> import torch
        >>> features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1]])
        >>> merge_superpixels(torch.tensor([[0, 0, 1, 1, 2, 2]]), features, max_regions=2)
        tensor([[0, 0, 1, 1, 0, 0]])

    Source:
        As `superpixel_refine`: the offline superpixels of the official implementation at f78286a.
    """
    batched = not isinstance(superpixels, Tensor) or superpixels.dim() != 2
    check_shapes(
        superpixels=(superpixels, "B H W" if batched else "H W"),
        region_features=(region_features, "B R D" if batched else "R D"),
    )
    check_float(region_features=region_features)
    check_finite(region_features=region_features)
    _check_ids(superpixels, region_features.shape[-2], "the rows of region_features")
    check_count(max_regions=max_regions)
    merged = superpixels.new_empty(superpixels.shape, dtype=torch.int64, device="cpu")
    images = zip(
        merged if batched else [merged],
        superpixels if batched else [superpixels],
        region_features.detach() if batched else [region_features.detach()],
        strict=True,
    )
    for out, ids, features in images:
        out.copy_(torch.from_numpy(_merge(ids.cpu().numpy(), features.cpu().double().numpy(), max_regions)))
    return merged.to(superpixels.device)


def _merge(ids: NDArray[np.integer], features: NDArray[np.float64], max_regions: int) -> NDArray[np.int64]:
    """Renumber the regions without gaps, merge, and number again."""
    if ids.size == 0:
        return ids.astype(np.int64)
    pixels = np.bincount(ids.ravel(), minlength=len(features))
    used = pixels.nonzero()[0]
    survivor = _merge_pairs(features[used], pixels[used], max_regions)
    number: NDArray[np.int64] = np.zeros(len(features), np.int64)
    number[used] = np.unique(survivor, return_inverse=True)[1]
    return number.take(ids)


def _merge_pairs(
    features: NDArray[np.float64], pixels: NDArray[np.int64], max_regions: int
) -> NDArray[np.int64]:
    """For each region the lowest region that it is merged with.

    Each row of the matrix of pairs (i, j > i) remembers its best partner. A merge changes the pairs of two
    regions, so few rows have to look for another partner.
    """
    total, sums, pixels = pixels.sum(), features * pixels[:, None], pixels.astype(np.float64)
    directions = sums / _length(sums)
    likeness = directions @ directions.T + (1 - (pixels[:, None] + pixels) / total)
    likeness[np.tri(len(likeness), dtype=bool)] = -np.inf
    partner = likeness.argmax(1)
    best = np.take_along_axis(likeness, partner[:, None], 1)[:, 0]
    survivor = np.arange(len(sums))
    for _ in range(len(sums) - max_regions):
        kept = best.argmax()
        gone = partner[kept]
        survivor[survivor == gone] = kept
        sums[kept] += sums[gone]
        directions[kept] = sums[kept] / _length(sums[kept])
        pixels[kept] += pixels[gone]
        pixels[gone] = np.inf  # unlike all others

        row = directions @ directions[kept] + (1 - (pixels + pixels[kept]) / total)
        likeness[:gone, gone] = likeness[gone] = -np.inf
        likeness[:kept, kept], likeness[kept, kept + 1 :] = row[:kept], row[kept + 1 :]

        above = (row > best) | ((row == best) & (partner > kept))
        above[kept:] = False
        partner[above], best[above] = kept, row[above]
        best[gone], partner[gone] = -np.inf, -1
        stale = ((partner == kept) & ~above) | (partner == gone)
        stale[kept] = True
        rows = likeness[stale]
        partner[stale] = rows.argmax(1)
        best[stale] = rows.max(1)
    return survivor


def _length(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Lengths of the last axis, 1 for a vector of zeros."""
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.where(length > 0, length, 1)


def felzenszwalb_superpixels(
    image: Tensor, *, scale: float = 75, sigma: float = 0.8, min_size: int = 75
) -> Tensor:
    """Superpixels by graph-based segmentation, with scikit-image.

    The defaults are those of ICD, which then merges the regions to 64 (`merge_superpixels`). scikit-image has
    an implementation of its own: borders differ a little from those of the C++ program of the authors.

    Args:
        image: Images (B,3,H,W) in [0, 1].
        scale: Larger gives larger regions; in grey levels of 0..255, > 0.
        sigma: Width of the Gaussian that smooths the image first, in pixels, >= 0.
        min_size: Smallest number of pixels of a region, >= 0.

    Returns:
        Region ids (B,H,W) int64 on the image's device, from 0 without gaps in each image.

    Raises:
        TypeError: If ``image`` is not a floating-point tensor.
        ValueError: If ``image`` is not (B,3,H,W) in [0, 1], or a setting is out of range.

    Examples:
        >>> import torch
        >>> image = torch.zeros(1, 3, 20, 20)
        >>> image[..., 10:] = 1.0
        >>> felzenszwalb_superpixels(image)[0, 0, [0, 9, 10, 19]]
        tensor([0, 0, 1, 1])

    Source:
        Felzenszwalb and Huttenlocher, "Efficient Graph-Based Image Segmentation", IJCV 2004.
    """
    check_number("scale", scale, above=0)
    check_number("sigma", sigma, at_least=0)
    check_count(at_least=0, min_size=min_size)

    def segment(photo: NDArray[np.float64]) -> NDArray[np.int64]:
        from skimage.segmentation import felzenszwalb  # noqa: PLC0415 - takes a second to import

        return np.asarray(felzenszwalb(photo, scale=scale, sigma=sigma, min_size=min_size), np.int64)

    return _each_image(image, segment)


def slic_superpixels(image: Tensor, *, num_regions: int = 256, compactness: float = 10) -> Tensor:
    """Superpixels of about equal size by clustering colour and position, with scikit-image.

    Args:
        image: Images (B,3,H,W) in [0, 1].
        num_regions: About how many regions an image gets, >= 1.
        compactness: Larger gives squarer regions, smaller ones that follow the colours, > 0.

    Returns:
        Region ids (B,H,W) int64 on the image's device, from 0 without gaps in each image.

    Raises:
        TypeError: If ``image`` is not a floating-point tensor.
        ValueError: If ``image`` is not (B,3,H,W) in [0, 1], or a setting is out of range.

    Examples:
        >>> import torch
        >>> image = torch.zeros(1, 3, 20, 20)
        >>> image[..., 10:] = 1.0
        >>> slic_superpixels(image, num_regions=16)[0, 0, [0, 4, 9, 10, 19]]
        tensor([0, 0, 1, 2, 3])

    Source:
        Achanta et al., "SLIC Superpixels Compared to State-of-the-Art Superpixel Methods", TPAMI 2012.
    """
    check_number("num_regions", num_regions, at_least=1)
    check_number("compactness", compactness, above=0)

    def segment(photo: NDArray[np.float64]) -> NDArray[np.int64]:
        from skimage.segmentation import slic  # noqa: PLC0415 - takes a second to import

        found = slic(photo, n_segments=num_regions, compactness=compactness, start_label=0)
        return np.asarray(found, np.int64)

    return _each_image(image, segment)


def _each_image(image: Tensor, segment: Callable[[NDArray[np.float64]], NDArray[np.int64]]) -> Tensor:
    """Run a program for (H,W,3) arrays over a batch."""
    check_shapes(image=(image, "B 3 H W"))
    check_float(image=image)
    check_unit_range(image=image)
    ids = torch.zeros(image.shape[0], *image.shape[2:], dtype=torch.int64, device="cpu")
    photos = image.detach().cpu().double().clamp(0, 1).permute(0, 2, 3, 1).numpy()
    for out, photo in zip(ids, photos, strict=True):
        out.copy_(torch.from_numpy(segment(np.ascontiguousarray(photo))))
    return ids.to(image.device)


def _taps(
    size: tuple[int, int],
    source: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    *,
    align_corners: bool = True,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """What bilinear resizing from ``source`` to ``size`` (h,w) reads: rows (h,1), columns (w), weights (hw).

    Four of each; two or one where the grids meet, so that nothing is read for a weight of 0.
    """
    vertical, horizontal = (
        _axis_taps(points, cells, align_corners, dtype, device)
        for points, cells in zip(size, source, strict=True)
    )
    for (y, row), (x, column) in product(vertical, horizontal):
        yield y[:, None], x, (row[:, None] * column).flatten()


def _axis_taps(
    points: int, cells: int, align_corners: bool, dtype: torch.dtype, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    # Positions as fractions of integers: grids that meet do so exactly.
    step = torch.arange(points, device=device)
    if align_corners:
        above, below = step * (cells - 1), max(points - 1, 1)
    else:
        above, below = ((2 * step + 1) * cells - points).clamp(min=0), 2 * points
    low, weight = above // below, (above % below).to(dtype) / below
    if align_corners and (cells - 1) % below == 0:
        return [(low, torch.ones_like(weight))]
    return [(low, 1 - weight), ((low + 1).clamp(max=cells - 1), weight)]


def _check_ids(superpixels: Tensor, num_regions: int | None, rows: str = "num_regions") -> None:
    check_integer(superpixels=superpixels)
    if num_regions is not None:
        check_count(at_least=0, num_regions=num_regions)
    if values_unchecked(superpixels):
        return
    low, high = (int(bound) for bound in torch.aminmax(superpixels))
    if low < 0:
        raise ValueError(f"superpixels: expected ids >= 0, got {low}")
    if num_regions is not None and high >= num_regions:
        raise ValueError(f"superpixels: expected ids below {rows}, {num_regions}, got {high}")
