"""Which images there are: list files, the VOC folder layout, plain folders."""

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from pseudolabel.io._files import MAX_BYTES, open_file
from pseudolabel.io._quote import quote

__all__ = ["ListEntry", "VOCLayout", "find_images", "read_list"]

_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class ListEntry:
    """One line of a list file.

    Attributes:
        name: Id of the image: its file name without folder and suffix.
        image: Path of the photo below the data set's root, where the list gives one.
        mask: Path of the mask below the data set's root, where the list gives one.
        class_ids: Numbers after the id, where the list gives any; as in the file, neither shifted nor
            renumbered (COCO lists are found with 80 contiguous ids and with 90 sparse ones).
    """

    name: str
    image: str | None = None
    mask: str | None = None
    class_ids: tuple[int, ...] = ()


def read_list(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> tuple[ListEntry, ...]:
    r"""Read a list of images in any of the field's dialects.

    | line | found in |
    |---|---|
    | `2007_000032` | VOC, IRN, CLIP-ES |
    | `/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png` | PSA, SEAM; mask optional |
    | `000000000009 44 50` | COCO: id, then class ids, possibly none |

    A leading slash means the root of the data set, as in the scripts that read these lists. Blank lines are
    skipped.

    Args:
        path: Text file, UTF-8.
        max_bytes: Refuse larger files.

    Returns:
        One entry a line, in the order of the file.

    Raises:
        ValueError: If the file is empty, too large or not UTF-8, a line fits no dialect, a path leaves the
            root, or a name comes twice; it names path and line.
        OSError: If there is no such file, or it may not be read.

    Examples:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "train.txt")
        ...     _ = file.write_text("000000000009 44 50\n/JPEGImages/a.jpg /Masks/a.png\n")
        ...     for entry in read_list(file):
        ...         print(entry)
        ListEntry(name='000000000009', image=None, mask=None, class_ids=(44, 50))
        ListEntry(name='a', image='JPEGImages/a.jpg', mask='Masks/a.png', class_ids=())
    """
    try:
        with open_file(path, max_bytes=max_bytes) as file:
            text = file.read().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{os.fspath(path)}: not a UTF-8 text file: {error}") from error
    entries: list[ListEntry] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), 1):
        words = re.findall(r"[^ \t\r]+", line)  # names may hold other white space, such as U+3000
        if not words:
            continue
        try:
            entry = _parse(words)
            if entry.name in seen:
                raise ValueError(f"{quote(entry.name)} stands in line {seen[entry.name]} already")
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}, line {number}: {error}") from error
        seen[entry.name] = number
        entries.append(entry)
    if not entries:
        raise ValueError(f"{os.fspath(path)}: the list is empty")
    return tuple(entries)


@dataclass(frozen=True)
class VOCLayout:
    """Where the files of a data set in the layout of PASCAL VOC lie.

    Nothing is read before a method asks for it. Other layouts of the kind are settings: `masks` is
    `SegmentationClassAug` for the augmented set, and a folder with `images/`, `masks/` and `train.txt` is
    `VOCLayout(root, images="images", masks="masks", lists=".")`.

    Attributes:
        root: Folder of the data set, such as `VOCdevkit/VOC2012`.
        images: Folder of the photos, `*.jpg`.
        masks: Folder of the masks, `*.png`.
        lists: Folder of the lists, `*.txt`.

    Examples:
        >>> VOCLayout("VOC2012").mask_path("2007_000032").as_posix()
        'VOC2012/SegmentationClass/2007_000032.png'
    """

    root: str | os.PathLike[str]
    images: str = "JPEGImages"
    masks: str = "SegmentationClass"
    lists: str = "ImageSets/Segmentation"

    def image_path(self, name: str) -> Path:
        """Path of the photo of an image id."""
        return Path(self.root, self.images, _file_name(name) + ".jpg")

    def mask_path(self, name: str) -> Path:
        """Path of the mask of an image id."""
        return Path(self.root, self.masks, _file_name(name) + ".png")

    def ids(self, split: str) -> tuple[str, ...]:
        """Image ids of a split such as `train`, by `read_list`."""
        entries = read_list(Path(self.root, self.lists, _file_name(split) + ".txt"))
        return tuple(entry.name for entry in entries)


def find_images(folder: str | os.PathLike[str]) -> tuple[Path, ...]:
    """Photos of a folder, by suffix, sorted by name; hidden files and subfolders are left out.

    What is made from a photo carries its name with another suffix, so the names must differ without theirs.

    Args:
        folder: The folder.

    Returns:
        Paths, at least one.

    Raises:
        ValueError: If there is no photo, or two differ in their suffix alone.
        OSError: If there is no such folder, or it may not be read.

    Examples:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("b.JPG", "a.png", "notes.txt"):
        ...         pathlib.Path(folder, name).touch()
        ...     [path.name for path in find_images(folder)]
        ['a.png', 'b.JPG']
    """
    paths = sorted(
        path
        for path in Path(folder).iterdir()
        if path.suffix.lower() in _SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
    if not paths:
        raise ValueError(f"{os.fspath(folder)}: no photo here (looked for {', '.join(_SUFFIXES)})")
    first: dict[str, Path] = {}
    for path in paths:
        other = first.setdefault(path.stem, path)
        if other is not path:
            raise ValueError(
                f"{os.fspath(folder)}: {other.name!r} and {path.name!r} differ in their suffix alone, so "
                "their masks would have the same name"
            )
    return tuple(paths)


def _parse(words: list[str]) -> ListEntry:
    first, *rest = words
    if "/" in first or first.lower().endswith(_SUFFIXES):
        if len(rest) > 1:
            raise ValueError(
                f"expected an image path and a mask path, got {len(words)} words: {quote(words)}"
            )
        image = _below_root(first)
        mask = _below_root(rest[0]) if rest else None
        return ListEntry(_file_name(PurePosixPath(image).stem), image, mask)
    if not all(re.fullmatch(r"[0-9]{1,18}", word) for word in rest):
        hint = (
            " (a list of VOC's ImageSets/Main: take the one of ImageSets/Segmentation)"
            if "-1" in rest
            else ""
        )
        raise ValueError(
            f"expected an id, an id with class ids, or an image path with a mask path, got "
            f"{quote(words)}{hint}"
        )
    return ListEntry(_file_name(first), class_ids=tuple(int(word) for word in rest))


def _file_name(name: str) -> str:
    """The name itself, if it is one file name, not a path that may lead elsewhere."""
    if name in {"", ".", ".."} or re.search(r"[/\\\0]", name) or PureWindowsPath(name).drive:
        raise ValueError(f"name: expected an image id without folders, got {quote(name)}")
    return name


def _below_root(path: str) -> str:
    """The path without its leading slash, if it stays below the root that it is joined to."""
    relative = path.lstrip("/")
    for part in relative.split("/"):
        if part == ".." or "\\" in part or "\0" in part or (":" in part and PureWindowsPath(part).drive):
            raise ValueError(f"expected a path below the root of the data set, got {quote(path)}")
    return relative
