"""Pictures of panels: photos, maps and masks side by side, with titles and a legend."""

import io
import os
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pseudolabel.io import voc_palette
from pseudolabel.io._atomic import write_atomically

__all__ = ["class_colors", "draw_panels", "save_picture", "show_cam", "show_mask"]

MARGIN, TEXT = 12, 15
INK, FAINT, PAPER = (32, 32, 32), (110, 110, 110), (255, 255, 255)


def class_colors() -> Tensor:
    """The VOC palette (256,3) in [0, 1], brighter: its dark colours are lost on a photo."""
    return (voc_palette().float() / 255 * 1.7).clamp(max=1)


def _colors_of(values: Tensor) -> Tensor:
    """Colours (...,3) of mask values. Classes beyond those that a mask holds take the colours anew."""
    return class_colors()[torch.where(values > 255, 1 + values % 254, values)]


def show_mask(image: Tensor, mask: Tensor, opacity: float = 0.55) -> Tensor:
    """Blend the colours of a mask (H,W) over an image (3,H,W), with a line along its borders."""
    color = class_colors()[mask].movedim(-1, 0)
    blended = torch.where(mask > 0, torch.lerp(image, color, opacity), image * 0.6 + 0.1)
    border = torch.zeros_like(mask, dtype=torch.bool)
    border[1:] |= mask[1:] != mask[:-1]
    border[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    return torch.where(border, 1.0, blended)


def show_cam(image: Tensor, cam: Tensor, labels: Tensor) -> Tensor:
    """Light up an image (3,H,W) where classes are active: each pixel in the colour of its strongest class.

    `cam` (P,H,W) holds the normalised maps of the classes `labels` (P,), 0-based.
    """
    dark = image.mean(0, keepdim=True).expand_as(image) * 0.45
    if len(labels) == 0:
        return dark
    strength, place = cam.max(0)
    return torch.lerp(dark, _colors_of(labels[place] + 1).movedim(-1, 0), strength.clamp(0, 1) * 0.9)


def draw_panels(
    rows: Sequence[Sequence[Tensor]],
    titles: Sequence[str],
    *,
    row_names: Sequence[str] = (),
    legend: Mapping[int, str] | None = None,
    width: int = 240,
) -> Image.Image:
    """Draw a table of pictures (3,H,W) in [0, 1], a title above each column, a name below each row.

    Args:
        rows: Pictures, as many in each row as there are titles. All are scaled to one width.
        titles: Of the columns.
        row_names: Of the rows, written below them; none by default.
        legend: Names of the mask values to explain at the bottom.
        width: Of a column, in pixels.
    """
    tiles = [[_tile(picture, width) for picture in row] for row in rows]
    heights = [max(tile.height for tile in row) for row in tiles]
    font = ImageFont.load_default(TEXT)
    below = TEXT + 8 if row_names else 0
    total_width = MARGIN + len(titles) * (width + MARGIN)
    top = MARGIN + TEXT + 10
    legend_lines = _legend_lines(legend or {}, font, total_width)
    total_height = top + sum(heights) + len(rows) * (below + MARGIN) + len(legend_lines) * (TEXT + 12)
    canvas = Image.new("RGB", (total_width, total_height), PAPER)
    draw = ImageDraw.Draw(canvas)
    lefts = [MARGIN + column * (width + MARGIN) for column in range(len(titles))]
    for left, title in zip(lefts, titles, strict=True):
        draw.text((left + width / 2, MARGIN + TEXT), title, INK, font, anchor="ms")
    y = top
    for number, (row, height) in enumerate(zip(tiles, heights, strict=True)):
        for left, tile in zip(lefts, row, strict=True):
            canvas.paste(tile, (left, y))
        if row_names:
            draw.text((MARGIN, y + height + 4), row_names[number], FAINT, font)
        y += height + below + MARGIN
    for line in legend_lines:
        for x, value, name in line:
            color = (_colors_of(torch.tensor(value)) * 255).byte().tolist()
            draw.rectangle((x, y, x + TEXT, y + TEXT), tuple(color), FAINT)
            draw.text((x + TEXT + 6, y + TEXT / 2), name, INK, font, anchor="lm")
        y += TEXT + 12
    return canvas


def save_picture(path: str | os.PathLike[str], picture: Image.Image) -> None:
    """Write a picture as PNG, whole or not at all."""
    encoded = io.BytesIO()
    picture.save(encoded, "PNG")
    write_atomically(path, encoded.getvalue())


def _tile(picture: Tensor, width: int) -> Image.Image:
    pixels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    image = Image.fromarray(np.ascontiguousarray(pixels))
    # Small pictures are shown pixel by pixel; very tall ones are cut down to three times their width.
    height = min(max(1, round(width * image.height / image.width)), 3 * width)
    method = Image.Resampling.NEAREST if image.width < width else Image.Resampling.LANCZOS
    return image.resize((width, height), method)


def _legend_lines(
    legend: Mapping[int, str], font: ImageFont.FreeTypeFont | ImageFont.ImageFont, total_width: int
) -> list[list[tuple[int, int, str]]]:
    """Entries (x, mask value, name), broken into lines that fit."""
    lines: list[list[tuple[int, int, str]]] = []
    x = total_width
    for value, name in legend.items():
        size = TEXT + 6 + round(font.getlength(name)) + 18
        if x + size > total_width:
            lines.append([])
            x = MARGIN
        lines[-1].append((x, value, name))
        x += size
    return lines
