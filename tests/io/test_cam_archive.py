"""CAM archives."""

import io
import struct
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pseudolabel.io import StoredCAM, read_cam, write_cam

CAM = torch.linspace(-1, 2, 3 * 4 * 5).reshape(3, 4, 5)
LABELS = torch.tensor([1, 0, 1])


def arrays(**changes):
    content = {
        "keys": np.array([0, 2]),
        "cams": CAM[[0, 2]].numpy(),
        "size": np.array([8, 10]),
        "version": np.array(1),
    }
    content.update(changes)
    return {name: value for name, value in content.items() if value is not None}


@pytest.mark.parametrize("compressed", [False, True])
def test_archives_of_numpy_are_read(tmp_path, compressed):
    save = np.savez_compressed if compressed else np.savez
    save(tmp_path / "a.npz", **arrays())
    stored = read_cam(tmp_path / "a.npz")
    assert stored.keys.tolist() == [0, 2]
    assert torch.equal(stored.cams, CAM[[0, 2]])
    assert stored.size == (8, 10)


def test_archives_are_read_by_numpy(tmp_path):
    write_cam(tmp_path / "größe 図.npz", CAM, LABELS, size=(8, 10))
    with np.load(tmp_path / "größe 図.npz", allow_pickle=False) as archive:
        content = {name: archive[name] for name in archive.files}
    assert content["keys"].tolist() == [0, 2]
    assert content["keys"].dtype == np.int64
    assert np.array_equal(content["cams"], CAM[[0, 2]].numpy())
    assert content["size"].tolist() == [8, 10]
    assert content["version"] == 1


def test_maps_of_the_present_classes_alone_give_the_same_file(tmp_path):
    write_cam(tmp_path / "all.npz", CAM, LABELS, size=(8, 10))
    write_cam(tmp_path / "present.npz", CAM[[0, 2]], LABELS, size=(8, 10))
    assert (tmp_path / "present.npz").read_bytes() == (tmp_path / "all.npz").read_bytes()


@given(
    num_classes=st.integers(1, 6),
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    half=st.booleans(),
    seed=st.integers(0, 99),
)
def test_round_trip(tmp_path_factory, num_classes, size, half, seed):
    generator = torch.Generator().manual_seed(seed)
    cam = torch.randn(num_classes, *size, generator=generator).to(torch.float16 if half else torch.float32)
    labels = torch.randint(0, 2, (num_classes,), generator=generator)
    path = tmp_path_factory.mktemp("cams") / "a.npz"
    write_cam(path, cam, labels, size=(7, 9))
    stored = read_cam(path, num_classes + 1)
    assert torch.equal(stored.dense(num_classes + 1), cam * labels[:, None, None])
    assert torch.equal(stored.labels(num_classes + 1), labels.bool())
    assert stored.cams.dtype == cam.dtype
    assert len(stored.keys) == labels.sum()


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float32),
    ],
)
def test_dtypes(tmp_path, device, dtype, kept):
    cam = CAM.to(device, dtype, copy=True).requires_grad_()
    write_cam(tmp_path / "a.npz", cam, LABELS.to(device))
    stored = read_cam(tmp_path / "a.npz")
    assert stored.cams.dtype == kept
    assert torch.equal(stored.cams, cam.detach().cpu()[[0, 2]].to(kept))
    assert stored.size == (4, 5)
    write_cam(tmp_path / "a.npz", cam, LABELS.to(device), dtype=torch.float16)
    assert read_cam(tmp_path / "a.npz").cams.dtype == torch.float16


def test_no_class(tmp_path):
    write_cam(tmp_path / "a.npz", CAM, torch.zeros(3))
    stored = read_cam(tmp_path / "a.npz")
    assert stored.cams.shape == (0, 4, 5)
    assert not stored.dense(4).any()
    assert not stored.labels(4).any()


def test_same_maps_same_bytes(tmp_path):
    write_cam(tmp_path / "a.npz", CAM, LABELS)
    write_cam(tmp_path / "b.npz", CAM, LABELS)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


@pytest.mark.parametrize(
    ("cam", "labels", "settings", "message"),
    [
        (CAM[None], LABELS, {}, r"cam: expected shape \(K, h, w\), got \(1, 3, 4, 5\)"),
        (CAM, torch.ones(2), {}, "cam: expected the maps of all 2 classes, or of the 2 present ones, got 3"),
        (CAM[:1], LABELS, {}, "cam: expected the maps of all 3 classes, or of the 2 present ones, got 1"),
        (CAM.int(), LABELS, {}, "cam: expected a floating-point tensor"),
        (CAM, LABELS * 2, {}, "labels: expected a multi-hot tensor"),
        (CAM * torch.nan, LABELS, {}, "cams: expected finite values"),
        (CAM * 1e5, LABELS, {"dtype": torch.float16}, "cams: expected finite values"),
        (CAM, LABELS, {"dtype": torch.float64}, r"dtype: expected torch\.float16"),
        (CAM, LABELS, {"size": (0, 5)}, "size: expected a positive height and width"),
        (CAM, LABELS, {"size": (4.0, 5)}, "size: expected a positive height and width"),
    ],
)
def test_what_is_not_written(tmp_path, cam, labels, settings, message):
    (tmp_path / "a.npz").write_bytes(b"old")
    with pytest.raises((ValueError, TypeError), match=message):
        write_cam(tmp_path / "a.npz", cam, labels, **settings)
    assert (tmp_path / "a.npz").read_bytes() == b"old"


def test_name_must_say_npz(tmp_path):
    with pytest.raises(ValueError, match=r"path: expected a name that ends in \.npz"):
        write_cam(tmp_path / "a.npy", CAM, LABELS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": np.array(2)}, "version 2, this library reads version 1"),
        ({"version": np.array([1])}, "version: expected 0 axes"),
        ({"version": None}, "expected the arrays keys, cams, size, version"),
        ({"extra": np.zeros(1)}, "expected the arrays keys, cams, size, version"),
        ({"keys": np.array([0, 0])}, "keys: expected 0-based classes, each once"),
        ({"keys": np.array([-1, 0])}, "keys: expected 0-based classes"),
        ({"keys": np.array([0])}, r"cams: expected shape \(K, h, w\) with K=1 from keys"),
        ({"keys": np.array([0.0, 1.0])}, "keys: expected 1 axes of i8"),
        ({"cams": CAM.numpy()}, r"cams: expected shape"),
        ({"cams": CAM[[0, 2]].double().numpy()}, "cams: expected 3 axes of f2 f4"),
        ({"cams": CAM[0].numpy()}, "cams: expected 3 axes"),
        ({"cams": np.full((2, 4, 5), np.nan, np.float32)}, "cams: expected finite values"),
        ({"cams": np.full((2, 4, 5), np.inf, np.float16)}, "cams: expected finite values"),
        ({"size": np.array([8])}, "size: expected a positive height and width"),
        ({"size": np.array([8, -10])}, "size: expected a positive height and width"),
        ({"size": np.array([2**40, 2**20])}, "more pixels than max_pixels"),
        ({"cams": np.array([{"a": 1}, None], dtype=object)}, "cams: expected 3 axes"),
    ],
)
def test_wrong_content(tmp_path, changes, message):
    np.savez(tmp_path / "a.npz", **arrays(**changes))
    with pytest.raises(ValueError, match=rf"a\.npz: cannot read this CAM archive: .*{message}"):
        read_cam(tmp_path / "a.npz")


def test_byte_and_axis_order(tmp_path):
    cams = np.asfortranarray(CAM[[0, 2]].numpy().astype(">f4"))
    np.savez(tmp_path / "a.npz", **arrays(cams=cams, keys=np.array([0, 2], dtype=">i8")))
    stored = read_cam(tmp_path / "a.npz")
    assert torch.equal(stored.cams, CAM[[0, 2]])
    assert stored.keys.tolist() == [0, 2]


def test_keys_beyond_the_classes(tmp_path):
    write_cam(tmp_path / "a.npz", CAM, LABELS)
    assert read_cam(tmp_path / "a.npz", 4).dense(4).shape == (3, 4, 5)
    with pytest.raises(ValueError, match=r"a\.npz: .*classes below 2 \(num_classes=3 counts the background"):
        read_cam(tmp_path / "a.npz", 3)
    with pytest.raises(ValueError, match="classes below 2"):
        read_cam(tmp_path / "a.npz").dense(3)


def write_archive(path, members, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def header(shape, descr="<f4"):
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text


@pytest.fixture
def members():
    return {f"{name}.npy": npy(array) for name, array in arrays().items()}


def test_zip_bomb_is_refused_before_it_unpacks(tmp_path, members):
    members["cams.npy"] = header((2, 2_000, 5_000)) + bytes(2 * 2_000 * 5_000 * 4)
    write_archive(tmp_path / "a.npz", members)
    assert (tmp_path / "a.npz").stat().st_size < 200_000
    with pytest.raises(ValueError, match=r"a\.npz: .*more than max_bytes=1000000"):
        read_cam(tmp_path / "a.npz", max_bytes=1_000_000)
    assert read_cam(tmp_path / "a.npz").cams.shape == (2, 2_000, 5_000)


@pytest.mark.parametrize("shape", [(2, 10**6, 10**6), (2, 4, 4), (2, -4, 5), (10**30, 1, 1), (True, 4, 5)])
def test_header_that_lies_about_the_shape(tmp_path, members, shape):
    members["cams.npy"] = header(shape) + CAM[[0, 2]].numpy().tobytes()
    write_archive(tmp_path / "a.npz", members)
    with pytest.raises(ValueError, match=r"a\.npz: cannot read this CAM archive"):
        read_cam(tmp_path / "a.npz")


def test_pickle_inside_never_runs(tmp_path, members):
    canary = tmp_path / "canary"
    pickled = f"cbuiltins\nopen\n(S'{canary}'\nS'w'\ntR.".encode()
    members["cams.npy"] = header((2, 4, 5), "|O") + pickled
    write_archive(tmp_path / "a.npz", members)
    with pytest.raises(ValueError, match="cams: expected 3 axes of f2 f4"):
        read_cam(tmp_path / "a.npz")
    assert not canary.exists()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_member_twice(tmp_path, members):
    write_archive(tmp_path / "a.npz", members)
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("keys.npy", members["keys.npy"])
    with pytest.raises(ValueError, match="expected the arrays"):
        read_cam(tmp_path / "a.npz")


def test_truncated_and_damaged(tmp_path):
    write_cam(tmp_path / "a.npz", CAM, LABELS)
    data = (tmp_path / "a.npz").read_bytes()
    for length in range(0, len(data), 37):
        (tmp_path / "a.npz").write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"a\.npz: cannot read this CAM archive"):
            read_cam(tmp_path / "a.npz")
    where = data.index(CAM[0].numpy().tobytes()) + 9
    (tmp_path / "a.npz").write_bytes(data[:where] + bytes([data[where] ^ 1]) + data[where + 1 :])
    with pytest.raises(ValueError, match=r"a\.npz: .*CRC"):
        read_cam(tmp_path / "a.npz")
    with pytest.raises(FileNotFoundError):
        read_cam(tmp_path / "missing.npz")


def test_stored_cam_checks_itself():
    with pytest.raises(TypeError, match="keys: expected int64"):
        StoredCAM(torch.ones(1), torch.ones(1, 2, 2), (2, 2))
    with pytest.raises(TypeError, match="cams: expected float16 or float32"):
        StoredCAM(torch.tensor([0]), torch.ones(1, 2, 2).double(), (2, 2))


def test_a_comment_stands_beside_the_arrays(tmp_path):
    path = tmp_path / "a.npz"
    write_cam(path, CAM, LABELS, comment="made by hand")
    assert torch.equal(read_cam(path).cams, CAM[[0, 2]])
    with zipfile.ZipFile(path) as archive:
        assert archive.comment == b"made by hand"
        assert archive.testzip() is None
    with np.load(path) as archive:
        assert archive["keys"].tolist() == [0, 2]
    with pytest.raises(ValueError, match="comment"):
        write_cam(tmp_path / "b.npz", CAM, LABELS, comment="größer")
    assert not (tmp_path / "b.npz").exists()
