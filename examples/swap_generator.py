"""Compare mask generators: any callable `(image, cam, labels) -> mask` goes into the same place.

    python examples/swap_generator.py

The photo comes with scikit-image; the maps of its two classes are drawn, so nothing is trained. Printed
is the share of the pixels that each generator gives to each class, and how far it agrees with the first one.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from skimage import data
from torch import Tensor

import pseudolabel as pl

Generator = Callable[[Tensor, Tensor, Tensor], Tensor]

CLASSES = ("background", "cup", "spoon")


def photo_and_maps(height: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    """The coffee cup as (1,3,H,W), normalised maps (1,2,H,W) of cup and spoon, labels (1,2)."""
    image = torch.from_numpy(data.coffee()).permute(2, 0, 1)[None] / 255
    size = (height, height * 3 // 2)
    image = F.interpolate(image, size=size, mode="bilinear", antialias=True).clamp(0, 1)
    y, x = torch.meshgrid(torch.linspace(0, 1, size[0]), torch.linspace(0, 1, size[1]), indexing="ij")

    def bump(cy: float, cx: float, sy: float, sx: float) -> Tensor:
        return torch.exp(-(((y - cy) / sy) ** 2 + ((x - cx) / sx) ** 2) / 2)

    cup = bump(0.32, 0.47, 0.17, 0.16) + 0.8 * bump(0.58, 0.47, 0.24, 0.24)
    spoon = bump(0.70, 0.61, 0.10, 0.06) + 0.5 * bump(0.38, 0.67, 0.16, 0.05)
    return image, pl.cam.normalize_cam(torch.stack([cup, spoon])[None]), torch.ones(1, 2, dtype=torch.bool)


def my_own(image: Tensor, cam: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG001
    """A generator of your own: half of the image's highest value is where a class begins."""
    cam = cam * labels[:, :, None, None]
    return pl.masks.scores_to_mask(pl.masks.constant_background(cam, 0.5))


def double_threshold(image: Tensor, cam: Tensor, labels: Tensor) -> Tensor:
    """Agreement of a strict and a loose background; the rest is ignored."""
    return pl.masks.dual_threshold_mask(cam * labels[:, :, None, None], image, high=0.4, low=0.1)


GENERATORS: dict[str, Generator] = {
    "proportional, alpha 4": pl.masks.ProportionalPseudoMask(alpha=4),
    "proportional, no CRF": pl.masks.ProportionalPseudoMask(alpha=4, crf=None),
    "pmm, published alpha 11": pl.recipes.pmm,
    "double threshold": double_threshold,
    "my own": my_own,
}


def main(height: int = 200) -> dict[str, Tensor]:
    """Print the table, and return the masks."""
    image, cam, labels = photo_and_maps(height)
    masks = {name: generate(image, cam, labels) for name, generate in GENERATORS.items()}  # the one line
    first = next(iter(masks.values()))
    columns = (*CLASSES, "ignored", "agreement")
    print(f"{'generator':<26}" + "".join(f"{name:>12}" for name in columns))
    for name, mask in masks.items():
        shares = [(mask == value).float().mean().item() for value in (0, 1, 2, 255)]
        agreement = (mask == first).float().mean().item()
        print(f"{name:<26}" + "".join(f"{share:>12.1%}" for share in (*shares, agreement)))
    return masks


if __name__ == "__main__":
    main()
