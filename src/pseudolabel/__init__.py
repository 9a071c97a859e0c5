"""Parts of weakly supervised semantic segmentation: from image-level labels to pixel masks.

The rooms of the library load on first use:

- `pseudolabel.cam`: from a classifier to class activation maps;
- `pseudolabel.refine`: from maps to better maps;
- `pseudolabel.masks`: from maps to label maps;
- `pseudolabel.matting`: from an image and a trimap to mattes;
- `pseudolabel.heads`: trainable heads beside a classifier;
- `pseudolabel.losses`: training on noisy masks;
- `pseudolabel.metrics`: from label maps and truth to figures;
- `pseudolabel.recipes`: each paper's whole way, written with the parts;
- `pseudolabel.io`: images, labels, masks and maps on disk.

Examples:
    >>> import torch
    >>> import pseudolabel as pl
    >>> cam = torch.tensor([[[[0.9, 0.2], [0.1, 0.0]]]])
    >>> pl.masks.scores_to_mask(pl.masks.constant_background(cam, 0.15))
    tensor([[[1, 1],
             [0, 0]]])
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = ["__version__", "cam", "heads", "io", "losses", "masks", "matting", "metrics", "recipes", "refine"]

if TYPE_CHECKING:
    from pseudolabel import cam, heads, io, losses, masks, matting, metrics, recipes, refine


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
