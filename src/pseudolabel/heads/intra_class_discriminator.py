"""Intra-class discriminator: tells an object from its background among the images of one class.

Bottom-up, each class learns one direction in feature space without any pixel label; a superpixel refinement
makes its score constant over regions; top-down, a small network learns from the confident part of that.

The maps live on the grid of the features and a class costs one channel there, so that all classes are
computed and absent ones masked: no shape depends on the data.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from pseudolabel._checks import (
    check_choice,
    check_count,
    check_finite,
    check_float,
    check_labels,
    check_number,
    check_probability,
    check_shapes,
)
from pseudolabel._maps import working_dtype
from pseudolabel.refine import superpixel_refine

__all__ = [
    "BottomUpOutput",
    "FixedScaleBatchNorm2d",
    "ICDBottomUp",
    "ICDOutput",
    "ICDTopDown",
    "IntraClassDiscriminator",
    "icd_bottom_up_loss",
    "icd_orient",
    "icd_project",
    "icd_side_statistics",
    "icd_targets",
    "icd_top_down_loss",
    "icd_update_sides",
    "icd_warmup",
]

Reduction = Literal["mean", "sum", "none"]
RegionRefiner = Callable[[Tensor, Tensor, Tensor], Tensor]


# ------------------------------------------------------------------------------------------------- bottom-up


def icd_project(features: Tensor, directions: Tensor, *, eps: float = 1e-10) -> Tensor:
    """Score each position by its signed projection on the direction of each class.

        v_c = W_c / sqrt(|W_c|^2 + eps),   S_c(p) = <v_c, X(p)>

    There is no bias: the boundary between the two sides of a class is the plane through the origin, and which
    side is the object is not known yet (`icd_orient`).

    Args:
        features: Features `X` (B,D,h,w), standardised per channel (`FixedScaleBatchNorm2d`). On features
            after a ReLU, which are all positive, no position would be on the negative side.
        directions: Directions `W` (C,D), of any length. A direction that is 0 has score 0 and gradient 0.
        eps: Keeps the length away from 0, > 0.

    Returns:
        Scores `S` (B,C,h,w) of all classes, float32 for half precision.

    Raises:
        TypeError: If an argument is not a floating-point tensor.
        ValueError: If shapes do not fit or ``eps`` is not positive.

    Examples:
        >>> import torch
        >>> features = torch.tensor([[[[1.0, -2.0]], [[0.0, 5.0]]]])
        >>> icd_project(features, torch.tensor([[3.0, 0.0]]))
        tensor([[[[ 1., -2.]]]])

    Source:
        As `IntraClassDiscriminator`; the forward pass of its `ICD_BottomUp`.
    """
    check_shapes(features=(features, "B D h w"), directions=(directions, "C D"))
    check_float(features=features, directions=directions)
    check_number("eps", eps, above=0)
    dtype = torch.promote_types(working_dtype(features), working_dtype(directions))
    with torch.autocast(features.device.type, enabled=False):
        weight = directions.to(dtype)
        unit = weight / (weight.square().sum(1, keepdim=True) + eps).sqrt()
        return torch.einsum("cd,bdhw->bchw", unit, features.to(dtype))


def icd_bottom_up_loss(
    features: Tensor,
    directions: Tensor,
    labels: Tensor,
    *,
    scale: float = 10.0,
    single_label_only: bool = True,
    valid_mask: Tensor | None = None,
    detach_features: bool = True,
    reduction: Reduction = "mean",
) -> Tensor:
    """Loss that turns each direction to the axis along which its class's images vary most.

    With the scores `S` of `icd_project`, and `g` 1 for the class of an image with a single label, else 0:

        loss = -(scale / 2) 1/B sum_n sum_c g[n,c] mean_p S[n,c,p]^2

    For unit directions that is `-(scale / 2B) sum_c v_c^T G_c v_c` with the uncentred second moment `G_c` of
    the images of class c, and its one stable point is the leading eigenvector, up to the sign. The images
    without a single label count in `B`.

    The gradient is the exact one and orthogonal to `W_c`. (The official program writes it by hand with 1e-5
    added to the lengths of `W_c`, which is off by 6e-6 at length 3.5, and by 1.5e-3 at length 0.2 where
    training starts; trajectories agree to 1e-4.)

    Args:
        features: Standardised features (B,D,h,w).
        directions: Directions (C,D), of any length.
        labels: Image-level labels (B,C).
        scale: Factor of half the mean square, > 0. Official: 10.
        single_label_only: Let only images with a single label train their direction (official); else images
            with several train each of theirs.
        valid_mask: Positions (B,h,w) bool that count, such as those that are no padding; all by default. The
            mean over positions is over these.
        detach_features: Send no gradient to the features (official).
        reduction: `mean` as in the formula, `sum` over all, or `none` for the loss of each position
            (B,C,h,w).

    Returns:
        The loss, a scalar or (B,C,h,w), <= 0, float32 or better. Without an image that trains it is 0 with a
        graph.

    Raises:
        TypeError: If ``features`` or ``directions`` are not floating-point, or ``valid_mask`` is not bool.
        ValueError: If shapes do not fit, ``labels`` are not multi-hot, or a setting is out of range.

    Examples:
        >>> import torch
        >>> features = torch.tensor([[[[1.0, -1.0]], [[3.0, -3.0]]]])  # varies most along the second axis
        >>> labels = torch.tensor([[1]])
        >>> icd_bottom_up_loss(features, torch.tensor([[1.0, 0.0]]), labels)
        tensor(-5.)
        >>> icd_bottom_up_loss(features, torch.tensor([[0.0, 1.0]]), labels)
        tensor(-45.)

    Source:
        As `IntraClassDiscriminator`; the antiderivative of the gradient that its `ICD_BottomUp` defines.
    """
    check_shapes(features=(features, "B D h w"), directions=(directions, "C D"), labels=(labels, "B C"))
    scores = icd_project(features.detach() if detach_features else features, directions)
    return _bottom_up_loss(
        scores,
        labels,
        scale=scale,
        single_label_only=single_label_only,
        valid_mask=valid_mask,
        reduction=reduction,
    )


def _bottom_up_loss(
    scores: Tensor,
    labels: Tensor,
    *,
    scale: float,
    single_label_only: bool,
    valid_mask: Tensor | None,
    reduction: Reduction = "mean",
) -> Tensor:
    present = _present("scores", scores, labels)
    check_number("scale", scale, above=0)
    trains = present & (present.sum(1, keepdim=True) == 1) if single_label_only else present
    counts = _positions("scores", scores, trains, valid_mask)
    return _reduce((-scale / 2 * scores.square()).where(counts, 0), valid_mask, reduction)


def icd_side_statistics(
    scores: Tensor, cam: Tensor, labels: Tensor, *, valid_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sum up how strong the CAM is on the two sides of each direction.

        sums[c]   = sum_n y[n,c] ( mean of max(cam, 0) where S > 0,  its mean where S < 0 )
        counts[c] = sum_n y[n,c]

    Each mean is over the positions of one image; an empty side has mean 0, and positions with `S = 0` are on
    neither. Sums and counts of several processes may be added up before `icd_update_sides`.

    Args:
        scores: Scores (B,C,h,w) of `icd_project`.
        cam: Raw maps (B,C,h,w), of any map that tells where the object is; what is negative counts as 0.
        labels: Image-level labels (B,C), of one class or several.
        valid_mask: Positions (B,h,w) bool that count, all by default.

    Returns:
        ``sums`` (C,2), positive side first, and ``counts`` (C,), float32 or better. They carry no graph.

    Raises:
        TypeError: If ``scores`` or ``cam`` are not floating-point, or ``valid_mask`` is not bool.
        ValueError: If shapes do not fit or ``labels`` are not multi-hot.

    Examples:
        >>> import torch
        >>> scores = torch.tensor([[[[1.0, 2.0, -1.0, 0.0]]]])
        >>> cam = torch.tensor([[[[0.2, 0.4, 0.9, 5.0]]]])
        >>> icd_side_statistics(scores, cam, torch.tensor([[1]]))
        (tensor([[0.3000, 0.9000]]), tensor([1.]))

    Source:
        As `IntraClassDiscriminator`; part of its `AccumResign`.
    """
    check_shapes(scores=(scores, "B C h w"), cam=(cam, "B C h w"))
    check_float(scores=scores, cam=cam)
    present = _present("scores", scores, labels)
    counted = _positions("scores", scores, present, valid_mask)
    scores, cam = scores.detach(), cam.detach()
    if scores.device.type == "cpu":  # accelerators would have to be waited for
        check_finite(scores=scores.where(counted, 0))  # a NaN is on neither side
    activation = cam.to(working_dtype(cam)).clamp(min=0)

    def mean(side: Tensor) -> Tensor:
        side = side & counted
        return activation.where(side, 0).sum((2, 3)) / side.sum((2, 3)).clamp(min=1)

    sides = torch.stack([mean(scores > 0), mean(scores < 0)], dim=2)
    images = counted.flatten(2).any(2).sum(0)  # one that is all padding is none
    return sides.sum(0), images.to(activation.dtype)


def icd_update_sides(state: Tensor, sums: Tensor, counts: Tensor, *, momentum: float = 0.9) -> Tensor:
    """Move the running mean of the CAM on both sides of each direction towards that of a batch.

        A_c <- momentum A_c + (1 - momentum) sums[c] / counts[c]     where counts[c] > 0

    The state starts at 0 and is not corrected for that: only its order matters. A class that is not in the
    batch keeps its state bit by bit, and so does one with a statistic that is not finite, as in a step which
    a gradient scaler skips.

    Args:
        state: Running means `A` (C,2), positive side first.
        sums: Sums (C,2) of `icd_side_statistics`.
        counts: Counts (C,) of `icd_side_statistics`.
        momentum: Weight of the old state, in [0, 1]. Official: 0.9.

    Returns:
        The new state (C,2), like ``state``, which itself stays as it is.

    Raises:
        TypeError: If ``state`` or ``sums`` are not floating-point.
        ValueError: If shapes do not fit or ``momentum`` is out of range.

    Examples:
        >>> import torch
        >>> sums, counts = torch.tensor([[2.0, 6.0], [0.0, 0.0]]), torch.tensor([2.0, 0.0])
        >>> icd_update_sides(torch.full((2, 2), 0.5), sums, counts)
        tensor([[0.5500, 0.7500],
                [0.5000, 0.5000]])

    Source:
        As `IntraClassDiscriminator`; part of its `AccumResign`, which with several devices pushes into one
        shared state from each in turn. Here the sums of all devices make one step.
    """
    check_shapes(state=(state, "C 2"), sums=(sums, "C 2"), counts=(counts, "C"))
    check_float(state=state, sums=sums)
    if counts.is_complex():
        raise TypeError(f"counts: expected numbers of images, got a {counts.dtype} tensor")
    check_probability("momentum", momentum)
    current = sums / counts.clamp(min=1)[:, None]
    moved = (momentum * state + (1 - momentum) * current).to(state.dtype)
    seen = (counts > 0) & current.isfinite().all(1)
    return moved.where(seen[:, None], state)


def icd_orient(scores: Tensor, state: Tensor) -> Tensor:
    """Flip the scores of the classes whose CAM is stronger on the negative side.

        B_c = -S_c where A[c,0] < A[c,1],  else S_c

    Then positive means object. The directions themselves stay, and with them the momentum of their optimiser.

    Args:
        scores: Scores (B,C,h,w) of `icd_project`.
        state: Running means `A` (C,2) of `icd_update_sides`.

    Returns:
        Oriented scores (B,C,h,w), like ``scores``.

    Raises:
        TypeError: If ``scores`` are not floating-point.
        ValueError: If shapes do not fit.

    Examples:
        >>> import torch
        >>> icd_orient(torch.tensor([[[[1.0]], [[1.0]]]]), torch.tensor([[0.1, 0.3], [0.2, 0.2]])).flatten()
        tensor([-1.,  1.])

    Source:
        As `IntraClassDiscriminator`; part of its `AccumResign`.
    """
    check_shapes(scores=(scores, "B C h w"), state=(state, "C 2"))
    check_float(scores=scores, state=state)
    if state.device.type == "cpu":  # accelerators would have to be waited for
        check_finite(state=state)  # a NaN would never flip
    flipped = state[:, 0] < state[:, 1]
    return torch.where(flipped[:, None, None], -scores, scores)


# -------------------------------------------------------------------------------------------------- top-down


def icd_targets(scores: Tensor, *, margin: float = 0.2, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Take the confident part of signed scores as a target, the two sides of each map on scales of their own.

        t = max(R, 0) / max(max_p R, eps) + min(R, 0) / max(-min_p R, eps)      in [-1, 1]
        target = t > 0,   valid = |t| > margin

    Args:
        scores: Signed scores `R` (B,C,h,w), positive on the object.
        margin: What a position has to exceed on either side, in [0, 1]. Official: 0.2.
        eps: Least scale of a side, > 0: a map that is 0 has no valid position.

    Returns:
        ``target`` and ``valid`` (B,C,h,w) bool.

    Raises:
        TypeError: If ``scores`` are not floating-point.
        ValueError: If ``scores`` are not (B,C,h,w) or a setting is out of range.

    Examples:
        >>> import torch
        >>> target, valid = icd_targets(torch.tensor([[[[5.0, 0.9, -0.1, -0.3]]]]))
        >>> target.flatten().tolist(), valid.flatten().tolist()
        ([True, True, False, False], [True, False, True, True])

    Source:
        As `IntraClassDiscriminator`; part of its `ICD_TopDown`.
    """
    check_shapes(scores=(scores, "B C h w"))
    check_float(scores=scores)
    check_probability("margin", margin)
    check_number("eps", eps, above=0)
    r = scores.detach().to(working_dtype(scores))
    if r.device.type == "cpu":  # accelerators would have to be waited for
        check_finite(scores=r)  # a NaN is neither confident nor seen in the result
    positive, negative = r.clamp(min=0), r.clamp(max=0)
    if r.numel() == 0:
        return r > 0, r > 0
    t = positive / positive.amax((2, 3), keepdim=True).clamp(min=eps)
    t = t - negative / negative.amin((2, 3), keepdim=True).clamp(max=-eps)
    return t > 0, t.abs() > margin


def icd_top_down_loss(
    logits: Tensor,
    scores: Tensor,
    labels: Tensor,
    *,
    margin: float = 0.2,
    weight: float | Tensor = 1.0,
    valid_mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Binary cross-entropy of the top-down logits with the confident part of the refined bottom-up scores.

        loss = weight 1/B sum_n sum_c y[n,c] 1/hw sum_p valid BCE(sigmoid(Z), target)

    with ``target`` and ``valid`` of `icd_targets`. The divisor is the number of positions, confident or not.
    Absent classes have no loss, not even as negatives.

    Args:
        logits: Logits `Z` (B,C,h,w), one channel a foreground class, no background.
        scores: Refined bottom-up scores (B,C,h,w); no gradient flows to them.
        labels: Image-level labels (B,C), of one class or several.
        margin: See `icd_targets`.
        weight: Factor of the loss, such as `icd_warmup`.
        valid_mask: Positions (B,h,w) bool that count, such as those that are no padding; all by default. The
            scales of the target, and the mean over positions, are over these.
        reduction: `mean` as in the formula, `sum` over all, or `none` for the loss of each position
            (B,C,h,w).

    Returns:
        The loss, a scalar or (B,C,h,w), float32 or better. Without a confident position it is 0 with a graph.

    Raises:
        TypeError: If ``logits`` or ``scores`` are not floating-point, or ``valid_mask`` is not bool.
        ValueError: If shapes do not fit, ``labels`` are not multi-hot, or a setting is out of range.

    Examples:
        >>> import torch
        >>> logits, scores = torch.zeros(1, 1, 1, 4), torch.tensor([[[[5.0, 0.9, -0.1, -0.3]]]])
        >>> icd_top_down_loss(logits, scores, torch.tensor([[1]]), reduction="none")
        tensor([[[[0.6931, 0.0000, 0.6931, 0.6931]]]])

    Source:
        As `IntraClassDiscriminator`; its `ICD_TopDown`.
    """
    check_shapes(logits=(logits, "B C h w"), scores=(scores, "B C h w"))
    check_float(logits=logits, scores=scores)
    if not isinstance(weight, Tensor):
        check_number("weight", weight)
    counted = _positions("logits", logits, _present("logits", logits, labels), valid_mask)
    target, confident = icd_targets(scores.where(counted, 0), margin=margin)
    z = logits.to(working_dtype(logits))
    loss = F.binary_cross_entropy_with_logits(z, target.to(z.dtype), reduction="none")
    return weight * _reduce(loss.where(confident & counted, 0), valid_mask, reduction)


def icd_warmup(step: int, total_steps: int, *, sharpness: float = 10.0) -> float:
    """Weight of the top-down loss, which waits for the directions to settle.

        exp(-sharpness (T - t) / T) for t < T,  then 1

    Args:
        step: Number `t` of the training step, from 0.
        total_steps: Length `T` of the warm-up, >= 0. Official: two epochs.
        sharpness: Logarithm of what the weight grows by, >= 0. Official: 10, which starts at 4.5e-5.

    Returns:
        The weight, in (0, 1].

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> [round(icd_warmup(step, 4), 4) for step in range(6)]
        [0.0, 0.0006, 0.0067, 0.0821, 1.0, 1.0]

    Source:
        As `IntraClassDiscriminator`, which counts backward passes inside its `ICD_TopDown` and forgets the
        count when training resumes. Here it is a function of the step alone.
    """
    check_number("step", step, at_least=0)
    check_number("total_steps", total_steps, at_least=0)
    check_number("sharpness", sharpness, at_least=0)
    if step >= total_steps:
        return 1.0
    return math.exp(-sharpness * (total_steps - step) / total_steps)


# --------------------------------------------------------------------------------------------------- modules


class FixedScaleBatchNorm2d(nn.Module):
    """Batch normalisation whose scale is fixed to 1: it standardises each channel, and may shift it.

        X = (F - mean) / sqrt(var + eps) + beta

    The mean and the biased variance are those of the batch in training mode, which the running ones follow,
    and the running ones in evaluation mode. As in `torch.nn.BatchNorm2d` the statistics are those of one
    process.

    Args:
        num_features: Number of channels D.
        eps: Added to the variance, > 0.
        momentum: Weight of the batch in the running statistics, in [0, 1].
        shift: Learn a shift `beta` of each channel, 0 at first; else there is none.
        biased_running_var: Let the running variance follow the biased one, as MXNet does, instead of the
            unbiased one of `torch.nn.BatchNorm2d`.

    Raises:
        ValueError: If a setting is out of range.

    Examples:
        >>> import torch
        >>> norm = FixedScaleBatchNorm2d(1)
        >>> norm(torch.tensor([[[[1.0, 3.0]]]])).flatten()
        tensor([-1.0000,  1.0000], grad_fn=<...>)
        >>> norm.running_mean, norm.running_var
        (tensor([0.2000]), tensor([1.1000]))

    Source:
        As `IntraClassDiscriminator`; `BatchNorm` of MXNet with `fix_gamma`.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float = 0.1,
        shift: bool = True,
        biased_running_var: bool = False,
    ) -> None:
        super().__init__()
        check_count(num_features=num_features)
        check_number("eps", eps, above=0)
        check_probability("momentum", momentum)
        self.eps = eps
        self.momentum = momentum
        self.biased_running_var = biased_running_var
        self.beta = nn.Parameter(torch.zeros(num_features)) if shift else None
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, features: Tensor, valid_mask: Tensor | None = None) -> Tensor:
        """Standardise features (B,D,h,w), with statistics over ``valid_mask`` (B,h,w) bool."""
        check_shapes(features=(features, "B D h w"), running_mean=(self.running_mean, "D"))
        check_float(features=features)
        if valid_mask is not None:
            _check_valid_mask("features", features, valid_mask)
        x = features.to(torch.promote_types(working_dtype(features), working_dtype(self.running_mean)))
        if self.training:
            mean, var = self._statistics(x, valid_mask)
        else:
            mean, var = self.running_mean.to(x.dtype), self.running_var.to(x.dtype)
        x = (x - mean[:, None, None]) * (var[:, None, None] + self.eps).rsqrt()
        if self.beta is not None:
            x = x + self.beta[:, None, None]
        return x.to(features.dtype)

    def _statistics(self, x: Tensor, valid_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of the batch; the running ones move."""
        if valid_mask is None:
            var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
            count = x.new_full((), x.numel() // x.shape[1])
        else:
            counted = valid_mask[:, None]
            count = counted.sum().to(x.dtype)
            mean = x.where(counted, 0).sum((0, 2, 3)) / count.clamp(min=1)
            deviation = (x - mean[:, None, None]).where(counted, 0)
            var = deviation.square().sum((0, 2, 3)) / count.clamp(min=1)
        with torch.no_grad():
            bias = 1 if self.biased_running_var else count / (count - 1).clamp(min=1)
            share = self.momentum * (count > 0)  # a batch that is all padding says nothing
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), share.to(self.running_mean.dtype))
            self.running_var.lerp_((var * bias).to(self.running_var.dtype), share.to(self.running_var.dtype))
        return mean, var

    def extra_repr(self) -> str:
        """Settings, for `print`."""
        return (
            f"{len(self.running_mean)}, eps={self.eps}, momentum={self.momentum}, "
            f"shift={self.beta is not None}, biased_running_var={self.biased_running_var}"
        )


class BottomUpOutput(NamedTuple):
    """What `ICDBottomUp` returns.

    Attributes:
        scores: Oriented scores (B,C,h,w), positive on the object, without a graph.
        raw: Scores before orientation (B,C,h,w), without a graph.
        loss: The bottom-up loss, a scalar; None in evaluation mode and without labels.
    """

    scores: Tensor
    raw: Tensor
    loss: Tensor | None


class ICDBottomUp(nn.Module):
    """Bottom-up discriminator: one direction a class, and which of its ends is the object.

    In training mode with a CAM and labels it takes one step of the running CAM means before it orients by
    them; in evaluation mode it only reads them. Where a `torch.distributed` process group is initialised, the
    statistics of all processes are summed first, in one message, so that every process has the same state:
    that of one process with the joined batch. Every process has to train in every step, then.

    Args:
        in_channels: Number of feature channels D.
        num_foreground: Number of foreground classes C, the columns of ``labels``.
        scale: See `icd_bottom_up_loss`.
        side_momentum: Momentum of `icd_update_sides`; 1 freezes the sides.
        single_label_only: See `icd_bottom_up_loss`.
        sync_sides: Sum the statistics over the processes.
        init_std: Standard deviation of the first directions, > 0. Official: 0.01.

    Raises:
        ValueError: If a setting is out of range.

    Examples:
        >>> import torch
        >>> bottom_up = ICDBottomUp(8, 3)
        >>> out = bottom_up(torch.randn(2, 8, 5, 7), torch.randn(2, 3, 5, 7), torch.eye(3)[:2])
        >>> out.scores.shape, out.loss.shape, bottom_up.sides.shape
        (torch.Size([2, 3, 5, 7]), torch.Size([]), torch.Size([3, 2]))

    Source:
        As `IntraClassDiscriminator`.
    """

    sides: Tensor

    def __init__(
        self,
        in_channels: int,
        num_foreground: int,
        *,
        scale: float = 10.0,
        side_momentum: float = 0.9,
        single_label_only: bool = True,
        sync_sides: bool = True,
        init_std: float = 0.01,
    ) -> None:
        super().__init__()
        check_count(in_channels=in_channels)
        check_count(num_foreground=num_foreground)
        check_number("scale", scale, above=0)
        check_probability("side_momentum", side_momentum)
        check_number("init_std", init_std, above=0)  # a direction that is 0 stays 0 for ever
        self.scale = scale
        self.side_momentum = side_momentum
        self.single_label_only = single_label_only
        self.sync_sides = sync_sides
        self.directions = nn.Parameter(init_std * torch.randn(num_foreground, in_channels))
        self.register_buffer("sides", torch.zeros(num_foreground, 2))

    def forward(
        self,
        features: Tensor,
        cam: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        valid_mask: Tensor | None = None,
    ) -> BottomUpOutput:
        """Score standardised features (B,D,h,w); training takes ``cam`` with ``labels``, or neither."""
        raw, loss = icd_project(features.detach(), self.directions), None
        if self.training and (cam is not None or labels is not None):
            if cam is None or labels is None:
                missing, given = ("cam", "labels") if cam is None else ("labels", "cam")
                raise ValueError(f"{missing}: expected a tensor beside {given} in training mode, got None")
            check_shapes(raw=(raw, "B C h w"), cam=(cam, "B C h w"), labels=(labels, "B C"))
            loss = _bottom_up_loss(
                raw,
                labels,
                scale=self.scale,
                single_label_only=self.single_label_only,
                valid_mask=valid_mask,
            )
            self._update_sides(raw.detach(), cam, labels, valid_mask)
        raw = raw.detach()
        return BottomUpOutput(icd_orient(raw, self.sides), raw, loss)

    @torch.no_grad()
    def _update_sides(self, raw: Tensor, cam: Tensor, labels: Tensor, valid_mask: Tensor | None) -> None:
        sums, counts = icd_side_statistics(raw, cam, labels, valid_mask=valid_mask)
        if self.sync_sides and dist.is_available() and dist.is_initialized():
            sums, counts = _sum_over_processes(sums, counts)
        self.sides.copy_(icd_update_sides(self.sides, sums, counts, momentum=self.side_momentum))

    def extra_repr(self) -> str:
        """Settings, for `print`."""
        classes, channels = self.directions.shape
        return (
            f"{channels}, {classes}, scale={self.scale}, side_momentum={self.side_momentum}, "
            f"single_label_only={self.single_label_only}, sync_sides={self.sync_sides}"
        )


def _sum_over_processes(sums: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    message = torch.cat([sums, counts[:, None]], dim=1)
    dist.all_reduce(message)
    return message[:, :2], message[:, 2]


class ICDTopDown(nn.Module):
    """Top-down discriminator: a head with two hidden layers on the standardised features.

        X1 = relu(conv3x3(X)),   X2 = relu(conv1x1(X1)),   Z = conv1x1([X; X1; X2]), no bias

    Args:
        in_channels: Number of feature channels D.
        num_foreground: Number of foreground classes C.
        hidden: Channels of the hidden layers. Official: 1024.

    Attributes:
        conv1: First hidden layer.
        conv2: Second hidden layer. Officially these two start as copies of the pretrained fc6 and fc7 of a
            VGG16: `top_down.conv1.load_state_dict(fc6.state_dict())`. Here they start as PyTorch does.
        classifier: Last layer, from a normal distribution with standard deviation 0.01.

    Raises:
        ValueError: If a number is below 1.

    Examples:
        >>> import torch
        >>> ICDTopDown(8, 3, hidden=16)(torch.randn(2, 8, 5, 7)).shape
        torch.Size([2, 3, 5, 7])

    Source:
        As `IntraClassDiscriminator`; the random start of the hidden layers is ours.
    """

    def __init__(self, in_channels: int, num_foreground: int, *, hidden: int = 1024) -> None:
        super().__init__()
        check_count(in_channels=in_channels)
        check_count(num_foreground=num_foreground)
        check_count(hidden=hidden)
        self.conv1 = nn.Conv2d(in_channels, hidden, 3, padding=1)
        self.conv2 = nn.Conv2d(hidden, hidden, 1)
        self.classifier = nn.Conv2d(in_channels + 2 * hidden, num_foreground, 1, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.01)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B,C,h,w) of standardised features (B,D,h,w)."""
        first = F.relu(self.conv1(features))
        second = F.relu(self.conv2(first))
        logits: Tensor = self.classifier(torch.cat([features, first, second], dim=1))
        return logits


class ICDOutput(NamedTuple):
    """What `IntraClassDiscriminator` returns.

    Attributes:
        logits: Top-down logits (B,C,h,w): the final map, positive on the object, for `masks.icd_seed`.
        bottom_up: Oriented bottom-up scores (B,C,h,w), without a graph.
        refined: Bottom-up scores of the labelled classes (B,C,h,w), constant over superpixels where there are
            any, without a graph: the target of the top-down loss. None without labels.
        loss_bu: Bottom-up loss; None in evaluation mode and without labels.
        loss_td: Top-down loss, likewise.
    """

    logits: Tensor
    bottom_up: Tensor
    refined: Tensor | None
    loss_bu: Tensor | None
    loss_td: Tensor | None


class IntraClassDiscriminator(nn.Module):
    """Separates foreground from background inside the images of each class, trained beside a classifier.

        X = norm(F)                            standardise the features
        B = bottom_up(X, cam, labels)          a direction a class; the CAM tells its object end
        R = refine(B, superpixels, labels)     constant over regions, of one class at most in each
        Z = top_down(X)                        learns the confident part of R;  Z > 0 is the object

    The bottom-up loss trains the directions alone; the top-down loss trains its head, the shift of the norm,
    and whatever made the features. All of it trains jointly with the classifier:

        loss = bce + out.loss_bu + out.loss_td

    Features come from any backbone, tokens of a ViT reshaped to their grid included. The backbone itself is
    not touched. In evaluation mode features are all that is needed.

    Args:
        in_channels: Number of feature channels D.
        num_foreground: Number of foreground classes C, the columns of ``labels`` (20 for VOC).
        hidden: See `ICDTopDown`.
        margin: See `icd_targets`.
        norm: Module that standardises the features; `FixedScaleBatchNorm2d` by default. Another one is called
            with the features alone, so padding enters its statistics.
        bottom_up: An `ICDBottomUp` of your own settings.
        top_down: A module of your own from standardised features to logits. Parameters of a child called
            `classifier` are its last layer for `param_groups`.
        refine: Callable `(scores, superpixels, labels) -> scores`.

    Raises:
        ValueError: If a setting is out of range.

    Examples:
        >>> import torch
        >>> head = IntraClassDiscriminator(8, 3, hidden=16)
        >>> features, cam = torch.rand(2, 8, 5, 7), torch.randn(2, 3, 5, 7)
        >>> superpixels = (torch.arange(40 * 56) // 56 // 10).view(1, 40, 56).expand(2, -1, -1)
        >>> out = head(features, cam, torch.eye(3)[:2], superpixels, td_weight=icd_warmup(0, 100))
        >>> out.logits.shape, (out.loss_bu + out.loss_td).shape
        (torch.Size([2, 3, 5, 7]), torch.Size([]))
        >>> head.eval()(features).loss_td is None
        True

    Source:
        Fan, Zhang, Song and Tan, "Learning Integral Objects With Intra-Class Discriminator for
        Weakly-Supervised Semantic Segmentation", CVPR 2020. Formulas and defaults are read off the official
        implementation at f78286a, whose operations were run: these match them, values and gradients, and a
        training of several steps. Of the paper the abstract and figures were at hand. Padding kept out by a
        mask, statistics of several processes, and grids of any size are ours.
    """

    def __init__(
        self,
        in_channels: int,
        num_foreground: int,
        *,
        hidden: int = 1024,
        margin: float = 0.2,
        norm: nn.Module | None = None,
        bottom_up: ICDBottomUp | None = None,
        top_down: nn.Module | None = None,
        refine: RegionRefiner = superpixel_refine,
    ) -> None:
        super().__init__()
        check_probability("margin", margin)
        self.margin = margin
        self.norm = FixedScaleBatchNorm2d(in_channels) if norm is None else norm
        self.bottom_up = ICDBottomUp(in_channels, num_foreground) if bottom_up is None else bottom_up
        self.top_down = (
            ICDTopDown(in_channels, num_foreground, hidden=hidden) if top_down is None else top_down
        )
        self.refine = refine

    def forward(
        self,
        features: Tensor,
        cam: Tensor | None = None,
        labels: Tensor | None = None,
        superpixels: Tensor | None = None,
        *,
        td_weight: float | Tensor = 1.0,
        valid_mask: Tensor | None = None,
    ) -> ICDOutput:
        """Map features (B,D,h,w) to logits, and in training mode with labels to the two losses.

        Args:
            features: Output of the backbone (B,D,h,w), as it is.
            cam: Raw maps (B,C,h,w) on the same grid, no gradient flows to them. Training needs them with
                labels.
            labels: Image-level labels (B,C).
            superpixels: Region ids (B,H,W), see `refine.superpixel_refine`. Without them the scores are not
                refined.
            td_weight: Weight of the top-down loss: `icd_warmup`.
            valid_mask: Positions (B,h,w) bool that count, such as those that are no padding; all by default.
                The others enter no statistic, no target and no loss. (Give padding superpixels of its own.)
        """
        if superpixels is not None and labels is None:
            raise ValueError("labels: expected image-level labels (B, C) beside superpixels, got None")
        if isinstance(self.norm, FixedScaleBatchNorm2d):
            x = self.norm(features, valid_mask)
        else:
            x = self.norm(features)
        bottom_up = self.bottom_up(x, cam, labels, valid_mask=valid_mask)
        logits = self.top_down(x)
        if labels is None:
            return ICDOutput(logits, bottom_up.scores, None, None, None)
        refined = self._refine(bottom_up.scores, labels, superpixels, valid_mask)
        loss_td = None
        if self.training:
            loss_td = icd_top_down_loss(
                logits, refined, labels, margin=self.margin, weight=td_weight, valid_mask=valid_mask
            )
        return ICDOutput(logits, bottom_up.scores, refined, bottom_up.loss, loss_td)

    @torch.no_grad()
    def _refine(
        self, scores: Tensor, labels: Tensor, superpixels: Tensor | None, valid_mask: Tensor | None
    ) -> Tensor:
        counted = _positions("scores", scores, _present("scores", scores, labels), valid_mask)
        scores = scores.where(counted, 0)
        return scores if superpixels is None else self.refine(scores, superpixels, labels).where(counted, 0)

    def param_groups(
        self, lr: float, *, weight_decay: float = 5e-4, head_lr_mult: float = 10.0
    ) -> list[dict[str, Any]]:
        """Parameters in groups for an optimiser, with the official multipliers.

        Weights and directions have weight decay, biases and the shift of the norm have none; the last layer
        of the top-down head learns ``head_lr_mult`` times as fast. Groups without a parameter are left out.

        Args:
            lr: Learning rate. Official: 1e-3, SGD with momentum 0.9, falling as `(1 - epoch / 20)^0.9`.
            weight_decay: Weight decay. Official: 5e-4.
            head_lr_mult: Factor of the learning rate of `top_down.classifier`. Official: 10.

        Returns:
            Dictionaries with `params`, `lr` and `weight_decay`; each parameter that wants a gradient is in
            one.

        Raises:
            ValueError: If a number is negative.
        """
        check_number("lr", lr, at_least=0)
        check_number("weight_decay", weight_decay, at_least=0)
        check_number("head_lr_mult", head_lr_mult, at_least=0)
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                rate = lr * head_lr_mult if name.startswith("top_down.classifier.") else lr
                decay = weight_decay if parameter.ndim > 1 else 0.0
                groups.setdefault((rate, decay), []).append(parameter)
        return [
            {"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()
        ]

    def extra_repr(self) -> str:
        """Settings, for `print`."""
        return f"margin={self.margin}"


# --------------------------------------------------------------------------------------------------- helpers


def _present(name: str, maps: Tensor, labels: Tensor) -> Tensor:
    """Which classes (B,C) are present, of labels that belong to the (B,C,h,w) maps ``name``."""
    check_shapes(**{name: (maps, "B C h w"), "labels": (labels, "B C")})
    if labels.device.type == "cpu":  # accelerators would have to be waited for
        check_labels(labels)
    return labels != 0


def _positions(name: str, maps: Tensor, classes: Tensor, valid_mask: Tensor | None) -> Tensor:
    """Which positions of the present ``classes`` (B,C) count: (B,C,h,w), or (B,C,1,1) without a mask."""
    counted = classes[:, :, None, None]
    if valid_mask is None:
        return counted
    _check_valid_mask(name, maps, valid_mask)
    return counted & valid_mask[:, None]


def _check_valid_mask(name: str, maps: Tensor, valid_mask: Tensor) -> None:
    check_shapes(**{name: (maps, "B C h w"), "valid_mask": (valid_mask, "B h w")})
    if valid_mask.dtype != torch.bool:
        raise TypeError(f"valid_mask: expected a bool tensor, got {valid_mask.dtype}")


def _reduce(loss: Tensor, valid_mask: Tensor | None, reduction: Reduction) -> Tensor:
    """Mean over images and their positions, sum over classes."""
    check_choice("reduction", reduction, Reduction)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    images, _, height, width = loss.shape
    positions = height * width if valid_mask is None else valid_mask.sum((1, 2)).clamp(min=1)
    return (loss.sum((1, 2, 3)) / positions).sum() / max(images, 1)
