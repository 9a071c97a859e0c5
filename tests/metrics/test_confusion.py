import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pseudolabel.metrics import confusion_matrix, iou_from_confusion, over_under_segmentation

TRUTH = torch.tensor([[[0, 0, 1], [1, 2, 255]], [[2, 2, 2], [0, 255, 255]]])
MASK = torch.tensor([[[0, 1, 1], [1, 0, 2]], [[2, 2, 1], [0, 0, 1]]])
COUNTED = [[2, 1, 0], [0, 2, 0], [1, 1, 2]]  # by hand

# The third image has one unlabelled pixel on class 2, one on background and one on ignored truth.
UNSURE = torch.tensor([[[0, 255, 1], [1, 255, 255]]])
UNSURE_TRUTH = torch.tensor([[[0, 0, 1], [1, 2, 255]]])


@st.composite
def label_maps(draw, classes=5, ignore=True):
    size = draw(st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    mask = torch.randint(0, classes, size, generator=generator)
    truth = torch.randint(0, classes + ignore, size, generator=generator)
    return mask, torch.where(truth == classes, 255, truth)


def test_counts_by_hand(device):
    confusion = confusion_matrix(MASK.to(device), TRUTH.to(device), 3)
    assert confusion.dtype == torch.int64
    assert confusion.device.type == device.type
    assert confusion.tolist() == COUNTED


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_integer_dtypes(dtype):
    assert confusion_matrix(MASK.to(dtype), TRUTH.to(dtype), 3).tolist() == COUNTED
    assert confusion_matrix(MASK.to(dtype), TRUTH, 3).tolist() == COUNTED


@pytest.mark.parametrize("ignore_index", [-1, -100, 3, 255])
def test_ignore_index(ignore_index):
    truth = torch.where(TRUTH == 255, ignore_index, TRUTH)
    assert confusion_matrix(MASK, truth, 3, ignore_index=ignore_index).tolist() == COUNTED


def test_ignore_index_does_not_wrap_in_uint8():
    with pytest.raises(ValueError, match=r"truth: expected classes 0\.\.2 or ignore_index -1, got \[255\]"):
        confusion_matrix(MASK.byte(), TRUTH.byte(), 3, ignore_index=-1)


def test_a_class_of_that_number_is_not_the_internal_row_of_ignored_pixels():
    with pytest.raises(ValueError, match=r"mask: expected classes 0\.\.2 .* got \[3\] in 1 pixel of image 0"):
        confusion_matrix(torch.tensor([[[3, 0]]]), torch.tensor([[[0, 0]]]), 3)


@pytest.mark.parametrize(
    ("pred_ignore", "expected"),
    [
        ("background", [[2, 0, 0], [0, 2, 0], [1, 0, 0]]),
        ("exclude", [[1, 0, 0], [0, 2, 0], [0, 0, 0]]),
        ("wrong", [[1, 0, 0, 1], [0, 2, 0, 0], [0, 0, 0, 1]]),
    ],
)
def test_pred_ignore(pred_ignore, expected):
    assert confusion_matrix(UNSURE, UNSURE_TRUTH, 3, pred_ignore=pred_ignore).tolist() == expected


def test_pred_ignore_error_says_where_and_what_to_do():
    mask, truth = torch.cat([TRUTH.clamp(max=2), UNSURE]), torch.cat([TRUTH, UNSURE_TRUTH])
    message = (
        r"mask: ignore_index 255 .* in 2 pixels of image 2 of the batch \(first: image 2, row 0, column 1\).*"
        r"pred_ignore='background'.*'exclude'.*'wrong'"
    )
    with pytest.raises(ValueError, match=message):
        confusion_matrix(mask, truth, 3)


def test_pred_ignore_on_ignored_truth_is_no_error():
    assert confusion_matrix(torch.tensor([[[1, 255]]]), torch.tensor([[[1, 255]]]), 2).tolist() == [
        [0, 0],
        [0, 1],
    ]


def test_wrong_misses_its_class_and_is_no_false_positive():
    confusion = confusion_matrix(UNSURE, UNSURE_TRUTH, 3, pred_ignore="wrong")
    over, under = over_under_segmentation(confusion)
    assert iou_from_confusion(confusion).tolist() == [0.5, 1, 0]
    assert over.tolist() == [0, 0, 0]
    assert under.tolist() == [0.5, 0, 1]


@pytest.mark.parametrize("pred_ignore", ["error", "background", "exclude", "wrong"])
def test_everything_ignored_or_empty(pred_ignore):
    columns = 3 + (pred_ignore == "wrong")
    for truth in (torch.full((2, 3, 4), 255), torch.zeros(0, 3, 4, dtype=torch.int64)):
        confusion = confusion_matrix(torch.zeros_like(truth), truth, 3, pred_ignore=pred_ignore)
        assert confusion.shape == (3, columns)
        assert confusion.dtype == torch.int64
        assert not confusion.any()
        assert iou_from_confusion(confusion).isnan().all()
        assert iou_from_confusion(confusion, absent="nan").isnan().all()


@pytest.mark.parametrize(("dtype", "num_classes"), [(torch.int64, 300), (torch.uint8, 250)])
def test_many_classes(dtype, num_classes):
    labels = torch.arange(num_classes, dtype=dtype).view(1, -1, 10)
    confusion = confusion_matrix(labels, labels, num_classes, ignore_index=-1)
    assert torch.equal(confusion, torch.eye(num_classes, dtype=torch.int64))


@given(label_maps())
def test_matches_numpy(maps):
    mask, truth = maps
    expected = np.zeros((5, 5), dtype=np.int64)
    kept = truth.numpy() != 255
    np.add.at(expected, (truth.numpy()[kept], mask.numpy()[kept]), 1)
    assert np.array_equal(confusion_matrix(mask, truth, 5).numpy(), expected)


@given(label_maps(), st.permutations(range(5)))
def test_properties(maps, order):
    mask, truth = maps
    confusion = confusion_matrix(mask, truth, 5)
    assert confusion.sum() == (truth != 255).sum()
    singles = [confusion_matrix(m[None], t[None], 5) for m, t in zip(mask, truth, strict=True)]
    assert torch.equal(confusion, sum(singles))
    assert torch.equal(confusion, confusion_matrix(mask.flip(-1), truth.flip(-1), 5))
    renamed = torch.tensor(order)
    there = confusion_matrix(renamed[mask], torch.where(truth == 255, 255, renamed[truth.clamp(max=4)]), 5)
    assert torch.equal(there[renamed][:, renamed], confusion)
    ignored = torch.where(truth == 255, (mask + 1) % 5, mask)  # the prediction does not matter there
    assert torch.equal(confusion, confusion_matrix(ignored, truth, 5))


@pytest.mark.parametrize("absent", ["skip", "nan"])
@given(maps=label_maps())
def test_shares_sum_to_one(absent, maps):
    confusion = confusion_matrix(*maps, 5)
    iou = iou_from_confusion(confusion, absent=absent)
    over, under = over_under_segmentation(confusion, absent=absent)
    kept = ~iou.isnan()
    assert torch.equal(kept, ~over.isnan())
    assert torch.equal(kept, ~under.isnan())
    true, predicted = confusion.sum(1) > 0, confusion.sum(0) > 0
    assert torch.equal(kept, true if absent == "skip" else true | predicted)
    torch.testing.assert_close((iou + over + under)[kept], torch.ones_like(iou[kept]), rtol=0, atol=1e-12)


def test_absent_by_hand():
    confusion = torch.tensor([[6, 2, 1, 0], [0, 3, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    skip, nan = iou_from_confusion(confusion), iou_from_confusion(confusion, absent="nan")
    assert skip.dtype == torch.float64
    torch.testing.assert_close(
        skip, torch.tensor([6 / 9, 3 / 5, torch.nan, torch.nan]).double(), equal_nan=True
    )
    torch.testing.assert_close(nan, torch.tensor([6 / 9, 3 / 5, 0, torch.nan]).double(), equal_nan=True)
    assert nan.nanmean() < skip.nanmean()


def test_leading_axes_and_large_counts():
    confusion = torch.randint(0, 2**40, (2, 3, 4, 4))
    together = iou_from_confusion(confusion)
    assert together.shape == (2, 3, 4)
    for i in range(2):
        for j in range(3):
            assert torch.equal(together[i, j], iou_from_confusion(confusion[i, j]))
    huge = torch.tensor([[2**50 + 1, 0], [1, 2**50]])
    assert iou_from_confusion(huge)[1] == 2**50 / (2**50 + 1)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_confusion_of_other_dtypes(dtype):
    confusion = torch.tensor([[64, 16], [32, 128]])
    assert torch.equal(iou_from_confusion(confusion.to(dtype)), iou_from_confusion(confusion))


@pytest.mark.parametrize("pred_ignore", ["background", "exclude", "wrong"])
def test_compiles_to_one_graph(pred_ignore):
    def score(mask, truth):
        return iou_from_confusion(confusion_matrix(mask, truth, 3, pred_ignore=pred_ignore))

    compiled = torch.compile(score, fullgraph=True, backend="eager")
    torch.testing.assert_close(
        compiled(UNSURE, UNSURE_TRUTH), score(UNSURE, UNSURE_TRUTH), rtol=0, atol=0, equal_nan=True
    )


def test_error_is_raised_under_compile_too():
    compiled = torch.compile(confusion_matrix, backend="eager")
    assert compiled(MASK, TRUTH, 3).tolist() == COUNTED
    with pytest.raises(ValueError, match="mask: ignore_index 255"):
        compiled(UNSURE, UNSURE_TRUTH, 3)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"mask": MASK.float()}, TypeError, "mask: expected an integer tensor, got a float32"),
        ({"mask": MASK.bool()}, TypeError, "mask: expected an integer tensor, got a bool"),
        ({"mask": MASK.numpy()}, TypeError, "mask: expected a tensor of shape"),
        ({"truth": TRUTH.double()}, TypeError, "truth: expected an integer tensor"),
        ({"mask": MASK[0]}, ValueError, r"mask: expected shape \(B, H, W\), got \(2, 3\)"),
        ({"truth": TRUTH[:, :, :2]}, ValueError, r"truth: .* with W=3 from mask, got \(2, 2, 2\)"),
        ({"truth": TRUTH[:1]}, ValueError, r"truth: .* with B=2 from mask, got \(1, 2, 3\)"),
        (
            {"mask": MASK + 1},
            ValueError,
            r"mask: expected classes 0\.\.2 .* \[3\] in 3 pixels of image 0, 1 .* row 1, column 2",
        ),
        ({"mask": MASK - 1}, ValueError, r"mask: expected classes .* got \[-1\]"),
        ({"truth": TRUTH - 2}, ValueError, r"truth: expected classes .* got \[-2, -1, 253\] in 8 pixels"),
        ({"num_classes": 2}, ValueError, r"mask: expected classes 0\.\.1"),
        ({"num_classes": 0}, ValueError, "num_classes: expected an integer >= 1, got 0"),
        ({"num_classes": 3.0}, ValueError, "num_classes: expected an integer >= 1, got 3.0"),
        ({"num_classes": True}, ValueError, "num_classes: expected an integer"),
        ({"num_classes": 300}, ValueError, r"ignore_index: expected an integer outside of 0\.\.299, got 255"),
        ({"ignore_index": 0}, ValueError, r"ignore_index: expected an integer outside of 0\.\.2, got 0"),
        ({"ignore_index": None}, ValueError, "ignore_index: expected an integer"),
        ({"pred_ignore": "drop"}, ValueError, r"pred_ignore: expected one of \['error', 'background', "),
        ({"mask": MASK.to("meta")}, TypeError, "mask: expected a dense tensor that holds values, got a meta"),
    ],
)
def test_errors(change, error, match):
    arguments = {"mask": MASK, "truth": TRUTH, "num_classes": 3} | change
    with pytest.raises(error, match=match):
        confusion_matrix(**arguments)


@pytest.mark.parametrize("function", [iou_from_confusion, over_under_segmentation])
@pytest.mark.parametrize(
    ("confusion", "absent", "error", "match"),
    [
        (torch.zeros(3), "skip", ValueError, r"confusion: expected shape \(\.\.\., N, M\), got \(3,\)"),
        (torch.zeros(3, 5), "skip", ValueError, r"confusion: expected shape .*N \+ 1\), got \(3, 5\)"),
        (torch.zeros(3, 2), "skip", ValueError, r"confusion: expected shape .*got \(3, 2\)"),
        (torch.zeros(0, 0), "skip", ValueError, r"confusion: expected shape .*got \(0, 0\)"),
        (torch.zeros(2, 2).bool(), "skip", TypeError, "confusion: expected counts, got .*bool"),
        (torch.tensor([[1, -1], [0, 2]]), "skip", ValueError, "confusion: expected counts >= 0"),
        (torch.full((2, 2), torch.nan), "skip", ValueError, "confusion: expected counts >= 0"),
        (torch.ones(2, 2), "drop", ValueError, r"absent: expected one of \['nan', 'skip'\], got 'drop'"),
    ],
)
def test_errors_of_rates(function, confusion, absent, error, match):
    with pytest.raises(error, match=match):
        function(confusion, absent=absent)


def test_matches_official_program(golden):
    case = golden("pmm/public_eval")
    confusion = sum(
        confusion_matrix(
            torch.from_numpy(case[f"i{j}_pred"])[None],
            torch.from_numpy(case[f"i{j}_gt"])[None],
            int(case["num_cls"]),
            pred_ignore="error",
        )
        for j in range(int(case["n_images"]))
    )
    iou = 100 * iou_from_confusion(confusion, absent="skip")
    expected = torch.from_numpy(case["png_iou"])
    torch.testing.assert_close(
        iou, expected.masked_fill(expected == -100, torch.nan), rtol=0, atol=1e-9, equal_nan=True
    )
    torch.testing.assert_close(
        iou.nanmean(), torch.tensor(float(case["png_miou"])).double(), rtol=0, atol=1e-5
    )
    # Class 3 is predicted, and nowhere true: the other convention counts it.
    assert iou_from_confusion(confusion, absent="nan")[3] == 0
