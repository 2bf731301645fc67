"""The README's table of modules, from their own first lines: `python tools/module_table.py`."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def rows() -> Iterator[str]:
    """A line of Markdown for each module and script, in the order of their paths."""
    for folder in ("distft", "launch", "tools"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and path.name != "__init__.py" and "__pycache__" not in path.parts:
                yield f"| `{path.relative_to(ROOT).as_posix()}` | {_first_words(path)} |"


def _first_words(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0].replace("\n", " ")
    return next(line[2:] for line in text.splitlines() if line.startswith("# "))


if __name__ == "__main__":
    print("\n".join(rows()))
