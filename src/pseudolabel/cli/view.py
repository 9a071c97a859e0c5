"""`pseudolabel view`: photos and masks side by side in one picture."""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from pseudolabel import io
from pseudolabel._maps import resize
from pseudolabel.cli._console import UserError, find_masks, progress, read_class_names, report
from pseudolabel.cli._panels import draw_panels, save_picture, show_cam, show_mask

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Draw the first photos that have a mask; say which have none."""
    out = Path(args.out)
    if out.suffix.lower() != ".png":
        raise UserError(f"--out: expected a name that ends in .png, got {args.out!r}")
    for folder in filter(None, (args.images, args.masks, args.truth)):
        if out.exists() and out.parent.samefile(folder):
            raise UserError(f"--out: {out} is there, in a folder of pictures to look at; it is not replaced")
    photos = {path.stem: path for path in io.find_images(args.images)}
    masks = find_masks(args.masks)
    names = [name for name in photos if name in masks][: args.limit]
    if not names:
        raise UserError(f"{args.masks}: no mask here goes by the name of a photo in {args.images}")
    classes = read_class_names(args.classes) if args.classes else None
    rows, shown, skipped = [], [], 0
    labels_seen: set[int] = set()
    with progress("draw panels", len(names)) as step:
        for name in names:
            try:
                row, labels = _row(name, photos[name], masks[name], args)
            except (OSError, ValueError) as error:
                report(f"skipped {name}: {error}")
                skipped += 1
            else:
                rows.append(row)
                shown.append(name)
                labels_seen |= labels
            step()
    if not rows:
        raise UserError(f"{args.images}: none of the photos could be drawn")
    titles = ["photo", *(["maps"] if args.cams else []), "mask", *(["truth"] if args.truth else [])]
    legend = {label: _name(label, classes) for label in sorted(labels_seen - {0})}
    save_picture(args.out, draw_panels(rows, titles, row_names=shown, legend=legend))
    report(f"{len(rows)} rows in {args.out}")
    return 1 if skipped else 0


def _row(name: str, photo: Path, mask_file: Path, args: argparse.Namespace) -> tuple[list[Tensor], set[int]]:
    """Panels of one image, and the mask values that they show."""
    image = io.read_image(photo)
    size = (image.shape[1], image.shape[2])
    panels = [image]
    labels: set[int] = set()
    if args.cams:
        stored = io.read_cam(Path(args.cams) / f"{name}.npz")
        maps = resize(stored.cams[None].float(), size)[0]
        panels.append(show_cam(image, maps, stored.keys))
        labels |= set((stored.keys + 1).tolist())
    for folder, path in ((args.masks, mask_file), (args.truth, Path(args.truth or "") / f"{name}.png")):
        if not folder:
            continue
        mask = io.read_mask(path)
        if tuple(mask.shape) != size:
            raise UserError(
                f"{path}: the mask has size {tuple(mask.shape)} (height, width), its photo {photo} has {size}"
            )
        panels.append(show_mask(image, mask))
        labels |= set(torch.unique(mask).tolist())
    return panels, labels


def _name(label: int, classes: list[str] | None) -> str:
    if label == 255:
        return "ignore"
    return classes[label] if classes and label < len(classes) else f"class {label}"
