"""Broken and hostile files: each kind goes through the readers or writers that it is meant for.

A kind makes its file in an empty folder, and says what has to come: an error of this type that names the
file, or a result. Nothing else may appear there, so no pickle may run.
"""

import errno
import io
import json
import os
import pickle
import socket
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pseudolabel import io as files
from pseudolabel.io import _atomic
from pseudolabel.io._torch_file import read_torch_file

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX files")

READERS: dict[str, Callable[[Path], Any]] = {
    "image": files.read_image,
    "size": files.image_size,
    "mask": files.read_mask,
    "archive": files.read_cam,
    "labels": files.read_labels,
    "pickled labels": lambda path: files.read_cls_labels(path, allow_pickle=True),
    "pickled maps": lambda path: files.read_legacy_cam(path, allow_pickle=True),
    "list": files.read_list,
    "weights": read_torch_file,
}
GOOD_NAME = {
    "image": "a.jpg",
    "size": "a.jpg",
    "mask": "a.png",
    "archive": "a.npz",
    "labels": "a.csv",
    "pickled labels": "a.npy",
    "pickled maps": "a.npy",
    "list": "a.txt",
    "weights": "a.pt",
}


class Touch:
    """A pickle of it makes a file where it is loaded."""

    def __reduce__(self):
        return Path.touch, (Path("marker"),)


def picture(kind: str = "PNG", size: tuple[int, int] = (40, 30), mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 4, (size[1], size[0], len(mode)), np.uint8)
    Image.fromarray(noise if mode == "RGB" else noise[..., 0], mode if mode == "RGB" else None).save(
        file, kind
    )
    return file.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, *chunks: bytes, depth: int = 8, color: int = 0) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(height * (1 + width)))) if width * height < 10**6 else b""
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + chunk(b"IEND", b"")


def jpeg_of_scans(count: int) -> bytes:
    """A progressive JPEG of 4000 x 4000 pixels with so many empty scans more."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "teal").save(file, "JPEG", progressive=True)
    data = file.getvalue()
    size = data.index(b"\xff\xc2") + 5
    scan = bytes.fromhex("ffda0008010100013f0000")
    return data[:size] + struct.pack(">HH", 4000, 4000) + data[size + 4 : -2] + scan * count + data[-2:]


def bmp_of_runs(width: int, height: int) -> bytes:
    """A run-length coded BMP of one pixel a row, and the rest of it."""
    palette, runs = bytes(range(256)) * 4, b"\x01\xff\0\0" * height
    start = 54 + len(palette)
    sizes = struct.pack("<IHHI", start + len(runs), 0, 0, start)
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(runs), 0, 0, 256, 0)
    return b"BM" + sizes + header + palette + runs


def animation(kind: str) -> bytes:
    file = io.BytesIO()
    first, *others = [Image.new("L", (4, 3), level) for level in (0, 100, 200)]
    first.save(file, kind, save_all=True, append_images=others)
    return file.getvalue()


def twelve_bits() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.array([[0, 4095]], np.uint16)).save(file, "PNG")
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


MAPS = {
    "keys": npy(np.array([0, 2])),
    "cams": npy(np.ones((2, 3, 4), np.float32)),
    "size": npy(np.array([6, 8])),
    "version": npy(np.array(1)),
}


def archive(compress: bool = False, **changes: bytes | None) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as out:
        for name, data in (MAPS | changes).items():
            if data is not None:
                out.writestr(name if "." in name else f"{name}.npy", data)
    return file.getvalue()


def saved(content: Any, **settings: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **settings)
    return file.getvalue()


def weights(pickled: bytes, *, compress: bool = False, **members: bytes) -> bytes:
    """An archive as `torch.save` writes it, of parts of one's own."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as out:
        for name, data in {"data.pkl": pickled, "version": b"3\n", **members}.items():
            out.writestr(f"archive/{name.replace('__', '/')}", data)
    return file.getvalue()


def text(value: str | bytes) -> bytes:
    """The step of a pickle that makes a text."""
    value = value.encode() if isinstance(value, str) else value
    return b"X" + struct.pack("<I", len(value)) + value


def storage(key: bytes, count: bytes) -> bytes:
    """The steps of a pickle that ask for a storage of floats."""
    return b"(" + text("storage") + b"ctorch\nFloatStorage\n" + key + text("cpu") + count + b"tQ"


def good(reader: str) -> bytes:
    """Content that the reader takes."""
    return {
        "image": lambda: picture("JPEG"),
        "size": lambda: picture("JPEG"),
        "mask": lambda: picture("PNG", mode="L"),
        "archive": archive,
        "labels": lambda: b"id,cat,dog\na,0,1\nb,1,1\n",
        "pickled labels": lambda: npy(np.array({"a": np.array([0.0, 1.0])}, object)),
        "pickled maps": lambda: npy(np.array({"keys": np.array([1]), "cam": np.ones((1, 2, 2))}, object)),
        "list": lambda: b"a 1 2\nb 3\n",
        "weights": lambda: saved({"a": torch.arange(6.0)}),
    }[reader]()


def zip_with_size(size: int) -> bytes:
    """An archive whose directory lies about the size of a member."""
    data = bytearray(archive())
    place = data.rindex(b"PK\x01\x02")
    data[place + 24 : place + 28] = struct.pack("<I", size)
    return bytes(data)


def unpacks_to_more(path: Path) -> None:
    """An archive whose member has 300 MB more than its directory says."""
    keys = MAPS["keys"]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as out:
        for name, data in (MAPS | {"keys": keys + bytes(300 << 20)}).items():
            out.writestr(f"{name}.npy", data)
    data = bytearray(path.read_bytes())
    place = data.index(b"keys.npy", data.index(b"PK\x01\x02")) - 46
    data[place + 24 : place + 28] = struct.pack("<I", len(keys))
    path.write_bytes(data)


def npy_header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode("latin1")


class Kind(NamedTuple):
    """A kind of hostile file: who reads it, what is in it or how it is made, and what has to come."""

    readers: tuple[str, ...]
    content: bytes | Callable[[Path], None] | None
    end: type[Exception] | None  # None for a result
    name: str = ""
    says: str = ""  # a part of the message


PICTURES, TEXTS = ("image", "size", "mask"), ("labels", "list")
PICKLES = ("pickled labels", "pickled maps")
ALL = tuple(READERS)


def refused(readers: tuple[str, ...], content: Any, says: str = "", name: str = "") -> Kind:
    return Kind(readers, content, ValueError, name, says)


def taken(readers: tuple[str, ...], content: Any, name: str = "") -> Kind:
    return Kind(readers, content, None, name)


def sparse(path: Path) -> None:
    """Two terabytes that take no room on the disk."""
    with path.open("wb") as file:
        file.truncate(2 << 40)


def link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def listening_socket(path: Path) -> None:
    folder = Path.cwd()
    os.chdir(path.parent)  # a socket's name is short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(folder)


def ids(*names: str) -> bytes:
    return "\n".join(["id,cat,dog", *(f'"{name}",0,1' for name in names)]).encode("utf-8", "surrogatepass")


def lines(*names: str) -> bytes:
    return "\n".join(names).encode("utf-8", "surrogatepass")


NAMES = {
    "composed letters (NFC)": "\u00e9t\u00e9",
    "decomposed letters (NFD)": "e\u0301te\u0301",
    "a right-to-left mark": "a\u202egpj",
    "Arabic": "\u0635\u0648\u0631\u0629",
    "emoji": "\U0001f408\u200d\u2b1b",
    "a zero-width joiner": "a\u200db",
    "250 letters": "a" * 250,
    "percent signs": "%2e%2e%2fa",
    "a shell command": "$(touch marker)",
    "a format string": "{0.__class__}%s",
    "a leading dash": "-rf",
    "a device of Windows": "CON",
}
PATHS = {
    "..": "../a",
    ".. inside": "b/../../a",
    "an absolute path": "/etc/passwd",
    "a drive": "C:/a",
    "a backslash": "..\\a",
    "a UNC path": "\\\\host\\share\\a",
    "a NUL": "a\0b",
}
FOREIGN = {
    "text": b"not what it says\n" * 9,
    "HTML": b"<!doctype html><html></html>",
    "PDF": b"%PDF-1.7\n%%EOF",
    "a shell script": b"#!/bin/sh\ntouch marker\n",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(marker) (w) file\n",
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><script>1</script></svg>',
    "an ELF program": b"\x7fELF" + bytes(60),
    "gzip": b"\x1f\x8b\x08" + bytes(20),
    "zeros": bytes(1000),
    "ones": b"\xff" * 1000,
    "a pickle that runs code": pickle.dumps(Touch()),
    "a NumPy file that runs code": npy(np.array(Touch(), object)),
    "an archive of something else": archive(**dict.fromkeys(MAPS), other=b"1"),
}

# Sixty pairs, each of the one before and itself: the last one has 2^60 leaves.
PAIRS = b"K\x01" + b"q\5h\5\x86" * 60
DTYPE = b"cnumpy\ndtype\n" + text("f4") + b"\x89\x88\x87R"

# Some hundred bytes that want years, or more memory than there is. They are read in a process of their own.
BOMBS: dict[str, Kind] = {
    **{
        f"pickle with {what}": refused((*PICKLES, "weights"), b"\x80\x04" + steps + b".")
        for what, steps in {
            "a key of 2^60 leaves": b"}" + PAIRS + b"K\x01s",
            "a set of 2^60 leaves": b"\x8f(" + PAIRS + b"\x90",
            "a frozen set of 2^60 leaves": b"(" + PAIRS + b"\x91",
            "a set, by its name, of 2^60 leaves": b"c__builtin__\nset\n(" + PAIRS + b"l\x85R",
            "a name of 2^60 leaves": b"Va\n" + PAIRS + b"\x93",
            "a call of 2^60 leaves": PAIRS + b")R",
            "an ordered dict with a key of 2^60 leaves": b"ccollections\nOrderedDict\n("
            + PAIRS
            + b"N\x86l\x85R",
            "a stored object of 2^60 leaves": b"(" + PAIRS + b"NNNNtQ",
            "20 000 keys of one place": b"}("
            + b"".join(
                b"\x8a\x0b" + (k * (2**61 - 1)).to_bytes(11, "little") + b"N" for k in range(1, 20_001)
            )
            + b"u",
            "place 2 * 10^8 of the memory": b"}r" + struct.pack("<I", 2 * 10**8),
            "place 2^32 - 1 of the memory": b"}r\xff\xff\xff\xff",
            "place 10^100 of the memory": b"}p1" + b"0" * 100 + b"\n",
            "8 GB of text that are not there": b"\x8d" + struct.pack("<Q", 1 << 33),
            "8 GB of bytes that are not there": b"\x8e" + struct.pack("<Q", 1 << 33),
            "8 GB of changeable bytes that are not there": b"\x96" + struct.pack("<Q", 1 << 33),
            "a number of 4 MB as a key": b"}\x8b" + struct.pack("<I", 1 << 22) + b"\x7f" * (1 << 22) + b"Ns",
            "a text that is encoded 20 000 times": b"c_codecs\nencode\nq\0"
            + text("a" * (1 << 20))
            + text("latin1")
            + b"\x86q\1]("
            + b"h\0h\1R" * 20_000
            + b"e",
        }.items()
    },
    **{
        f"pickle with {what}": refused(PICKLES, b"\x80\x04" + steps + b".")
        for what, steps in {
            "a shape of 2^60 leaves": b"cnumpy.core.numeric\n_frombuffer\n(C\0"
            + DTYPE
            + PAIRS
            + text("C")
            + b"tR",
            "a dtype's state of 2^60 leaves": DTYPE
            + b"(K\x03"
            + text("<")
            + PAIRS
            + b"NNJ\xff\xff\xff\xfftb",
            "a key's array of 2^60 leaves": b"}" + text("keys") + PAIRS + b"s",
        }.items()
    },
    "pickled labels of one list for 20 000 images": refused(
        ("pickled labels",),
        b"\x80\x04]("
        + b"K\0" * 100_000
        + b"eq\0}("
        + b"".join(b"J%sh\0" % struct.pack("<i", n) for n in range(20_000))
        + b"u.",
        "max_bytes",
    ),
    "pickled maps of one array for 10 000 classes": refused(
        ("pickled maps",),
        pickle.dumps(dict.fromkeys(range(10_000), np.ones((512, 512), np.float32))),
        "max_bytes",
    ),
    **{
        f"weights with {what}": refused(("weights",), weights(b"\x80\x02" + steps + b".", **members))
        for what, (steps, members) in {
            "a key of 2^60 leaves": (b"}" + PAIRS + b"Ns", {}),
            "a storage's key of 2^60 leaves": (storage(PAIRS, b"K\x06"), {}),
            "a storage's size of 2^60 leaves": (storage(text("0"), PAIRS), {}),
            "a tensor's shape of 2^60 leaves": (
                b"ctorch._utils\n_rebuild_tensor_v2\n("
                + storage(text("0"), b"K\x06")
                + b"K\0"
                + PAIRS
                + b"K\x01\x85\x89}tR",
                {"data__0": bytes(24)},
            ),
            "a set of 2^60 leaves": (b"c__builtin__\nset\n(" + PAIRS + b"l\x85R", {}),
            "a counter of 2^60 leaves": (b"ccollections\nCounter\n(" + PAIRS + b"l\x85R", {}),
            "8 GB of changeable bytes": (b"c__builtin__\nbytearray\n\x8a\x05\0\0\0\0\2\x85R", {}),
            "a text in a slow encoding": (
                b"c_codecs\nencode\n" + text("\u00e4" * 200_000) + text("punycode") + b"\x86R",
                {},
            ),
            "a storage of 8 GB that are not there": (storage(text("0"), b"\x8a\x05\0\0\0\x80\0"), {}),
            "a tensor of 8 GB without values, as a storage": (
                b"ctorch\nFloatTensor\n\x8a\x05\0\0\0\x80\0\x85R",
                {},
            ),
        }.items()
    },
    "archive in bzip2 that unpacks to more than it says": refused(("archive",), unpacks_to_more, "deflate"),
    "weights that unpack to 64 MB": refused(
        ("weights",),
        weights(
            b"\x80\x02}" + text("a") + storage(text("0"), b"J\0\0\0\1") + b"s.",
            compress=True,
            data__0=bytes(64 << 20),
        ),
        "more than the",
    ),
}

KINDS: dict[str, Kind] = {
    **BOMBS,
    # any file
    "nothing there": Kind(ALL, None, FileNotFoundError),
    "empty": refused(ALL, b"", "empty|Ran out|not a zip|File is not"),
    "one byte": refused(ALL, b"\x89"),
    "a folder": Kind(ALL, Path.mkdir, OSError),
    "a link to itself": Kind(ALL, lambda path: path.symlink_to(path), OSError),
    "a broken link": Kind(ALL, link_to("nowhere"), FileNotFoundError),
    "a link to a folder": Kind(ALL, link_to("."), OSError),
    "a pipe without a writer": refused(ALL, os.mkfifo if os.name == "posix" else None, "regular file"),
    "a socket": refused(ALL, listening_socket, "regular file"),
    "a link to an endless device": refused(ALL, link_to("/dev/zero"), "regular file"),
    "a link to a terminal": refused(ALL, link_to("/dev/tty"), "regular file|No such"),
    "2 TiB of nothing": refused(ALL, sparse),
    "a NUL in the name": refused(ALL, None, "name of a file", "a\0.png"),
    "no name": refused(ALL, None, "name of a file", "-"),
    "a name of 5000 letters": Kind(ALL, None, OSError, "a" * 5000),
    **{
        f"cut to {share:.0%}": refused(("archive", *PICTURES[::2], *PICKLES, "weights"), share)
        for share in (0.2, 0.6, 0.9)
    },
    **{
        f"{what} in a file of another kind": refused((*PICTURES, "archive", *PICKLES, "weights"), content)
        for what, content in FOREIGN.items()
    },
    "text after the end": taken(("size", "image"), picture("JPEG") + b"<script>"),
    # photos and masks
    "PNG named .jpg": taken(("image", "size"), picture("PNG"), "a.jpg"),
    "JPEG named .png": taken(("image", "size"), picture("JPEG"), "a.png"),
    "JPEG as a mask": refused(("mask",), picture("JPEG"), "JPEG"),
    "GIF as a mask": refused(("mask",), picture("GIF", mode="L"), "GIF"),
    "colours as a mask": refused(("mask",), picture("PNG"), "colours"),
    "16 bits as a mask": refused(("mask",), png(2, 2, depth=16), "16 bits|truncated"),
    **{
        f"PNG of {width} x {height} pixels": refused(PICTURES, png(width, height), "pixels|decompression")
        for width, height in ((60_000, 60_000), (2**31 - 1, 2**31 - 1), (10_000, 9_000), (1, 10**9))
    },
    "PNG of 0 x 0 pixels": refused(PICTURES, png(0, 0)),
    "PNG without pixels": refused(("image", "mask"), png(2**10, 2**10)),
    "PNG with a wrong checksum": refused(PICTURES[::2], picture().replace(b"IDAT", b"IDAX")),
    "PNG whose pixels are no zlib": refused(
        PICTURES[::2], png(1000, 1000, chunk(b"IDAT", b"not compressed" * 50))
    ),
    "PNG whose text unpacks to 100 MB": refused(
        PICTURES, png(4, 4, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100 << 20), 9)))
    ),
    "PNG whose colour profile unpacks to 100 MB": refused(
        PICTURES[::2], png(4, 4, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(100 << 20), 9)))
    ),
    "PNG with a chunk of 2 GB": refused(
        PICTURES[::2], png(4, 4)[:33] + struct.pack(">I", 2**31 - 1) + b"IDAT"
    ),
    "BMP of negative width": refused(
        PICTURES, b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, -5, 5, 1, 24, 0, 0, 0, 0, 0, 0)
    ),
    "TIFF whose directory points to itself": refused(PICTURES, b"II*\0\x08\0\0\0\0\0\x08\0\0\0"),
    "PPM of 10^12 pixels": refused(PICTURES, b"P6 1000000 1000000 255\n"),
    "PPM whose size is a million digits": refused(PICTURES, b"P6 " + b"9" * 10**6),
    "JPEG of 2000 scans": refused(("image",), jpeg_of_scans(2000), "over 4000 x 4000 pixels 2010 times"),
    "BMP of 16 million pixels in 16 kB": refused(("image",), bmp_of_runs(4000, 4000), "run-length"),
    "animated GIF": refused(PICTURES[:2], animation("GIF"), "more than one picture"),
    "animated PNG": refused(PICTURES, animation("PNG"), "more than one picture"),
    "animated WebP": refused(PICTURES[:2], animation("WEBP"), "more than one picture"),
    "TIFF of three pages": refused(PICTURES[:2], animation("TIFF"), "more than one picture"),
    "16-bit PNG of 12 bits": refused(("image",), twelve_bits(), "depth=12"),
    "GIF of 65535 x 65535 pixels": refused(PICTURES, b"GIF89a" + b"\xff" * 4 + b"\0\0\0;"),
    # archives of maps
    **{f"archive without {name}": refused(("archive",), archive(**{name: None})) for name in MAPS},
    "archive with one file more": refused(("archive",), archive(**{"other.npy": npy(np.ones(1))})),
    **{
        f"archive with the member {name}": refused(("archive",), archive(**{f"{path}.npy": b"1"}), "arrays")
        for name, path in PATHS.items()
        if "\0" not in path
    },
    "archive with 10 000 members": refused(
        ("archive",), archive(**{f"{n}.npy": b"" for n in range(10_000)}), "arrays"
    ),
    "archive with a pickle in it": refused(
        ("archive",), archive(cams=FOREIGN["a NumPy file that runs code"])
    ),
    "archive with a bare pickle in it": refused(("archive",), archive(cams=pickle.dumps(Touch()))),
    "archive that unpacks to 2 GB": refused(
        ("archive",),
        archive(
            True,
            cams=npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (1, 1, 9)}\n")
            + bytes(50 << 20),
        ),
    ),
    "archive that lies about a size": refused(("archive",), zip_with_size(2**31)),
    **{
        f"archive with maps of shape {shape}": refused(
            ("archive",),
            archive(cams=npy_header(f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}\n")),
        )
        for shape in (
            "(2, 10**9, 10**9)",
            "(2, -3, 4)",
            "(2, 99999999, 99999999)",
            "()",
            "'abc'",
            "(2, True, 4)",
        )
    },
    **{
        f"archive with maps of type {dtype}": refused(
            ("archive",),
            archive(cams=npy_header(f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': (2, 3, 4)}}\n")),
        )
        for dtype in ("|O", "<c8", "<f8", "|S9", "<M8[ns]", "nonsense", "<f4,<f4")
    },
    "archive whose header is code": refused(("archive",), archive(cams=npy_header("__import__('os')\n"))),
    "archive whose header is nested 10 000 deep": refused(
        ("archive",), archive(cams=npy_header("(" * 10_000 + "\n"))
    ),
    **{
        f"archive with {what}": refused(("archive",), archive(**{name: npy(np.array(value))}))
        for what, name, value in (
            ("a negative class", "keys", [-1, 2]),
            ("a class twice", "keys", [2, 2]),
            ("three classes for two maps", "keys", [0, 1, 2]),
            ("classes that are no integers", "keys", [0.0, 1.0]),
            ("NaN", "cams", np.full((2, 3, 4), np.nan, np.float32)),
            ("infinity", "cams", np.full((2, 3, 4), np.inf, np.float32)),
            ("flat maps", "cams", np.ones(24, np.float32)),
            ("a size of 0", "size", [0, 8]),
            ("a size of three numbers", "size", [6, 8, 9]),
            ("a photo of 10^12 pixels", "size", [10**6, 10**6]),
            ("a version to come", "version", 2),
        )
    },
    # pickles
    **{
        f"pickle that calls {what}": refused(PICKLES, content, "refused, nothing was run")
        for what, content in {
            "a function": pickle.dumps(Touch()),
            "a function inside a dict": pickle.dumps({"a": Touch()}),
            "a function as a key's value in .npy": npy(np.array({"a": Touch()}, object)),
            "os.system": b"cos\nsystem\n(S'touch marker'\ntR.",
            "eval": b'cbuiltins\neval\n(S\'open("marker", "w")\'\ntR.',
            "getattr": b"cbuiltins\ngetattr\n(S'a'\nS'b'\ntR.",
            "numpy.load": b"cnumpy\nload\n(S'marker'\ntR.",
            "torch.load": b"ctorch\nload\n(S'marker'\ntR.",
        }.items()
    },
    "pickle that asks the extension registry": refused(PICKLES, b"\x80\x02\x82\x01."),
    "pickle of a number": refused(PICKLES, pickle.dumps(3), "dict"),
    "pickle of an empty dict": refused(PICKLES, pickle.dumps({}), "empty"),
    "pickle of a dict of texts": refused(PICKLES, pickle.dumps({"a": "b"})),
    "pickle that claims 2^60 bytes": refused(PICKLES, b"\x80\x04\x8e" + struct.pack("<Q", 2**60)),
    "pickle that claims a frame of 2^60 bytes": refused(PICKLES, b"\x80\x04\x95" + struct.pack("<Q", 2**60)),
    "pickle nested 100 000 deep": refused(PICKLES, b"\x80\x04" + b"]" * 10 + b"(l" * 100_000),
    "pickle of protocol 99": refused(PICKLES, b"\x80\x63."),
    "labels that are half": refused(("pickled labels",), pickle.dumps({"a": [0, 0.5]}), "multi-hot"),
    "labels of different lengths": refused(("pickled labels",), pickle.dumps({"a": [0], "b": [0, 1]})),
    "maps of integers": refused(("pickled maps",), pickle.dumps({"keys": [0], "cam": [1]})),
    "maps without keys": refused(("pickled maps",), pickle.dumps({"cam": [1.0]})),
    # label files
    **{
        f"label file with {what} as an id": refused(("labels",), ids("a", path), "out of no folder")
        for what, path in PATHS.items()
    },
    **{
        f"pickled labels with {what} as an id": refused(
            ("pickled labels",), pickle.dumps({path: [0, 1]}), "out of no folder"
        )
        for what, path in PATHS.items()
    },
    **{
        f"label file with {what} as an id": taken(("labels",), ids("a", name)) for what, name in NAMES.items()
    },
    **{
        f"label file with {what}": refused(("labels",), content)
        for what, content in {
            "an id twice": ids("a", "a"),
            "an empty id": ids(""),
            "a class twice": b"id,cat,cat\na,0,1\n",
            "a cell too many": b"id,cat\na,0,1\n",
            "a cell too few": b"id,cat,dog\na,0\n",
            "a label 2": b"id,cat\na,2\nb,1\n",
            "a label -1": b"id,cat\na,-1\nb,1\n",
            "a label NaN": b"id,cat\na,nan\nb,1\n",
            "a header alone": b"id,cat\n",
            "one column": b"id\na\n",
            "semicolons": b"id;cat\na;1\n",
            "an open quote": b'id,cat\n"a,0\n',
            "a NUL": b"id,cat\n\0,0\n",
            "a cell of 1 MB": b"id,cat\n" + b"a" * (1 << 20) + b",1\n",
            "UTF-16": "id,cat\na,1\n".encode("utf-16"),
            "Latin-1": b"id,cat\n\xe9,1\n",
            "half a character": ids("\ud800"),
            "zeros": bytes(99),
        }.items()
    },
    # lists
    **{
        f"list with the path {what}": refused(("list",), lines("a", f"{path}.jpg"), "line 2")
        for what, path in PATHS.items()
        if what != "an absolute path"
    },
    **{
        f"list with the mask path {what}": refused(("list",), lines(f"/a.jpg {path}.png"), "line 1")
        for what, path in PATHS.items()
        if what != "an absolute path"
    },
    "list with an absolute path": taken(("list",), b"/etc/passwd.jpg\n"),  # below the data set's root
    **{f"list with {what}": taken(("list",), lines(name)) for what, name in NAMES.items() if " " not in name},
    **{
        f"list with {what}": refused(("list",), content)
        for what, content in {
            "an id twice": b"a\na\n",
            "the id ..": b"..\n",
            "a drive": b"C:a\n",
            "words for classes": b"a cat\n",
            "a negative class": b"a -1\n",
            "three paths": b"/a.jpg /a.png /b.png\n",
            "blank lines alone": b"\n\n \n",
            "UTF-16": "a\nb\n".encode("utf-16"),
            "Latin-1": b"\xe9\n",
            "half a character": lines("\ud800"),
        }.items()
    },
}


def make(kind: Kind, reader: str, folder: Path) -> Path:
    name = kind.name or GOOD_NAME[reader]
    path = Path(folder, name) if name != "-" else folder
    if isinstance(kind.content, float):
        content = good(reader)
        path.write_bytes(content[: int(kind.content * len(content))])
    elif isinstance(kind.content, bytes):
        path.write_bytes(kind.content)
    elif kind.content:
        kind.content(path)
    return path


def needs_posix(kind: Kind) -> bool:
    return callable(kind.content) or "\0" in kind.name


@pytest.mark.parametrize("reader", READERS)
def test_good_files_are_read(tmp_path, reader):
    """Otherwise the others would be refused for nothing."""
    path = tmp_path / GOOD_NAME[reader]
    path.write_bytes(good(reader))
    READERS[reader](path)


@pytest.mark.parametrize(
    ("label", "reader"),
    [(label, r) for label, kind in KINDS.items() if label not in BOMBS for r in kind.readers],
)
def test_every_kind(tmp_path, monkeypatch, label, reader):
    kind = KINDS[label]
    if os.name != "posix" and needs_posix(kind):
        pytest.skip("needs POSIX files")
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    path = make(kind, reader, folder)
    before = sorted(tmp_path.rglob("*"))
    if kind.end is None:
        READERS[reader](path)
    else:
        given = "" if kind.name == "-" else path
        with pytest.raises(kind.end, match=f"(?s).*({kind.says or ''})") as caught:
            READERS[reader](given)
        said = str(caught.value)
        assert "path:" in said or path.name[:40] in said, said
        assert type(caught.value) is not UnicodeDecodeError
    assert sorted(tmp_path.rglob("*")) == before


def explode(folder: Path) -> None:
    """Read every bomb, and print a line of JSON for each: what it ended in, and the megabytes."""
    import resource

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10

    for label, kind in BOMBS.items():
        for reader in kind.readers:
            path = make(kind, reader, folder)
            print(json.dumps([label, reader]), flush=True)
            before, end, said = peak(), "", ""
            try:
                READERS[reader](path)
            except Exception as error:  # noqa: BLE001
                end, said = "ValueError" if isinstance(error, ValueError) else repr(error), str(error)
            print(
                json.dumps([end, said[:999], len(said), peak() - before]),
                flush=True,
            )
            path.unlink()


@posix
def test_bombs(tmp_path):
    """They neither hang, deaf to signals as Python is while it hashes, nor take the memory."""
    ran = subprocess.run(
        [sys.executable, __file__, str(tmp_path)], capture_output=True, text=True, timeout=100, check=False
    )
    lines = [json.loads(line) for line in ran.stdout.splitlines()]
    told = dict(zip(map(tuple, lines[::2]), lines[1::2], strict=False))
    assert list(told) == [(label, reader) for label, kind in BOMBS.items() for reader in kind.readers], (
        ran.stderr[-2000:],
        lines[-1],
    )
    for (label, reader), (end, said, length, megabytes) in told.items():
        assert end == "ValueError", (label, reader, end, said)
        assert GOOD_NAME[reader] in said, (label, reader, said)
        assert BOMBS[label].says in said, (label, reader, said)
        assert length < 2000, (label, reader, length)
        assert megabytes < 200, (label, reader, megabytes)


@pytest.mark.parametrize("path", [None, 3, 1.5, b"a.png", ["a.png"], object()])
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_path(reader, path):
    with pytest.raises(TypeError, match=r"^path: expected a path, got"):
        READERS[reader](path)


@given(data=st.data())
def test_flipped_bits(tmp_path_factory, data):
    """Any bits of a good file: a result that is as good, or an error that names the file."""
    reader = data.draw(st.sampled_from(ALL))
    content = bytearray(good(reader))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path_factory.mktemp("bits") / GOOD_NAME[reader]
    path.write_bytes(content)
    try:
        found = READERS[reader](path)
    except ValueError as error:
        assert path.name in str(error)  # noqa: PT017
    else:
        if isinstance(found, torch.Tensor):
            assert found.numel() > 0
            assert not found.is_floating_point() or (found.min() >= 0 and found.max() <= 1)


# ------------------------------------------------------------------------------------------------ writers

WRITERS: dict[str, Callable[[Any], None]] = {
    "mask.png": lambda path: files.write_mask(path, torch.ones(4, 5, dtype=torch.uint8)),
    "maps.npz": lambda path: files.write_cam(path, torch.ones(2, 4, 5), torch.tensor([1, 0])),
    "labels.csv": lambda path: files.write_labels(path, files.ImageLabels(("a",), ("b",), torch.ones(1, 1))),
}


def full_disk(monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    where = {"open": Path, "replace": Path, "fsync": _atomic.os}[function]
    monkeypatch.setattr(where, function, fail)


WRITING: dict[str, tuple[Callable[[Path, pytest.MonkeyPatch], None], type[Exception]]] = {
    "disk full when the file is made": (lambda _, patch: full_disk(patch, "open"), OSError),
    "disk full when it is flushed": (lambda _, patch: full_disk(patch, "fsync"), OSError),
    "disk full when it is renamed": (lambda _, patch: full_disk(patch, "replace"), OSError),
    "a folder in the way": (lambda path, _: path.mkdir(), OSError),
    "a pipe in the way": (lambda path, _: os.mkfifo(path), ValueError),
    "a link to a device in the way": (lambda path, _: path.symlink_to("/dev/null"), ValueError),
    "a link to itself in the way": (lambda path, _: path.symlink_to(path), OSError),
}


@posix
@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("label", WRITING)
def test_every_writer(tmp_path, monkeypatch, label, name):
    """An error that names the file, and nothing else changes."""
    make_hostile, end = WRITING[label]
    path = tmp_path / name
    make_hostile(path, monkeypatch)
    before = sorted((found, found.lstat().st_mode) for found in tmp_path.iterdir())
    with pytest.raises(end, match=name):
        WRITERS[name](path)
    monkeypatch.undo()
    assert sorted((found, found.lstat().st_mode) for found in tmp_path.iterdir()) == before
    assert not Path("/dev/null").is_file()


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("path", [None, 3, b"a.png", ["a.png"]])
def test_no_path_to_write(name, path):
    with pytest.raises(TypeError, match=r"^path: expected a path, got"):
        WRITERS[name](path)


@pytest.mark.parametrize("name", WRITERS)
def test_nul_in_a_name_to_write(tmp_path, name):
    with pytest.raises(ValueError, match=r"^path: expected the name of a file"):
        WRITERS[name](tmp_path / f"a\0{name}")


@posix
@pytest.mark.parametrize("reader", READERS)
def test_unreadable(tmp_path, reader):
    path = tmp_path / GOOD_NAME[reader]
    path.write_bytes(good(reader))
    path.chmod(0)
    root = os.geteuid() == 0
    if root:  # who may read everything
        os.seteuid(65534)
    try:
        with pytest.raises(PermissionError, match=path.name):
            READERS[reader](path)
    finally:
        if root:
            os.seteuid(0)


# ------------------------------------------------------------------------------------------------ folders


@posix
def test_folder_of_photos(tmp_path):
    """Only regular files and links to them are photos, whatever they are called."""
    for name in NAMES.values():
        (tmp_path / f"{name[:60]}.png").touch()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "broken.png").symlink_to("nowhere")
    (tmp_path / "itself.png").symlink_to("itself.png")
    (tmp_path / "outside.png").symlink_to(__file__)
    os.mkfifo(tmp_path / "pipe.png")
    found = {path.stem for path in files.find_images(tmp_path)}
    assert found == {name[:60] for name in NAMES.values()} | {"outside"}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_layout(path):
    layout = files.VOCLayout("root")
    for method in (layout.image_path, layout.mask_path, layout.ids):
        with pytest.raises(ValueError, match=r"^name: expected an image id without folders"):
            method(path)


if __name__ == "__main__":
    explode(Path(sys.argv[1]))
