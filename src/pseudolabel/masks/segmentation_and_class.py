"""What a segmentation network says of the pixels, gated by what a classifier says of the image."""

from torch import Tensor

from pseudolabel._checks import check_channels, check_float, check_shapes, check_size
from pseudolabel._maps import stretch, stretched_mean, working_dtype

__all__ = ["fuse_segmentation_and_class"]


def fuse_segmentation_and_class(logits: Tensor, cam: Tensor, size: tuple[int, int]) -> Tensor:
    """Foreground scores of a network with two branches: a pixel has a class as far as the image has it.

        score_c(p) = softmax(logits)_c(p) sigmoid(mean over pixels of cam_c)

    Both are stretched to ``size`` first, bilinear with `align_corners=True` as in the official program. No
    image-level label is used: the gate is soft. The scores of several views are averaged
    (`cam.merge_views`), and compared with a `constant_background`.

    Args:
        logits: Logits of the segmentation branch (B,1+C,h,w), background first.
        cam: Raw maps of the classification branch (B,C,h',w').
        size: Size (H,W) of the input of the network.

    Returns:
        Scores (B,C,H,W) in [0, 1], foreground classes only, float32 or better.

    Raises:
        TypeError: If ``logits`` or ``cam`` are not floating-point.
        ValueError: If shapes do not fit, or a side of ``size`` is below 1.

    Examples:
        >>> import torch
        >>> logits = torch.tensor([[[[0.0, 0.0]], [[0.0, 9.0]], [[-9.0, -9.0]]]])
        >>> cam = torch.tensor([[[[5.0, 7.0]], [[-6.0, -6.0]]]])
        >>> fuse_segmentation_and_class(logits, cam, (1, 2))[0, 0]
        tensor([[0.4987, 0.9974]])

    Source:
        Wang, Zhang and Yan, "Boosting Weakly-Supervised Image Segmentation via Representation, Transform, and
        Compensator" (RTC), 2023; part of the inference of the official implementation at 9c777e0, which it
        matches. The formula is read off the code.
    """
    check_shapes(logits=(logits, "B 1+C h w"), cam=(cam, "B C h' w'"))
    check_float(logits=logits, cam=cam)
    check_channels(cam.shape[1], "cam", logits=logits)
    check_size(size=size)
    probs = stretch(logits.to(working_dtype(logits)), size).softmax(1)[:, 1:]
    gate = stretched_mean(cam.to(working_dtype(cam)), size).sigmoid()
    return probs * gate[:, :, None, None]
