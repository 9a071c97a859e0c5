"""Mat-Label (ICCV 2023): from the posterior of double decoupled CAMs to masks, by matting."""

from collections.abc import Callable

import torch
from torch import Tensor

from pseudolabel._checks import (
    check_callable,
    check_channels,
    check_float,
    check_labels,
    check_shapes,
    check_unit_range,
)
from pseudolabel._maps import gather_present, place_labels, present_classes, resize, scatter_present
from pseudolabel.masks import TrimapBuilder, alpha_to_mask
from pseudolabel.matting import MattingRefiner
from pseudolabel.refine import CRF_PRESETS, DenseCRF

__all__ = ["matlabel"]

_crf = DenseCRF(**CRF_PRESETS["deeplab"])
_trimap = TrimapBuilder(kind="posterior", foreground=0.8, background=0.8, margin=0.2, erode=10)
_matting = MattingRefiner("closed_form")


def matlabel(
    image: Tensor,
    posterior: Tensor,
    labels: Tensor,
    *,
    refine: Callable[[Tensor, Tensor], Tensor] | None = _crf,
    trimap: Callable[[Tensor, Tensor], Tensor] = _trimap,
    matting: Callable[[Tensor, Tensor, Tensor], Tensor] = _matting,
    confidence: float | None = 0.5,
    margin: float | None = 0.1,
    ignore_index: int = 255,
) -> Tensor:
    """Find the sure pixels of each class and of the background, and let matting decide the rest by the photo.

        Q     = refine(image, posterior)           among background and present classes
        T     = trimap(Q, labels)                  sure foreground, sure background, unknown
        alpha = matting(image, T, Q)               all classes in one system, drawn to Q
        mask  = alpha_to_mask(alpha),  ignored where the best part is small or leads by little

    A head that compares by cosines is surer than it is right; make it softer before a refiner weighs it
    against the photo: `d2cam_posterior(logits, labels, temperature=5)`.

    Args:
        image: Images (B,3,H,W) in [0, 1].
        posterior: Scores (B,1+C,h,w) in [0, 1], background first, that sum to one among background and
            present classes: `d2cam_posterior`, or any other. Averaged over views, if there are several.
        labels: Image-level labels (B,C). Without a label an image is background everywhere.
        refine: Refiner `(image, maps) -> maps` on (B,1+P,H,W), background and places of present classes; None
            goes without, as the abstract of the paper has it.
        trimap: Callable from scores (B,1+C,H,W) and labels to a trimap (B,C,H,W), such as `TrimapBuilder`.
        matting: Callable from image, trimap and prior (B,C,H,W) to mattes (B,C,H,W), such as
            `MattingRefiner`. One without a prior is wrapped: `lambda image, trimap, _: ...`.
        confidence: Smallest part that counts as decided (`alpha_to_mask`); None to label every pixel.
        margin: Smallest lead that counts as decided; None to label every pixel.
        ignore_index: Label of the pixels that are left out.

    Returns:
        Mask (B,H,W) int64: 0 background, c+1 class c, ``ignore_index`` where undecided.

    Raises:
        TypeError: If ``image`` or ``posterior`` is not a floating-point tensor.
        ValueError: If shapes do not fit, values are out of range, or a setting is.

    Examples:
        >>> import torch
        >>> image = torch.tensor([0.1, 0.1, 0.1, 0.9, 0.9, 0.9]).expand(1, 3, 5, 6)
        >>> sure = torch.tensor([0.05, 0.3, 0.4, 0.5, 0.6, 0.95]).expand(1, 1, 5, 6)
        >>> posterior = torch.cat([1 - sure, sure], 1)
        >>> trimap = TrimapBuilder(kind="posterior", foreground=0.9, background=0.9)
        >>> matlabel(image, posterior, torch.tensor([[1]]), refine=None, trimap=trimap)[0, 0]
        tensor([0, 0, 0, 1, 1, 1])

    Source:
        Wang, Xu, Xu, Meng and Zhang, "Treating Pseudo-labels Generation as Image Matting for Weakly
        Supervised Semantic Segmentation", ICCV 2023. Its abstract states the way: CAM, trimap, matting, mask.
        Trimap rule, matting method and merging of classes are not public: what is here, the refiner in front
        among it, is ours.
    """
    sizes = check_shapes(image=(image, "B 3 H W"), labels=(labels, "B C"))
    check_shapes(image=(image, "B 3 H W"), posterior=(posterior, "B N h w"))
    check_float(image=image, posterior=posterior)
    check_labels(labels)
    check_channels(sizes["C"], "labels", posterior=posterior)
    check_unit_range(posterior=posterior)
    check_callable(trimap=trimap, matting=matting, **({} if refine is None else {"refine": refine}))

    index, valid = present_classes(labels)
    scores = resize(gather_present(posterior, place_labels(index)), (sizes["H"], sizes["W"]))
    if refine is not None:
        scores = refine(image, scores)
    foreground = scatter_present(scores[:, 1:], index, valid, sizes["C"]).clamp(0, 1)
    # What is left of one: a batch may hold places that an image does not use, and a refiner round them up.
    scores = torch.cat([(1 - foreground.sum(1, keepdim=True)).clamp(min=0), foreground], 1)
    alpha = matting(image, trimap(scores, labels), foreground)
    return alpha_to_mask(alpha, labels, confidence=confidence, margin=margin, ignore_index=ignore_index)
