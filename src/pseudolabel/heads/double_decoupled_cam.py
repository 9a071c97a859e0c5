"""Double decoupled CAM: a posterior over the labelled classes and the background, by metric learning.

The maps live on the grid of the features and the work is small there, so that all classes are computed and
absent ones masked: no shape depends on the data.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pseudolabel._checks import (
    check_choice,
    check_classes,
    check_count,
    check_float,
    check_labels,
    check_number,
    check_shapes,
    values_unchecked,
)
from pseudolabel._maps import working_dtype

__all__ = [
    "D2CAMLosses",
    "D2CAMOutput",
    "DoubleDecoupledCAM",
    "ForegroundBackground",
    "d2cam_anchor_loss",
    "d2cam_anchor_weight",
    "d2cam_category_loss",
    "d2cam_contrast_loss",
    "d2cam_exclusivity_loss",
    "d2cam_foreground_background_loss",
    "d2cam_logits",
    "d2cam_pool",
    "d2cam_posterior",
    "d2cam_triplet_loss",
]

ForegroundBackground = Literal["margin", "triplet", "c2am"]


# ------------------------------------------------------------------------------------------------- posterior


def d2cam_logits(
    features: Tensor, class_proxies: Tensor, background_proxies: Tensor, *, scale: float = 10.0
) -> Tensor:
    """Compare the feature of each position with the proxies of the classes and of the background.

    With everything brought to unit length, `z(p)` a feature, `w_c` and `u_1..u_K` the proxies:

        l_c(p) = scale <z(p), w_c>
        l_0(p) = log( mean_j exp(scale <z(p), u_j>) )

    Logits of several views may be averaged before `d2cam_posterior`.

    Args:
        features: Projected features (B,D,h,w), of any length. Half precision is computed in float32.
        class_proxies: One vector a class (C,D).
        background_proxies: Several vectors (K,D), since background has many looks.
        scale: Inverse temperature, > 0.

    Returns:
        Logits (B,1+C,h,w), background first, in the dtype of ``features``.

    Raises:
        TypeError: If features or proxies are not floating-point.
        ValueError: If shapes do not fit or ``scale`` is not positive.

    Examples:
        >>> import torch
        >>> features = torch.tensor([[[[3.0, 0.0]], [[0.0, 2.0]]]])  # one position along each axis
        >>> d2cam_logits(features, torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])).squeeze()
        tensor([[ 0., 10.],
                [10.,  0.]])

    Source:
        Our definition, see `DoubleDecoupledCAM`.
    """
    check_shapes(
        features=(features, "B D h w"),
        class_proxies=(class_proxies, "C D"),
        background_proxies=(background_proxies, "K D"),
    )
    check_float(features=features, class_proxies=class_proxies, background_proxies=background_proxies)
    _check_proxies(background_proxies=background_proxies)
    check_number("scale", scale, above=0)
    z = _unit_features(features)
    w, u = (F.normalize(proxies.to(z.dtype), dim=1) for proxies in (class_proxies, background_proxies))
    background = _log_mean_exp(scale * torch.einsum("kd,bdhw->bkhw", u, z), 1)
    foreground = scale * torch.einsum("cd,bdhw->bchw", w, z)
    return torch.cat([background, foreground], 1).to(features.dtype)


def d2cam_posterior(logits: Tensor, labels: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Let background and labelled classes compete at each position: this is the double decoupled map.

        q(p) = softmax of l(p) / temperature over background and labelled classes;  0 for the others

    Args:
        logits: Logits (B,1+C,h,w), background first (`d2cam_logits`).
        labels: Image-level labels (B,C).
        temperature: 1 as in training, where the posterior becomes surer than it is right. A refiner weighs it
            against the photo, and does better with 3 to 5.

    Returns:
        Scores (B,1+C,h,w) in [0, 1] that sum to one at each position.

    Raises:
        TypeError: If ``logits`` are not floating-point.
        ValueError: If shapes do not fit or ``temperature`` is not positive.

    Examples:
        >>> import torch
        >>> d2cam_posterior(torch.zeros(1, 3, 1, 1), torch.tensor([[0, 1]])).flatten()
        tensor([0.5000, 0.0000, 0.5000])

    Source:
        Our definition, see `DoubleDecoupledCAM`.
    """
    check_number("temperature", temperature, above=0)
    return (_masked_logits(logits, labels) / temperature).softmax(1).to(logits.dtype)


def d2cam_pool(features: Tensor, posterior: Tensor, *, valid_mask: Tensor | None = None) -> Tensor:
    """Pool the unit features of each class, and of the background, by their posterior.

        v_k = normalise( sum_p q_k(p) z(p) )

    Args:
        features: Projected features (B,D,h,w), of any length.
        posterior: Scores (B,1+C,h,w) (`d2cam_posterior`). A class that is 0 everywhere has `v = 0`.
        valid_mask: Positions (B,h,w) that count, all by default.

    Returns:
        Pooled features (B,1+C,D) of unit length, background first, float32 or better.

    Raises:
        TypeError: If ``features`` or ``posterior`` are not floating-point.
        ValueError: If shapes do not fit.

    Examples:
        >>> import torch
        >>> features = torch.tensor([[[[3.0, 0.0]], [[0.0, 1.0]]]])
        >>> d2cam_pool(features, torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]]))
        tensor([[[1., 0.],
                 [0., 1.]]])

    Source:
        Our definition, see `DoubleDecoupledCAM`; class-pooled features as in Chen et al., "Class
        Re-Activation Maps for Weakly-Supervised Semantic Segmentation" (ReCAM), CVPR 2022.
    """
    check_shapes(features=(features, "B D h w"), posterior=(posterior, "B N h w"))
    check_float(features=features, posterior=posterior)
    z = _unit_features(features)
    q = posterior.to(z.dtype)
    if valid_mask is not None:
        check_shapes(features=(features, "B D h w"), valid_mask=(valid_mask, "B h w"))
        q = q.where(valid_mask[:, None], 0)
    return F.normalize(torch.einsum("bnhw,bdhw->bnd", q, z), dim=2)


# ---------------------------------------------------------------------------------------------------- losses


def d2cam_category_loss(
    pooled: Tensor, class_proxies: Tensor, labels: Tensor, *, scale: float = 10.0, margin: float = 0.2
) -> Tensor:
    """Category decoupling: the pooled feature of a class has to be told from the proxies of all others.

    The mean over the labelled classes of all images of

        -log( e^own / (e^own + sum_(k != c) e^(scale <v_c, w_k>)) ),   own = scale (<v_c, w_c> - margin)

    Args:
        pooled: Pooled features (B,1+C,D) of unit length (`d2cam_pool`); background is not used.
        class_proxies: One vector a class (C,D), of any length.
        labels: Image-level labels (B,C).
        scale: Inverse temperature, > 0.
        margin: What the own proxy has to be nearer by, as a cosine, >= 0.

    Returns:
        The loss, a scalar; 0 with a graph where no image has a label.

    Raises:
        TypeError: If ``pooled`` or ``class_proxies`` are not floating-point.
        ValueError: If shapes do not fit or a setting is out of range.

    Examples:
        >>> import torch
        >>> pooled, proxies = torch.eye(3)[None, :, 1:], torch.eye(2)  # each class at its own proxy
        >>> d2cam_category_loss(pooled, proxies, torch.tensor([[1, 1]]))  # log(1 + e^(10 (0 - 1 + 0.2)))
        tensor(0.0003)

    Source:
        Our definition, see `DoubleDecoupledCAM`: the additive cosine margin of Wang et al., "CosFace", CVPR
        2018, on class-pooled features as in ReCAM, CVPR 2022.
    """
    check_shapes(
        pooled=(pooled, "B N D"),
        class_proxies=(class_proxies, "C D"),
    )
    _check_labels_beside(pooled, labels)
    check_float(pooled=pooled, class_proxies=class_proxies)
    _check_proxies(labels, class_proxies)
    _check_metric(scale, margin)
    pooled = pooled.to(working_dtype(pooled))
    w = F.normalize(class_proxies.to(pooled.dtype), dim=1)
    cosine = torch.einsum("bcd,kd->bck", pooled[:, 1:], w)
    logits = scale * (cosine - margin * torch.eye(len(w), dtype=w.dtype, device=w.device))
    own = logits.diagonal(dim1=1, dim2=2)
    return _mean(logits.logsumexp(2) - own, labels != 0)


def d2cam_foreground_background_loss(
    pooled: Tensor,
    class_proxies: Tensor,
    background_proxies: Tensor,
    labels: Tensor,
    *,
    scale: float = 10.0,
    margin: float = 0.2,
) -> Tensor:
    """Foreground-background decoupling: pooled classes leave the background proxies, and the other way round.

    With LSE the logarithm of a sum of exponentials, and Y the labelled classes of an image:

        mean_(c in Y) softplus( LSE_j scale <v_c, u_j>  -  scale (<v_c, w_c> - margin) )
        + softplus( LSE_(c in Y) scale <v_0, w_c>  -  LSE_j scale (<v_0, u_j> - margin) )

    the first averaged over the labelled classes of all images, the second over the images with a label.

    Args:
        pooled: Pooled features (B,1+C,D) of unit length, background first (`d2cam_pool`).
        class_proxies: One vector a class (C,D), of any length.
        background_proxies: Vectors (K,D) of the background, of any length.
        labels: Image-level labels (B,C).
        scale: Inverse temperature, > 0.
        margin: What the own proxies have to be nearer by, as a cosine, >= 0.

    Returns:
        The loss, a scalar; 0 with a graph where no image has a label.

    Raises:
        TypeError: If pooled features or proxies are not floating-point.
        ValueError: If shapes do not fit or a setting is out of range.

    Examples:
        >>> import torch
        >>> pooled, proxies = torch.eye(2)[None], torch.eye(2)  # background and class at their own proxies
        >>> d2cam_foreground_background_loss(pooled, proxies[1:], proxies[:1], torch.tensor([[1]]), scale=1.0)
        tensor(0.7422)

    Source:
        Our definition, see `DoubleDecoupledCAM`; its published relatives are C2AM (CVPR 2022) and IDC (TIP
        2024).
    """
    check_shapes(
        pooled=(pooled, "B N D"),
        class_proxies=(class_proxies, "C D"),
        background_proxies=(background_proxies, "K D"),
    )
    _check_labels_beside(pooled, labels)
    check_float(pooled=pooled, class_proxies=class_proxies, background_proxies=background_proxies)
    _check_proxies(labels, class_proxies, background_proxies)
    _check_metric(scale, margin)
    pooled = pooled.to(working_dtype(pooled))
    w, u = (F.normalize(proxies.to(pooled.dtype), dim=1) for proxies in (class_proxies, background_proxies))
    present = labels != 0
    to_class = scale * torch.einsum("bnd,cd->bnc", pooled, w)
    to_background = (scale * torch.einsum("bnd,kd->bnk", pooled, u)).logsumexp(2)
    own = to_class[:, 1:].diagonal(dim1=1, dim2=2) - scale * margin
    classes = F.softplus(to_background[:, 1:] - own)
    some_class = present.any(1)
    # An image without a label has no class to compare with: any finite value does, it is not counted.
    nearest = to_class[:, 0].masked_fill(~present & some_class[:, None], -math.inf).logsumexp(1)
    background = F.softplus(nearest - to_background[:, 0] + scale * margin)
    return _mean(classes, present) + _mean(background, some_class)


def d2cam_anchor_loss(logits: Tensor, seed: Tensor, labels: Tensor, *, ignore_index: int = 255) -> Tensor:
    """First constraint, it stabilises the start: cross-entropy of the posterior with seeds of a frozen CAM.

    Foreground and background are named by nothing but this: without it they may swap. Kept for good it would
    copy the errors of the CAM, hence its schedule (`d2cam_anchor_weight`).

    Args:
        logits: Logits (B,1+C,h,w), background first (`d2cam_logits`).
        seed: Label map (B,h,w) on the grid of the logits: 0 background, c+1 a labelled class c, and
            ``ignore_index`` where the CAM is not sure: `dual_threshold_mask` of the frozen maps.
        labels: Image-level labels (B,C).
        ignore_index: Label of pixels without a seed.

    Returns:
        The mean over the seeds, a scalar; 0 with a graph where there are none.

    Raises:
        TypeError: If ``logits`` are not floating-point or ``seed`` no integers.
        ValueError: If shapes do not fit, or ``seed`` holds other values.

    Examples:
        >>> import torch
        >>> seed = torch.tensor([[[0, 1, 255]]])
        >>> d2cam_anchor_loss(torch.zeros(1, 2, 1, 3), seed, torch.tensor([[1]]))  # log 2 at both seeds
        tensor(0.6931)

    Source:
        Our definition, see `DoubleDecoupledCAM`.
    """
    log_posterior = _masked_logits(logits, labels).log_softmax(1)
    check_shapes(logits=(logits, "B N h w"), seed=(seed, "B h w"))
    check_classes(logits.shape[1], ignore_index, seed=seed)
    known = seed != ignore_index
    target = seed.long().where(known, 0)
    loss = -log_posterior.gather(1, target[:, None])[:, 0]
    if not values_unchecked(seed) and bool((loss.isinf() & known).any()):
        raise ValueError("seed: expected background and labelled classes, got a class that is not in labels")
    return _mean(loss, known)


def d2cam_anchor_weight(step: int, warm_up: int) -> float:
    """Weight of the anchor: 1 during the first ``warm_up`` steps, then 0, at once.

    Args:
        step: Number of the training step, from 0.
        warm_up: Number of steps with the anchor, >= 0.

    Returns:
        1.0 or 0.0.

    Raises:
        ValueError: If a number is negative.

    Examples:
        >>> [d2cam_anchor_weight(step, 2) for step in range(4)]
        [1.0, 1.0, 0.0, 0.0]

    Source:
        Our definition, see `DoubleDecoupledCAM`.
    """
    check_number("step", step, at_least=0)
    check_number("warm_up", warm_up, at_least=0)
    return 1.0 if step < warm_up else 0.0


def d2cam_exclusivity_loss(posterior: Tensor, labels: Tensor, *, valid_mask: Tensor | None = None) -> Tensor:
    """Second constraint, it removes non-exclusive activation: half the Gini impurity of the posterior.

        mean_p sum_(k < l) q_k(p) q_l(p)  =  mean_p (1 - sum_k q_k(p)^2) / 2

    Args:
        posterior: Scores (B,1+C,h,w) that sum to one (`d2cam_posterior`).
        labels: Image-level labels (B,C). Images without any are left out: they are all background.
        valid_mask: Positions (B,h,w) that count, all by default.

    Returns:
        The loss, a scalar; 0 with a graph where no image has a label.

    Raises:
        TypeError: If ``posterior`` is not floating-point.
        ValueError: If shapes do not fit.

    Examples:
        >>> import torch
        >>> d2cam_exclusivity_loss(torch.full((1, 2, 1, 1), 0.5), torch.tensor([[1]]))
        tensor(0.2500)

    Source:
        Our definition, see `DoubleDecoupledCAM`.
    """
    check_shapes(posterior=(posterior, "B N h w"))
    check_float(posterior=posterior)
    _check_labels_beside(posterior, labels)
    counted = (labels != 0).any(1)[:, None, None].expand(-1, *posterior.shape[2:])
    if valid_mask is not None:
        check_shapes(posterior=(posterior, "B N h w"), valid_mask=(valid_mask, "B h w"))
        counted = counted & valid_mask
    q = posterior.to(working_dtype(posterior))
    return _mean((1 - q.square().sum(1)) / 2, counted)


# ------------------------------------------------------------------ other foreground-background decouplings


def d2cam_triplet_loss(
    features: Tensor, posterior: Tensor, class_proxies: Tensor, labels: Tensor, *, margin: float = 1.0
) -> Tensor:
    """Foreground against background as a triplet: what a class covers is like the image, the rest is not.

    `g(m)` is the vector of all class scores of the features under a mask, `g_c(m) = <mean_p m(p) z(p), w_c>`,
    and `d` is one minus a cosine. The mean over the labelled classes of all images of

        max(0, margin + d(g(1), g(q_c)) - d(g(1), g(1 - q_c)))  +  mean_p q_c(p)

    The area term keeps a class from covering all. The proxies get no gradient from this.

    Args:
        features: Projected features (B,D,h,w), of any length.
        posterior: Scores (B,1+C,h,w) (`d2cam_posterior`).
        class_proxies: One vector a class (C,D), of any length.
        labels: Image-level labels (B,C).
        margin: Margin of the triplet, >= 0.

    Returns:
        The loss, a scalar; 0 with a graph where no image has a label.

    Raises:
        TypeError: If features, scores or proxies are not floating-point.
        ValueError: If shapes do not fit or ``margin`` is negative.

    Examples:
        >>> import torch
        >>> features = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
        >>> posterior = torch.tensor([[[[0.0, 1.0]], [[1.0, 0.0]], [[0.0, 0.0]]]])
        >>> d2cam_triplet_loss(features, posterior, torch.eye(2), torch.tensor([[1, 0]]))  # a tie; half
        tensor(1.5000)

    Source:
        The form of IDC (TIP 2024) by authors of Mat-Label, as the specification of its public code describes
        it, on the features of `DoubleDecoupledCAM`.
    """
    check_shapes(
        features=(features, "B D h w"),
        posterior=(posterior, "B N h w"),
        class_proxies=(class_proxies, "C D"),
    )
    check_float(features=features, posterior=posterior, class_proxies=class_proxies)
    _check_labels_beside(posterior, labels)
    _check_proxies(labels, class_proxies)
    check_number("margin", margin, at_least=0)
    z = _unit_features(features)
    w = F.normalize(class_proxies.detach().to(z.dtype), dim=1)
    q = posterior[:, 1:].to(z.dtype)
    scores = torch.einsum("bdhw,kd->bkhw", z, w)
    whole = scores.mean((2, 3))[:, None]
    covered = torch.einsum("bchw,bkhw->bck", q, scores) / (q.shape[2] * q.shape[3])
    like = F.cosine_similarity(whole, covered, dim=2)
    unlike = F.cosine_similarity(whole, whole - covered, dim=2)
    return _mean((margin - like + unlike).relu() + q.mean((2, 3)), labels != 0)


def d2cam_contrast_loss(pooled: Tensor, labels: Tensor, *, rank_decay: float = 0.25) -> Tensor:
    """Foreground against background across the images of a batch.

    With `f_i` and `b_i` the pooled foreground and background of image `i`, `s` their cosine clamped to
    [0.0005, 0.9995], and `rank` the place of `j` among the others by likeness to `i`, from 0:

        -mean_(i, j) log(1 - s(b_i, f_j))
        - mean_(i != j) e^(-rank_decay rank) log s(f_i, f_j)  -  the same for b

    It does not say which side is the foreground: the anchor does.

    Args:
        pooled: Pooled features (B,2,D) of unit length, background first: `d2cam_pool` with the posterior
            `[q_0, 1 - q_0]`.
        labels: Image-level labels (B,C). Images without any are left out.
        rank_decay: How fast less alike images lose weight, >= 0.

    Returns:
        The loss, a scalar; 0 with a graph where no image has a label.

    Raises:
        TypeError: If ``pooled`` is not floating-point.
        ValueError: If shapes do not fit or ``rank_decay`` is negative.

    Examples:
        >>> import torch
        >>> pooled = torch.eye(2).expand(3, 2, 2)  # three images that agree
        >>> d2cam_contrast_loss(pooled, torch.ones(3, 1))
        tensor(0.0014)

    Source:
        Xie et al., "C2AM: Contrastive learning of Class-agnostic Activation Map for Weakly Supervised Object
        Localization and Semantic Segmentation", CVPR 2022, as the specification of its public code describes
        it.
    """
    check_shapes(pooled=(pooled, "B 2 D"), labels=(labels, "B C"))
    check_float(pooled=pooled)
    check_labels(labels)
    check_number("rank_decay", rank_decay, at_least=0)
    counted = (labels != 0).any(1)
    pairs = counted[:, None] & counted
    others = pairs & ~torch.eye(len(pairs), dtype=torch.bool, device=pairs.device)

    def likeness(one: Tensor, other: Tensor) -> Tensor:
        return (one @ other.T).clamp(0.0005, 0.9995)

    background, foreground = pooled.to(working_dtype(pooled)).unbind(1)
    loss = _mean(-torch.log(1 - likeness(background, foreground)), pairs)
    for side in (foreground, background):
        s = likeness(side, side)
        rank = s.masked_fill(~others, -1).argsort(1, descending=True).argsort(1)
        loss = loss - _mean(torch.exp(-rank_decay * rank.to(s)) * s.log(), others)
    return loss


# ---------------------------------------------------------------------------------------------------- module


class D2CAMLosses(NamedTuple):
    """The terms of the loss of `DoubleDecoupledCAM`, scalars without their weights."""

    category: Tensor
    foreground_background: Tensor
    anchor: Tensor
    exclusivity: Tensor


class D2CAMOutput(NamedTuple):
    """What `DoubleDecoupledCAM` returns."""

    posterior: Tensor
    """Scores (B,1+C,h,w), background first."""
    logits: Tensor
    """Logits (B,1+C,h,w), to be averaged over views."""
    loss: Tensor | None
    """Weighted sum of the losses; None in eval mode."""
    losses: D2CAMLosses | None
    """The terms of the loss; None in eval mode."""


class DoubleDecoupledCAM(nn.Module):
    """Learn a posterior over labelled classes and background, from image-level labels and a frozen CAM.

    Features of any backbone are projected (1x1) and compared with learned proxies of the classes and of the
    background (`d2cam_logits`); labelled classes and background compete at each position (`d2cam_posterior`).
    In training

        loss = category_weight     d2cam_category_loss       which class is it
             + fb_weight           d2cam_contrast_loss       is it a class at all (or another form: `fb`)
             + anchor_weight       d2cam_anchor_loss         at the start: what a CAM is sure of
             + exclusivity_weight  d2cam_exclusivity_loss    one answer at each position

    to be added to the classification loss of the user's own CAM head. Form and weights are those that did
    best on real photos; without the anchor at the start foreground and background may swap.

    Args:
        in_channels: Channels of the features.
        num_foreground: Number of foreground classes C.
        dim: Channels D after the projection.
        num_background: Number K of background proxies.
        scale: Inverse temperature, > 0.
        margin: Cosine margin of both decouplings, >= 0.
        category_weight: Weight of the category decoupling.
        fb_weight: Weight of the foreground-background decoupling.
        exclusivity_weight: Weight of the exclusivity.
        fb: Form of the foreground-background decoupling: `c2am` (`d2cam_contrast_loss`), `margin`
            (`d2cam_foreground_background_loss`), `triplet` (`d2cam_triplet_loss`).
        detach_pool: Let no gradient through the weights of the pooling.
        generator: Random numbers of the first weights.

    Raises:
        ValueError: If a number is out of range or ``fb`` unknown.

    Examples:
        >>> import torch
        >>> head = DoubleDecoupledCAM(16, num_foreground=3, dim=8)
        >>> features, labels = torch.rand(2, 16, 5, 7), torch.tensor([[1, 0, 0], [0, 1, 1]])
        >>> seed = torch.full((2, 5, 7), 255)  # nothing is sure here
        >>> out = head(features, labels, seed, anchor_weight=d2cam_anchor_weight(step=0, warm_up=100))
        >>> out.posterior.shape, out.loss.shape
        (torch.Size([2, 4, 5, 7]), torch.Size([]))

    Source:
        In the spirit of Wang, Xu, Xu, Meng and Zhang, "Treating Pseudo-labels Generation as Image Matting for
        Weakly Supervised Semantic Segmentation" (Mat-Label), ICCV 2023. Its abstract states: the double
        decoupling, of categories and of foreground and background, by metric learning, and two constraints,
        one that stabilises optimisation and one that removes non-exclusive activation. Its formulas are not
        public: all formulas here are ours, or those of the relatives that the functions name.
    """

    def __init__(
        self,
        in_channels: int,
        num_foreground: int,
        *,
        dim: int = 256,
        num_background: int = 8,
        scale: float = 10.0,
        margin: float = 0.2,
        category_weight: float = 0.1,
        fb_weight: float = 1.0,
        exclusivity_weight: float = 1.0,
        fb: ForegroundBackground = "c2am",
        detach_pool: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_count(in_channels=in_channels, num_foreground=num_foreground)
        check_count(dim=dim, num_background=num_background)
        check_number("category_weight", category_weight, at_least=0)
        check_number("fb_weight", fb_weight, at_least=0)
        check_number("exclusivity_weight", exclusivity_weight, at_least=0)
        _check_metric(scale, margin)
        check_choice("fb", fb, ForegroundBackground)
        self.scale, self.margin = scale, margin
        self.category_weight = category_weight
        self.fb_weight = fb_weight
        self.exclusivity_weight = exclusivity_weight
        self.fb: ForegroundBackground = fb
        self.detach_pool = detach_pool

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator) / math.sqrt(shape[1])

        self.projection = nn.Conv2d(in_channels, dim, 1, bias=False)
        self.projection.weight = nn.Parameter(random(dim, in_channels)[:, :, None, None])
        self.class_proxies = nn.Parameter(random(num_foreground, dim))
        self.background_proxies = nn.Parameter(random(num_background, dim))

    def forward(
        self,
        features: Tensor,
        labels: Tensor,
        seed: Tensor | None = None,
        *,
        anchor_weight: float = 0.0,
        valid_mask: Tensor | None = None,
    ) -> D2CAMOutput:
        """Map features (B,D,h,w) to the posterior, and in training mode to the loss.

        ``seed`` (B,h,w) is the label map of `d2cam_anchor_loss`, needed where ``anchor_weight`` is not 0;
        ``valid_mask`` (B,h,w) keeps padding out of the losses.
        """
        z = self.projection(features)
        logits = d2cam_logits(z, self.class_proxies, self.background_proxies, scale=self.scale)
        posterior = d2cam_posterior(logits, labels)
        if not self.training:
            return D2CAMOutput(posterior, logits, None, None)
        if anchor_weight > 0 and seed is None:
            raise ValueError("seed: expected a label map (B,h,w) beside an anchor_weight, got None")
        weights = posterior.detach() if self.detach_pool else posterior
        pooled = d2cam_pool(z, weights, valid_mask=valid_mask)
        nothing = logits.sum() * 0
        losses = D2CAMLosses(
            d2cam_category_loss(pooled, self.class_proxies, labels, scale=self.scale, margin=self.margin),
            self._foreground_background(z, weights, pooled, labels, valid_mask),
            nothing if seed is None or anchor_weight == 0 else d2cam_anchor_loss(logits, seed, labels),
            d2cam_exclusivity_loss(posterior, labels, valid_mask=valid_mask),
        )
        loss = (
            self.category_weight * losses.category
            + self.fb_weight * losses.foreground_background
            + anchor_weight * losses.anchor
            + self.exclusivity_weight * losses.exclusivity
        )
        return D2CAMOutput(posterior, logits, loss, losses)

    def _foreground_background(
        self, z: Tensor, posterior: Tensor, pooled: Tensor, labels: Tensor, valid_mask: Tensor | None
    ) -> Tensor:
        if self.fb == "triplet":
            return d2cam_triplet_loss(z, posterior, self.class_proxies, labels)
        if self.fb == "c2am":
            background = posterior[:, :1]
            sides = d2cam_pool(z, torch.cat([background, 1 - background], 1), valid_mask=valid_mask)
            return d2cam_contrast_loss(sides, labels)
        return d2cam_foreground_background_loss(
            pooled, self.class_proxies, self.background_proxies, labels, scale=self.scale, margin=self.margin
        )


# --------------------------------------------------------------------------------------------------- helpers


def _unit_features(features: Tensor) -> Tensor:
    return F.normalize(features.to(working_dtype(features)), dim=1)


def _log_mean_exp(values: Tensor, dim: int) -> Tensor:
    return values.logsumexp(dim, keepdim=True) - math.log(values.shape[dim])


def _masked_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits of absent classes become minus infinity; background always takes part."""
    check_shapes(logits=(logits, "B N h w"))
    check_float(logits=logits)
    _check_labels_beside(logits, labels)
    absent = F.pad(labels == 0, (1, 0))
    return logits.to(working_dtype(logits)).masked_fill(absent[:, :, None, None], -math.inf)


def _check_labels_beside(scores: Tensor, labels: Tensor) -> None:
    """Check labels (B,C) against something (B,1+C,...)."""
    check_shapes(labels=(labels, "B C"))
    if (expected := (scores.shape[0], scores.shape[1] - 1)) != tuple(labels.shape):
        raise ValueError(
            f"labels: expected shape {expected} beside a background channel, got {tuple(labels.shape)}"
        )
    check_labels(labels)


def _check_proxies(
    labels: Tensor | None = None,
    class_proxies: Tensor | None = None,
    background_proxies: Tensor | None = None,
) -> None:
    if labels is not None and class_proxies is not None and len(class_proxies) != labels.shape[1]:
        raise ValueError(
            f"class_proxies: expected {labels.shape[1]}, one for each class of labels, "
            f"got {len(class_proxies)}"
        )
    if background_proxies is not None and len(background_proxies) == 0:
        raise ValueError("background_proxies: expected at least one, got none")


def _check_metric(scale: float, margin: float) -> None:
    check_number("scale", scale, above=0)
    check_number("margin", margin, at_least=0)


def _mean(loss: Tensor, counted: Tensor) -> Tensor:
    """Mean over what counts; 0 with a graph where nothing does."""
    return loss.where(counted, 0).sum() / counted.sum().clamp(min=1)
