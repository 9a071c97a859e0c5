"""Draw the pictures of the gallery page: `python docs/gallery/make_gallery.py [FOLDER]`.

The photos come with scikit-image. The class activation maps are drawn by hand, with seeded noise, at the
coarse resolution of a network: what a classifier might give, without any weights. All else is the library.
"""

import io
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # no display needed

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from skimage import data
from torch import Tensor

import pseudolabel as pl

Blob = tuple[float, float, float, float, float]  # y, x, spread in y, spread in x (parts of the sides), height

# Okabe and Ito: told apart by all common kinds of colour vision.
COLOURS = {1: (0.90, 0.62, 0.00), 2: (0.00, 0.45, 0.70), 255: (0.97, 0.97, 0.97)}
NETWORK_STRIDE = 16
WIDTH = 7.4  # inches
CUP, SPOON = 0, 1

plt.rcParams.update(
    {"font.size": 8, "axes.titlesize": 8, "axes.titlepad": 4, "figure.dpi": 118, "hatch.linewidth": 0.6}
)


def photo(name: str, width: int) -> Tensor:
    """A photo of scikit-image as (1,3,H,W) in [0, 1]."""
    image = torch.from_numpy(getattr(data, name)()).permute(2, 0, 1)[None] / 255
    height = round(width * image.shape[2] / image.shape[3])
    return F.interpolate(image, size=(height, width), mode="bilinear", antialias=True).clamp(0, 1)


def draw_cam(blobs: list[Blob], size: tuple[int, int], seed: int, base: float = 0.0) -> Tensor:
    """A raw map (1,1,H,W): bumps and noise on the grid of a network, resized to the photo."""
    generator = torch.Generator().manual_seed(seed)
    h, w = (side // NETWORK_STRIDE for side in size)
    y, x = torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij")
    cam = base + 0.5 * torch.randn(h, w, generator=generator)
    for cy, cx, sy, sx, height in blobs:
        cam += height * torch.exp(-(((y - cy) / sy) ** 2 + ((x - cx) / sx) ** 2) / 2)
    return F.interpolate(cam[None, None], size=size, mode="bilinear", align_corners=False)


def cat() -> tuple[Tensor, Tensor, Tensor]:
    """Photo, and a peaky and a broad raw map of the class cat."""
    image = photo("chelsea", 320)
    size = (image.shape[2], image.shape[3])
    face = [(0.36, 0.38, 0.10, 0.09, 9.0), (0.45, 0.69, 0.10, 0.08, 8.0), (0.78, 0.57, 0.14, 0.12, 5.0)]
    body = [(0.45, 0.40, 0.34, 0.30, 8.0), (0.75, 0.45, 0.25, 0.30, 3.0)]
    return image, draw_cam(face, size, seed=1), draw_cam(body, size, seed=2)


def coffee() -> tuple[Tensor, Tensor]:
    """Photo, and raw maps (1,2,H,W) of the classes cup and spoon."""
    image = photo("coffee", 320)
    size = (image.shape[2], image.shape[3])
    cup = [(0.32, 0.47, 0.17, 0.16, 9.0), (0.58, 0.47, 0.24, 0.24, 7.5)]
    spoon = [(0.70, 0.61, 0.10, 0.06, 10.0), (0.38, 0.67, 0.16, 0.05, 5.0), (0.40, 0.45, 0.20, 0.15, 1.2)]
    return image, torch.cat([draw_cam(cup, size, seed=3), draw_cam(spoon, size, seed=4)], dim=1)


# ------------------------------------------------------------------------------------------ panels


def panels(rows: int, columns: int, aspect: float, title_inches: float = 0.38) -> tuple[Figure, np.ndarray]:
    height = rows * (WIDTH / columns * aspect + title_inches)
    figure, axes = plt.subplots(rows, columns, figsize=(WIDTH, height), squeeze=False, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.05, wspace=0.01, hspace=0.01)
    for ax in axes.flat:
        ax.set_axis_off()
    return figure, axes


def show_photo(ax: Axes, image: Tensor, title: str) -> None:
    ax.imshow(image[0].permute(1, 2, 0).numpy())
    ax.set_title(title)


def show_borders(ax: Axes, ids: Tensor) -> None:
    """Draw the borders of regions (H,W) over a photo."""
    border = torch.zeros_like(ids, dtype=torch.bool)
    border[1:] |= ids[1:] != ids[:-1]
    border[:, 1:] |= ids[:, 1:] != ids[:, :-1]
    line = torch.tensor([1.0, 1.0, 0.3, 1.0]) * border[..., None]
    ax.imshow(line.numpy(), interpolation="nearest")


def show_map(ax: Axes, cam: Tensor, title: str, low: float = 0.0, high: float = 1.0) -> None:
    """A map (H,W) from dark (low) to bright (high), with its scale."""
    drawn = ax.imshow(cam.numpy(), cmap="viridis", vmin=low, vmax=high)
    ax.set_title(title)
    bar = ax.figure.colorbar(drawn, ax=ax, fraction=0.046, pad=0.02, ticks=[low, high])
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=6, length=0, pad=1)


def show_mask(ax: Axes, image: Tensor, mask: Tensor, title: str) -> None:
    """A mask (H,W) in colour over a grey photo; ignored pixels are hatched."""
    grey = (image[0].mean(0)[..., None].expand(-1, -1, 3) * 16).round() / 16  # few colours, small files
    picture = 0.3 + 0.5 * grey
    for value, colour in COLOURS.items():
        painted = 0.25 * grey + 0.75 * torch.tensor(colour)
        picture = torch.where((mask == value)[..., None], painted, picture)
    ax.imshow(picture.numpy())
    if bool((mask == 255).any()):
        ax.contourf((mask == 255).numpy(), levels=[0.5, 1.5], colors="none", hatches=["////"])
    classes = mask.masked_fill(mask == 255, 0)
    if bool(classes.any()):
        ax.contour(classes.numpy(), levels=[0.5, 1.5], colors="black", linewidths=0.4)
    ax.set_title(title)


def legend(figure: Figure, names: dict[int, str]) -> None:
    patches = [
        Patch(facecolor=COLOURS[value], edgecolor="black", hatch="////" if value == 255 else None, label=name)
        for value, name in names.items()
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)


def save(figure: Figure, path: Path) -> None:
    """As a PNG of 256 colours, which is a third of the size."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", pad_inches=0.04)
    plt.close(figure)
    picture = Image.open(buffer).convert("RGB").quantize(256, kmeans=2, dither=Image.Dither.NONE)
    picture.save(path, optimize=True)
    sys.stdout.write(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB\n")


# ------------------------------------------------------------------------------------------ pictures


def normalisation() -> Figure:
    """Raw maps and the methods of normalize_cam, with a profile along one row."""
    image, face, body = cat()
    body = body + 2.5  # summed views are often positive everywhere
    row = round(0.42 * image.shape[2])
    figure, axes = panels(2, 4, image.shape[2] / image.shape[3])
    for line, (cam, name) in zip(
        axes, [(face, "some negative values"), (body, "positive everywhere")], strict=True
    ):
        low, high = float(cam.min().floor()), float(cam.max().ceil())
        show_map(line[0], cam[0, 0], f"raw: {name}", low, high)
        line[0].axhline(row, color="white", linewidth=0.8)
        for ax, method in zip(line[1:], ("max", "minmax"), strict=False):
            show_map(ax, pl.cam.normalize_cam(cam, method)[0, 0], f'"{method}"')
            ax.axhline(row, color="white", linewidth=0.8)
        line[3].set_axis_on()
        for method, style, colour in (("max", "-", "black"), ("minmax", "--", COLOURS[1])):
            profile = pl.cam.normalize_cam(cam, method)[0, 0, row].numpy()
            line[3].plot(profile, style, label=f'"{method}"', color=colour)
        line[3].set(ylim=(-0.02, 1.35), yticks=[0, 1], xticks=[], title="along the white line")
        line[3].tick_params(labelsize=6, pad=1)
        line[3].legend(fontsize=7, frameon=False, loc="upper center", ncols=2)
    return figure


def smoothing() -> Figure:
    """A peaky and a broad map before and after smoothing, and the curves that do it."""
    image, face, body = cat()
    figure, axes = panels(2, 3, image.shape[2] / image.shape[3])
    show_photo(axes[0, 0], image, "photo: cat")
    curves = axes[1, 0]
    value = torch.linspace(0, 1, 401)
    curves.plot([0, 1], [0, 1], ":", color="grey", label="unchanged")
    for line, (cam, name, style) in zip(axes, [(face, "peaky", "-"), (body, "broad", "--")], strict=True):
        cam = pl.cam.normalize_cam(cam)  # noqa: PLW2901
        cv = pl.refine.coefficient_of_variation(cam).item()
        show_map(line[1], cam[0, 0], f"{name} map, cv = {cv:.2f}")
        show_map(line[2], pl.refine.coefficient_of_variation_smoothing(cam)[0, 0], f"{name} map, smoothed")
        smoothed = (value ** (1 - cv)).where(value >= 0.05, 0)
        curves.plot(value.numpy(), smoothed.numpy(), style, color="black", label=f"{name}: v^(1 - {cv:.2f})")
    curves.set_axis_on()
    curves.set(xlim=(0, 1), ylim=(0, 1.02), xticks=[0, 1], yticks=[0, 1], title="value before and after")
    curves.tick_params(labelsize=6, pad=1)
    curves.legend(fontsize=7, frameon=False, loc="lower right")
    return figure


def background() -> Figure:
    """Constant backgrounds above power backgrounds of the same cut."""
    image, cam = coffee()
    cam = pl.cam.normalize_cam(cam)
    figure, axes = panels(2, 4, image.shape[2] / image.shape[3])
    for ax, value in zip(axes[0], (0.09, 0.16, 0.28, 0.38), strict=True):
        mask = pl.masks.scores_to_mask(pl.masks.constant_background(cam, value))
        show_mask(ax, image, mask[0], f"constant {value}")
    for ax, alpha in zip(axes[1], (24, 11, 4, 2), strict=True):
        mask = pl.masks.scores_to_mask(pl.masks.power_background(cam, alpha))
        show_mask(ax, image, mask[0], f"power, alpha = {alpha}")
    legend(figure, {1: "cup", 2: "spoon"})
    return figure


def proportional() -> Figure:
    """The stages of proportional masks, and what plain argmax gives instead."""
    image, cam = coffee()
    cam = pl.cam.normalize_cam(cam)
    labels = torch.ones(1, 2)
    alpha = 4  # the drawn maps are broad: 11 would take half of the table
    smoothed = pl.refine.coefficient_of_variation_smoothing(cam)
    foreground = pl.masks.class_foreground(image, smoothed, alpha=alpha)
    plain = pl.masks.scores_to_mask(pl.masks.constant_background(cam.where(foreground, 0), 0))
    mask = pl.masks.proportional_pseudo_mask(image, cam, labels, alpha=alpha)
    figure, axes = panels(2, 4, image.shape[2] / image.shape[3])
    show_photo(axes[0, 0], image, "photo: cup, spoon")
    show_map(axes[0, 1], cam[0, CUP], "cup, normalised")
    show_map(axes[0, 2], smoothed[0, CUP], "cup, smoothed")
    show_mask(axes[0, 3], image, foreground[0, CUP].long(), "cup against background")
    show_map(axes[1, 0], cam[0, SPOON], "spoon, normalised")
    show_mask(axes[1, 1], image, 2 * foreground[0, SPOON].long(), "spoon against background")
    show_mask(axes[1, 2], image, plain[0], "joined by argmax")
    show_mask(axes[1, 3], image, mask[0], "joined by shares")
    legend(figure, {1: "cup", 2: "spoon"})
    return figure


def crf() -> Figure:
    """The presets of the dense CRF on the same scores."""
    image, cam = coffee()
    scores = pl.masks.power_background(pl.cam.normalize_cam(cam), alpha=4)
    before = pl.masks.scores_to_mask(scores)
    probs = scores / scores.sum(1, keepdim=True)
    figure, axes = panels(2, 3, image.shape[2] / image.shape[3])
    show_photo(axes[0, 0], image, "photo")
    show_mask(axes[0, 1], image, before[0], "argmax of the scores, no CRF")
    for ax, preset in zip(axes.flat[2:], ("psa", "pmm", "deeplab", "irn_label"), strict=True):
        unary = pl.refine.probs_from_mask(before, num_classes=3) if preset == "irn_label" else probs
        refined = pl.refine.dense_crf(image, unary, **pl.refine.CRF_PRESETS[preset])
        show_mask(ax, image, pl.masks.scores_to_mask(refined)[0], f'CRF_PRESETS["{preset}"]')
    legend(figure, {1: "cup", 2: "spoon"})
    return figure


def pixel_adaptive() -> Figure:
    """One map after PAMR, PAR and VARM, and after more passes of one of them."""
    image, cam = coffee()
    cup = pl.cam.normalize_cam(cam)[:, CUP : CUP + 1]
    figure, axes = panels(2, 3, image.shape[2] / image.shape[3])
    show_photo(axes[0, 0], image, "photo")
    show_map(axes[0, 1], cup[0, 0], "map of the cup")
    show_map(axes[0, 2], pl.refine.pamr(image, cup)[0, 0], "pamr")
    show_map(axes[1, 0], pl.refine.par(image, cup)[0, 0], "par")
    show_map(axes[1, 1], pl.refine.varm(image, cup)[0, 0], "varm")
    show_map(axes[1, 2], pl.refine.par(image, cup, iterations=40)[0, 0] / 1.01**30, "par, 40 passes")
    return figure


def dual_threshold() -> Figure:
    """Strict and loose backgrounds and their agreement, with and without the CRF."""
    image, cam = coffee()
    cam = pl.cam.normalize_cam(cam)

    def crf_on_labels(image: Tensor, scores: Tensor) -> Tensor:
        unary = pl.refine.probs_from_mask(pl.masks.scores_to_mask(scores), num_classes=scores.shape[1])
        return pl.refine.dense_crf(image, unary, **pl.refine.CRF_PRESETS["irn_label"])

    figure, axes = panels(1, 4, image.shape[2] / image.shape[3])
    for ax, value in zip(axes[0], (0.35, 0.10), strict=False):
        mask = pl.masks.scores_to_mask(pl.masks.constant_background(cam, value))
        show_mask(ax, image, mask[0], f"background {value:.2f}")
    for ax, refine in zip(axes[0, 2:], (None, crf_on_labels), strict=True):
        mask = pl.masks.dual_threshold_mask(cam, image, high=0.35, low=0.10, refine=refine)
        show_mask(ax, image, mask[0], "both agree" if refine is None else "both agree, after the CRF")
    legend(figure, {1: "cup", 2: "spoon", 255: "ignored (255)"})
    return figure


def superpixels() -> Figure:
    """Regions of a photo, and signed scores before and after they are made constant on them."""
    image, cam = coffee()
    scores = cam[:, CUP : CUP + 1] - 3  # such as those of a discriminator: 0 is the border
    height, width = image.shape[2:]
    y, x = torch.meshgrid(
        torch.linspace(-0.3, 0.3, height), torch.linspace(-0.45, 0.45, width), indexing="ij"
    )
    looks = torch.cat([image - 0.5, torch.stack([y, x])[None]], 1)  # in place of a network's features
    fine = pl.refine.felzenszwalb_superpixels(image)
    coarse = pl.refine.merge_superpixels(fine, pl.refine.region_mean(looks, fine), max_regions=32)
    refined = pl.refine.superpixel_refine(scores, coarse, torch.ones(1, 1))
    limit = float(scores.abs().max().ceil())
    figure, axes = panels(2, 3, height / width)
    rows = (fine, "Felzenszwalb", scores, "signed scores"), (coarse, "merged", refined, "constant on regions")
    for line, (ids, program, maps, name) in zip(axes, rows, strict=True):
        show_photo(line[0], image, f"{program}: {int(ids.max()) + 1} regions")
        show_borders(line[0], ids[0])
        show_map(line[1], maps[0, 0], name, -limit, limit)
        mask = pl.masks.scores_to_mask(F.pad(maps, (0, 0, 0, 0, 1, 0)))
        show_mask(line[2], image, mask[0], "above 0")
    return figure


def matting() -> Figure:
    """A trimap, what several methods make of it, and of the maps themselves as a prior."""
    image, cam = coffee()
    cam, labels = pl.cam.normalize_cam(cam), torch.ones(1, 2)
    trimap = pl.masks.trimap_from_cam(cam, labels, foreground=0.6, background=0.25)
    sure = pl.masks.alpha_to_mask(trimap).masked_fill((trimap == 0.5).any(1), 255)
    scores = pl.masks.constant_background(cam, 0.4)
    prior = (scores / scores.sum(1, keepdim=True))[:, 1:]
    nothing_sure = torch.full_like(trimap, 0.5)
    closed_form = pl.matting.MattingRefiner("closed_form")
    alpha = closed_form(image, trimap)
    figure, axes = panels(2, 4, image.shape[2] / image.shape[3])
    show_photo(axes[0, 0], image, "photo: cup, spoon")
    show_mask(axes[0, 1], image, sure[0], "trimap")
    show_map(axes[0, 2], alpha[0, CUP], "closed form: cup")
    show_map(axes[0, 3], alpha[0, SPOON], "closed form: spoon")
    masks = {
        "closed form": alpha,
        "KNN": pl.matting.MattingRefiner("knn")(image, trimap),
        "guided filter": pl.matting.MattingRefiner("guided_filter")(image, trimap),
        "closed form, maps as a prior": closed_form(image, nothing_sure, prior),
    }
    for ax, (name, found) in zip(axes[1], masks.items(), strict=True):
        show_mask(ax, image, pl.masks.alpha_to_mask(found)[0], name)
    legend(figure, {1: "cup", 2: "spoon", 255: "unknown"})
    return figure


PICTURES = {
    "normalisation": normalisation,
    "smoothing": smoothing,
    "background": background,
    "proportional": proportional,
    "crf": crf,
    "dual_threshold": dual_threshold,
    "matting": matting,
    "pixel_adaptive": pixel_adaptive,
    "superpixels": superpixels,
}


def main(folder: Path) -> None:
    for name, draw in PICTURES.items():
        save(draw(), folder / f"{name}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
