"""Makes docs/modules.md from the first line of every module: `python tools/module_table.py --write`."""

import argparse
import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "modules.md"
_PREAMBLE = """\
# Modules

Every module and script in a line: the first of its docstring or leading comment. Made by
`python tools/module_table.py --write`; a test compares the two.
"""


def document() -> str:
    """The text of docs/modules.md: one table per folder."""
    return "\n".join([_PREAMBLE, *_tables()])


def _tables() -> Iterator[str]:
    for top in ("distft", "launch", "tools"):
        subfolders = sorted(path for path in (ROOT / top).rglob("*") if path.is_dir())
        for folder in [ROOT / top, *subfolders]:
            files = _documented_files(folder)
            if files:
                yield f"## {folder.relative_to(ROOT).as_posix()}\n\n| Module | What it is |\n|---|---|"
                for path in files:
                    description = _first_paragraph(path).replace("|", r"\|")
                    yield f"| `{path.name}` | {description} |"
                yield ""


def _documented_files(folder: Path) -> list[Path]:
    if folder.name == "__pycache__":
        return []
    return sorted(path for path in folder.iterdir() if path.is_file() and path.name != "__init__.py")


def _first_paragraph(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0].replace("\n", " ")
    return next(line[2:] for line in text.splitlines() if line.startswith("# "))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write docs/modules.md instead of printing it")
    if parser.parse_args().write:
        DOCUMENT.write_text(document(), encoding="utf-8")
    else:
        print(document(), end="")
