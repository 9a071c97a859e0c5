"""Scores of pseudo labels, gathered over a data set."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch import distributed as dist

from pseudolabel._checks import check_choice, check_classes
from pseudolabel.metrics.confusion import (
    Absent,
    PredIgnore,
    confusion_matrix,
    iou_from_confusion,
    over_under_segmentation,
)

__all__ = ["PseudoLabelMetric", "PseudoLabelResult"]


@dataclass(frozen=True, eq=False)
class PseudoLabelResult:
    """What `PseudoLabelMetric.compute` returns: figures of the whole set, and how they were counted.

    Attributes:
        miou: Mean of ``iou`` over the classes that are not left out.
        iou: IoU of each class (num_classes,) float64, background first, NaN where left out.
        over: Over-segmentation `FP / union` of each class, likewise.
        under: Under-segmentation `FN / union` of each class, likewise.
        pixel_accuracy: Share of the counted pixels that are labelled right.
        confusion: The counts, rows true, columns predicted classes.
        num_images: Number of images counted.
        class_names: Names of the classes, background first.
        absent: Which classes are left out, see `iou_from_confusion`.
        pred_ignore: What an ignored pixel in a prediction meant, see `confusion_matrix`.
        ignore_index: Label of the pixels that are not counted.
    """

    miou: float
    iou: Tensor
    over: Tensor
    under: Tensor
    pixel_accuracy: float
    confusion: Tensor
    num_images: int
    class_names: tuple[str, ...]
    absent: Absent
    pred_ignore: PredIgnore
    ignore_index: int

    def as_dict(self) -> dict[str, Any]:
        """The result in plain Python types, figures of classes under their names, None for NaN (for JSON)."""

        def by_class(figures: Tensor) -> dict[str, float | None]:
            return dict(zip(self.class_names, map(_none_for_nan, figures.tolist()), strict=True))

        return {
            "miou": _none_for_nan(self.miou),
            "pixel_accuracy": _none_for_nan(self.pixel_accuracy),
            "iou": by_class(self.iou),
            "over": by_class(self.over),
            "under": by_class(self.under),
            "confusion": self.confusion.tolist(),
            "num_images": self.num_images,
            "absent": self.absent,
            "pred_ignore": self.pred_ignore,
            "ignore_index": self.ignore_index,
        }


class PseudoLabelMetric:
    """IoU, over- and under-segmentation of label maps over a data set.

    The state is one confusion matrix in int64 (see `confusion_matrix`), so the figures are those of the whole
    set, whatever the batches; images of different sizes come in calls of their own.

    Args:
        num_classes: Number of classes, the background included.
        class_names: Their names, background first; "background", "class 1", ... by default.
        ignore_index: Label of the true pixels that are not counted.
        pred_ignore: What ``ignore_index`` in a prediction means, see `confusion_matrix`.
        absent: Which classes the mIoU leaves out, see `iou_from_confusion`.

    Raises:
        ValueError: If a setting is out of range.

    Examples:
        >>> import torch
        >>> metric = PseudoLabelMetric(3, class_names=["background", "cat", "dog"])
        >>> metric.update(mask=torch.tensor([[[0, 1], [0, 1]]]), truth=torch.tensor([[[0, 1], [0, 0]]]))
        >>> metric.update(mask=torch.tensor([[[2, 2, 2]]]), truth=torch.tensor([[[0, 2, 255]]]))
        >>> result = metric.compute()
        >>> result.iou
        tensor([0.5000, 0.5000, 0.5000], dtype=torch.float64)
        >>> result.miou, result.num_images
        (0.5, 2)
    """

    def __init__(
        self,
        num_classes: int,
        *,
        class_names: Sequence[str] | None = None,
        ignore_index: int = 255,
        pred_ignore: PredIgnore = "error",
        absent: Absent = "skip",
    ) -> None:
        check_classes(num_classes, ignore_index)
        check_choice("pred_ignore", pred_ignore, PredIgnore)
        check_choice("absent", absent, Absent)
        if class_names is None:
            class_names = ["background", *(f"class {k}" for k in range(1, num_classes))]
        if (
            isinstance(class_names, str)
            or len(class_names) != num_classes
            or len(set(class_names)) != num_classes
        ):
            raise ValueError(
                f"class_names: expected {num_classes} different names, background first, got {class_names!r}"
            )
        self.num_classes = num_classes
        self.class_names = tuple(class_names)
        self.ignore_index = ignore_index
        self.pred_ignore: PredIgnore = pred_ignore
        self.absent: Absent = absent
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        self._num_images = 0
        self._confusion: Tensor | None = None

    def update(self, mask: Tensor, truth: Tensor) -> None:
        """Count a batch: ``mask`` and ``truth`` (B,H,W), as `confusion_matrix` takes them."""
        confusion = confusion_matrix(
            mask, truth, self.num_classes, ignore_index=self.ignore_index, pred_ignore=self.pred_ignore
        )
        self._add(confusion, len(mask))

    def merge(self, other: Self) -> None:
        """Add the images that another metric of the same settings has counted."""
        if not isinstance(other, PseudoLabelMetric):
            raise TypeError(f"other: expected a PseudoLabelMetric, got {type(other).__name__}")
        for setting in ("num_classes", "class_names", "ignore_index", "pred_ignore"):
            ours, theirs = getattr(self, setting), getattr(other, setting)
            if ours != theirs:
                raise ValueError(f"other: expected {setting} {ours!r} as here, got {theirs!r}")
        if other._confusion is not None:
            self._add(other._confusion, other._num_images)

    def _add(self, confusion: Tensor, num_images: int) -> None:
        if self._confusion is not None:
            confusion = self._confusion + confusion.to(self._confusion.device)
        self._confusion = confusion
        self._num_images += num_images

    def compute(self, *, sync: bool = True) -> PseudoLabelResult:
        """Compute the figures of all images so far.

        Args:
            sync: Sum over the processes first, where a `torch.distributed` process group is initialised (then
                every process has to call). The state itself stays that of this process.

        Returns:
            The figures, and the conventions they were counted by.

        Raises:
            RuntimeError: If no image has been counted.
        """
        columns = self.num_classes + (self.pred_ignore == "wrong")
        confusion = self._confusion
        if confusion is None:
            confusion = torch.zeros(self.num_classes, columns, dtype=torch.int64, device="cpu")
        num_images = self._num_images
        if sync and dist.is_available() and dist.is_initialized():
            confusion, num_images = _sum_over_processes(confusion, num_images)
        if num_images == 0:
            raise RuntimeError("compute: no image has been counted; call update first")

        iou = iou_from_confusion(confusion, absent=self.absent)
        over, under = over_under_segmentation(confusion, absent=self.absent)
        total = int(confusion.sum())
        return PseudoLabelResult(
            miou=float(iou.nanmean()),
            iou=iou,
            over=over,
            under=under,
            pixel_accuracy=int(confusion.diagonal().sum()) / total if total else math.nan,
            confusion=confusion.clone(),
            num_images=num_images,
            class_names=self.class_names,
            absent=self.absent,
            pred_ignore=self.pred_ignore,
            ignore_index=self.ignore_index,
        )


def _sum_over_processes(confusion: Tensor, num_images: int) -> tuple[Tensor, int]:
    """Sum the state over the processes of the default group, in one message and on copies."""
    message = torch.cat([confusion.flatten(), confusion.new_tensor([num_images])])
    if dist.get_backend() == "nccl":
        message = message.cuda()  # a process that has counted nothing has its zeros on the CPU
    dist.all_reduce(message)
    message = message.to(confusion.device)
    return message[:-1].view_as(confusion), int(message[-1])


def _none_for_nan(figure: float) -> float | None:
    return None if math.isnan(figure) else figure
