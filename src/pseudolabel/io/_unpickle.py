"""Reading of pickled dicts without running what a pickle asks for.

A pickle is a program: it names functions of any module and has them called. Here every name must stand in
the short table at the end of this file, and what it stands for is not the function of NumPy or PyTorch but a
small one of ours, which checks its arguments and builds the array itself. So neither library's own unpickling
code, which trusts its input, ever sees the file.
"""

import io
import math
import os
import pickle
import re
import struct
from collections.abc import Callable, Collection, Mapping
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pseudolabel.io._files import MAX_BYTES, check_path, open_file
from pseudolabel.io._pickle_program import UnsafePickleError, check_pickle
from pseudolabel.io._quote import quote

__all__ = ["UnsafePickleError", "read_pickled_dict", "to_tensors"]


def read_pickled_dict(
    path: str | os.PathLike[str], *, allow_pickle: bool, advice: str, max_bytes: int = MAX_BYTES
) -> dict[object, object]:
    """Read the dict that `np.save` or `pickle.dump` put into a file; for its values see `to_tensors`.

    Args:
        path: An `.npy` file that holds one pickled dict, or a bare pickle.
        allow_pickle: False refuses the file.
        advice: What to do about that, for the error.
        max_bytes: Refuse larger files.

    Raises:
        UnsafePickleError: If the file asks for anything but arrays, tensors and plain containers.
        ValueError: If pickle is not allowed, or the file is corrupt, too large or holds something else.
        OSError: If there is no such file, or it may not be read.
    """
    check_path(path)
    name = os.fspath(path)
    if not allow_pickle:
        raise ValueError(
            f"{name}: this format is a pickle, which may run code on loading. Pass allow_pickle=True if you "
            f"know its source: even then only arrays, tensors and plain containers are admitted. {advice}"
        )
    with open_file(path, max_bytes=max_bytes) as file:
        try:
            content = _load(file)
            content = content.value if isinstance(content, _Pickled) else content
        except UnsafePickleError as error:
            raise UnsafePickleError(f"{name}: refused, nothing was run: {error}") from error
        except Exception as error:
            cause = str(error) or type(error).__name__
            raise ValueError(f"{name}: cannot read this pickle: {cause}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name}: expected one pickled dict, got {type(content).__name__}")
    return content


def to_tensors(
    values: Collection[object], *, dtype: torch.dtype | None = None, max_bytes: int = MAX_BYTES
) -> list[Tensor]:
    """Make tensors of arrays, tensors, numbers or flat lists of numbers out of a pickle.

    Those that are one and the same in the file become one tensor. All together may take `max_bytes`, as if
    each were one of its own, which they will be once they are stacked.
    """
    made = {id(value): _to_tensor(value, dtype) for value in {id(value): value for value in values}.values()}
    tensors = [made[id(value)] for value in values]
    if (total := sum(tensor.nbytes for tensor in tensors)) > max_bytes:
        raise ValueError(f"its arrays take {total} bytes, more than max_bytes={max_bytes}")
    return tensors


def _to_tensor(value: object, dtype: torch.dtype | None = None) -> Tensor:
    if isinstance(value, _Pickled):
        value = value.value
    if isinstance(value, Tensor) and not value.is_complex():
        return value if dtype is None else value.to(dtype)
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(value).to(dtype)
    numbers = value if isinstance(value, list | tuple) else [value]
    if all(isinstance(number, int | float) for number in numbers):
        try:
            return torch.tensor(value, dtype=dtype, device="cpu")
        except (ValueError, RuntimeError, OverflowError):
            raise ValueError("expected numbers of 64 bits") from None
    raise ValueError(f"expected an array or numbers, got {type(value).__name__}")


def _load(file: BinaryIO) -> object:
    """Content of an `.npy` file with one object in it, or of a bare pickle."""
    start = file.read(6)
    file.seek(0)
    if start[:2] == b"PK":
        raise ValueError("this is a zip archive (.npz): read CAM archives with read_cam")
    if start != b"\x93NUMPY":
        return _Unpickler(file).load()
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError(f"unknown .npy version {version}")
    if dtype != np.dtype(object) or shape != ():
        raise ValueError(f"expected one pickled dict, got an array of {dtype}, shape {shape}")
    return _Unpickler(file).load()


class _Admitted:
    """What a name in a pickle stands for. A pickle can call it, but neither look into it nor change it."""

    __slots__ = ("meaning",)

    def __init__(self, meaning: Any) -> None:
        self.meaning = meaning

    def __call__(self, *args: object) -> object:
        return self.meaning(*args)

    def __setstate__(self, state: object) -> None:
        raise UnsafePickleError("it tries to change a function")


class _Unpickler(pickle.Unpickler):
    """Unpickler of a program that was looked at, which knows the names of one table alone."""

    def __init__(self, file: BinaryIO) -> None:
        start = file.tell()
        check_pickle(file)
        file.seek(start)
        # Python 2 wrote array bytes as text; latin1 gives each byte back.
        super().__init__(file, encoding="latin1")

    def find_class(self, module: str, name: str, /) -> _Admitted:
        if (module, name) not in _ADMITTED:
            raise UnsafePickleError(f"it asks for {f'{module}.{name}'[:120]}")
        return _ADMITTED[module, name]


# ---------------------------------------------------------------------------------------------- NumPy


class _Pickled:
    """An array or tensor of a pickle: empty at first where pickle fills it later, and filled once."""

    __slots__ = ("value",)

    def __init__(self, value: object = None) -> None:
        self.value = value

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if self.value is not None:
            raise UnsafePickleError("it tries to change an array")
        shape, dtype, fortran, data = state[-4:]
        if dtype.code[0] != "O":
            self.value = _array(data, dtype, shape, "F" if fortran else "C")
        elif shape == () and isinstance(data, list) and len(data) == 1:
            self.value = data[0]
        else:
            raise ValueError("an array of more than one object")


class _DType:
    """`numpy.dtype` of numbers, bools and text; pickle tells the byte order afterwards."""

    __slots__ = ("code", "order")

    def __init__(self, code: str, *_: object) -> None:
        if not re.fullmatch(r"\?|b1|f[248]|[iu][1248]|U[0-9]{1,4}|O[48]?", code):
            raise ValueError(f"an array of dtype {quote(code)}")
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, order, subarray, names, fields, *_ = state
        if subarray or names or fields or order not in tuple("<>=|"):
            raise ValueError("an array of a structured dtype")
        self.order = order


def _array(data: object, dtype: _DType, shape: tuple[int, ...], order: Any) -> NDArray[Any]:
    """Array in native byte order, of a copy of the bytes, which must fill the shape exactly."""
    _check_shape(shape)
    if dtype.code[0] == "O":
        raise ValueError("bytes for an array of objects")
    stored = np.dtype(dtype.order + dtype.code)
    data = data.encode("latin1") if isinstance(data, str) else data
    if not isinstance(data, bytes | bytearray) or len(data) != math.prod(shape) * stored.itemsize:
        raise ValueError(f"its bytes do not fill an array of shape {shape}")
    array = np.frombuffer(data, stored).reshape(shape, order=order)
    return np.array(array, dtype=stored.newbyteorder("="), order="C")


def _check_shape(shape: object) -> None:
    if not isinstance(shape, tuple) or not all(type(side) is int and side >= 0 for side in shape):
        raise ValueError(f"expected a shape of whole numbers, got {quote(shape)}")


def _scalar(dtype: _DType, data: object) -> object:
    return _array(data, dtype, (), "C").item()


def _empty_array(*_: object) -> _Pickled:
    return _Pickled()


def _array_from_buffer(data: object, dtype: _DType, shape: tuple[int, ...], order: str) -> _Pickled:
    return _Pickled(_array(data, dtype, shape, order))


# ---------------------------------------------------------------------------------------------- PyTorch

_STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}


class _StorageUnpickler(_Unpickler):
    """Unpickler of the description of one storage: its element type, whatever device it was on."""

    dtype: torch.dtype | None = None

    def find_class(self, module: str, name: str, /) -> _Admitted:
        if module not in {"torch", "torch.cuda"} or name not in _STORAGES:
            raise UnsafePickleError(f"it asks for {f'{module}.{name}'[:120]}")
        return _Admitted(_STORAGES[name])

    def persistent_load(self, pid: Any, /) -> None:
        kind, storage, *_ = pid
        if kind != "storage" or not isinstance(storage, _Admitted):
            raise UnsafePickleError(f"it asks for the stored object {quote(kind)}")
        self.dtype = storage.meaning


def _storage(data: bytes) -> _Pickled:
    """Flat tensor of a storage, which a tensor's pickle holds as `torch.save` wrote files before version 1.6.

    That is: magic number, protocol, system, description, list of keys (a pickle each), the number of elements
    in 8 bytes, and the elements.
    """
    stream = io.BytesIO(data)
    magic, protocol, system = (_StorageUnpickler(stream).load() for _ in range(3))
    if (magic, protocol) != (0x1950A86A20F9469CFC6C, 1001) or not system["little_endian"]:
        raise ValueError("a tensor in an unknown layout")
    description = _StorageUnpickler(stream)
    description.load()
    _StorageUnpickler(stream).load()
    if description.dtype is None:
        raise ValueError("a tensor without a storage")
    (count,) = struct.unpack("<q", stream.read(8))
    elements = bytearray(stream.read())
    if count != len(elements) // description.dtype.itemsize or len(elements) % description.dtype.itemsize:
        raise ValueError("a tensor whose bytes do not match its size")
    if count == 0:
        return _Pickled(torch.empty(0, dtype=description.dtype, device="cpu"))
    return _Pickled(torch.frombuffer(elements, dtype=description.dtype))


def _tensor(
    storage: object, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *more: object
) -> _Pickled:
    flat = _to_tensor(storage)
    if more[2:3] not in ((), (None,)):  # behind `requires_grad` and hooks
        raise ValueError("a tensor that is stored negated or conjugated")
    _check_shape(size)
    _check_shape(stride)
    if math.prod(size) > flat.numel():  # an expanded tensor of a few bytes may claim any size
        raise ValueError(f"its bytes do not fill a tensor of shape {tuple(size)}")
    return _Pickled(torch.as_strided(flat, size, stride, offset))  # checks the bounds


# ---------------------------------------------------------------------------------------------- the table


def _text_to_bytes(text: str = "", encoding: str = "latin1") -> bytes:
    if encoding != "latin1":
        raise UnsafePickleError(f"it asks for the encoding {quote(encoding)}")
    return text.encode("latin1")


_CORES = ("numpy.core", "numpy._core")  # NumPy 1 and 2
_BUILTINS = ("__builtin__", "builtins")  # protocols 0 to 2, and later ones

_MEANINGS: Mapping[tuple[str, str], Callable[..., object] | str] = {
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): "ndarray",  # only ever an argument
    **{(f"{core}.multiarray", "_reconstruct"): _empty_array for core in _CORES},
    **{(f"{core}.multiarray", "scalar"): _scalar for core in _CORES},
    **{(f"{core}.numeric", "_frombuffer"): _array_from_buffer for core in _CORES},
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("collections", "OrderedDict"): dict,
    **{(builtins, "bytes"): lambda: b"" for builtins in _BUILTINS},  # no bytes, in protocols 0 to 2
    ("_codecs", "encode"): _text_to_bytes,  # bytes, in protocols 0 to 2
}
_ADMITTED = {name: _Admitted(meaning) for name, meaning in _MEANINGS.items()}
