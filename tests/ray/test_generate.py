"""`pseudolabel generate --engine ray` on a cluster of several processes, also while they are killed."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pseudolabel
from pseudolabel import io
from pseudolabel.cli import main
from pseudolabel.cli._console import UserError
from pseudolabel.cli._folder import Journal
from pseudolabel.cli._marks import digest_file
from pseudolabel.cli._mask_maker import Settings
from pseudolabel.cli.ray import in_ray

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")  # of its own parts

RAY = ("--engine", "ray", "--workers", "2")


def masks(data, out: str = "ray") -> int:
    return len(list((data.root / out).glob("*.png")))


@pytest.mark.parametrize("batch_size", ["1", "4"])
def test_files_are_those_of_the_local_engine(batch_size, ray, data, files, capsys):
    more = ("--batch-size", batch_size)
    assert main(data.generate("local", *more)) == 0
    assert main(data.generate("ray", *more, *RAY[:-1], "3")) == 0
    assert masks(data) == len(data.names)
    assert files(data.root, "ray") == files(data.root, "local")
    assert "20 masks made, 0 were there already, 0 photos skipped" in capsys.readouterr().err
    if batch_size == "4":  # is not without effect here
        assert main(data.generate("alone", "--batch-size", "1")) == 0
        alone, together = files(data.root, "alone"), files(data.root, "ray")
        assert any(alone[f"_cams/{name}.npz"] != together[f"_cams/{name}.npz"] for name in data.names)
    # Each worker has opened the network once; one may be done with all before another has begun.
    assert 1 <= len(data.opened()) == len(set(data.opened())) <= 3


@pytest.mark.parametrize("kills", [[3], [3, 8]], ids=["once", "twice"])
def test_a_worker_is_killed_in_the_middle(kills, ray, data, files, capsys):
    for after in kills:
        (data.root / f"kill.{after}").touch()
    assert main(data.generate("ray", *RAY)) == 0
    assert not list(data.root.glob("kill*"))
    assert "20 masks made" in capsys.readouterr().err
    assert len(data.opened()) == len(set(data.opened())) > len(kills)
    assert main(data.generate("local")) == 0
    assert files(data.root, "ray") == files(data.root, "local")


def plan(data) -> tuple[list[tuple[list[Path], object]], Settings]:
    labels = io.read_labels(data.root / "labels.csv")
    batches = [([Path("photos", f"{name}.png")], labels[name][None]) for name in data.names]
    settings = Settings(
        model=data.model, classes=labels.classes, weights="weights.pt", scales=(1.0, 0.5), crf=False
    )
    for folder in ("ray", "ray_cams"):
        (data.root / folder).mkdir()
    return batches, settings


def test_all_workers_are_killed(ray, data, files):
    """From outside, wherever each of them is just then; what comes out is complete, and each photo once."""
    batches, settings = plan(data)
    found = []
    for entry in in_ray(batches, settings, Path("ray"), Path("ray_cams"), workers=2):
        if not found:
            assert masks(data) < len(data.names)
            first = set(data.opened())
            for pid in first:
                os.kill(pid, signal.SIGKILL)
        found.append(entry)
    assert sorted(entry.name for entry in found) == data.names
    assert all(entry.mask == digest_file(data.root / "ray" / f"{entry.name}.png") for entry in found)
    assert set(data.opened()) - first
    assert main(data.generate("local")) == 0
    local = files(data.root, "local")
    assert files(data.root, "ray").items() == {
        (name, content) for name, content in local.items() if "/pseudolabel" not in name
    }


def test_goes_on_where_it_was_stopped(ray, data, files, capsys, monkeypatch):
    add, added = Journal.add, []

    def stop(journal, entry):
        if len(added) == 3:
            raise KeyboardInterrupt
        added.append(entry.name)
        add(journal, entry)

    monkeypatch.setattr(Journal, "add", stop)
    assert main(data.generate("ray", *RAY)) == 130
    monkeypatch.setattr(Journal, "add", add)
    assert 3 <= masks(data) < len(data.names)
    times = {name: (data.root / "ray" / f"{name}.png").stat().st_mtime_ns for name in added}
    capsys.readouterr()
    assert main(data.generate("ray", *RAY)) == 0
    assert times == {name: (data.root / "ray" / f"{name}.png").stat().st_mtime_ns for name in added}
    kept = int(re.search(r"(\d+) were there already", capsys.readouterr().err)[1])
    assert kept == len(added)  # what was written and not noted down is made again, to the same bytes
    assert main(data.generate("local")) == 0
    assert files(data.root, "ray") == files(data.root, "local")


def test_broken_photos_are_skipped(ray, data, files, capsys):
    broken = data.root / "photos" / "photo05.png"
    broken.write_bytes(broken.read_bytes()[:200])
    said = []
    for out, more in (("local", ()), ("ray", RAY)):
        assert main(data.generate(out, *more, "--batch-size", "4")) == 1
        lines = capsys.readouterr().err.splitlines()
        said.append([line for line in lines if line.startswith("skipped")])
    assert said[0] == said[1]
    assert len(said[0]) == 1
    assert "photo05.png" in said[0][0]
    assert files(data.root, "ray") == files(data.root, "local")


def test_errors_of_workers_are_those_of_the_command(ray, data, capsys):
    # A file that cannot be written, as on a full disk.
    said = []
    for out, more in (("local", ()), ("ray", RAY)):
        (data.root / out / "photo05.png").mkdir(parents=True)
        assert main(data.generate(out, *more)) == 2
        said.append(capsys.readouterr().err.splitlines()[-1].replace(f"{out}/", ""))
    assert said[0] == said[1]
    assert "photo05.png: Is a directory" in said[0]
    # A network that a worker cannot open.
    (data.root / "refuse").touch()
    assert main(data.generate("refused", *RAY)) == 2
    assert f"error: --model: {data.model}() failed: RuntimeError: not here" in capsys.readouterr().err
    assert not masks(data, "refused")


def test_debug_raises_what_goes_wrong_with_a_photo(ray, data):
    batches, settings = plan(data)
    (data.root / "photos" / "photo00.png").write_bytes(b"")
    with pytest.raises(ray.exceptions.RayTaskError, match=r"(?s)read_image.*photo00.png"):
        list(in_ray(batches[:2], settings, Path("ray"), workers=1, debug=True))


def test_failures_of_ray_are_one_line(ray, data, monkeypatch):
    batches, settings = plan(data)

    def fail(self):
        raise ray.exceptions.RaySystemError("no node left\nand more")

    monkeypatch.setattr(ray.data.Dataset, "iter_rows", fail)
    with pytest.raises(UserError, match=r"^--engine ray: RaySystemError: .*no node left$"):
        list(in_ray(batches, settings, Path("ray")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU of this cluster is none")
def test_shares_of_a_gpu(ray, data, monkeypatch):
    """Workers take their shares of the GPU that the cluster says it has, and find that there is none."""
    batches, settings = plan(data)
    map_batches, given = ray.data.Dataset.map_batches, {}

    def spy(dataset, *args, **options):
        given.update(options)
        return map_batches(dataset, *args, **options)

    monkeypatch.setattr(ray.data.Dataset, "map_batches", spy)
    with pytest.raises(UserError, match="--device: 'cuda' cannot be used here"):
        list(in_ray(batches, replace(settings, device="cuda"), Path("ray"), gpus=0.5))
    assert given["num_gpus"] == 0.5
    assert data.opened() == []


def test_parts_of_a_long_plan(ray, data, monkeypatch):
    """More photos than Ray is told of at a time: all are done, none twice."""
    monkeypatch.setattr("pseudolabel.cli.ray.PART", 6)
    batches, settings = plan(data)
    entries = list(in_ray(batches[:8], settings, Path("ray"), workers=1))
    assert sorted(entry.name for entry in entries) == data.names[:8]
    assert len(data.opened()) == 2


def test_a_cluster_of_its_own(ray, data, files):
    """Ray is started for the command and ends with it; nothing goes to stdout."""
    source = str(Path(pseudolabel.__file__).parents[1])
    environment = {**os.environ, "RAY_ADDRESS": "local", "PYTHONPATH": source}
    command = [sys.executable, "-m", "pseudolabel", *data.generate("ray", *RAY[:2], "--workers", "1")]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert told.returncode == 0, told.stderr
    assert told.stdout == ""
    assert "20 masks made" in told.stderr
    assert main(data.generate("local")) == 0
    assert files(data.root, "ray") == files(data.root, "local")
