"""Pickles are looked at before they run: what Python writes passes, what a few bytes blow up does not."""

import io
import pickle
import struct

import numpy as np
import pytest
import torch

from pseudolabel.io._pickle_program import UnsafePickleError, check_pickle

TWO_TO_61 = 2**61 - 1  # the hash of whole numbers is their rest by it


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "content",
    [
        {f"2007_{number:06d}": np.eye(20, dtype=np.float32)[number % 20] for number in range(300)},
        {2007000032: np.array([1, 0]), -5: [1, 2], 2**64 - 1: (), 2.5: None, b"a": True, np.int64(3): 1},
        {"keys": np.array([0, 14]), "cam": torch.rand(2, 3, 4), "high_res": np.ones((2, 6, 8), np.float16)},
        {"deep": (((((1,),),),),), "many": tuple(range(2000)), "same": [(1, 2)] * 2000},
        [],
    ],
)
def test_what_python_writes(content, protocol):
    data = pickle.dumps(content, protocol)
    file = io.BytesIO(data + b"what comes behind")
    check_pickle(file)
    assert file.tell() == len(data)


def long(number):
    data = number.to_bytes(16, "little")
    return b"\x8a\x10" + data


def number_of_bytes(count):
    return b"B" + struct.pack("<I", count) + bytes(count)


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (b"}(K\x01K\x02\x86K\x03u.", "a key of a dict is a tuple"),
        (b"}K\x01\x85K\x03s.", "a key of a dict is a tuple"),
        (b"(K\x01\x85K\x03d.", "a key of a dict is a tuple"),
        (b"}" + long(2**65 * TWO_TO_61 // 4) + b"K\x03s.", "more than 64 bits"),
        (b"\x8b" + struct.pack("<i", 20) + b"\x01" * 20 + b".", "a number of 153 bits"),
        (b"K\x01q\xff.", "place 255 of its memory"),
        (b"K\x01r\x00\xc2\xeb\x0b.", "place 200000000 of its memory"),
        (
            b"K\x01\x94" + b"".join(b"h" + bytes([i]) + b"\x86\x94" for i in range(60)) + b".",
            "again and again",
        ),
        (number_of_bytes(100_000) + b"\x94](" + b"h\x00\x85" * 100 + b"e.", "again and again"),
        (number_of_bytes(100_000) + b"\x85\x94(" + b"ca\nb\nh\x00R" * 100 + b"t.", "again and again"),
        (number_of_bytes(100_000) + b"\x85\x94(" + b"ca\nb\nh\x00b" * 100 + b"t.", "again and again"),
        (b"](" + b"K\x01" * 50_000 + b"e\x85\x94(" + b"ca\nb\nh\x00R" * 100 + b"t.", "again and again"),
        (b"(K\x01\x86.", "a mark is not where it should be"),
        (b"K\x01", "cut off"),
        (b"\xff.", "a step that no pickle has"),
    ],
)
def test_what_blows_up(program, said):
    with pytest.raises(ValueError, match=said):
        check_pickle(io.BytesIO(program))


@pytest.mark.parametrize(
    "program", [b"\x8f.", b"(\x91.", b"K\x012\x86.", b"ca\nb\n)\x81.", b"(ia\nb\n.", b"\x82\x01."]
)
def test_what_no_array_needs(program):
    with pytest.raises(UnsafePickleError, match="it asks for"):
        check_pickle(io.BytesIO(program))


def test_names_that_are_refused():
    check_pickle(io.BytesIO(b"c_codecs\nencode\n."))
    with pytest.raises(UnsafePickleError, match="it asks for _codecs encode"):
        check_pickle(io.BytesIO(b"c_codecs\nencode\n."), refused=("_codecs encode",))
