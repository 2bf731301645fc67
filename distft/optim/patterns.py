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
        f"near it are {', '.join(map(repr, near)) or 'no names at all'}."
    )
