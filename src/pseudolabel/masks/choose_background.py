"""Choose the background rule's setting on images whose truth is known."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pseudolabel._checks import check_choice, check_number
from pseudolabel.metrics import background_sweep, iou_from_confusion

__all__ = ["BackgroundChoice", "BackgroundRule", "choose_background"]

BackgroundRule = Literal["constant", "power"]

_CANDIDATES: dict[BackgroundRule, tuple[float, ...]] = {
    "constant": tuple(step / 100 for step in range(60)),  # the sweep of SEAM
    "power": (0.5, 0.7, 1, 1.4, 2, 2.8, 4, 5.6, 8, 11, 16, 24, 32),
}


@dataclass(frozen=True)
class BackgroundChoice:
    """The best setting of a background rule, and the curve that it was taken from.

    Attributes:
        rule: `constant` or `power`.
        value: The candidate with the highest mIoU (the first of equals).
        miou: Its mIoU on the images that it was chosen on, in [0, 1]. Not a score to report: score other
            images with ``value``.
        candidates: All candidates, in the order given.
        curve: mIoU of each candidate.
    """

    rule: BackgroundRule
    value: float
    miou: float
    candidates: tuple[float, ...]
    curve: tuple[float, ...]


def choose_background(
    scored: Iterable[tuple[Tensor, Tensor]],
    *,
    rule: BackgroundRule = "constant",
    candidates: Sequence[float] | None = None,
    absent: Literal["nan", "skip"] = "skip",
    ignore_index: int = 255,
) -> BackgroundChoice:
    """Choose the background score or exponent with the highest mIoU, in one pass over scored images.

    A threshold tuned on the images that it is then scored on flatters the method: let `scored` yield a
    subset, and score the others.

    A power background of exponent `a` labels a pixel as foreground where the highest map exceeds the root of
    `x = (1 - x)^a`, so both rules are thresholds, and one `background_sweep` tries all candidates.

    Args:
        scored: Pairs of normalised maps (B,C,H,W), in [0, 1] and 0 for absent classes, and truth (B,H,W).
        rule: `constant` chooses for `constant_background`, `power` for `power_background`.
        candidates: Values to try. By default 0 to 0.59 in steps of 0.01, or 13 exponents from 0.5 to 32.
        absent: How classes without a true pixel count in mIoU, see `iou_from_confusion`.
        ignore_index: True label of the pixels that are not scored.

    Returns:
        The choice, with the whole curve.

    Raises:
        ValueError: If ``scored`` or ``candidates`` is empty, a candidate is out of range, or the maps do not
            fit the truth.

    Examples:
        >>> import torch
        >>> cam = torch.tensor([[[[0.1, 0.3, 0.8]]]])
        >>> choice = choose_background([(cam, torch.tensor([[[0, 0, 1]]]))], candidates=[0.05, 0.2, 0.5])
        >>> choice.value, choice.miou
        (0.5, 1.0)
    """
    check_choice("rule", rule, BackgroundRule)
    values = tuple(_CANDIDATES[rule] if candidates is None else candidates)
    if not values:
        raise ValueError("candidates: expected at least one value, got none")
    for value in values:
        check_number("candidates", value, at_least=0, at_most=1 if rule == "constant" else float("inf"))
    thresholds = torch.tensor(values, dtype=torch.float64, device="cpu")
    if rule == "power":
        thresholds = _foreground_threshold(thresholds)
    confusion = None
    for cam, truth in scored:
        batch = background_sweep(cam, truth, thresholds, ignore_index=ignore_index)
        confusion = batch if confusion is None else confusion + batch
    if confusion is None:
        raise ValueError("scored: expected pairs of maps and truth, got none")
    curve = iou_from_confusion(confusion, absent=absent).nanmean(-1)
    best = int(curve.nan_to_num(-1).argmax())
    return BackgroundChoice(rule, values[best], float(curve[best]), values, tuple(curve.tolist()))


def _foreground_threshold(alpha: Tensor) -> Tensor:
    """The root of x = (1 - x)^alpha in [0, 1], by bisection: 60 halvings reach double precision."""
    low, high = torch.zeros_like(alpha), torch.ones_like(alpha)
    for _ in range(60):
        middle = (low + high) / 2
        below = middle < (1 - middle) ** alpha
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return high
