"""Superpixels: sections 4, 4.1, 8 and 9 of the ICD specification."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from pseudolabel.refine import (
    felzenszwalb_superpixels,
    merge_superpixels,
    region_mean,
    slic_superpixels,
    superpixel_refine,
)

seeds = st.integers(0, 10_000)
LABELS = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])


def case(
    seed: int = 0,
    size: tuple[int, int] = (5, 7),
    regions: int = 6,
    dtype: torch.dtype = torch.float64,
    fine: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores away from 0, superpixels, labels."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(4, 4, *size, generator=generator, dtype=torch.float64)
    superpixels = torch.randint(0, regions, (4, *(fine or size)), generator=generator)
    return (scores + 0.1 * scores.sign()).to(dtype), superpixels, LABELS


def membership(superpixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The planes Q (B,R,h,w) that the library does without."""
    planes = F.one_hot(superpixels).movedim(-1, 1).double()
    return F.interpolate(planes, size=size, mode="bilinear", align_corners=True)


def shares_by_planes(scores: torch.Tensor, superpixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """How much of each region (B,C,R) each class has: the largest share wins."""
    q_rp = membership(superpixels, tuple(scores.shape[2:])).flatten(2)
    f = (scores.double() * labels.double()[:, :, None, None]).flatten(2)
    q = f.clamp(min=0) / f.amax(1, keepdim=True).clamp(min=1e-5)
    return torch.einsum("ncp,nrp->ncr", q, q_rp / q_rp.sum(2, keepdim=True).clamp(min=1e-5))


def without_ties(**settings: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The first case from a seed on in which no two classes have the same share of a region.

    Ties are no accident: each class may be the only positive one in one of two cells.
    """
    for seed in itertools.count(settings.pop("seed", 0)):
        found = case(seed, **settings)
        first, second = shares_by_planes(*found).topk(2, dim=1).values.unbind(1)
        if ((first - second > 1e-9) | (first == 0)).all():
            return found
    raise AssertionError


def by_planes(scores: torch.Tensor, superpixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Section 4, line by line."""
    q_rp = membership(superpixels, tuple(scores.shape[2:])).flatten(2)
    y = labels.double()
    f = (scores.double() * y[:, :, None, None]).flatten(2)
    a = q_rp / q_rp.sum(2, keepdim=True).clamp(min=1e-5)
    vote = torch.einsum("ncp,nrp->ncr", f.sign(), q_rp)
    win = shares_by_planes(scores, superpixels, labels).argmax(1)
    foreground = F.one_hot(win, f.shape[1]).movedim(2, 1) * y[:, :, None] * (vote.amax(1, True) > 1e-5)
    positive, negative = (torch.einsum("ncp,nrp->ncr", part, a) for part in (f.clamp(min=0), f.clamp(max=0)))
    value = torch.where(foreground > 0, positive, negative)
    return torch.einsum("ncr,nrp->ncp", value, q_rp).view_as(scores)


def tensors(data: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in data.items() if value.ndim}


# ------------------------------------------------------------------------------------------ golden files


@pytest.mark.parametrize("kind", ["same", "stride", "soft"])
def test_golden_refine(golden: Callable, kind: str) -> None:
    data = tensors(golden("icd/public_sprefine"))
    scores, superpixels, labels, out = (
        data[f"{kind}_{name}"] for name in ("score", "superpixel", "label", "out")
    )
    torch.testing.assert_close(superpixel_refine(scores, superpixels, labels), out, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "kind", ["single", "allneg", "signtie", "classtie", "classtie_absent0", "gaps", "nolabel", "zeros"]
)
def test_golden_edge_cases(golden: Callable, kind: str) -> None:
    data = tensors(golden("icd/public_edge"))
    scores, superpixels, labels, out = (
        data[f"sp_{kind}_{name}"] for name in ("score", "superpixel", "label", "out")
    )
    torch.testing.assert_close(superpixel_refine(scores, superpixels, labels), out, atol=1e-5, rtol=0)


def test_golden_region_mean(golden: Callable) -> None:
    """The official program resizes to a square canvas and cuts off what is not image."""
    file = golden("icd/public_superpixel")
    data, side = tensors(file), int(file["infer_size"])
    superpixels, wanted = data["superpixel"], data["sp_feature"]
    height, width = superpixels.shape
    canvas = F.pad(superpixels, (0, side - width, 0, side - height), value=len(wanted))
    found = region_mean(data["dense_feature"][None], canvas[None])[0, :-1]
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("regions", [31, 12, 5])
def test_golden_merge(golden: Callable, regions: int) -> None:
    data = tensors(golden("icd/public_superpixel"))
    merged = merge_superpixels(data["superpixel"], data["sp_feature"], regions)
    assert torch.equal(merged, data[f"merged_{regions}"].long())


# ------------------------------------------------------------------------------------------ refine


def refine_row(*scores: list[float], ids: list[int], labels: list[int] | None = None) -> list[list[float]]:
    """Refine one row of cells of one image."""
    maps = torch.tensor(scores, dtype=torch.float64)[None, :, None]
    known = torch.tensor([labels or [1] * len(scores)])
    return superpixel_refine(maps, torch.tensor([[ids]]), known)[0, :, 0].tolist()


def test_hand_computed() -> None:
    """Region 0: two votes to one. Region 1: one vote to two. The other sign counts as 0 in the means."""
    assert refine_row([3, 2, -1, -4, 1, -2], ids=[0, 0, 0, 1, 1, 1]) == [
        [5 / 3, 5 / 3, 5 / 3, -2.0, -2.0, -2.0]
    ]


def test_sums_beyond_float32() -> None:
    """Three cells of 1 are lost beside one of 2^24 where sums are float32."""
    scores = torch.tensor([2.0**24, 1, 1, 1]).view(1, 1, 1, 4)
    found = superpixel_refine(scores, torch.zeros(1, 1, 4, dtype=torch.int64), torch.ones(1, 1))
    assert found.flatten().tolist() == [2**22 + 1] * 4, "2^22 + 3/4, rounded"


def test_other_classes_of_a_foreground_region() -> None:
    """The first class is higher in one cell, the second in two: it wins, the first gets its negative mean."""
    assert refine_row([4, 1, -3], [2, 2, 2], ids=[5, 5, 5]) == [[-1.0] * 3, [2.0] * 3]


def test_the_winner_need_not_have_the_vote() -> None:
    """Class 0 has the votes, by ever so little; class 1 stands out in the one cell that it has."""
    assert refine_row([0.1, 0.1, 0.1], [10.0, -1, -1], ids=[0, 0, 0])[0][0] == pytest.approx(0.1)
    low, high = refine_row([0.1, 0.1, -9], [10.0, 10.0, -1], ids=[0, 0, 0])
    assert low == [-3.0] * 3
    assert high == [20 / 3] * 3
    # Votes: class 0 one to none, class 1 one to two; shares: class 0 has 0.5, class 1 has 1.
    quiet, loud = refine_row([1, 0, 0], [2, -1, -1], ids=[0, 0, 0])
    assert loud == [2 / 3] * 3, "the vote of the winner itself is negative"
    assert quiet == [0.0] * 3


def test_share_is_among_classes_not_over_the_map() -> None:
    """A far higher cell elsewhere does not make a class lose a region."""
    first, second = refine_row([2, 2, -1, -1], [1, 1, 100, 100], ids=[0, 0, 1, 1])
    assert first[:2] == [2.0, 2.0]
    assert second == [0.0, 0.0, 100.0, 100.0]


def test_a_tie_of_signs_is_background() -> None:
    assert refine_row([5, -1, 0], ids=[0, 0, 0]) == [[-1 / 3] * 3]


def test_a_tie_of_classes_goes_to_the_lowest_present_one() -> None:
    assert refine_row([9, 9], [2, 2], [2, 2], ids=[0, 0], labels=[0, 1, 1]) == [[0, 0], [2, 2], [0, 0]]


def test_no_positive_superpixel() -> None:
    scores, superpixels, labels = case()
    assert superpixel_refine(-scores.abs(), superpixels, labels).le(0).all()


def test_zero_scores_and_no_label() -> None:
    scores, superpixels, labels = case()
    assert superpixel_refine(scores * 0, superpixels, labels).eq(0).all()
    assert superpixel_refine(scores, superpixels, labels * 0).eq(0).all()
    assert superpixel_refine(scores[:0], superpixels[:0], labels[:0]).shape == (0, 4, 5, 7)
    assert superpixel_refine(scores[:, :0], superpixels, labels[:, :0]).shape == (4, 0, 5, 7)


def test_one_superpixel_and_one_for_each_cell() -> None:
    scores, superpixels, labels = case()
    whole = superpixel_refine(scores, superpixels * 0, labels)
    assert torch.equal(whole, whole[..., :1, :1].expand_as(whole))
    each = superpixel_refine(scores, torch.arange(35).view(1, 5, 7).expand(4, -1, -1), labels)
    best = (scores * labels[..., None, None]).amax(1, keepdim=True)
    kept = torch.where((scores == best) | (scores < 0), scores, 0) * labels[..., None, None]
    torch.testing.assert_close(each, kept, msg="only the highest of several positive classes is left")


def test_ids_with_gaps_and_huge_ids() -> None:
    scores, superpixels, labels = case()
    refined = superpixel_refine(scores, superpixels, labels)
    for other in (superpixels * 7 + 3, superpixels * 2**52, superpixels.to(torch.uint8)):
        assert torch.equal(superpixel_refine(scores, other, labels), refined)


def test_num_regions_changes_nothing() -> None:
    scores, superpixels, labels = case(fine=(8, 9))
    refined = superpixel_refine(scores, superpixels, labels)
    for num_regions in (6, 50):
        assert torch.equal(superpixel_refine(scores, superpixels, labels, num_regions=num_regions), refined)


@pytest.mark.parametrize(
    ("size", "fine"),
    [
        ((5, 7), (5, 7)),
        ((5, 7), (17, 31)),  # steps of 4 and 5
        ((5, 7), (17, 30)),  # steps of 4 and 29 / 6
        ((5, 7), (12, 7)),  # same width, other height
        ((5, 7), (5, 15)),  # same height, other width: the official program mistakes it for equal
        ((5, 7), (3, 4)),  # coarser than the scores
        ((1, 7), (9, 7)),
        ((4, 1), (4, 6)),
        ((1, 1), (6, 5)),
    ],
)
def test_membership_of_every_size(size: tuple[int, int], fine: tuple[int, int]) -> None:
    scores, superpixels, labels = without_ties(size=size, fine=fine)
    refined = superpixel_refine(scores, superpixels, labels)
    torch.testing.assert_close(refined, by_planes(scores, superpixels, labels))


def test_aligned_sizes_subsample() -> None:
    scores, superpixels, labels = case(fine=(4 * 4 + 1, 6 * 8 + 1))
    subsampled = superpixels[:, ::4, ::8]
    assert torch.equal(
        superpixel_refine(scores, superpixels, labels), superpixel_refine(scores, subsampled, labels)
    )


@given(seeds, st.booleans())
def test_refine_equals_the_planes(seed: int, soft: bool) -> None:
    scores, superpixels, labels = without_ties(seed=seed, fine=(11, 10) if soft else None)
    refined = superpixel_refine(scores, superpixels, labels)
    torch.testing.assert_close(refined, by_planes(scores, superpixels, labels))


@given(seeds)
def test_refine_is_idempotent(seed: int) -> None:
    scores, superpixels, labels = case(seed)
    once = superpixel_refine(scores, superpixels, labels)
    torch.testing.assert_close(superpixel_refine(once, superpixels, labels), once)


@given(seeds, st.permutations(range(6)), st.booleans())
def test_refine_does_not_look_at_ids(seed: int, order: list[int], soft: bool) -> None:
    scores, superpixels, labels = case(seed, fine=(11, 10) if soft else None)
    renamed = torch.tensor(order)[superpixels]
    torch.testing.assert_close(
        superpixel_refine(scores, renamed, labels), superpixel_refine(scores, superpixels, labels)
    )


@given(seeds, st.integers(-2, 20), st.booleans())
def test_refine_is_homogeneous(seed: int, exponent: int, soft: bool) -> None:
    scores, superpixels, labels = case(seed, fine=(11, 10) if soft else None)
    scaled = superpixel_refine(scores * 2**exponent, superpixels, labels)
    assert torch.equal(scaled, superpixel_refine(scores, superpixels, labels) * 2**exponent)


@given(seeds, st.permutations(range(4)), st.booleans())
def test_refine_permutes_with_the_classes(seed: int, order: list[int], soft: bool) -> None:
    scores, superpixels, labels = without_ties(seed=seed, fine=(11, 10) if soft else None)
    permuted = superpixel_refine(scores[:, order], superpixels, labels[:, order])
    torch.testing.assert_close(permuted, superpixel_refine(scores, superpixels, labels)[:, order])


@given(seeds, st.booleans())
def test_refine_stays_in_range(seed: int, soft: bool) -> None:
    scores, superpixels, labels = case(seed, fine=(11, 10) if soft else None)
    refined = superpixel_refine(scores, superpixels, labels)
    assert refined[labels == 0].eq(0).all(), "absent classes are exactly 0"
    low, high = scores.amin((2, 3), keepdim=True), scores.amax((2, 3), keepdim=True)
    assert (refined >= low.clamp(max=0) - 1e-12).all()
    assert (refined <= high.clamp(min=0) + 1e-12).all()
    if not soft:
        assert (refined > 0).sum(1).max() <= 1, "one class a region"
        for image, ids in zip(refined, superpixels, strict=True):
            for region in ids.unique():
                inside = image[:, ids == region]
                assert torch.equal(inside, inside[:, :1].expand_as(inside)), "constant on regions"


def test_gradient_is_that_of_the_means() -> None:
    scores, superpixels, labels = case(fine=(11, 10))
    scores.requires_grad_()
    assert torch.autograd.gradcheck(lambda f: superpixel_refine(f, superpixels, labels), (scores,))
    (gradient,) = torch.autograd.grad(superpixel_refine(scores, superpixels, labels).sum(), scores)
    assert gradient[labels == 0].eq(0).all()
    assert gradient[labels == 1].ne(0).any()


# ------------------------------------------------------------------------------------------ region mean


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("size", [(5, 7), (17, 31), (12, 7), (3, 4), (1, 9), (6, 1)])
def test_region_mean_equals_resizing(size: tuple[int, int], align_corners: bool) -> None:
    features = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    superpixels = torch.randint(0, 4, (2, *size)) * 2
    resized = F.interpolate(features, size=size, mode="bilinear", align_corners=align_corners)
    found = region_mean(features, superpixels, num_regions=8, align_corners=align_corners)
    for image in range(2):
        for region in range(8):
            inside = resized[image][:, superpixels[image] == region]
            wanted = inside.mean(1) if inside.numel() else torch.zeros(3, dtype=torch.float64)
            torch.testing.assert_close(found[image, region], wanted)


def test_region_mean_of_one_cell() -> None:
    features = torch.randn(1, 3, 1, 1)
    found = region_mean(features, torch.tensor([[[0, 0, 1], [1, 1, 1]]]))
    torch.testing.assert_close(found, features.flatten(2).transpose(1, 2).expand(-1, 2, -1))


def test_region_mean_of_many_pixels() -> None:
    """A ramp from 0 to 1; in float32 the weights of a region of a million pixels add up wrongly."""
    ramp = torch.tensor([[[[0.0, 1.0]]]])
    assert region_mean(ramp, torch.zeros(1, 1, 2**20, dtype=torch.uint8)).item() == pytest.approx(
        0.5, rel=1e-6
    )


def test_region_mean_rows() -> None:
    features, superpixels = torch.rand(1, 2, 3, 3), torch.full((1, 4, 4), 3)
    assert region_mean(features, superpixels).shape == (1, 4, 2)
    assert region_mean(features, superpixels, num_regions=9).shape == (1, 9, 2)
    assert region_mean(features, superpixels)[0, :3].eq(0).all(), "regions without a pixel"
    assert region_mean(features[:0], superpixels[:0]).shape == (0, 0, 2)


def test_region_mean_gradcheck() -> None:
    features = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    superpixels = torch.randint(0, 3, (1, 7, 6))
    assert torch.autograd.gradcheck(lambda f: region_mean(f, superpixels), (features,))


# ------------------------------------------------------------------------------------------ merging


def merge_plainly(superpixels: torch.Tensor, features: torch.Tensor, max_regions: int) -> torch.Tensor:
    """Section 4.1 with a look at all pairs for each merge; ids without gaps."""
    ids, total = superpixels.clone(), superpixels.numel()
    features, used = features.double().clone(), ids.unique().tolist()
    while len(used) > max_regions:
        best = (-math.inf, 0, 0)
        for i in used:
            for j in used:
                if j <= i:
                    continue
                size = int(((ids == i) | (ids == j)).sum())
                likeness = float(F.cosine_similarity(features[i], features[j], dim=0)) + 1 - size / total
                if likeness > best[0] + 1e-12:
                    best = (likeness, i, j)
        _, i, j = best
        n_i, n_j = int((ids == i).sum()), int((ids == j).sum())
        features[i] = (n_i * features[i] + n_j * features[j]) / (n_i + n_j)
        ids[ids == j] = i
        used.remove(j)
    return torch.unique(ids, return_inverse=True)[1]


@given(seeds, st.integers(1, 14))
def test_merge_equals_looking_at_all_pairs(seed: int, max_regions: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    superpixels = torch.randint(0, 12, (6, 9), generator=generator)
    features = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    merged = merge_superpixels(superpixels, features, max_regions)
    assert torch.equal(merged, merge_plainly(superpixels, features, max_regions))


@given(seeds, st.integers(1, 14))
def test_merge_is_a_coarsening(seed: int, max_regions: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    superpixels = 3 * torch.randint(0, 10, (6, 9), generator=generator) + 2  # with gaps
    features = torch.randn(30, 4, generator=generator)
    merged = merge_superpixels(superpixels, features, max_regions)
    regions = min(len(superpixels.unique()), max_regions)
    assert merged.unique().tolist() == list(range(regions)), "as many as asked for, without gaps"
    for region in superpixels.unique():
        assert len(merged[superpixels == region].unique()) == 1, "no region is split"
    first = [int(superpixels[merged == region].min()) for region in range(regions)]
    assert first == sorted(first), "in the order of the lowest ids"


def test_merge_hand_computed() -> None:
    """Regions of 2, 2, 2 and 4 pixels; 0 and 2 point the same way, 3 does so but is larger."""
    superpixels = torch.tensor([[0, 0, 1, 1, 2], [2, 3, 3, 3, 3]])
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 0.0], [2.0, 0.0]])
    merge = lambda regions: merge_superpixels(superpixels, features, regions).flatten().tolist()  # noqa: E731
    assert merge(4) == [0, 0, 1, 1, 2, 2, 3, 3, 3, 3]
    assert merge(3) == [0, 0, 1, 1, 0, 0, 2, 2, 2, 2]
    assert merge(2) == [0, 0, 1, 1, 0, 0, 0, 0, 0, 0]
    assert merge(1) == [0] * 10


def test_merge_ties_go_to_the_lowest_ids() -> None:
    superpixels, features = torch.arange(8)[None], torch.ones(8, 2)
    assert merge_superpixels(superpixels, features, 7).tolist() == [[0, 0, 1, 2, 3, 4, 5, 6]]
    assert merge_superpixels(superpixels, features, 6).tolist() == [[0, 0, 1, 1, 2, 3, 4, 5]], (
        "small ones first"
    )


def test_merge_of_few_regions_only_renumbers() -> None:
    superpixels = torch.tensor([[4, 4, 9], [1, 1, 9]])
    merged = merge_superpixels(superpixels, torch.rand(10, 3))
    assert merged.tolist() == [[1, 1, 2], [0, 0, 2]]


def test_merge_of_regions_without_a_direction() -> None:
    """Features of zeros are unlike everything, by a cosine of 0: never NaN."""
    superpixels = torch.tensor([[0, 1, 2, 3]])
    features = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.9, 0.1], [0.0, 0.0]])
    assert merge_superpixels(superpixels, features, 3).tolist() == [[0, 1, 1, 2]]
    assert merge_superpixels(superpixels, features, 1).eq(0).all()


def test_merge_of_a_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    superpixels = torch.randint(0, 20, (3, 8, 8), generator=generator)
    features = torch.randn(3, 20, 5, generator=generator)
    merged = merge_superpixels(superpixels, features, 4)
    for image in range(3):
        assert torch.equal(merged[image], merge_superpixels(superpixels[image], features[image], 4))
    assert merge_superpixels(superpixels[:0], features[:0]).shape == (0, 8, 8)
    with pytest.raises(ValueError, match=r"superpixels: expected shape \(B, H, W\) with H >= 1"):
        merge_superpixels(superpixels[:, :0], features)


def test_merge_with_the_means_of_a_network() -> None:
    """The whole way: superpixels of a photo, features of its regions, fewer regions."""
    image = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    image = F.interpolate(image, size=(64, 80))
    superpixels = slic_superpixels(image, num_regions=40)
    merged = merge_superpixels(superpixels, region_mean(image, superpixels), 8)
    assert [len(ids.unique()) for ids in merged] == [8, 8]


# ------------------------------------------------------------------------------------------ making ids


def two_halves() -> torch.Tensor:
    image = torch.zeros(2, 3, 24, 30)
    image[0, :, :, 12:] = 1.0
    image[1, :, 8:] = 0.5
    return image


def test_felzenszwalb_finds_the_halves() -> None:
    ids = felzenszwalb_superpixels(two_halves())
    assert ids.dtype == torch.int64
    left, above = torch.zeros(24, 30, dtype=torch.int64), torch.zeros(24, 30, dtype=torch.int64)
    left[:, 12:] = above[8:] = 1
    assert torch.equal(ids, torch.stack([left, above]))


def test_slic_follows_the_halves() -> None:
    image = two_halves()
    ids = slic_superpixels(image, num_regions=30)
    for photo, regions in zip(image, ids, strict=True):
        assert regions.unique().tolist() == list(range(int(regions.max()) + 1))
        assert 20 <= regions.max() <= 40
        for region in regions.unique():
            assert len(photo[0, regions == region].unique()) == 1


def test_settings_of_the_programs_matter() -> None:
    image = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    count = lambda **settings: int(felzenszwalb_superpixels(image, **settings).max()) + 1  # noqa: E731
    assert count(min_size=10) > count(min_size=100)
    assert count(min_size=1, scale=10) > count(min_size=1, scale=1000)
    assert count(min_size=1, sigma=0) > count(min_size=1, sigma=2)
    image = F.interpolate(image[..., ::8, ::8], scale_factor=8, mode="bilinear")
    assert slic_superpixels(image, num_regions=64).max() > slic_superpixels(image, num_regions=9).max()
    loose, tight = (slic_superpixels(image, num_regions=16, compactness=value) for value in (0.1, 1000))
    assert not torch.equal(loose, tight)


@pytest.mark.parametrize("make", [felzenszwalb_superpixels, slic_superpixels])
def test_photos_of_any_dtype(make: Callable) -> None:
    image = two_halves()
    assert torch.equal(make(image.half()), make(image))
    assert torch.equal(make(image[1:]), make(image)[1:])
    assert make(image[:0]).shape == (0, 24, 30)


# ------------------------------------------------------------------------------------------ all


def test_batch_equals_singles() -> None:
    scores, superpixels, labels = case(fine=(11, 10))
    refined, mean = superpixel_refine(scores, superpixels, labels), region_mean(scores, superpixels)
    for image in range(4):
        some = slice(image, image + 1)
        one = superpixel_refine(scores[some], superpixels[some], labels[some])
        torch.testing.assert_close(one, refined[some])
        torch.testing.assert_close(region_mean(scores[some], superpixels[some], num_regions=6), mean[some])


def test_inputs_stay_as_they_are() -> None:
    scores, superpixels, labels = case()
    features = torch.rand(4, 6, 3)
    before = [value.clone() for value in (scores, superpixels, labels, features)]
    superpixel_refine(scores, superpixels, labels)
    region_mean(scores, superpixels)
    merge_superpixels(superpixels, features, 2)
    for value, old in zip((scores, superpixels, labels, features), before, strict=True):
        assert torch.equal(value, old)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    scores, superpixels, labels = case(dtype=dtype, fine=(11, 10))
    refined = superpixel_refine(scores, superpixels, labels)
    assert refined.dtype == dtype
    exact = superpixel_refine(scores.double(), superpixels, labels)
    torch.testing.assert_close(refined, exact.to(dtype))
    mean = region_mean(scores, superpixels)
    assert mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(mean.double(), region_mean(scores.double(), superpixels), atol=1e-6, rtol=1e-5)
    assert merge_superpixels(superpixels, mean.to(dtype), 2).dtype == torch.int64


def test_bool_and_float_labels() -> None:
    scores, superpixels, labels = case()
    refined = superpixel_refine(scores, superpixels, labels)
    assert torch.equal(superpixel_refine(scores, superpixels, labels.bool()), refined)
    assert torch.equal(superpixel_refine(scores, superpixels, labels.float()), refined)


@pytest.mark.xfail(torch.__version__ < (2, 10), reason="older releases cannot trace a count of classes")
def test_compiles_to_one_graph() -> None:
    scores, superpixels, labels = case(fine=(11, 10))
    compiled = torch.compile(superpixel_refine, fullgraph=True, backend="eager")
    torch.testing.assert_close(
        compiled(scores, superpixels, labels, num_regions=6), superpixel_refine(scores, superpixels, labels)
    )
    compiled = torch.compile(region_mean, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(scores, superpixels, num_regions=6), region_mean(scores, superpixels))


def test_devices(device: torch.device) -> None:
    scores, superpixels, labels = without_ties(dtype=torch.float32, fine=(11, 10))
    there = [value.to(device) for value in (scores, superpixels, labels)]
    refined, mean = superpixel_refine(*there), region_mean(*there[:2])
    assert refined.device.type == mean.device.type == device.type
    torch.testing.assert_close(refined.cpu(), superpixel_refine(scores, superpixels, labels))
    torch.testing.assert_close(mean.cpu(), region_mean(scores, superpixels))
    merged = merge_superpixels(there[1], mean, 3)
    assert merged.device.type == device.type
    assert torch.equal(merged.cpu(), merge_superpixels(superpixels, mean.cpu(), 3))
    assert slic_superpixels(two_halves().to(device)).device.type == device.type


SCORES, SUPERPIXELS, _ = case()
FEATURES = torch.rand(4, 6, 3)
IMAGE = torch.rand(1, 3, 8, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: superpixel_refine(SCORES[0], SUPERPIXELS, LABELS),
            ValueError,
            r"scores: expected shape \(B, C, h, w\), got \(4, 5, 7\)",
        ),
        (
            lambda: superpixel_refine(SCORES, SUPERPIXELS[:1], LABELS),
            ValueError,
            "superpixels: .* with B=4 from scores",
        ),
        (
            lambda: superpixel_refine(SCORES, SUPERPIXELS, LABELS[:, 1:]),
            ValueError,
            "labels: .* with C=4 from scores",
        ),
        (
            lambda: superpixel_refine(SCORES.long(), SUPERPIXELS, LABELS),
            TypeError,
            "scores: expected a floating-point tensor",
        ),
        (
            lambda: superpixel_refine(SCORES, SUPERPIXELS.float(), LABELS),
            TypeError,
            "superpixels: expected an integer tensor",
        ),
        (
            lambda: superpixel_refine(SCORES, SUPERPIXELS - 1, LABELS),
            ValueError,
            "superpixels: expected ids >= 0, got -1",
        ),
        (
            lambda: superpixel_refine(SCORES, SUPERPIXELS, LABELS, num_regions=5),
            ValueError,
            "superpixels: expected ids below num_regions, 5, got 5",
        ),
        (
            lambda: superpixel_refine(SCORES, SUPERPIXELS, LABELS, num_regions=2.5),
            ValueError,
            "num_regions: expected an integer >= 0, got 2.5",
        ),
        (
            lambda: superpixel_refine(SCORES * math.nan, SUPERPIXELS, LABELS),
            ValueError,
            "scores: expected finite values",
        ),
        (
            lambda: superpixel_refine(SCORES, SUPERPIXELS, LABELS * 2),
            ValueError,
            "labels: expected a multi-hot tensor",
        ),
        (
            lambda: superpixel_refine(SCORES, SUPERPIXELS, LABELS, eps=0),
            ValueError,
            "eps: expected a finite number > 0",
        ),
        (lambda: region_mean(SCORES[0], SUPERPIXELS), ValueError, r"features: expected shape \(B, D, h, w\)"),
        (lambda: region_mean(SCORES.long(), SUPERPIXELS), TypeError, "features: expected a floating-point"),
        (lambda: region_mean(SCORES, -SUPERPIXELS), ValueError, "superpixels: expected ids >= 0, got -5"),
        (
            lambda: region_mean(SCORES, SUPERPIXELS, num_regions=3),
            ValueError,
            "superpixels: expected ids below num_regions, 3, got 5",
        ),
        (
            lambda: merge_superpixels(SUPERPIXELS, FEATURES[0]),
            ValueError,
            r"region_features: expected shape \(B, R, D\), got \(6, 3\)",
        ),
        (
            lambda: merge_superpixels(SUPERPIXELS[0], FEATURES),
            ValueError,
            r"region_features: expected shape \(R, D\), got \(4, 6, 3\)",
        ),
        (
            lambda: merge_superpixels(SUPERPIXELS, FEATURES[:, :4]),
            ValueError,
            "superpixels: expected ids below the rows of region_features, 4, got 5",
        ),
        (
            lambda: merge_superpixels(SUPERPIXELS, FEATURES * math.inf),
            ValueError,
            "region_features: expected finite values",
        ),
        (
            lambda: merge_superpixels(SUPERPIXELS, FEATURES, 0),
            ValueError,
            "max_regions: expected an integer >= 1, got 0",
        ),
        (lambda: felzenszwalb_superpixels(IMAGE[:, :1]), ValueError, r"image: expected shape \(B, 3, H, W\)"),
        (lambda: felzenszwalb_superpixels(IMAGE * 255), ValueError, r"image: .* .divide 8-bit values by 255"),
        (lambda: felzenszwalb_superpixels(IMAGE, scale=0), ValueError, "scale: expected a finite number > 0"),
        (
            lambda: felzenszwalb_superpixels(IMAGE, sigma=-1),
            ValueError,
            "sigma: expected a finite number",
        ),
        (
            lambda: felzenszwalb_superpixels(IMAGE, min_size=-1),
            ValueError,
            "min_size: expected an integer >= 0",
        ),
        (lambda: slic_superpixels(IMAGE.long()), TypeError, "image: expected a floating-point tensor"),
        (lambda: slic_superpixels(IMAGE, num_regions=0), ValueError, "num_regions: expected a finite number"),
        (lambda: slic_superpixels(IMAGE, compactness=0), ValueError, "compactness: expected a finite number"),
    ],
)
def test_errors(call: Callable, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
