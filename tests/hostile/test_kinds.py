"""How many kinds of hostile input there are, and that docs/security.md tells them all.

`python tests/hostile/test_kinds.py` writes the tables of that page anew.
"""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/security.md"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"hostile_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


arguments, files = load("test_arguments"), load("test_files")


def rows(kinds: dict[tuple[str, str], list[str]]) -> str:
    """Lines of a table: a group, its kinds, what they end in."""
    return "\n".join(
        f"| {group} | {'; '.join(names)} | {end} |".replace("\\", "\\\\")
        for (group, end), names in kinds.items()
    )


def tables() -> dict[str, str]:
    """The three tables of the page."""
    found: dict[str, dict[tuple[str, str], list[str]]] = {"arguments": {}, "files": {}, "writing": {}}
    for label, kind in arguments.KINDS.items():
        group, name = label.split(": ", 1)
        found["arguments"].setdefault((group, kind.end), []).append(name)
    for label, kind in files.KINDS.items():
        readers = "any file" if kind.readers == files.ALL else ", ".join(kind.readers)
        end = kind.end.__name__ if kind.end else "a result"
        found["files"].setdefault((readers, f"`{end}`" if kind.end else end), []).append(label)
    for label, (_, end) in files.WRITING.items():
        found["writing"].setdefault(("any writer", f"`{end.__name__}`"), []).append(label)
    return {name: rows(kinds) for name, kinds in found.items()}


def page(text: str) -> str:
    """The text of the page with the tables and the number of today."""
    for name, table in tables().items():
        head, rest = text.split(f"<!-- {name} -->\n\n")
        titles, line, rest = rest.split("\n", 2)
        while rest.startswith("|"):
            rest = rest.split("\n", 1)[1]
        text = f"{head}<!-- {name} -->\n\n{titles}\n{line}\n{table}\n{rest}"
    return re.sub(r"these \d+ kinds", f"these {count()} kinds", text)


def count() -> int:
    return len(arguments.KINDS) + len(files.KINDS) + len(files.WRITING)


def test_there_are_many() -> None:
    assert len(arguments.KINDS) >= 100
    assert len(files.KINDS) >= 190
    assert count() >= 350


def test_the_page_tells_them() -> None:
    text = PAGE.read_text()
    assert all(table in text for table in tables().values())
    assert page(text) == text, "write it anew: python tests/hostile/test_kinds.py"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
