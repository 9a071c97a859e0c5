"""Masks: label maps in palette PNGs, as PASCAL VOC keeps them, and their colours."""

import io
import os

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from pseudolabel._checks import check_integer, check_shapes
from pseudolabel.io._atomic import write_atomically
from pseudolabel.io._decode import MAX_PIXELS, decode, open_image, packing
from pseudolabel.io._files import check_comment, check_path

__all__ = ["colorize_mask", "read_mask", "voc_palette", "write_mask"]


def read_mask(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Read a mask from a PNG whose pixels are class indices, with or without a palette.

    The indices are what the file holds, whatever the colours: 0 background, c+1 class c, 255 ignore. PNGs of
    1, 2 and 4 bits are read as indices, too.

    Args:
        path: The file.
        max_pixels: Refuse masks of more pixels before they are decoded.

    Returns:
        Mask (H,W) int64.

    Raises:
        ValueError: If the file is no PNG, empty, truncated or too large, or if its pixels are not 8-bit
            indices: colours, transparency, 16 bits, an animation, an EXIF rotation. It names path and cause.
        OSError: If there is no such file, or it may not be read.

    Examples:
        >>> import tempfile
        >>> import torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_mask(f"{folder}/mask.png", torch.tensor([[0, 1, 255]]))
        ...     read_mask(f"{folder}/mask.png")
        tensor([[  0,   1, 255]])
    """
    with open_image(path, max_pixels=max_pixels) as picture:
        if picture.format != "PNG":
            raise ValueError(
                f"a mask must be a PNG of class indices, this is {picture.format}, which may not keep them"
            )
        # PIL spreads grayscale of fewer bits over 0..255; the upper bits are the index.
        unused_bits = {("1",): 7, ("L;2",): 6, ("L;4",): 4}.get(packing(picture), 0)
        decode(picture)
        if picture.mode not in {"1", "L", "P"}:
            raise ValueError(_no_indices(picture.mode))
        if picture.getexif().get(0x0112, 1) != 1:
            raise ValueError("it carries an EXIF rotation, so that it is unclear which way its pixels lie")
        indices = np.asarray(picture if picture.mode == "P" else picture.convert("L"))
        return torch.from_numpy((indices >> unused_bits).astype(np.int64))


def write_mask(
    path: str | os.PathLike[str],
    mask: Tensor | np.ndarray,
    *,
    palette: Tensor | None = None,
    comment: str = "",
) -> None:
    """Write a mask as a palette PNG: viewers show its classes in colour, readers find its indices.

    The file is complete or not there: it is written under another name, flushed, and renamed.

    Args:
        path: The file, named `*.png`. Its folder must exist.
        mask: Label map (H,W) or (1,H,W) of any integer dtype, values 0..255.
        palette: Colours (n,3) uint8 of the indices 0..n-1, n <= 256; the others keep the VOC colour. VOC
            colours for None.
        comment: ASCII text that the file carries beside its pixels (the text chunk `Comment` of a PNG).

    Raises:
        TypeError: If `mask` is not of an integer dtype or `palette` not uint8.
        ValueError: If a shape or value is not as above, or the name does not end in `.png`.
        OSError: If the folder is missing, not writable or full. An older file of the name stays as it was.
    """
    check_path(path)
    check_comment(comment)
    if os.path.splitext(os.fspath(path))[1].lower() != ".png":  # noqa: PTH122
        raise ValueError(f"path: expected a name that ends in .png, got {os.fspath(path)!r}")
    if not isinstance(mask, Tensor):
        mask = torch.as_tensor(mask, device="cpu")
    if mask.ndim == 3 and len(mask) == 1:
        mask = mask[0]
    _check_mask(mask, "H W")
    picture = Image.fromarray(mask.to("cpu", torch.uint8).numpy())
    picture.putpalette(_full_palette(palette).numpy().tobytes())
    texts = PngImagePlugin.PngInfo()
    if comment:
        texts.add_text("Comment", comment)
    encoded = io.BytesIO()
    picture.save(encoded, "PNG", pnginfo=texts)
    write_atomically(path, encoded.getvalue())


def voc_palette() -> Tensor:
    """Colours of PASCAL VOC.

    Bits 0, 1, 2 of an index are the highest bits of red, green, blue, bits 3, 4, 5 the next ones, and so on.

    Returns:
        Palette (256,3) uint8. Row 0 (background) is black, row 255 (ignore) the cream of VOC's borders.

    Examples:
        >>> voc_palette()[[0, 1, 2, 3, 255]].tolist()
        [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [224, 224, 192]]
    """
    index = torch.arange(256, device="cpu")[:, None, None]
    channel = torch.arange(3, device="cpu")[:, None]
    level = torch.arange(8, device="cpu")
    bits = (index >> (3 * level + channel)) & 1
    return (bits << (7 - level)).sum(-1).to(torch.uint8)


def colorize_mask(mask: Tensor, palette: Tensor | None = None) -> Tensor:
    """Colours of a mask as an image, to look at or to blend over the photo.

    Args:
        mask: Label map (H,W) or (B,H,W) of any integer dtype, values 0..255.
        palette: As in `write_mask`.

    Returns:
        Image (3,H,W) or (B,3,H,W) float32 in [0, 1], on the device of `mask`.

    Raises:
        TypeError: If `mask` is not of an integer dtype or `palette` not uint8.
        ValueError: If a shape or value is not as above.

    Examples:
        >>> import torch
        >>> colorize_mask(torch.tensor([[0, 255]]))[:, 0]
        tensor([[0.0000, 0.8784],
                [0.0000, 0.8784],
                [0.0000, 0.7529]])
    """
    _check_mask(mask, "B H W" if isinstance(mask, Tensor) and mask.ndim == 3 else "H W")
    colors = _full_palette(palette).to(mask.device, torch.float32) / 255
    return colors[mask.long()].movedim(-1, -3).contiguous()


def _check_mask(mask: Tensor, shape: str) -> None:
    check_shapes(mask=(mask, shape))
    check_integer(mask=mask)
    if mask.numel():
        low, high = (int(bound) for bound in torch.aminmax(mask))
        if low < 0 or high > 255:
            raise ValueError(f"mask: expected class indices in 0..255, got values from {low} to {high}")


def _full_palette(palette: Tensor | None) -> Tensor:
    """The VOC palette, its first rows replaced by the caller's."""
    full = voc_palette()
    if palette is not None:
        rows = check_shapes(palette=(palette, "n 3"))["n"]
        if palette.dtype != torch.uint8:
            raise TypeError(f"palette: expected uint8 colours, got {palette.dtype}")
        if rows > 256:
            raise ValueError(f"palette: expected at most 256 colours, got {rows}")
        full[:rows] = palette.cpu()
    return full


def _no_indices(mode: str) -> str:
    if mode.startswith("I"):
        return "its pixels have 16 bits; class indices are 0..255 in 8 bits"
    return (
        f"its pixels are colours (PIL mode {mode!r}), not class indices. If it was painted with a palette,"
        " look each colour up there (pseudolabel.io.voc_palette() holds the VOC colours) and save the indices"
        " with write_mask"
    )
