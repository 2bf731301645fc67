"""Which lines of a search's journal count: those with all that belongs to their kind, of a known trial."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distft.config import parse
from distft.errors import ConfigError
from distft.search.metrics import is_number
from distft.search.settings import SearchConfig

ENDED = ("completed", "stopped", "failed")  # states of trials that are not run again
FIRST_REPEAT = 1_000_000  # added to the number of a trial, it is that of its repetition
_MOST = 1e15  # no search has as many steps or seconds
_LARGEST = 1e300  # of a metric's value: an int may be larger than any float


def sound_lines(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of a journal without those that no search writes.

    Left out are those of an unknown kind, those in which a field is missing or of the wrong type, and those
    of a trial that the search does not have, or that no sound line has begun.
    """
    most = _num_points(records)
    known: set[int] = set()
    kept = []
    for record in records:
        if not _is_sound(record):
            continue
        kind = record["kind"]
        if kind == "trial":
            if most is not None and not _is_of_search(record, most):
                continue
            known.add(record["number"])
        elif kind != "search" and record["number"] not in known:
            continue
        kept.append(record)
    return kept


def _num_points(records: Sequence[Mapping[str, Any]]) -> int | None:
    """The most trials that the search has had, without repetitions; None if its settings do not tell."""
    counts = []
    for record in records:
        if record.get("kind") == "search":
            try:
                counts.append(parse(SearchConfig, record.get("search"), where="search").num_points)
            except ConfigError:
                return None
    return max(counts, default=None)


def _is_of_search(record: Mapping[str, Any], num_points: int) -> bool:
    number, repeated = record["number"], record.get("repeat_of")
    if repeated is None:
        return bool(number < num_points)
    return bool(repeated < num_points and number == FIRST_REPEAT + repeated)


def _is_sound(record: Mapping[str, Any]) -> bool:
    kind = record.get("kind")
    required = _REQUIRED.get(kind) if isinstance(kind, str) else None
    return (
        required is not None
        and all(name in record and is_right(record[name]) for name, is_right in required.items())
        and all(name not in record or is_right(record[name]) for name, is_right in _OPTIONAL.items())
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST


def _is_seconds(value: Any) -> bool:
    return is_number(value) and 0 <= value < _MOST


def _is_value(value: Any) -> bool:
    """A finite number, or null, as which NaN is written."""
    return value is None or (is_number(value) and abs(value) < _LARGEST)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_settings(value: Any) -> bool:
    return isinstance(value, Mapping)


_Check = Callable[[Any], bool]
_NUMBER: Mapping[str, _Check] = {"number": _is_count}
_REQUIRED: Mapping[str, Mapping[str, _Check]] = {  # fields by kind of line
    "search": {"version": _is_count, "search": _is_settings, "base": _is_settings},
    "trial": {**_NUMBER, "values": _is_settings},
    "start": _NUMBER,
    "again": _NUMBER,
    "fork": {**_NUMBER, "values": _is_settings},
    "result": {**_NUMBER, "run": _is_text, "run_dir": _is_text},
    "end": {**_NUMBER, "state": lambda value: isinstance(value, str) and value in ENDED},
}
_OPTIONAL: Mapping[str, _Check] = {
    "ranks": lambda value: _is_count(value) and value > 0,
    "repeat_of": lambda value: value is None or _is_count(value),
    "parent": _is_count,
    "time": _is_seconds,
    "reason": _is_text,
    "metric": lambda value: value is None or _is_text(value),
    "step": lambda value: value is None or _is_count(value),
    "value": _is_value,
    "metrics": lambda value: isinstance(value, Mapping) and all(map(_is_value, value.values())),
    "violations": lambda value: isinstance(value, list) and all(map(_is_text, value)),
    "is_complete": lambda value: isinstance(value, bool),
    "total_step": _is_count,
    "seconds": _is_seconds,
}
