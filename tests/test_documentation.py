"""README.md and docs/: the configurations parse, the commands exist, the table of modules is up to date."""

import re
from pathlib import Path

import module_table
import pytest
from typer.main import get_command

from distft.cli.main import app
from distft.config import parse, parse_yaml
from distft.run.config import SEARCH_SECTION, RunConfig
from distft.search.settings import SearchConfig

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
YAML_BLOCKS = [
    (path.name, block)
    for path in DOCUMENTS
    for block in re.findall(r"```yaml\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
]
COMPLETE_CONFIG = YAML_BLOCKS[0][1]


def test_the_table_of_modules_has_the_first_line_of_every_module() -> None:
    written = module_table.DOCUMENT.read_text(encoding="utf-8")
    assert written == module_table.document(), "Run: python tools/module_table.py --write"


@pytest.mark.parametrize(("name", "block"), YAML_BLOCKS)
def test_every_configuration_shown_parses(name: str, block: str) -> None:
    raw = parse_yaml(block, source=name)
    if SEARCH_SECTION in raw:
        assert isinstance(parse(SearchConfig, raw.pop(SEARCH_SECTION)), SearchConfig)
    if "run_dir" not in raw:  # a section, shown without the rest of the configuration
        raw = parse_yaml(COMPLETE_CONFIG, source="README.md") | raw
    assert isinstance(parse(RunConfig, raw), RunConfig)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_shown_exists(path: Path) -> None:
    blocks = re.findall(r"```\w*\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for name, word in re.findall(r"^distft ([a-z]+)(?: ([a-z]+))?", "\n".join(blocks), re.MULTILINE):
        assert name in commands
        subcommands = getattr(commands[name], "commands", None)
        assert subcommands is None or word in subcommands, f"distft {name} {word}"


def test_the_readme_shows_commands_and_configurations() -> None:
    assert "README.md" in {name for name, _ in YAML_BLOCKS}
    assert re.search(r"^distft train", DOCUMENTS[0].read_text(encoding="utf-8"), re.MULTILINE)
