"""Photos: from a file to an RGB tensor in [0, 1]."""

import os

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pseudolabel.io._decode import MAX_PIXELS, open_image

__all__ = ["image_size", "read_image"]

# EXIF orientation -> axes of (...,H,W) to flip, after a transposition from 5 on.
_FLIPS: dict[int, tuple[int, ...]] = {2: (-1,), 3: (-2, -1), 4: (-2,), 6: (-1,), 7: (-2, -1), 8: (-2,)}


def read_image(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Read a photo as an RGB tensor, turned the way its EXIF orientation says.

    JPEG, PNG, WebP, TIFF, BMP, GIF (first frame) and PPM are read. Grayscale, palette, CMYK and other colour
    spaces become RGB. Transparency is blended over white: what lies hidden under transparent pixels is never
    seen. 16-bit grayscale is divided by 65535; of 16-bit colour the upper 8 bits are used. Pixels of 32 bits
    have no fixed range and are refused.

    A truncated file is refused even where `PIL.ImageFile.LOAD_TRUNCATED_IMAGES` is set. Damage inside a JPEG
    that is otherwise complete can be seen by no reader: that format has no checksums.

    Args:
        path: The file.
        max_pixels: Refuse pictures of more pixels before they are decoded. PIL's own limit,
            `PIL.Image.MAX_IMAGE_PIXELS`, holds as well.

    Returns:
        Image (3,H,W) float32 in [0, 1]. For a batch, stack images of one size, or add an axis: `image[None]`.

    Raises:
        ValueError: If the file is empty, truncated, corrupt, no picture, or too large; it names path and
            cause.
        OSError: If there is no such file, or it may not be read.

    Examples:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("L", (3, 2), 51).save(f"{folder}/gray.png")
        ...     image = read_image(f"{folder}/gray.png")
        >>> image.shape, image.max()
        (torch.Size([3, 2, 3]), tensor(0.2000))
    """
    with open_image(path, max_pixels=max_pixels) as picture:
        picture.load()
        image = _to_rgb(picture)
        orientation = _orientation(picture)
        if orientation >= 5:
            image = image.transpose(-2, -1)
        return image.flip(_FLIPS.get(orientation, ())).contiguous()


def image_size(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Size (H,W) that `read_image` will give, from the header alone where the format allows it.

    PNG and TIFF are decoded: the one may keep its orientation behind the pixels, the other is turned by the
    decoder.

    Args:
        path: The file.
        max_pixels: As in `read_image`.

    Returns:
        Height and width, after EXIF orientation.

    Raises:
        ValueError: If the file is empty, no picture, or too large. Damage behind the header is not seen.
        OSError: If there is no such file, or it may not be read.

    Examples:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("RGB", (3, 2)).save(f"{folder}/photo.jpg")
        ...     image_size(f"{folder}/photo.jpg")
        (2, 3)
    """
    with open_image(path, max_pixels=max_pixels) as picture:
        if picture.format == "TIFF":
            picture.load()
        if _orientation(picture) >= 5:
            return picture.width, picture.height
        return picture.height, picture.width


def _orientation(picture: Image.Image) -> int:
    """EXIF orientation 1..8; 1 where there is none, or none that the standard knows."""
    value = picture.getexif().get(0x0112)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _to_rgb(picture: Image.Image) -> Tensor:
    """Pixels (3,H,W) in [0, 1] as they lie in the file, of any mode that PIL reads."""
    if _is_16_bit(picture):
        gray = np.asarray(picture).astype(np.float32) / 65535
        return torch.from_numpy(gray).expand(3, -1, -1)
    if picture.mode[0] in "IF":
        raise ValueError(
            f"its pixels (PIL mode {picture.mode!r}) have no known range; save it with 8 or 16 bits a channel"
        )
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    pixels = torch.from_numpy(np.array(picture.convert("RGB")))
    return pixels.permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def _is_16_bit(picture: Image.Image) -> bool:
    """Whether the pixels are grayscale in 0..65535, which PIL gives in mode I;16, or I for PNG and PPM."""
    if picture.mode == "I":
        return picture.format in {"PNG", "PPM"}
    if not picture.mode.startswith("I;16"):
        return False
    tags = getattr(picture, "tag_v2", {})  # TIFF has 12-bit samples and inverted ones under the same mode
    return bool(tags.get(258, (16,)) == (16,) and tags.get(262, 1) == 1)
