"""The README says what is there: each module once, in the words of its own docstring, and runs that parse."""

import importlib.util
import re
from pathlib import Path

import pytest

from distft.config import parse, parse_yaml
from distft.run.config import RunConfig

ROOT = Path(__file__).resolve().parent.parent
_spec = importlib.util.spec_from_file_location("module_table", ROOT / "tools" / "module_table.py")
assert _spec is not None
assert _spec.loader is not None
module_table = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(module_table)
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_module_has_its_line() -> None:
    expected = list(module_table.rows())
    written = [line for line in README.splitlines() if re.match(r"\| `(distft|launch|tools)/", line)]
    assert written == expected, "Put into the README what tools/module_table.py prints"


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
