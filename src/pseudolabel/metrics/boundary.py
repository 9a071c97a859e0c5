"""Boundary quality of label maps."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pseudolabel._checks import (
    check_choice,
    check_classes,
    check_integer,
    check_number,
    check_shapes,
    describe_pixels,
)
from pseudolabel.metrics.confusion import Absent, count

__all__ = ["boundary_counts", "boundary_f_from_counts"]


def boundary_counts(
    mask: Tensor,
    truth: Tensor,
    num_classes: int,
    *,
    radius: float = 3,
    ring: int = 5,
    ignore_index: int = 255,
) -> Tensor:
    """Count the boundary pixels of each class, and those that the other map has nearby.

    A boundary pixel of class c is a pixel of class c with a neighbour above, below, left or right that has
    another class; what lies outside the image is no neighbour, so an object that the frame cuts off has no
    boundary there. It is matched if the other map has a boundary pixel of the same class at a Euclidean
    distance of at most ``radius``.

    VOC truth has ignored pixels of two kinds: a ring, 5 wide, round each object, with the boundary somewhere
    in it, and regions that nobody could label. A region is where a disk of radius ``ring`` fits into the
    ignored pixels (their morphological opening); the rest is ring.

    - Ring pixels are given the label of the nearest labelled pixel, the lowest label at a tie. That puts the
      true boundary in the middle of the ring.
    - A region has no true boundary, neither inside nor against its surroundings. Boundary pixels that are
      predicted in it or at most ``radius`` away are not counted, though they match true ones beside it.

    Counts of batches add up to those of the set, from which `boundary_f_from_counts` computes F.

    Args:
        mask: Predicted label map (B,H,W), any integer dtype, classes `0..num_classes-1` only.
        truth: Ground truth (B,H,W): classes, or ``ignore_index``.
        num_classes: Number of classes, the background included.
        radius: Tolerance in pixels, >= 0.
        ring: Radius in pixels above which ignored pixels of the truth are a region, >= 0; 0 for a truth
            without rings.
        ignore_index: Label of true pixels without a class.

    Returns:
        Counts (num_classes, 4) int64, columns: predicted boundary pixels matched, predicted, true boundary
        pixels matched, true.

    Raises:
        TypeError: If ``mask`` or ``truth`` is not an integer tensor.
        ValueError: If they differ in shape or hold other values, if ``mask`` holds ``ignore_index``, or if a
            setting is out of range.

    Examples:
        >>> import torch
        >>> truth = torch.tensor([[[0, 0, 0, 1, 1, 1]]])
        >>> mask = torch.tensor([[[0, 0, 1, 1, 1, 1]]])
        >>> boundary_counts(mask, truth, num_classes=2, radius=0)
        tensor([[0, 1, 0, 1],
                [0, 1, 0, 1]])
        >>> boundary_counts(mask, truth, num_classes=2, radius=1)
        tensor([[1, 1, 1, 1],
                [1, 1, 1, 1]])
    """
    check_shapes(mask=(mask, "B H W"), truth=(truth, "B H W"))
    check_classes(num_classes, ignore_index, mask=mask, truth=truth)
    check_number("radius", radius, at_least=0, at_most=127)
    check_number("ring", ring, at_least=0, at_most=127)
    ring = int(ring)
    mask, truth = mask.long(), truth.long()
    unlabelled = mask == ignore_index
    if bool(unlabelled.any()):
        raise ValueError(
            f"mask: expected classes only, got ignore_index {ignore_index} in {describe_pixels(unlabelled)}; "
            "a region without a label has no boundary: give it a class first"
        )
    truth, region = _fill_ring(truth, ring, num_classes, ignore_index)
    predicted_edge, true_edge = _edges(mask, torch.zeros_like(region)), _edges(truth, region)
    counted = ~_near(region, radius)

    # One plane for each (image, class) that has a boundary in either map.
    first = num_classes * torch.arange(len(mask), device=mask.device)[:, None, None]
    edges = torch.cat([(first + mask)[predicted_edge], (first + truth)[true_edge]])
    pair = count(edges, len(mask) * num_classes).nonzero()[:, 0]
    image, label = pair // num_classes, (pair % num_classes)[:, None, None]
    predicted = (mask[image] == label) & predicted_edge[image]
    true = (truth[image] == label) & true_edge[image]

    scored = predicted & counted[image]
    columns = [scored & _near(true, radius), scored, true & _near(predicted, radius), true]
    of_planes = torch.stack([column.sum((1, 2)) for column in columns], dim=1)
    return of_planes.new_zeros(num_classes, 4).index_add(0, label.flatten(), of_planes)


def boundary_f_from_counts(counts: Tensor, *, absent: Absent = "skip") -> Tensor:
    """F score of the boundary of each class, `F = 2 P R / (P + R)`.

    Precision `P` is the share of predicted boundary pixels that are matched, recall `R` the share of true
    ones (see `boundary_counts`). The mean over the classes is `f.nanmean(-1)`; a class counts 0 where one
    map has a boundary and the other has none, but for `skip` below.

    Args:
        counts: Counts (...,N,4) of `boundary_counts`, or a sum of them.
        absent: Classes that are left out: `skip`, those without a true boundary pixel; `nan`, those without a
            boundary pixel in either map.

    Returns:
        F (...,N) float64 in [0, 1], background first, NaN where left out.

    Raises:
        TypeError: If ``counts`` is not an integer tensor.
        ValueError: If ``counts`` is not (...,N,4).

    Examples:
        >>> import torch
        >>> boundary_f_from_counts(torch.tensor([[8, 10, 6, 10], [0, 5, 0, 0]]))
        tensor([0.6857,    nan], dtype=torch.float64)
    """
    check_shapes(counts=(counts, "... N 4"))
    check_integer(counts=counts)
    check_choice("absent", absent, Absent)
    predicted_matched, predicted, true_matched, true = counts.double().unbind(-1)
    precision = predicted_matched / predicted.clamp(min=1)
    recall = true_matched / true.clamp(min=1)
    f = 2 * precision * recall / (precision + recall).where(precision + recall > 0, 1)
    left_out = true == 0 if absent == "skip" else true + predicted == 0
    return f.masked_fill(left_out, torch.nan)


def _edges(label: Tensor, region: Tensor) -> Tensor:
    """Pixels of a (B,H,W) label map with a 4-neighbour of another label, both of them outside ``region``."""
    edge = torch.zeros_like(region)
    for axis in (1, 2):
        along, unknown, out = (x.movedim(axis, 0) for x in (label, region, edge))
        step = (along[1:] != along[:-1]) & ~unknown[1:] & ~unknown[:-1]
        out[1:] |= step
        out[:-1] |= step
    return edge


def _near(points: Tensor, radius: float) -> Tensor:
    """Pixels at a Euclidean distance of at most ``radius`` from a set pixel of their (H,W) plane."""
    far = torch.iinfo(torch.int16).max // 2
    cost = torch.where(points, 0, far).to(torch.int16)
    return _least_cost(cost, int(radius), far, weight=1) <= radius**2


def _fill_ring(truth: Tensor, ring: int, num_classes: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Label the ring by the nearest labelled pixel; also returns where the regions without truth are."""
    ignored = truth == ignore_index
    region = ignored & _near(~_near(~ignored, ring), ring)
    far = torch.iinfo(torch.int32).max // 2
    cost = torch.where(ignored, far, truth).to(torch.int32)
    nearest = _least_cost(cost, ring, far, weight=num_classes)  # label + num_classes * distance^2
    return torch.where(region, ignore_index, nearest.long() % num_classes), region


def _least_cost(cost: Tensor, reach: int, far: int, weight: int) -> Tensor:
    """For each pixel p, the minimum of `cost(q) + weight * |p - q|^2` over the square window of ``reach``.

    The squared distance is a sum over the axes, so one pass along each will do.
    """
    for axis, padding in ((1, (0, 0, reach, reach)), (2, (reach, reach))):
        padded = F.pad(cost, padding, value=far)
        for shift in range(-reach, reach + 1):
            moved = padded.narrow(axis, shift + reach, cost.shape[axis])
            cost = torch.minimum(cost, moved + weight * shift**2)
    return cost
