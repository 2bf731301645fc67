"""Glob patterns over parameter names."""

import difflib
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that match a glob pattern, in their order; upper and lower case differ."""
    return [name for name in names if fnmatchcase(name, pattern)]


def no_match(setting: str, pattern: str, names: Sequence[str]) -> str:
    """What to tell of a pattern that matches nothing: the names that come near it, one of each kind."""
    kinds: dict[str, str] = {}
    for name in difflib.get_close_matches(pattern, names, n=len(names) or 1, cutoff=0.3):
        kinds.setdefault(re.sub(r"\d+", "*", name), name)
    near = list(kinds.values())[:3] or list(names[:3])
    return (
        f"{setting}: pattern {pattern!r} matches none of the {len(names)} parameters; "
        f"near it are {', '.join(map(repr, near)) or 'no names at all'}{_numbers(pattern, names)}."
    )


def _numbers(pattern: str, names: Sequence[str]) -> str:
    """The numbers that the names have where `pattern` has one that no name has."""
    number = re.search(r"\d+", pattern)
    if number is None:
        return ""
    before, after = pattern[: number.start()], pattern[number.end() :]
    known = sorted({int(digits) for name in names for digits in re.findall(r"\d+", name)})
    found = [n for n in known if matching(f"{before}{n}{after}", names)]
    return f"; there are {before}{found[0]} to {before}{found[-1]}" if found else ""
