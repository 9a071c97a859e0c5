"""From label maps and truth to figures, all of them sums over a whole data set."""

from pseudolabel.metrics.background_sweep import background_sweep
from pseudolabel.metrics.boundary import boundary_counts, boundary_f_from_counts
from pseudolabel.metrics.confusion import confusion_matrix, iou_from_confusion, over_under_segmentation
from pseudolabel.metrics.pseudo_label_metric import PseudoLabelMetric, PseudoLabelResult

__all__ = [
    "PseudoLabelMetric",
    "PseudoLabelResult",
    "background_sweep",
    "boundary_counts",
    "boundary_f_from_counts",
    "confusion_matrix",
    "iou_from_confusion",
    "over_under_segmentation",
]
