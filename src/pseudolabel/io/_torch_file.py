"""Files of `torch.save`: what they would make is looked at before `torch.load` makes it."""

import io
import os
import tarfile
import zipfile
from typing import Any, BinaryIO

import torch

from pseudolabel.io._files import check_archive, open_file
from pseudolabel.io._pickle_program import check_pickle

__all__ = ["read_torch_file"]

_PICKLES = 1 << 26  # bytes that they may take in files without an archive
_REFUSED = ("_codecs encode",)  # which PyTorch admits, and some encodings take time with the square of a text


def read_torch_file(path: str | os.PathLike[str]) -> Any:
    """Read what `torch.save` put into a file, to the CPU, by `torch.load(weights_only=True)`.

    PyTorch runs no code of such a file, but trusts it with time and memory: here it is refused if its pickles
    fail `check_pickle`, or if its archive would unpack to more than its own size.

    Raises:
        ValueError: If it is refused, or no such file, or corrupt; it names the path.
        OSError: If there is no such file, or it may not be read.
    """
    with open_file(path) as file:
        try:
            start = file.read(4)
            file.seek(0)
            if start == b"PK\3\4":  # as PyTorch decides it
                with zipfile.ZipFile(file) as archive:
                    # `torch.save` does not compress: all together is smaller than the file.
                    check_archive(archive, os.fstat(file.fileno()).st_size, "the file")
                    for member in archive.infolist():  # several may have one name
                        if member.filename.lower().endswith(".pkl"):
                            check_pickle(io.BytesIO(archive.read(member)), refused=_REFUSED)
            elif _is_tar(file):
                raise ValueError("an archive as PyTorch wrote before 0.2")
            else:  # as before PyTorch 1.6: five pickles, then the bytes of the tensors
                file.seek(0)
                pickles = io.BytesIO(file.read(_PICKLES))
                for _ in range(5):
                    check_pickle(pickles, refused=_REFUSED)
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:
            # PyTorch says how to load it all the same before it says what is wrong.
            said = str(error).rpartition("WeightsUnpickler error: ")[2].partition(". ")[0]
            cause = (said or type(error).__name__).splitlines()[0]
            raise ValueError(f"{os.fspath(path)}: cannot read it without running code: {cause}") from error


def _is_tar(file: BinaryIO) -> bool:
    """Whether PyTorch would take it for one; compressed ones it does not know."""
    try:
        tarfile.open(fileobj=file, mode="r:").close()
    except tarfile.TarError:
        return False
    return True
