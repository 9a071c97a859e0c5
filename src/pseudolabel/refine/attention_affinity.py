"""Affinity of patches to each other, from a transformer's attention or features; maps spread along it."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pseudolabel._attention import attention_layers
from pseudolabel._checks import (
    check_count,
    check_finite,
    check_float,
    check_labels,
    check_number,
    check_probability,
    check_shapes,
)
from pseudolabel._maps import gather_present, present_classes, scatter_present, working_dtype

__all__ = ["AttentionAffinity", "attention_affinity", "box_mask", "feature_affinity", "propagate_affinity"]


def attention_affinity(
    attention: Tensor | Sequence[Tensor],
    *,
    layers: Iterable[int] | None = None,
    num_prefix_tokens: int = 1,
    iterations: int = 3,
    symmetric: bool = True,
    power: int = 1,
) -> Tensor:
    """Affinity of all patches to each other, from how they attend to each other.

        A = mean over layers and heads of the attention of patch i (row) to patch j (column)
        A_ij <- A_ij / sum_i A_ij;   A_ij <- A_ij / sum_j A_ij          iterations times
        W = (A + A^T) / 2                                               if symmetric
        affinity = W^power                                              the power of a matrix

    The two divisions, done again and again, lead to a matrix whose rows and columns all sum to 1 (Sinkhorn):
    patches that everything attends to lose their lead. The last division leaves rows that sum to 1; so do
    columns and the symmetric matrix after many iterations, nearly after 3.

    Memory: a (B,P,P) tensor and another for a layer at a time, whatever the number of layers and heads.

    Args:
        attention: Attention probabilities, one (B,heads,N,N) a layer in a list, as of `capture_attention`;
            or one tensor (B,L,heads,N,N), or (B,heads,N,N) of one layer. Half precision is summed in float32.
        layers: Which layers to take, from the end where negative: `range(-8, 0)` for the last eight. None:
            all given.
        num_prefix_tokens: Tokens in front of the patches, which are left out, >= 0.
        iterations: How often both sums are divided by, >= 0.
        symmetric: Take the mean with the transposed matrix.
        power: Power of the matrix, >= 1. `propagate_affinity` with `times` does the same to maps for less.

    Returns:
        Affinity (B,P,P), float32 or better: row i says what patch i takes from each patch. Differentiable.

    Raises:
        TypeError: If ``attention`` is not floating-point.
        ValueError: If shapes do not fit, values leave [0, 1], or a setting is out of range.

    Examples:
        >>> import torch
        >>> attention = torch.tensor([[[[0.2, 0.4, 0.4], [0.0, 0.8, 0.2], [0.0, 0.6, 0.4]]]])
        >>> attention_affinity(attention)  # a class token and two patches
        tensor([[[0.6202, 0.3798],
                 [0.3798, 0.6202]]])

    Source:
        As described in CLIP-ES (Lin et al., CVPR 2023), whose official program takes the last 8 layers, 3
        iterations, and squares the matrix. Attention between patches as affinity also in AFA (Ru et al., CVPR
        2022, through a learned layer), MCTformer (Xu et al., CVPR 2022, without these divisions:
        `iterations=0, symmetric=False`) and WeCLIP (Zhang et al., CVPR 2024).
    """
    _check_affinity_settings(num_prefix_tokens, iterations, power)
    stack = attention_layers(attention, layers)
    if stack[0].shape[-1] <= num_prefix_tokens:
        raise ValueError(
            f"attention: expected patches behind {num_prefix_tokens} tokens in front, got "
            f"{stack[0].shape[-1]} tokens"
        )
    affinity = _patch_attention(stack[0], num_prefix_tokens)
    for layer in stack[1:]:
        affinity = affinity + _patch_attention(layer, num_prefix_tokens)
    affinity = affinity / len(stack)
    for _ in range(iterations):
        for axis in (1, 2):
            total = affinity.sum(axis, keepdim=True)
            affinity = affinity / total.where(total > 0, 1)
    if symmetric:
        affinity = (affinity + affinity.transpose(1, 2)) / 2
    return affinity if power == 1 else torch.linalg.matrix_power(affinity, power)


def _patch_attention(layer: Tensor, num_prefix_tokens: int) -> Tensor:
    """Attention (B,P,P) among the patches, mean over heads."""
    patches = layer[:, :, num_prefix_tokens:, num_prefix_tokens:]
    return patches.mean(1, dtype=working_dtype(layer))


class AttentionAffinity(nn.Module):
    """Module twin of `attention_affinity`: `affinity(attention)`."""

    def __init__(
        self,
        *,
        layers: Iterable[int] | None = None,
        num_prefix_tokens: int = 1,
        iterations: int = 3,
        symmetric: bool = True,
        power: int = 1,
    ) -> None:
        super().__init__()
        _check_affinity_settings(num_prefix_tokens, iterations, power)
        self.layers = None if layers is None else tuple(layers)
        self.num_prefix_tokens = num_prefix_tokens
        self.iterations = iterations
        self.symmetric = symmetric
        self.power = power

    def forward(self, attention: Tensor | Sequence[Tensor]) -> Tensor:
        """See `attention_affinity`."""
        return attention_affinity(
            attention,
            layers=self.layers,
            num_prefix_tokens=self.num_prefix_tokens,
            iterations=self.iterations,
            symmetric=self.symmetric,
            power=self.power,
        )

    def extra_repr(self) -> str:
        """Settings, for `print`."""
        return (
            f"layers={self.layers}, num_prefix_tokens={self.num_prefix_tokens}, "
            f"iterations={self.iterations}, symmetric={self.symmetric}, power={self.power}"
        )


def feature_affinity(
    features: Tensor, threshold: float = 0, power: float = 1, *, normalize: bool = True
) -> Tensor:
    """Affinity of all places to each other, from the likeness of their features.

        s_ij = f_i . f_j / (|f_i| |f_j|),   s_ii = 1
        a_ij = s_ij^power  where s_ij >= threshold and s_ij > 0,  else 0
        affinity_ij = a_ij / sum_j a_ij                               if normalize

    A place without features is like itself alone. With `threshold=0, power=1` it is the affinity of
    `pixel_correlation`, which does without the matrix.

    Args:
        features: Features (B,D,h,w), such as DINO's patch tokens by `tokens_to_map`. Computed in float32 or
            better.
        threshold: Less alike is not alike at all, in [0, 1].
        power: Exponent, > 0; higher gives the most alike more weight.
        normalize: Let each row sum to 1.

    Returns:
        Affinity (B,P,P), P = h*w, float32 or better, with a gradient to ``features``. Where the likeness is
        below the threshold there is none.

    Raises:
        TypeError: If ``features`` is not a floating-point tensor.
        ValueError: If ``features`` is not (B,D,h,w), or a setting is out of range.

    Examples:
        >>> import torch
        >>> features = torch.tensor([[[[1.0, 0.6, 0.0]], [[0.0, 0.8, 1.0]]]])
        >>> feature_affinity(features, threshold=0.7)
        tensor([[[1.0000, 0.0000, 0.0000],
                 [0.0000, 0.5556, 0.4444],
                 [0.0000, 0.4444, 0.5556]]])

    Source:
        Affinities of self-supervised features in weak supervision are used in several methods of 2024 and
        2025 (DHR; WeCLIP+ with DINOv2); the cosine is from SEAM (Wang et al., CVPR 2020). Threshold, exponent
        and the rule for empty features are ours.
    """
    check_shapes(features=(features, "B D h w"))
    check_float(features=features)
    check_finite(features=features)
    check_probability("threshold", threshold)
    check_number("power", power, above=0)
    f = F.normalize(features.to(working_dtype(features)).flatten(2), dim=1)
    itself = torch.eye(f.shape[2], dtype=torch.bool, device=f.device)
    likeness = (f.transpose(1, 2) @ f).clamp(max=1).masked_fill(itself, 1)
    alike = (likeness >= threshold) & (likeness > 0)
    # Roots have no finite slope at 0: what is not alike takes a constant there instead.
    affinity = likeness.where(alike, 1).pow(power).where(alike, 0)
    return affinity / affinity.sum(2, keepdim=True) if normalize else affinity


def propagate_affinity(
    maps: Tensor,
    affinity: Tensor,
    labels: Tensor | None = None,
    *,
    times: int = 2,
    boxes: Tensor | None = None,
) -> Tensor:
    """Spread maps along an affinity: each place takes what the places it is alike to have, several times.

        out_c = W^times (boxes_c . maps_c)

    The matrix is applied to the few maps `times` times, instead of being multiplied with itself; the result
    is the same. ``boxes`` are applied first, as in CLIP-ES: nothing outside spreads, inside or outside.
    Linear in ``maps``; gradients flow to ``maps`` and ``affinity``.

    Args:
        maps: Maps (B,C,h,w) in the grid of the affinity.
        affinity: Affinity (B,P,P), P = h*w: what place i (row) takes from place j, as of
            `attention_affinity` and `feature_affinity`.
        labels: Image-level labels (B,C). With them maps of absent classes become 0 and cost nothing.
        times: How often, >= 1. CLIP-ES: 2.
        boxes: Where each map may spread from (B,C,h,w), bool or weights, such as `box_mask` makes.

    Returns:
        Maps like ``maps``.

    Raises:
        TypeError: If ``maps`` or ``affinity`` is not a floating-point tensor.
        ValueError: If shapes do not fit, ``labels`` are not multi-hot, values are not finite, or ``times`` is
            no integer >= 1.

    Examples:
        >>> import torch
        >>> affinity = torch.tensor([[[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]])
        >>> propagate_affinity(torch.tensor([[[[1.0, 0.0, 0.3]]]]), affinity)
        tensor([[[[0.5000, 0.5000, 0.3000]]]])

    Source:
        As described in CLIP-ES (Lin et al., CVPR 2023), its class-aware attention-based affinity.
    """
    sizes = check_shapes(maps=(maps, "B C h w"), affinity=(affinity, "B P P"))
    check_float(maps=maps, affinity=affinity)
    check_count(times=times)
    if sizes["h"] * sizes["w"] != sizes["P"]:
        raise ValueError(
            f"affinity: expected (B, P, P) with P = {sizes['h']} x {sizes['w']} = {sizes['h'] * sizes['w']} "
            f"places of maps, got {tuple(affinity.shape)}; resize the maps to the grid of patches"
        )
    check_finite(maps=maps, affinity=affinity)
    if boxes is not None:
        check_shapes(maps=(maps, "B C h w"), boxes=(boxes, "B C h w"))
    index = valid = None
    x = maps
    if labels is not None:
        check_shapes(maps=(maps, "B C h w"), labels=(labels, "B C"))
        check_labels(labels)
        index, valid = present_classes(labels)
        x = gather_present(maps, index)
        boxes = None if boxes is None else gather_present(boxes, index)
    # Sums over all places are too long for half precision, under autocast too.
    with torch.autocast(maps.device.type, enabled=False):
        dtype = torch.promote_types(working_dtype(maps), working_dtype(affinity))
        x = x.to(dtype)
        x = x if boxes is None else x * boxes
        x, taken_from = x.flatten(2), affinity.to(dtype).transpose(1, 2)
        for _ in range(times):
            x = x @ taken_from
    out = x.reshape(*x.shape[:2], *maps.shape[2:]).to(maps.dtype)
    return out if index is None or valid is None else scatter_present(out, index, valid, maps.shape[1])


def box_mask(maps: Tensor, threshold: float = 0.4, labels: Tensor | None = None) -> Tensor:
    """Boxes around the parts where a map is high: inside or outside, for each place of each map.

    A place is high where `map > threshold max(map)`. High places that touch, diagonally too, make a part;
    each part gets the smallest upright box around it, and the mask is the union of the boxes. A map without
    a positive value has none.

    All maps are worked on at once, in steps, of which few are needed for compact parts. After every four the
    program looks whether anything has changed, a synchronisation.

    Args:
        maps: Maps (B,C,h,w), background 0 or below, on the grid of patches rather than of pixels.
        threshold: Share of a map's maximum, in [0, 1).
        labels: Image-level labels (B,C). With them absent classes have no boxes and cost nothing.

    Returns:
        Mask (B,C,h,w) bool.

    Raises:
        TypeError: If ``maps`` is not a floating-point tensor.
        ValueError: If shapes do not fit, ``maps`` is not finite, or ``threshold`` is out of range.

    Examples:
        >>> import torch
        >>> maps = torch.tensor([[[[0.0, 0.9, 0.0, 0.0], [0.0, 1.0, 0.8, 0.0], [0.1, 0.0, 0.0, 0.6]]]])
        >>> box_mask(maps, 0.7).int()
        tensor([[[[0, 1, 1, 0],
                  [0, 1, 1, 0],
                  [0, 0, 0, 0]]]], dtype=torch.int32)

    Source:
        CLIP-ES (Lin et al., CVPR 2023), threshold 0.4. Its official program rounds maps to 8 bits, and
        leaves the last row and column of the grid out of every box; here they may be inside.
    """
    check_shapes(maps=(maps, "B C h w"))
    check_float(maps=maps)
    check_number("threshold", threshold, at_least=0)
    if threshold >= 1:
        raise ValueError(f"threshold: expected a number in [0, 1), got {threshold!r}")
    check_finite(maps=maps)
    x, index, valid = maps.detach(), None, None
    if labels is not None:
        check_shapes(maps=(maps, "B C h w"), labels=(labels, "B C"))
        check_labels(labels)
        index, valid = present_classes(labels)
        x = gather_present(x, index)
    if x.numel() == 0:
        return torch.zeros_like(maps, dtype=torch.bool)
    x = x.to(working_dtype(x))
    high = (x > threshold * x.amax((2, 3), keepdim=True)) & (x > 0)
    mask = _boxes_of_parts(high.flatten(0, 1)).view_as(high)
    return mask if index is None or valid is None else scatter_present(mask, index, valid, maps.shape[1])


def _boxes_of_parts(high: Tensor) -> Tensor:
    """Union (M,h,w) of the boxes around the connected parts of masks (M,h,w)."""
    count, height, width = high.shape
    part = _parts(high)
    places = torch.arange(height * width, device=high.device).expand(count, -1)
    y, x = places // width, places % width
    # The extremes of a part, each kept at the part's number; 0 collects what is not high.
    nothing = torch.full((count, 1 + height * width), -1, device=high.device)
    bottom, right = (nothing.scatter_reduce(1, part, value, "amax") for value in (y, x))
    top, left = (
        side - 1 - nothing.scatter_reduce(1, part, side - 1 - value, "amax")
        for side, value in ((height, y), (width, x))
    )
    # Boxes as corners of a table of differences, whose sums over rows and columns count the boxes at a place.
    corners = torch.zeros(count, (height + 1) * (width + 1), dtype=torch.int64, device=high.device)
    one = bottom.ge(0).long()
    one[:, 0] = 0
    top, left = top.where(one > 0, 0), left.where(one > 0, 0)
    for rows, columns, sign in (
        (top, left, 1),
        (bottom + 1, right + 1, 1),
        (top, right + 1, -1),
        (bottom + 1, left, -1),
    ):
        corners.scatter_add_(1, rows * (width + 1) + columns, sign * one)
    covered = corners.view(count, height + 1, width + 1).cumsum(1).cumsum(2)
    return covered[:, :-1, :-1] > 0


def _parts(high: Tensor) -> Tensor:
    """Number of the connected part (M,hw) of each place of masks (M,h,w); 0 off all parts.

    A part has the highest number of its places. Neighbours tell each other the highest number they know, and
    each place asks the place of that number what it knows by now.
    """
    places = high[0].numel()
    dtype = torch.float32 if places <= 2**24 else torch.float64  # whole numbers are pooled as floats
    number = torch.arange(1, 1 + places, dtype=dtype, device=high.device)
    known = number.view_as(high[0]) * high
    while True:
        before = known
        for _ in range(4):
            known = F.max_pool2d(known[:, None], 3, 1, 1)[:, 0] * high
            of_number = F.pad(known.flatten(1), (1, 0))
            known = of_number.gather(1, known.flatten(1).long()).view_as(high)
        if torch.equal(before, known):
            return known.flatten(1).long()


def _check_affinity_settings(num_prefix_tokens: int, iterations: int, power: int) -> None:
    check_count(at_least=0, num_prefix_tokens=num_prefix_tokens, iterations=iterations)
    check_count(power=power)
