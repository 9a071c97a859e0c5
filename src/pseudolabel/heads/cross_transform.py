"""Cross-transform regularisation: the maps of one view make prototypes of the features of the other.

Two views of each image give refined maps and features. On a common grid the maps of either view choose the
pixels, and the features of the other view at these pixels make one prototype a class; then the pixels of both
views are held against both sets. All but the last is without gradient.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pseudolabel._checks import (
    check_choice,
    check_classes,
    check_count,
    check_finite,
    check_float,
    check_integer,
    check_labels,
    check_number,
    check_probability,
    check_sequence,
    check_shapes,
    values_unchecked,
)
from pseudolabel._maps import stretch, working_dtype
from pseudolabel._prototype_nce import prototype_logits, prototype_nce

__all__ = [
    "BackgroundRanking",
    "CTROutput",
    "CrossTransformRegularization",
    "TopK",
    "assign_pseudo_labels",
    "confidence_scores",
    "cross_transform_contrast",
    "prototype_separation",
    "prototypes_from_topk",
    "topk_pixels",
]

BackgroundRanking = Literal["official", "complement"]


class TopK(NamedTuple):
    """The pixels of a batch that each class is most confident of.

    Attributes:
        values: Scores (K,k) of the pixels.
        indices: Their positions (K,k) int64 in the batch flattened as (image, row, column).
    """

    values: Tensor
    indices: Tensor


# --------------------------------------------------------------------------------- scores and pseudo-labels


def confidence_scores(refined: Tensor, *, background: float = 0.2, eps: float = 1e-5) -> Tensor:
    """Normalise the maps of each image and class, and set the background to a constant.

    With `x = max(refined, 0)`, and `m`, `M` its minimum and maximum over the pixels of one map:

        score = (x - m - eps) / (M - m + eps)   where x >= m + eps
              = (0 - m - eps) / (M - m + eps)   at the minimum of the map

    The second line is not 0, as it is with `normalize_cam(..., "minmax-zero")`: it is -1 for a map of zeros,
    -8 for one from 0.8 to 0.9, and `-(v + eps) / eps` for one that is `v` everywhere. It is what
    the official program computes. Such pixels win no label; where they enter a prototype, its option
    ``clamp_negative`` leaves them out.

    Args:
        refined: Refined scores (B,1+C,h,w), background first, such as those of
            `CrossRepresentationRefinement`. Their own background is not used.
        background: Score of the background at every pixel, in [0, 1]. Published: 0.2.
        eps: Guard of the division, > 0.

    Returns:
        Scores (B,1+C,h,w), at most 1, float32 for half precision, without a graph. Absent classes have
        theirs.

    Raises:
        TypeError: If ``refined`` is not a floating-point tensor.
        ValueError: If ``refined`` is not (B,1+C,h,w), has no channel, or a setting is out of range.

    Examples:
        >>> import torch
        >>> refined = torch.tensor([[[[0.3, 0.9, 0.1]], [[0.0, 0.2, 0.4]]]])
        >>> confidence_scores(refined)[0, 1, 0]
        tensor([-2.4999e-05,  4.9996e-01,  9.9995e-01])

    Source:
        As `CrossTransformRegularization`; `normal` of its program.
    """
    _check_scores("refined", refined)
    check_probability("background", background)
    check_number("eps", eps, above=0)
    x = refined.detach()[:, 1:].to(working_dtype(refined)).clamp(min=0)
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    x = x.masked_fill(x < low + eps, 0)
    scores = (x - low - eps) / (high - low + eps)
    return F.pad(scores, (0, 0, 0, 0, 1, 0), value=background)


def assign_pseudo_labels(scores: Tensor, labels: Tensor) -> Tensor:
    """Label each pixel with the highest score among the background and the present classes.

    Every pixel gets a label, padding and doubtful ones included, as in the official program; set others to
    the ``ignore_index`` of the contrast yourself.

    Args:
        scores: Scores (B,1+C,h,w), background first: `confidence_scores`.
        labels: Image-level labels (B,C). Without a label an image is background everywhere.

    Returns:
        Classes (B,h,w) int64: 0 background, c+1 class c.

    Raises:
        TypeError: If ``scores`` are not floating-point.
        ValueError: If shapes do not fit, ``scores`` are not finite, or ``labels`` are not multi-hot.

    Examples:
        >>> import torch
        >>> scores = torch.tensor([[[[0.2, 0.2]], [[0.9, 0.1]], [[0.3, 0.8]]]])
        >>> assign_pseudo_labels(scores, torch.tensor([[1, 0]]))
        tensor([[[1, 0]]])

    Source:
        As `CrossTransformRegularization`.
    """
    present = _with_background("scores", scores, labels)
    if scores.device.type == "cpu":  # accelerators would have to be waited for
        check_finite(scores=scores)
    return scores.detach().masked_fill(~present[:, :, None, None], -torch.inf).argmax(1)


# --------------------------------------------------------------------------------------------- prototypes


def topk_pixels(
    scores: Tensor,
    *,
    ratio: float = 1 / 8,
    k: int | None = None,
    background: BackgroundRanking = "official",
) -> TopK:
    """Pixels with the highest scores of each class, over the whole batch.

        k = floor(ratio h w), at least 1

    It does not grow with the batch: the official 1/8 is `1 / (8 B)` of its pixels.

    Args:
        scores: Scores (B,K,h,w), background first: `confidence_scores`. Absent classes have their pixels too.
        ratio: Share of the pixels of one image, in (0, 1]. Official: 1/8.
        k: Number of pixels instead, at most B h w.
        background: How pixels of channel 0 are ranked: by their score (`official`), which is the same
            everywhere, so that chance decides (the first ones, on a CPU); or by `1 - max` of the other
            channels (`complement`, ours; of equal pixels the first).

    Returns:
        `TopK` of ``values`` (K,k), like ``scores``, in falling order, and ``indices`` (K,k). It carries no
        graph. With `complement` the values of channel 0 are the scores at its pixels.

    Raises:
        TypeError: If ``scores`` are not floating-point.
        ValueError: If ``scores`` are not (B,K,h,w), there are fewer than ``k`` pixels, or a setting is out of
            range.

    Examples:
        >>> import torch
        >>> scores = torch.tensor([[[[0.2, 0.2, 0.2]], [[0.1, 0.7, 0.4]]]])
        >>> topk_pixels(scores, k=2, background="complement").indices
        tensor([[0, 2],
                [1, 2]])

    Source:
        As `CrossTransformRegularization`.
    """
    sizes = check_shapes(scores=(scores, "B K h w"))
    check_float(scores=scores)
    check_number("ratio", ratio, above=0, at_most=1)
    check_choice("background", background, BackgroundRanking)
    if k is None:
        k = max(1, int(ratio * sizes["h"] * sizes["w"]))
    check_count(k=k)
    pixels = sizes["B"] * sizes["h"] * sizes["w"]
    if k > pixels:
        raise ValueError(f"k: expected at most the {pixels} pixels of scores, got {k}")

    flat = scores.detach().movedim(1, 0).flatten(1)
    values, indices = flat.topk(k, dim=1)
    if background == "complement" and len(flat) > 1:
        first = (1 - flat[1:].amax(0)).argsort(descending=True, stable=True)[:k]
        indices = torch.cat([first[None], indices[1:]])
        values = flat.gather(1, indices)
    return TopK(values, indices)


def prototypes_from_topk(features: Tensor, topk: TopK, *, clamp_negative: bool = False) -> Tensor:
    """Mean of the features at the pixels of each class, weighted by their scores, scaled to length 1.

        v_k = sum_i values[k,i] X[indices[k,i]] / sum_i values[k,i],   P_k = v_k / |v_k|

    The division sets no more than the sign: weights that are all negative count as positive ones. Where they
    add up to 0, or all features are 0, the prototype is 0.

    Args:
        features: Features `X` (B,D,h,w) on the grid of the scores, of the *other* view.
        topk: What `topk_pixels` chose, or pixels of your own.
        clamp_negative: Leave out pixels with a negative score, which `confidence_scores` gives to the lowest
            ones of a map. The official program lets them in: they push the prototype away, and weights of
            mixed sign may turn it around.

    Returns:
        Prototypes (K,D), float32 or better, without a graph.

    Raises:
        TypeError: If ``features`` or the values are not floating-point, or the indices not integer.
        ValueError: If shapes do not fit, or an index is no pixel of ``features``.

    Examples:
        >>> import torch
        >>> features = torch.tensor([[[[6.0, 0.0, 1.0]], [[0.0, 4.0, 1.0]]]])
        >>> topk = TopK(torch.tensor([[0.5, 1.0]]), torch.tensor([[0, 1]]))
        >>> prototypes_from_topk(features, topk)  # (3, 4) / 5
        tensor([[0.6000, 0.8000]])

    Source:
        As `CrossTransformRegularization`.
    """
    rows = _pixel_rows(features, topk)
    weights = topk.values.detach().to(rows.dtype)
    if clamp_negative:
        weights = weights.clamp(min=0)
    with torch.autocast(features.device.type, enabled=False):
        total = torch.einsum("ki,kid->kd", weights, rows[topk.indices])
        return F.normalize(total * weights.sum(1, keepdim=True).sign(), dim=1)


def prototype_separation(prototypes1: Tensor, prototypes2: Tensor, present: Tensor) -> Tensor:
    """How far the prototypes of different classes are apart; to watch, no part of the loss.

        1/2 mean over k != l of - log(1 - P1_k . P2_l)

    over ordered pairs of present classes. Small is far apart; it is infinite where two coincide, and NaN
    where fewer than two classes are present.

    Args:
        prototypes1: Prototypes (K,D) of length 1 from one view.
        prototypes2: Prototypes (K,D) from the other.
        present: Classes (K,) that an image of the batch shows, the background among them.

    Returns:
        A scalar, float32 or better, without a graph.

    Raises:
        TypeError: If a prototype tensor is not floating-point.
        ValueError: If shapes do not fit.

    Examples:
        >>> import torch
        >>> prototypes = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
        >>> prototype_separation(prototypes, prototypes, torch.tensor([True, True]))
        tensor(0.4581)

    Source:
        As `CrossTransformRegularization`; its program logs it as `loss_class_relation`.
    """
    check_shapes(prototypes1=(prototypes1, "K D"), prototypes2=(prototypes2, "K D"), present=(present, "K"))
    check_float(prototypes1=prototypes1, prototypes2=prototypes2)
    if present.device.type == "cpu":  # accelerators would have to be waited for
        check_labels(present, "present")
    dtype = working_dtype(prototypes1)
    cosine = prototypes1.detach().to(dtype) @ prototypes2.detach().to(dtype).T
    distance = -torch.log1p(-cosine.clamp(max=1))
    shown = present != 0
    pairs = (shown[:, None] & shown) & ~torch.eye(len(shown), dtype=torch.bool, device=shown.device)
    return distance.where(pairs, 0).sum() / pairs.sum() / 2


# ------------------------------------------------------------------------------------------------ contrast


def cross_transform_contrast(  # noqa: PLR0917  (three pairs, view 1 before view 2)
    features1: Tensor,
    features2: Tensor,
    targets1: Tensor,
    targets2: Tensor,
    prototypes1: Tensor,
    prototypes2: Tensor,
    *,
    temperature: float = 0.1,
    weights: tuple[float, float, float] = (0.1, 0.1, 0.1),
    valid: Tensor | None = None,
    ignore_index: int = 255,
) -> dict[str, Tensor]:
    """Three contrasts of the pixels of two views with two sets of prototypes.

    With `NCE(features, targets, prototypes)` of `losses.pixel_prototype_nce`:

    | term | formula |
    |---|---|
    | `intra_view` | `w1 (NCE(X1, y1, P1) + NCE(X2, y2, P2)) / 2` |
    | `cross_label` | `w2 (NCE(X1, y2, P1) + NCE(X2, y1, P2)) / 2` |
    | `cross_prototype` | `w3 (NCE(X1, y1, P2) + NCE(X2, y2, P1)) / 2` |

    `P1` comes from the maps of view 1 and the features of view 2, `P2` the other way round. Their sum is the
    same when the views change places. Gradients flow to the features alone.

    Args:
        features1: Features `X1` (B,D,h,w) of view 1.
        features2: Features `X2` (B,D,h,w) of view 2, on the same grid.
        targets1: Classes `y1` (B,h,w), integer, of `assign_pseudo_labels`.
        targets2: Classes `y2` (B,h,w).
        prototypes1: Prototypes `P1` (K,D).
        prototypes2: Prototypes `P2` (K,D).
        temperature: Divisor of the cosines, > 0.
        weights: `w1`, `w2`, `w3`, >= 0.
        valid: Classes (K,) bool that serve as negatives; all by default (official).
        ignore_index: Target of the pixels that carry no loss.

    Returns:
        The three terms by name, scalars, float32 or better.

    Raises:
        TypeError: If features or prototypes are not floating-point, targets not integer, or ``valid`` not
            bool.
        ValueError: If shapes do not fit, targets hold other labels, or a setting is out of range.

    Examples:
        >>> import torch
        >>> x, y = torch.tensor([[[[2.0, 0.0]], [[0.0, 5.0]]]]), torch.tensor([[[0, 1]]])
        >>> cross_transform_contrast(x, x, y, 1 - y, torch.eye(2), torch.eye(2))
        {'intra_view': tensor(0.5000), 'cross_label': tensor(0.5000), 'cross_prototype': tensor(0.5000)}

    Source:
        As `CrossTransformRegularization`.
    """
    sizes = check_shapes(
        features1=(features1, "B D h w"),
        features2=(features2, "B D h w"),
        targets1=(targets1, "B h w"),
        targets2=(targets2, "B h w"),
        prototypes1=(prototypes1, "K D"),
        prototypes2=(prototypes2, "K D"),
    )
    check_float(features1=features1, features2=features2, prototypes1=prototypes1, prototypes2=prototypes2)
    check_integer(targets1=targets1, targets2=targets2)
    _check_contrast(temperature, weights)
    if targets1.device.type == "cpu":  # accelerators would have to be waited for, and assert it themselves
        check_classes(sizes["K"], ignore_index, targets1=targets1, targets2=targets2)
    if valid is not None:
        check_shapes(prototypes1=(prototypes1, "K D"), valid=(valid, "K"))
        if valid.dtype != torch.bool:
            raise TypeError(f"valid: expected a bool tensor, got {valid.dtype}")

    def nce(logits: Tensor, targets: Tensor) -> Tensor:
        ignored = targets == ignore_index
        loss = prototype_nce(logits, targets, ignored=ignored, valid=valid)
        return loss.sum() / (~ignored).sum().clamp(min=1)

    x1p1, x1p2 = (prototype_logits(features1, p, temperature) for p in (prototypes1, prototypes2))
    x2p1, x2p2 = (prototype_logits(features2, p, temperature) for p in (prototypes1, prototypes2))
    return {
        "intra_view": weights[0] * (nce(x1p1, targets1) + nce(x2p2, targets2)) / 2,
        "cross_label": weights[1] * (nce(x1p1, targets2) + nce(x2p2, targets1)) / 2,
        "cross_prototype": weights[2] * (nce(x1p2, targets1) + nce(x2p1, targets2)) / 2,
    }


class CTROutput(NamedTuple):
    """What `CrossTransformRegularization` returns; the numbers name the views.

    Attributes:
        losses: The terms of `cross_transform_contrast` by name; their sum is the loss.
        scores1: Confidence scores (B,1+C,h,w) on the common grid, without a graph.
        scores2: Those of view 2.
        targets1: Pseudo-labels (B,h,w) int64.
        targets2: Those of view 2.
        topk1: Pixels of the highest scores of view 1.
        topk2: Those of view 2.
        prototypes1: Prototypes (1+C,D) from the scores of view 1 and the features of view 2.
        prototypes2: Prototypes from the scores of view 2 and the features of view 1.
        features1: Features (B,D,h,w) on the common grid, with their graph.
        features2: Those of view 2.
    """

    losses: Mapping[str, Tensor]
    scores1: Tensor
    scores2: Tensor
    targets1: Tensor
    targets2: Tensor
    topk1: TopK
    topk2: TopK
    prototypes1: Tensor
    prototypes2: Tensor
    features1: Tensor
    features2: Tensor


class CrossTransformRegularization(nn.Module):
    """Contrast between two views of an image, by prototypes that cross from one to the other.

        s1, s2 = confidence_scores(refined1), confidence_scores(refined2)
        y1, y2 = assign_pseudo_labels(s1), assign_pseudo_labels(s2)
        P1     = prototypes_from_topk(X2, topk_pixels(s1))
        P2     = prototypes_from_topk(X1, topk_pixels(s2))
        losses = cross_transform_contrast(X1, X2, y1, y2, P1, P2)

    on the grid of the smaller view. There is nothing to learn in it, no memory and no state: the gradient of
    the losses reaches what made the features `X1` and `X2`. Every pixel takes part, whatever its score. The
    prototypes are those of the batch at hand, of one process.

    Args:
        temperature: Divisor of the cosines, > 0.
        weights: Weights of the three terms, >= 0.
        topk_ratio: See `topk_pixels`.
        background: Score of the background, in [0, 1].
        background_ranking: See `topk_pixels`: `official` takes arbitrary pixels for the background.
        clamp_negative: See `prototypes_from_topk`.
        absent_negatives: Let prototypes of classes that no image of the batch shows be negatives (official).
            They are made of whatever a map of nothing is highest at.

    Raises:
        ValueError: If a setting is out of range.

    Examples:
        >>> import torch
        >>> ctr = CrossTransformRegularization()
        >>> refined1, refined2 = torch.rand(2, 4, 12, 18), torch.rand(2, 4, 6, 9)
        >>> features1, features2 = torch.rand(2, 8, 12, 18), torch.rand(2, 8, 6, 9)
        >>> out = ctr(refined1, refined2, features1, features2, torch.eye(3)[:2])
        >>> loss = sum(out.losses.values())
        >>> loss.shape, out.targets1.shape, out.prototypes1.shape
        (torch.Size([]), torch.Size([2, 6, 9]), torch.Size([4, 8]))

    Source:
        Wang, Zhang and Yan, "Boosting Weakly-Supervised Image Segmentation via Representation, Transform, and
        Compensator" (RTC), 2023 (IEEE TCSVT 2024), its CTR. Formulas and defaults are read off the training
        loop of the official implementation at 9c777e0, which this matches, values and gradients; of the paper
        the abstract and the overview figure were at hand. The options whose default is called official here
        have alternatives of ours.
    """

    def __init__(
        self,
        *,
        temperature: float = 0.1,
        weights: tuple[float, float, float] = (0.1, 0.1, 0.1),
        topk_ratio: float = 1 / 8,
        background: float = 0.2,
        background_ranking: BackgroundRanking = "official",
        clamp_negative: bool = False,
        absent_negatives: bool = True,
    ) -> None:
        super().__init__()
        _check_contrast(temperature, weights)
        check_number("topk_ratio", topk_ratio, above=0, at_most=1)
        check_probability("background", background)
        check_choice("background_ranking", background_ranking, BackgroundRanking)
        self.temperature = temperature
        self.weights = weights
        self.topk_ratio = topk_ratio
        self.background = background
        self.background_ranking: BackgroundRanking = background_ranking
        self.clamp_negative = clamp_negative
        self.absent_negatives = absent_negatives

    def forward(
        self,
        refined1: Tensor,
        refined2: Tensor,
        features1: Tensor,
        features2: Tensor,
        labels: Tensor,
        *,
        topk: tuple[TopK, TopK] | None = None,
    ) -> CTROutput:
        """Contrast two views; maps and features of each may have grids of their own.

        Args:
            refined1: Refined scores (B,1+C,h1,w1) of view 1, background first; no gradient flows to them.
            refined2: Refined scores (B,1+C,h2,w2) of view 2.
            features1: Features (B,D,h1,w1) of view 1.
            features2: Features (B,D,h2,w2) of view 2.
            labels: Image-level labels (B,C).
            topk: Pixels of both views on the common grid, instead of those of `topk_pixels`.
        """
        check_shapes(
            refined1=(refined1, "B 1+C h1 w1"),
            refined2=(refined2, "B 1+C h2 w2"),
            features1=(features1, "B D h3 w3"),
            features2=(features2, "B D h4 w4"),
        )
        check_float(features1=features1, features2=features2)
        size = _smallest_grid(refined1, refined2, features1, features2)
        x1, x2 = stretch(features1, size), stretch(features2, size)
        scores1, scores2 = (
            confidence_scores(stretch(refined.detach(), size), background=self.background)
            for refined in (refined1, refined2)
        )
        targets1, targets2 = (assign_pseudo_labels(scores, labels) for scores in (scores1, scores2))
        topk1, topk2 = topk or (self._topk(scores1), self._topk(scores2))
        prototypes1 = prototypes_from_topk(x2, topk1, clamp_negative=self.clamp_negative)
        prototypes2 = prototypes_from_topk(x1, topk2, clamp_negative=self.clamp_negative)
        losses = cross_transform_contrast(
            x1,
            x2,
            targets1,
            targets2,
            prototypes1,
            prototypes2,
            temperature=self.temperature,
            weights=self.weights,
            valid=None if self.absent_negatives else F.pad((labels != 0).any(0), (1, 0), value=True),
        )
        return CTROutput(
            losses, scores1, scores2, targets1, targets2, topk1, topk2, prototypes1, prototypes2, x1, x2
        )

    def _topk(self, scores: Tensor) -> TopK:
        return topk_pixels(scores, ratio=self.topk_ratio, background=self.background_ranking)

    def extra_repr(self) -> str:
        """Settings, for `print`."""
        return (
            f"temperature={self.temperature}, weights={self.weights}, topk_ratio={self.topk_ratio}, "
            f"background={self.background}, background_ranking={self.background_ranking!r}, "
            f"clamp_negative={self.clamp_negative}, absent_negatives={self.absent_negatives}"
        )


# ------------------------------------------------------------------------------------------------- helpers


def _check_scores(name: str, scores: Tensor) -> None:
    check_shapes(**{name: (scores, "B 1+C h w")})
    check_float(**{name: scores})
    if scores.shape[1] == 0:
        raise ValueError(f"{name}: expected a background channel in front, got {tuple(scores.shape)}")


def _with_background(name: str, scores: Tensor, labels: Tensor) -> Tensor:
    """Which channels (B,1+C) of scores (B,1+C,h,w) are background or present."""
    _check_scores(name, scores)
    check_shapes(**{name: (scores[:, 1:], "B C h w"), "labels": (labels, "B C")})
    if labels.device.type == "cpu":  # accelerators would have to be waited for
        check_labels(labels)
    return F.pad(labels != 0, (1, 0), value=True)


def _pixel_rows(features: Tensor, topk: TopK) -> Tensor:
    """Features (B,D,h,w) as rows (B h w,D), which the indices of ``topk`` count."""
    check_shapes(
        features=(features, "B D h w"),
        **{"topk.values": (topk.values, "K k"), "topk.indices": (topk.indices, "K k")},
    )
    check_float(features=features, **{"topk.values": topk.values})
    check_integer(**{"topk.indices": topk.indices})
    if topk.indices.device.type == "cpu" and not values_unchecked(topk.indices):
        low, high = (int(bound) for bound in torch.aminmax(topk.indices))
        pixels = features.shape[0] * features.shape[2] * features.shape[3]
        if low < 0 or high >= pixels:
            raise ValueError(f"topk.indices: expected pixels 0..{pixels - 1}, got {low}..{high}")
    dtype = torch.promote_types(working_dtype(features), working_dtype(topk.values))
    return features.detach().to(dtype).movedim(1, -1).flatten(0, 2)


def _smallest_grid(*maps: Tensor) -> tuple[int, int]:
    return min([m.shape[2] for m in maps]), min([m.shape[3] for m in maps])


def _check_contrast(temperature: float, weights: tuple[float, float, float]) -> None:
    check_number("temperature", temperature, above=0)
    check_sequence(weights=weights)
    if len(weights) != 3:
        raise ValueError(f"weights: expected three numbers, got {weights!r}")
    for weight in weights:
        check_number("weights", weight, at_least=0)
