"""Masks by the workers of a Ray cluster: a class for `map_batches` of Ray Data, and an engine around it.

The function `in_ray` is what `generate --engine ray` runs. Ray is imported when it runs.
"""

import importlib
import json
import logging
import os
import platform
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pseudolabel.cli._console import UserError, import_extra, report
from pseudolabel.cli._folder import token
from pseudolabel.cli._mask_maker import Entry, MaskMaker, Settings

__all__ = ["GenerateMasks"]

Batch = tuple[Sequence[Path], Tensor]  # photos that go through the network together, and their labels (B,C)

TASK = 8  # photos: what is done again when a worker is killed, and what comes back in one piece
PART = 50_000  # photos that Ray is told of at a time, so that memory does not grow with the folder


class GenerateMasks:
    """The masks of `pseudolabel generate`, as a class for `ray.data.Dataset.map_batches`.

    Ray makes one object in each of its workers, which opens the network once. A row is a photo. Masks and
    maps are written as files; what comes back is small.

    | column | what goes in |
    |---|---|
    | `photo` | path of the photo |
    | `labels` | a 0 or 1 for each of `classes` |
    | `batch` | optional, an integer: photos of one size and one number go through the network together |

    Without `batch` each photo goes alone, however Ray cuts its batches, and the files are those of
    `pseudolabel generate --batch-size 1`. Photos that go together may come out different in the last bits of
    their maps. Ray cuts its batches anywhere, also between photos of one number.

    | column | what comes back |
    |---|---|
    | `name` | the photo's name without suffix |
    | `photo` | digest of its file: 128 bits of the SHA-256, as hexadecimal digits |
    | `labels` | its classes, 0-based |
    | `mask` | digest of the mask's file, empty if there is none |
    | `maps` | digest of the maps' file, empty if there is none |
    | `skipped` | why there is no mask, else empty |

    A photo that cannot be read or computed is skipped; the others are not concerned. Files appear complete or
    not at all, so rows may be done twice, as Ray does when a worker was killed. Files in `out` that were not
    made by this program, or have changed since, are never replaced.

    Args:
        out: Folder of the masks, `NAME.png`; made if it is not there.
        cams: Folder of the maps, `NAME.npz`, if they are wanted.
        folder: Becomes the worker's current folder: where relative paths begin, and where the module of
            `module:function` is looked for. By default that stays where Ray has put it.
        debug: Raise what goes wrong with a photo, instead of skipping it.
        settings: The options of `pseudolabel generate` by name. `model` and `classes` (names of the labels)
            have to be given; `weights`, `method`, `alpha`, `background`, `crf`, `maps`, `layer`,
            `classifier`, `scales`, `flip`, `mean`, `std` and `device` have its defaults.

    Raises:
        ValueError: If network, weights and classes do not fit, or a setting is wrong; when it is called, if
            the columns do not fit, or a file in the way was not made here.
        OSError: If a folder cannot be made; when it is called, if a file cannot be written.
        TypeError: If a setting is missing or unknown.
    """

    def __init__(
        self,
        *,
        out: str | os.PathLike[str],
        cams: str | os.PathLike[str] | None = None,
        folder: str | os.PathLike[str] | None = None,
        debug: bool = False,
        **settings: Any,
    ) -> None:
        if folder is not None:
            os.chdir(folder)
        masks, maps = Path(out), None if cams is None else Path(cams)
        for each in filter(None, (masks, maps)):
            each.mkdir(parents=True, exist_ok=True)
        settings["classes"] = tuple(settings.get("classes", ()))
        self._make = MaskMaker(Settings(**settings), masks, maps, debug=debug)

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Make the masks of some rows, and say what became of each."""
        photos = [str(path) for path in batch["photo"]]
        labels = self._labels(batch["labels"])
        numbers = np.asarray(batch.get("batch", range(len(photos)))).tolist()
        entries: list[Entry] = []
        for number in dict.fromkeys(numbers):
            rows = [row for row, its in enumerate(numbers) if its == number]
            entries += self.make([photos[row] for row in rows], labels[rows])
        return {name: _column([getattr(entry, name) for entry in entries]) for name in Entry._fields}

    def make(self, photos: Sequence[str], labels: Tensor) -> list[Entry]:
        """Make the masks of photos of one size, with labels (B,C), which go through the network together."""
        torch.set_num_threads(1)  # as everywhere in `generate`, so that the same bits come out
        return self._make([Path(photo) for photo in photos], labels)

    def _labels(self, rows: np.ndarray) -> Tensor:
        """Labels (B,C), from whichever arrays Ray makes of a column of lists."""
        classes = self._make.settings.classes
        if any(np.shape(row) != (len(classes),) or not np.isin(row, (0, 1)).all() for row in rows):
            raise ValueError(f"labels: expected a 0 or 1 for each of {len(classes)} classes, got {rows}")
        values = np.array([np.asarray(row, dtype=bool) for row in rows], dtype=bool)
        return torch.from_numpy(values.reshape(-1, len(classes)))


def _column(values: Sequence[Any]) -> np.ndarray:
    """An array of one value a row, also where these are tuples of different lengths."""
    if not any(isinstance(value, tuple) for value in values):
        return np.array(values)
    column = np.empty(len(values), dtype=object)
    for row, value in enumerate(values):
        column[row] = np.array(value, dtype=np.int64)
    return column


# ------------------------------------------------------------------------------------------------ engine


def in_ray(
    batches: Iterable[Batch],
    settings: Settings,
    out: Path,
    cams: Path | None = None,
    *,
    workers: int = 2,
    gpus: float = 0,
    debug: bool = False,
) -> Generator[Entry, None, None]:
    """What becomes of the photos, as it comes, from so many workers of a Ray cluster.

    The cluster is the one that this process is connected to, else that of `RAY_ADDRESS`, else the one that
    `ray start` has started on this machine, else one that is started here and ends with the run. A worker
    that is killed is started again, and its photos are done again.

    Args:
        batches: Photos that go through the network together, and their labels.
        settings: What the masks depend on.
        out: Folder of the masks. As photos, weights and the current folder, all workers have to see it.
        cams: Folder of the maps, if they are wanted.
        workers: How many; each takes a CPU.
        gpus: Share of a GPU that each takes, if the device is CUDA.
        debug: Raise what goes wrong with a photo.

    Raises:
        UserError: If Ray cannot be imported, has no such GPU, or fails; or what a worker says.
        OSError: If a worker cannot read or write.
    """
    ray = _import_ray()
    _check_share(gpus, settings.device)
    options: dict[str, Any] = {**vars(settings), "out": str(out), "cams": None if cams is None else str(cams)}
    options |= {"folder": str(Path.cwd()), "debug": debug}
    with _cluster(ray, gpus), token(out) as path:
        options["token"] = str(path)
        for part in _grouped(batches, PART):
            for outcome in _outcomes(ray, part, options, workers=workers, gpus=gpus):
                if "error" in outcome:
                    raise UserError(outcome["error"])
                if "errno" in outcome:
                    raise OSError(outcome["errno"], outcome["strerror"], outcome["filename"])
                for name, photo, labels, *rest in outcome["entries"]:
                    yield Entry(name, photo, tuple(labels), *rest)


class _Worker:
    """`GenerateMasks` for batches of the plan, a row each, which tells errors among its results.

    Of an error in a constructor Ray passes the text alone, and to one in a call it adds words of its own.
    """

    def __init__(self, *, token: str, **options: Any) -> None:
        self._token, self._options = token, options
        self._generate: GenerateMasks | None = None

    def __call__(self, rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"outcome": np.array([json.dumps(self._outcome(str(row))) for row in rows["batch"]])}

    def _outcome(self, row: str) -> dict[str, Any]:
        photos, labels = json.loads(row)
        try:
            if self._generate is None:
                if not Path(self._token).exists():  # else it would make a folder of its own
                    raise UserError(
                        f"--engine ray: a worker on {platform.node()} does not see "
                        f"{self._options['out']}; it has to lie on storage that all machines share"
                    )
                self._generate = GenerateMasks(**self._options)
            return {"entries": self._generate.make(photos, torch.tensor(labels, dtype=torch.bool))}
        except (OSError, ValueError) as error:
            if self._options["debug"]:
                raise
            if isinstance(error, OSError) and error.errno:
                return {name: getattr(error, name) for name in ("errno", "strerror", "filename")}
            return {"error": str(error)}


def _outcomes(
    ray: ModuleType, part: Sequence[Batch], options: dict[str, Any], *, workers: int, gpus: float
) -> Iterator[dict[str, Any]]:
    """What `_Worker` tells of each batch."""
    table = importlib.import_module("pyarrow").table
    tasks = [table({"batch": rows}) for rows in _tasks(part, workers)]
    plan = ray.data.from_arrow(tasks)
    plan.context.enable_progress_bars = False  # `generate` has one
    plan.context.execution_no_progress_timeout_s = -1  # a photo may take its time
    done = plan.map_batches(
        _Worker,
        fn_constructor_kwargs=options,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(tasks))),
        **({"num_gpus": gpus} if gpus else {"num_cpus": 1}),
    )
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        for row in done.iter_rows():
            yield json.loads(row["outcome"])
    except ray.exceptions.RayTaskError:  # which nobody foresaw, so its traceback shall be seen
        raise
    except ray.exceptions.RayError as error:
        said = str(error).strip().split("\n")[0]
        raise UserError(f"--engine ray: {type(error).__name__}: {said}") from error


def _tasks(part: Sequence[Batch], workers: int) -> Iterator[list[str]]:
    """Rows of the plan, some whole batches for each task; a small plan has tasks for all workers, too."""
    least = min(TASK, sum(len(photos) for photos, _ in part) // (4 * workers))
    for task in _grouped(part, least):
        yield [
            json.dumps([[str(photo) for photo in photos], labels.int().tolist()]) for photos, labels in task
        ]


def _grouped(batches: Iterable[Batch], least: int) -> Iterator[list[Batch]]:
    """Groups of whole batches, of so many photos or little more, the last of what is left."""
    group: list[Batch] = []
    count = 0
    for batch in batches:
        group.append(batch)
        count += len(batch[0])
        if count >= least:
            yield group
            group, count = [], 0
    if group:
        yield group


def _import_ray() -> ModuleType:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it tells its makers of its use, else
    import_extra("ray.data", "--engine ray", '"pseudolabel[ray]"')
    return importlib.import_module("ray")


def _check_share(gpus: float, device: str) -> None:
    """Ray shows GPUs to those workers alone that take a share."""
    if device.startswith("cuda") and not 0 < gpus <= 1:
        raise UserError(f"--gpus: expected a share > 0 and <= 1 of a GPU for each worker, got {gpus:g}")
    if gpus and not device.startswith("cuda"):
        raise UserError(f"--gpus: expected none with --device {device}, got {gpus:g}")


@contextmanager
def _cluster(ray: ModuleType, gpus: float) -> Iterator[None]:
    """Ray is connected inside the block, and after it as before."""
    connected = ray.is_initialized()
    if not connected:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        if gpus > ray.cluster_resources().get("GPU", 0):  # but a cluster that grows may get one
            report(f"--gpus: Ray shows no GPU now; workers wait until each gets {gpus:g} of one")
        yield
    finally:
        if not connected:
            ray.shutdown()
