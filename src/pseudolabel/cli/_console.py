"""What the commands share: messages, progress bars, threads, and small files of text."""

import importlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import IO, TYPE_CHECKING, Any, TypeVar, cast

import torch

from pseudolabel.cli._text import one_line
from pseudolabel.io import read_list
from pseudolabel.io._files import MAX_BYTES, open_file
from pseudolabel.io._quote import quote

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "UserError",
    "as_done",
    "differences",
    "find_masks",
    "import_extra",
    "in_threads",
    "progress",
    "read_class_names",
    "read_names",
    "report",
    "report_names",
    "stderr",
    "stdout",
]

Item = TypeVar("Item")
Result = TypeVar("Result")


class UserError(ValueError):
    """Something that the user can put right; shown as one line without a traceback."""


class _Messages:
    """The stream of messages, which nobody has to read: what cannot be written there is dropped."""

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):  # a broken pipe, a full disk, a closed stream
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


class _Results:
    """The stream of results: that they cannot be written is an error, and said."""

    def write(self, text: str) -> int:
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except OSError as error:
            with suppress(OSError, ValueError):  # else Python tries again when it ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise UserError(f"the results cannot be written to stdout: {error.strerror}") from error
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stdout, name)


@cache
def stderr() -> "Console":
    """The console of messages and progress bars; results alone go to stdout. It never stops the work."""
    from rich.console import Console  # noqa: PLC0415

    return Console(file=cast("IO[str]", _Messages()))


@cache
def stdout() -> "Console":
    """The console of results."""
    from rich.console import Console  # noqa: PLC0415

    return Console(file=cast("IO[str]", _Results()), highlight=False)


def report(message: str) -> None:
    """Print one line to stderr, above a progress bar where one runs."""
    stderr().print(one_line(message), markup=False, highlight=False, soft_wrap=True)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between the settings of a folder and those of a run, nothing if they agree."""
    differing = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    was, became = ({name: each.get(name) for name in differing} for each in (before, now))
    return f"{quote(was)}, now {quote(became)}" if differing else ""


def report_names(names: Sequence[str], what: str) -> None:
    """Say how many images there are of a kind, and the first of them; nothing where there is none."""
    if names:
        listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        report(f"{len(names)} {what}: {listed}")


def import_extra(name: str, option: str, install: str) -> ModuleType:
    """A module that an option needs, and that not everybody has installed."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # broken libraries beside it fail in their own ways
        library = name.partition(".")[0]
        raise UserError(
            f"{option}: cannot import {library} ({type(error).__name__}: {error}); pip install {install}"
        ) from error


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[], None]]:
    """Show progress inside the block, with rate and time left; calling what it gives is a step.

    A bar on a terminal, a line a minute elsewhere, such as the log of a cluster's job.
    """
    if not stderr().is_terminal:
        yield _lines(description, total)
        return
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text  # noqa: PLC0415

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            rate = task.finished_speed or task.speed
            return Text("" if rate is None else f"{rate:.3g}/s")

    columns = (
        TextColumn("{task.description:<28}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr()) as bar:
        task = bar.add_task(description, total=total)
        yield lambda: bar.advance(task)


def _lines(description: str, total: int, every: float = 60) -> Callable[[], None]:
    begin = last = time.monotonic()
    done = 0

    def step() -> None:
        nonlocal last, done
        done += 1
        if (now := time.monotonic()) - last < every and done < total:
            return
        last = now
        rate = done / max(now - begin, 1e-9)
        took, left = (timedelta(seconds=round(seconds)) for seconds in (now - begin, (total - done) / rate))
        report(f"{description}: {done}/{total}, {rate:.3g}/s, {took} since the start, {left} left")

    return step


def as_done(work: Callable[[Item], Result], items: Iterable[Item], *, workers: int) -> Iterator[Result]:
    """Results of `work`, several items at a time, in the order in which they end.

    Items are taken as they are needed. Each worker computes with one torch thread: images side by side use
    the cores better than the small regions of one image do. The first exception stops the rest and is raised.
    The caller's thread setting is put back.
    """
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    running: set[Future[Result]] = set()
    try:
        items = iter(items)
        while True:
            # As many again as there are workers, so that nobody waits for work.
            running |= {pool.submit(work, item) for item in islice(items, 2 * workers - len(running))}
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    except KeyboardInterrupt:
        report(f"stopping; {len(running)} in work are finished first, unless it is interrupted again")
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def in_threads(
    work: Callable[[Item], Result], items: Sequence[Item], *, workers: int, description: str
) -> list[Result]:
    """Results of `work` in the order of the items, several at a time (`as_done`), under a progress bar."""

    def numbered(place: int) -> tuple[int, Result]:
        return place, work(items[place])

    results = {}
    with progress(description, len(items)) as step:
        for place, result in as_done(numbered, range(len(items)), workers=workers):
            results[place] = result
            step()
    return [results[place] for place in range(len(items))]


def find_masks(folder: str | os.PathLike[str], suffix: str = ".png") -> dict[str, Path]:
    """Masks of a folder by name: its PNG files, or those of another suffix, but for hidden ones."""
    found: dict[str, Path] = {}
    for path in sorted(Path(folder).iterdir()):
        if path.suffix.lower() == suffix and not path.name.startswith(".") and path.is_file():
            other = found.setdefault(path.stem, path)
            if other is not path:
                raise UserError(f"{folder}: {other.name!r} and {path.name!r} are two files of one name")
    return found


def read_names(path: str | os.PathLike[str]) -> list[str]:
    """Image ids of a list file."""
    return [entry.name for entry in read_list(path)]


def read_class_names(path: str | os.PathLike[str]) -> list[str]:
    """Names of the classes, one a line, background first."""
    try:
        with open_file(path, max_bytes=MAX_BYTES) as file:
            names = file.read().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{os.fspath(path)}: not a UTF-8 text file") from error
    names = [name.strip() for name in names if name.strip()]
    if not names or len(set(names)) != len(names):
        raise UserError(f"{os.fspath(path)}: expected different names, one a line, background first")
    return names
