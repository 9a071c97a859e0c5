"""Image-level labels: which classes each image shows."""

import csv
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pseudolabel._checks import check_labels, check_shapes
from pseudolabel.io._atomic import write_atomically
from pseudolabel.io._files import MAX_BYTES, open_file
from pseudolabel.io._quote import quote
from pseudolabel.io._unpickle import read_pickled_dict, to_tensors

__all__ = ["VOC_CLASSES", "ImageLabels", "read_cls_labels", "read_labels", "write_labels"]

VOC_CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
"""Foreground classes of PASCAL VOC in the order of its masks: class c has the mask value c+1."""

# An image id that, put behind a folder, would lead out of it: `../a`, `/a`, `C:\\a`.
_ESCAPE = re.compile(r"\0|^[/\\]|(^|[/\\])\.\.([/\\]|$)|^[A-Za-z]:[/\\]")

_FLAGS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}
_ODD = 2  # a cell that is none of these


@dataclass(frozen=True, eq=False)
class ImageLabels:
    """Image-level labels of a set of images.

    Attributes:
        names: Image ids, each once.
        classes: Names of the C foreground classes, each once; class c has the mask value c+1.
        labels: Multi-hot (N,C) bool; numbers that are 0 or 1 are taken as well.

    Raises:
        ValueError: If shapes disagree, a value is neither 0 nor 1, or a name comes twice, is empty, breaks
            the line, or begins or ends with white space.

    Examples:
        >>> import torch
        >>> labels = ImageLabels(("a", "b"), ("cat", "dog"), torch.tensor([[1, 0], [1, 1]]))
        >>> labels["a"]
        tensor([ True, False])
        >>> labels.select(["b", "a"]).shape
        torch.Size([2, 2])
        >>> "c" in labels
        False
    """

    names: tuple[str, ...]
    classes: tuple[str, ...]
    labels: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        object.__setattr__(self, "classes", tuple(self.classes))
        for argument, names in (("names", self.names), ("classes", self.classes)):
            _check_names(argument, names)
        check_shapes(labels=(self.labels, f"{len(self.names)} {len(self.classes)}"))
        check_labels(self.labels)
        object.__setattr__(self, "labels", self.labels != 0)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __getitem__(self, name: str) -> Tensor:
        """Labels (C,) of one image."""
        return self.select([name])[0]

    def select(self, names: Iterable[str]) -> Tensor:
        """Labels (B,C) of several images, in their order."""
        names = list(names)
        for name in names:
            if name not in self._rows:
                raise KeyError(
                    f"no labels for image {quote(name)} among {len(self)} (such as {quote(self.names[0])})"
                )
        return self.labels[[self._rows[name] for name in names]]

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.names)}


def read_labels(
    path: str | os.PathLike[str], *, classes: Sequence[str] | None = None, max_bytes: int = MAX_BYTES
) -> ImageLabels:
    r"""Read image-level labels from a CSV file: a header, then a row an image, a 0/1 column a class.

    The first column holds the image ids. Each other column whose values are all 0 or 1 is a class; a column
    that holds neither anywhere (a split, a comment) is skipped, and one that mixes them with other values is
    an error. `0.0`, `1.0`, `true` and `false` count as 0 and 1. Byte order mark, CRLF and blank lines are
    fine.

    Args:
        path: CSV file, UTF-8, separated by commas.
        classes: Columns to take, in this order; no other column is looked at. All class columns for None.
        max_bytes: Refuse larger files.

    Returns:
        Names, classes and labels in the order of the file.

    Raises:
        ValueError: If the file is empty, too large or no such table, a row has too few or too many cells, a
            name comes twice or leads out of its folder, a value is neither 0 nor 1, or a class has no column;
            it names path, line and column.
        OSError: If there is no such file, or it may not be read.

    Examples:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "labels.csv")
        ...     _ = file.write_text("id,split,cat,dog\n2007_000032,train,0,1\n")
        ...     labels = read_labels(file)
        >>> labels.classes, labels["2007_000032"]
        (('cat', 'dog'), tensor([False,  True]))
    """
    try:
        with io.TextIOWrapper(open_file(path, max_bytes=max_bytes), "utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            return _parse(
                ((reader.line_num, [cell.strip() for cell in row]) for row in reader if row), classes
            )
    except (ValueError, csv.Error) as error:
        hint = " (expected UTF-8)" if isinstance(error, UnicodeDecodeError) else ""
        raise ValueError(f"{os.fspath(path)}: {error}{hint}") from error


def write_labels(path: str | os.PathLike[str], labels: ImageLabels) -> None:
    """Write image-level labels as the CSV file that `read_labels` reads.

    Args:
        path: The file. Its folder must exist. An older file is replaced in one step.
        labels: What to write.

    Raises:
        ValueError: If a name cannot be written as UTF-8, or leads out of its folder.
        OSError: If the folder is missing, not writable or full. An older file of the name stays as it was.

    Examples:
        >>> import pathlib, tempfile, torch
        >>> labels = ImageLabels(("a", "b"), ("cat", "dog"), torch.tensor([[1, 0], [1, 1]]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "labels.csv")
        ...     write_labels(file, labels)
        ...     print(file.read_text().strip())
        id,cat,dog
        a,1,0
        b,1,1
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", *labels.classes])
    for name in labels.names:
        _check_id("labels", name)
    rows = labels.labels.int().tolist()
    writer.writerows([name, *row] for name, row in zip(labels.names, rows, strict=True))
    write_atomically(path, text.getvalue().encode("utf-8"))


def read_cls_labels(
    path: str | os.PathLike[str],
    *,
    allow_pickle: bool = False,
    classes: Sequence[str] | None = None,
    max_bytes: int = MAX_BYTES,
) -> ImageLabels:
    """Read the `cls_labels.npy` of the field's repositories: a pickled dict, image id -> (C,) of 0 and 1.

    Ids are text (SEAM, ToCo) or whole numbers (IRN): a number of ten digits is a VOC id without its
    underscore, 2007000032 is `2007_000032`; other numbers are taken as they are.

    Args:
        path: The `.npy` file.
        allow_pickle: Must be True: the format is a pickle. Even then it is read by an unpickler that admits
            arrays, tensors and plain containers alone.
        classes: Names of the C classes, such as `VOC_CLASSES`. Their mask values `"1"` ... `"C"` for None.
        max_bytes: Refuse larger files, and labels that take more, at four bytes each.

    Returns:
        Names in the order of the file, classes and labels. `write_labels` saves them without pickle.

    Raises:
        UnsafePickleError: If the file asks for anything else than the above; nothing is run.
        ValueError: If `allow_pickle` is False, or the file is corrupt or holds something else.
        OSError: If there is no such file, or it may not be read.
    """
    advice = "write_labels saves what was read as CSV."
    content = read_pickled_dict(path, allow_pickle=allow_pickle, advice=advice, max_bytes=max_bytes)
    try:
        if not content:
            raise ValueError("the dict is empty")
        rows = to_tensors(content.values(), dtype=torch.float32, max_bytes=max_bytes)
        rows = [row.reshape(-1) for row in rows]
        if len(lengths := {len(row) for row in rows}) != 1:
            raise ValueError(f"the images have different numbers of classes: {quote(sorted(lengths))}")
        labels = torch.stack(rows)
        if classes is None:
            classes = [str(c + 1) for c in range(labels.shape[1])]
        names = tuple(_image_id(key) for key in content)
        for name in names:
            _check_id("the dict", name)
        return ImageLabels(names, tuple(classes), labels)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error


def _image_id(key: object) -> str:
    if isinstance(key, str):
        return key
    if isinstance(key, int) and not isinstance(key, bool) and key >= 0:
        digits = str(key)
        return f"{digits[:4]}_{digits[4:]}" if len(digits) == 10 else digits
    raise ValueError(f"expected image ids that are text or whole numbers, got {quote(key)}")


def _parse(lines: Iterator[tuple[int, list[str]]], classes: Sequence[str] | None) -> ImageLabels:
    """Labels from the cells of a table, each row with its line number. A row is kept as a byte a class."""
    _, header = next(lines, (0, []))
    if not header:
        raise ValueError("the file is empty")
    if len(header) < 2:
        raise ValueError(f"expected columns separated by commas, the header is {quote(header)}")
    _check_names("header", tuple(header[1:]))
    place_of = {name: place for place, name in enumerate(header[1:], 1)}
    if missing := [name for name in classes or () if name not in place_of]:
        raise ValueError(f"no column for the classes {quote(missing)} among {quote(header[1:])}")
    columns = list(classes or header[1:])
    places = [place_of[name] for name in columns]
    names, table, odd = [], bytearray(), dict[str, str]()
    for line, row in _whole_rows(lines, len(header)):
        cells = bytes([_FLAGS.get(row[place].lower(), _ODD) for place in places])
        for column, place in zip(columns, places, strict=True) if _ODD in cells else ():
            if row[place].lower() not in _FLAGS and column not in odd:
                where = f"line {line} ({quote(row[0])}), column {quote(column)}"
                odd[column] = f"{where}: expected 0 or 1, got {quote(row[place])}"
        names.append(row[0])
        table += cells
    if not names:
        raise ValueError("no image below the header")
    flags = torch.frombuffer(table, dtype=torch.uint8).view(len(names), len(columns))
    if classes is None:  # columns without a flag are something else
        kept = (flags != _ODD).any(0).nonzero()[:, 0]
        columns, flags = [columns[place] for place in kept.tolist()], flags[:, kept]
    if not columns:
        raise ValueError(f"no column of 0 and 1 among {quote(header[1:])}")
    if wrong := [odd[column] for column in columns if column in odd]:
        raise ValueError(f"{wrong[0]} (name the class columns with `classes` if this is none)")
    return ImageLabels(tuple(names), tuple(columns), flags == 1)


def _whole_rows(lines: Iterator[tuple[int, list[str]]], width: int) -> Iterator[tuple[int, list[str]]]:
    """The rows below the header, with a cell in each column and an image id that comes once."""
    first_line: dict[str, int] = {}
    for line, row in lines:
        if len(row) != width:
            raise ValueError(f"line {line}: expected {width} cells as in the header, got {len(row)}")
        _check_id(f"line {line}", row[0])
        if (first := first_line.setdefault(row[0], line)) != line:
            raise ValueError(f"line {line}: {quote(row[0])} stands in line {first} already")
        yield line, row


def _check_id(where: str, name: str) -> None:
    """Check that an image id, which will be part of other files' names, stays in the folder it is put to."""
    if _ESCAPE.search(name):
        raise ValueError(f"{where}: expected an image id that leads out of no folder, got {quote(name)}")


def _check_names(argument: str, names: tuple[str, ...]) -> None:
    if not names:
        raise ValueError(f"{argument}: expected at least one name")
    seen = set()
    for name in names:
        if not isinstance(name, str) or not name or name != name.strip() or re.search(r"[\r\n]", name):
            raise ValueError(
                f"{argument}: expected names in one line, without white space around them, got {quote(name)}"
            )
        if name in seen:
            raise ValueError(f"{argument}: {quote(name)} comes twice")
        seen.add(name)
