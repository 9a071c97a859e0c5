"""Opening of picture files: whatever a decoder stumbles over ends in one `ValueError` that names the file."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image, ImageFile, UnidentifiedImageError

from pseudolabel.io._files import open_file

__all__ = ["MAX_PIXELS", "open_image"]

# Also the limit of PIL itself: 256 MiB of RGB. A larger photo is more likely an attack or a mistake.
MAX_PIXELS = 89_478_485

# PIL knows more formats, but some of them start other programs (EPS) or are no photos.
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM")


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
def open_image(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """Open a picture file; its pixels are decoded, and to be taken out, inside the `with` block.

    Pipes and devices are refused.
    Any exception in the block becomes a `ValueError` that names the file and the cause; what the file system
    says (no such file, no permission) stays an `OSError`.
    """
    with open_file(path) as file:
        try:
            if not file.read(1):
                raise ValueError("the file is empty")
            file.seek(0)
            with _strict_decoding, Image.open(file, formats=_FORMATS) as image:
                if image.width * image.height > max_pixels:
                    raise ValueError(
                        f"{image.height} x {image.width} pixels are more than max_pixels={max_pixels}"
                    )
                yield image
        except Exception as error:
            cause = str(error) or type(error).__name__
            if isinstance(error, UnidentifiedImageError):
                cause = f"not a file of one of the formats {', '.join(_FORMATS)}"
            raise ValueError(f"{os.fspath(path)}: cannot read this picture: {cause}") from error
