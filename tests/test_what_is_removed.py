"""Each place that removes, renames or overwrites is in docs/what_is_removed.md, with its proof."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "what_is_removed.md"
FOLDERS = ("distft", "launch")
# Methods and functions of os, pathlib, shutil, fsspec and `distft.storage`.
REMOVING = {
    "unlink",
    "rmtree",
    "rmdir",
    "removedirs",
    "remove_tree",
    "remove_files",
    "remove_temporary_files",
    "rm",
    "rm_file",
    "rename",
    "renames",
    "move",
    "truncate",
    "ftruncate",
    "commit_bytes",
    "open_write",
    "write_text",
    "write_bytes",
    "symlink_to",
}
_ROW = re.compile(r"^\| `([\w/]+\.py)` +`([\w.]+)` +\|")


def places(source: str) -> Iterator[str]:
    """The qualified names of the functions in `source` that call something that removes or overwrites."""

    def visit(node: ast.AST, scope: tuple[str, ...]) -> Iterator[str]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            scope = (*scope, node.name)
        if isinstance(node, ast.Call) and removes(node):
            yield ".".join(scope) or "module"
        for child in ast.iter_child_nodes(node):
            yield from visit(child, scope)

    yield from visit(ast.parse(source), ())


def removes(call: ast.Call) -> bool:
    name = called_name(call)
    if name == "replace":  # of a path: str.replace and dataclasses.replace have other arguments
        is_method = isinstance(call.func, ast.Attribute)
        owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
        return owner == "os" or (is_method and len(call.args) == 1 and not call.keywords)
    if name == "remove":  # of storage: list.remove takes no path
        owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else "remove"
        return owner in {"os", "storage", "remove", "files"} or owner.endswith("log")
    if name == "open":
        return any(
            isinstance(mode, ast.Constant) and isinstance(mode.value, str) and is_writing_mode(mode.value)
            for mode in (*call.args, *(keyword.value for keyword in call.keywords))
        )
    return name in REMOVING


def called_name(call: ast.Call) -> str:
    match call.func:
        case ast.Attribute(attr=name) | ast.Name(id=name):
            return name
    return ""


def is_writing_mode(mode: str) -> bool:
    return re.fullmatch(r"[rwaxbt+]{1,3}", mode) is not None and bool(set(mode) & set("wax+"))


def found_places() -> set[tuple[str, str]]:
    return {
        (path.relative_to(ROOT).as_posix(), place)
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        for place in places(path.read_text())
    }


def documented_places() -> set[tuple[str, str]]:
    rows = map(_ROW.match, DOCUMENT.read_text().splitlines())
    return {(row[1], row[2]) for row in rows if row is not None}


def test_each_place_that_removes_or_overwrites_is_documented() -> None:
    assert found_places() - documented_places() == set()


def test_no_documented_place_is_gone() -> None:
    assert documented_places() - found_places() == set()


@pytest.mark.parametrize(
    "line",
    [
        "path.unlink()",
        "os.replace(a, b)",
        "temporary.replace(path)",
        "shutil.rmtree(path, ignore_errors=True)",
        "storage.remove(path)",
        "path.open('w')",
        "open(path, mode='r+b')",
        "os.rename(a, b)",
    ],
)
def test_the_search_sees(line: str) -> None:
    assert list(places(f"def f():\n    {line}\n")) == ["f"]


@pytest.mark.parametrize("line", ["text.replace('a', 'b')", "names.remove(name)", "path.open('rb')"])
def test_the_search_passes_over(line: str) -> None:
    assert list(places(f"def f():\n    {line}\n")) == []
