import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from pseudolabel.metrics import boundary_counts, boundary_f_from_counts


def slow_counts(mask, truth, num_classes, radius=3, ring=5):
    """The definition, with exact distance transforms, a class at a time."""
    counts = np.zeros((num_classes, 4), dtype=np.int64)
    for m, t in zip(mask.numpy(), truth.numpy().copy(), strict=True):
        region = np.zeros(t.shape, dtype=bool)
        if (ignored := t == 255).any():
            fits = distance_to(~ignored) > ring
            region = ignored & (distance_to(fits) <= ring)
            nearest = np.stack([distance_to(t == c) for c in range(num_classes)]).argmin(0)
            t[ignored] = nearest[ignored]
        counted = distance_to(region) > radius
        edges = edge_of(m, np.zeros_like(region)), edge_of(t, region)
        for c in range(num_classes):
            predicted, true = edges[0] & (m == c), edges[1] & (t == c)
            scored = predicted & counted
            counts[c] += [
                (scored & (distance_to(true) <= radius)).sum(),
                scored.sum(),
                (true & (distance_to(predicted) <= radius)).sum(),
                true.sum(),
            ]
    return torch.from_numpy(counts)


def distance_to(points):
    return ndimage.distance_transform_edt(~points) if points.any() else np.full(points.shape, np.inf)


def edge_of(label, region):
    edge = np.zeros(label.shape, dtype=bool)
    height, width = label.shape
    for y in range(height):
        for x in range(width):
            for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if 0 <= v < height and 0 <= u < width and label[v, u] != label[y, x]:
                    edge[y, x] |= not (region[y, x] or region[v, u])
    return edge


def square(size=30, top=8, left=8, side=12, label=1):
    mask = torch.zeros(1, size, size, dtype=torch.int64)
    mask[:, top : top + side, left : left + side] = label
    return mask


def with_ring(truth):
    """VOC's ring: 5 ignored pixels across each boundary, the outermost object pixel in the middle."""
    planes = torch.nn.functional.one_hot(truth, 3).movedim(-1, 1).float()
    thick = torch.nn.functional.max_pool2d(planes, 5, 1, 2)
    return truth.masked_fill(thick.sum(1) > 1, 255)


@st.composite
def scenes(draw):
    """Blobs of 3 classes with ignored blobs in the truth."""
    batch, height, width = draw(st.tuples(st.integers(1, 2), st.integers(1, 24), st.integers(1, 24)))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def blobs(smooth, classes):
        noise = generator.normal(size=(batch, classes, height, width))
        return ndimage.gaussian_filter(noise, (0, 0, smooth, smooth)).argmax(1)

    truth = blobs(2, 3)
    truth[blobs(draw(st.sampled_from([0.5, 1, 3])), 4) == 0] = 255
    return torch.from_numpy(blobs(2, 3)), torch.from_numpy(truth)


@given(scenes(), st.sampled_from([0, 1, 1.5, 2, 3, 4.3]), st.sampled_from([0, 1, 2, 5]))
@settings(max_examples=60)
def test_equals_the_definition(scene, radius, ring):
    mask, truth = scene
    counts = boundary_counts(mask, truth, 3, radius=radius, ring=ring)
    assert counts.dtype == torch.int64
    assert torch.equal(counts, slow_counts(mask, truth, 3, radius, ring))


@given(scenes())
def test_flips_turns_batches_and_bounds(scene):
    mask, truth = scene
    counts = boundary_counts(mask, truth, 3)
    assert torch.equal(counts, boundary_counts(mask.flip(-1), truth.flip(-1), 3))
    assert torch.equal(counts, boundary_counts(mask.flip(-2), truth.flip(-2), 3))
    assert torch.equal(counts, boundary_counts(mask.mT, truth.mT, 3))
    singles = [boundary_counts(mask[i : i + 1], truth[i : i + 1], 3) for i in range(len(mask))]
    assert torch.equal(counts, sum(singles))
    assert (counts[:, 0] <= counts[:, 1]).all()
    assert (counts[:, 2] <= counts[:, 3]).all()
    wider = boundary_counts(mask, truth, 3, radius=5)
    assert (wider[:, 2] >= counts[:, 2]).all()
    f = boundary_f_from_counts(counts)
    assert ((f >= 0) & (f <= 1) | f.isnan()).all()


def test_perfect_mask(device):
    truth = torch.cat([square(), square(label=2, side=5)]).to(device)
    for radius in (0, 3):
        counts = boundary_counts(truth, truth, 3, radius=radius)
        assert counts.device.type == device.type
        # Object pixels of the outline: 44 and 16; background pixels along it, without the corners: 48 and 20.
        assert counts.tolist() == [[68] * 4, [44] * 4, [16] * 4]
        assert boundary_f_from_counts(counts).tolist() == [1, 1, 1]


@pytest.mark.parametrize(("shift", "matched"), [(2, 44), (3, 44)])
def test_shift_within_the_radius(shift, matched):
    counts = boundary_counts(square(left=8 + shift), square(), 2, radius=shift)
    assert counts[1].tolist() == [matched, 44, matched, 44]


def test_shift_beyond_the_radius():
    # Moved by 4 with a radius of 3: only the sides along the movement are matched.
    counts = boundary_counts(square(left=12), square(), 2, radius=3)
    assert counts[1].tolist() == slow_counts(square(left=12), square(), 2, radius=3)[1].tolist()
    assert 0 < counts[1, 0] < 44


def test_distance_is_euclidean():
    mask, truth = torch.zeros(1, 9, 9).long(), torch.zeros(1, 9, 9).long()
    mask[0, 2, 2] = truth[0, 4, 4] = 1  # sqrt(8) apart
    assert boundary_counts(mask, truth, 2, radius=2.8)[1].tolist() == [0, 1, 0, 1]
    assert boundary_counts(mask, truth, 2, radius=2.9)[1].tolist() == [1, 1, 1, 1]


def test_other_class_does_not_match():
    counts = boundary_counts(square(label=2), square(label=1), 3)
    assert counts[1].tolist() == [0, 0, 0, 44]
    assert counts[2].tolist() == [0, 44, 0, 0]
    assert boundary_f_from_counts(counts)[:2].tolist() == [1, 0]
    assert boundary_f_from_counts(counts)[2].isnan()
    assert boundary_f_from_counts(counts, absent="nan").tolist() == [1, 0, 0]


def test_the_frame_is_no_boundary():
    full = torch.ones(1, 10, 10).long()
    assert not boundary_counts(full, full, 2).any()
    half = full.clone()
    half[..., 5:] = 0
    assert boundary_counts(half, half, 2).tolist() == [[10] * 4] * 2


def test_ring_puts_the_boundary_in_its_middle():
    truth = square()
    ringed = with_ring(truth)
    assert 255 in ringed
    counts = boundary_counts(truth, ringed, 2, radius=1)
    assert counts[1].tolist() == [44, 44, counts[1, 3], counts[1, 3]]
    # Taken as class-free pixels, the same ring would leave nothing to compare with.
    assert boundary_counts(truth, ringed, 2, radius=1, ring=0).sum(0)[3] == 0
    # A mask that is 4 pixels too large is far from the middle, though within 2 of the ring.
    large = square(top=4, left=4, side=20)
    assert boundary_counts(large, ringed, 2, radius=1)[1, 0] == 0


def test_ring_between_two_objects():
    truth = torch.ones(1, 20, 20).long()
    truth[..., 10:] = 2
    ringed = truth.clone()
    ringed[..., 7:13] = 255
    counts = boundary_counts(truth, ringed, 3, radius=0)
    assert counts.tolist() == [[0] * 4, [20] * 4, [20] * 4]


def test_region_without_truth():
    truth = torch.zeros(1, 40, 40).long()
    truth[:, :, 10:] = 1
    truth[:, :, 20:] = 255
    perfect = torch.where(truth == 255, 1, truth)
    # Whatever is predicted in the region costs nothing, also along its border.
    for inside in (0, 1):
        mask = torch.where(truth == 255, inside, truth)
        assert boundary_counts(mask, truth, 2).tolist() == [[40] * 4] * 2
        assert torch.equal(boundary_counts(mask, truth, 2)[:, 2:], boundary_counts(perfect, truth, 2)[:, 2:])
    # A boundary that is predicted farther than the radius away from it does.
    wrong = perfect.clone()
    wrong[:, :, 15:] = 0
    assert boundary_counts(wrong, truth, 2)[1].tolist() == [40, 80, 40, 40]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_integer_dtypes(dtype):
    mask, truth = square(left=10), with_ring(square())
    assert torch.equal(boundary_counts(mask.to(dtype), truth.to(dtype), 3), boundary_counts(mask, truth, 3))


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1)])
def test_tiny_images(size):
    mask = torch.arange(size[0] * size[1]).view(1, *size) % 3
    assert torch.equal(boundary_counts(mask, mask, 3), slow_counts(mask, mask, 3))
    assert not boundary_counts(mask, torch.full_like(mask, 255), 3).any()
    assert not boundary_counts(mask[:0], mask[:0], 3).any()


def test_many_classes():
    mask = torch.arange(5000).view(1, 50, 100)
    assert torch.equal(
        boundary_counts(mask[:, :3], mask[:, :3], 5000, radius=0, ignore_index=-1)[:300],
        torch.ones(300, 4).long(),
    )


def test_f_by_hand():
    counts = torch.tensor([[8, 10, 6, 10], [0, 5, 0, 0], [0, 0, 0, 5], [0, 5, 0, 5], [0, 0, 0, 0]])
    nan = torch.nan
    skip = torch.tensor([2 * 0.8 * 0.6 / 1.4, nan, 0, 0, nan], dtype=torch.float64)
    torch.testing.assert_close(boundary_f_from_counts(counts), skip, equal_nan=True)
    either = torch.tensor([2 * 0.8 * 0.6 / 1.4, 0, 0, 0, nan], dtype=torch.float64)
    torch.testing.assert_close(boundary_f_from_counts(counts, absent="nan"), either, equal_nan=True)
    stacked = boundary_f_from_counts(torch.stack([counts, counts]))
    torch.testing.assert_close(stacked, torch.stack([skip, skip]), equal_nan=True)


def test_f_compiles_to_one_graph():
    counts = torch.tensor([[8, 10, 6, 10], [0, 5, 0, 0]])
    compiled = torch.compile(boundary_f_from_counts, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(counts), boundary_f_from_counts(counts), equal_nan=True)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"mask": square().float()}, TypeError, "mask: expected an integer tensor"),
        ({"truth": square()[:, 1:]}, ValueError, "truth: expected shape .* with H=30 from mask"),
        ({"truth": square()[0]}, ValueError, r"truth: expected shape \(B, H, W\)"),
        ({"mask": square(label=2)}, ValueError, r"mask: expected classes 0\.\.1 .* \[2\] in 144 pixels"),
        (
            {"mask": square(label=255)},
            ValueError,
            "mask: expected classes only, got ignore_index 255 in 144 pixels of image 0 .* row 8, column 8",
        ),
        ({"truth": square(label=7)}, ValueError, r"truth: expected classes 0\.\.1"),
        ({"radius": -1}, ValueError, "radius: expected a finite number >= 0 and <= 127, got -1"),
        ({"radius": 128}, ValueError, "radius: expected"),
        ({"ring": -1}, ValueError, "ring: expected"),
        ({"num_classes": 1.5}, ValueError, "num_classes: expected"),
    ],
)
def test_errors(change, error, match):
    arguments = {"mask": square(), "truth": square(), "num_classes": 2} | change
    with pytest.raises(error, match=match):
        boundary_counts(**arguments)


def test_errors_of_f():
    with pytest.raises(ValueError, match=r"counts: expected shape \(\.\.\., N, 4\), got \(2, 3\)"):
        boundary_f_from_counts(torch.zeros(2, 3).long())
    with pytest.raises(TypeError, match="counts: expected an integer tensor"):
        boundary_f_from_counts(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="absent: expected one of"):
        boundary_f_from_counts(torch.zeros(2, 4).long(), absent="drop")
