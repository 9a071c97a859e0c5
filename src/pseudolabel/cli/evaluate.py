"""`pseudolabel evaluate`: masks against truth."""

import argparse
import json
import math
import threading
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from pseudolabel import io
from pseudolabel.cli._console import (
    UserError,
    find_masks,
    in_threads,
    read_class_names,
    read_names,
    report_names,
    stdout,
)
from pseudolabel.cli._text import one_line
from pseudolabel.metrics import PseudoLabelMetric, PseudoLabelResult

__all__ = ["print_table", "run"]

Pair = tuple[Path, Path]


def run(args: argparse.Namespace) -> int:
    """Score the masks that have a truth; say which have none."""
    masks, truths = find_masks(args.masks), find_masks(args.truth)
    wanted = read_names(args.list) if args.list else sorted(masks.keys() | truths.keys())
    without_mask = [name for name in wanted if name not in masks]
    without_truth = [name for name in wanted if name not in truths]
    pairs = [(masks[name], truths[name]) for name in wanted if name in masks and name in truths]
    if not pairs:
        raise UserError(f"{args.masks}: no mask here goes by the name of a truth in {args.truth}")

    names = read_class_names(args.classes) if args.classes else None
    num_classes = args.num_classes or (len(names) if names else _largest_label(pairs, args.workers) + 1)
    if names and len(names) != num_classes:
        raise UserError(f"{args.classes}: expected {num_classes} names for --num-classes, got {len(names)}")
    metric = PseudoLabelMetric(
        num_classes, class_names=names, pred_ignore=args.pred_ignore, absent=args.absent
    )
    result = _score(metric, pairs, args.workers)

    report_names(without_mask, f"without a mask in {args.masks}, not scored")
    report_names(without_truth, f"without a truth in {args.truth}, not scored")
    if args.json:
        missing = {"without_mask": without_mask, "without_truth": without_truth}
        stdout().out(json.dumps(result.as_dict() | missing, indent=2, allow_nan=False))
    else:
        told = args.num_classes or names
        print_table(result, note="" if told else f"{num_classes} classes: the largest index found, and 0. ")
    return 1 if without_mask or without_truth else 0


def _read_pair(pair: Pair) -> tuple[Tensor, Tensor]:
    mask, truth = (io.read_mask(path) for path in pair)
    if mask.shape != truth.shape:
        raise UserError(
            f"{pair[0]}: the mask has size {tuple(mask.shape)} (height, width), its truth {pair[1]} has "
            f"{tuple(truth.shape)}"
        )
    return mask[None], truth[None]


def _largest_label(pairs: Sequence[Pair], workers: int) -> int:
    """The largest class index of all masks and truths, 255 aside."""

    def largest(pair: Pair) -> int:
        return max(int(label_map.masked_fill(label_map == 255, 0).max()) for label_map in _read_pair(pair))

    return max(in_threads(largest, pairs, workers=workers, description="count the classes"))


def _score(metric: PseudoLabelMetric, pairs: Sequence[Pair], workers: int) -> PseudoLabelResult:
    lock = threading.Lock()

    def count(pair: Pair) -> None:
        mask, truth = _read_pair(pair)
        try:
            with lock:  # decoding takes the time; counts of single images would take the memory
                metric.update(mask, truth)
        except ValueError as error:
            raise UserError(f"{pair[0]}, with truth {pair[1]}: {error}") from error

    in_threads(count, pairs, workers=workers, description="score")
    return metric.compute(sync=False)


def print_table(result: PseudoLabelResult, note: str = "") -> None:
    """Print the figures of each class, their means, and the conventions they follow."""
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    absent = {
        "skip": "without a true pixel",
        "nan": "that are neither true nor predicted anywhere",
    }[result.absent]
    ignored = {
        "error": "is an error",
        "background": "counts as background",
        "exclude": "is not counted",
        "wrong": "counts as a miss",
    }[result.pred_ignore]
    table = Table(title=f"{result.num_images} images")
    table.add_column("class")
    for column in ("IoU", "over", "under"):
        table.add_column(column, justify="right")
    for name, *figures in zip(
        result.class_names, result.iou.tolist(), result.over.tolist(), result.under.tolist(), strict=True
    ):
        told = ("-" if math.isnan(figure) else f"{figure:.3f}" for figure in figures)
        table.add_row(Text(one_line(name)), *told)
    table.add_section()
    means = (result.iou, result.over, result.under)
    table.add_row("mean (mIoU)", *(f"{float(mean.nanmean()):.3f}" for mean in means), style="bold")
    stdout().print(table)
    stdout().print(
        f"IoU + over + under = 1, of the pixels of all images. Truth {result.ignore_index} is not counted, "
        f"{result.ignore_index} in a mask {ignored}. The mean leaves out classes {absent}. {note}".strip()
    )
