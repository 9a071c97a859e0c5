"""The folders that commands write to: whose they are, how their files are made, and who works in them.

No command writes over a file that it did not make. `train` and `demo` keep to folders of their own (`claim`).
Masks are worth more, and may be corrected by hand: each carries a mark (`_marks`), and the journal knows the
photos that are done.
"""

import contextlib
import errno
import json
import os
import secrets
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from pseudolabel import __version__
from pseudolabel.cli._console import UserError, differences, find_masks
from pseudolabel.cli._marks import refuse_foreign
from pseudolabel.cli._mask_maker import Entry
from pseudolabel.io._atomic import write_atomically
from pseudolabel.io._files import MAX_BYTES, open_file

if sys.platform != "win32":
    import fcntl

__all__ = ["MAPS", "Journal", "claim", "token", "working_in"]

SETTINGS, JOURNAL = "pseudolabel.json", "pseudolabel{}.jsonl"
LOCK, TOKEN = ".pseudolabel.lock", ".pseudolabel-{}.token"


class Kind(NamedTuple):
    """What a folder holds."""

    what: str
    suffix: str
    option: str


MASKS, MAPS = Kind("masks", ".png", "--out"), Kind("maps", ".npz", "--save-cams")


def claim(folder: Path, command: str, files: Iterable[str]) -> None:
    """Make a folder this command's own: if it is that already, or has none of the files that are to come.

    Raises:
        UserError: If it has, or is another command's.
    """
    record = _read_record(folder, command)
    if record is None:
        if there := [name for name in files if os.path.lexists(folder / name)]:
            raise UserError(
                f"{folder}: holds {', '.join(there)}, which `pseudolabel {command}` did not make and does "
                "not replace; take another --out"
            )
        folder.mkdir(parents=True, exist_ok=True)
        _write_record(folder, command)


def _read_record(folder: Path, command: str) -> dict[str, Any] | None:
    """What this command has written down of a folder, None if none has.

    Raises:
        UserError: If it is another command's folder, or the record somebody else's.
    """
    path = folder / SETTINGS
    try:
        with open_file(path, max_bytes=MAX_BYTES) as file:
            record = json.load(file)
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or record.get("command") != command:
        raise UserError(f"{path}: is not of `pseudolabel {command}`; take another folder")
    return record


def _write_record(folder: Path, command: str, **more: Any) -> None:
    record = {"pseudolabel": __version__, "command": command, **more}
    write_atomically(folder / SETTINGS, json.dumps(record, indent=2).encode("utf-8"))


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
    with _open_to_append(folder / LOCK) as file:
        if _lock(file, alone=True):
            _settle(folder, settings, names, overwrite=overwrite, kind=kind)
        _lock(file, alone=False)
        if (theirs := _read_settings(folder)) != settings:
            said = f"{kind.what} here with {differences(theirs, settings)}"
            raise UserError(f"{folder}: another run is making {said}; take another {kind.option}")
        yield


def _open_to_append(path: Path) -> BinaryIO:
    if path.exists():
        open_file(path).close()  # a pipe would be waited for
    return path.open("ab+")


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
    before = _read_settings(folder)
    if before != settings:
        there = find_masks(folder, suffix)
        ours = sorted(there.keys() & set(names))
        others = sorted(there.keys() - set(names)) if before else []
        if not overwrite and (ours or others):
            said = f"made with {differences(before, settings)}" if before else "made in an unknown way"
            raise UserError(f"{folder}: holds {what} {said}; take another {option}, or --overwrite")
        if others:
            raise UserError(
                f"{folder}: holds {len(others)} {what} of other settings that this run does not make, as "
                f"{others[0]}; take another {option}"
            )
        refuse_foreign(there[name] for name in ours)
        # Gone before the settings change: what an interrupted run leaves must not pass for its own.
        for name in ours:
            there[name].unlink()
        for journal in folder.glob(JOURNAL.format("*")):
            journal.unlink()
    for left in folder.glob(TOKEN.format("*")):  # by a run that was killed: nobody works here
        left.unlink()
    _write_record(folder, "generate", settings=settings)


def _read_settings(folder: Path) -> dict[str, Any]:
    """The settings of a folder, none if it has none yet."""
    record = _read_record(folder, "generate") or {}
    settings = record.get("settings", {})
    return settings if isinstance(settings, dict) else {"settings": settings}


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
    A line tells of contents, by their digests: whichever agrees with what is there holds, whoever wrote it.

    Args:
        out: Folder of the masks.
        shard: `-3-of-8`, or nothing.

    Raises:
        ValueError: If a file of its name is a pipe or device.
        OSError: If it cannot be read or written.
    """

    def __init__(self, out: Path, shard: str = "") -> None:
        self.path = out / JOURNAL.format(shard)
        self._known: dict[str, set[tuple[object, ...]]] = {}
        for journal in out.glob(JOURNAL.format("*")):
            with open_file(journal) as lines:
                for line in lines:
                    if (entry := _entry_in(line)) is not None:
                        self._known.setdefault(entry.name, set()).add(_content(entry))
        with _open_to_append(self.path) as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                self._torn = file.read() != b"\n"
            else:
                self._torn = False

    def add(self, entry: Entry) -> None:
        """Write the entry down."""
        data = ("\n" * self._torn + json.dumps(entry._asdict()) + "\n").encode("ascii")
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

    def knows(self, entry: Entry) -> bool:
        """Whether it tells of this mask of this photo and these labels; and of the maps, if there are any."""
        return any(
            known == _content(entry) if entry.maps else known[:-1] == _content(entry)[:-1]
            for known in self._known.get(entry.name, ())
        )


def _content(entry: Entry) -> tuple[object, ...]:
    return entry.photo, entry.labels, entry.mask, entry.maps


def _entry_in(line: bytes) -> Entry | None:
    """The entry of a line that tells of a mask; None if it does not, was cut off or is of somebody else."""
    try:
        fields = json.loads(line)
        entry = Entry(**{**fields, "labels": tuple(fields["labels"])})
        hash(entry)
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return entry if entry.mask and isinstance(entry.name, str) else None
