"""`pseudolabel generate`: photos, image-level labels and a classifier in, masks out.

What is made of a photo stands in `_mask_maker`, what is kept in the folder of masks in `_folder`. Here is the
run: which photos, which of them together, by which engine, and what is told of it.
"""

import argparse
import os
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from pseudolabel import io
from pseudolabel.cli._console import (
    UserError,
    as_done,
    in_threads,
    progress,
    read_names,
    report,
    report_names,
)
from pseudolabel.cli._folder import MAPS, Journal, working_in
from pseudolabel.cli._marks import refuse_foreign
from pseudolabel.cli._mask_maker import Entry, MaskMaker, Settings, find_device
from pseudolabel.io._atomic import remove_leftovers

__all__ = ["find_device", "read_image_labels", "run"]

WINDOW = 1024  # neighbours in the list among which photos of one size are looked for


def run(args: argparse.Namespace) -> int:
    """Make the masks that are not there yet; say which photos were skipped."""
    labels = read_image_labels(args.labels, args.allow_pickle)
    everything, photos, missing = _find_photos(args, labels)
    out, cams = Path(args.out), Path(args.save_cams) if args.save_cams else None
    for option, folder in (("--out", out), ("--save-cams", cams)):
        if folder and folder.exists() and folder.samefile(args.images):
            raise UserError(f"{option}: expected another folder than that of the photos, got {folder}")
    settings, batch_size, workers = Settings.of(args, labels.classes), _batch_size(args), _workers(args)
    remote = args.engine == "ray"  # then this process makes no masks, and needs no device
    if remote:
        maker = MaskMaker(replace(settings, device="cpu"), out, cams)
    else:
        copies = workers if settings.device == "cpu" else min(workers, 2)  # one computes, the next is ready
        maker = MaskMaker(settings, out, cams, copies=copies, debug=args.debug)
    for line in maker.said:
        report(line)
    for folder in filter(None, (out, cams)):
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)

    with ExitStack() as work:
        work.enter_context(working_in(out, maker.record, everything, overwrite=args.overwrite))
        if cams and not cams.samefile(out):
            work.enter_context(
                working_in(cams, maker.maps_record, everything, overwrite=args.overwrite, kind=MAPS)
            )
        journal = Journal(out, "-{}-of-{}".format(*args.shard) if args.shard else "")
        done = _look_around(photos, labels, maker, journal, workers)
        todo = set(photos) if args.overwrite else photos.keys() - done
        batches = _batches(photos, labels, todo, batch_size)
        if remote:
            from pseudolabel.cli.ray import in_ray  # noqa: PLC0415

            gpus = float(settings.device.startswith("cuda")) if args.gpus is None else args.gpus
            entries = in_ray(batches, settings, out, cams, workers=workers, gpus=gpus, debug=args.debug)
        else:
            entries = _in_threads(maker, batches, workers)
        with closing(entries):
            made, skipped = _follow(entries, photos, todo, journal, out)
    kept = len(photos) - len(todo)
    report(f"{out}: {made} masks made, {kept} were there already, {skipped} photos skipped")
    return 1 if skipped or missing else 0


def _find_photos(args: argparse.Namespace, labels: io.ImageLabels) -> tuple[list[str], dict[str, str], int]:
    """Names of all photos with labels, this shard's with their paths, and how many names lack either."""
    # As text: a Path takes several times the memory.
    found = {path.stem: str(path) for path in io.find_images(args.images)}
    wanted = read_names(args.list) if args.list else sorted(found.keys() | set(labels.names))
    everything = [name for name in wanted if name in found and name in labels]
    if not everything:
        raise UserError(f"{args.images}: no photo here goes by a name in {args.labels}")
    part, parts = args.shard or (1, 1)
    wanted = wanted[part - 1 :: parts]
    without_labels = [name for name in wanted if name not in labels]
    without_photo = [name for name in wanted if name not in found]
    report_names(without_labels, f"without a row in {args.labels}, skipped")
    report_names(without_photo, f"without a photo in {args.images}, skipped")
    photos = {name: found[name] for name in wanted if name in found and name in labels}
    return everything, photos, len(without_labels) + len(without_photo)


def _follow(
    entries: Iterable[Entry], photos: Mapping[str, str], todo: set[str], journal: Journal, out: Path
) -> tuple[int, int]:
    """Write down what becomes of the photos, and tell of it; how many masks were made, and how many not."""
    made = skipped = 0
    try:
        with progress("generate masks", len(todo)) as step:
            for entry in entries:
                journal.add(entry)
                if entry.skipped:
                    report(f"skipped {Path(photos[entry.name]).name}: {entry.skipped}")
                if entry.name in todo:  # and not one that is there, and shares its batch
                    made, skipped = made + (not entry.skipped), skipped + bool(entry.skipped)
                    step()
    except OSError:
        report(f"{out}: stopped; {made} masks were made, all whole, and the same command goes on from there")
        raise
    return made, skipped


def read_image_labels(path: str, allow_pickle: bool) -> io.ImageLabels:
    """Image-level labels from `.csv`, or from `.npy` where that is allowed."""
    if path.endswith(".npy"):
        if not allow_pickle:
            raise UserError(f"{path}: this format is a pickle; read it with --allow-pickle, or give a .csv")
        labels = io.read_cls_labels(path, allow_pickle=True)
    else:
        labels = io.read_labels(path)
    if len(labels.classes) > 254:
        raise UserError(f"{path}: a mask holds 254 classes at most, got {len(labels.classes)}")
    return labels


def _workers(args: argparse.Namespace) -> int:
    """One for each core, as far as memory goes; with a device of its own, two more that wait for it."""
    if args.workers:
        return int(args.workers)
    cores = (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()) or 1
    return min(cores if args.device == "cpu" else cores + 2, 8)


def _batch_size(args: argparse.Namespace) -> int:
    """Photos that go through the network together: one where more gain nothing."""
    alone = args.method == "infercam"  # looks at parts of photos, each at its own
    if alone and (args.batch_size or 1) > 1:
        raise UserError("--batch-size: --method infercam takes photos one by one")
    return int(args.batch_size or (1 if alone or args.device == "cpu" else 8))


def _look_around(
    photos: Mapping[str, str], labels: io.ImageLabels, maker: MaskMaker, journal: Journal, workers: int
) -> set[str]:
    """Names of the photos that are done: the journal knows their masks, made of photo and labels as they are.

    Raises:
        UserError: If there are files in the way that were not made here.
    """

    def is_done(name: str) -> bool:
        if not all(path.exists() for path in maker.files(name)):
            return False
        with suppress(OSError, ValueError):  # said when its turn comes
            return journal.knows(maker.entry_of(Path(photos[name]), labels[name]))
        return False

    there = [name for name in photos if any(os.path.lexists(path) for path in maker.files(name))]
    if not there:
        return set()
    found = in_threads(is_done, there, workers=workers, description="look at what is there")
    done = {name for name, whole in zip(there, found, strict=True) if whole}
    refuse_foreign(path for name in there if name not in done for path in maker.files(name))
    return done


def _batches(
    photos: Mapping[str, str], labels: io.ImageLabels, todo: set[str], size: int
) -> Iterator[tuple[list[Path], Tensor]]:
    """Photos that go through the network together, with their labels (B,C).

    Which those are follows from all photos, not from those to do: the last bits of a network's maps depend on
    the batch, and a run that was stopped shall end with the same files as one that was not.
    """
    names = list(photos)
    for start in range(0, len(names), WINDOW):
        window = names[start : start + WINDOW]
        if todo.isdisjoint(window):
            continue
        for batch in _alike(window, photos, labels, size):
            if not todo.isdisjoint(batch):
                yield [Path(photos[name]) for name in batch], labels.select(batch)


def _alike(
    names: Iterable[str], photos: Mapping[str, str], labels: io.ImageLabels, size: int
) -> Iterator[list[str]]:
    """Groups of at most so many names whose photos are of one size, and with labels, or without."""
    groups: dict[object, list[str]] = {}
    for name in names:
        alike: object = name
        if size > 1:
            with suppress(OSError, ValueError):  # which are said when its turn comes
                alike = (*io.image_size(photos[name]), bool(labels[name].any()))
        group = groups.setdefault(alike, [])
        group.append(name)
        if len(group) == size:
            yield groups.pop(alike)
    yield from groups.values()


def _in_threads(
    maker: MaskMaker, batches: Iterable[tuple[list[Path], Tensor]], workers: int
) -> Generator[Entry, None, None]:
    """Several batches at a time, each from reading to writing on a thread of its own.

    So everything overlaps: while one waits for the device or the disk, another computes.
    """
    for entries in as_done(lambda batch: maker(*batch), batches, workers=workers):
        yield from entries
