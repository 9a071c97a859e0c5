import copy
import json
import math
import subprocess
import sys
import textwrap

import pytest
import torch

from pseudolabel.metrics import (
    PseudoLabelMetric,
    confusion_matrix,
    iou_from_confusion,
    over_under_segmentation,
)

NAMES = ["background", "cat", "dog"]


def batches(generator, sizes=((2, 5, 6), (1, 3, 4), (3, 2, 2))):
    for size in sizes:
        truth = torch.randint(0, 4, size, generator=generator)
        yield torch.randint(0, 3, size, generator=generator), truth.masked_fill(truth == 3, 255)


def test_figures_are_those_of_the_whole_set(generator, device):
    metric, whole = PseudoLabelMetric(3, class_names=NAMES), 0
    for mask, truth in batches(generator):
        metric.update(mask.to(device), truth.to(device))
        whole = whole + confusion_matrix(mask, truth, 3)
    result = metric.compute()
    over, under = over_under_segmentation(whole)
    assert result.confusion.device.type == device.type
    assert torch.equal(result.confusion.cpu(), whole)
    assert torch.equal(result.iou.cpu(), iou_from_confusion(whole))
    assert torch.equal(result.over.cpu(), over)
    assert torch.equal(result.under.cpu(), under)
    assert result.miou == pytest.approx(float(iou_from_confusion(whole).mean()), abs=1e-12)
    assert result.pixel_accuracy == int(whole.diagonal().sum()) / int(whole.sum())
    assert result.num_images == 6
    assert result.class_names == tuple(NAMES)


def test_is_not_the_mean_over_images():
    metric = PseudoLabelMetric(2)
    metric.update(torch.tensor([[[1, 1, 1, 1]]]), torch.tensor([[[1, 1, 1, 1]]]))
    metric.update(torch.tensor([[[1, 0]]]), torch.tensor([[[0, 1]]]))
    assert metric.compute().iou.tolist() == [0, 4 / 6]


def test_conventions_are_passed_on_and_stated():
    mask, truth = torch.tensor([[[0, 255, 2, 1]]]), torch.tensor([[[0, 1, 0, -7]]])
    truth = truth.masked_fill(truth == -7, 255)
    expected = {
        ("background", "skip"): [1 / 3, 0, None],
        ("exclude", "skip"): [1 / 2, None, None],
        ("exclude", "nan"): [1 / 2, None, 0],
        ("wrong", "skip"): [1 / 2, 0, None],
        ("wrong", "nan"): [1 / 2, 0, 0],
    }
    for (pred_ignore, absent), iou in expected.items():
        metric = PseudoLabelMetric(3, pred_ignore=pred_ignore, absent=absent)
        metric.update(mask, truth)
        result = metric.compute()
        assert list(result.as_dict()["iou"].values()) == iou
        assert (result.pred_ignore, result.absent, result.ignore_index) == (pred_ignore, absent, 255)
        assert torch.equal(result.over.isnan(), result.iou.isnan())
        assert torch.equal(result.under.isnan(), result.iou.isnan())
        counted = 2 if pred_ignore == "exclude" else 3
        assert result.pixel_accuracy == 1 / counted


def test_as_dict_is_valid_json():
    metric = PseudoLabelMetric(3, class_names=NAMES)
    metric.update(torch.tensor([[[0, 1]]]), torch.tensor([[[0, 1]]]))
    figures = json.loads(json.dumps(metric.compute().as_dict(), allow_nan=False))
    assert figures["iou"] == {"background": 1, "cat": 1, "dog": None}
    assert figures["over"] == figures["under"] == {"background": 0, "cat": 0, "dog": None}
    assert figures["miou"] == figures["pixel_accuracy"] == 1
    assert figures["confusion"] == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert figures["num_images"] == 1


def test_merge_and_reset(generator):
    together, left, right = (PseudoLabelMetric(3) for _ in range(3))
    for turn, (mask, truth) in enumerate(batches(generator)):
        together.update(mask, truth)
        (right if turn else left).update(mask, truth)
    before = right.compute().confusion
    left.merge(right)
    left.merge(PseudoLabelMetric(3))  # nothing counted there
    assert torch.equal(left.compute().confusion, together.compute().confusion)
    assert left.compute().num_images == together.compute().num_images
    left.update(mask, truth)
    assert torch.equal(right.compute().confusion, before)

    empty = PseudoLabelMetric(3)
    empty.merge(right)
    empty.update(mask, truth)
    assert torch.equal(right.compute().confusion, before)

    left.reset()
    with pytest.raises(RuntimeError, match="compute: no image has been counted; call update first"):
        left.compute()


def test_result_does_not_change_with_later_updates():
    metric = PseudoLabelMetric(2)
    mask = torch.tensor([[[0, 1]]])
    metric.update(mask, mask)
    result = metric.compute()
    copied = copy.deepcopy(metric)
    result.confusion.add_(7)
    metric.update(mask, mask)
    assert metric.compute().confusion.tolist() == [[2, 0], [0, 2]]
    assert copied.compute().confusion.tolist() == [[1, 0], [0, 1]]


def test_bad_update_leaves_the_state_alone():
    metric = PseudoLabelMetric(2)
    mask = torch.tensor([[[0, 1]]])
    metric.update(mask, mask)
    with pytest.raises(ValueError, match="mask: ignore_index 255 is predicted"):
        metric.update(torch.full_like(mask, 255), mask)
    assert metric.compute().num_images == 1


def test_everything_ignored():
    metric = PseudoLabelMetric(2)
    metric.update(torch.zeros(1, 2, 2).long(), torch.full((1, 2, 2), 255))
    result = metric.compute()
    assert math.isnan(result.miou)
    assert math.isnan(result.pixel_accuracy)
    assert result.as_dict()["miou"] is None


def test_default_names():
    assert PseudoLabelMetric(3).class_names == ("background", "class 1", "class 2")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"num_classes": 0}, "num_classes: expected an integer >= 1"),
        ({"class_names": ["background", "cat"]}, "class_names: expected 3 different names, background first"),
        ({"class_names": ["background", "cat", "cat"]}, "class_names: expected 3 different names"),
        ({"class_names": "abc"}, "class_names: expected 3 different names"),
        ({"ignore_index": 1}, r"ignore_index: expected an integer outside of 0\.\.2"),
        ({"pred_ignore": "keep"}, "pred_ignore: expected one of"),
        ({"absent": "keep"}, "absent: expected one of"),
    ],
)
def test_bad_settings(settings, match):
    with pytest.raises(ValueError, match=match):
        PseudoLabelMetric(**{"num_classes": 3} | settings)


def test_bad_merge():
    metric = PseudoLabelMetric(3)
    with pytest.raises(TypeError, match="other: expected a PseudoLabelMetric, got dict"):
        metric.merge({})
    with pytest.raises(ValueError, match="other: expected pred_ignore 'error' as here, got 'wrong'"):
        metric.merge(PseudoLabelMetric(3, pred_ignore="wrong"))
    with pytest.raises(ValueError, match="other: expected num_classes 3 as here, got 4"):
        metric.merge(PseudoLabelMetric(4))
    with pytest.raises(ValueError, match="other: expected class_names"):
        metric.merge(PseudoLabelMetric(3, class_names=NAMES))


WORKER = """
    import sys
    import torch
    from torch import distributed as dist
    from pseudolabel.metrics import PseudoLabelMetric

    rank, store = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    metric = PseudoLabelMetric(2, pred_ignore="wrong")
    if rank == 0:  # the other one has an empty share
        metric.update(torch.tensor([[[0, 1, 1, 255]]]), torch.tensor([[[0, 0, 1, 1]]]))
    first, second = metric.compute(), metric.compute()
    assert first.num_images == second.num_images == 1
    assert first.confusion.tolist() == second.confusion.tolist() == [[1, 1, 0], [0, 1, 1]]

    metric.update(torch.tensor([[[0, 1]]] * 2), torch.tensor([[[1, 1]]] * 2))
    assert metric.compute().confusion.tolist() == [[1, 1, 0], [4, 5, 1]]
    assert metric.compute().num_images == 5
    alone = metric.compute(sync=False)
    assert alone.num_images == (3 if rank == 0 else 2)
    assert alone.confusion.tolist() == ([[1, 1, 0], [2, 3, 1]] if rank == 0 else [[0, 0, 0], [2, 2, 0]])
    dist.destroy_process_group()
"""


@pytest.mark.skipif(
    not torch.distributed.is_available() or sys.platform == "win32",
    reason="needs torch.distributed with gloo",
)
def test_sums_over_processes(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(WORKER)]
    workers = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        errors = [worker.communicate(timeout=120)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(errors)
