"""Writers leave the old file or the new one, whole, and nothing else."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pseudolabel.io import ImageLabels, read_cam, read_mask, write_cam, write_labels, write_mask
from pseudolabel.io._atomic import write_atomically

SOURCE = Path(__file__).resolve().parents[2] / "src"
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and limits")


def write_by(kind, path):
    if kind == "mask":
        write_mask(path, torch.ones(4, 5, dtype=torch.uint8))
    elif kind == "cam":
        write_cam(path, torch.ones(2, 4, 5), torch.tensor([1, 0]))
    else:
        write_labels(path, ImageLabels(("a",), ("cat",), torch.ones(1, 1)))


WRITERS = [("mask", "a.png"), ("cam", "a.npz"), ("labels", "a.csv")]


def run(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_new_file_and_replacement(tmp_path):
    path = tmp_path / "größe 図.bin"
    write_atomically(path, b"old")
    write_atomically(str(path), b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@posix
def test_file_mode_follows_umask(tmp_path):
    old = os.umask(0o027)
    try:
        write_atomically(tmp_path / "a", b"")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_longest_file_name(tmp_path):
    path = tmp_path / ("n" * 255)
    write_atomically(path, b"x")
    assert path.read_bytes() == b"x"


@posix
def test_link_stays_a_link(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"old")
    link.symlink_to(target)
    write_atomically(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


@pytest.mark.parametrize(("kind", "name"), WRITERS)
@pytest.mark.parametrize("failing", ["open", "fsync", "replace"])
def test_full_disk_keeps_the_old_file(tmp_path, monkeypatch, kind, name, failing):
    path = tmp_path / name
    path.write_bytes(b"old")

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "hidden name")

    monkeypatch.setattr(os if failing == "fsync" else Path, failing, fail)
    with pytest.raises(OSError, match=f"No space left on device .*{name}") as caught:
        write_by(kind, path)
    monkeypatch.undo()
    assert caught.value.errno == errno.ENOSPC
    assert "hidden" not in str(caught.value)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_interruption_leaves_nothing(tmp_path, monkeypatch, error):
    def interrupt(_):
        raise error

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(error):
        write_atomically(tmp_path / "a", b"new")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("kind", "name"), WRITERS)
def test_missing_folder_is_named(tmp_path, kind, name):
    path = tmp_path / "missing" / name
    with pytest.raises(FileNotFoundError) as caught:
        write_by(kind, path)
    assert str(path) in str(caught.value)


def test_folder_in_the_way(tmp_path):
    (tmp_path / "a.png").mkdir()
    with pytest.raises(OSError, match=r"a\.png"):
        write_by("mask", tmp_path / "a.png")
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


@posix
def test_unwritable_folder(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError, match=r"a\.png"):
            write_by("mask", tmp_path / "a.png")
    finally:
        tmp_path.chmod(0o700)


@posix
def test_disk_that_fills_while_writing(tmp_path):
    """A limit on the size of files makes the system itself stop the write half-way."""
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    result = run(
        "import resource, sys; from pseudolabel.io._atomic import write_atomically\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: write_atomically(sys.argv[1], bytes(100_000))\n"
        "except OSError as error: print(error.errno, error.filename)",
        path,
    )
    assert result.stdout.split() == [str(errno.EFBIG), str(path)], result.stderr
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@posix
@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_kill_at_the_worst_moment(tmp_path, moment):
    path = tmp_path / "a.png"
    write_mask(path, torch.zeros(300, 300, dtype=torch.uint8))
    result = run(
        "import os, signal, sys, pathlib, torch; from pseudolabel.io import write_mask\n"
        "die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "if sys.argv[2] == 'fsync': os.fsync = die\n"
        "else: pathlib.Path.replace = die\n"
        "write_mask(sys.argv[1], torch.ones(300, 300, dtype=torch.uint8))",
        path,
        moment,
    )
    assert result.returncode == -signal.SIGKILL
    assert not read_mask(path).any()


@posix
def test_kill_at_any_moment(tmp_path):
    path = tmp_path / "a.npz"
    code = (
        "import sys, torch; from pseudolabel.io import write_cam\n"
        "for i in range(10**9):\n"
        "    write_cam(sys.argv[1], torch.full((1, 400, 500), i % 97 + 1.0), torch.ones(1))\n"
        "    print(i, flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    for written in (1, 4, 9):
        with subprocess.Popen(
            [sys.executable, "-c", code, str(path)], env=environment, stdout=subprocess.PIPE
        ) as process:
            for _ in range(written):
                process.stdout.readline()
            process.kill()
        values = read_cam(path).cams.unique()
        assert len(values) == 1
        assert values[0] >= written


@posix
def test_pipes_and_devices_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/null")
    for name in ("pipe", "device"):
        with pytest.raises(ValueError, match=f"{name}: expected a regular file to replace"):
            write_atomically(tmp_path / name, b"new")
    assert (tmp_path / "pipe").is_fifo()
    assert Path("/dev/null").is_char_device()


@posix
def test_link_to_itself_is_an_error(tmp_path):
    (tmp_path / "a").symlink_to("a")
    with pytest.raises(OSError, match=r"a'$") as caught:
        write_atomically(tmp_path / "a", b"new")
    assert caught.value.errno == errno.ELOOP
    assert (tmp_path / "a").is_symlink()
