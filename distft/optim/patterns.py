"""Selects parameters by glob patterns over their names, such as the trainable ones."""

import difflib
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from distft.errors import ConfigError


def select_trainable(names: Iterable[str], patterns: Sequence[str]) -> set[str]:
    """The names selected by glob `patterns`, applied from first to last.

    A pattern adds the names that it matches; with a `!` in front it removes them. `["*", "!embed*"]` selects
    all but the embeddings. Raises `ConfigError` that lists every pattern without a match, or if no name is
    selected.
    """
    known = list(names)
    selected: set[str] = set()
    errors = []
    for pattern in patterns:
        matches = matching_names(pattern.removeprefix("!"), known)
        if not matches:
            errors.append(no_match_message("trainable", pattern.removeprefix("!"), known))
        if pattern.startswith("!"):
            selected.difference_update(matches)
        else:
            selected.update(matches)
    if errors:
        raise ConfigError("\n".join(errors))
    if not selected:
        raise ConfigError(
            f"trainable={list(patterns)} leaves nothing to train of {len(known)} parameters: patterns apply "
            f"in order and a '!' removes, so begin with the parameters to train, such as '*'."
        )
    return selected


def matching_names(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that match a glob pattern, in order; case matters."""
    return [name for name in names if fnmatchcase(name, pattern)]


def no_match_message(setting: str, pattern: str, names: Sequence[str]) -> str:
    """The error text for a pattern without a match: it suggests similar names."""
    # Names that differ only in a number, such as the layer's, count as one suggestion.
    closest: dict[str, str] = {}
    for name in difflib.get_close_matches(pattern, names, n=len(names) or 1, cutoff=0.3):
        closest.setdefault(re.sub(r"\d+", "*", name), name)
    suggestions = list(closest.values())[:3] or list(names[:3])
    return (
        f"{setting}: pattern {pattern!r} matches none of the {len(names)} parameters; "
        f"the closest are {', '.join(map(repr, suggestions)) or 'none'}{_number_range(pattern, names)}."
    )


def _number_range(pattern: str, names: Sequence[str]) -> str:
    """Names the numbers that would match in place of the first number of `pattern`, if any."""
    number = re.search(r"\d+", pattern)
    if number is None:
        return ""
    before, after = pattern[: number.start()], pattern[number.end() :]
    known = sorted({int(digits) for name in names for digits in re.findall(r"\d+", name)})
    found = [n for n in known if matching_names(f"{before}{n}{after}", names)]
    return f"; {before}{found[0]} to {before}{found[-1]} exist" if found else ""
