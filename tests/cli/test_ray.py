"""What the Ray engine does without Ray. `tests/ray` is about the rest."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pseudolabel import io
from pseudolabel.cli import main
from pseudolabel.cli import ray as engine
from pseudolabel.cli._console import UserError
from pseudolabel.cli._marks import digest_file
from pseudolabel.cli.ray import GenerateMasks, _Worker


@pytest.fixture
def generate(data):
    return GenerateMasks(
        model="pseudolabel.cli.demo:classifier",
        weights=str(data.weights),
        classes=io.read_labels(data.csv).classes,
        scales=(1.0,),
        crf=False,
        out=data.root / "new" / "rows",
        cams=data.root / "new" / "maps",
    )


def rows(data, **more):
    photos = np.array([str(data.images / f"{name}.png") for name in data.names])
    return {"photo": photos, "labels": data.labels.numpy().astype(np.int64), **more}


@pytest.mark.parametrize("form", ["array", "objects", "lists"])
def test_rows_become_the_files_of_the_command(form, data, generate):
    batch = rows(data)
    if form != "array":  # as Ray gives a column of lists, according to its length
        column = np.empty(5, dtype=object)
        for row, value in enumerate(batch["labels"].tolist()):
            column[row] = np.array(value) if form == "objects" else value
        batch["labels"] = column
    found = generate(batch)
    assert main(data.generate("--batch-size", "1", "--save-cams", str(data.root / "cams"))) == 0
    for made, folder in (("rows", data.out), ("maps", data.root / "cams")):
        files = {path.name: path.read_bytes() for path in (data.root / "new" / made).iterdir()}
        assert len(files) == 5
        assert files == {name: (folder / name).read_bytes() for name in files}
    assert found["name"].tolist() == data.names
    assert found["skipped"].tolist() == [""] * 5
    assert [row.tolist() for row in found["labels"]] == [row.nonzero()[:, 0].tolist() for row in data.labels]
    assert found["mask"].tolist() == [digest_file(data.out / f"{name}.png") for name in data.names]
    assert found["photo"].tolist() == [digest_file(data.images / f"{name}.png") for name in data.names]


def test_rows_of_one_number_go_together(data, generate, monkeypatch):
    together = []
    monkeypatch.setattr(generate, "make", lambda photos, labels: together.append((photos, labels)) or [])
    batch = rows(data, batch=np.array([7, 3, 7, 3, 0]))
    generate(batch)
    assert [[Path(photo).stem for photo in photos] for photos, _ in together] == [
        ["photo0", "photo2"],
        ["photo1", "photo3"],
        ["photo4"],
    ]
    assert torch.equal(torch.cat([labels for _, labels in together]), data.labels[[0, 2, 1, 3, 4]])
    together.clear()
    del batch["batch"]
    generate(batch)
    assert [len(photos) for photos, _ in together] == [1] * 5
    together.clear()
    assert all(
        len(column) == 0 for column in generate({name: its[:0] for name, its in batch.items()}).values()
    )
    assert together == []


def test_what_is_skipped_says_why(data, generate):
    (data.images / "photo1.png").write_bytes(b"")
    found = generate(rows(data))
    assert [bool(reason) for reason in found["skipped"]] == [False, True, False, False, False]
    assert "photo1.png" in found["skipped"][1]
    assert found["mask"][1] == ""
    assert not (data.root / "new" / "rows" / "photo1.png").exists()


@pytest.mark.parametrize(
    "labels",
    [
        np.ones((5, 5)),
        np.full((5, 6), 2),
        np.full((5, 6), np.nan),
        np.arange(5),
        np.array([[1, 2], [3]] * 2 + [[]], dtype=object),
    ],
)
def test_labels_that_do_not_fit(labels, data, generate):
    with pytest.raises(ValueError, match=r"labels: expected a 0 or 1 for each of 6 classes"):
        generate(rows(data) | {"labels": labels})


def test_settings_of_the_class(data, monkeypatch):
    monkeypatch.chdir(data.root)
    settings = {"model": "pseudolabel.cli.demo:classifier", "weights": "classifier.pt", "classes": "abcdef"}
    with pytest.raises(TypeError, match="colour"):
        GenerateMasks(out="o", **settings, colour=3)
    with pytest.raises(TypeError, match="model"):
        GenerateMasks(out="o")
    with pytest.raises(ValueError, match="the classifier has 6 classes, the labels have 3"):
        GenerateMasks(out="o", **{**settings, "classes": "abc"})
    with pytest.raises(ValueError, match="--method: expected one of cam, infercam, pmm, got 'nope'"):
        GenerateMasks(out="o", **settings, method="nope")
    (data.root / "deep").mkdir()
    with pytest.raises(FileNotFoundError):
        GenerateMasks(out="o", folder="deep", **settings)
    assert Path.cwd() == data.root / "deep"
    GenerateMasks(out="here", folder="..", **settings)
    assert (data.root / "here").is_dir()


def test_threads_are_one(data, generate):
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        generate(rows(data))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)


def plan(*sizes):
    photos = iter(range(100))
    return [
        ([Path(f"p{next(photos)}\udc80.png") for _ in range(size)], torch.eye(3)[:size]) for size in sizes
    ]


def test_tasks_hold_whole_batches():
    def tasks(batches, workers):
        return [[len(json.loads(row)[0]) for row in task] for task in engine._tasks(batches, workers)]

    assert tasks(plan(*[1] * 5), 2) == [[1]] * 5  # few photos: one each
    assert tasks(plan(*[1] * 20), 1) == [[1] * 5] * 4
    assert tasks(plan(*[3] * 33), 1) == [[3] * 3] * 11
    assert tasks(plan(*[3] * 31), 1) == [[3] * 3] * 10 + [[3]]
    assert tasks(plan(*[1] * 99), 1) == [[1] * 8] * 12 + [[1] * 3]
    ((row,),) = engine._tasks(plan(2), 3)
    assert json.loads(row) == [["p0\udc80.png", "p1\udc80.png"], [[1, 0, 0], [0, 1, 0]]]


def test_parts_hold_whole_batches():
    assert [[len(photos) for photos, _ in part] for part in engine._grouped(plan(1, 2, 3, 4, 1), 4)] == [
        [1, 2, 3],
        [4],
        [1],
    ]
    assert list(engine._grouped([], 4)) == []


@pytest.mark.parametrize("broken", [False, True], ids=["missing", "broken"])
def test_ray_cannot_be_imported(broken, data, monkeypatch, capsys):
    if broken:
        (data.root / "libraries" / "ray").mkdir(parents=True)
        (data.root / "libraries" / "ray" / "__init__.py").write_text("raise RuntimeError('torn')")
        monkeypatch.syspath_prepend(data.root / "libraries")
    monkeypatch.delitem(sys.modules, "ray.data", raising=False)
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    if not broken:
        monkeypatch.setitem(sys.modules, "ray", None)
    assert main(data.generate("--engine", "ray")) == 2
    err = capsys.readouterr().err
    said = "RuntimeError: torn" if broken else "ModuleNotFoundError: "
    assert f"error: --engine ray: cannot import ray ({said}" in err
    assert 'pip install "pseudolabel[ray]"' in err
    assert not list(data.out.glob("*.png"))


@pytest.mark.parametrize(
    ("device", "gpus", "said"),
    [
        ("cuda", 0, r"--gpus: expected a share > 0 and <= 1 of a GPU for each worker, got 0"),
        ("cuda", 1.5, r"got 1.5"),
        ("cuda", float("nan"), r"got nan"),
        ("cpu", 0.25, r"--gpus: expected none with --device cpu, got 0.25"),
    ],
)
def test_shares_of_gpus(device, gpus, said):
    with pytest.raises(UserError, match=said):
        engine._check_share(gpus, device)


@pytest.mark.parametrize("connected", [False, True])
def test_a_cluster_is_left_as_it_was(connected, capsys):
    calls = []
    ray = SimpleNamespace(
        is_initialized=lambda: connected,
        init=lambda **_: calls.append("init"),
        shutdown=lambda: calls.append("shutdown"),
        cluster_resources=lambda: {"CPU": 4.0, "GPU": 1.0},
    )

    def run():
        with engine._cluster(ray, 1):
            calls.append("run")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert calls == (["run"] if connected else ["init", "run", "shutdown"])
    assert capsys.readouterr().err == ""
    ray.cluster_resources = dict
    with engine._cluster(ray, 0.25):
        pass
    assert "--gpus: Ray shows no GPU now; workers wait until each gets 0.25 of one" in capsys.readouterr().err


def test_a_worker_that_does_not_see_the_folder(data, monkeypatch):
    """As on a machine with a disk of its own: it says so, and makes no folder."""
    monkeypatch.chdir(data.root)  # which the worker leaves
    settings = {"model": "pseudolabel.cli.demo:classifier", "weights": str(data.weights), "classes": "abcdef"}
    options = {"out": str(data.out), "cams": None, "folder": str(data.root), "debug": False, **settings}
    row = json.dumps([[str(data.images / "photo0.png")], [[1, 0, 0, 0, 0, 0]]])
    outcomes = _Worker(token=str(data.out / "token"), **options)({"batch": np.array([row])})
    (told,) = map(json.loads, outcomes["outcome"])
    assert "does not see" in told["error"]
    assert str(data.out) in told["error"]
    assert not data.out.exists()
    data.out.mkdir()
    (data.out / "token").touch()
    outcomes = _Worker(token=str(data.out / "token"), **options)({"batch": np.array([row])})
    (told,) = map(json.loads, outcomes["outcome"])
    assert told["entries"][0][0] == "photo0"
    assert (data.out / "photo0.png").exists()
