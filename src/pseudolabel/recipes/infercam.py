"""InferCam (WACV 2022): from a classifier, looked through several times, to masks."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pseudolabel._checks import check_probability
from pseudolabel.cam import infer_response_map
from pseudolabel.masks import constant_background, scores_to_mask

__all__ = ["infercam"]


def infercam(
    image: Tensor,
    cam_fn: Callable[[Tensor], Tensor],
    labels: Tensor,
    *,
    background: float = 0.2,
    refine: Callable[[Tensor, Tensor], Tensor] | None = None,
    **settings: Any,
) -> Tensor:
    """Find where a classifier sees its classes, erasing and looking again, and make masks of it.

        infer_response_map -> refine -> constant_background -> scores_to_mask

    The official program ends with the maps, and hands them to AffinityNet and its random walk; it has no
    background. One of a fixed score 0.2 was there until its commit f4c751f. What score is right depends on
    the maps: choose it on scored images (`choose_background`).

    Args:
        image: Images (B,3,H,W) in [0, 1].
        cam_fn: Callable from such images to maps (N,C,h',w'). A network that wants normalised ones is
            wrapped: `lambda x: cam((x - mean) / std)`, with a `CAM`, say.
        labels: Image-level labels (B,C).
        background: Score of the background, in [0, 1].
        refine: Refiner `(image, maps) -> maps`, such as a random walk; None goes without.
        **settings: Settings of `infer_response_map`, such as ``scales``.

    Returns:
        Mask (B,H,W) int64: 0 background, c+1 class c.

    Raises:
        TypeError: If ``image`` is not floating-point.
        ValueError: If shapes do not fit, values are out of range, or a setting is.

    Examples:
        >>> import torch
        >>> image = torch.zeros(1, 3, 1, 5)
        >>> image[0, 1, 0] = torch.tensor([0.8, 0.5, 0.2, 0.0, 0.0])
        >>> infercam(image, lambda x: x, torch.tensor([[0, 1, 0]]), scales=(1.0,), split=False)
        tensor([[[2, 2, 2, 0, 0]]])

    Source:
        Sun, Zhang and Barnes, "Inferring the Class Conditional Response Map for Weakly Supervised Semantic
        Segmentation", WACV 2022; defaults of the official implementation at 96ba7d8.
    """
    check_probability("background", background)
    maps = infer_response_map(cam_fn, image, labels, **settings).response
    if refine is not None:
        # Whatever the refiner makes of them, absent classes stay absent.
        maps = refine(image, maps) * (labels != 0)[:, :, None, None]
    return scores_to_mask(constant_background(maps, background))
