"""No command writes over a file that it did not make: photos, true masks, corrected masks, weights."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from pseudolabel import io
from pseudolabel.cli import main
from pseudolabel.cli._console import UserError
from pseudolabel.cli._marks import mark, refuse_foreign
from pseudolabel.cli.ray import GenerateMasks


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
@pytest.mark.parametrize("option", ["--out", "--save-cams"])
@pytest.mark.parametrize("kind", ["the folder", "a link to it"])
def test_the_folder_of_the_photos(data, capsys, overwrite, option, kind):
    folder = data.images
    if kind == "a link to it":
        folder = data.root / "link"
        folder.symlink_to(data.images)
    before = contents(data.images)
    assert main(data.generate(option, str(folder), *overwrite)) == 2
    assert f"{option}: expected another folder than that of the photos" in capsys.readouterr().err
    assert contents(data.images) == before


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_a_folder_of_true_masks(data, capsys, overwrite):
    before = contents(data.truth)
    assert main(data.generate(*overwrite, out=data.truth)) == 2
    assert str(data.truth) in capsys.readouterr().err
    assert {name: content for name, content in contents(data.truth).items() if name in before} == before


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",), ("--overwrite", "--alpha", "3")])
def test_a_true_mask_among_those_made_here(data, capsys, overwrite):
    assert main(data.generate()) == 0
    shutil.copyfile(data.truth / "photo2.png", data.out / "photo2.png")
    before = contents(data.out)
    assert main(data.generate(*overwrite)) == 2
    err = capsys.readouterr().err
    assert "photo2.png" in err
    assert "not made by this program" in err
    assert contents(data.out) == before


@pytest.mark.parametrize("keeps_the_mark", [True, False])
def test_a_mask_that_was_corrected_by_hand(data, capsys, keeps_the_mark):
    assert main(data.generate()) == 0
    path = data.out / "photo2.png"
    with Image.open(path) as picture:
        comment = picture.info["Comment"]
        corrected = io.read_mask(path)
    corrected[:4] = 255
    io.write_mask(path, corrected, comment=comment if keeps_the_mark else "")
    before = contents(data.out)
    assert main(data.generate()) == 2
    assert "photo2.png" in capsys.readouterr().err
    assert contents(data.out) == before


def test_maps_of_another_program(data, capsys):
    cams = data.root / "cams"
    cams.mkdir()
    io.write_cam(cams / "photo1.npz", torch.rand(6, 4, 5), torch.ones(6))
    before = contents(cams)
    for more in ((), ("--overwrite",)):
        assert main(data.generate("--save-cams", str(cams), *more)) == 2
        assert "cams" in capsys.readouterr().err
        assert contents(cams).items() >= before.items()


def test_a_record_of_somebody_else(data, capsys):
    data.out.mkdir()
    for text in ("{}", "[1]", "my notes", '{"settings": {}}'):
        (data.out / "pseudolabel.json").write_text(text)
        assert main(data.generate("--overwrite")) == 2
        assert "pseudolabel.json" in capsys.readouterr().err
        assert (data.out / "pseudolabel.json").read_text() == text


def test_the_class_for_ray_replaces_no_file_either(data):
    data.out.mkdir()
    shutil.copyfile(data.truth / "photo0.png", data.out / "photo0.png")
    before = contents(data.out)
    settings = {"model": "pseudolabel.cli.demo:classifier", "weights": str(data.weights), "classes": "abcdef"}
    generate = GenerateMasks(out=data.out, scales=(1.0,), crf=False, **settings)
    with pytest.raises(ValueError, match=r"photo0\.png"):
        generate.make([str(data.images / "photo0.png")], data.labels[:1])
    assert contents(data.out) == before


def test_marks_are_of_the_content(tmp_path):
    mask = torch.tensor([[0, 1], [2, 255]], dtype=torch.uint8)
    path = tmp_path / "a.png"
    for comment in ("", "made by pseudolabel generate: 00", mark(mask.T), mark(mask.int())):
        io.write_mask(path, mask, comment=comment)
        with pytest.raises(UserError, match=r"a\.png"):
            refuse_foreign([path])
    io.write_mask(path, mask, comment=mark(mask))
    refuse_foreign([path, tmp_path / "nowhere.png"])
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match=r"a\.png"):
        refuse_foreign([path])
    archive, maps = tmp_path / "a.npz", torch.rand(2, 3, 4).half()
    for comment, ours in (("", False), (mark(torch.arange(2), maps), True), (mark(maps), False)):
        io.write_cam(archive, maps, torch.ones(2), comment=comment)
        if ours:
            refuse_foreign([archive])
        else:
            with pytest.raises(UserError, match=r"a\.npz"):
                refuse_foreign([archive])
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(UserError, match=r"link\.png"):
        refuse_foreign([tmp_path / "link.png"])


# train, demo, view


def train(data, out: Path, *more: str) -> list[str]:
    files = ("--labels", str(data.csv), "--model", "pseudolabel.cli.demo:classifier", "--out", str(out))
    few = ("--epochs", "1", "--batch-size", "5", "--crop", "32")
    return ["train", "classifier", str(data.images), *files, *few, *more]


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_train_from_weights_in_its_own_folder(data, capsys, overwrite):
    out = data.root / "run"
    assert main(train(data, out)) == 0
    before = contents(out)
    (data.root / "link.pt").symlink_to(out / "weights.pt")
    for weights in (out / "weights.pt", data.root / "link.pt"):
        assert main(train(data, out, "--weights", str(weights), *overwrite)) == 2
        assert "--weights" in capsys.readouterr().err
        assert contents(out) == before


@pytest.mark.parametrize("name", ["weights.pt", "checkpoint.pt", "log.jsonl"])
@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_train_in_a_folder_with_files_of_its_names(data, capsys, name, overwrite):
    out = data.root / "run"
    out.mkdir()
    (out / name).write_bytes(b"precious")
    assert main(train(data, out, *overwrite)) == 2
    assert name in capsys.readouterr().err
    assert contents(out) == {name: b"precious"}


def test_train_removes_what_killed_runs_left(data):
    out = data.root / "run"
    assert main(train(data, out)) == 0
    left = out / ".0123456789abcdef.tmp"
    left.write_bytes(b"half a checkpoint")
    os.utime(left, (0, 0))
    assert main(train(data, out)) == 0
    assert not left.exists()


def test_commands_keep_to_their_own_folders(data, capsys):
    assert main(data.generate()) == 0
    assert main(train(data, data.root / "run")) == 0
    assert main(train(data, data.out)) == 2
    assert "take another folder" in capsys.readouterr().err
    assert main(data.generate(out=data.root / "run")) == 2
    assert "take another folder" in capsys.readouterr().err
    assert main(["demo", "--out", str(data.out), "--images", "12"]) == 2
    assert "take another folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["labels.csv", "classes.txt", "classifier.pt", "panels.png", "images"])
def test_demo_in_a_folder_with_files_of_its_names(data, capsys, name):
    out = data.root / "mine"
    out.mkdir()
    if name == "images":
        shutil.copytree(data.images, out / name)
    else:
        (out / name).write_bytes(b"precious")
    before = contents(out)
    assert main(["demo", "--out", str(out), "--images", "12", "--epochs", "1"]) == 2
    assert name in capsys.readouterr().err
    assert contents(out) == before


def test_view_replaces_none_of_the_pictures_it_shows(data, capsys):
    assert main(data.generate()) == 0
    before = {folder: contents(folder) for folder in (data.images, data.truth, data.out)}
    for folder in before:
        target = folder / "photo1.png"
        command = ["view", str(data.images), str(data.out), "--truth", str(data.truth), "--out", str(target)]
        assert main(command) == 2
        assert "--out" in capsys.readouterr().err
    assert {folder: contents(folder) for folder in before} == before
