"""Classification task from Python's standard library: predict the area that a function is from.

Areas group modules by subject. Python versions differ (3.12 has no `distutils`), and some systems package
modules separately: areas that are absent or too small to learn from are left out.
"""

import ast
import hashlib
import json
import os
import platform
import sysconfig
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from distft.errors import ConfigError, DataError
from distft.storage import AnyPath, commit_bytes, exists, is_directory, join, read_bytes, size

AREAS: tuple[tuple[str, str], ...] = (
    ("archives", "tarfile zipfile gzip bz2 lzma _compression compression zipapp"),
    ("arguments", "argparse optparse getopt configparser"),
    ("asyncio", "asyncio asyncore asynchat"),
    ("dates", "datetime _pydatetime calendar zoneinfo _strptime"),
    ("debugging", "pdb bdb trace profile cProfile pstats traceback tracemalloc"),
    ("distribution", "distutils ensurepip venv sysconfig"),
    ("email", "email mailbox mailcap mimetypes"),
    ("encodings", "encodings codecs"),
    ("files", "pathlib os shutil tempfile glob posixpath ntpath fileinput filecmp _pyio"),
    ("http", "http wsgiref xmlrpc cgi socketserver"),
    ("idlelib", "idlelib"),
    ("importlib", "importlib zipimport pkgutil modulefinder runpy"),
    ("introspection", "inspect ast _ast_unparse dis symtable tokenize pyclbr"),
    ("lib2to3", "lib2to3"),
    ("logging", "logging"),
    ("numbers", "_pydecimal fractions numbers statistics random"),
    ("parallel", "multiprocessing concurrent threading queue subprocess"),
    ("protocols", "ftplib imaplib nntplib poplib smtpd smtplib socket ssl telnetlib"),
    ("serialization", "pickle pickletools shelve copy copyreg dbm json"),
    ("terminal", "_pyrepl curses cmd code rlcompleter"),
    ("tkinter", "tkinter turtle"),
    ("types", "typing dataclasses enum abc types"),
    ("unittest", "unittest doctest"),
    ("urllib", "urllib"),
    ("xml", "xml plistlib html"),
)
_NOT_STDLIB = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
_MIN_LINES, _MAX_LINES = 4, 60  # shorter functions do not show their area, longer ones exceed a row
_MIN_FUNCTIONS = 40  # per area: 8 of them are test data, and fewer measure nothing
_TEST_FRACTION = 0.2


@dataclass(frozen=True, slots=True)
class Function:
    """A function or method of the standard library."""

    text: str  # source, dedented
    label: str  # area
    origin: str  # file relative to the library, and line


@dataclass(frozen=True, kw_only=True, slots=True)
class StdlibTask:
    """Statistics of the written task; `task.json` contains them."""

    python: str  # version of the interpreter that parsed the library
    num_train: int
    num_test: int
    areas: dict[str, int]  # number of functions by area


def write_stdlib_task(directory: AnyPath, root: AnyPath | None = None) -> StdlibTask:
    """Write `train.jsonl` and `test.jsonl` (text, label, origin), and `task.json` last.

    `root` is a standard library; None: this interpreter's. Equal libraries give equal files. A fifth of each
    area's functions, selected by digest, is test data. Functions with equal text are used once, so the
    splits do not overlap. Raises `DataError` if `root` has fewer than two areas, and `ConfigError` if other
    files with these names are in `directory`: they are not overwritten.
    """
    library = Path(sysconfig.get_path("stdlib") if root is None else root)
    functions = find_functions(library)
    areas = dict(sorted(Counter(function.label for function in functions).items()))
    if len(areas) < 2:
        raise DataError(
            f"{os.fspath(library)} has {len(functions)} functions in {len(areas)} known areas of the "
            "standard library, but at least 2 areas are needed: use a Python with library sources."
        )
    train, test = split(functions)
    task = StdlibTask(python=platform.python_version(), num_train=len(train), num_test=len(test), areas=areas)
    files = {
        join(directory, "test.jsonl"): _jsonl(test),
        join(directory, "train.jsonl"): _jsonl(train),
        join(directory, "task.json"): json.dumps(asdict(task), indent=2).encode() + b"\n",
    }
    if others := [path for path, data in files.items() if exists(path) and not _has_content(path, data)]:
        raise ConfigError(f"{', '.join(others)} would be overwritten: choose another directory.")
    for path, data in files.items():
        commit_bytes(path, data)
    return task


def _has_content(path: str, data: bytes) -> bool:
    return not is_directory(path) and size(path) == len(data) and read_bytes(path) == data


def find_functions(library: Path) -> list[Function]:
    """The functions of every area that is large enough, in order of file and line, without duplicates."""
    functions: dict[str, Function] = {}
    for area, modules in AREAS:
        for module in modules.split():
            for path in _module_files(library, module):
                for function in _functions_in(path, path.relative_to(library).as_posix(), area):
                    functions.setdefault(function.text, function)
    counts = Counter(function.label for function in functions.values())
    return [function for function in functions.values() if counts[function.label] >= _MIN_FUNCTIONS]


def split(functions: list[Function]) -> tuple[list[Function], list[Function]]:
    """Training and test split. The smallest digests of each area are the test split."""
    by_area: dict[str, list[Function]] = {}
    for function in functions:
        by_area.setdefault(function.label, []).append(function)
    test: set[Function] = set()
    for area_functions in by_area.values():
        test.update(sorted(area_functions, key=_digest)[: round(len(area_functions) * _TEST_FRACTION)])
    return [f for f in functions if f not in test], [f for f in functions if f in test]


def _digest(function: Function) -> bytes:
    return hashlib.blake2b(function.text.encode(), digest_size=16).digest()


def _module_files(library: Path, module: str) -> list[Path]:
    single = library / f"{module}.py"
    package = sorted((library / module).rglob("*.py"))
    found = [path for path in package if not _NOT_STDLIB.intersection(path.relative_to(library).parts)]
    return [single, *found] if single.is_file() else found


def _functions_in(path: Path, name: str, area: str) -> Iterator[Function]:
    """Functions and methods of a file, without nested functions; none if the file cannot be parsed."""
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError):  # the library contains deliberately broken files
        return
    lines = source.splitlines(keepends=True)
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            text = _source(node, lines)
            if _MIN_LINES <= text.count("\n") + 1 <= _MAX_LINES:
                yield Function(text, area, f"{name}:{node.lineno}")
        else:
            pending.extend(reversed(list(ast.iter_child_nodes(node))))


def _source(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return textwrap.dedent("".join(lines[first - 1 : node.end_lineno])).strip()


def _jsonl(functions: list[Function]) -> bytes:
    return "".join(json.dumps(asdict(function)) + "\n" for function in functions).encode()
