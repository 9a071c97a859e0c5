"""The files that `make test-floors` and `make test-newest` install say what pyproject.toml does."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLOORS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]


def constraints(name: str) -> list[str]:
    return [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]


def test_floors() -> None:
    """The oldest releases that are tested are those that the package asks for: no more, no less."""
    assert sorted(constraints("constraints-floors.txt")) == sorted(
        floor.replace(">=", "==") for floor in FLOORS
    )


def test_newest() -> None:
    """Each dependency has one newest release, not below its floor."""
    floors = dict(floor.split(">=") for floor in FLOORS)
    newest = dict(pin.split("==") for pin in constraints("constraints-newest.txt"))
    assert newest.keys() == floors.keys()
    for name, release in newest.items():
        assert [int(part) for part in release.split(".")] >= [int(part) for part in floors[name].split(".")]
