"""Photos: from a file to an RGB tensor in [0, 1]."""

import os

import numpy as np
import torch
from PIL import Image, ImageFile
from torch import Tensor

from pseudolabel._checks import check_count
from pseudolabel.io._decode import MAX_PIXELS, decode, open_image, packing

__all__ = ["image_size", "read_image"]

# EXIF orientation -> axes of (...,H,W) to flip, after a transposition from 5 on.
_FLIPS: dict[int, tuple[int, ...]] = {2: (-1,), 3: (-2, -1), 4: (-2,), 6: (-1,), 7: (-2, -1), 8: (-2,)}


def read_image(
    path: str | os.PathLike[str],
    *,
    page: int | None = None,
    depth: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> Tensor:
    """Read a photo as an RGB tensor, turned the way its EXIF orientation says.

    JPEG, PNG, WebP, TIFF, BMP, GIF and PPM are read. Grayscale, palette, CMYK and other colour spaces become
    RGB. Transparency is blended over white: what lies hidden under transparent pixels is never seen.

    Pages of a TIFF and frames of an animation are no photo: such a file is refused unless `page` names one of
    them. Of a JPEG with a preview behind it (MPO, by phones) the photo is read, of a TIFF with smaller copies
    of itself the first page. A TIFF of several channels that are no colours is refused; what lies behind red,
    green and blue is left out.

    16-bit grayscale is divided by 65535, 12-bit TIFF by 4095; of 16-bit colour the upper 8 bits are used.
    Many cameras put 12 bits into files of 16, which would give an almost black image: a file that uses the
    lowest sixteenth of its range at most is refused unless `depth` says how many bits are in use. Pixels of
    32 bits have no fixed range and are refused.

    A truncated file is refused even where `PIL.ImageFile.LOAD_TRUNCATED_IMAGES` is set. Damage inside a JPEG
    that is otherwise complete can be seen by no reader: that format has no checksums.

    Args:
        path: The file.
        page: Page or frame to read, from 0, as they lie in the file.
        depth: Bits in use of a file of 16 bits: its grayscale is divided by `2**depth - 1`. For colour it can
            be 16 alone, which takes dark pictures as they are.
        max_pixels: Refuse pictures of more pixels before they are decoded. PIL's own limit,
            `PIL.Image.MAX_IMAGE_PIXELS`, holds as well.

    Returns:
        Image (3,H,W) float32 in [0, 1]. For a batch, stack images of one size, or add an axis: `image[None]`.

    Raises:
        ValueError: If the file is empty, truncated, corrupt, no picture, too large or far too slow to decode,
            if it has several pages, or not that one, or if its largest value does not go with `depth`; it
            names path and cause.
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
    if depth is not None:
        check_count(depth=depth)
        if depth > 16:
            raise ValueError(f"depth: expected at most 16 bits, got {depth}")
    with open_image(path, max_pixels=max_pixels, page=page) as picture:
        open_range = _leaves_range_open(picture)
        if depth is not None and not open_range:
            raise ValueError("depth: only files of 16 bits leave open how many are in use; it has others")
        decode(picture)
        image = _to_rgb(picture, open_range, depth)
        orientation = _orientation(picture)
        if orientation >= 5:
            image = image.transpose(-2, -1)
        return image.flip(_FLIPS.get(orientation, ())).contiguous()


def image_size(
    path: str | os.PathLike[str], *, page: int | None = None, max_pixels: int = MAX_PIXELS
) -> tuple[int, int]:
    """Size (H,W) that `read_image` will give, from the header alone where the format allows it.

    PNG and TIFF are decoded: the one may keep its orientation behind the pixels, the other is turned by the
    decoder.

    Args:
        path: The file.
        page: As in `read_image`.
        max_pixels: As in `read_image`.

    Returns:
        Height and width, after EXIF orientation.

    Raises:
        ValueError: If the file is empty, no picture, or too large, if it has several pages, or not that one.
            What is wrong with the pixels is not seen: damage behind the header, too few bits in use.
        OSError: If there is no such file, or it may not be read.

    Examples:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("RGB", (3, 2)).save(f"{folder}/photo.jpg")
        ...     image_size(f"{folder}/photo.jpg")
        (2, 3)
    """
    with open_image(path, max_pixels=max_pixels, page=page) as picture:
        if picture.format == "TIFF":
            decode(picture)
        if _orientation(picture) >= 5:
            return picture.width, picture.height
        return picture.height, picture.width


def _orientation(picture: Image.Image) -> int:
    """EXIF orientation 1..8; 1 where there is none, or none that the standard knows."""
    value = picture.getexif().get(0x0112)
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _leaves_range_open(picture: ImageFile.ImageFile) -> bool:
    """Whether a picture that is not decoded yet has 16 bits a sample, of which fewer may be in use."""
    words = packing(picture)
    if picture.format == "PPM":  # PIL stretches other maxima to the full range
        return not {"I;16B", 65535}.isdisjoint(words)
    return picture.format in {"PNG", "TIFF"} and any(";16" in str(word) for word in words)


def _to_rgb(picture: Image.Image, open_range: bool, depth: int | None) -> Tensor:
    """Pixels (3,H,W) in [0, 1] as they lie in the file, of any mode that PIL reads."""
    if top := _top_of_gray(picture):
        return _gray_to_rgb(picture, top, open_range, depth)
    if picture.mode[0] in "IF":
        raise ValueError(
            f"its pixels (PIL mode {picture.mode!r}) have no known range; save it with 8 or 16 bits a channel"
        )
    if open_range:
        _check_16_bit_colours(picture, depth)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    pixels = torch.from_numpy(np.array(picture.convert("RGB")))
    return pixels.permute(2, 0, 1).to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def _top_of_gray(picture: Image.Image) -> int | None:
    """Largest value that grayscale of more than 8 bits can have, None for other pixels."""
    if picture.mode == "I":  # so PIL gives PNG and PPM, in some versions
        return 65535 if picture.format in {"PNG", "PPM"} else None
    if not picture.mode.startswith("I;16"):
        return None
    tags = getattr(picture, "tag_v2", {})  # TIFF has 12-bit samples and inverted ones under the same mode
    return {(12,): 4095, (16,): 65535}.get(tags.get(258, (16,))) if tags.get(262, 1) == 1 else None


def _gray_to_rgb(picture: Image.Image, top: int, open_range: bool, depth: int | None) -> Tensor:
    values = np.asarray(picture)
    largest = int(values.max())
    if depth is not None:
        top = 2**depth - 1
        if largest > top:
            raise ValueError(f"depth: its largest value is {largest}, more than depth={depth} allows")
    elif open_range and 0 < largest < 4096:
        raise ValueError(
            f"its largest value is {largest} of 65535: say how many bits are in use, depth=12 for many "
            "cameras, or depth=16 if it is meant to be as dark as that"
        )
    gray = values.astype(np.float32) / top
    if (transparent := picture.info.get("transparency")) is not None:
        gray[values == transparent] = 1
    return torch.from_numpy(gray).expand(3, -1, -1)


def _check_16_bit_colours(picture: Image.Image, depth: int | None) -> None:
    """Refuse colours that are almost black because fewer bits are in use; PIL gives the upper 8 of the 16."""
    if depth not in {None, 16}:
        raise ValueError(f"depth: of 16-bit colour the upper 8 bits are read; depth={depth} is for grayscale")
    extrema = np.reshape(picture.getextrema(), (-1, 2))[: 1 if picture.mode == "LA" else 3]
    if depth is None and extrema[:, 1].max() <= 16:
        raise ValueError(
            "its colours use the lowest sixteenth of their 16 bits at most: save it with 8 bits, or stretched"
            " over all 16, or say depth=16 if it is meant to be as dark as that"
        )
