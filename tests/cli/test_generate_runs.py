"""Runs of `generate` that are killed, that meet in one folder, or find the disk full."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from pseudolabel import io
from pseudolabel.cli import main
from pseudolabel.cli._scenes import draw_scenes

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL, and no locks")

SOURCE = str(Path(io.__file__).parents[2])
ENVIRONMENT = {**os.environ, "PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def many(data):
    """Two dozen photos of three sizes, one without a label; masks by the CRF, and maps."""
    names = [f"photo{number:02d}" for number in range(24)]
    labels = torch.zeros(24, 6, dtype=torch.bool)
    for path in data.images.iterdir():
        path.unlink()
    for number, name in enumerate(names):
        size = [(40, 48), (32, 40), (36, 36)][number % 3]
        image, _, label = draw_scenes(1, size, generator=torch.Generator().manual_seed(number))
        pixels = (image[0] * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
        Image.fromarray(pixels).save(data.images / f"{name}.png")
        labels[number] = label[0]
    labels[7] = False
    data.write_labels(names, labels)
    data.names = names
    generate = data.generate
    data.generate = lambda *more, out: generate("--crf", "--save-cams", str(out / "maps"), *more, out=out)
    return data


def files(out: Path) -> dict[str, bytes]:
    """All files but for hidden ones and the journals, which tell of the order."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and not path.name.startswith(".") and path.suffix != ".jsonl"
    }


def journal(out: Path) -> dict[str, dict]:
    entries = [
        json.loads(line) for path in out.glob("pseudolabel*.jsonl") for line in path.read_text().splitlines()
    ]
    return {entry["name"]: entry for entry in entries}


@pytest.mark.parametrize("batch_size", ["1", "4"])
def test_killed_at_random_moments_and_run_again(many, batch_size):
    """25 kills each, 50 in all: whatever the moment, no file is half there, and in the end all are equal."""
    options = ("--batch-size", batch_size, "--workers", "2")
    command = [sys.executable, str(Path(__file__).with_name("_killed_runs.py"))]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=ENVIRONMENT,
    ) as server:  # fmt: skip

        def run(out: Path, seconds: float) -> int:
            server.stdin.write(json.dumps([many.generate(*options, out=out), seconds]) + "\n")
            server.stdin.flush()
            return int(server.stdout.readline())

        begin = time.monotonic()
        assert run(many.root / "whole", 120) == 0
        whole_run = time.monotonic() - begin
        whole = files(many.root / "whole")
        assert len(whole) == 2 * (len(many.names) + 1)  # masks, maps and settings

        moments, kills, finished, cut_short = random.Random(int(batch_size)), 0, 0, 0
        while kills < 25:
            out = many.root / f"out{finished}"
            code = run(out, moments.uniform(0, whole_run))
            there = files(out)
            assert there.items() <= whole.items()
            if code == -9:
                kills += 1
                cut_short += 0 < len(there) < len(whole)
                continue
            assert code == 0
            assert there == whole
            finished += 1
        out = many.root / f"out{finished}"
        assert run(out, 120) == 0
        assert files(out) == whole
        assert cut_short > 5  # most kills came when there was something to harm
        server.stdin.close()
    entries = journal(out)
    assert set(entries) == set(many.names)
    for name, entry in entries.items():
        assert entry["mask"] == hashlib.sha256(whole[f"{name}.png"]).hexdigest()[:32]


def test_a_journal_spares_the_reading_of_masks(many, monkeypatch, capsys):
    assert main(many.generate(out=many.out)) == 0
    read = []
    monkeypatch.setattr(io, "read_mask", read.append)
    monkeypatch.setattr(io, "image_size", read.append)
    capsys.readouterr()
    assert main(many.generate(out=many.out)) == 0
    assert "24 were there already" in capsys.readouterr().err
    assert not read


def test_a_photo_that_was_replaced_makes_its_mask_anew(many, capsys):
    """Also by one of as many pixels, bytes and nanoseconds."""
    path = many.images / "photo03.png"
    photo = Image.open(path)
    photo.save(path, compress_level=0)
    assert main(many.generate(out=many.out)) == 0
    before, found = files(many.out), path.stat()
    photo.transpose(Image.Transpose.ROTATE_180).save(path, compress_level=0)
    assert path.stat().st_size == found.st_size
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    capsys.readouterr()
    assert main(many.generate(out=many.out)) == 0
    assert "1 masks made, 23 were there already" in capsys.readouterr().err
    changed = {name for name, content in files(many.out).items() if content != before[name]}
    assert "maps/photo03.npz" in changed
    assert changed <= {"photo03.png", "maps/photo03.npz"}


def test_masks_without_a_line_in_the_journal_are_made_anew(many, capsys):
    """Nothing says what they were made of; a run that was killed leaves a few. They may be replaced."""
    assert main(many.generate(out=many.out)) == 0
    before, path = files(many.out), many.out / "pseudolabel.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-2]))
    capsys.readouterr()
    assert main(many.generate(out=many.out)) == 0
    assert "2 masks made, 22 were there already" in capsys.readouterr().err
    assert files(many.out) == before
    assert set(journal(many.out)) == set(many.names)


@pytest.mark.parametrize("harm", ["gone", "empty", "another photo's"])
def test_maps_that_are_not_those_of_the_photo_are_made_anew(many, capsys, harm):
    assert main(many.generate(out=many.out)) == 0
    before, path = files(many.out), many.out / "maps" / "photo04.npz"
    if harm == "gone":
        path.unlink()
    elif harm == "empty":  # not made here: it stays, and somebody has to look
        path.write_bytes(b"")
        assert main(many.generate(out=many.out)) == 2
        assert "photo04.npz" in capsys.readouterr().err
        assert path.read_bytes() == b""
        path.unlink()
    else:
        shutil.copyfile(many.out / "maps" / "photo05.npz", path)
    capsys.readouterr()
    assert main(many.generate(out=many.out)) == 0
    assert "1 masks made, 23 were there already" in capsys.readouterr().err
    assert files(many.out) == before


def test_a_photo_that_changes_while_it_is_in_work_is_not_done(many, monkeypatch, capsys):
    path = many.images / "photo05.png"
    read = io.read_image

    def read_then_changed(photo, **more):
        image = read(photo, **more)
        if Path(photo) == path:
            Image.open(path).transpose(Image.Transpose.ROTATE_180).save(path)
        return image

    with monkeypatch.context() as patch:
        patch.setattr(io, "read_image", read_then_changed)
        assert main(many.generate(out=many.out)) == 1
    assert "skipped photo05.png: the photo changed while it was in work" in capsys.readouterr().err
    assert not (many.out / "photo05.png").exists()
    assert main(many.generate(out=many.out)) == 0
    assert "1 masks made, 23 were there already" in capsys.readouterr().err


def test_other_names_of_the_same_columns_are_other_masks(many, capsys):
    assert main(many.generate(out=many.out)) == 0
    before = files(many.out)
    header, *rows = many.csv.read_text().splitlines()
    first, second = header.split(",")[1:3]
    swapped = header.replace(first, "?").replace(second, first).replace("?", second)
    many.csv.write_text("\n".join([swapped, *rows]) + "\n")
    assert main(many.generate(out=many.out)) == 2
    err = capsys.readouterr().err
    assert "'classes'" in err
    assert "--overwrite" in err
    assert files(many.out) == before


@pytest.mark.parametrize("first", ["shard", "whole"])
def test_a_photo_that_changes_is_made_once_whichever_journal_knows_it(many, capsys, first):
    """A line of any journal that agrees is enough."""
    shard = ("--shard", "1/1")
    orders = {"shard": (shard, ()), "whole": ((), shard)}[first]
    for options in orders:
        assert main(many.generate(*options, out=many.out)) == 0
    path = many.images / "photo03.png"
    Image.open(path).transpose(Image.Transpose.ROTATE_180).save(path)
    for options, made in ((orders[1], 1), (orders[0], 0), (orders[1], 0), (orders[0], 0)):
        capsys.readouterr()
        assert main(many.generate(*options, out=many.out)) == 0
        assert f"{made} masks made, {24 - made} were there" in capsys.readouterr().err


def test_skipped_photos_stand_in_the_journal_and_are_tried_again(many, capsys):
    path = many.images / "photo05.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    assert main(many.generate(out=many.out)) == 1
    assert "photo05.png" in journal(many.out)["photo05"]["skipped"]
    path.write_bytes(whole)
    capsys.readouterr()
    assert main(many.generate(out=many.out)) == 0
    assert "1 masks made, 23 were there already" in capsys.readouterr().err
    assert journal(many.out)["photo05"]["skipped"] == ""


# Batches


@pytest.mark.parametrize("method", ["pmm", "cam"])
def test_batches_make_the_masks_of_single_photos(many, method):
    """Photos of one size go through the network together, whatever they show."""
    assert main(many.generate("--method", method, out=many.root / "singles")) == 0
    assert main(many.generate("--method", method, "--batch-size", "5", out=many.out)) == 0
    for name in many.names:
        one, other = (io.read_mask(folder / f"{name}.png") for folder in (many.root / "singles", many.out))
        assert (one == other).double().mean() > 0.999, name
        one, other = (
            io.read_cam(folder / "maps" / f"{name}.npz") for folder in (many.root / "singles", many.out)
        )
        assert torch.equal(one.keys, other.keys)
        torch.testing.assert_close(one.cams, other.cams, rtol=0, atol=1e-3)


def test_gradients_in_batches(many):
    options = ("--maps", "gradcam", "--no-crf")
    assert main(many.generate(*options, out=many.root / "singles")) == 0
    assert main(many.generate(*options, "--batch-size", "8", out=many.out)) == 0
    for name in many.names:
        one, other = (
            io.read_cam(folder / "maps" / f"{name}.npz") for folder in (many.root / "singles", many.out)
        )
        torch.testing.assert_close(one.cams, other.cams, rtol=0, atol=2e-3)


def test_a_broken_photo_harms_none_of_its_batch(many, capsys):
    (many.images / "photo06.png").write_bytes((many.images / "photo06.png").read_bytes()[:200])
    assert main(many.generate("--batch-size", "8", out=many.out)) == 1
    err = capsys.readouterr().err
    assert "23 masks made" in err
    assert err.count("skipped photo06.png") == 1


def test_batches_follow_from_all_photos(many, monkeypatch):
    """So that the bytes of a mask do not depend on which others were there already."""
    from pseudolabel.cli import _mask_maker

    batches = []
    make = _mask_maker.MaskMaker.__call__

    def watched(self, photos, labels):
        batches.append([photo.stem for photo in photos])
        return make(self, photos, labels)

    monkeypatch.setattr(_mask_maker.MaskMaker, "__call__", watched)
    options = ("--batch-size", "4", "--workers", "1", "--no-crf")
    assert main(many.generate(*options, out=many.out)) == 0
    first = sorted(batches)
    assert sorted(len(batch) for batch in first) == [1, 3, 4, 4, 4, 4, 4]  # photo07 has no label
    assert ["photo07"] in first
    (many.out / "photo12.png").unlink()
    (many.out / "photo08.png").unlink()
    batches.clear()
    assert main(many.generate(*options, out=many.out)) == 0
    assert sorted(batches) == [batch for batch in first if {"photo12", "photo08"} & set(batch)]


def test_the_batch_size_of_a_method_that_has_none(many, capsys):
    assert main(many.generate("--method", "infercam", "--batch-size", "2", out=many.out)) == 2
    assert "--batch-size" in capsys.readouterr().err


# Several runs


@pytest.mark.parametrize("parts", [1, 3, 30])
def test_shards_make_all_together(many, parts, capsys):
    assert main(many.generate(out=many.root / "whole")) == 0
    for part in range(1, parts + 1):
        assert main(many.generate("--shard", f"{part}/{parts}", out=many.out)) == 0
    assert files(many.out) == files(many.root / "whole")
    assert set(journal(many.out)) == set(many.names)
    capsys.readouterr()
    assert main(many.generate(out=many.out)) == 0
    assert "24 were there already" in capsys.readouterr().err


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "1/0", "-1/2", "a/b", "1/2/3", "²/3"])
def test_a_shard_that_is_none(many, capsys, shard):
    assert main(many.generate("--shard", shard, out=many.out)) == 2
    assert "--shard" in capsys.readouterr().err


def test_shards_report_what_is_missing_once(many, capsys):
    names = [*many.names[1:], "nowhere"]
    many.write_labels(names, torch.ones(24, 6, dtype=torch.bool))
    codes = [main(many.generate("--shard", f"{part}/2", "--no-crf", out=many.out)) for part in (1, 2)]
    assert sorted(codes) in ([0, 1], [1, 1])
    err = capsys.readouterr().err
    assert err.count("without a row in") == 1
    assert err.count("without a photo in") == 1


@pytest.mark.parametrize("shards", [False, True])
def test_two_runs_into_one_folder(many, shards):
    assert main(many.generate(out=many.root / "whole")) == 0
    runs = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "pseudolabel"),
                *many.generate(*(["--shard", f"{part}/2"] if shards else []), out=many.out),
            ],
            env=ENVIRONMENT,
            stderr=subprocess.PIPE,
        )
        for part in (1, 2)
    ]
    for run in runs:
        _, err = run.communicate(timeout=120)
        assert run.returncode == 0, err
    assert files(many.out) == files(many.root / "whole")
    assert set(journal(many.out)) == set(many.names)


SLOW_MODEL = """
import time
from pseudolabel.cli.demo import classifier

def slow():
    model = classifier()
    model.register_forward_pre_hook(lambda *_: time.sleep(0.2))
    return model
"""


def test_a_run_with_other_settings_leaves_a_folder_in_work_alone(many, capsys):
    (many.root / "slow_model.py").write_text(SLOW_MODEL)
    arguments = [
        "slow_model:slow" if word.endswith(":classifier") else word for word in many.generate(out=many.out)
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "pseudolabel", *arguments], cwd=many.root, env=ENVIRONMENT,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while len(list(many.out.glob("*.png"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        for more in ([], ["--overwrite"]):
            assert main(many.generate("--alpha", "3", *more, out=many.out)) == 2
            err = capsys.readouterr().err
            assert "another run is making masks here" in err
            assert "'alpha': 11" in err
        assert process.poll() is None
        assert len(list(many.out.glob("*.png"))) >= 2
    finally:
        process.kill()
        process.wait()


def test_maps_of_other_settings_are_not_mixed(many, capsys):
    """Those of other masks may be: the background is none of the maps' business."""
    cams = ("--no-crf", "--save-cams", str(many.root / "cams"))
    assert main(many.generate(*cams, out=many.root / "one")) == 0
    before = files(many.root / "cams")
    assert main(many.generate(*cams, "--method", "cam", out=many.root / "two")) == 0
    assert files(many.root / "cams") == before
    for more in (("--no-flip",), ("--method", "infercam")):
        assert main(many.generate(*cams, *more, out=many.root / "three")) == 2
        err = capsys.readouterr().err
        assert "cams: holds maps made with" in err
        assert "--save-cams" in err
    assert files(many.root / "cams") == before
    assert main(many.generate(*cams, "--no-flip", "--overwrite", out=many.root / "three")) == 0
    assert files(many.root / "cams") != before


def test_masks_and_maps_in_one_folder(many):
    cams = ("--no-crf", "--save-cams", str(many.out))
    for _ in range(2):
        assert main(many.generate(*cams, out=many.out)) == 0
    assert len(files(many.out)) == 2 * len(many.names) + 1


# Disks


def in_own_namespace(*command: str) -> list[str]:
    return ["unshare", "--map-root-user", "--mount", *command]


def can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    test = in_own_namespace("mount", "-t", "tmpfs", "tmpfs", "/tmp")
    return subprocess.run(test, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="needs Linux and the right to mount a file system of its own")
@pytest.mark.parametrize("kilobytes", [4, 100])
def test_a_disk_that_fills_up(many, kilobytes):
    """A real one: a file system of few kilobytes, which nobody but the run sees; then it gets larger."""
    assert main(many.generate(out=many.root / "whole")) == 0
    disk, kept, full = many.root / "disk", many.root / "kept", many.root / "full"
    for folder in (disk, kept, full):
        folder.mkdir()
    words = [sys.executable, "-m", "pseudolabel", *many.generate(out=disk / "out")]
    script = f"""
        mount -t tmpfs -o size={kilobytes}k tmpfs {disk} || exit 90
        "$@" 2> {many.root}/first.txt && exit 91
        test $? = 2 || exit 92
        cp -r {disk}/out {full}/ || exit 93
        mount -o remount,size=10m {disk} || exit 94
        "$@" 2> {many.root}/second.txt || exit 95
        cp -r {disk}/out {kept}/
    """
    done = subprocess.run(in_own_namespace("sh", "-c", script, "sh", *words), env=ENVIRONMENT, check=False)
    assert done.returncode == 0
    said, whole = (many.root / "first.txt").read_text(), files(many.root / "whole")
    assert "No space left on device" in said
    assert str(disk / "out") in said
    so_far = files(full / "out")
    assert so_far.items() <= whole.items()
    assert not list((full / "out").rglob(".*.tmp"))
    if kilobytes > 4:
        masks = [name for name in so_far if name.endswith(".png")]
        assert 0 < len(masks) < 24
        assert "masks were made, all whole, and the same command goes on from there" in said
    assert files(kept / "out") == whole
