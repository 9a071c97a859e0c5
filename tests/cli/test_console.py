"""Work in threads, and the progress bar."""

import io
import threading
import time

import pytest
import torch
from rich.console import Console

from pseudolabel.cli import _console
from pseudolabel.cli._console import UserError, as_done, find_masks, in_threads, progress, report
from pseudolabel.cli._text import one_line


def test_results_are_all_there_in_the_order_of_the_items_or_of_their_ends():
    def work(number):
        time.sleep(0.02 * (number == 0))
        return -number

    numbers = list(range(40))
    assert in_threads(work, numbers, workers=3, description="") == [-number for number in numbers]
    ended = list(as_done(work, iter(numbers), workers=3))
    assert sorted(ended, reverse=True) == [-number for number in numbers]
    assert ended[0] != 0  # which took longer
    assert in_threads(work, [], workers=3, description="") == []


def test_items_are_taken_as_they_are_needed():
    """A million names wait as names, not as tasks."""
    taken, most = [], []

    def numbers():
        for number in range(100):
            taken.append(number)
            yield number

    for done, _ in enumerate(as_done(lambda number: number, numbers(), workers=2), start=1):
        most.append(len(taken) - done)
    assert len(most) == 100
    assert max(most) <= 4  # in work, or next


def test_the_first_exception_stops_the_rest():
    seen = []

    def work(number):
        seen.append(number)
        if number == 5:
            raise ValueError("five")

    with pytest.raises(ValueError, match="five"):
        list(as_done(work, range(1000), workers=2))
    assert len(seen) < 20
    with pytest.raises(ValueError, match="five"):
        in_threads(work, range(1000), workers=2, description="")


def test_threads_are_ended_and_the_setting_is_put_back():
    threads, before = torch.get_num_threads(), threading.active_count()
    torch.set_num_threads(threads + 1)
    try:
        results = as_done(lambda _: torch.get_num_threads(), range(10), workers=3)
        assert next(results) == 1
        results.close()
        assert torch.get_num_threads() == threads + 1
        assert threading.active_count() == before
    finally:
        torch.set_num_threads(threads)


def test_the_bar_tells_rate_and_time_left(monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    monkeypatch.setattr(_console, "stderr", lambda: console)
    with progress("make", 4) as step:
        for _ in range(4):
            time.sleep(0.01)
            step()
    last = [line for line in console.file.getvalue().splitlines() if "make" in line][-1]
    assert "4/4" in last
    assert "/s" in last
    assert last.count("0:00:0") == 2  # since the start, and to the end


class Deaf(io.StringIO):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text=""):
        raise self.error

    flush = write


@pytest.mark.parametrize(
    "error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "full"), ValueError("closed")]
)
def test_messages_that_nobody_reads_stop_no_work(monkeypatch, error):
    monkeypatch.setattr("sys.stderr", Deaf(error))
    report("one")
    with progress("make", 2) as step:
        step()
        step()
    assert in_threads(abs, [-1, 2], workers=2, description="work") == [1, 2]


def test_whoever_interrupts_is_told_what_is_waited_for(capsys):
    def work(number):
        time.sleep(0.02)
        return number

    results = as_done(work, range(10), workers=2)
    next(results)
    with pytest.raises(KeyboardInterrupt):
        results.throw(KeyboardInterrupt)
    assert "in work are finished first" in capsys.readouterr().err


def test_two_masks_of_one_name(tmp_path):
    for name in ("a.png", "b.png", "a.txt", "b.png.png"):
        (tmp_path / name).touch()
    assert set(find_masks(tmp_path)) == {"a", "b", "b.png"}
    (tmp_path / "a.PNG").touch()
    if len(list(tmp_path.iterdir())) == 5:  # as names are told apart by their letters' case
        with pytest.raises(UserError, match=r"'a\.PNG' and 'a\.png'"):
            find_masks(tmp_path)


def test_lines_where_there_is_no_terminal(monkeypatch, capsys):
    """Such as the log of a job: one a minute, and the last."""
    now = iter([0, *range(30, 271, 30)])  # a step takes half a minute
    monkeypatch.setattr(_console.time, "monotonic", lambda: next(now))
    with progress("make", 9) as step:
        for _ in range(9):
            step()
    lines = [line for line in capsys.readouterr().err.splitlines() if "make" in line]
    assert lines == [
        "make: 2/9, 0.0333/s, 0:01:00 since the start, 0:03:30 left",
        "make: 4/9, 0.0333/s, 0:02:00 since the start, 0:02:30 left",
        "make: 6/9, 0.0333/s, 0:03:00 since the start, 0:01:30 left",
        "make: 8/9, 0.0333/s, 0:04:00 since the start, 0:00:30 left",
        "make: 9/9, 0.0333/s, 0:04:30 since the start, 0:00:00 left",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a\nb  c\t", "a b c"),
        ("photo\x1b]0;owned\x07\x1b[31m.png", r"photo\x1b]0;owned\x07\x1b[31m.png"),
        ("\u202egnp.a \udcff", r"\u202egnp.a \udcff"),
        ("größe 犬 [bold]", "größe 犬 [bold]"),
    ],
)
def test_names_of_files_cannot_steer_the_terminal(text, said):
    assert one_line(text) == said
