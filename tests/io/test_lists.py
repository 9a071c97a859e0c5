"""List files, the VOC layout, plain folders."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pseudolabel.io import ListEntry, VOCLayout, find_images, read_list


@pytest.fixture
def file(tmp_path):
    def write(content):
        path = tmp_path / "train.txt"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_ids(file, start, end):
    path = file(start + end.join(["2007_000032", "2007_000039 ", "größe図"]))
    assert [entry.name for entry in read_list(path)] == ["2007_000032", "2007_000039", "größe図"]


def test_paths(file):
    path = file(
        "/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png\n"
        "JPEGImages/2007.000039.jpg\tMasks/x.png\n"
        "/JPEGImages/a.jpeg\nplain.jpg\n"
    )
    assert read_list(path) == (
        ListEntry("2007_000032", "JPEGImages/2007_000032.jpg", "SegmentationClassAug/2007_000032.png"),
        ListEntry("2007.000039", "JPEGImages/2007.000039.jpg", "Masks/x.png"),
        ListEntry("a", "JPEGImages/a.jpeg"),
        ListEntry("plain", "plain.jpg"),
    )


def test_coco(file):
    path = file("000000000009 44 50 0\nCOCO_train2014_000000000025\n")
    assert read_list(path) == (
        ListEntry("000000000009", class_ids=(44, 50, 0)),
        ListEntry("COCO_train2014_000000000025"),
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the list is empty"),
        (" \n\t\n", "the list is empty"),
        ("a\n\nb\na\n", "line 4: 'a' stands in line 1 already"),
        ("x/a.jpg\ny/a.jpg\n", "line 2: 'a' stands in line 1 already"),
        ("a\nmy photo\n", r"line 2: expected an id, an id with class ids.*\['my', 'photo'\]"),
        ("a 1 x\n", "line 1: expected an id"),
        ("a  1\nb -1\n", r"line 2: .*ImageSets/Main"),
        ("a.jpg b.png c.png\n", "line 1: expected an image path and a mask path, got 3 words"),
        ("../a.jpg\n", "line 1: expected a path below the root of the data set, got '../a.jpg'"),
        ("/x/../../a.jpg\n", "line 1: expected a path below the root"),
        ("x/a.jpg /../a.png\n", "line 1: expected a path below the root"),
        ("x\\..\\..\\a.jpg\n", "line 1: expected a path below the root"),
        ("C:/a.jpg\n", "line 1: expected a path below the root"),
        ("..\n", "line 1: name: expected an image id"),
        ("a\0b\n", "line 1: name: expected an image id"),
        ("c:a\n", "line 1: name: expected an image id"),
        ("größe\n".encode("latin1"), "not a UTF-8 text file"),
    ],
)
def test_wrong_lists(file, content, message):
    path = file(content)
    with pytest.raises(ValueError, match=f"train.txt.*{message}"):
        read_list(path)


@pytest.mark.parametrize(
    "content",
    [
        "a\n{0}\n{0}\n",
        "/{0}.jpg b.png c.png\n",
        "a {0}\n",
        "..\\{0}\n",
        "../{0}.jpg\n",
        "a 1{0}\n",
        "a 1 x{1}\n",
    ],
)
def test_errors_quote_a_part_of_long_lines(file, content):
    path = file(content.format("x" * 10**6, " 1" * 10**5))
    with pytest.raises(ValueError, match=r"train\.txt, line \d: ") as error:
        read_list(path)
    assert len(str(error.value)) < 2000


def test_class_ids_of_more_than_64_bits(file):
    with pytest.raises(ValueError, match="line 1: expected an id, an id with class ids"):
        read_list(file("a " + "9" * 19))
    assert read_list(file("a " + "9" * 18))[0].class_ids == (10**18 - 1,)


@given(st.text(max_size=30))
def test_no_path_leaves_the_root(tmp_path_factory, text):
    root = tmp_path_factory.mktemp("root")
    (root / "list.txt").write_text(text, encoding="utf-8", errors="replace", newline="")
    try:
        entries = read_list(root / "list.txt")
    except ValueError:
        return
    for entry in entries:
        for path in (root / entry.name, root / (entry.image or "x"), root / (entry.mask or "x")):
            assert path.resolve().is_relative_to(root.resolve())


def test_voc_layout(tmp_path):
    folder = tmp_path / "ImageSets" / "Segmentation"
    folder.mkdir(parents=True)
    (folder / "train.txt").write_text("2007_000032\n2007_000039\n")
    voc = VOCLayout(tmp_path)
    assert voc.ids("train") == ("2007_000032", "2007_000039")
    assert voc.image_path("2007_000032") == tmp_path / "JPEGImages" / "2007_000032.jpg"
    assert voc.mask_path("2007_000032") == tmp_path / "SegmentationClass" / "2007_000032.png"
    assert VOCLayout(str(tmp_path), masks="Aug").mask_path("a") == tmp_path / "Aug" / "a.png"
    with pytest.raises(FileNotFoundError, match=r"val\.txt"):
        voc.ids("val")


def test_flat_layout(tmp_path):
    (tmp_path / "ids.txt").write_text("a\n")
    voc = VOCLayout(tmp_path, images="images", masks="masks", lists=".")
    assert voc.ids("ids") == ("a",)
    assert voc.image_path("a") == tmp_path / "images" / "a.jpg"


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "/etc/passwd", "a/b", "a\\b", "C:a", "a\0"])
def test_layout_keeps_names_inside(name):
    voc = VOCLayout("root")
    for method in (voc.image_path, voc.mask_path, voc.ids):
        with pytest.raises(ValueError, match="name: expected an image id without folders"):
            method(name)


def test_find_images(tmp_path):
    for name in ("b.JPG", "a.png", "c.jpeg", "図 🐈.webp", "notes.txt", ".hidden.jpg", "._b.jpg", "x.tmp"):
        (tmp_path / name).touch()
    (tmp_path / "folder.jpg").mkdir()
    paths = find_images(str(tmp_path))
    assert [path.name for path in paths] == ["a.png", "b.JPG", "c.jpeg", "図 🐈.webp"]
    assert all(isinstance(path, Path) and path.parent == tmp_path for path in paths)


def test_find_images_errors(tmp_path):
    with pytest.raises(ValueError, match=r"no photo here \(looked for .*\.jpg"):
        find_images(tmp_path)
    (tmp_path / "a.jpg").touch()
    (tmp_path / "a.png").touch()
    with pytest.raises(ValueError, match=r"'a\.jpg' and 'a\.png' differ in their suffix alone"):
        find_images(tmp_path)
    with pytest.raises(FileNotFoundError):
        find_images(tmp_path / "missing")
    with pytest.raises(NotADirectoryError):
        find_images(tmp_path / "a.jpg")
