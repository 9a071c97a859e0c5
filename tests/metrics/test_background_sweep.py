import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pseudolabel.metrics import background_sweep, confusion_matrix, iou_from_confusion

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def slow_sweep(cam, truth, thresholds, ignore_index=255):
    """Threshold, take the argmax and count, once a threshold."""
    confusions = []
    for threshold in thresholds:
        background = torch.full_like(cam[:, :1], threshold)
        mask = torch.cat([background, cam], dim=1).argmax(1)
        confusions.append(confusion_matrix(mask, truth, 1 + cam.shape[1], ignore_index=ignore_index))
    return torch.stack(confusions)


@st.composite
def problems(draw):
    batch, classes, height, width = draw(
        st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.integers(1, 6))
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    # Few levels, so that ties of classes, and of classes and thresholds, are the rule.
    levels = draw(st.sampled_from([3, 10, 1000]))
    cam = torch.randint(-1, levels + 1, (batch, classes, height, width), generator=generator) / levels
    truth = torch.randint(0, classes + 2, (batch, height, width), generator=generator)
    thresholds = draw(st.lists(st.integers(-2, levels + 2).map(lambda k: k / levels), min_size=1, max_size=8))
    return cam.to(draw(st.sampled_from(DTYPES))), truth.masked_fill(truth == classes + 1, 255), thresholds


@given(problems())
def test_equals_the_slow_way(problem):
    assert torch.equal(background_sweep(*problem), slow_sweep(*problem))


@given(problems())
def test_batches_add_up(problem):
    cam, truth, thresholds = problem
    singles = [background_sweep(cam[i : i + 1], truth[i : i + 1], thresholds) for i in range(len(cam))]
    assert torch.equal(background_sweep(cam, truth, thresholds), sum(singles))


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_slow_way_in_the_dtype_of_the_cam(dtype, device, generator):
    cam = torch.rand(2, 3, 40, 50, generator=generator).to(device, dtype)
    truth = torch.randint(0, 4, (2, 40, 50), generator=generator).to(device)
    thresholds = [0.0, 1.0, *(0.01 * k for k in range(60))]
    confusion = background_sweep(cam, truth, thresholds)
    assert confusion.dtype == torch.int64
    assert confusion.device.type == device.type
    assert torch.equal(confusion, slow_sweep(cam, truth, thresholds))


def test_threshold_is_rounded_as_the_cam_is():
    # 0.05 in float32 lies above 0.05 in float64; both sides of the comparison are float32.
    cam = torch.full((1, 1, 1, 1), 0.05)
    truth = torch.ones(1, 1, 1, dtype=torch.int64)
    for thresholds in ([0.05], torch.tensor([0.05], dtype=torch.float64)):
        assert background_sweep(cam, truth, thresholds).tolist() == [[[0, 0], [1, 0]]]
    # 0.7 in float32 lies below 0.7 in float64: thresholds must not pass through float32.
    cam = torch.full((1, 1, 1, 1), 0.7, dtype=torch.float64)
    assert background_sweep(cam, truth, [0.7]).tolist() == [[[0, 0], [1, 0]]]


def test_by_hand():
    cam = torch.tensor([[[[0.9, 0.4, 0.2, 0.5]], [[0.1, 0.4, 0.3, 0.5]]]])
    truth = torch.tensor([[[1, 2, 0, 255]]])
    confusion = background_sweep(cam, truth, torch.tensor([0.9, 0.3, 0.0]))
    assert confusion.tolist() == [
        [[1, 0, 0], [1, 0, 0], [1, 0, 0]],  # 0.9 ties with 0.9: background
        [[1, 0, 0], [0, 1, 0], [0, 1, 0]],  # classes tie at 0.4: the first
        [[0, 0, 1], [0, 1, 0], [0, 1, 0]],
    ]


def test_zero_maps_negative_values_and_duplicates():
    truth = torch.tensor([[[0, 1, 2]]])
    cam = torch.zeros(1, 2, 1, 3)
    thresholds = [0.0, 0.0, -0.0, -1.0]
    assert torch.equal(background_sweep(cam, truth, thresholds), slow_sweep(cam, truth, thresholds))
    assert torch.equal(background_sweep(-cam - 2, truth, thresholds), slow_sweep(-cam - 2, truth, thresholds))


def test_order_of_thresholds_is_kept(generator):
    cam, truth = (
        torch.rand(1, 2, 9, 9, generator=generator),
        torch.randint(0, 3, (1, 9, 9), generator=generator),
    )
    thresholds = torch.rand(7, generator=generator)
    order = torch.randperm(7, generator=generator)
    assert torch.equal(
        background_sweep(cam, truth, thresholds)[order], background_sweep(cam, truth, thresholds[order])
    )


def test_truth_dtype_and_gradient():
    cam = torch.rand(1, 2, 3, 3, requires_grad=True)
    truth = torch.randint(0, 3, (1, 3, 3))
    confusion = background_sweep(cam, truth, [0.5])
    assert not confusion.requires_grad
    assert torch.equal(confusion, background_sweep(cam, truth.byte(), [0.5]))


def test_memory_format(generator):
    cam = torch.rand(2, 3, 4, 5, generator=generator)
    truth = torch.randint(0, 4, (2, 5, 4), generator=generator).mT
    expected = slow_sweep(cam, truth, [0.3, 0.7])
    assert torch.equal(
        background_sweep(cam.to(memory_format=torch.channels_last), truth, [0.3, 0.7]), expected
    )
    assert torch.equal(background_sweep(cam.mT.contiguous().mT, truth, [0.3, 0.7]), expected)


def test_ignore_index_and_all_ignored():
    cam, truth = torch.rand(1, 2, 3, 3), torch.full((1, 3, 3), -1)
    truth[0, 0] = torch.tensor([0, 1, 2])
    assert background_sweep(cam, truth, [0.1, 0.5], ignore_index=-1).sum((1, 2)).tolist() == [3, 3]
    assert not background_sweep(cam, torch.full_like(truth, 255), [0.1]).any()
    assert not background_sweep(cam[:0], truth[:0], [0.1]).any()


def test_compiles_to_one_graph(generator):
    cam = torch.rand(1, 2, 9, 9, generator=generator)
    truth = torch.randint(0, 3, (1, 9, 9), generator=generator)
    thresholds = torch.linspace(0, 1, 5)
    compiled = torch.compile(background_sweep, fullgraph=True, backend="eager")
    assert torch.equal(compiled(cam, truth, thresholds), background_sweep(cam, truth, thresholds))


CAM, TRUTH = torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (
            {"cam": CAM[..., :2]},
            ValueError,
            r"cam: expected the size of truth \(4, 5\), got \(4, 2\); resize",
        ),
        (
            {"cam": CAM[:1]},
            ValueError,
            r"truth: expected shape \(B, H, W\) with B=1 from cam, got \(2, 4, 5\)",
        ),
        ({"cam": CAM[0]}, ValueError, r"cam: expected shape \(B, C, h, w\), got \(3, 4, 5\)"),
        ({"cam": CAM[:, :0]}, ValueError, "cam: expected at least one class"),
        ({"cam": CAM.long()}, TypeError, "cam: expected a floating-point tensor"),
        ({"cam": CAM + torch.nan}, ValueError, "cam: expected finite values, got 40 NaN"),
        ({"cam": CAM.index_fill(1, torch.tensor(2), torch.inf)}, ValueError, "cam: expected finite values"),
        ({"truth": TRUTH[:, None]}, ValueError, "truth: expected shape"),
        ({"truth": TRUTH.float()}, TypeError, "truth: expected an integer tensor"),
        ({"truth": TRUTH + 4}, ValueError, r"truth: expected classes 0\.\.3 or ignore_index 255, got \[4\]"),
        ({"thresholds": []}, ValueError, "thresholds: expected at least one"),
        ({"thresholds": 0.5}, TypeError, "thresholds: expected a list or tuple, got float 0.5"),
        ({"thresholds": [0.1, torch.nan]}, ValueError, "thresholds: expected a finite number, got nan"),
        ({"ignore_index": 2}, ValueError, r"ignore_index: expected an integer outside of 0\.\.3"),
    ],
)
def test_errors(change, error, match):
    arguments = {"cam": CAM, "truth": TRUTH, "thresholds": [0.1, 0.2]} | change
    with pytest.raises(error, match=match):
        background_sweep(**arguments)


def test_matches_official_program(golden):
    case = golden("pmm/public_eval")
    thresholds, num_classes = case["thresholds"], int(case["num_cls"])
    confusion = torch.zeros(len(thresholds), num_classes, num_classes, dtype=torch.int64)
    for j in range(int(case["n_images"])):
        truth = torch.from_numpy(case[f"i{j}_gt"])[None]
        cam = torch.zeros(1, num_classes - 1, *truth.shape[1:])
        cam[0, torch.from_numpy(case[f"i{j}_keys"])] = torch.from_numpy(case[f"i{j}_cam"])
        confusion += background_sweep(cam, truth, thresholds.tolist())
    iou = 100 * iou_from_confusion(confusion, absent="skip")
    expected = torch.from_numpy(case["npy_iou"])
    torch.testing.assert_close(
        iou, expected.masked_fill(expected == -100, torch.nan), rtol=0, atol=1e-9, equal_nan=True
    )
    torch.testing.assert_close(iou.nanmean(-1), torch.from_numpy(case["npy_miou"]), rtol=0, atol=1e-5)
