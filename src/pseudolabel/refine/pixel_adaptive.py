"""Pixel-adaptive refinement: PAMR, PAR and VARM let maps flow between neighbours of like colour.

The three are one thing but for the weights. Each pixel looks at its neighbours in eight directions at several
distances, weighs them by how like its own colour theirs is, and takes the weighted sum of their maps, a few
times over. The functions differ in their formula of the weights; the neighbours, the spread of their colours,
the softmax and the iterations are shared, at the end of this file.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pseudolabel._checks import check_count, check_finite, check_float, check_number, check_shapes
from pseudolabel._maps import stretch, working_dtype

__all__ = ["PAMR", "PAR", "VARM", "dilated_neighbors", "pamr", "par", "varm"]

_DILATIONS = (1, 2, 4, 8, 12, 24)
_DIRECTIONS = [(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)]  # dy, dx


def dilated_neighbors(
    maps: Tensor, dilations: Sequence[int] = _DILATIONS, *, include_center: bool = False
) -> Tensor:
    """Collect the neighbours of each pixel in eight directions, at several distances.

    The order: for each dilation in turn the directions top left, top, top right, left, right, bottom left,
    bottom, bottom right. Beyond the border the nearest pixel of the map repeats.

    This is the set that `pamr`, `par` and `varm` look at, written out, for weights of one's own. They do not
    call it: it is eight times the number of dilations as large as the maps.

    Args:
        maps: Maps or images (B,C,H,W).
        dilations: Distances in pixels, integers >= 1.
        include_center: Put the pixel itself between left and right: nine for each dilation.

    Returns:
        Neighbours (B,C,Q,H,W) in the dtype of ``maps``.

    Raises:
        TypeError: If ``maps`` is not a floating-point tensor.
        ValueError: If ``maps`` is not (B,C,H,W), or a dilation is no integer >= 1.

    Examples:
        >>> import torch
        >>> dilated_neighbors(torch.arange(9.0).view(1, 1, 3, 3), [1])[0, 0, :, 1, 1]
        tensor([0., 1., 2., 3., 5., 6., 7., 8.])

    Source:
        As `pamr`.
    """
    check_shapes(maps=(maps, "B C H W"))
    check_float(maps=maps)
    _check_dilations(dilations)
    return torch.stack(_shifts(_pad(maps, dilations), dilations, include_center), dim=2)


def pamr(image: Tensor, maps: Tensor, dilations: Sequence[int] = _DILATIONS, iterations: int = 10) -> Tensor:
    """Refine maps by pixel-adaptive convolution (PAMR): neighbours of like colour share their maps.

    With the colours `I` of a pixel and `I_q` of its neighbours q, in three channels:

        a_q = mean over channels of -|I_q - I| / (1e-8 + 0.1 sigma)
        W = softmax_q a
        maps <- sum_q W_q maps_q,   so many iterations

    `sigma` is the standard deviation of each channel over all neighbours, the pixel itself counted once for
    each dilation (over `n - 1`). All classes share the weights, so classes do not mix and absent ones need
    not be there: hand in the maps of the present classes. The weights are non-negative and sum to 1, and do
    not depend on the scale of the image. The gradient flows to ``maps``; the weights are constants, without
    one to ``image``.

    Memory: the weights take one number for each pixel and neighbour (48 by default, as much as 48 maps), and
    nothing else grows with the number of neighbours.

    Args:
        image: Images (B,3,H,W).
        maps: Maps (B,K,h,w), any channels; resized to the image, bilinear with `align_corners=True` as in the
            published programs. To refine in the size of the maps, resize the image to them
            (`run_pamr` of the official program).
        dilations: Distances of the neighbours in pixels of the image, integers >= 1.
        iterations: Number of passes, >= 0. 0 only resizes.

    Returns:
        Maps (B,K,H,W) in the dtype of ``maps``. Half precision is computed in float32.

    Raises:
        TypeError: If ``image`` or ``maps`` is not a floating-point tensor.
        ValueError: If shapes do not fit, ``image`` or ``maps`` is not finite, or a setting is out of range.

    Examples:
        >>> import torch
        >>> image = torch.tensor([0.0, 0.1, 0.9, 1.0]).expand(1, 3, 4, 4)  # dark, then bright
        >>> maps = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(1, 1, 4, 4)
        >>> pamr(image, maps, dilations=[1], iterations=1)[0, 0, 0]
        tensor([1.0000, 0.1262, 0.0000, 0.0000])

    Source:
        Araslanov and Roth, "Single-Stage Semantic Segmentation from Image Labels", CVPR 2020. The formula is
        read off the code: it matches `PAMR` of the official RTC program at 9c777e0, which is numerically that
        of the paper's own program (there one pass at dilation 1 by default; these settings are those of the
        networks).
    """
    size, dtype = _check(image, maps, dilations, iterations)
    image = image.detach().to(dtype)
    padded = _pad(image, dilations)
    scale = 1e-8 + 0.1 * _std(_shifts(padded, dilations, include_center=True))
    weights = _softmax(lambda near: -((near - image).abs() / scale).mean(1), _shifts(padded, dilations))
    return _spread(maps, size, weights, dilations, iterations)


def par(
    image: Tensor,
    maps: Tensor,
    dilations: Sequence[int] = _DILATIONS,
    iterations: int = 10,
    *,
    w1: float = 0.3,
    w2: float = 0.01,
) -> Tensor:
    """Refine maps by pixel-adaptive refinement (PAR): as `pamr`, with squares, and a share for near places.

    With the distance `rho` of a neighbour, `d` or `d sqrt 2` at dilation d, and its standard deviation:

        a_q = mean over channels of -((I_q - I) / (sigma + 1e-8) / w1)^2
        b_q = -(rho_q / (std(rho) + 1e-8) / w1)^2
        W = softmax_q a + w2 softmax_q b
        maps <- sum_q W_q maps_q,   so many iterations

    `sigma` is the standard deviation of each channel over all neighbours, without the pixel itself. The
    weights are non-negative and sum to `1 + w2`: each pass scales the maps by it, `1.01^10 = 1.105` in all.
    The argmax does not change by that, thresholds on the result do. Gradient and memory as for `pamr`.

    Args:
        image: Images (B,3,H,W).
        maps: Maps (B,K,h,w), resized to the image as in `pamr`.
        dilations: Distances of the neighbours in pixels of the image, integers >= 1.
        iterations: Number of passes, >= 0. 0 only resizes.
        w1: Width of both kernels, > 0: the smaller, the fewer neighbours count.
        w2: Share of the place, >= 0.

    Returns:
        Maps (B,K,H,W) in the dtype of ``maps``. Half precision is computed in float32.

    Raises:
        TypeError: If ``image`` or ``maps`` is not a floating-point tensor.
        ValueError: If shapes do not fit, ``image`` or ``maps`` is not finite, or a setting is out of range.

    Examples:
        >>> import torch
        >>> image, maps = torch.rand(1, 3, 4, 4), torch.ones(1, 1, 4, 4)
        >>> par(image, maps, iterations=2)[0, 0, 0]
        tensor([1.0201, 1.0201, 1.0201, 1.0201])

    Source:
        Ru et al., "Learning Affinity from Attention: End-to-End Weakly-Supervised Semantic Segmentation with
        Transformers" (AFA), CVPR 2022. The formula is read off the code: it matches `PAR` of the official RTC
        program at 9c777e0, a copy of AFA's.
    """
    size, dtype = _check(image, maps, dilations, iterations)
    _check_settings(w2, w1=w1)
    image = image.detach().to(dtype)
    neighbours = _shifts(_pad(image, dilations), dilations)
    scale = w1 * (_std(neighbours) + 1e-8)
    weights = _softmax(lambda near: -((near - image) / scale).square().mean(1), neighbours)

    rho = torch.tensor(
        [d * (2**0.5 if dy and dx else 1.0) for d in dilations for dy, dx in _DIRECTIONS],
        dtype=dtype,
        device=image.device,
    )
    place = -(rho / (rho.std() + 1e-8) / w1).square()
    weights += w2 * place.softmax(0)[:, None, None]
    return _spread(maps, size, weights, dilations, iterations)


def varm(
    image: Tensor,
    maps: Tensor,
    dilations: Sequence[int] = _DILATIONS,
    iterations: int = 10,
    *,
    sharpness: float = 4.0,
    w2: float = 0.01,
) -> Tensor:
    """Refine maps by VARM: as `par`, with a share taken from rough places in place of one for near places.

        a_q = mean over channels of -(sharpness (I_q - I) / (sigma + 1e-8))^2
        g_q = mean over channels of (I_q(y,x) - I_q(y+1,x))^2 + (I_q(y,x) - I_q(y,x+1))^2
        W = softmax_q a - w2 softmax_q g
        maps <- sum_q W_q maps_q,   so many iterations

    `sigma` is as in `par`. `g` is taken inside each shifted image; the differences across its last row
    and its last column are 0. Three things follow:

    - the weights sum to `1 - w2`: each pass scales the maps by it, `0.99^10 = 0.904` in all. The argmax does
      not change by that, thresholds on the result do;
    - weights may be negative, and so may results, a little;
    - the second softmax depends on the scale of the image: nearly uniform for images in [0, 1], which the
      published training feeds, nearly one-hot for images in [0, 255]. Both are computed as they come.

    Gradient as for `pamr`; twice the memory, for two softmaxes.

    Args:
        image: Images (B,3,H,W), in [0, 1] as published.
        maps: Maps (B,K,h,w), resized to the image as in `pamr`.
        dilations: Distances of the neighbours in pixels of the image, integers >= 1.
        iterations: Number of passes, >= 0. 0 only resizes.
        sharpness: Factor of the colour differences, > 0: the larger, the fewer neighbours count.
        w2: Share taken from rough places, >= 0.

    Returns:
        Maps (B,K,H,W) in the dtype of ``maps``. Half precision is computed in float32.

    Raises:
        TypeError: If ``image`` or ``maps`` is not a floating-point tensor.
        ValueError: If shapes do not fit, ``image`` or ``maps`` is not finite, or a setting is out of range.

    Examples:
        >>> import torch
        >>> image, maps = torch.rand(1, 3, 4, 4), torch.ones(1, 1, 4, 4)
        >>> varm(image, maps, iterations=2)[0, 0, 0]
        tensor([0.9801, 0.9801, 0.9801, 0.9801])

    Source:
        VARM is of SCD, the program `Rongtao-Xu/RepresentationLearning`, and is what Wang et al., "Boosting
        Weakly-Supervised Image Segmentation via Representation, Transform, and Compensator" (RTC, arXiv
        2309.00871) refine their masks with. The formula is read off the code: it matches `VARM` of the
        official RTC program at 9c777e0, a copy of SCD's. The papers' equations were not at hand.
    """
    size, dtype = _check(image, maps, dilations, iterations)
    _check_settings(w2, sharpness=sharpness)
    image = image.detach().to(dtype)
    padded = _pad(image, dilations)
    neighbours = _shifts(padded, dilations)
    scale = (_std(neighbours) + 1e-8) / sharpness
    weights = _softmax(lambda near: -((near - image) / scale).square().mean(1), neighbours)

    # The differences inside a shifted image are the shifted differences, but for its last row and column.
    below = F.pad(padded.diff(dim=2), (0, 0, 0, 1)).square().mean(1, keepdim=True)
    right = F.pad(padded.diff(dim=3), (0, 1)).square().mean(1, keepdim=True)
    not_last = F.pad(image.new_ones(size[0] - 1, 1), (0, 0, 0, 1)), F.pad(image.new_ones(size[1] - 1), (0, 1))
    rough = _softmax(
        lambda down, side: (down * not_last[0] + side * not_last[1])[:, 0],
        _shifts(below, dilations),
        _shifts(right, dilations),
    )
    return _spread(maps, size, weights.sub_(rough, alpha=w2), dilations, iterations)


def _pad(maps: Tensor, dilations: Sequence[int]) -> Tensor:
    if maps.shape[1] == 0:  # no map, which `pad` refuses
        return maps.new_empty(*maps.shape[:2], *(side + 2 * max(dilations) for side in maps.shape[2:]))
    return F.pad(maps, (max(dilations),) * 4, mode="replicate")


def _shifts(padded: Tensor, dilations: Sequence[int], include_center: bool = False) -> list[Tensor]:
    """The maps as seen from each neighbour, as views of what `_pad` has padded: they take no memory."""
    reach = max(dilations)
    height, width = (side - 2 * reach for side in padded.shape[-2:])
    directions = [*_DIRECTIONS[:4], (0, 0), *_DIRECTIONS[4:]] if include_center else _DIRECTIONS
    corners = [(reach + d * dy, reach + d * dx) for d in dilations for dy, dx in directions]
    return [padded[..., top : top + height, left : left + width] for top, left in corners]


def _std(neighbours: list[Tensor]) -> Tensor:
    """Standard deviation over the neighbours, over `n - 1`, without a stack of them."""
    total = torch.zeros_like(neighbours[0])
    for near in neighbours:
        total += near
    mean = total / len(neighbours)
    squares = total.zero_()
    for near in neighbours:
        deviation = near - mean
        squares.addcmul_(deviation, deviation)
    return squares.div_(len(neighbours) - 1).sqrt_()


def _softmax(logit: Callable[..., Tensor], *neighbours: list[Tensor]) -> Tensor:
    """Softmax (B,Q,H,W) over the neighbours of ``logit`` (B,H,W), which takes one of each list at a time."""
    batch, _, height, width = neighbours[0][0].shape
    weights = neighbours[0][0].new_empty(batch, len(neighbours[0]), height, width)
    for q, near in enumerate(zip(*neighbours, strict=True)):
        weights[:, q] = logit(*near)
    weights -= weights.amax(1, keepdim=True)
    weights.exp_()
    weights /= weights.sum(1, keepdim=True)
    return weights


def _spread(
    maps: Tensor, size: tuple[int, int], weights: Tensor, dilations: Sequence[int], iterations: int
) -> Tensor:
    """Take the weighted sum of the neighbours' maps, so many times."""
    if maps.shape[1] == 0:  # no class, which `pad` refuses
        return maps.new_zeros(len(maps), 0, *size)
    spread = stretch(maps.to(weights.dtype), size)
    for _ in range(iterations):
        neighbours = _shifts(_pad(spread, dilations), dilations)
        spread = torch.zeros_like(spread)
        for weight, near in zip(weights.unsqueeze(2).unbind(1), neighbours, strict=True):
            spread.addcmul_(weight, near)
    return spread.to(maps.dtype)


class PAMR(nn.Module):
    """Module twin of `pamr`: `refine(image, maps)`."""

    def __init__(self, dilations: Sequence[int] = _DILATIONS, iterations: int = 10) -> None:
        super().__init__()
        _check_passes(dilations, iterations)
        self.dilations = tuple(dilations)
        self.iterations = iterations

    def forward(self, image: Tensor, maps: Tensor) -> Tensor:
        """See `pamr`."""
        return pamr(image, maps, self.dilations, self.iterations)

    def extra_repr(self) -> str:
        """Settings, for `print`."""
        return f"dilations={self.dilations}, iterations={self.iterations}"


class PAR(nn.Module):
    """Module twin of `par`: `refine(image, maps)`."""

    def __init__(
        self,
        dilations: Sequence[int] = _DILATIONS,
        iterations: int = 10,
        *,
        w1: float = 0.3,
        w2: float = 0.01,
    ) -> None:
        super().__init__()
        _check_passes(dilations, iterations)
        _check_settings(w2, w1=w1)
        self.dilations = tuple(dilations)
        self.iterations = iterations
        self.w1 = w1
        self.w2 = w2

    def forward(self, image: Tensor, maps: Tensor) -> Tensor:
        """See `par`."""
        return par(image, maps, self.dilations, self.iterations, w1=self.w1, w2=self.w2)

    def extra_repr(self) -> str:
        """Settings, for `print`."""
        return f"dilations={self.dilations}, iterations={self.iterations}, w1={self.w1}, w2={self.w2}"


class VARM(nn.Module):
    """Module twin of `varm`: `refine(image, maps)`."""

    def __init__(
        self,
        dilations: Sequence[int] = _DILATIONS,
        iterations: int = 10,
        *,
        sharpness: float = 4.0,
        w2: float = 0.01,
    ) -> None:
        super().__init__()
        _check_passes(dilations, iterations)
        _check_settings(w2, sharpness=sharpness)
        self.dilations = tuple(dilations)
        self.iterations = iterations
        self.sharpness = sharpness
        self.w2 = w2

    def forward(self, image: Tensor, maps: Tensor) -> Tensor:
        """See `varm`."""
        return varm(image, maps, self.dilations, self.iterations, sharpness=self.sharpness, w2=self.w2)

    def extra_repr(self) -> str:
        """Settings, for `print`."""
        return (
            f"dilations={self.dilations}, iterations={self.iterations}, sharpness={self.sharpness}, "
            f"w2={self.w2}"
        )


def _check(
    image: Tensor, maps: Tensor, dilations: Sequence[int], iterations: int
) -> tuple[tuple[int, int], torch.dtype]:
    """Check what all three take; the size to refine in and the dtype to compute in."""
    sizes = check_shapes(image=(image, "B 3 H W"), maps=(maps, "B K h w"))
    check_float(image=image, maps=maps)
    _check_passes(dilations, iterations)
    check_finite(image=image, maps=maps)
    return (sizes["H"], sizes["W"]), torch.promote_types(working_dtype(image), working_dtype(maps))


def _check_passes(dilations: Sequence[int], iterations: int) -> None:
    _check_dilations(dilations)
    check_count(at_least=0, iterations=iterations)


def _check_dilations(dilations: Sequence[int]) -> None:
    if not isinstance(dilations, Sequence) or not dilations:
        raise ValueError(f"dilations: expected at least one distance, got {dilations!r}")
    for number, dilation in enumerate(dilations):
        check_count(**{f"dilations[{number}]": dilation})


def _check_settings(w2: float, **positive: float) -> None:
    check_number("w2", w2, at_least=0)
    for name, value in positive.items():
        check_number(name, value, above=0)
