import subprocess
import sys

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
