"""CAM archives: the maps of an image's present classes in an `.npz` file without pickle."""

import io
import math
import os
import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pseudolabel._checks import check_finite, check_float, check_labels, check_shapes
from pseudolabel.io._atomic import write_atomically
from pseudolabel.io._decode import MAX_PIXELS
from pseudolabel.io._files import MAX_BYTES, check_archive, check_comment, check_path, open_file

__all__ = ["StoredCAM", "read_cam", "write_cam"]

_VERSION = 1
_MEMBERS = ("keys", "cams", "size", "version")


@dataclass(frozen=True, eq=False)
class StoredCAM:
    """Maps of the classes that one image shows.

    Attributes:
        keys: Classes (K,) int64, 0-based foreground indices, each once.
        cams: Maps (K,h,w), float16 or float32, finite.
        size: Size (H,W) of the photo that the maps belong to.

    Raises:
        TypeError: If a dtype is another.
        ValueError: If shapes disagree, a key is negative or comes twice, a value is not finite, or the size
            is not positive.

    Examples:
        >>> import torch
        >>> stored = StoredCAM(torch.tensor([2]), torch.ones(1, 4, 5), (32, 40))
        >>> stored.dense(num_classes=4).shape
        torch.Size([3, 4, 5])
        >>> stored.labels(num_classes=4)
        tensor([False, False,  True])
    """

    keys: Tensor
    cams: Tensor
    size: tuple[int, int]

    def __post_init__(self) -> None:
        check_shapes(keys=(self.keys, "K"), cams=(self.cams, "K h w"))
        if self.keys.dtype != torch.int64:
            raise TypeError(f"keys: expected int64, got {self.keys.dtype}")
        if self.cams.dtype not in {torch.float16, torch.float32}:
            raise TypeError(f"cams: expected float16 or float32, got {self.cams.dtype}")
        if (self.keys < 0).any() or len(set(self.keys.tolist())) != len(self.keys):
            raise ValueError(f"keys: expected 0-based classes, each once, got {self.keys.tolist()[:20]}")
        check_finite(cams=self.cams)
        object.__setattr__(self, "size", _checked_size(self.size))

    def dense(self, num_classes: int) -> Tensor:
        """Maps (C,h,w) of all C = `num_classes` - 1 foreground classes, 0 for absent ones."""
        maps = self.cams.new_zeros(num_classes - 1, *self.cams.shape[1:])
        maps[self._keys_below(num_classes)] = self.cams
        return maps

    def labels(self, num_classes: int) -> Tensor:
        """Image-level labels (C,) bool, C = `num_classes` - 1."""
        labels = torch.zeros(num_classes - 1, dtype=torch.bool, device=self.keys.device)
        labels[self._keys_below(num_classes)] = True
        return labels

    def _keys_below(self, num_classes: int) -> Tensor:
        if (self.keys >= num_classes - 1).any():
            raise ValueError(
                f"keys: expected classes below {num_classes - 1} (num_classes={num_classes} counts the "
                f"background), got {self.keys.tolist()[:20]}"
            )
        return self.keys


def write_cam(
    path: str | os.PathLike[str],
    cam: Tensor,
    labels: Tensor,
    *,
    size: tuple[int, int] | None = None,
    dtype: torch.dtype | None = None,
    comment: str = "",
) -> None:
    """Write the maps of one image's present classes to an `.npz` archive without pickle.

    | array | shape | |
    |---|---|---|
    | `keys` | (K,) int64 | present classes, 0-based foreground indices |
    | `cams` | (K,h,w) float16 or float32 | their maps |
    | `size` | (2,) int64 | (H,W) of the photo |
    | `version` | () int64 | 1 |

    The archive is not compressed: maps hardly shrink, and `np.load` reads it, too.

    Args:
        path: The file, named `*.npz`. Its folder must exist. An older file is replaced in one step.
        cam: Maps (C,h,w) of one image, or (K,h,w) of its K present classes, any float dtype, finite.
        labels: Multi-hot (C,). An image without a class gives an archive without maps.
        size: Size (H,W) of the photo, where the maps are smaller. That of the maps for None.
        dtype: `torch.float16` halves the file and keeps 11 bits of each value; `torch.float32`. For None,
            float16 stays and all else becomes float32.
        comment: ASCII text that the file carries beside its arrays (the comment of a zip archive).

    Raises:
        TypeError: If `cam` is not of a floating dtype.
        ValueError: If a shape, value or setting is not as above, or a value is too large for float16.
        OSError: If the folder is missing, not writable or full. An older file of the name stays as it was.

    Examples:
        >>> import tempfile
        >>> import torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_cam(f"{folder}/a.npz", torch.rand(20, 8, 10), torch.arange(20) == 14, size=(64, 80))
        ...     stored = read_cam(f"{folder}/a.npz")
        >>> stored.keys, stored.cams.shape, stored.size
        (tensor([14]), torch.Size([1, 8, 10]), (64, 80))
    """
    check_path(path)
    check_comment(comment)
    if os.path.splitext(os.fspath(path))[1].lower() != ".npz":  # noqa: PTH122
        raise ValueError(f"path: expected a name that ends in .npz, got {os.fspath(path)!r}")
    sizes = check_shapes(cam=(cam, "K h w"), labels=(labels, "C"))
    check_float(cam=cam)
    check_labels(labels)
    keys = labels.cpu().nonzero().squeeze(1)
    if len(cam) not in {len(labels), len(keys)}:
        raise ValueError(
            f"cam: expected the maps of all {len(labels)} classes, or of the {len(keys)} present ones, got "
            f"{len(cam)}"
        )
    if dtype not in {None, torch.float16, torch.float32}:
        raise ValueError(f"dtype: expected torch.float16, torch.float32 or None, got {dtype}")
    if dtype is None:
        dtype = torch.float16 if cam.dtype == torch.float16 else torch.float32
    maps = cam.detach() if len(cam) == len(keys) else cam.detach()[keys.to(cam.device)]
    maps = maps.to("cpu", dtype)
    stored = StoredCAM(keys, maps, size if size is not None else (sizes["h"], sizes["w"]))
    buffer = io.BytesIO()
    np.savez(
        buffer,
        keys=stored.keys.numpy(),
        cams=stored.cams.numpy(),
        size=np.array(stored.size, dtype=np.int64),
        version=np.array(_VERSION, dtype=np.int64),
    )
    if comment:
        with zipfile.ZipFile(buffer, "a") as archive:
            archive.comment = comment.encode("ascii")
    write_atomically(path, buffer.getvalue())


def read_cam(
    path: str | os.PathLike[str],
    num_classes: int | None = None,
    *,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
) -> StoredCAM:
    """Read an archive of `write_cam`. Sizes are checked before anything is allocated for them.

    Args:
        path: The file.
        num_classes: Number of classes with background; larger keys are then an error.
        max_bytes: Refuse archives whose arrays take more.
        max_pixels: Refuse archives that belong to larger photos, as `read_image` refuses those.

    Returns:
        Keys, maps and size; `.dense(num_classes)` gives the maps of all classes.

    Raises:
        ValueError: If the file is no such archive, corrupt, too large, of an unknown version, or its content
            does not agree with itself; it names path and cause.
        OSError: If there is no such file, or it may not be read.
    """
    with open_file(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                stored = _read_archive(archive, max_bytes)
            if math.prod(stored.size) > max_pixels:
                raise ValueError(f"its size {stored.size} has more pixels than max_pixels={max_pixels}")
            if num_classes is not None:
                stored.labels(num_classes)
        except Exception as error:
            cause = str(error) or type(error).__name__
            raise ValueError(f"{os.fspath(path)}: cannot read this CAM archive: {cause}") from error
    return stored


def _read_archive(archive: zipfile.ZipFile, max_bytes: int) -> StoredCAM:
    members = [info.filename for info in archive.infolist()]
    if sorted(members) != sorted(f"{name}.npy" for name in _MEMBERS):
        raise ValueError(f"expected the arrays {', '.join(_MEMBERS)}, got the files {members[:20]}")
    check_archive(archive, max_bytes, f"max_bytes={max_bytes}")
    version = _read_array(archive, "version", "i8", 0).item()
    if version != _VERSION:
        raise ValueError(f"its format has version {version}, this library reads version {_VERSION}")
    keys = _read_array(archive, "keys", "i8", 1)
    cams = _read_array(archive, "cams", "f2 f4", 3)
    size = _read_array(archive, "size", "i8", 1)
    return StoredCAM(torch.from_numpy(keys), torch.from_numpy(cams), tuple(size.tolist()))


def _read_array(archive: zipfile.ZipFile, name: str, dtypes: str, ndim: int) -> NDArray[Any]:
    """One array of the archive; its header is checked against the size of its bytes before they are read."""
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as file:
        if np.lib.format.read_magic(file) != (1, 0):
            raise ValueError(f"{name}: unknown .npy version")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype.str[1:] not in dtypes.split() or len(shape) != ndim:
            raise ValueError(f"{name}: expected {ndim} axes of {dtypes}, got shape {shape} of {dtype}")
        count = math.prod(shape) * dtype.itemsize
        if info.file_size != file.tell() + count:
            raise ValueError(f"{name}: {info.file_size} bytes do not hold shape {shape} of {dtype}")
        data = file.read(count)  # to the end, where the checksum is compared, and no further
    array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
    return np.array(array, dtype=dtype.newbyteorder("="), order="C")


def _checked_size(size: tuple[int, ...]) -> tuple[int, int]:
    if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise ValueError(f"size: expected a positive height and width, got {size}")
    return size[0], size[1]
