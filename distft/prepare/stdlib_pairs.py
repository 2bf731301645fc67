"""Pairs from Python's standard library: what a docstring says, and the function without its docstring."""

import ast
import hashlib
import json
import os
import platform
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from distft.errors import ConfigError, DataError
from distft.storage import AnyPath, commit_bytes, exists, is_directory, join, read_bytes, size

_NOT_STDLIB = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
_TEST_FRACTION = 0.15  # of the modules
_MIN_WORDS = 3  # of a docstring
_MIN_LINES = 2  # of a body: a single `raise NotImplementedError` or `pass` shows nothing


@dataclass(frozen=True, slots=True)
class Pair:
    """A function or method, and its docstring."""

    text: str  # the docstring's first paragraph
    positive: str  # the source without the docstring, dedented
    origin: str  # file relative to the library, and line


@dataclass(frozen=True, kw_only=True, slots=True)
class StdlibPairs:
    """Statistics of the written pairs; `pairs.json` contains them."""

    python: str  # version of the interpreter that parsed the library
    num_train: int
    num_test: int
    test_modules: list[str]


def write_stdlib_pairs(directory: AnyPath, root: AnyPath | None = None) -> StdlibPairs:
    """Write `train.jsonl` and `test.jsonl` (text, positive, origin), and `pairs.json` last.

    `root` is a standard library; None: this interpreter's. Equal libraries give equal files. The test pairs
    are those of held-out modules, selected by a digest of their names, without those whose docstring or
    source is also in a training module. Raises `DataError` if `root` has too few pairs, and `ConfigError` if
    other files with these names are in `directory`.
    """
    library = Path(sysconfig.get_path("stdlib") if root is None else root)
    train, test = split(find_pairs(library))
    if len(train) < 2 or len(test) < 2:
        raise DataError(
            f"{os.fspath(library)} has {len(train)} training and {len(test)} test functions with docstrings, "
            "but at least 2 of each are needed: use a Python with library sources."
        )
    modules = sorted({module_of(pair) for pair in test})
    pairs = StdlibPairs(
        python=platform.python_version(), num_train=len(train), num_test=len(test), test_modules=modules
    )
    files = {
        join(directory, "test.jsonl"): _jsonl(test),
        join(directory, "train.jsonl"): _jsonl(train),
        join(directory, "pairs.json"): json.dumps(asdict(pairs), indent=2).encode() + b"\n",
    }
    if others := [path for path, data in files.items() if exists(path) and not _has_content(path, data)]:
        raise ConfigError(f"{', '.join(others)} would be overwritten: choose another directory.")
    for path, data in files.items():
        commit_bytes(path, data)
    return pairs


def find_pairs(library: Path) -> list[Pair]:
    """The pairs of all modules, in order of file and line, each function's source once."""
    pairs: dict[str, Pair] = {}
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if not _NOT_STDLIB.intersection(relative.parts):
            for pair in _pairs_in(path, relative.as_posix()):
                pairs.setdefault(pair.positive, pair)
    return list(pairs.values())


def split(pairs: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Training and test split by top-level module: no module and no docstring is in both."""
    modules = sorted({module_of(pair) for pair in pairs}, key=_digest)
    held_out = set(modules[: round(len(modules) * _TEST_FRACTION)])
    train = [pair for pair in pairs if module_of(pair) not in held_out]
    known = {pair.text for pair in train}  # `ntpath` repeats the docstrings of `posixpath`
    return train, [pair for pair in pairs if module_of(pair) in held_out and pair.text not in known]


def module_of(pair: Pair) -> str:
    """The top-level module or package; an implementation such as `_pydecimal` is of its own."""
    return pair.origin.split(":")[0].split("/")[0].removesuffix(".py")


def _digest(module: str) -> bytes:
    return hashlib.blake2b(module.encode(), digest_size=16).digest()


def _pairs_in(path: Path, name: str) -> Iterator[Pair]:
    """Functions and methods with docstrings; none if the file cannot be parsed."""
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError):  # the library contains deliberately broken files
        return
    lines = source.splitlines(keepends=True)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            text = (ast.get_docstring(node) or "").split("\n\n")[0]
            if len(text.split()) >= _MIN_WORDS and len(node.body) > 1:
                positive = _without_docstring(node, lines)
                if positive.count("\n") >= _MIN_LINES:
                    yield Pair(" ".join(text.split()), positive, f"{name}:{node.lineno}")


def _without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    docstring = node.body[0]
    assert docstring.end_lineno is not None
    kept = [*lines[node.lineno - 1 : docstring.lineno - 1], *lines[docstring.end_lineno : node.end_lineno]]
    return textwrap.dedent("".join(kept)).strip()


def _has_content(path: str, data: bytes) -> bool:
    return not is_directory(path) and size(path) == len(data) and read_bytes(path) == data


def _jsonl(pairs: list[Pair]) -> bytes:
    return "".join(json.dumps(asdict(pair)) + "\n" for pair in pairs).encode()
