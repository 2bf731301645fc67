"""Bounds of plain data, checked before it is copied: a short file can describe gigabytes.

An alias in YAML or a memo in a pickle makes one value appear many times. Each appearance counts here.
"""

import math
from collections.abc import Mapping
from typing import Any

from distft.errors import ConfigError

MOST_FILE_BYTES = 2 << 20  # of a YAML file; PyYAML may take 20 s for it
MOST_VALUES = 250_000  # values, and 64 characters of text count as one more
MOST_LEVELS = 64  # of mappings and lists inside each other
CHARACTERS_PER_VALUE = 64
_INTEGERS = range(-(1 << 63), 1 << 64)  # of 64 bits, with or without a sign
_MOST_PROBLEMS = 20  # in a message

_Path = tuple[Any, Any] | None  # the path of the parent, and the last key


def require_bounded(value: Any, where: str = "") -> None:
    """Raise `ConfigError` unless `value` (dicts, lists, scalars) is small enough to be copied and written.

    Refused are more than 250,000 values, more than 64 levels, integers beyond 64 bits, numbers that are not
    finite, and text with half a surrogate pair, which cannot be saved. `where` comes before the name of a
    setting. The check itself stops at the bound.
    """
    problems: list[str] = []
    num_values = 0
    stack: list[tuple[Any, int, _Path]] = [(value, 0, None)]
    while stack and len(problems) < _MOST_PROBLEMS:
        item, level, path = stack.pop()
        num_values += 1
        if isinstance(item, str):
            num_values += len(item) // CHARACTERS_PER_VALUE
        if num_values > MOST_VALUES:
            raise ConfigError(f"{where or 'The configuration'} {too_many()}.")
        if level > MOST_LEVELS:
            raise ConfigError(f"{where or 'The configuration'} {too_deep()}.")
        if problem := _problem(item):
            problems.append(f"{_dotted(path, where)}: {problem}.")
        elif isinstance(item, Mapping):
            stack += ((key, level, (path, key)) for key in item if isinstance(key, str))
            stack += ((child, level + 1, (path, key)) for key, child in item.items())
        elif isinstance(item, list | tuple | set | frozenset):
            stack += ((child, level + 1, (path, index)) for index, child in enumerate(item))
    if problems:
        raise ConfigError("\n".join(reversed(problems)))


def too_many() -> str:
    return f"has more than {MOST_VALUES:,} values, counting every repetition of an alias"


def too_deep() -> str:
    return f"has more than {MOST_LEVELS} mappings or lists inside each other"


def _problem(item: Any) -> str:
    if isinstance(item, int) and item not in _INTEGERS:
        return "the integer does not fit into 64 bits"
    if isinstance(item, float) and not math.isfinite(item):
        return f"{item} is not a finite number"
    if isinstance(item, str) and not item.isascii() and any("\ud800" <= c <= "\udfff" for c in item):
        return "the text contains half of a surrogate pair, which is not Unicode"
    return ""


def _dotted(path: _Path, where: str) -> str:
    names: list[str] = []
    while path is not None:
        path, name = path
        names.append(str(name).encode(errors="backslashreplace").decode()[:CHARACTERS_PER_VALUE])
    return ".".join(([where] if where else []) + names[::-1]) or "the value"
