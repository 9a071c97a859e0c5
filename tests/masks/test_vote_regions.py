"""Votes of superpixels and of overlapping proposals."""

import importlib
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from pseudolabel.masks import VoteRegions, vote_regions, vote_superpixels
from pseudolabel.masks.vote_regions import _Votes

# The package holds the function of this name.
vote_regions_module = importlib.import_module("pseudolabel.masks.vote_regions")

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
seeds = st.integers(0, 1000)


def random_case(seed: int, classes: int = 3, count: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mask, scores, superpixels and proposals, some of them empty, of two images of 5 x 6."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.randint(0, classes + 2, (2, 5, 6), generator=generator)
    mask[mask == classes + 1] = 255
    scores = torch.rand(2, 1 + classes, 5, 6, generator=generator, dtype=torch.float64)
    superpixels = torch.randint(0, 9, (2, 5, 6), generator=generator)
    corners = torch.randint(0, 7, (2, count, 4, 1, 1), generator=generator)
    y, x = torch.arange(5)[:, None], torch.arange(6)
    top, left, bottom, right = corners.unbind(2)
    return mask, scores, superpixels, (y >= top) & (y < bottom) & (x >= left) & (x < right)


def row(text: str) -> Tensor:
    """A mask (1,1,W) of digits, `x` for ignored pixels."""
    return torch.tensor([[[255 if letter == "x" else int(letter) for letter in text]]])


def proposals(*texts: str) -> Tensor:
    return torch.tensor([[[[letter == "#" for letter in text]] for text in texts]])


def written(mask: Tensor) -> str:
    return "".join("x" if label == 255 else str(label) for label in mask[0, 0].tolist())


# ------------------------------------------------------------------------------------------ superpixels


@pytest.mark.parametrize(
    ("seed", "settings", "expected"),
    [
        ("1120", {}, "1110"),
        ("112", {}, "111"),
        ("0012", {}, "0000"),
        ("1122", {}, "1111"),  # a tie: the lowest label
        ("0011", {}, "0000"),
        ("1xxx", {}, "1111"),
        ("xxxx", {}, "xxxx"),
        ("11x2", {"min_share": 0.5}, "11x2"),  # exactly a half
        ("1112", {"min_share": 0.5}, "1111"),
        ("1xxx", {"min_share": 0.3}, "1xxx"),
    ],
)
def test_hand_computed_superpixels(seed: str, settings: dict, expected: str) -> None:
    ids = torch.tensor([[[0, 0, 0, 2 if seed == "1120" else 0]]])[:, :, : len(seed)]
    assert written(vote_superpixels(row(seed), ids, **settings)) == expected


def test_hand_computed_means() -> None:
    scores = torch.tensor([[[[0.5, 0.4, 0.1]], [[0.4, 0.5, 0.0]], [[0.1, 0.1, 0.9]]]])
    ids = torch.tensor([[[0, 0, 1]]])
    assert vote_superpixels(scores, ids).tolist() == [[[0, 0, 2]]]  # a tie of sums, and of pixels
    scores[0, 1, 0, 1] = 0.6
    assert vote_superpixels(scores, ids).tolist() == [[[1, 1, 2]]]
    assert vote_superpixels(scores, ids, min_share=0.55).tolist() == [[[0, 1, 2]]]
    assert vote_superpixels(scores, ids, torch.tensor([[0, 1]])).tolist() == [[[0, 0, 2]]]


def superpixels_one_by_one(mask: Tensor, ids: Tensor, min_share: float) -> Tensor:
    out = mask.clone()
    for b in range(len(mask)):
        for region in ids[b].unique():
            inside = ids[b] == region
            labels = mask[b][inside]
            counts = [(int((labels == k).sum()), -k) for k in labels[labels != 255].unique().tolist()]
            if counts and max(counts)[0] > min_share * len(labels):
                out[b][inside] = -max(counts)[1]
    return out


@given(seed=seeds, min_share=st.sampled_from([0, 0.25, 0.5, 0.7]))
def test_superpixels_against_a_loop(seed: int, min_share: float) -> None:
    mask, _, ids, _ = random_case(seed)
    found = vote_superpixels(mask, ids, min_share=min_share)
    assert torch.equal(found, superpixels_one_by_one(mask, ids, min_share))
    assert torch.equal(found, vote_superpixels(mask.byte(), 1000 * ids.int(), min_share=min_share)), "gaps"
    one_hot = F.one_hot(mask.where(mask != 255, 0), 4).permute(0, 3, 1, 2) * (mask != 255)[:, None]
    soft = vote_superpixels(one_hot.float(), ids, min_share=min_share)
    assert torch.equal(soft[found != 255], found[found != 255]), "scores of 0 and 1 vote as a mask"


@given(seed=seeds)
def test_superpixels_vote_once(seed: int) -> None:
    mask, scores, ids, _ = random_case(seed)
    for votes in (mask, scores):
        once = vote_superpixels(votes, ids)
        assert torch.equal(vote_superpixels(once, ids), once)
        singles = [vote_superpixels(votes[b : b + 1], ids[b : b + 1]) for b in range(2)]
        assert torch.equal(torch.cat(singles), once)


@given(seed=seeds)
def test_superpixel_means_against_a_loop(seed: int) -> None:
    _, scores, ids, _ = random_case(seed)
    found = vote_superpixels(scores, ids)
    for b in range(2):
        for region in ids[b].unique():
            inside = ids[b] == region
            assert found[b][inside].unique().tolist() == [int(scores[b][:, inside].mean(1).argmax())]


# ------------------------------------------------------------------------------------------ proposals


@pytest.mark.parametrize(
    ("seed", "regions", "settings", "expected"),
    [
        ("0110", ["###."], {}, "1110"),  # 2/3 of it inside
        ("0110", ["####"], {"min_cover": None}, "0000"),  # exactly a half is not more
        ("0110", ["####"], {}, "1111"),  # all of the class
        ("0110", ["####"], {"min_cover": None, "min_iou": 0.5}, "1111"),  # exactly that iou
        ("0110", ["####"], {"min_cover": None, "min_iou": 0.51}, "0000"),
        ("0111", ["###."], {"min_inside": 0.7, "min_cover": 0.66}, "1111"),
        ("0111", ["###."], {"min_inside": 0.7, "min_cover": 0.67}, "0001"),
        ("0111", ["###."], {"min_inside": 0.7, "min_cover": 0.67, "undecided": "keep"}, "0111"),
        ("0111", ["###."], {"min_inside": 0.7, "min_cover": 0.67, "undecided": "ignore"}, "xxx1"),
        ("0110", ["##.."], {"min_cover": None, "undecided": "keep"}, "0110"),
        ("0110", [".##."], {"uncovered": "ignore"}, "x11x"),
        ("2112", [".##."], {"uncovered": "background"}, "0110"),
        ("2112", [".##."], {}, "2112"),
        ("1122", ["####"], {}, "1111"),  # both are covered, none is larger: the first
        ("1222", ["####"], {}, "2222"),  # the largest overlap
        ("11xx", ["####"], {"min_cover": None}, "0000"),  # ignored pixels count as part of the region
        ("11xx", ["####"], {}, "1111"),
        ("0000", ["####"], {"undecided": "keep"}, "0000"),  # the background is nobody's class
        ("xxxx", ["####"], {"undecided": "keep"}, "xxxx"),
        ("1122", ["####", "..##"], {}, "1122"),  # the smaller one first
        ("1122", ["..##", "####"], {}, "1122"),
        ("1122", ["###.", ".###"], {}, "1112"),  # of one size: the first one
        ("1122", [".###", "###."], {}, "1222"),
        ("1120", ["####", "..##", "...#"], {"min_cover": None, "min_inside": 0.4}, "1122"),
        ("1100", ["....", "###.", "...."], {}, "1110"),  # empty ones are none
        ("1100", ["...."], {}, "1100"),
    ],
)
def test_hand_computed(seed: str, regions: list[str], settings: dict, expected: str) -> None:
    assert written(vote_regions(row(seed), proposals(*regions), **settings)) == expected
    module = VoteRegions(**settings)
    assert written(module(row(seed), proposals(*regions))) == expected


def test_scores_of_regions_settle_overlaps() -> None:
    seed, regions = row("1122"), proposals("####", "..##")
    assert written(vote_regions(seed, regions, region_scores=torch.tensor([[0.9, 0.8]]))) == "1111"
    assert written(vote_regions(seed, regions, region_scores=torch.tensor([[0.8, 0.9]]))) == "1122"
    assert written(vote_regions(seed, regions, region_scores=[torch.tensor([0.5, 0.5])])) == "1111"
    assert written(VoteRegions()(seed, regions, None, torch.tensor([[0.9, 0.8]]))) == "1111"


def test_hand_computed_soft_votes() -> None:
    scores = torch.tensor([[[[0.1, 0.2, 0.9]], [[0.9, 0.3, 0.0]], [[0.0, 0.5, 0.1]]]])
    regions = proposals("##.")
    # Class 1 has 1.2 of 2 pixels inside, class 2 0.5.
    assert vote_regions(scores, regions).tolist() == [[[1, 1, 0]]]
    assert vote_regions(scores, regions, min_inside=0.7, min_cover=None).tolist() == [[[0, 0, 0]]]
    keep = {"undecided": "keep", "min_inside": 0.7, "min_cover": None}
    assert vote_regions(scores, regions, **keep).tolist() == [[[1, 2, 0]]]
    # Without class 1, class 2 is covered to 5/6.
    assert vote_regions(scores, regions, torch.tensor([[0, 1]]), min_cover=0.8).tolist() == [[[2, 2, 0]]]
    assert vote_regions(scores, regions, torch.tensor([[0, 0]])).eq(0).all()


def proposals_one_by_one(
    mask: Tensor, regions: Tensor, settings: dict, quality: Tensor | None = None
) -> Tensor:
    """Pixels and regions one after the other."""
    out = mask.clone()
    for b in range(len(mask)):
        labels = []
        for region in regions[b]:
            best = (0, 0)
            for k in mask[b][mask[b] != 255].unique().tolist():
                overlap, size, total = (int(m.sum()) for m in (region & (mask[b] == k), region, mask[b] == k))
                if k and overlap:
                    union = size + total - overlap
                    joins = overlap / size > settings["min_inside"]
                    joins |= settings["min_cover"] is not None and overlap / total >= settings["min_cover"]
                    joins |= settings["min_iou"] is not None and overlap / union >= settings["min_iou"]
                    best = max(best, (overlap, -k)) if joins else best
            labels.append(-best[1])
        for y in range(mask.shape[1]):
            for x in range(mask.shape[2]):
                here = [r for r in range(len(regions[b])) if regions[b, r, y, x]]
                order = {r: int(regions[b, r].sum()) if quality is None else -quality[b, r] for r in here}
                speaking = [r for r in here if labels[r]]
                if speaking:
                    out[b, y, x] = labels[min(speaking, key=lambda r: (order[r], r))]
                else:
                    rule = settings["undecided"] if here else settings["uncovered"]
                    out[b, y, x] = {"keep": mask[b, y, x], "background": 0, "ignore": 255}[rule]
    return out


rules = st.sampled_from(["keep", "background", "ignore"])


@given(
    seed=seeds,
    settings=st.fixed_dictionaries(
        {
            "min_inside": st.sampled_from([0.0, 0.3, 0.5]),
            "min_cover": st.sampled_from([None, 0.55, 0.85]),
            "min_iou": st.sampled_from([None, 0.45]),
            "undecided": rules,
            "uncovered": rules,
        }
    ),
    with_quality=st.booleans(),
)
def test_proposals_against_a_loop(seed: int, settings: dict, with_quality: bool) -> None:
    mask, _, _, regions = random_case(seed)
    quality = torch.rand(2, 6, generator=torch.Generator().manual_seed(seed)) if with_quality else None
    found = vote_regions(mask, regions, region_scores=quality, **settings)
    assert torch.equal(found, proposals_one_by_one(mask, regions, settings, quality))


def test_many_regions() -> None:
    """More than a byte can count; the last of them are the smallest."""
    mask, _, _, regions = random_case(1, count=3000)
    regions = torch.stack([some[some.flatten(1).any(1)][:300] for some in regions])
    settings = {"min_inside": 0.3, "min_cover": None, "min_iou": None}
    rest = {"undecided": "keep", "uncovered": "ignore"}
    expected = proposals_one_by_one(mask, regions, settings | rest)
    assert torch.equal(vote_regions(mask, regions, **settings, **rest), expected)
    for count in (253, 254, 255, 256):
        some = regions[:, :count].clone()
        some[:, :, 1, 2], some[:, :, 0, 0] = False, True
        some[:, 0], some[:, 0, 1, 2] = False, True  # the first of all, and alone at its place
        mask[:, 1, 2] = 3
        expected = proposals_one_by_one(mask, some, settings | rest)
        assert torch.equal(vote_regions(mask, some, **settings, **rest), expected)


def test_labels_with_gaps() -> None:
    """Only labels that occur have a channel, which nobody sees."""
    mask, _, ids, regions = random_case(2)
    far = torch.tensor([0, 7, 90, 200])
    moved = torch.where(mask == 255, 255, far[mask.where(mask != 255, 0)])
    for vote, other in ((vote_regions, regions), (vote_superpixels, ids)):
        found = vote(mask, other)
        expected = torch.where(found == 255, 255, far[found.where(found != 255, 0)])
        assert torch.equal(vote(moved, other), expected)
        assert torch.equal(vote(moved, other, num_classes=201), expected)


@given(seed=seeds)
def test_lists_of_any_length(seed: int) -> None:
    """As many regions as each image has, in any order where none overlap in size."""
    mask, scores, _, regions = random_case(seed)
    used = [r[r.flatten(1).any(1)] for r in regions]
    for votes in (mask, scores):
        found = vote_regions(votes, regions)
        assert torch.equal(vote_regions(votes, used), found)
        singles = [vote_regions(votes[b : b + 1], [used[b]]) for b in range(2)]
        assert torch.equal(torch.cat(singles), found)
        quality = [torch.rand(len(r)) for r in used]
        order = [torch.randperm(len(r)) for r in used]
        moved = [r[o] for r, o in zip(used, order, strict=True)]
        moved_quality = [q[o] for q, o in zip(quality, order, strict=True)]
        assert torch.equal(
            vote_regions(votes, used, region_scores=quality),
            vote_regions(votes, moved, region_scores=moved_quality),
        )


@given(seed=seeds)
def test_one_hot_scores_vote_as_a_mask(seed: int) -> None:
    mask, _, _, regions = random_case(seed)
    mask = mask.where(mask != 255, 0)
    scores = F.one_hot(mask, 4).permute(0, 3, 1, 2).double()
    assert torch.equal(vote_regions(scores, regions), vote_regions(mask, regions))
    present = torch.stack([(mask == k).flatten(1).any(1) for k in (1, 2, 3)], 1)
    assert torch.equal(vote_regions(scores, regions, present), vote_regions(mask, regions))


def test_absent_classes_win_nothing() -> None:
    _, scores, ids, regions = random_case(0)
    labels = torch.tensor([[0, 1, 0], [1, 0, 1]])
    allowed = [{0, 2}, {0, 1, 3}]
    for found in (vote_regions(scores, regions, labels), vote_superpixels(scores, ids, labels)):
        assert all(set(found[b].unique().tolist()) <= allowed[b] for b in range(2))
    zeroed = scores * torch.tensor([[1, 0, 1, 0], [1, 1, 0, 1]])[:, :, None, None]
    assert torch.equal(vote_regions(scores, regions, labels), vote_regions(zeroed, regions))
    assert torch.equal(vote_superpixels(scores, ids, labels), vote_superpixels(zeroed, ids))


def test_no_regions_at_all() -> None:
    mask, scores, _, _ = random_case(0)
    nothing = torch.zeros(2, 0, 5, 6, dtype=torch.bool)
    for regions in (nothing, [nothing[0], nothing[1]]):
        assert torch.equal(vote_regions(mask, regions), mask)
        assert torch.equal(vote_regions(mask, regions, region_scores=torch.zeros(2, 0)), mask)
        assert torch.equal(vote_regions(scores, regions), scores.argmax(1))
    assert vote_regions(mask[:0], []).shape == (0, 5, 6)
    assert vote_regions(mask[:0], nothing[:0]).shape == (0, 5, 6)


def test_large_counts_are_exact() -> None:
    """Half of a region and one pixel: sums of a million ones are whole numbers."""
    mask = torch.zeros(1, 1000, 1001, dtype=torch.int64)
    mask.view(-1)[: 1001 * 500] = 1
    region = torch.ones(1, 1, 1000, 1001, dtype=torch.bool)
    assert vote_regions(mask, region, min_cover=None).eq(0).all()
    mask.view(-1)[1001 * 500] = 1
    assert vote_regions(mask, region, min_cover=None).eq(1).all()
    ids = torch.zeros_like(mask)
    assert vote_superpixels(mask, ids, min_share=0.5).eq(1).all()


MANY = 2**24 + 1  # one pixel more than float32 can count


def one_channel() -> _Votes:
    """Many pixels of one label, that take little memory."""
    votes = object.__new__(_Votes)
    votes.soft, votes.num_channels = None, 1
    votes.channel = torch.zeros(1, 1, dtype=torch.int64).expand(1, MANY)
    votes.ignored = torch.zeros(1, 1, dtype=torch.bool).expand(1, MANY)
    return votes


def test_counts_beyond_float32() -> None:
    assert one_channel().over_superpixels(torch.zeros(1, MANY, dtype=torch.int64), 1).item() == MANY
    overlap, total, area = one_channel().over_proposals(
        torch.ones(1, 1, 1, dtype=torch.bool).expand(1, 1, MANY)
    )
    assert overlap.item() == total.item() == area.item() == MANY


def test_sums_of_scores_beyond_float32() -> None:
    """Three pixels of 1 are lost beside one of 2^24 where sums are float32."""
    scores = torch.tensor([[2.0**24 + 2, 0, 0, 0], [2.0**24, 1, 1, 1]]).view(1, 2, 1, 4)
    assert vote_superpixels(scores, torch.zeros(1, 1, 4, dtype=torch.int64)).eq(1).all()


@given(seed=seeds)
def test_proposals_in_parts(seed: int) -> None:
    """Large images are summed a part after the other."""
    mask, scores, _, regions = random_case(seed)
    whole = [vote_regions(votes, regions) for votes in (mask, scores)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vote_regions_module, "_MOST_PIXELS", 7)
        parts = [vote_regions(votes, regions) for votes in (mask, scores)]
    assert all(map(torch.equal, parts, whole))


def test_empty_batch() -> None:
    """With labels, of which no image has any; the background is a channel all the same."""
    _, scores, ids, regions = random_case(0)
    for labels in (None, torch.ones(0, 3)):
        assert vote_superpixels(scores[:0], ids[:0], labels).shape == (0, 5, 6)
        assert vote_regions(scores[:0], regions[:0], labels).shape == (0, 5, 6)


# ------------------------------------------------------------------------------------------ errors


MASK, REGIONS = torch.zeros(1, 2, 3, dtype=torch.int64), torch.ones(1, 2, 2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (TypeError, {"regions": MASK}, "regions: expected a bool tensor (B, R, H, W), got torch.int64; ids"),
        (TypeError, {"regions": REGIONS.float()}, "regions: expected a bool tensor (B, R, H, W), got torch."),
        (ValueError, {"regions": REGIONS[:, :, 1:]}, "regions: expected shape (B, R, H, W) with H=2 from ma"),
        (ValueError, {"regions": [REGIONS[0]] * 2}, "regions: expected one tensor for each of the 1 images,"),
        (ValueError, {"scores": MASK - 1}, "scores: expected classes 0..0 or ignore_index 255, got [-1]"),
        (ValueError, {"scores": MASK + 3, "num_classes": 3}, "scores: expected classes 0..2 or ignore_index"),
        (ValueError, {"labels": torch.ones(1, 2)}, "labels: expected none beside a mask"),
        (ValueError, {"scores": MASK[None] * -1.0 - 1}, "scores: expected values in [0, 1], got values from"),
        (ValueError, {"scores": MASK[None] + 2.0}, "scores: expected values in [0, 1], got values from 2 to"),
        (ValueError, {"scores": MASK[None] * torch.nan}, "scores: expected finite values"),
        (ValueError, {"scores": MASK[None] + 0.5, "num_classes": 3}, "num_classes: expected None beside sco"),
        (ValueError, {"scores": MASK[None] + 0.5, "labels": torch.ones(1, 2)}, "scores: expected 3 channels"),
        (ValueError, {"ignore_index": 0}, "ignore_index: expected an integer outside of 0..0, got 0"),
        (ValueError, {"min_inside": 1.5}, "min_inside: expected a finite number >= 0 and <= 1, got 1.5"),
        (ValueError, {"min_cover": 0}, "min_cover: expected a finite number > 0 and <= 1, got 0"),
        (ValueError, {"min_iou": 2}, "min_iou: expected a finite number > 0 and <= 1, got 2"),
        (ValueError, {"undecided": "drop"}, "undecided: expected one of ['keep', 'background', 'ignore'], g"),
        (ValueError, {"uncovered": "drop"}, "uncovered: expected one of ['keep', 'background', 'ignore'], g"),
        (ValueError, {"region_scores": torch.ones(1, 3)}, "region_scores: expected shape (B, R) with R=2 fr"),
        (TypeError, {"region_scores": torch.ones(1, 2).int()}, "region_scores: expected a floating-point"),
    ],
)  # fmt: skip
def test_errors(kind: type[Exception], change: dict, message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        vote_regions(**{"scores": MASK, "regions": REGIONS, **change})


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (TypeError, {"superpixels": MASK.float()}, "superpixels: expected an integer tensor"),
        (ValueError, {"superpixels": MASK - 1}, "superpixels: expected ids in"),
        (ValueError, {"superpixels": MASK + 4, "num_regions": 4}, "superpixels: expected ids in 0..3, got 4"),
        (ValueError, {"superpixels": MASK[:, :1]}, "superpixels: expected shape (B, H, W) with H=2 from mas"),
        (ValueError, {"min_share": 1}, "min_share: expected a number in [0, 1), got 1"),
        (ValueError, {"min_share": -1}, "min_share: expected a finite number >= 0, got -1"),
        (ValueError, {"scores": MASK[None] - 1.0}, "scores: expected values >= 0, got values from -1 to -1"),
    ],
)  # fmt: skip
def test_superpixel_errors(kind: type[Exception], change: dict, message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        vote_superpixels(**{"scores": MASK, "superpixels": MASK, **change})


# ------------------------------------------------------------------------------------------ all of them


@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes_and_devices(dtype: torch.dtype, device: torch.device) -> None:
    mask, scores, ids, regions = (value.to(device) for value in random_case(3))
    scores = (scores * 16).round() / 16  # a number of every dtype
    for found, exact in (
        (vote_regions(scores.to(dtype), regions), vote_regions(scores, regions)),
        (vote_superpixels(scores.to(dtype), ids), vote_superpixels(scores, ids)),
        (vote_regions(mask, regions), vote_regions(mask.cpu(), regions.cpu()).to(device)),
    ):
        assert (found.dtype, found.device) == (torch.int64, mask.device)
        assert torch.equal(found, exact)


def test_compiles_to_one_graph() -> None:
    mask, scores, ids, regions = random_case(0)
    quality = torch.rand(2, 6)

    def everything(mask: Tensor, scores: Tensor) -> tuple[Tensor, ...]:
        return (
            vote_regions(mask, regions, num_classes=4, region_scores=quality),
            vote_regions(scores, regions, min_iou=0.4),
            vote_superpixels(mask, ids, num_regions=9, num_classes=4),
            vote_superpixels(scores, ids, num_regions=9),
        )

    compiled = torch.compile(everything, fullgraph=True, backend="eager")
    for found, expected in zip(compiled(mask, scores), everything(mask, scores), strict=True):
        assert torch.equal(found, expected)


def test_module_shows_its_settings() -> None:
    assert repr(VoteRegions(min_iou=0.5)) == (
        "VoteRegions(min_inside=0.5, min_cover=0.85, min_iou=0.5, undecided='background', uncovered='keep')"
    )
    with pytest.raises(ValueError, match="uncovered: expected one of"):
        VoteRegions(uncovered="drop")
