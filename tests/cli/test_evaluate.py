import json

import pytest
import torch

from pseudolabel import io
from pseudolabel.cli import main


@pytest.fixture
def folders(tmp_path):
    for name in ("masks", "truth"):
        (tmp_path / name).mkdir()

    def write(folder, name, rows):
        io.write_mask(tmp_path / folder / f"{name}.png", torch.tensor(rows))

    write("truth", "a", [[0, 0, 1, 1]])
    write("masks", "a", [[0, 1, 1, 1]])
    write("truth", "b", [[2, 2, 0], [2, 255, 0]])
    write("masks", "b", [[2, 0, 0], [2, 1, 0]])
    tmp_path.joinpath("classes.txt").write_text("background\ncat\ndog\n")
    return tmp_path, write


def evaluate(root, *more):
    return main(["evaluate", str(root / "masks"), str(root / "truth"), *more])


def test_json_by_hand(folders, capsys):
    root, _ = folders
    assert evaluate(root, "--classes", str(root / "classes.txt"), "--json") == 0
    found = json.loads(capsys.readouterr().out)  # nothing but JSON on stdout
    # background: 1 + 2 right, 1 missed, 1 too much; cat: 2 right, 1 too much; dog: 2 right, 1 missed
    assert found["iou"] == pytest.approx({"background": 3 / 5, "cat": 2 / 3, "dog": 2 / 3})
    assert found["over"] == pytest.approx({"background": 1 / 5, "cat": 1 / 3, "dog": 0})
    assert found["under"] == pytest.approx({"background": 1 / 5, "cat": 0, "dog": 1 / 3})
    assert found["miou"] == pytest.approx((3 / 5 + 2 / 3 + 2 / 3) / 3)
    assert found["num_images"] == 2
    assert found["without_mask"] == found["without_truth"] == []


def test_table(folders, capsys):
    root, _ = folders
    assert evaluate(root, "--classes", str(root / "classes.txt")) == 0
    out = capsys.readouterr().out
    assert "dog" in out
    assert "0.667" in out
    assert "0.644" in out


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("[/]", "[/]"),
        ("[red]cat", "[red]cat"),
        ("[link=file:x]cat[/link]", "[link=file:x]cat[/link]"),
        (":smile:", ":smile:"),
        ("cat\x1b]0;owned\x07\x1b[2J", r"cat\x1b]0;owned\x07\x1b[2J"),
    ],
)
def test_names_of_classes_cannot_steer_the_terminal(folders, capsys, name, said):
    root, _ = folders
    (root / "classes.txt").write_text(f"background\n{name}\ndog\n")
    assert evaluate(root, "--classes", str(root / "classes.txt")) == 0
    out = capsys.readouterr().out
    assert said in out
    assert "\x1b" not in out


def test_two_masks_of_one_name_are_refused(folders, capsys):
    root, _ = folders
    (root / "masks" / "a.png").rename(root / "masks" / "a.PNG")
    assert evaluate(root) == 0  # one alone will do
    (root / "masks" / "a.png").write_bytes((root / "masks" / "a.PNG").read_bytes())
    if len(list((root / "masks").iterdir())) == 3:
        assert evaluate(root) == 2
        assert "a.PNG" in capsys.readouterr().err


def test_classes_are_counted_where_nothing_tells_them(folders, capsys):
    root, write = folders
    write("truth", "c", [[4]])
    write("masks", "c", [[0]])
    assert evaluate(root, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["iou"]) == ["background", "class 1", "class 2", "class 3", "class 4"]
    assert found["iou"]["class 3"] is None  # absent
    assert found["iou"]["class 4"] == 0


@pytest.mark.parametrize(("absent", "expected"), [("skip", None), ("nan", 0.0)])
def test_absent(folders, capsys, absent, expected):
    root, write = folders
    write("truth", "c", [[0, 0]])
    write("masks", "c", [[0, 3]])
    assert evaluate(root, "--json", "--absent", absent) == 0
    assert json.loads(capsys.readouterr().out)["iou"]["class 3"] == expected


def test_pred_ignore(folders, capsys):
    root, write = folders
    write("truth", "c", [[1, 0]])
    write("masks", "c", [[255, 0]])
    assert evaluate(root) == 2
    assert "c.png" in capsys.readouterr().err
    figures = {}
    for choice in ("background", "exclude", "wrong"):
        assert evaluate(root, "--json", "--pred-ignore", choice) == 0
        figures[choice] = json.loads(capsys.readouterr().out)["iou"]["class 1"]
    assert figures == pytest.approx({"background": 2 / 4, "exclude": 2 / 3, "wrong": 2 / 4})


def test_missing_files_are_reported_and_the_rest_is_scored(folders, capsys):
    root, write = folders
    write("truth", "only_true", [[0]])
    write("masks", "only_made", [[0]])
    assert evaluate(root, "--json") == 1
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["without_mask"] == ["only_true"]
    assert found["without_truth"] == ["only_made"]
    assert found["num_images"] == 2
    assert "only_true" in captured.err
    assert "only_made" in captured.err


def test_list(folders, capsys):
    root, write = folders
    write("truth", "not_asked_for", [[0]])
    (root / "list.txt").write_text("b\n")
    assert evaluate(root, "--json", "--list", str(root / "list.txt")) == 0
    assert json.loads(capsys.readouterr().out)["num_images"] == 1
    (root / "list.txt").write_text("b\nz\n")
    assert evaluate(root, "--json", "--list", str(root / "list.txt")) == 1
    assert "z" in capsys.readouterr().err


def test_a_mask_of_another_size_than_its_truth(folders, capsys):
    root, write = folders
    write("masks", "b", [[0, 0, 0]])
    assert evaluate(root) == 2
    err = capsys.readouterr().err
    assert "b.png" in err
    assert "(1, 3)" in err
    assert "(2, 3)" in err


def test_a_truncated_mask(folders, capsys):
    root, _ = folders
    path = root / "masks" / "a.png"
    path.write_bytes(path.read_bytes()[:-30])
    assert evaluate(root) == 2
    assert "a.png" in capsys.readouterr().err


def test_a_class_beyond_num_classes(folders, capsys):
    root, _ = folders
    assert evaluate(root, "--num-classes", "2") == 2
    assert "b.png" in capsys.readouterr().err
    assert evaluate(root, "--num-classes", "4", "--classes", str(root / "classes.txt")) == 2
    assert "expected 4 names" in capsys.readouterr().err


def test_hidden_and_other_files_are_left_out(folders, capsys):
    root, _ = folders
    (root / "masks" / ".x.png").write_bytes(b"half a file")
    (root / "masks" / "pseudolabel.json").write_text("{}")
    assert evaluate(root) == 0
    capsys.readouterr()


def test_many_workers_count_the_same(folders, capsys):
    root, write = folders
    generator = torch.Generator().manual_seed(0)
    for index in range(12):
        for folder in ("masks", "truth"):
            write(folder, f"r{index}", torch.randint(0, 3, (9, 7), generator=generator).tolist())
    figures = []
    for workers in ("1", "4"):
        assert evaluate(root, "--json", "--workers", workers) == 0
        figures.append(json.loads(capsys.readouterr().out))
    assert figures[0] == figures[1]
