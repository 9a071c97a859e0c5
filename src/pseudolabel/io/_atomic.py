"""Writing of files that are either wholly there or not there at all."""

import contextlib
import errno
import os
import re
import secrets
import time
from pathlib import Path

from pseudolabel.io._files import check_path

__all__ = ["remove_leftovers", "write_atomically"]


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file such that its name always stands for complete content, the old or the new.

    The bytes go to a hidden file of the same folder, are flushed to the disk, and take the name last. A full
    disk leaves the old file as it was and nothing beside it. A process that is killed half-way leaves the old
    file as well, and may leave the hidden one (`.<random>.tmp`), which nothing in this library reads.

    Raises:
        TypeError: If `path` is no path.
        ValueError: If the name is a device's, pipe's or socket's, which are never replaced.
        OSError: If the folder is missing or not writable, the disk is full, or the name is a folder's. It
            names `path`.
    """
    check_path(path)
    target = Path(os.path.realpath(path))  # a link keeps pointing to the file that is replaced
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), os.fspath(path))
    if target.exists() and not target.is_file() and not target.is_dir():
        raise ValueError(
            f"{os.fspath(path)}: expected a regular file to replace, got a pipe, socket or device"
        )
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
    except OSError as error:  # its own file name is the hidden one, which tells nobody anything
        reason = f"{error.strerror or error} (not written; an older file of this name is as it was)"
        raise OSError(error.errno, reason, os.fspath(path)) from error


def remove_leftovers(folder: Path, *, age: float = 3600) -> None:
    """Remove hidden files of processes that were killed while they wrote, so many seconds ago or more."""
    for path in folder.glob(".*.tmp"):
        if re.fullmatch(r"\.[0-9a-f]{16}\.tmp", path.name):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime >= age:
                    path.unlink()
