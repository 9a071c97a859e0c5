"""The background sweep in one pass against one evaluation a threshold.

    python benchmarks/background_sweep.py

Times are CPU seconds of one thread. The ways take turns in one process; a figure is the median over the
turns, a ratio the median of the ratios within a turn. All ways have to give the same counts.
"""

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pseudolabel.metrics import background_sweep, confusion_matrix

THRESHOLDS = [0.01 * k for k in range(60)]
CASES = {"VOC, 20 classes, 375x500": (20, 375, 500), "COCO, 80 classes, 480x640": (80, 480, 640)}


def one_pass(cam: Tensor, truth: Tensor) -> Tensor:
    return background_sweep(cam, truth, THRESHOLDS)


def argmax_and_confusion(cam: Tensor, truth: Tensor) -> Tensor:
    """What a loop over the parts of this library does."""
    num_classes = 1 + cam.shape[1]
    masks = (torch.cat([torch.full_like(cam[:, :1], t), cam], dim=1).argmax(1) for t in THRESHOLDS)
    return torch.stack([confusion_matrix(mask, truth, num_classes) for mask in masks])


def argmax_and_numpy(cam: Tensor, truth: Tensor) -> Tensor:
    """What the evaluation scripts of the field do: numpy argmax and bincount."""
    scores = np.concatenate([np.zeros_like(cam[:, :1]), cam.numpy()], axis=1)
    labels, num_classes = truth.numpy(), scores.shape[1]
    kept = labels < 255
    confusions = []
    for t in THRESHOLDS:
        scores[:, 0] = t
        pair = num_classes * labels[kept] + scores.argmax(1)[kept]
        confusions.append(np.bincount(pair, minlength=num_classes**2).reshape(num_classes, num_classes))
    return torch.from_numpy(np.stack(confusions))


def winner_once(cam: Tensor, truth: Tensor) -> Tensor:
    """A careful loop: the winning class is found once, and only compared and counted each time."""
    num_classes = 1 + cam.shape[1]
    score, winner = cam.max(1)
    masks = (torch.where(score > t, winner + 1, 0) for t in torch.tensor(THRESHOLDS))
    return torch.stack([confusion_matrix(mask, truth, num_classes) for mask in masks])


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "`background_sweep`": one_pass,
    "60 x torch argmax + `confusion_matrix`": argmax_and_confusion,
    "60 x numpy argmax + `bincount`": argmax_and_numpy,
    "winner once, 60 x compare + `confusion_matrix`": winner_once,
}


def example(classes: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """An image with 3 present classes as smooth maps, the others zero, and a truth with ignored pixels."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 4, 12, 16, generator=generator)
    maps = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    cam = torch.zeros(1, classes, height, width)
    cam[:, [0, classes // 2, classes - 1]] = maps[:, :3]
    truth = torch.cat([maps[:, 3:] * 0.9, cam], dim=1).argmax(1)
    return cam, truth.masked_fill(torch.rand(truth.shape, generator=generator) < 0.05, 255)


def measure(cam: Tensor, truth: Tensor, turns: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    expected = one_pass(cam, truth)
    for _ in range(turns):
        for name, way in WAYS.items():
            start = time.process_time()
            confusion = way(cam, truth)
            seconds[name].append(time.process_time() - start)
            assert torch.equal(confusion, expected), name
    return seconds


def main(turns: int = 5) -> str:
    """Measure, print and return the table."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    lines = ["| 60 thresholds on one image | ms | times the sweep |", "|---|--:|--:|"]
    try:
        for case, sizes in CASES.items():
            seconds = measure(*example(*sizes), turns)
            sweep = seconds["`background_sweep`"]
            for name, times in seconds.items():
                ratio = statistics.median(slow / fast for slow, fast in zip(times, sweep, strict=True))
                lines.append(f"| {case}: {name} | {1000 * statistics.median(times):.0f} | {ratio:.1f} |")
    finally:
        torch.set_num_threads(threads)
    table = "\n".join(lines)
    print(table)
    return table


if __name__ == "__main__":
    main()
