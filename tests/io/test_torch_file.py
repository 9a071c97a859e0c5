"""Files of `torch.save`: what PyTorch reads is read, and nothing takes more than its file pays for."""

import io
import os
import pickle
import struct
import tarfile
import zipfile
from collections import OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pseudolabel.io._torch_file import read_torch_file

X = torch.arange(12.0).reshape(3, 4)
FLOATING = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]


def checkpoint():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.rand(2, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    settings = {"crop": 320, "scales": [0.5, 2.0], "amp": "no", "flip": True, "none": None}
    return {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "settings": settings}


CONTENT = {
    "a state dict, with its metadata": nn.BatchNorm2d(4).state_dict(),
    "a checkpoint of an optimiser": checkpoint(),
    "views of one storage": {"a": X, "b": X.T, "c": X[1:, ::2], "d": X[:0]},
    "numbers of every kind": {
        str(dtype): X.to(dtype)
        for dtype in [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, *FLOATING]
    },
    "a parameter": {"a": nn.Parameter(X)},
    "no axis, no number": [torch.tensor(3), torch.empty(0, 3)],
    "plain values": [
        1,
        -(2**40),
        1.5,
        "a",
        None,
        True,
        (1, (2,)),
        {"x": {3: []}},
        OrderedDict(a=1),
    ],
}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return (a.dtype, a.stride()) == (b.dtype, b.stride()) and torch.equal(a.detach(), b.detach())
    if isinstance(a, dict):
        metadata = getattr(a, "_metadata", None) == getattr(b, "_metadata", None)
        return metadata and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture
def file(tmp_path):
    def write(content, **settings):
        path = tmp_path / "a.pt"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path, **settings)
        return path

    return write


@pytest.mark.parametrize("content", CONTENT.values(), ids=CONTENT)
@pytest.mark.parametrize("zipped", [True, False])
def test_as_pytorch_reads_it(file, content, zipped):
    path = file(content, _use_new_zipfile_serialization=zipped)
    found = read_torch_file(path)
    assert same(content, found)
    assert type(found) is type(content)
    assert same(torch.load(path, weights_only=False), found)


def test_shared_memory_stays_shared(file):
    found = read_torch_file(file({"a": X, "b": X.T}))
    found["a"][0, 1] = 99
    assert found["b"][1, 0] == 99
    assert not found["a"].requires_grad


def test_it_goes_on_as_pytorch_would(file):
    found = read_torch_file(file(CONTENT["a checkpoint of an optimiser"]))
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    network.load_state_dict(found["model"])
    optimizer = torch.optim.AdamW(network.parameters())
    optimizer.load_state_dict(found["optimizer"])
    assert same(CONTENT["a checkpoint of an optimiser"]["optimizer"], optimizer.state_dict())


class Call:
    def __init__(self, function, *args):
        self.reduced = function, args

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_is_run(file, tmp_path, zipped):
    path = file({"a": Call(os.mkdir, str(tmp_path / "made"))}, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"a\.pt: cannot read it without running code"):
        read_torch_file(path)
    with pytest.raises(ValueError, match=r"a\.pt: cannot read it without running code"):
        read_torch_file(file(nn.Linear(2, 3), _use_new_zipfile_serialization=zipped))
    assert not (tmp_path / "made").exists()


def rezipped(data, change, method=zipfile.ZIP_STORED):
    """The archive with its members, by their names without folder, changed."""
    new = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(new, "w", method) as out:
        members = {name.partition("/")[2]: old.read(name) for name in old.namelist()}
        for name, content in (members | change).items():
            if content is not None:
                out.writestr(f"archive/{name}", content)
    return new.getvalue()


def test_compressed_archive(file):
    """`torch.save` does not compress; what somebody has compressed must not unpack to more than the file."""
    noise = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    deflated = rezipped(file({"a": torch.zeros(1000)}).read_bytes(), {}, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"its arrays take \d+ bytes, more than the"):
        read_torch_file(file(deflated))
    with pytest.raises(ValueError, match="more than the"):
        read_torch_file(file(rezipped(file(noise).read_bytes(), {"x": bytes(9000)}, zipfile.ZIP_DEFLATED)))


def test_members_that_share_their_bytes(file):
    """Each member of a directory may point to the same bytes of the file."""
    data = file(torch.zeros(5000)).read_bytes()
    directory = data.rindex(b"PK\x05\x06")
    (count, _, length, start) = struct.unpack("<HHII", data[directory + 8 : directory + 20])[:4]
    entries = data[start : start + length] * 50
    many = data[:start] + entries + data[directory : directory + 8]
    many += struct.pack("<HHII", 50 * count, 50 * count, len(entries), start) + data[directory + 20 :]
    with pytest.raises(ValueError, match="more than the"):
        read_torch_file(file(many))


# What takes more than the file pays for

PAIRS = b"}K\x01\x94" + b"".join(b"h" + bytes([i]) + b"\x86\x94" for i in range(60)) + b"K\x01s."
PLACES = b"}r\x00\xc2\xeb\x0b."
COPIES = b"B" + (10**6).to_bytes(4, "little") + bytes(10**6) + b"\x94](" + b"h\x00\x85" * 10_000 + b"e."
FILLED = b"](" + b"K\x01" * 1000 + b"e\x94" + b"0ccollections\nOrderedDict\nh\x00\x85R" * 1000 + b"."


@pytest.mark.parametrize("program", [PAIRS, PLACES, COPIES, FILLED, b"K\x01" + b"2\x86" * 60 + b"."])
@pytest.mark.parametrize("place", ["archive", "first", "fourth"])
def test_programs_that_want_more_than_the_file_has(file, program, place):
    program = b"\x80\x02" + program
    if place == "archive":
        content = rezipped(file(X).read_bytes(), {"data.pkl": program})
    else:
        head = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
        content = b"".join([*(head if place == "fourth" else []), program, pickle.dumps([], 2)])
    with pytest.raises(ValueError, match=r"a\.pt: cannot read it"):
        read_torch_file(file(content))


@pytest.mark.parametrize("content", [b"", b"x", b"PK", b"storages".ljust(512, b"\0") * 4])
def test_something_else(file, content):
    with pytest.raises(ValueError, match=r"a\.pt: cannot read it"):
        read_torch_file(file(content))


def test_what_pytorch_takes_for_something_else_than_zipfile_does(file):
    """A program in front of an archive, and one that is the name of a file in a tar."""
    harmless = rezipped(file(X).read_bytes(), {})
    with pytest.raises(ValueError, match=r"a\.pt: cannot read it"):
        read_torch_file(file(b"\x80\x02" + PAIRS + harmless))
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("N." * 5))
    with pytest.raises(ValueError, match="an archive as PyTorch wrote before"):
        read_torch_file(file(tar.getvalue()))


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_torch_file(tmp_path / "a.pt")


@given(st.booleans(), st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4))
def test_damaged_bytes(tmp_path_factory, zipped, changes):
    path = tmp_path_factory.mktemp("damaged") / "a.pt"
    torch.save({"a": X, "b": X.bool()}, path, _use_new_zipfile_serialization=zipped)
    data = bytearray(path.read_bytes())
    for place, value in changes:
        data[int(place * len(data))] = value
    path.write_bytes(data)
    try:
        read_torch_file(path)
    except ValueError as error:
        assert "a.pt" in str(error)  # noqa: PT017
