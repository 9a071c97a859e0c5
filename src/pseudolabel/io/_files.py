"""Opening of files to read: regular ones of a bounded size, so that nothing hangs or fills the memory."""

import os
import stat
import zipfile
from io import BufferedReader
from pathlib import Path

__all__ = ["MAX_BYTES", "check_archive", "check_comment", "check_path", "open_file"]

# A gigabyte: far more than any list, label file or archive of maps of one image.
MAX_BYTES = 1 << 30


def check_archive(archive: zipfile.ZipFile, most: int, why: str) -> None:
    """Check that an archive unpacks to so many bytes at most, by methods that can be stopped there."""
    if any(
        info.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED} for info in archive.infolist()
    ):
        raise ValueError("expected an archive without compression, or by deflate")
    if (total := sum(info.file_size for info in archive.infolist())) > most:
        raise ValueError(f"its arrays take {total} bytes, more than {why}")


def check_path(path: str | os.PathLike[str]) -> None:
    """Check that a path is one, and one that a file system can hold."""
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise TypeError(f"path: expected a path, got {type(path).__name__} {path!r}")
    if not os.fspath(path) or "\0" in os.fspath(path):
        raise ValueError(f"path: expected the name of a file, got {os.fspath(path)!r}")


def check_comment(comment: str) -> None:
    """Check that a comment is text that every format can hold."""
    if not isinstance(comment, str):
        raise TypeError(f"comment: expected a text, got {type(comment).__name__}")
    if not comment.isascii() or "\0" in comment or len(comment) > 65535:
        raise ValueError(f"comment: expected at most 65535 ASCII letters, got {comment[:80]!r}")


def open_file(path: str | os.PathLike[str], *, max_bytes: int | None = None) -> BufferedReader:
    """Open a regular file, at most so large, or what a link leads to.

    A pipe would be waited for, and a device such as `/dev/zero` may have no end: both are refused unopened.

    Raises:
        TypeError: If `path` is no path.
        ValueError: If it is no regular file, or too large.
        OSError: If there is no such file, it is a folder, or it may not be read.
    """
    check_path(path)
    file = Path(path)
    found = file.stat()
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        raise ValueError(f"{os.fspath(path)}: expected a regular file, got a pipe, socket or device")
    if max_bytes is not None and stat.S_ISREG(found.st_mode) and found.st_size > max_bytes:
        raise ValueError(
            f"{os.fspath(path)}: the file takes {found.st_size} bytes, more than max_bytes={max_bytes}"
        )
    return file.open("rb")
