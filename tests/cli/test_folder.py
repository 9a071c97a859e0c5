"""What a folder of masks knows: settings, who works there, and the journal."""

import errno
import json
import os
import sys
import threading
import time

import pytest
import torch

from pseudolabel import io
from pseudolabel.cli._console import UserError
from pseudolabel.cli._folder import Journal, token, working_in
from pseudolabel.cli._marks import mark
from pseudolabel.cli._mask_maker import Entry
from pseudolabel.io._atomic import remove_leftovers

# Of nobody's: lines that are JSON, and yet no entry.
ODD = b"""5
null
{"name": "cat"}
{"name": "cat", "photo": "a7", "labels": 3, "mask": "4e"}
{"name": "cat", "photo": "a7", "labels": [[]], "mask": "4e"}
{"name": "cat", "photo": "a7", "labels": [3, 7], "mask": "4e", "maps": "1f", "more": 1}
{"name": ["cat"], "photo": "a7", "labels": [3, 7], "mask": "4e", "maps": "1f"}
{"name": "cat", "photo": {}, "labels": [3, 7], "mask": "4e", "maps": "1f"}
"""

CAT = Entry("cat", photo="a7", labels=(3, 7), mask="4e", maps="1f")


def test_a_journal_knows_what_it_was_told(tmp_path):
    journal = Journal(tmp_path)
    assert not journal.knows(CAT)
    journal.add(CAT)
    journal.add(Entry("dog", "05", (), skipped="dog.jpg: cut\noff"))
    journal.add(Entry("ünïcode 犬 \udcff", "05", (), "07"))
    journal = Journal(tmp_path)
    assert journal.knows(CAT)
    assert journal.knows(CAT._replace(maps=""))  # where nobody asks for maps
    assert journal.knows(Entry("ünïcode 犬 \udcff", "05", (), "07"))
    assert not journal.knows(Entry("ünïcode 犬 \udcff", "05", (), "07", maps="1f"))
    for change in ({"photo": "a8"}, {"labels": (3,)}, {"mask": "4f"}, {"maps": "1e"}):
        assert not journal.knows(CAT._replace(**change))
    for name in ("dog", "cow"):
        assert not journal.knows(CAT._replace(name=name))
    assert not journal.knows(Entry("dog", "05", ()))
    lines = [json.loads(line) for line in (tmp_path / "pseudolabel.jsonl").read_text("utf-8").splitlines()]
    told = {"name": "cat", "photo": "a7", "labels": [3, 7], "mask": "4e", "maps": "1f", "skipped": ""}
    assert lines[0] == told
    assert lines[1]["skipped"] == "dog.jpg: cut\noff"


def test_each_line_of_a_photo_holds(tmp_path):
    """For they tell of contents: whichever the files have, they have from that line's run."""
    journal = Journal(tmp_path)
    journal.add(CAT)
    journal.add(CAT._replace(mask="50"))
    assert Journal(tmp_path).knows(CAT)
    assert Journal(tmp_path).knows(CAT._replace(mask="50"))
    assert not Journal(tmp_path).knows(CAT._replace(mask="51"))


@pytest.mark.parametrize("cut", range(1, 96, 6))
def test_a_line_that_was_cut_off_harms_no_other(tmp_path, cut):
    path, dog = tmp_path / "pseudolabel.jsonl", CAT._replace(name="dog")
    journal = Journal(tmp_path)
    journal.add(CAT)
    journal.add(dog)
    path.write_bytes(path.read_bytes()[:-cut])
    journal = Journal(tmp_path)
    assert journal.knows(dog) is (cut == 1)  # where the line's end alone is missing
    journal.add(CAT._replace(name="cow"))
    journal.add(dog)
    journal = Journal(tmp_path)
    assert all(journal.knows(entry) for entry in (CAT, dog, CAT._replace(name="cow")))


def test_lines_of_somebody_else_are_passed_over(tmp_path):
    path = tmp_path / "pseudolabel.jsonl"
    path.write_bytes(b'\xff\xfe\n[1]\n"cat"\n{}\n{"name": 3}\n\n' + b"[" * 100_000 + b"\n" + ODD)
    journal = Journal(tmp_path)
    assert not journal.knows(CAT)
    journal.add(CAT)
    assert Journal(tmp_path).knows(CAT)


@pytest.mark.skipif(sys.platform == "win32", reason="no such files")
@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("name", ["pseudolabel.jsonl", "pseudolabel-1-of-2.jsonl"])
def test_what_never_ends_is_no_journal(tmp_path, kind, name):
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=name):
        Journal(tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="no such files")
@pytest.mark.parametrize("name", [".pseudolabel.lock", "pseudolabel.json"])
def test_what_never_ends_is_no_lock_and_no_record(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=name), enter(tmp_path, {"alpha": 1}):
        pass


def test_shards_write_their_own_and_read_all(tmp_path):
    Journal(tmp_path, "-1-of-2").add(CAT)
    second = Journal(tmp_path, "-2-of-2")
    second.add(CAT._replace(name="dog"))
    assert second.knows(CAT)
    assert Journal(tmp_path).knows(CAT._replace(name="dog"))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["pseudolabel-1-of-2.jsonl", "pseudolabel-2-of-2.jsonl", "pseudolabel.jsonl"]


def test_several_write_into_one_journal(tmp_path):
    journals = [Journal(tmp_path) for _ in range(4)]

    def write(number):
        for place in range(100):
            journals[number].add(CAT._replace(name=f"{number}-{place}"))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    journal = Journal(tmp_path)
    assert all(journal.knows(CAT._replace(name=f"{n}-{place}")) for n in range(4) for place in range(100))


@pytest.mark.parametrize("cut", [0, 10])
def test_a_journal_on_a_full_disk(tmp_path, monkeypatch, cut):
    journal = Journal(tmp_path)
    write = os.write

    def full(descriptor, data):
        if not cut:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[:cut])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left on device") as caught:
            journal.add(CAT)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "pseudolabel.jsonl")
    journal = Journal(tmp_path)
    assert not journal.knows(CAT)
    journal.add(CAT)
    assert Journal(tmp_path).knows(CAT)


# Who works here


def enter(folder, settings, names=(), *, overwrite=False):
    return working_in(folder, settings, names, overwrite=overwrite)


def write_mask_of_ours(path):
    mask = torch.zeros(2, 3, dtype=torch.uint8)
    io.write_mask(path, mask, comment=mark(mask))


def test_settings_are_written_down_once_and_hold(tmp_path):
    with enter(tmp_path, {"alpha": 1}):
        pass
    write_mask_of_ours(tmp_path / "a.png")
    with enter(tmp_path, {"alpha": 1}):
        pass
    with pytest.raises(
        UserError, match=r"holds masks made with .*'alpha': 1.*, now .*'alpha': 2.*--overwrite"
    ):
        enter(tmp_path, {"alpha": 2}).__enter__()
    assert (tmp_path / "a.png").exists()
    Journal(tmp_path, "-1-of-3").add(CAT)
    with enter(tmp_path, {"alpha": 2}, ["a"], overwrite=True):
        assert not (tmp_path / "a.png").exists()
        assert not list(tmp_path.glob("*.jsonl"))
        assert json.loads((tmp_path / "pseudolabel.json").read_text())["settings"] == {"alpha": 2}


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks")
@pytest.mark.parametrize("overwrite", [False, True])
def test_who_joins_a_run_shares_its_settings_or_leaves(tmp_path, overwrite):
    with enter(tmp_path, {"alpha": 1}):
        (tmp_path / "a.png").write_bytes(b"mask")
        with enter(tmp_path, {"alpha": 1}, ["a"], overwrite=overwrite):
            pass
        with (
            pytest.raises(UserError, match=r"another run is making masks here with .*'alpha': 1.*--out"),
            enter(tmp_path, {"alpha": 2}, ["a"], overwrite=overwrite),
        ):
            pass
        assert (tmp_path / "a.png").exists()
    (tmp_path / "a.png").unlink()
    with enter(tmp_path, {"alpha": 2}):  # they have gone, and so have their masks
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks")
def test_runs_that_begin_together_agree_or_one_leaves(tmp_path):
    """Of many that begin at once with two kinds of settings, all that stay have the same."""
    stayed, barrier = [], threading.Barrier(8)

    def begin(kind):
        barrier.wait()
        try:
            with enter(tmp_path, {"kind": kind}):
                stayed.append(kind)
                time.sleep(0.3)
        except UserError:
            pass

    threads = [threading.Thread(target=begin, args=(number % 2,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stayed) == 4
    assert len(set(stayed)) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks")
def test_a_file_system_without_locks(tmp_path, monkeypatch):
    import fcntl

    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with enter(tmp_path, {"alpha": 1}):
        assert (tmp_path / "pseudolabel.json").exists()


def test_leftovers_of_killed_runs_go_and_nothing_else(tmp_path):
    old, new = tmp_path / ".0123456789abcdef.tmp", tmp_path / ".fedcba9876543210.tmp"
    others = [
        tmp_path / name for name in ("a.png", ".notes.tmp", "0123456789abcdef.tmp", ".0123456789ABCDEF.tmp")
    ]
    for path in (old, new, *others):
        path.write_bytes(b"")
    for path in (old, *others):
        os.utime(path, (0, 0))
    remove_leftovers(tmp_path)
    assert not old.exists()
    assert all(path.exists() for path in (new, *others))


def test_a_token_outlives_later_runs_and_not_its_own(tmp_path):
    """However long the run is: who joins it leaves the token, and who is alone removes what is left."""
    with enter(tmp_path, {"alpha": 1}), token(tmp_path) as path:
        os.utime(path, (0, 0))
        remove_leftovers(tmp_path)
        with enter(tmp_path, {"alpha": 1}):
            pass
        assert path.exists()
    assert not path.exists()
    path.touch()
    with enter(tmp_path, {"alpha": 1}):
        assert not path.exists()
