"""Only regular files of a bounded size are opened."""

import os

import pytest

from pseudolabel.io._files import check_path, open_file


def test_what_is_opened(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    (tmp_path / "link").symlink_to(path)
    for name in (path, str(path), tmp_path / "link"):
        with open_file(name, max_bytes=3) as file:
            assert file.read() == b"abc"


def test_too_large(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    with pytest.raises(ValueError, match=r"a: the file takes 3 bytes, more than max_bytes=2"):
        open_file(tmp_path / "a", max_bytes=2)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX files")
def test_pipes_and_devices_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(ValueError, match=r"expected a regular file, got a pipe, socket or device"):
            open_file(path)


def test_file_system_errors_stay(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_file(tmp_path / "nowhere")
    with pytest.raises(OSError, match=tmp_path.name):
        open_file(tmp_path)


@pytest.mark.parametrize("path", [None, 3, b"a", ["a"]])
def test_no_path(path):
    with pytest.raises(TypeError, match=r"^path: expected a path, got"):
        check_path(path)


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_no_name(path):
    with pytest.raises(ValueError, match=r"^path: expected the name of a file, got"):
        check_path(path)
