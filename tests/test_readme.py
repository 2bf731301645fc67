"""The README says what is there: each module once, in the words of its own docstring, and runs that parse."""

import ast
import re
from pathlib import Path

import pytest

from distft.config import parse, parse_yaml
from distft.run.config import RunConfig

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _first_words(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0].replace("\n", " ")
    return next(line[2:] for line in text.splitlines()[1:] if line.startswith("# "))


def test_every_module_has_its_line() -> None:
    files = [
        path
        for folder in ("distft", "launch", "tools")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.is_file() and path.name != "__init__.py" and "__pycache__" not in path.parts
    ]
    expected = [f"| `{path.relative_to(ROOT).as_posix()}` | {_first_words(path)} |" for path in files]
    written = [line for line in README.splitlines() if re.match(r"\| `(distft|launch|tools)/", line)]
    missing = sorted(set(expected) - set(written))
    stale = sorted(set(written) - set(expected))
    assert not missing, "Add to the README:\n" + "\n".join(missing)
    assert not stale, "Remove from the README:\n" + "\n".join(stale)


@pytest.mark.parametrize("text", re.findall(r"```yaml\n(.*?)```", README, re.DOTALL))
def test_every_configuration_shown_is_one(text: str) -> None:
    assert isinstance(parse(RunConfig, parse_yaml(text, source="README.md")), RunConfig)


def test_every_verb_shown_exists() -> None:
    from distft.cli.main import app

    known = {command.name for command in app.registered_commands} | {
        group.name for group in app.registered_groups
    }
    shown = set(re.findall(r"^distft ([a-z]+)", README, re.MULTILINE))
    assert shown
    assert shown <= known
