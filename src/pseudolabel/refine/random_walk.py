"""Random walk: scores spread to neighbouring pixels that a network, or the image, holds to be alike."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pseudolabel._checks import (
    check_channels,
    check_count,
    check_finite,
    check_float,
    check_ignore_index,
    check_integer,
    check_labels,
    check_number,
    check_shapes,
    check_unit_range,
    values_unchecked,
)
from pseudolabel._maps import gather_present, present_classes, scatter_present, working_dtype

__all__ = ["RandomWalk", "affinity_from_features", "affinity_labels", "affinity_offsets", "random_walk"]


def affinity_offsets(radius: int = 5) -> list[tuple[int, int]]:
    """Offsets (dy, dx) from a pixel to its partners within a radius, each pair of pixels once.

    The order, which is that of the channels of an affinity tensor: `dy = 0` with `dx = 1..radius-1`, then
    `dy = 1..radius-1` with `dx` from left to right, where `dx^2 + dy^2 < radius^2`.

    Args:
        radius: Distance, in pixels of the map, below which two pixels are a pair, >= 2. Published: 5, which
            gives 34 offsets.

    Returns:
        The offsets.

    Raises:
        ValueError: If ``radius`` is no integer >= 2.

    Examples:
        >>> affinity_offsets(2)
        [(0, 1), (1, -1), (1, 0), (1, 1)]
        >>> len(affinity_offsets(5))
        34

    Source:
        Ahn and Kwak, "Learning Pixel-level Semantic Affinity with Image-level Supervision for Weakly
        Supervised Semantic Segmentation" (AffinityNet), CVPR 2018; the order of the official PMM
        implementation at 134ad33.
    """
    _check_radius(radius)
    right = [(0, dx) for dx in range(1, radius)]
    below = [
        (dy, dx) for dy in range(1, radius) for dx in range(1 - radius, radius) if dx**2 + dy**2 < radius**2
    ]
    return right + below


def affinity_from_features(features: Tensor, radius: int = 5, *, inner_only: bool = False) -> Tensor:
    """Affinity of each pixel to its partners within a radius, from the distance of their features.

        a_ij = exp(-mean over channels |f_i - f_j|)

    Args:
        features: Features (B,D,h,w), such as the last layer of an AffinityNet, or of the image itself.
        radius: See `affinity_offsets`.
        inner_only: Take the pairs that the official program takes: those that start at a pixel with a whole
            neighbourhood to its left, to its right and below. Pixels at the left and right border then have
            few pairs, or none. Maps with a side below `2 radius + 1` get the radius `(side - 1) // 2`.
            By default all pairs inside the map are taken, whatever its size.

    Returns:
        Affinities (B,O,h,w) in (0, 1], one channel an offset of `affinity_offsets`; 0 where there is no pair.
        float32 for half precision.

    Raises:
        TypeError: If ``features`` is not a floating-point tensor.
        ValueError: If ``features`` is not (B,D,h,w), ``radius`` no integer >= 2, or the map too small for
            ``inner_only``.

    Examples:
        >>> import torch
        >>> features = torch.tensor([[[[0.0, 0.0, 2.0]]]])
        >>> affinity_from_features(features, radius=2)[0, 0]  # to the right neighbour
        tensor([[1.0000, 0.1353, 0.0000]])

    Source:
        AffinityNet (CVPR 2018); with ``inner_only`` it matches the official PMM implementation at 134ad33.
    """
    sizes = check_shapes(features=(features, "B D h w"))
    check_float(features=features)
    check_finite(features=features)
    if sizes["D"] == 0:
        raise ValueError(f"features: expected at least one channel, got {tuple(features.shape)}")
    size = (sizes["h"], sizes["w"])
    radius = _fitting_radius("features", radius, size, inner_only)
    f = features.to(working_dtype(features))
    padded = _pad(f, radius)
    affinity = torch.stack(
        [
            torch.exp(-(f - _neighbour(padded, offset, radius)).abs().mean(1))
            for offset in affinity_offsets(radius)
        ],
        dim=1,
    )
    return affinity.where(_pairs(size, radius, inner_only, features.device), 0)


def affinity_labels(
    mask: Tensor, radius: int = 5, *, inner_only: bool = False, ignore_index: int = 255
) -> Tensor:
    """What a mask says of each pair of pixels within a radius: the target of `affinity_loss`.

    | label of the pair | |
    |---|---|
    | 0 | both are background |
    | 1 | both are of one foreground class |
    | 2 | they differ |
    | ``ignore_index`` | one of them is ignored, or there is no such pair |

    Args:
        mask: Label map (B,H,W), integer, in the size of the affinity's map.
        radius: See `affinity_offsets`.
        inner_only: See `affinity_from_features`.
        ignore_index: Label of the pixels that say nothing.

    Returns:
        Labels of pairs (B,O,H,W) int64, one channel an offset of `affinity_offsets`.

    Raises:
        TypeError: If ``mask`` is not an integer tensor.
        ValueError: If ``mask`` is not (B,H,W) or has negative labels, ``radius`` is no integer >= 2,
            ``ignore_index`` is one of 0, 1, 2, or the map is too small for ``inner_only``.

    Examples:
        >>> import torch
        >>> affinity_labels(torch.tensor([[[0, 0, 3, 3, 255]]]), radius=2)[0, 0]  # with the right neighbour
        tensor([[  0,   2,   1, 255, 255]])

    Source:
        AffinityNet (CVPR 2018); with ``inner_only`` it matches `ExtractAffinityLabelInRadius` of the official
        PMM implementation at 134ad33.
    """
    sizes = check_shapes(mask=(mask, "B H W"))
    check_integer(mask=mask)
    check_ignore_index(ignore_index)
    if ignore_index in (0, 1, 2):
        raise ValueError(f"ignore_index: expected another value than the labels 0, 1, 2, got {ignore_index}")
    mask = mask.long()
    if not values_unchecked(mask) and bool(((mask < 0) & (mask != ignore_index)).any()):
        raise ValueError(f"mask: expected labels >= 0 or ignore_index {ignore_index}, got {int(mask.min())}")
    size = (sizes["H"], sizes["W"])
    radius = _fitting_radius("mask", radius, size, inner_only)

    padded = _pad(mask, radius)
    partner = torch.stack([_neighbour(padded, offset, radius) for offset in affinity_offsets(radius)], dim=1)
    mask = mask[:, None]
    label = torch.where(partner == mask, (mask > 0).long(), 2)
    known = (mask != ignore_index) & (partner != ignore_index)
    return label.where(known & _pairs(size, radius, inner_only, mask.device), ignore_index)


def random_walk(
    scores: Tensor,
    affinity: Tensor,
    labels: Tensor | None = None,
    *,
    beta: float = 8,
    log_steps: int = 6,
) -> Tensor:
    """Walk `2^log_steps` steps at random between like pixels, and take the mean of the scores met there.

    With the symmetric matrix `A` of the affinities of all pairs, 1 on its diagonal and 0 off the pairs:

        T_ij = A_ij^beta / sum_i A_ij^beta
        out = scores T^(2^log_steps)

    The published program builds the dense `T` of `(hw)^2` numbers and squares it ``log_steps`` times. Here
    `T` stays what it is, a stencil of 2 O + 1 weights a pixel, and is applied `2^log_steps` times to the few
    maps: the same result, with memory that grows like `hw`. Every step is a weighted mean of neighbours, so
    constant maps stay as they are. Gradients flow to ``scores`` and to ``affinity``.

    The radius counts pixels of the map: on a finer map the same walk reaches less far across the image.

    Args:
        scores: Maps (B,K,h,w) in the size of the affinities; any channels, a background or not.
        affinity: Affinities (B,O,h,w) in [0, 1], one channel an offset of `affinity_offsets`, whose number
            tells the radius; 0 where there is no pair. Pairs that leave the map are not read.
        labels: Image-level labels (B,C). Then ``scores`` is (B,1+C,h,w) with the background in front; maps of
            absent classes become 0 and cost nothing.
        beta: Exponent of the affinities, > 0: the higher, the fewer steps lead to unlike pixels.
        log_steps: Logarithm to base 2 of the number of steps, >= 0.

    Returns:
        Maps like ``scores``.

    Raises:
        TypeError: If ``scores`` or ``affinity`` is not a floating-point tensor.
        ValueError: If shapes do not fit, no radius has so many offsets, ``affinity`` is not in [0, 1], or a
            setting is out of range.

    Examples:
        >>> import torch
        >>> features = torch.tensor([[[[0.0, 0.0, 0.0, 9.0]]]])  # three like pixels and another one
        >>> affinity = affinity_from_features(features, radius=2)
        >>> random_walk(torch.tensor([[[[0.0, 0.0, 0.7, 1.0]]]]), affinity)
        tensor([[[[0.2000, 0.2000, 0.2000, 1.0000]]]])

    Source:
        AffinityNet (CVPR 2018); matches `infer_aff` of the official PMM implementation at 134ad33, there
        with ``beta`` 8 and ``log_steps`` 6 (the released pipeline of that method does not call it).
    """
    check_shapes(affinity=(affinity, "B O h w"), scores=(scores, "B K h w"))
    check_float(scores=scores, affinity=affinity)
    check_unit_range(affinity=affinity)
    radius = _radius_of(affinity)
    _check_settings(beta, log_steps)
    if labels is not None:
        check_shapes(scores=(scores, "B 1+C h w"), labels=(labels, "B C"))
        check_labels(labels)
        check_channels(labels.shape[1], "labels", scores=scores)
        index, valid = present_classes(F.pad(labels != 0, (1, 0), value=True))
        maps = gather_present(scores, index)
    else:
        maps = scores

    maps = maps.to(torch.promote_types(working_dtype(scores), working_dtype(affinity)))
    weights = _transition(affinity.to(maps.dtype), radius, beta)
    for _ in range(2**log_steps):
        maps = _step(maps, weights, radius)
    maps = maps.to(scores.dtype)
    return maps if labels is None else scatter_present(maps, index, valid, scores.shape[1])


def _transition(affinity: Tensor, radius: int, beta: float) -> list[Tensor]:
    """Weights (B,1,h,w) of a pixel's neighbours in the order of `_stencil`; they sum to 1 at each pixel."""
    size = (affinity.shape[-2], affinity.shape[-1])
    # Roots have no finite slope at 0: no pair takes a constant there instead.
    pair = (affinity > 0) & _pairs(size, radius, inner_only=False, device=affinity.device)
    forward = affinity.where(pair, 1).pow(beta).where(pair, 0)
    padded = _pad(forward, radius)
    # The affinity of p to its partner p - offset is stored at that partner.
    backward = [
        _neighbour(padded[:, channel], (-dy, -dx), radius)
        for channel, (dy, dx) in enumerate(affinity_offsets(radius))
    ]
    weights = torch.cat([torch.ones_like(forward[:, :1]), forward, torch.stack(backward, 1)], 1)
    return list((weights / weights.sum(1, keepdim=True)).unsqueeze(2).unbind(1))


def _stencil(radius: int) -> list[tuple[int, int]]:
    offsets = affinity_offsets(radius)
    return [(0, 0), *offsets, *((-dy, -dx) for dy, dx in offsets)]


def _step(maps: Tensor, weights: list[Tensor], radius: int) -> Tensor:
    padded = _pad(maps, radius)
    met = torch.zeros_like(maps)
    for weight, offset in zip(weights, _stencil(radius), strict=True):
        met = met.addcmul_(weight, _neighbour(padded, offset, radius))
    return met


def _pad(maps: Tensor, radius: int) -> Tensor:
    return F.pad(maps, (radius - 1,) * 4)


def _neighbour(padded: Tensor, offset: tuple[int, int], radius: int) -> Tensor:
    """Values at `p + offset` for each pixel p, as a view of maps that `_pad` has padded."""
    top, left = (radius - 1 + step for step in offset)
    height, width = (side - 2 * (radius - 1) for side in padded.shape[-2:])
    return padded[..., top : top + height, left : left + width]


def _pairs(size: tuple[int, int], radius: int, inner_only: bool, device: torch.device) -> Tensor:
    """Which pixels (O,h,w) have a partner at which offset."""
    height, width = size
    dy, dx = torch.tensor(affinity_offsets(radius), device=device).T[:, :, None, None]
    y, x = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
    inside: Tensor = (y + dy < height) & (x + dx >= 0) & (x + dx < width)
    if inner_only:
        inside = inside & (y <= height - radius) & (x >= radius - 1) & (x <= width - radius)
    return inside


def _fitting_radius(name: str, radius: int, size: tuple[int, int], inner_only: bool) -> int:
    _check_radius(radius)
    if not inner_only or min(size) >= 2 * radius + 1:
        return radius
    if min(size) < 5:
        raise ValueError(f"{name}: expected sides of at least 5 for pairs with inner_only, got {size}")
    return (min(size) - 1) // 2


def _radius_of(affinity: Tensor) -> int:
    count, radius = affinity.shape[1], 2
    while len(affinity_offsets(radius)) < count:
        radius += 1
    if len(affinity_offsets(radius)) != count:
        known = [len(affinity_offsets(r)) for r in range(2, 7)]
        raise ValueError(
            f"affinity: expected a channel for each offset of a radius ({known} for 2..6), got {count}"
        )
    return radius


class RandomWalk(nn.Module):
    """Module twin of `random_walk`: `walk(scores, affinity)`."""

    def __init__(self, *, beta: float = 8, log_steps: int = 6) -> None:
        super().__init__()
        _check_settings(beta, log_steps)
        self.beta = beta
        self.log_steps = log_steps

    def forward(self, scores: Tensor, affinity: Tensor, labels: Tensor | None = None) -> Tensor:
        """See `random_walk`."""
        return random_walk(scores, affinity, labels, beta=self.beta, log_steps=self.log_steps)

    def extra_repr(self) -> str:
        """Settings, for `print`."""
        return f"beta={self.beta}, log_steps={self.log_steps}"


def _check_radius(radius: int) -> None:
    check_count(at_least=2, radius=radius)


def _check_settings(beta: float, log_steps: int) -> None:
    check_number("beta", beta, above=0)
    check_count(at_least=0, log_steps=log_steps)
