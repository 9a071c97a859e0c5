import os
import subprocess
import sys
from pathlib import Path

import pytest

import pseudolabel
from pseudolabel.cli import main


@pytest.mark.parametrize("command", [[], ["demo"], ["generate"], ["evaluate"], ["view"]])
def test_help(command, capsys):
    assert main([*command, "--help"]) == 0
    assert "usage: pseudolabel" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"pseudolabel {pseudolabel.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "COMMAND"),
        (["paint"], "paint"),
        (["generate", "photos"], "--labels"),
        (["demo", "--images", "0"], "expected a number >= 1, got 0"),
        (["evaluate", "a", "b", "--pred-ignore", "maybe"], "maybe"),
    ],
)
def test_wrong_usage(arguments, said, capsys):
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def test_an_error_is_one_line_and_debug_shows_the_rest(capsys, tmp_path):
    missing = str(tmp_path / "nowhere")
    assert main(["evaluate", missing, missing]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"pseudolabel evaluate: error: {missing}: No such file or directory\n"
    for arguments in (["--debug", "evaluate", missing, missing], ["evaluate", missing, missing, "--debug"]):
        with pytest.raises(FileNotFoundError):
            main(arguments)


def test_a_fault_of_the_program_has_a_code_of_its_own(monkeypatch, capsys):
    """1 means that all was done but for some images."""

    def fail(_args):
        raise RuntimeError("unforeseen")

    monkeypatch.setattr("pseudolabel.cli.evaluate.run", fail)
    assert main(["evaluate", "a", "b"]) == 3
    assert "RuntimeError: unforeseen" in capsys.readouterr().err
    with pytest.raises(RuntimeError):
        main(["evaluate", "a", "b", "--debug"])


COMMANDS = {
    "generate": lambda data: data.generate(),
    "evaluate": lambda data: ["evaluate", str(data.truth), str(data.truth)],
    "json": lambda data: ["evaluate", str(data.truth), str(data.truth), "--json"],
}


def run_deaf(words, stream, how):
    """A command in a process of its own, one of whose streams takes nothing."""
    if how == "full":
        sink = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, sink = os.pipe()
        os.close(reader)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: sink}
    done = subprocess.run([sys.executable, "-m", "pseudolabel", *words], **streams, text=True, check=False)
    os.close(sink)
    return done


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device")
@pytest.mark.parametrize("how", ["full", "pipe"])
def test_messages_that_cannot_be_written_stop_nothing(data, how):
    (data.images / "photo1.png").write_bytes(b"no photo")  # which is reported
    done = run_deaf(data.generate(), "stderr", how)
    assert done.returncode == 1
    assert len(list(data.out.glob("*.png"))) == 4
    assert run_deaf(COMMANDS["json"](data), "stderr", how).returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device")
@pytest.mark.parametrize("how", ["full", "pipe"])
@pytest.mark.parametrize("command", ["evaluate", "json"])
def test_results_that_cannot_be_written_are_an_error(data, command, how):
    done = run_deaf(COMMANDS[command](data), "stdout", how)
    assert done.returncode == 2
    assert done.stderr.count("the results cannot be written") == 1
    assert "Traceback" not in done.stderr


def test_interrupted(monkeypatch, capsys):
    def interrupt(_args):
        raise KeyboardInterrupt

    monkeypatch.setattr("pseudolabel.cli.evaluate.run", interrupt)
    assert main(["evaluate", "a", "b"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_help_needs_no_torch():
    program = (
        "import sys\nfrom pseudolabel.cli import main\n"
        "assert main(['generate', '--help']) == 0\n"
        "assert not {'torch', 'numpy', 'rich'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_as_a_module(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "pseudolabel", "evaluate", str(tmp_path), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "no mask here" in done.stderr
    assert "Traceback" not in done.stderr
