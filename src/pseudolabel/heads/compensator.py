"""Compensator: maps take over what looks alike in the batch, and the classifier follows them."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pseudolabel._checks import (
    check_choice,
    check_finite,
    check_float,
    check_labels,
    check_number,
    check_shapes,
)
from pseudolabel._maps import stretch, working_dtype
from pseudolabel.cam import normalize_cam
from pseudolabel.heads.cross_transform import CTROutput, TopK, _check_scores, _pixel_rows
from pseudolabel.refine import keep_max_class

__all__ = ["Compensator", "compensate", "compensation_loss"]

Reduction = Literal["mean", "sum", "none"]


def compensate(
    scores: Tensor, features: Tensor, topk: TopK, present: Tensor, *, temperature: float = 1.0
) -> Tensor:
    """Add to the score of each pixel those of the most confident pixels, by likeness.

        a[i,j]       = softmax over the pixels j of topk[k] of cos(X_i, X_j) / temperature
        new score_ki = score_ki + sum_j a[i,j] score_kj

    for each class k that an image of the batch shows; the scores of the others stay. What is added lies
    between the lowest and the highest of the ``topk`` values, and comes from all images of the batch.

    The cosines of features after a ReLU lie in [0, 1], so that at the official temperature of 1 all pixels
    have nearly the same weights: what is added is nearly a constant, which the normalisation of
    `compensation_loss` takes away again. In a simulation at the official sizes it varied over the pixels by
    a standard deviation of 0.0005 to 0.001, and moved the target by 0.001 on average. Temperatures of 0.02
    to 0.1 make it vary by 0.01 to 0.04; such a setting is ours, not the paper's.

    Args:
        scores: Scores (B,1+C,h,w), background first: `confidence_scores`.
        features: Features `X` (B,D,h,w) on the same grid, of the *other* view.
        topk: What `topk_pixels` chose of ``scores``.
        present: Classes (1+C,) that an image of the batch shows, the background among them.
        temperature: Divisor of the cosines, > 0. Official: 1.

    Returns:
        Scores (B,1+C,h,w), float32 or better, without a graph. Works on all classes at once, with
        `(1+C) k B h w` numbers.

    Raises:
        TypeError: If a tensor is not floating-point, or the indices not integer.
        ValueError: If shapes do not fit or ``temperature`` is not positive.

    Examples:
        >>> import torch
        >>> scores = torch.tensor([[[[0.8, 0.0, 0.4]]]])
        >>> features = torch.tensor([[[[1.0, 1.0, 0.0]], [[0.0, 0.0, 1.0]]]])  # the first two are alike
        >>> topk = TopK(torch.tensor([[0.8, 0.4]]), torch.tensor([[0, 2]]))
        >>> compensate(scores, features, topk, torch.tensor([True]), temperature=0.02)
        tensor([[[[1.6000, 0.8000, 0.8000]]]])

    Source:
        As `Compensator`.
    """
    sizes = check_shapes(scores=(scores, "B K h w"), features=(features, "B D h w"), present=(present, "K"))
    check_float(scores=scores)
    check_number("temperature", temperature, above=0)
    check_shapes(present=(present, "K"), **{"topk.values": (topk.values, "K k")})
    if present.device.type == "cpu":  # accelerators would have to be waited for
        check_labels(present, "present")
    rows = _pixel_rows(features, topk)
    with torch.autocast(scores.device.type, enabled=False):
        unit = F.normalize(rows, dim=1)
        cosine = torch.einsum("kjd,pd->kpj", unit[topk.indices], unit)
        values = topk.values.detach().to(rows.dtype)
        added = torch.einsum("kpj,kj->kp", (cosine / temperature).softmax(2), values)
    added = added.where((present != 0)[:, None], 0).view(-1, sizes["B"], sizes["h"], sizes["w"])
    return scores.detach() + added.movedim(0, 1)


def compensation_loss(
    cam: Tensor,
    compensated: Tensor,
    labels: Tensor,
    *,
    keep_ratio: float = 0.8,
    reduction: Reduction = "mean",
) -> Tensor:
    """Mean of the larger differences between the maps of a classifier and the compensated ones.

    With `W` that keeps the largest class of each pixel and sets the others to 0 (`keep_max_class`), and the
    compensated maps normalised by `minmax-zero` and stretched to those of the classifier:

        loss = mean of the floor(keep_ratio C H W) largest |W(compensated) - W(cam)| of an image, one at least

    The gradient flows to ``cam`` alone, there to the winning classes: it is the reverse of
    `losses.equivariant_cross_loss`, in which the refined maps learn.

    Args:
        cam: Maps (B,C,H,W) in [0, 1], foreground classes only, by `normalize_cam(cam, "minmax-zero")`.
        compensated: Scores (B,1+C,h,w) of `compensate`, background first, which is not used.
        labels: Image-level labels (B,C); maps of absent classes count as 0 on both sides.
        keep_ratio: Share of the values of an image that enter its mean, those of absent classes counted, in
            (0, 1]. Official: 0.8.
        reduction: `mean` or `sum` over the images, or `none` for the loss of each image (B,).

    Returns:
        The loss, a scalar or (B,), float32 or better. A batch without an image gives 0 with a graph.

    Raises:
        TypeError: If maps are not floating-point.
        ValueError: If shapes do not fit, ``labels`` are not multi-hot, or a setting is out of range.

    Examples:
        >>> import torch
        >>> cam = torch.tensor([[[[0.7, 0.5, 0.0]], [[0.2, 0.6, 0.0]]]])  # winners 0.7 and 0.6
        >>> compensated = torch.tensor([[[[0.2, 0.2, 0.2]], [[2.0, 1.0, 1.0]], [[1.0, 1.0, 1.0]]]])
        >>> compensation_loss(cam, compensated, torch.tensor([[1, 1]]), keep_ratio=0.5)  # (0.3 + 0.6 + 0) / 3
        tensor(0.3000)

    Source:
        As `Compensator`.
    """
    _check_scores("compensated", compensated)
    check_shapes(cam=(cam, "B C H W"), compensated=(compensated[:, 1:], "B C h w"), labels=(labels, "B C"))
    check_float(cam=cam)
    check_number("keep_ratio", keep_ratio, above=0, at_most=1)
    check_choice("reduction", reduction, Reduction)
    if labels.device.type == "cpu":  # accelerators would have to be waited for
        check_labels(labels)
        check_finite(cam=cam, compensated=compensated)  # a NaN would not be among the largest
    target = normalize_cam(compensated.detach()[:, 1:].to(working_dtype(compensated)), "minmax-zero")
    target = stretch(target, (cam.shape[2], cam.shape[3]))
    difference = (_winners(target, labels) - _winners(cam.to(working_dtype(cam)), labels)).abs().flatten(1)
    count = max(1, int(keep_ratio * difference.shape[1]))
    loss = difference.topk(count, dim=1, sorted=False).values.mean(1)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / max(len(loss), 1)


def _winners(maps: Tensor, labels: Tensor) -> Tensor:
    """The largest of the present classes of each pixel in (B,C,H,W) maps, the others 0."""
    maps = maps.where((labels != 0)[:, :, None, None], 0)
    return keep_max_class(F.pad(maps, (0, 0, 0, 0, 1, 0)))[:, 1:]


class Compensator(nn.Module):
    """Sends what two views and the whole batch know back to the maps of the classifier.

        loss = compensation_loss(cam1, compensate(s1, X2)) + compensation_loss(cam2, compensate(s2, X1))

    The prototypes and features come from `CrossTransformRegularization`, crossed as there. At the official
    temperature of 1 the compensation is close to nothing (see `compensate`), and the loss is in effect that
    the maps should agree with the refined ones.

    Args:
        temperature: See `compensate`.
        keep_ratio: See `compensation_loss`.

    Raises:
        ValueError: If a setting is out of range.

    Examples:
        >>> import torch
        >>> from pseudolabel.heads import CrossTransformRegularization
        >>> labels, cam1, cam2 = torch.eye(3)[:2], torch.rand(2, 3, 48, 72), torch.rand(2, 3, 48, 72)
        >>> refined, features = torch.rand(2, 2, 4, 6, 9), torch.rand(2, 2, 8, 6, 9)
        >>> ctr = CrossTransformRegularization()(*refined, *features, labels)
        >>> Compensator()(cam1, cam2, ctr, labels).shape
        torch.Size([])

    Source:
        Wang, Zhang and Yan, "Boosting Weakly-Supervised Image Segmentation via Representation, Transform, and
        Compensator" (RTC), 2023 (IEEE TCSVT 2024), its compensator. Formulas and defaults are read off the
        training loop of the official implementation at 9c777e0, which this matches, values and gradients; of
        the paper the abstract and the overview figure were at hand.
    """

    def __init__(self, *, temperature: float = 1.0, keep_ratio: float = 0.8) -> None:
        super().__init__()
        check_number("temperature", temperature, above=0)
        check_number("keep_ratio", keep_ratio, above=0, at_most=1)
        self.temperature = temperature
        self.keep_ratio = keep_ratio

    def forward(self, cam1: Tensor, cam2: Tensor, ctr: CTROutput, labels: Tensor) -> Tensor:
        """Loss of the normalised maps (B,C,H,W) of both views, by labels (B,C)."""
        loss1 = self._loss(cam1, ctr.scores1, ctr.features2, ctr.topk1, labels)
        loss2 = self._loss(cam2, ctr.scores2, ctr.features1, ctr.topk2, labels)
        return loss1 + loss2

    def _loss(self, cam: Tensor, scores: Tensor, features: Tensor, topk: TopK, labels: Tensor) -> Tensor:
        present = F.pad((labels != 0).any(0), (1, 0), value=True)
        compensated = compensate(scores, features, topk, present, temperature=self.temperature)
        return compensation_loss(cam, compensated, labels, keep_ratio=self.keep_ratio)

    def extra_repr(self) -> str:
        """Settings, for `print`."""
        return f"temperature={self.temperature}, keep_ratio={self.keep_ratio}"
