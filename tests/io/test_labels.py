"""`labels.csv` and `cls_labels.npy`."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pseudolabel.io import (
    VOC_CLASSES,
    ImageLabels,
    read_cls_labels,
    read_image,
    read_labels,
    read_mask,
    write_labels,
)
from pseudolabel.io.labels import _ESCAPE

LONG = "x" * 100_000
TABLE = "id,split,cat,dog\n2007_000032,train,0,1\n2007_000039,val,1,1\n2007_000063,val,0,0\n"


@pytest.fixture
def file(tmp_path):
    def write(content):
        path = tmp_path / "labels.csv"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def check_table(labels):
    assert labels.names == ("2007_000032", "2007_000039", "2007_000063")
    assert labels.classes == ("cat", "dog")
    assert labels.labels.dtype == torch.bool
    assert labels.labels.tolist() == [[False, True], [True, True], [False, False]]


@pytest.mark.parametrize(
    "content",
    [
        TABLE,
        TABLE.rstrip(),
        "\ufeff" + TABLE,
        "\ufeff" + TABLE.replace("id", '"id, VOC"', 1),
        TABLE.replace("\n", "\r\n"),
        TABLE.replace("\n", "\n\n"),
        TABLE.replace(",", " , "),
        TABLE.replace("train", '"train, first ""half"""'),
        TABLE.replace(",1", ",1.0").replace(",0", ",0.0"),
        TABLE.replace(",1", ",True").replace(",0", ",FALSE"),
    ],
)
def test_read(file, content):
    check_table(read_labels(file(content)))


def test_class_without_an_image_stays(file):
    labels = read_labels(file("id,cat,dog\na,1,0\nb,1,0\n"))
    assert labels.classes == ("cat", "dog")
    assert not labels.labels[:, 1].any()


def test_classes_choose_and_order_columns(file):
    path = file("id,note,dog,cat\na,1,0,1\nb,x,1,1\n")
    labels = read_labels(path, classes=["cat", "dog"])
    assert labels.classes == ("cat", "dog")
    assert labels.labels.tolist() == [[True, False], [True, True]]
    assert read_labels(path, classes=("dog",)).labels.tolist() == [[False], [True]]
    with pytest.raises(ValueError, match=r"no column for the classes \['cow'\] among .*'cat'"):
        read_labels(path, classes=["cat", "cow"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        ("\n\n", "the file is empty"),
        ("id,cat\n", "no image below the header"),
        ("id;cat\na;1\n", r"expected columns separated by commas, the header is \['id;cat'\]"),
        ("id,cat,dog\na,1\n", "line 2: expected 3 cells as in the header, got 2"),
        ("id,cat\na,1\nb,1,0\n", "line 3: expected 2 cells as in the header, got 3"),
        ("id,cat\na,1\nb,0\na,0\n", "line 4: 'a' stands in line 2 already"),
        ("id,cat,cat\na,1,0\n", "header: 'cat' comes twice"),
        ("id,cat,\na,1,0\n", "header: expected names"),
        ("id,cat\n,1\n", "names: expected names"),
        ("id,cat,dog\na,1,0\nb,1,2\n", r"line 3 \('b'\), column 'dog': expected 0 or 1, got '2'"),
        ("id,cat\na,1\nb,\n", r"line 3 \('b'\), column 'cat': expected 0 or 1, got ''"),
        ("id,cat\na,1\nb,-1\n", r"line 3 \('b'\), column 'cat': expected 0 or 1, got '-1'"),
        ("id,cat\na,1\nb,nan\n", r"line 3 \('b'\), column 'cat': expected 0 or 1, got 'nan'"),
        ("id,split\na,train\n", r"no column of 0 and 1 among \['split'\]"),
        ('id,cat\n"a,1\n', "unexpected end of data"),
        ("id,cat\ngröße,1\n".encode("latin1"), r"\(expected UTF-8\)"),
        ("id,cat\na,1\n".encode("utf-16"), r"\(expected UTF-8\)"),
    ],
)
def test_wrong_tables(file, content, message):
    path = file(content)
    with pytest.raises(ValueError, match=f"labels.csv: .*{message}"):
        read_labels(path)


def test_many_columns(file):
    """Once per column is often enough to look through the header: this took the square of it."""
    count = 50_000
    names = [f"c{place}" for place in range(count)]
    path = file(f"id,{','.join(names)}\na,{','.join('01' * (count // 2))}\n")
    for classes in (None, names[::-1]):
        labels = read_labels(path, classes=classes)
        assert labels.classes == tuple(classes or names)
        assert labels["a"].sum() == count // 2


@pytest.mark.parametrize(
    "content",
    [
        f"id;{LONG}\n",
        f"id,{LONG},{LONG}\na,0,1\n",
        f"id,cat\n{LONG},1\n{LONG},1\n",
        f"id,cat\n/{LONG},1\n",
        f"id,cat\n{LONG},1\nb,{LONG}\n",
        f"id,{LONG}\na,1\nb,x\n",
        f"id,{','.join(f'{LONG}{n}' for n in range(9))}\na{',x' * 9}\n",
    ],
)
def test_errors_quote_a_part_of_long_lines(file, content):
    with pytest.raises(ValueError, match=r"labels\.csv: ") as error:
        read_labels(file(content))
    assert len(str(error.value)) < 3000


def test_value_error_with_classes_given(file):
    path = file("id,cat\na,train\n")
    with pytest.raises(ValueError, match=r"line 2 \('a'\), column 'cat': expected 0 or 1, got 'train'"):
        read_labels(path, classes=["cat"])


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"labels\.csv"):
        read_labels(tmp_path / "labels.csv")


# Anything a file name or class name may hold, but line breaks, white space around it and half characters.
LETTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\r\n")
NAMES = st.text(LETTERS, min_size=1, max_size=8).filter(lambda name: name == name.strip())


@given(
    names=st.lists(NAMES, min_size=1, max_size=5, unique=True),
    classes=st.lists(NAMES, min_size=1, max_size=4, unique=True),
    seed=st.integers(0, 1000),
)
def test_round_trip(tmp_path_factory, names, classes, seed):
    names = [name for name in names if not _ESCAPE.search(name)] or ["a"]
    multi_hot = torch.randint(0, 2, (len(names), len(classes)), generator=torch.Generator().manual_seed(seed))
    path = tmp_path_factory.mktemp("labels") / "größe 図.csv"
    write_labels(path, ImageLabels(tuple(names), tuple(classes), multi_hot))
    labels = read_labels(path)
    assert labels.names == tuple(names)
    assert labels.classes == tuple(classes)
    assert torch.equal(labels.labels, multi_hot.bool())


def test_name_that_utf8_cannot_hold(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"old")
    with pytest.raises(ValueError, match="surrogates"):
        write_labels(tmp_path / "a.csv", ImageLabels(("\udcff",), ("cat",), torch.ones(1, 1)))
    assert (tmp_path / "a.csv").read_bytes() == b"old"


def test_look_up():
    labels = ImageLabels(("a", "b", "c"), ("cat", "dog"), torch.tensor([[1, 0], [1, 1], [0, 0]]))
    assert len(labels) == 3
    assert "b" in labels
    assert "d" not in labels
    assert labels["b"].tolist() == [True, True]
    assert labels.select(["c", "a"]).tolist() == [[False, False], [True, False]]
    assert labels.select([]).shape == (0, 2)
    with pytest.raises(KeyError, match="no labels for image 'd' among 3"):
        labels["d"]
    with pytest.raises(AttributeError):
        labels.names = ()


@pytest.mark.parametrize(
    ("names", "classes", "labels", "message"),
    [
        (("a",), ("cat",), torch.ones(1, 2), r"labels: expected shape \(1, 1\), got \(1, 2\)"),
        (("a",), ("cat",), torch.full((1, 1), 2), "labels: expected a multi-hot tensor"),
        (("a",), ("cat",), torch.full((1, 1), torch.nan), "labels: expected a multi-hot tensor"),
        (("a", "a"), ("cat",), torch.ones(2, 1), "names: 'a' comes twice"),
        (("a",), ("cat", "cat"), torch.ones(1, 2), "classes: 'cat' comes twice"),
        ((), ("cat",), torch.ones(0, 1), "names: expected at least one name"),
        (("a",), (), torch.ones(1, 0), "classes: expected at least one name"),
        ((" a",), ("cat",), torch.ones(1, 1), "names: expected names in one line, without white space"),
        (("a\rb",), ("cat",), torch.ones(1, 1), "names: expected names in one line"),
        (("a",), ("c\nd",), torch.ones(1, 1), "classes: expected names in one line"),
        ((1,), ("cat",), torch.ones(1, 1), "names: expected names"),
    ],
)
def test_wrong_labels(names, classes, labels, message):
    with pytest.raises(ValueError, match=message):
        ImageLabels(names, classes, labels)


# --------------------------------------------------------------------------- cls_labels.npy

ROWS = np.eye(20, dtype=np.float32)[[14, 0]] + np.eye(20, dtype=np.float32)[[11, 3]]
EXPECTED = torch.from_numpy(ROWS).bool()


@pytest.mark.parametrize(
    "content",
    [
        {"2007_000032": ROWS[0], "2011_003276": ROWS[1]},
        {2007000032: ROWS[0], 2011003276: ROWS[1]},
        {np.int64(2007000032): ROWS[0], np.int64(2011003276): ROWS[1]},
        {np.str_("2007_000032"): ROWS[0], np.str_("2011_003276"): ROWS[1]},
        np.array({"2007_000032": ROWS[0], "2011_003276": ROWS[1]}, dtype=object),
        {"2007_000032": torch.from_numpy(ROWS[0]), "2011_003276": torch.from_numpy(ROWS[1])},
        {"2007_000032": ROWS[0].tolist(), "2011_003276": ROWS[1].astype(int).tolist()},
        {"2007_000032": ROWS[0].astype(bool), "2011_003276": ROWS[1].astype(np.uint8)},
    ],
)
def test_dialects_of_cls_labels(tmp_path, content):
    path = tmp_path / "cls_labels.npy"
    np.save(path, content, allow_pickle=True)
    labels = read_cls_labels(path, allow_pickle=True, classes=VOC_CLASSES)
    assert labels.names == ("2007_000032", "2011_003276")
    assert torch.equal(labels.labels, EXPECTED)
    assert [labels.classes[c] for c in labels["2007_000032"].nonzero()] == ["dog", "person"]
    assert read_cls_labels(path, allow_pickle=True).classes == tuple(map(str, range(1, 21)))
    write_labels(tmp_path / "labels.csv", labels)
    assert torch.equal(read_labels(tmp_path / "labels.csv").labels, EXPECTED)


def test_other_numbers_are_names_as_they_are(tmp_path):
    np.save(tmp_path / "a.npy", {9: ROWS[0], 581929: ROWS[1]}, allow_pickle=True)
    assert read_cls_labels(tmp_path / "a.npy", allow_pickle=True).names == ("9", "581929")


def test_pickle_must_be_allowed(tmp_path):
    np.save(tmp_path / "a.npy", {"a": ROWS[0]}, allow_pickle=True)
    with pytest.raises(ValueError, match=r"a\.npy: .*allow_pickle=True.*write_labels"):
        read_cls_labels(tmp_path / "a.npy")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "the dict is empty"),
        ({"a": ROWS[0], "b": ROWS[1][:19]}, r"different numbers of classes: \[19, 20\]"),
        ({"a": ROWS[0] * 0.5}, "multi-hot"),
        ({"a": ROWS[0] * np.nan}, "multi-hot"),
        ({"a": "cat"}, "expected an array or numbers, got str"),
        ({"a": None}, "expected an array or numbers, got NoneType"),
        ({1.5: ROWS[0]}, "image ids"),
        ({True: ROWS[0]}, "image ids"),
        ({-5: ROWS[0]}, "image ids"),
        ({"a": [0, 2**70]}, "expected a multi-hot tensor"),
        ({"a": [0.5, 10**400]}, "a number of 1329 bits"),
        ({"/" + LONG: ROWS[0]}, r"leads out of no folder, got '/x.{,200}$"),
        ({2007000032: ROWS[0], "2007_000032": ROWS[1]}, "names: '2007_000032' comes twice"),
        ([ROWS[0]], "expected one pickled dict"),
        (ROWS, "expected one pickled dict, got an array of float32"),
    ],
)
def test_wrong_cls_labels(tmp_path, content, message):
    if isinstance(content, list):
        content = np.array([content[0], None], dtype=object)
    np.save(tmp_path / "a.npy", content, allow_pickle=True)
    with pytest.raises(ValueError, match=rf"a\.npy: .*{message}"):
        read_cls_labels(tmp_path / "a.npy", allow_pickle=True)


def test_labels_that_take_more_than_their_file(tmp_path):
    """One list may stand for every image."""
    rows = [0, 1] * 500
    (tmp_path / "a.npy").write_bytes(pickle.dumps({f"{n}": rows for n in range(100)}))
    labels = read_cls_labels(tmp_path / "a.npy", allow_pickle=True, max_bytes=400_000)
    assert labels.labels.shape == (100, 1000)
    assert (labels.labels.sum(1) == 500).all()
    with pytest.raises(ValueError, match=r"a\.npy: its arrays take 400000 bytes, more than max_bytes=399999"):
        read_cls_labels(tmp_path / "a.npy", allow_pickle=True, max_bytes=399_999)


def test_wrong_number_of_class_names(tmp_path):
    np.save(tmp_path / "a.npy", {"a": ROWS[0]}, allow_pickle=True)
    with pytest.raises(ValueError, match=r"labels: expected shape \(1, 2\), got \(1, 20\)"):
        read_cls_labels(tmp_path / "a.npy", allow_pickle=True, classes=["cat", "dog"])


# --------------------------------------------------------------------------- real files


def test_real_photos():
    root = Path(__file__).resolve().parents[2].parent / "shared" / "voc-animals"
    root = Path(os.environ.get("PSEUDOLABEL_DATA", root))
    if not (root / "labels.csv").is_file():
        pytest.skip(
            "voc-animals is not at hand: set PSEUDOLABEL_DATA to the folder that holds its labels.csv"
        )
    labels = read_labels(root / "labels.csv")
    assert labels.classes == ("cat", "cow", "dog", "horse", "person", "sheep")
    assert len(labels) == 410
    assert labels.labels.any(1).all()
    name = labels.names[0]
    image, mask = read_image(root / "images" / f"{name}.jpg"), read_mask(root / "masks" / f"{name}.png")
    assert image.shape == (3, *mask.shape)
    shown = {int(value) - 1 for value in mask.unique() if value not in (0, 255)}
    assert shown == set(labels[name].nonzero().flatten().tolist())


@pytest.mark.parametrize("name", ["../a", "a/../../b", "/a", "C:/a", "..\\a", "\\a", "a\0b", ".."])
def test_ids_that_lead_out_of_a_folder(tmp_path, name):
    table, pickled = tmp_path / "a.csv", tmp_path / "a.npy"
    table.write_text(f"id,cat\n{name},1\n")
    np.save(pickled, np.array({name: np.ones(1)}, object), allow_pickle=True)
    says = "expected an image id that leads out of no folder"
    with pytest.raises(ValueError, match=rf"a\.csv: line 2: {says}"):
        read_labels(table)
    with pytest.raises(ValueError, match=rf"a\.npy: .*: {says}"):
        read_cls_labels(pickled, allow_pickle=True)
    with pytest.raises(ValueError, match=rf"^labels: {says}"):
        write_labels(table, ImageLabels((name,), ("cat",), torch.ones(1, 1)))


@pytest.mark.parametrize("name", ["a/b", "..a", "a..", "a:b"])
def test_ids_that_stay(tmp_path, name):
    path = tmp_path / "a.csv"
    path.write_text(f"id,cat\n{name},1\n")
    assert read_labels(path).names == (name,)
