"""RTC (TCSVT 2024): the losses of its two views, and from its network to masks."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pseudolabel._checks import (
    check_callable,
    check_channels,
    check_float,
    check_number,
    check_probability,
    check_shapes,
)
from pseudolabel._maps import (
    gather_present,
    present_classes,
    scatter_present,
    stretch,
    stretched_mean,
    working_dtype,
)
from pseudolabel.cam import make_views, merge_views, normalize_cam
from pseudolabel.heads import Compensator, CrossTransformRegularization, CTROutput, TopK
from pseudolabel.losses import (
    balanced_mask_cross_entropy,
    equivariance_loss,
    equivariant_cross_loss,
    min_pooling_loss,
)
from pseudolabel.masks import (
    DualThresholdMask,
    constant_background,
    fuse_segmentation_and_class,
    scores_to_mask,
)
from pseudolabel.refine import CRF_PRESETS, VARM, DenseCRF, probs_from_mask

__all__ = ["RTCLoss", "RTCOutput", "ViewOutput", "rtc"]

_crf = DenseCRF(**CRF_PRESETS["irn_label"])


def rtc(
    image: Tensor,
    network: Callable[[Tensor], tuple[Tensor, Tensor]],
    labels: Tensor | None = None,
    *,
    scales: Sequence[float] = (0.5, 1.0, 1.5, 2.0),
    flip: bool = True,
    background: float = 0.17,
    crf: Callable[[Tensor, Tensor], Tensor] | None = _crf,
) -> Tensor:
    """Turn what an RTC network says of several views of an image into masks.

        fuse_segmentation_and_class of each view -> mean -> constant_background -> scores_to_mask
        -> probs_from_mask -> crf

    It is the segmentation branch that makes the masks; the maps of the classifier are a soft gate.

    Args:
        image: Images (B,3,H,W) in [0, 1].
        network: Callable from such images (B,3,h,w) to raw maps (B,C,.,.) and segmentation logits
            (B,1+C,.,.). A network that wants normalised ones is wrapped.
        labels: Image-level labels (B,C). With them absent classes are left out; the official program does
            without, for training images too.
        scales: Factors of both sides.
        flip: See each scale mirrored as well.
        background: Score of the background, in [0, 1]. Official: 0.17, chosen on true masks.
        crf: Refiner `(image, probs) -> probs` on the labels of the mask, trusted by 0.7; None goes without.

    Returns:
        Mask (B,H,W) int64: 0 background, c+1 class c.

    Raises:
        TypeError: If ``image`` or what the network returns is not floating-point.
        ValueError: If shapes do not fit, values are out of range, or a setting is.

    Examples:
        >>> import torch
        >>> image = torch.tensor([[[[0.4, 0.4, 0.4, 0.4]], [[0.8, 0.6, 0.0, 0.1]], [[0.0, 0.0, 0.0, 0.0]]]])
        >>> network = lambda x: (20 * x[:, 1:], 20 * x)
        >>> rtc(image, network, scales=(1.0,), crf=None)
        tensor([[[1, 1, 0, 0]]])

    Source:
        Wang, Zhang and Yan, "Boosting Weakly-Supervised Image Segmentation via Representation, Transform, and
        Compensator", arXiv 2309.00871 and IEEE TCSVT 2024; matches the inference of the official
        implementation at 9c777e0 up to its CRF.
    """
    check_probability("background", background)
    check_callable(network=network)
    views = []
    for view in make_views(image, scales, flip):
        outputs = network(view)
        if not isinstance(outputs, (tuple, list)) or len(outputs) != 2:
            raise ValueError(
                f"network(image): expected a pair, maps and logits, got {type(outputs).__name__}"
            )
        cam, logits = outputs
        views.append(fuse_segmentation_and_class(logits, cam, (view.shape[2], view.shape[3])))
    scores = merge_views(views, (image.shape[2], image.shape[3]), labels, flip=flip) / len(views)
    mask = scores_to_mask(constant_background(scores, background))
    if crf is None:
        return mask
    return scores_to_mask(crf(image, probs_from_mask(mask, 1 + scores.shape[1])))


class ViewOutput(NamedTuple):
    """What an RTC network says of one view.

    Attributes:
        cam: Raw maps of the classifier (B,C,h,w), foreground classes only.
        refined: Refined scores (B,1+C,h,w), background first: `heads.CrossRepresentationRefinement`.
        features: Input (B,D,h,w) of the last layer of the classifier.
        input_size: Size (H,W) of the view.
        logits: Segmentation logits (B,1+C,h',w'), background first; of the first view alone.
    """

    cam: Tensor
    refined: Tensor
    features: Tensor
    input_size: tuple[int, int]
    logits: Tensor | None = None


class RTCOutput(NamedTuple):
    """What `RTCLoss` returns.

    Attributes:
        loss: The sum of the terms, a scalar.
        terms: `classification`, `min_pooling`, `equivariance`, `equivariant_cross`, `intra_view`,
            `cross_label`, `cross_prototype`, `compensation` and `segmentation`, scalars.
        ctr: Scores, pseudo-labels and prototypes of both views.
        mask: The online pseudo-mask (B,H,W) int64; None before ``seg_start_epoch``.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    ctr: CTROutput
    mask: Tensor | None


class RTCLoss(nn.Module):
    """The whole loss of an RTC training step, from the outputs of the network on two views of each image.

        classification     are the classes in the mean of the maps?
        min_pooling        refined maps leave a quarter of the image free
        equivariance       the maps of both views agree
        equivariant_cross  refined maps learn from the maps of the other view
        intra_view, cross_label, cross_prototype
                           features look like the prototypes of their class
        compensation       maps learn from refined maps that were compensated
        segmentation       from some epoch on, the segmentation branch learns from the refined maps

    The second view is the first one made smaller, with nothing else done to it (official: 448 and 128
    pixels); what compares the two does so at the size of the second. All terms have weight 1, the halves and
    tenths of the official program inside them.

    Args:
        seg_start_epoch: First epoch, counted from 0, with the segmentation loss. Official: 7.
        contrast: `heads.CrossTransformRegularization` of your own settings.
        compensator: `heads.Compensator` of your own settings.
        make_mask: Callable `(cam, image, labels, boxes) -> mask` from normalised maps (B,C,H,W); by default
            `masks.DualThresholdMask` with the official settings and `refine.VARM`.

    Raises:
        ValueError: If ``seg_start_epoch`` is negative.

    Examples:
        >>> import torch
        >>> maps = lambda channels, size: torch.rand(2, channels, size, size)
        >>> view1 = ViewOutput(maps(3, 8), maps(4, 8), maps(5, 8), (64, 64), logits=maps(4, 16))
        >>> view2 = ViewOutput(maps(3, 4), maps(4, 4), maps(5, 4), (32, 32))
        >>> out = RTCLoss()(view1, view2, torch.eye(3)[:2], maps(3, 64), epoch=7)
        >>> out.loss.shape, out.mask.shape
        (torch.Size([]), torch.Size([2, 64, 64]))

    Source:
        Wang, Zhang and Yan, "Boosting Weakly-Supervised Image Segmentation via Representation, Transform, and
        Compensator", arXiv 2309.00871 and IEEE TCSVT 2024. Read off the training loop of the official
        implementation at 9c777e0, which this matches, values and the gradients of all outputs. The first
        four terms are those of SEAM; they are not in the paper's figure, but nothing else trains the refined
        maps. The official optimiser has weight decay where momentum is meant: it trains with momentum 5e-4.
    """

    def __init__(
        self,
        *,
        seg_start_epoch: int = 7,
        contrast: CrossTransformRegularization | None = None,
        compensator: Compensator | None = None,
        make_mask: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor] | None = None,
    ) -> None:
        super().__init__()
        check_number("seg_start_epoch", seg_start_epoch, at_least=0)
        self.seg_start_epoch = seg_start_epoch
        self.contrast = CrossTransformRegularization() if contrast is None else contrast
        self.compensator = Compensator() if compensator is None else compensator
        if make_mask is None:
            make_mask = DualThresholdMask(high=0.55, low=0.2, refine=VARM(), softmax=True, downscale=2)
        self.make_mask = make_mask

    def forward(
        self,
        view1: ViewOutput,
        view2: ViewOutput,
        labels: Tensor,
        image: Tensor,
        boxes: Tensor | None = None,
        *,
        epoch: int = 0,
        topk: tuple[TopK, TopK] | None = None,
    ) -> RTCOutput:
        """Loss of two views.

        Args:
            view1: Outputs on the images, with logits.
            view2: Outputs on the smaller images.
            labels: Image-level labels (B,C).
            image: The images of the first view (B,3,H,W) in [0, 1], not normalised.
            boxes: Box (B,4) of each photo inside its padded image: top, left, bottom, right. The mask
                ignores what is outside; the other losses do not.
            epoch: Number of the epoch, from 0.
            topk: Pixels of the prototypes, see `heads.CrossTransformRegularization`.
        """
        check_number("epoch", epoch, at_least=0)
        _check_view("view1", view1, labels)
        _check_view("view2", view2, labels)
        size = view2.input_size
        cam1, cam2 = (_compare_at(size, view.cam, labels, view) for view in (view1, view2))
        with_background = F.pad(labels, (1, 0), value=1)
        target1, target2 = (_compare_at(size, view.refined, with_background, view) for view in (view1, view2))
        ctr = self.contrast(view1.refined, view2.refined, view1.features, view2.features, labels, topk=topk)
        classify = _classify(view1, labels) + _classify(view2, labels)
        fill = _fill(view1, labels) + _fill(view2, labels)
        cross1 = equivariant_cross_loss(cam2, target1, labels)
        cross2 = equivariant_cross_loss(cam1, target2, labels)
        segmentation, mask = torch.zeros_like(classify), None
        if epoch >= self.seg_start_epoch:
            segmentation, mask = self._segment(view1, labels, image, boxes)
        terms = {
            "classification": classify / 2,
            "min_pooling": fill / 2,
            "equivariance": equivariance_loss(cam1, cam2, labels, mean_over="all"),
            "equivariant_cross": cross1 + cross2,
            **ctr.losses,
            "compensation": self.compensator(cam1, cam2, ctr, labels),
            "segmentation": segmentation,
        }
        return RTCOutput(torch.stack([*terms.values()]).sum(), terms, ctr, mask)

    def _segment(
        self, view: ViewOutput, labels: Tensor, image: Tensor, boxes: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Loss of the segmentation branch, and the mask that it learns from."""
        if view.logits is None:
            raise ValueError(f"view1.logits: expected logits from epoch {self.seg_start_epoch} on, got None")
        with torch.no_grad():
            cam = normalize_cam(view.refined[:, 1:], "minmax-zero")
            mask = self.make_mask(stretch(cam, (image.shape[2], image.shape[3])), image, labels, boxes)
        return balanced_mask_cross_entropy(view.logits, mask, labels), mask

    def extra_repr(self) -> str:
        """Settings, for `print`."""
        return f"seg_start_epoch={self.seg_start_epoch}"


def _enlarge(maps: Tensor, labels: Tensor, view: ViewOutput) -> tuple[Tensor, Tensor, Tensor]:
    """Maps (B,P,H,W) of the present classes at the size of the view, their index and which are real."""
    index, valid = present_classes(labels)
    maps = gather_present(maps.to(working_dtype(maps)), index)
    return stretch(maps, view.input_size), index, valid


def _compare_at(size: tuple[int, int], maps: Tensor, labels: Tensor, view: ViewOutput) -> Tensor:
    """Maps normalised at the size of their view, and brought to ``size``; absent classes are 0."""
    present, index, valid = _enlarge(maps, labels, view)
    present = stretch(normalize_cam(present, "minmax-zero"), size)
    return scatter_present(present, index, valid, maps.shape[1])


def _classify(view: ViewOutput, labels: Tensor) -> Tensor:
    """Do the maps, averaged at the size of the view, tell the classes of the image?"""
    mean = stretched_mean(view.cam.to(working_dtype(view.cam)), view.input_size)
    return F.multilabel_soft_margin_loss(mean, labels.to(mean.dtype))


def _fill(view: ViewOutput, labels: Tensor) -> Tensor:
    """How far the refined maps of the present classes fill the image."""
    present, _, valid = _enlarge(view.refined[:, 1:], labels, view)
    present = F.pad(present, (0, 0, 0, 0, 0, 1))  # a class of zeros, for images without labels
    return min_pooling_loss(present, F.pad(valid, (0, 1)))


def _check_view(name: str, view: ViewOutput, labels: Tensor) -> None:
    check_shapes(**{f"{name}.cam": (view.cam, "B C h w"), "labels": (labels, "B C")})
    check_shapes(**{f"{name}.cam": (view.cam, "B C h w"), f"{name}.refined": (view.refined, "B 1+C h w")})
    check_float(**{f"{name}.cam": view.cam, f"{name}.refined": view.refined})
    check_channels(view.cam.shape[1], f"{name}.cam", **{f"{name}.refined": view.refined})
