"""Opening of picture files: whatever a decoder stumbles over ends in one `ValueError` that names the file."""

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, cast

from PIL import Image, ImageFile, TiffImagePlugin, UnidentifiedImageError

from pseudolabel._checks import check_count
from pseudolabel.io._files import MAX_BYTES, open_file

__all__ = ["MAX_PIXELS", "decode", "open_image", "packing"]

# Also the limit of PIL itself: 256 MiB of RGB. A larger photo is more likely an attack or a mistake.
MAX_PIXELS = 89_478_485

# PIL knows more formats, but some of them start other programs (EPS) or are no photos.
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM")

# A few bytes can ask a decoder to go over all pixels once more: a scan of a JPEG, a frame of an animation, a
# tile of a TIFF that lies over another. An ordinary progressive JPEG has 10 scans. More of them are fine as
# long as it all takes no longer than so many of the largest picture.
_MAX_PASSES = 12
# libtiff decodes the JPEGs inside a TIFF itself, and refuses this number of scans. Its own default is 100.
os.environ.setdefault("LIBTIFF_JPEG_MAX_ALLOWED_SCAN_NUMBER", str(_MAX_PASSES + 1))
# PIL decodes two formats in Python: run-length coded BMP, some 300 ns a pixel however short the file, and
# plain PPM, which moves up to a megabyte at each comment.
_MAX_RLE_PIXELS = 10_000_000
_MAX_COMMENTS = 1000
# Of a large TIFF there may be smaller and smaller copies in the file, at most so many.
_MAX_COPIES = 32
_KIND_OF_PAGE = 254  # a tag of TIFF

# A marker of a JPEG: no filling, no stuffed byte, no restart inside a scan, no second start of an image.
_JPEG_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")
_END_OF_IMAGE, _START_OF_SCAN = 0xD9, 0xDA


class _StrictDecoding:
    """Context in which PIL refuses truncated files.

    Much training code sets PIL's switch `LOAD_TRUNCATED_IMAGES`, which holds for the whole process and fills
    with grey what a file lacks. Here it is off while at least one thread reads a picture, and then put back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._readers = 0
        self._found = False

    def __enter__(self) -> None:
        with self._lock:
            if self._readers == 0:
                self._found = ImageFile.LOAD_TRUNCATED_IMAGES
                ImageFile.LOAD_TRUNCATED_IMAGES = False
            self._readers += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._readers -= 1
            if self._readers == 0:
                ImageFile.LOAD_TRUNCATED_IMAGES = self._found


_strict_decoding = _StrictDecoding()


@contextmanager
def open_image(
    path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS, page: int | None = None
) -> Iterator[ImageFile.ImageFile]:
    """Open a picture file; its pixels are to be decoded (`decode`), and taken out, inside the `with` block.

    Pipes and devices are refused, and files of several pictures unless `page` says which one is meant.
    Any exception in the block becomes a `ValueError` that names the file and the cause; what the file system
    says (no such file, no permission) stays an `OSError`.
    """
    if page is not None:
        check_count(at_least=0, page=page)
    with open_file(path) as file:
        try:
            if not file.read(1):
                raise ValueError("the file is empty")
            file.seek(0)
            with _strict_decoding, Image.open(file, formats=_FORMATS) as image:
                _check_pixels(image, max_pixels)
                _turn_to_page(image, page)
                _check_pixels(image, max_pixels)  # pages may differ in size
                _check_channels(image)
                yield image
        except Exception as error:
            cause = str(error) or type(error).__name__
            if isinstance(error, UnidentifiedImageError):
                cause = (
                    f"not a file of one of the formats {', '.join(_FORMATS)}, or of a kind of them that PIL "
                    "does not read (TIFF of many channels, JPEG of 12 bits)"
                )
            raise ValueError(f"{os.fspath(path)}: cannot read this picture: {cause}") from error


def packing(picture: ImageFile.ImageFile) -> tuple[Any, ...]:
    """How the pixels lie in the file, in PIL's words: `L;4`, `RGB;16B`, .... Known until they are decoded."""
    if not picture.tile:
        return ()
    arguments = picture.tile[0][3]
    return arguments if isinstance(arguments, tuple) else (arguments,)


def decode(picture: ImageFile.ImageFile) -> None:
    """Decode the pixels, unless the file would make that take far longer than their number says."""
    if picture.tile:  # what is left to decode; WebP tells it later, and has no such tricks
        _check_effort(picture)
    picture.load()


def _check_effort(picture: ImageFile.ImageFile) -> None:
    pixels = picture.width * picture.height
    file = cast("IO[bytes]", picture.fp)
    decoder, _, offset, *_ = picture.tile[0]
    if decoder == "jpeg":
        if os.fstat(file.fileno()).st_size > MAX_BYTES:
            raise ValueError(f"a JPEG is read up to {MAX_BYTES} bytes")
        file.seek(offset)
        _check_passes(picture, _jpeg_scans(file.read()))
    elif decoder == "bmp_rle" and pixels > _MAX_RLE_PIXELS:
        raise ValueError(f"a run-length coded BMP is read up to {_MAX_RLE_PIXELS} pixels, it has {pixels}")
    elif decoder == "ppm_plain":
        file.seek(offset)
        if file.read(MAX_BYTES).count(b"#") > _MAX_COMMENTS:
            raise ValueError(f"a plain PPM is read up to {_MAX_COMMENTS} comments, it has more")
    else:
        drawn = [extents for _, extents, *_ in picture.tile if extents]
        area = sum((right - left) * (bottom - top) for left, top, right, bottom in drawn)
        _check_passes(picture, area // max(1, pixels))


def _check_pixels(picture: Image.Image, max_pixels: int) -> None:
    if picture.width * picture.height > max_pixels:
        raise ValueError(f"{picture.height} x {picture.width} pixels are more than max_pixels={max_pixels}")


def _check_passes(picture: Image.Image, passes: int) -> None:
    pixels = picture.width * picture.height
    if passes > _MAX_PASSES and passes * pixels > _MAX_PASSES * MAX_PIXELS:
        raise ValueError(
            f"its decoder would go over {picture.height} x {picture.width} pixels {passes} times (scans of a "
            "JPEG, frames of an animation, tiles of a TIFF)"
        )


def _jpeg_scans(data: bytes) -> int:
    """Scans of the first image of a JPEG: how often its decoder goes over the pixels."""
    scans, place = 0, 0
    while found := _JPEG_MARKER.search(data, place):
        marker, place = found[0][1], found.end()
        if marker == _END_OF_IMAGE:
            break
        scans += marker == _START_OF_SCAN
        place += int.from_bytes(data[place : place + 2], "big")  # what looks like a marker in there is none
    return scans


def _turn_to_page(picture: ImageFile.ImageFile, page: int | None) -> None:
    """Turn to a page of the file, a frame of an animation; for None, the file may have no others."""
    if page is None:
        if _has_pages(picture):
            raise ValueError(
                "it holds more than one picture (pages, frames); read_image(path, page=0) takes the first"
            )
        return
    animation = picture.format in {"GIF", "PNG", "WEBP"}  # each frame is drawn over those before it
    try:
        for frame in range(page + 1) if animation else [page]:
            picture.seek(frame)
            if animation:
                _check_passes(picture, frame + 1)
    except EOFError:
        raise ValueError(f"page: it has no page {page}, counted from 0") from None


def _has_pages(picture: ImageFile.ImageFile) -> bool:
    """Whether the file holds more than a photo and smaller copies of it."""
    if isinstance(picture, TiffImagePlugin.TiffImageFile):
        return _tiff_has_pages(picture)
    # MPO is a JPEG of a phone or camera, with a preview or other views behind the photo.
    return picture.format != "MPO" and bool(getattr(picture, "is_animated", False))


def _tiff_has_pages(picture: TiffImagePlugin.TiffImageFile) -> bool:
    if _is_copy(picture):
        return True  # what it was made of lies elsewhere in the file
    try:
        for page in range(1, _MAX_COPIES + 2):
            picture.seek(page)
            if not _is_copy(picture):
                return True
    except EOFError:  # there is no such page
        picture.seek(0)
        return False
    except (KeyError, OSError, SyntaxError, TypeError, ValueError):  # one that PIL cannot read
        return True
    return True


def _is_copy(picture: TiffImagePlugin.TiffImageFile) -> bool:
    """Whether a page says that it is a smaller copy of another, or the mask of its transparency."""
    return bool(picture.tag_v2.get(_KIND_OF_PAGE, 0) & 0b101)


def _check_channels(picture: ImageFile.ImageFile) -> None:
    """Refuse a TIFF of which PIL would read one channel in silence, or mix them up."""
    if not isinstance(picture, TiffImagePlugin.TiffImageFile):
        return
    tags = picture.tag_v2
    bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,))
    channels = max(len(bits), tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1))
    if channels > 1 and len(picture.getbands()) == 1:
        raise ValueError(f"of its {channels} channels only the first could be read; save it as gray or RGB")
    planes = tags.get(TiffImagePlugin.PLANAR_CONFIGURATION, 1) == 2
    if planes and channels > 1 and max(bits) > 8 and picture.tile[0][0] == "raw":
        raise ValueError(
            f"its {channels} planes of {max(bits)} bits cannot be read; save it with interleaved channels"
        )
