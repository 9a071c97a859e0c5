"""Pickled CAMs: the dialects are read, and nothing in a pickle runs."""

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pseudolabel.io import UnsafePickleError, read_cam, read_cls_labels, read_legacy_cam, write_cam

MAPS = np.linspace(-1, 2, 2 * 6 * 7, dtype=np.float32).reshape(2, 6, 7)
KEYS = np.array([3, 14])
CORE = "numpy._core" if np.lib.NumpyVersion(np.__version__) >= "2.0.0" else "numpy.core"

IRN = {"keys": torch.from_numpy(KEYS), "cam": torch.from_numpy(MAPS[:, ::3, ::3].copy()), "high_res": MAPS}
SEAM = {3: MAPS[0], 14: MAPS[1]}
CLIP_ES = {"keys": KEYS, "attn_highres": MAPS.astype(np.float16)}


def renamed(data, numpy_core):
    """The pickle as a NumPy of another generation would have written it."""
    data = data.replace(f"c{CORE}.".encode(), f"c{numpy_core}.".encode())  # protocols 0 to 3
    for module in ("multiarray", "numeric"):  # protocols 4 and 5 count the bytes of a name
        old, new = f"{CORE}.{module}".encode(), f"{numpy_core}.{module}".encode()
        data = data.replace(b"\x8c" + bytes([len(old)]) + old, b"\x8c" + bytes([len(new)]) + new)
    return data


def without_frames(data):
    """The pickle without the optional marks of its frames, whose lengths `renamed` makes wrong."""
    return data[:2] + data[11:] if data[2:3] == b"\x95" else data


def header(shape="()", descr="|O", version=b"\1\0"):
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text


@pytest.fixture
def file(tmp_path):
    def write(data):
        path = tmp_path / "a.npy"
        path.write_bytes(data)
        return path

    return write


def check(stored, dtype=torch.float32):
    assert stored.keys.tolist() == [3, 14]
    assert stored.cams.dtype == dtype
    assert torch.equal(stored.cams, torch.from_numpy(MAPS).to(dtype))
    assert stored.size == (6, 7)


@pytest.mark.parametrize(
    ("content", "dtype"),
    [
        (IRN, torch.float32),
        ({**IRN, "high_res": torch.from_numpy(MAPS)}, torch.float32),
        ({**IRN, "high_res": torch.from_numpy(MAPS).double()}, torch.float32),
        ({**IRN, "high_res": np.asfortranarray(MAPS)}, torch.float32),
        ({**IRN, "high_res": MAPS.astype(">f4")}, torch.float32),
        ({"keys": [3, 14], "cam": torch.from_numpy(MAPS).half()}, torch.float16),
        (SEAM, torch.float32),
        (OrderedDict(SEAM), torch.float32),
        ({np.int64(3): MAPS[0], np.int32(14): MAPS[1]}, torch.float32),
        ({3: MAPS[0].astype(np.float16), 14: MAPS[1].astype(np.float16)}, torch.float16),
        ({3: torch.from_numpy(MAPS)[0], 14: torch.from_numpy(MAPS)[1]}, torch.float32),
        (CLIP_ES, torch.float16),
        (
            {**IRN, "note": [b"", b"x", {b"a": {2**40: True}}, ("c", None, 1.5, np.zeros((0, 3)))]},
            torch.float32,
        ),
    ],
)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("numpy_core", ["numpy.core", "numpy._core"])
def test_dialects(file, content, dtype, protocol, numpy_core):
    boxed = np.empty((), dtype=object)
    boxed[()] = content
    for prefix, value in ((b"", content), (header(), boxed), (b"", boxed)):
        data = without_frames(pickle.dumps(value, protocol=protocol))
        check(read_legacy_cam(file(prefix + renamed(data, numpy_core)), allow_pickle=True), dtype)


@pytest.mark.parametrize("content", [IRN, SEAM, CLIP_ES])
def test_files_of_numpy_save(tmp_path, content):
    np.save(tmp_path / "a.npy", content, allow_pickle=True)
    check(
        read_legacy_cam(tmp_path / "a.npy", allow_pickle=True),
        torch.float16 if "attn_highres" in content else torch.float32,
    )


def test_python_2_pickle(file):
    """Python 2 wrote the bytes of an array as text."""
    raw = MAPS[0].tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
        b"(I1\n(I6\nI7\ntcnumpy\ndtype\n(S'f4'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\n"
        b"T" + struct.pack("<i", len(raw)) + raw + b"tb"
    )
    stored = read_legacy_cam(file(b"(dI3\n" + array + b"s."), allow_pickle=True)
    assert stored.keys.tolist() == [3]
    assert torch.equal(stored.cams[0], torch.from_numpy(MAPS[0]))


def test_tensor_of_a_gpu_comes_to_the_cpu(file):
    data = pickle.dumps({3: torch.from_numpy(MAPS[0])}, protocol=2)
    assert b"ctorch\nFloatStorage" in data
    data = data.replace(b"ctorch\nFloatStorage", b"ctorch.cuda\nFloatStorage")
    data = data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
    # The bytes of the storage stand in the pickle as text with its length.
    start = data.index(b"_load_from_bytes")
    mark = data.index(b"X", start)
    (length,) = struct.unpack("<I", data[mark + 1 : mark + 5])
    data = data[: mark + 1] + struct.pack("<I", length + 5 + 3) + data[mark + 5 :]
    stored = read_legacy_cam(file(data), allow_pickle=True)
    assert stored.cams.device.type == "cpu"
    assert torch.equal(stored.cams[0], torch.from_numpy(MAPS[0]))


@pytest.mark.parametrize(
    "dtype",
    [torch.float16, torch.bfloat16, torch.float32, torch.float64],
)
def test_tensor_dtypes_views_and_gradients(file, dtype):
    whole = torch.linspace(-1, 1, 200).to(dtype).reshape(10, 20)
    view = whole.T[2:8, 1::3].requires_grad_()
    stored = read_legacy_cam(file(pickle.dumps({0: view, 5: view})), allow_pickle=True)
    assert torch.equal(stored.cams[1], view.detach().to(stored.cams.dtype))


def test_dict_that_counts_from_the_background(file):
    scores = {0: MAPS[0] * 0 + 9, 4: MAPS[0], 15: MAPS[1]}
    path = file(pickle.dumps(scores))
    check(read_legacy_cam(path, allow_pickle=True, background=True))
    assert read_legacy_cam(path, allow_pickle=True).keys.tolist() == [0, 4, 15]


def test_conversion(tmp_path, file):
    stored = read_legacy_cam(file(pickle.dumps(IRN)), allow_pickle=True)
    write_cam(tmp_path / "a.npz", stored.dense(21), stored.labels(21), size=stored.size)
    check(read_cam(tmp_path / "a.npz", 21))


def test_pickle_must_be_allowed(file):
    with pytest.raises(ValueError, match=r"a\.npy: .*run code.*allow_pickle=True.*write_cam"):
        read_legacy_cam(file(pickle.dumps(IRN)))


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_legacy_cam(tmp_path / "a.npy", allow_pickle=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "the dict is empty"),
        ([MAPS], "expected one pickled dict, got list"),
        (MAPS, "expected one pickled dict, got ndarray"),
        ({"cam": MAPS}, r"expected class indices or 'keys', got \['cam'\]"),
        ({"keys": KEYS}, r"expected maps as one of .*'high_res'"),
        ({"keys": KEYS * 1.0, "cam": MAPS}, "keys: expected whole numbers"),
        ({"keys": KEYS[None], "cam": MAPS}, "keys: expected whole numbers"),
        (
            {"keys": np.array([True, False]), "cam": MAPS},
            r"keys: expected whole numbers \(K,\), .*torch\.bool",
        ),
        ({"keys": [False, True], "cam": MAPS}, "keys: expected whole numbers"),
        ({"keys": torch.tensor([3j, 14]), "cam": MAPS}, "it asks for torch.ComplexFloatStorage"),
        ({"keys": [2**70, 1], "cam": MAPS}, "expected numbers of 64 bits"),
        ({"x" * 10**6: MAPS}, "expected class indices or 'keys', got \\['xxx.{,200}$"),
        ({3: torch._neg_view(torch.from_numpy(MAPS[0]))}, "stored negated or conjugated"),
        ({"keys": KEYS[:1], "cam": MAPS}, r"cams: expected shape \(K, h, w\) with K=1"),
        ({"keys": KEYS, "cam": MAPS[0]}, r"expected maps \(K,H,W\), got shape \(6, 7\)"),
        ({"keys": KEYS, "cam": MAPS.astype(int)}, "expected maps of a floating dtype"),
        ({"keys": KEYS, "cam": "maps"}, "expected an array or numbers, got str"),
        ({"keys": np.array([1, 1]), "cam": MAPS}, "keys: expected 0-based classes, each once"),
        ({"keys": KEYS, "cam": MAPS * np.nan}, "cams: expected finite values"),
        ({3: MAPS[0], 4: MAPS[0, :5]}, "stack expects each tensor to be equal size"),
        ({3: MAPS[0], "x": MAPS[0]}, "expected class indices or 'keys'"),
        ({True: MAPS[0]}, "expected class indices or 'keys'"),
        ({-3: MAPS[0]}, "keys: expected 0-based classes"),
        ({2**70: MAPS[0]}, "Overflow|out of|too large|int|more than 64 bits"),
    ],
)
def test_wrong_content(file, content, message):
    path = file(pickle.dumps(content))
    with pytest.raises(ValueError, match=rf"a\.npy: .*({message})"):
        read_legacy_cam(path, allow_pickle=True)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY",
        header(version=b"\7\0"),
        header() + b"",
        header("(3,)") + pickle.dumps({}),
        header(descr="<f4") + bytes(4),
        b"not a pickle",
        pickle.dumps(IRN)[:-20],
        pickle.dumps(IRN)[:40],
    ],
)
def test_corrupt_files(file, data):
    with pytest.raises(ValueError, match=r"a\.npy: "):
        read_legacy_cam(file(data), allow_pickle=True)


def test_npz_is_pointed_to_its_reader(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x", "")
    with pytest.raises(ValueError, match=r"a\.npz: .*read_cam"):
        read_legacy_cam(tmp_path / "a.npz", allow_pickle=True)


# --------------------------------------------------------------------------- attacks


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function, *args, state=None):
        self.function, self.args, self.state = function, args, state

    def __reduce__(self):
        return (self.function, self.args) if self.state is None else (self.function, self.args, self.state)


def named(module, name):
    """A pickle that asks for a name and stops there: as text, and on the stack."""
    return [
        f"c{module}\n{name}\n.".encode(),
        b"\x80\x04\x8c"
        + bytes([len(module)])
        + module.encode()
        + b"\x8c"
        + bytes([len(name)])
        + name.encode()
        + b"\x93.",
    ]


NAMES = [
    ("os", "system"),
    ("posix", "system"),
    ("nt", "system"),
    ("subprocess", "Popen"),
    ("builtins", "eval"),
    ("builtins", "exec"),
    ("builtins", "getattr"),
    ("builtins", "open"),
    ("builtins", "__import__"),
    ("builtins", "object"),
    ("__builtin__", "eval"),
    ("operator", "attrgetter"),
    ("functools", "partial"),
    ("importlib", "import_module"),
    ("copyreg", "_reconstructor"),
    ("types", "FunctionType"),
    ("numpy", "load"),
    ("numpy", "os.system"),
    ("numpy", "ndarray.tofile"),
    ("numpy", "memmap"),
    ("numpy.testing._private.utils", "runstring"),
    ("numpy.f2py.crackfortran", "getlincoef"),
    ("numpy.core.multiarray", "fromfile"),
    ("torch", "load"),
    ("torch", "os.system"),
    ("torch", "FloatStorage"),
    ("torch.hub", "load"),
    ("torch.serialization", "load"),
    ("torch.storage", "UntypedStorage"),
    ("torch.storage", "_load_from_bytes.__globals__"),
    ("torch._utils", "_rebuild_tensor_v2.__globals__"),
    ("torch._tensor", "_rebuild_from_type_v2"),
    ("torch._dynamo.guards", "GuardBuilder.get"),
    ("pseudolabel.io._unpickle", "_Admitted"),
    ("collections", "defaultdict"),
    ("_codecs", "decode"),
]


@pytest.mark.parametrize(("module", "name"), NAMES)
@pytest.mark.parametrize("prefix", [b"", header()])
@pytest.mark.parametrize("read", [read_legacy_cam, read_cls_labels])
def test_names_outside_the_table_are_refused(file, module, name, prefix, read):
    for data in named(module, name):
        with pytest.raises(UnsafePickleError, match=r"a\.npy: refused, nothing was run: it asks for "):
            read(file(prefix + data), allow_pickle=True)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("boxed", [False, True])
def test_calls_do_not_run(file, tmp_path, protocol, boxed):
    canary = tmp_path / "canary"
    attacks = [
        Call(os.system, f"touch {canary}"),
        Call(eval, f"open({str(canary)!r}, 'w')"),
        Call(exec, f"open({str(canary)!r}, 'w')"),
        Call(open, str(canary), "w"),
        Call(os.mkdir, str(canary)),
        Call(np.array([0]).tofile, str(canary)),
        Call(torch.save, 0, str(canary)),
    ]
    for attack in attacks:
        for content in (attack, {"keys": KEYS, "cam": attack}, {3: [attack]}, {attack: MAPS[0]}):
            value = content
            if boxed:
                value = np.empty((), dtype=object)
                value[()] = content
            data = pickle.dumps(value, protocol=protocol)
            with pytest.raises(UnsafePickleError):
                read_legacy_cam(file((header() if boxed else b"") + data), allow_pickle=True)
            assert not canary.exists()


def test_the_attack_would_work_without_us(tmp_path):
    """The test above means something: plain pickle does run it."""
    pickle.loads(pickle.dumps(Call(os.mkdir, str(tmp_path / "canary"))))
    assert (tmp_path / "canary").exists()


def inner(storage):
    """A pickle of a tensor whose storage is described by the attacker's bytes."""
    from torch.storage import _load_from_bytes

    return pickle.dumps({3: Call(_load_from_bytes, storage)})


def described(description, elements=b"\1" + bytes(11)):
    head = b"".join(pickle.dumps(value) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    return head + description + pickle.dumps(["0"]) + elements


def test_attack_inside_a_storage(file, tmp_path):
    canary = tmp_path / "canary"
    attack = pickle.dumps(Call(os.mkdir, str(canary)))
    legitimate = pickle.dumps(0x1950A86A20F9469CFC6C)
    for storage in (attack, legitimate + attack, described(attack)):
        with pytest.raises(UnsafePickleError, match=r"it asks for \w+\.mkdir"):
            read_legacy_cam(file(inner(storage)), allow_pickle=True)
    modern = io.BytesIO()
    torch.save({"x": Call(os.mkdir, str(canary))}, modern)
    with pytest.raises(ValueError, match=r"a\.npy"):
        read_legacy_cam(file(inner(modern.getvalue())), allow_pickle=True)
    assert not canary.exists()


@pytest.mark.parametrize(
    "description",
    [
        b"\x80\x02(X\x06\x00\x00\x00modulectorch\nFloatStorage\ntQ.",  # a module is code
        b"\x80\x02(X\x07\x00\x00\x00storageX\x01\x00\x00\x00xtQ.",  # text as the type of a storage
        b"\x80\x02(X\x07\x00\x00\x00storageccollections\nOrderedDict\ntQ.",
        b"\x80\x02(X\x07\x00\x00\x00storagectorch\nload\ntQ.",
    ],
)
def test_persistent_ids_inside_a_storage(file, description):
    with pytest.raises(UnsafePickleError):
        read_legacy_cam(file(inner(described(description))), allow_pickle=True)


FLOATS = (
    b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01NtQ."
)


@pytest.mark.parametrize("count", [-1, 0, 2, 2**62])
def test_storage_of_another_length_than_it_says(file, count):
    data = inner(described(FLOATS, struct.pack("<q", count) + bytes(4)))
    with pytest.raises(ValueError, match="bytes do not match its size"):
        read_legacy_cam(file(data), allow_pickle=True)


def test_big_endian_storage(file):
    head = b"".join(pickle.dumps(value) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": False}))
    with pytest.raises(ValueError, match="unknown layout"):
        read_legacy_cam(file(inner(head)), allow_pickle=True)


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, (2, 2), (1000, 1)),  # reads beyond the end
        (50, (2, 2), (2, 1)),
        (-1, (2, 2), (2, 1)),
        (0, (2, 2), (-2, 1)),
        (0, (2, 3), (0, 0)),  # some bytes that claim to be more
        (0, (10**6, 10**6), (0, 0)),
        (0, (-2, -2), (1, 1)),
        (0, (2, 2), (1,)),
        (0, ("a",), (1,)),
    ],
)
def test_tensor_outside_its_storage(file, offset, size, stride):
    from torch._utils import _rebuild_tensor_v2

    storage = torch.arange(4.0)._typed_storage()
    data = pickle.dumps({3: Call(_rebuild_tensor_v2, storage, offset, size, stride, False, OrderedDict())})
    with pytest.raises(ValueError, match=r"a\.npy: cannot read this pickle"):
        read_legacy_cam(file(data), allow_pickle=True)


def array_pickle(shape=(2, 3), code="f4", order="<", data=bytes(24), extra=(None, None, None, -1, -1, 0)):
    """The pickle of an array whose parts are the attacker's."""
    from numpy import dtype, ndarray

    reconstruct = np.zeros(1).__reduce__()[0]

    class Forged:
        def __reduce__(self):
            kind = Call(dtype, code, False, True, state=(3, order, *extra))
            return reconstruct, (ndarray, (0,), b"b"), (1, shape, kind, False, data)

    return pickle.dumps({3: Forged()})


def test_forged_array_is_fine_as_such(file):
    assert read_legacy_cam(file(array_pickle()), allow_pickle=True).cams.shape == (1, 2, 3)


@pytest.mark.parametrize(
    "parts",
    [
        {"shape": (10**6, 10**6)},
        {"shape": (2, 4)},
        {"shape": (-1, 6)},
        {"shape": (-2, -3)},
        {"shape": ("2", 3)},
        {"code": "f8"},
        {"code": "V4"},
        {"code": "M8"},
        {"code": "O8"},
        {"code": "f4,f4"},
        {"code": "O8", "shape": (10**9,), "data": [None]},  # NumPy itself reads beyond such a list
        {"order": "x"},
        {"order": 5},
        {"extra": (("f4", (10**9,)), None, None, -1, -1, 0)},
        {"extra": (None, ("a",), {"a": ("f4", 10**9)}, -1, -1, 0)},
        {"data": [1.0] * 6},
        {"data": None},
    ],
)
def test_forged_arrays(file, parts):
    with pytest.raises(ValueError, match=r"a\.npy"):
        read_legacy_cam(file(array_pickle(**parts)), allow_pickle=True)


@pytest.mark.parametrize(
    "data",
    [
        b"cnumpy\nndarray\n(J\xff\xff\xff\x7ftR.",  # only ever an argument, not to be called
        b"cnumpy\ndtype\n}S'meaning'\ncnumpy\nndarray\nsb.",  # BUILD on what a name stands for
        b"cnumpy\ndtype\nN}S'meaning'\ncbuiltins\nset\ns\x86b.",
        b"ctorch._utils\n_rebuild_tensor_v2\n}b.",
        b"ccollections\nOrderedDict\n}S'x'\nI1\nsb.",
        b"\x80\x02cnumpy\nndarray\n)\x81.",  # NEWOBJ
        b"\x80\x02ccollections\nOrderedDict\n)\x81.",
        b"cbuiltins\nbytes\n(J\xff\xff\xff\x7ftR.",
        b"S'x'\nQ.",  # persistent ids
        b"Px\n.",
        b"\x82\x01.",  # the registry of extensions
        b"(S'x'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'x'\no.",  # OBJ
        b"\x97.",  # an out-of-band buffer
    ],
)
def test_other_tricks(file, data):
    import pseudolabel.io._unpickle as room

    before = {name: admitted.meaning for name, admitted in room._ADMITTED.items()}
    with pytest.raises(ValueError, match=r"a\.npy"):
        read_legacy_cam(file(data), allow_pickle=True)
    assert {name: admitted.meaning for name, admitted in room._ADMITTED.items()} == before


def test_only_the_encoding_of_bytes(file):
    with pytest.raises(UnsafePickleError, match="it asks for the encoding 'rot13'"):
        read_legacy_cam(file(b"c_codecs\nencode\n(Va\nS'rot13'\ntR."), allow_pickle=True)


def test_an_array_is_filled_once(file):
    once = pickle.dumps({3: MAPS[0]}, protocol=0)
    build = once.rindex(b"b")
    twice = once[:build] + b"b(I1\n(I1\ntNI00\nNtb" + once[build + 1 :]
    with pytest.raises(UnsafePickleError, match="it tries to change an array"):
        read_legacy_cam(file(twice), allow_pickle=True)


@pytest.mark.parametrize("data", [b"\x80\x04\x8f.", b"\x80\x04(\x91.", b"c__builtin__\nset\n(]tR."])
def test_sets_are_refused(file, data):
    """No dialect has them, and a member is hashed as a key is."""
    with pytest.raises(UnsafePickleError, match=r"it asks for (a set|__builtin__\.set)"):
        read_legacy_cam(file(data), allow_pickle=True)


def test_ordered_dict_of_python_2(file):
    """Python 2 hands the pairs to its class."""
    array = pickle.dumps(MAPS[0], protocol=2)[2:-1]
    data = b"\x80\x02ccollections\nOrderedDict\n]]K\x03" + array + b"eaa\x85R."
    data = data.replace(b"]]K\x03", b"](](K\x03").replace(b"eaa", b"ee")
    assert read_legacy_cam(file(data), allow_pickle=True).keys.tolist() == [3]


def test_deep_nesting(file):
    with pytest.raises(ValueError, match=r"a\.npy"):
        read_legacy_cam(file(b"]" * 100_000 + b"a" * 99_999 + b"."), allow_pickle=True)


@given(
    st.sampled_from([IRN, SEAM, CLIP_ES]),
    st.integers(2, pickle.HIGHEST_PROTOCOL),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_damaged_bytes_give_maps_or_value_error(tmp_path_factory, content, protocol, changes):
    data = bytearray(pickle.dumps(content, protocol=protocol))
    for place, value in changes:
        data[int(place * len(data))] = value
    path = tmp_path_factory.mktemp("damaged") / "a.npy"
    path.write_bytes(data)
    try:
        stored = read_legacy_cam(path, allow_pickle=True)
    except ValueError as error:
        assert "a.npy" in str(error)  # noqa: PT017
    else:
        assert stored.cams.isfinite().all()


def test_arrays_in_text_as_python_2_wrote_them_by_default(file):
    """Protocol 0, in which bytes are the letters of a quoted text."""
    data = repr(np.float32([1, -2]).tobytes())[1:].encode()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
        b"(I1\n(I1\nI1\nI2\ntcnumpy\ndtype\n(S'f4'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\nS"
        + data
        + b"\ntb"
    )
    maps = read_legacy_cam(
        file(b"(dI3\n" + array.replace(b"(I1\nI1\nI2\nt", b"(I1\nI2\nt") + b"s."), allow_pickle=True
    )
    assert maps.keys.tolist() == [3]
    assert maps.cams.tolist() == [[[1, -2]]]
