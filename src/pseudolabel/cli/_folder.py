"""The folder of masks: how they are made, who works on them, and the journal of photos that are done."""

import contextlib
import errno
import json
import os
import secrets
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from pseudolabel import __version__, io
from pseudolabel.cli._console import UserError, find_masks
from pseudolabel.cli._mask_maker import Entry
from pseudolabel.io._atomic import write_atomically

if sys.platform != "win32":
    import fcntl

__all__ = ["MAPS", "Journal", "is_whole", "token", "working_in"]

SETTINGS, JOURNAL = "pseudolabel.json", "pseudolabel{}.jsonl"
LOCK, TOKEN = ".pseudolabel.lock", ".pseudolabel-{}.token"


class Kind(NamedTuple):
    """What a folder holds."""

    what: str
    suffix: str
    option: str


MASKS, MAPS = Kind("masks", ".png", "--out"), Kind("maps", ".npz", "--save-cams")


@contextlib.contextmanager
def working_in(
    folder: Path, settings: dict[str, Any], names: Collection[str], *, overwrite: bool, kind: Kind = MASKS
) -> Iterator[None]:
    """Keep the masks or maps of a folder of one kind while the block runs, whoever else works in it.

    The lock is the system's, and ends with the process, however that ends. Whoever is alone may settle how
    they are made here (`_settle`); who joins others takes their settings or leaves.

    Raises:
        UserError: If there are any of other settings, or are being made.
    """
    with (folder / LOCK).open("ab") as file:
        if _lock(file, alone=True):
            _settle(folder, settings, names, overwrite=overwrite, kind=kind)
        _lock(file, alone=False)
        if (theirs := _read_settings(folder)) != settings:
            said = f"{kind.what} here with {_differences(theirs, settings)}"
            raise UserError(f"{folder}: another run is making {said}; take another {kind.option}")
        yield


def _lock(file: BinaryIO, *, alone: bool) -> bool:
    """Lock the file for oneself, if nobody else holds it, or wait to share it; whether that was done."""
    if sys.platform == "win32":  # without such locks: two runs must not begin in one folder at a time
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}:
            raise  # else: a file system without locks, as Windows
    return True


def _settle(
    folder: Path, settings: dict[str, Any], names: Collection[str], *, overwrite: bool, kind: Kind
) -> None:
    """Write down how the masks are made here, and refuse to mix them with masks made in another way."""
    what, suffix, option = kind
    there, before = find_masks(folder, suffix), _read_settings(folder)
    if before != settings:
        if there and before and not overwrite:
            said = f"{what} made with {_differences(before, settings)}"
            raise UserError(f"{folder}: holds {said}; take another {option}, or --overwrite")
        if there and overwrite:
            # Gone before the settings change: what an interrupted run leaves must not pass for its own.
            if before and (others := sorted(there.keys() - set(names))):
                raise UserError(
                    f"{folder}: holds {len(others)} {what} of other settings that this run does not make, as "
                    f"{others[0]}; take another {option}"
                )
            for name in there.keys() & set(names):
                there[name].unlink()
        for journal in folder.glob(JOURNAL.format("*")):
            journal.unlink()
    for left in folder.glob(TOKEN.format("*")):  # by a run that was killed: nobody works here
        left.unlink()
    text = json.dumps({"pseudolabel": __version__, "settings": settings}, indent=2)
    write_atomically(folder / SETTINGS, text.encode("utf-8"))


def _read_settings(out: Path) -> dict[str, Any]:
    """The settings of a folder, none if it has none yet."""
    path = out / SETTINGS
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))["settings"]
    except FileNotFoundError:
        return {}
    except (ValueError, LookupError, TypeError, RecursionError):
        settings = None
    return settings if isinstance(settings, dict) and settings else {"unreadable": str(path)}


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    differing = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    was, became = ({name: each.get(name) for name in differing} for each in (before, now))
    return f"{was}, now {became}"


@contextlib.contextmanager
def token(folder: Path) -> Iterator[Path]:
    """A hidden file of a random name while the block runs, by which other machines may know the folder."""
    path = folder.resolve() / TOKEN.format(secrets.token_hex(8))
    path.touch()
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


class Journal:
    """What became of each photo, a line of JSON each, in `pseudolabel.jsonl` beside the masks.

    It is only ever appended to, a line in one piece, so that it may be cut off at any time, and several runs
    may write to it. A shard has a journal of its own, `pseudolabel-3-of-8.jsonl`, and reads those of all.

    Args:
        out: Folder of the masks.
        shard: `-3-of-8`, or nothing.

    Raises:
        OSError: If it cannot be read or written.
    """

    def __init__(self, out: Path, shard: str = "") -> None:
        self.path = out / JOURNAL.format(shard)
        self._lines: dict[str, str] = {}
        for journal in sorted(out.glob(JOURNAL.format("*"))):
            with journal.open(encoding="utf-8", errors="replace") as lines:
                for line in lines:
                    if (name := _name_in(line)) is not None:
                        self._lines[name] = line.rstrip("\n")
        with self.path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                self._torn = file.read() != b"\n"
            else:
                self._torn = False

    def add(self, entry: Entry) -> None:
        """Write the entry down."""
        data = ("\n" * self._torn + _line(entry) + "\n").encode("utf-8")
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            written = os.write(descriptor, data)
            if written < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        finally:
            os.close(descriptor)
        self._torn = False

    def says(self, entry: Entry) -> bool | None:
        """Whether it holds this very entry for the photo, the last one if several; None if it holds none."""
        line = self._lines.get(entry.name)
        return None if line is None else line == _line(entry)


def _line(entry: Entry) -> str:
    return json.dumps(entry._asdict())  # in ASCII: a file's name may be no Unicode


def _name_in(line: str) -> str | None:
    """The photo of a line, None if the line was cut off or is of somebody else."""
    try:
        name = json.loads(line)["name"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return name if isinstance(name, str) else None


def is_whole(mask_file: Path, photo: Path, labels: Tensor) -> bool:
    """Whether a mask can be read, is of its photo's size, and of its labelled classes (C,) alone."""
    try:
        mask, size = io.read_mask(mask_file), io.image_size(photo)
    except (OSError, ValueError):
        return False
    allowed = torch.zeros(256, dtype=torch.bool, device="cpu")
    allowed[[0, 255]] = True
    allowed[1 : 1 + len(labels)] = labels
    return tuple(mask.shape) == size and bool(allowed[mask].all())
