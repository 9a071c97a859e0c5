"""Regions vote: superpixels, or overlapping proposals such as SAM's, give their pixels one label."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pseudolabel._checks import (
    check_channels,
    check_choice,
    check_classes,
    check_count,
    check_finite,
    check_float,
    check_ignore_index,
    check_integer,
    check_labels,
    check_number,
    check_probability,
    check_sequence,
    check_shapes,
    values_unchecked,
)
from pseudolabel._maps import exact_dtype, gather_present, place_labels, present_classes, working_dtype

__all__ = ["VoteRegions", "vote_regions", "vote_superpixels"]

Rest = Literal["keep", "background", "ignore"]

_MOST_PIXELS = 2**20  # in one sum of float32


def vote_superpixels(
    scores: Tensor,
    superpixels: Tensor,
    labels: Tensor | None = None,
    *,
    min_share: float = 0,
    num_regions: int | None = None,
    num_classes: int | None = None,
    ignore_index: int = 255,
) -> Tensor:
    """Label each superpixel with the label that most of its pixels have, or with the highest mean score.

        v_k(p) = [mask(p) = k]  of a mask,  scores_k(p)  of scores
        label(r) = argmax_k sum of v_k over r,    where that sum > min_share |r|

    Ties go to the lowest label, background first. Ignored pixels do not vote, and are part of the size of
    their region; they too get its label. Regions that agree on nothing keep the pixels' own labels.

    Args:
        scores: Scores (B,1+C,H,W), background first and >= 0; or a mask (B,H,W), integer, 0 background, c+1
            class c, ``ignore_index`` undecided.
        superpixels: Region ids (B,H,W), integer, >= 0. Gaps do no harm.
        labels: Image-level labels (B,C), with scores only: absent classes take no part and cost nothing.
        min_share: Share of a region's pixels, or its mean score, that the label has to exceed, in [0, 1).
        num_regions: All ids are below it: saves a synchronisation, and gives `torch.compile` one graph. None:
            the highest id plus one.
        num_classes: Number of labels of a mask, background included; as ``num_regions``. None: only the
            labels that occur are worked on.
        ignore_index: Label of undecided pixels.

    Returns:
        Mask (B,H,W) int64: 0 background, c+1 class c, ``ignore_index`` where undecided.

    Raises:
        TypeError: If a tensor has the wrong kind of dtype.
        ValueError: If shapes do not fit, ids or labels are out of range, scores are negative or not finite,
            or a setting is out of range.

    Examples:
        >>> import torch
        >>> superpixels = torch.tensor([[[0, 0, 0, 1, 1, 1]]])
        >>> vote_superpixels(torch.tensor([[[2, 2, 0, 0, 0, 255]]]), superpixels)
        tensor([[[2, 2, 2, 0, 0, 0]]])
        >>> vote_superpixels(torch.tensor([[[2, 2, 0, 0, 255, 255]]]), superpixels, min_share=0.5)
        tensor([[[  2,   2,   2,   0, 255, 255]]])

    Source:
        A plain majority of pixels, as in many pipelines; `refine.superpixel_refine` is the vote of ICD
        (Fan et al., CVPR 2020), on signed scores.
    """
    check_number("min_share", min_share, at_least=0)
    if min_share >= 1:
        raise ValueError(f"min_share: expected a number in [0, 1), got {min_share!r}")
    votes = _Votes(scores, labels, num_classes, ignore_index)
    check_shapes(mask=(votes.mask, "B H W"), superpixels=(superpixels, "B H W"))
    check_integer(superpixels=superpixels)
    if num_regions is None:
        num_regions = 1 + max(int(superpixels.max()), 0) if superpixels.numel() else 1
    check_count(num_regions=num_regions)
    if not values_unchecked(superpixels):
        low, high = (int(bound) for bound in torch.aminmax(superpixels))
        if low < 0 or high >= num_regions:
            raise ValueError(f"superpixels: expected ids in 0..{num_regions - 1}, got {low}..{high}")
    ids = superpixels.flatten(1).long()
    most, winner = votes.over_superpixels(ids, num_regions).max(2)
    area = ids.new_zeros(len(ids), num_regions).scatter_add_(1, ids, torch.ones_like(ids))
    # In whole pixels where possible: a share of exactly min_share does not exceed it.
    decided = (most > min_share * area.to(exact_dtype(area.device))) & (most > 0)
    label = votes.label_of_channel.gather(1, winner)
    label, decided = (value.gather(1, ids).view_as(superpixels) for value in (label, decided))
    return label.where(decided, votes.mask)


def vote_regions(
    scores: Tensor,
    regions: Tensor | Sequence[Tensor],
    labels: Tensor | None = None,
    *,
    min_inside: float = 0.5,
    min_cover: float | None = 0.85,
    min_iou: float | None = None,
    region_scores: Tensor | Sequence[Tensor] | None = None,
    undecided: Rest = "background",
    uncovered: Rest = "keep",
    num_classes: int | None = None,
    ignore_index: int = 255,
) -> Tensor:
    """Let region proposals, which may overlap and need not cover the image, take the classes of a seed.

    With the votes `v_k(p) = [mask(p) = k]` of a mask, or `scores_k(p)`, and sums over the pixels of region r:

        overlap = sum over r of v_k
        inside = overlap / |r|                     how much of the region is the class
        cover = overlap / sum over all of v_k      how much of the class is in the region
        iou = overlap / (|r| + sum over all of v_k - overlap)

    A region joins a class where inside > `min_inside`, cover >= `min_cover`, or iou >= `min_iou`; of several
    classes that of the largest overlap, then the first. A pixel of several regions that joined goes to the
    one of the highest `region_scores`; without scores to the smallest, so that a part in front of a whole
    keeps its own class. Ties go to the first. Regions that joined come before those that did not.

    Memory: the regions once more in float32, of at most a million pixels at a time, for the overlaps with all
    classes by products of matrices.

    Args:
        scores: Seed: a mask (B,H,W), integer, 0 background, c+1 class c, ``ignore_index`` undecided; or
            scores (B,1+C,H,W), background first, in [0, 1].
        regions: Proposals (B,R,H,W) bool, or one (R,H,W) an image, of any number each. Empty ones are no
            regions, and serve as padding.
        labels: Image-level labels (B,C), with scores only: absent classes take no part and cost nothing.
        min_inside: How much of a region its class has to exceed, in [0, 1]. All of its pixels count, ignored
            ones too.
        min_cover: How much of a class brings a region to it, in (0, 1]. None: not asked.
        min_iou: Overlap by union that brings a region to a class, in (0, 1]. None: not asked.
        region_scores: Quality (B,R) of the proposals, or one (R) an image, such as SAM's predicted IoU.
        undecided: What becomes of pixels that only regions without a class cover: `"background"`, so that
            seeds which spill into them are cut off; or they `"keep"` the seed's label (of scores: that of
            the highest), or become ``ignore_index`` (`"ignore"`). A region as large as the image covers all.
        uncovered: The same for pixels without any region.
        num_classes: Number of labels of a mask, background included: saves a synchronisation. None: only
            the labels that occur are worked on.
        ignore_index: Label of undecided pixels.

    Returns:
        Mask (B,H,W) int64: 0 background, c+1 class c, ``ignore_index`` where undecided.

    Raises:
        TypeError: If a tensor has the wrong kind of dtype; ids of superpixels belong to `vote_superpixels`.
        ValueError: If shapes do not fit, labels are out of range, scores leave [0, 1], or a setting is out of
            range.

    Examples:
        >>> import torch
        >>> seed = torch.tensor([[[0, 1, 1, 0, 0, 2]]])
        >>> regions = torch.tensor([[[[1, 1, 1, 0, 0, 0]], [[0, 0, 0, 1, 1, 1]]]]) > 0
        >>> vote_regions(seed, regions)  # two thirds of the first; all of class 2 in the second
        tensor([[[1, 1, 1, 2, 2, 2]]])
        >>> vote_regions(seed, regions, min_cover=None)
        tensor([[[1, 1, 1, 0, 0, 0]]])
        >>> vote_regions(seed, regions, min_cover=None, undecided="keep")
        tensor([[[1, 1, 1, 0, 0, 2]]])

    Source:
        Proposals that vote as described in Chen et al., "Segment Anything Model (SAM) Enhanced Pseudo Labels
        for Weakly Supervised Semantic Segmentation" (SEPL, 2023): more than half of a proposal inside, or
        85 % of the class covered, and what becomes of other pixels, read off a public program of it
        (cskyl/SAM_WSSS). There a proposal goes to the first class it fits, and the last class wins an
        overlap; how both are settled here, `min_iou` and soft scores are ours.
    """
    _check_vote_settings(min_inside, min_cover, min_iou, undecided, uncovered)
    votes = _Votes(scores, labels, num_classes, ignore_index, at_most_one=True)
    padded = _padded("regions", regions, votes.mask)
    if padded.dtype != torch.bool:
        hint = "; ids of superpixels are for vote_superpixels" if padded.dim() == 3 else ""
        raise TypeError(f"regions: expected a bool tensor (B, R, H, W), got {padded.dtype}{hint}")
    check_shapes(mask=(votes.mask, "B H W"), regions=(padded, "B R H W"))
    if padded.shape[1] == 0:
        padded = padded.new_zeros(padded.shape[0], 1, *padded.shape[2:])

    flat = padded.flatten(2)
    overlap, total, area = votes.over_proposals(flat)  # (B,R,K), (B,1,K), (B,R)
    tiny = torch.finfo(overlap.dtype).tiny
    size = area[:, :, None].clamp(min=1)
    overlap, total = overlap[:, :, 1:], total[:, :, 1:]  # the background is nobody's class
    joins = overlap > min_inside * size
    if min_cover is not None:
        joins = joins | (overlap >= min_cover * total.clamp(min=tiny))
    if min_iou is not None:
        joins = joins | (overlap >= min_iou * (size + total - overlap).clamp(min=tiny))
    joins = joins & (overlap > 0)
    # The background in front stands for regions without a class.
    best = F.pad(overlap.where(joins, -1), (1, 0), value=0).argmax(2)
    label = votes.label_of_channel.gather(1, best)

    # At each pixel the highest standing: 0 no region, 1 one without a class, from 2 on those with a class,
    # the one that goes first highest. Bytes where they do.
    count = flat.shape[1]
    order = _priority(area, region_scores, votes.mask)
    standing = torch.where(best > 0, count + 1 - order.argsort(1), 1)[:, :, None]
    if count < 2**8 - 1:
        highest = (flat.view(torch.uint8) * standing.to(torch.uint8)).amax(1)
    else:
        highest = (flat * standing.to(torch.int32)).amax(1)
    first = highest.long().view_as(votes.mask)
    label_by_standing = F.pad(label.gather(1, order).flip(1), (2, 0))
    voted = label_by_standing.gather(1, first.flatten(1)).view_as(first)
    rest = {
        "keep": votes.mask,
        "background": torch.zeros_like(votes.mask),
        "ignore": torch.full_like(votes.mask, ignore_index),
    }
    return voted.where(first > 1, rest[undecided].where(first > 0, rest[uncovered]))


class VoteRegions(nn.Module):
    """Module twin of `vote_regions`: `vote(scores, regions)`."""

    def __init__(
        self,
        *,
        min_inside: float = 0.5,
        min_cover: float | None = 0.85,
        min_iou: float | None = None,
        undecided: Rest = "background",
        uncovered: Rest = "keep",
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        _check_vote_settings(min_inside, min_cover, min_iou, undecided, uncovered)
        self.min_inside = min_inside
        self.min_cover = min_cover
        self.min_iou = min_iou
        self.undecided: Rest = undecided
        self.uncovered: Rest = uncovered
        self.ignore_index = ignore_index

    def forward(
        self,
        scores: Tensor,
        regions: Tensor | Sequence[Tensor],
        labels: Tensor | None = None,
        region_scores: Tensor | Sequence[Tensor] | None = None,
    ) -> Tensor:
        """See `vote_regions`."""
        return vote_regions(
            scores,
            regions,
            labels,
            min_inside=self.min_inside,
            min_cover=self.min_cover,
            min_iou=self.min_iou,
            region_scores=region_scores,
            undecided=self.undecided,
            uncovered=self.uncovered,
            ignore_index=self.ignore_index,
        )

    def extra_repr(self) -> str:
        """Settings, for `print`."""
        return (
            f"min_inside={self.min_inside}, min_cover={self.min_cover}, min_iou={self.min_iou}, "
            f"undecided={self.undecided!r}, uncovered={self.uncovered!r}"
        )


class _Votes:
    """The votes of all pixels, of a mask or of scores; checked, and in K channels of present labels.

    `mask` (B,H,W) is each pixel's own label, `label_of_channel` (B,K) what a channel stands for. Of scores
    `soft` (B,K,N) are the votes; of a mask they are 1 in `channel` (B,N), where not `ignored` (B,N).
    """

    def __init__(
        self,
        scores: Tensor,
        labels: Tensor | None,
        num_classes: int | None,
        ignore_index: int,
        at_most_one: bool = False,
    ) -> None:
        self.soft: Tensor | None = None
        check_ignore_index(ignore_index)
        if isinstance(scores, Tensor) and not scores.is_floating_point():
            check_shapes(scores=(scores, "B H W"))
            check_integer(scores=scores)
            if labels is not None:
                raise ValueError("labels: expected none beside a mask, which says what is present, got some")
            self.mask = scores.long()
            self._init_mask(num_classes, ignore_index)
        else:
            check_shapes(scores=(scores, "B 1+C H W"))
            check_float(scores=scores)
            self._init_scores(scores.detach(), labels, num_classes, ignore_index, at_most_one)

    def _init_mask(self, num_classes: int | None, ignore_index: int) -> None:
        self.ignored = (self.mask == ignore_index).flatten(1)
        self.channel = self.mask.flatten(1).masked_fill(self.ignored, 0)
        if num_classes is None:
            highest = max(int(self.channel.max()), 0) if self.channel.numel() else 0
            check_classes(1 + highest, ignore_index, scores=self.mask)
            present = torch.bincount(self.channel.flatten(), minlength=1) > 0
            present[0] = True  # the background has a channel in any case
            channels = present.nonzero()[:, 0]
            self.channel = (present.cumsum(0) - 1)[self.channel]
        else:
            check_classes(num_classes, ignore_index, scores=self.mask)
            channels = torch.arange(num_classes, device=self.mask.device)
        self.num_channels = len(channels)
        self.label_of_channel = channels.expand(len(self.mask), -1)

    def _init_scores(
        self,
        scores: Tensor,
        labels: Tensor | None,
        num_classes: int | None,
        ignore_index: int,
        at_most_one: bool,
    ) -> None:
        if num_classes is not None:
            raise ValueError("num_classes: expected None beside scores, whose channels tell it, got a number")
        if scores.shape[1] == 0:
            raise ValueError(f"scores: expected a background channel in front, got {tuple(scores.shape)}")
        if 0 <= ignore_index < scores.shape[1]:
            raise ValueError(
                f"ignore_index: expected a label outside of the {scores.shape[1]} channels, got "
                f"{ignore_index}"
            )
        check_finite(scores=scores)
        channels = torch.arange(scores.shape[1], device=scores.device).expand(len(scores), -1)
        unused = None
        if labels is not None:
            check_shapes(scores=(scores, "B 1+C H W"), labels=(labels, "B C"))
            check_labels(labels)
            check_channels(labels.shape[1], "labels", scores=scores)
            index, valid = present_classes(labels)
            channels = place_labels(index)
            unused = ~F.pad(valid, (1, 0), value=True)[:, :, None, None]
            scores = gather_present(scores, channels).masked_fill(unused, 0)
        if not values_unchecked(scores):
            low, high = (float(bound) for bound in torch.aminmax(scores))
            if low < 0 or (at_most_one and high > 1 + 1e-3):
                wanted = "in [0, 1]" if at_most_one else ">= 0"
                raise ValueError(f"scores: expected values {wanted}, got values from {low:g} to {high:g}")
        # The first of equal channels: unused ones, which are 0, come after the background.
        self.mask = channels.gather(1, scores.argmax(1).flatten(1)).view(len(scores), *scores.shape[2:])
        self.label_of_channel = channels
        self.num_channels = channels.shape[1]
        self.soft = scores.to(working_dtype(scores)).flatten(2)

    def over_superpixels(self, ids: Tensor, num_regions: int) -> Tensor:
        """Sums (B,R,K) of the votes of each superpixel: int64 of a mask, float64 of scores."""
        batch, channels = len(ids), self.num_channels
        if self.soft is not None:
            soft = self.soft.to(exact_dtype(ids.device))  # one pixel after the other is added
            sums = soft.new_zeros(batch, channels, num_regions)
            return sums.scatter_add_(2, ids[:, None].expand_as(soft), soft).transpose(1, 2)
        counts = ids.new_zeros(batch, num_regions * channels)
        counts.scatter_add_(1, ids * channels + self.channel, (~self.ignored).long())
        return counts.view(batch, num_regions, channels)

    def over_proposals(self, regions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sums of the votes in each proposal (B,R,K) of (B,R,N), and of all (B,1,K); areas (B,R); float64.

        Ignored pixels count with the background, which is nobody's class.
        """
        if self.soft is not None:
            votes = self.soft.transpose(1, 2)
        else:
            channels = torch.arange(self.num_channels, device=regions.device)
            votes = (self.channel[:, :, None] == channels).float()
        # Whole numbers have to stay whole: float32 holds them up to 2^24, so no sum has more pixels.
        exact = exact_dtype(regions.device)
        overlaps, totals = [], []
        with torch.autocast(regions.device.type, enabled=False):
            for some, theirs in zip(
                torch.split(regions, _MOST_PIXELS, 2), torch.split(votes, _MOST_PIXELS, 1), strict=True
            ):
                overlaps.append((some.to(votes.dtype) @ F.pad(theirs, (0, 1), value=1)).to(exact))
                totals.append(theirs.sum(1, keepdim=True).to(exact))
        sums, total = torch.stack(overlaps).sum(0), torch.stack(totals).sum(0)
        return sums[:, :, :-1], total, sums[:, :, -1]


def _padded(name: str, values: Tensor | Sequence[Tensor], mask: Tensor) -> Tensor:
    """One tensor of what may be a list of one an image, filled up with zeros."""
    if isinstance(values, Tensor):
        return values
    check_sequence(**{name: values})
    if len(values) != len(mask):
        raise ValueError(f"{name}: expected one tensor for each of the {len(mask)} images, got {len(values)}")
    if len(values) == 0:
        return mask.new_zeros(0, 0, *mask.shape[1:], dtype=torch.bool)
    for value in values:
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected tensors, got {type(value).__name__}")
        if value.shape[1:] != values[0].shape[1:]:
            raise ValueError(
                f"{name}: expected images of one size, got {tuple(values[0].shape)} and {tuple(value.shape)}"
            )
    return nn.utils.rnn.pad_sequence(list(values), batch_first=True)


def _priority(area: Tensor, region_scores: Tensor | Sequence[Tensor] | None, mask: Tensor) -> Tensor:
    """The regions (B,R) of each image, those that come first where they overlap in front."""
    if region_scores is None:
        return area.argsort(dim=1, stable=True)
    given = _padded("region_scores", region_scores, mask)
    if given.shape[1:] == (0,) and area.shape[1] == 1:  # no proposals at all
        return area.argsort(1)
    check_shapes(regions=(area, "B R"), region_scores=(given, "B R"))
    check_float(region_scores=given)
    check_finite(region_scores=given)
    return given.argsort(dim=1, descending=True, stable=True)


def _check_vote_settings(
    min_inside: float, min_cover: float | None, min_iou: float | None, undecided: str, uncovered: str
) -> None:
    check_probability("min_inside", min_inside)
    for name, value in (("min_cover", min_cover), ("min_iou", min_iou)):
        if value is not None:
            check_number(name, value, above=0, at_most=1)
    check_choice("undecided", undecided, Rest)
    check_choice("uncovered", uncovered, Rest)
