"""The mark of a file made here: a digest of its content, inside of it.

By it a command knows its own files from all others, also after a run that was killed before it wrote anything
down, and so replaces no file of another origin, nor one that somebody has painted over.
"""

import hashlib
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from pseudolabel import io
from pseudolabel.cli._console import UserError
from pseudolabel.io._decode import open_image
from pseudolabel.io._files import open_file

__all__ = ["digest_file", "mark", "refuse_foreign"]


def mark(*content: Tensor) -> str:
    """The comment that goes into a file of this content."""
    digest = hashlib.sha256()
    for value in content:
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().numpy().tobytes())
    return f"made by pseudolabel generate: {digest.hexdigest()}"


def _is_made_here(path: Path) -> bool:
    """Whether a mask or an archive of maps carries the mark of what it holds."""
    try:
        if path.suffix == ".npz":
            stored = io.read_cam(path)
            with open_file(path) as file, zipfile.ZipFile(file) as archive:
                return archive.comment.decode("latin-1") == mark(stored.keys, stored.cams)
        with open_image(path) as picture:
            comment = picture.info.get("Comment")
        return bool(comment == mark(io.read_mask(path).to(torch.uint8)))
    except (OSError, ValueError):
        return False


def refuse_foreign(files: Iterable[Path]) -> None:
    """Refuse to go on where files in the way were not made here, or have changed since.

    Raises:
        UserError: If there are any.
    """
    if foreign := sorted(path for path in files if os.path.lexists(path) and not _is_made_here(path)):
        raise UserError(
            f"{foreign[0].parent}: {len(foreign)} of the files here were not made by this program, or have "
            f"changed since, as {foreign[0].name}; it replaces none of them: move them away, or take another "
            "folder"
        )


def digest_file(path: Path) -> str:
    """What is noted down of a file's content: 128 bits of its SHA-256."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]
