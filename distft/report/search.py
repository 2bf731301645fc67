"""A search over settings, as its directory shows it: `search.json`, in which nothing is trusted."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from distft.errors import ConfigError
from distft.report.values import is_int, is_number
from distft.search.journal import JOURNAL_FILE
from distft.search.ranking import SEARCH_FILE, SEARCH_VERSION

_MOST_BYTES = 1 << 28
_MOST_SHOWN = 3  # problems of one file
_MOST_REASON = 500  # characters


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One trial of a search: the values that it tried, and what came of them."""

    number: int
    state: str
    reason: str  # why it failed or was stopped; may be empty
    violations: tuple[str, ...]  # constraints that it does not meet
    values: Mapping[str, Any]  # by dotted key of the settings
    metric: float | None
    spread: float | None  # over its seeds or folds
    metrics: Mapping[str, float]
    step: int | None
    seconds: float | None
    history: tuple[tuple[int, float], ...]  # steps and values of the metric


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedSearch:
    """A search over settings, whose trials are in the order of their numbers."""

    directory: Path
    metric: str
    direction: Literal["max", "min"]
    keys: tuple[str, ...]
    trials: tuple[Trial, ...]

    @classmethod
    def read(cls, directory: str | Path) -> Self:
        """Raises `ConfigError` for a file that is missing, damaged or of another kind."""
        path = Path(directory) / SEARCH_FILE
        raw = _Reader(_load(path))
        version = raw.optional("version", SEARCH_VERSION)
        if version > SEARCH_VERSION:
            raise ConfigError(
                f"{path} is of version {version}, and this distft reads up to {SEARCH_VERSION}: upgrade "
                "distft."
            )
        metric, direction = raw.text("metric"), raw.text("direction")
        space, trials = raw.value("space", Mapping), raw.value("trials", list)
        if direction and direction not in _DIRECTIONS:
            raw.problems.append(f"direction is {direction!r}, and must be min or max")
        keys = tuple(str(key) for key in space or {})
        found = [_trial(raw.inner(trial, f"trials.{i}"), keys) for i, trial in enumerate(trials or [])]
        if raw.problems:
            shown = "; ".join(raw.problems[:_MOST_SHOWN])
            more = f"; and {len(raw.problems) - _MOST_SHOWN} more" if len(raw.problems) > _MOST_SHOWN else ""
            raise ConfigError(f"{path} is damaged, or no search of distft: {shown}{more}.")
        return cls(
            directory=Path(directory),
            metric=metric,
            direction=_DIRECTIONS[direction],
            keys=keys,
            trials=tuple(sorted(found, key=lambda trial: trial.number)),
        )

    @property
    def ranked(self) -> list[Trial]:
        """The trials with a value of the metric, the best first; last those that violate a constraint."""
        done = [trial for trial in self.trials if trial.metric is not None]
        sign = -1 if self.direction == "max" else 1
        return sorted(done, key=lambda t: (bool(t.violations), sign * (t.metric or 0.0), t.number))


_DIRECTIONS: Mapping[str, Literal["max", "min"]] = {
    "max": "max",
    "maximize": "max",
    "min": "min",
    "minimize": "min",
}


def is_search(directory: Path) -> bool:
    """Whether a search has begun in this directory."""
    return any((directory / name).exists() for name in (SEARCH_FILE, JOURNAL_FILE))


def _load(path: Path) -> Any:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ConfigError(f"{path} has more than {_MOST_BYTES:,} bytes, so it is no search of distft.")
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        if (path.parent / JOURNAL_FILE).exists():
            raise ConfigError(
                f"{path.parent} is a search without {SEARCH_FILE}: the same `distft tune` command writes it."
            ) from None
        raise ConfigError(f"{path.parent} is no search: it has no {SEARCH_FILE}.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise ConfigError(f"{path} is damaged: it is no JSON ({reason}).") from None


class _Reader:
    """Values of a JSON object by type; what is wrong is collected in `problems`."""

    def __init__(self, raw: Any, where: str = "", problems: list[str] | None = None) -> None:
        self.problems: list[str] = [] if problems is None else problems
        self._where = where
        self._raw: Mapping[str, Any] = raw if isinstance(raw, Mapping) else {}
        if not isinstance(raw, Mapping):
            self.problems.append(f"{where or 'the file'} is no object")

    def inner(self, raw: Any, where: str) -> "_Reader":
        return _Reader(raw, where, self.problems)

    def value(self, name: str, kind: type) -> Any:
        found = self._raw.get(name)
        if isinstance(found, kind) and not isinstance(found, bool):
            return found
        self._refuse(name, {Mapping: "object", list: "list", str: "text", int: "integer"}.get(kind, "value"))
        return None

    def text(self, name: str) -> str:
        return self.value(name, str) or ""

    def number(self, name: str) -> float | None:
        """None also where it is null or missing."""
        found = self._raw.get(name)
        if found is None or is_number(found):
            return None if found is None else float(found)
        self._refuse(name, "number")
        return None

    def optional(self, name: str, default: Any) -> Any:
        """What is there, if it has the type of `default`; else `default`."""
        found = self._raw.get(name, default)
        if found is None or isinstance(found, type(default)):
            return default if found is None else found
        self._refuse(name, type(default).__name__)
        return default

    def pairs(self, name: str) -> tuple[tuple[int, float], ...]:
        """Steps with values, without those that are null."""
        found = self.optional(name, [])
        if not all(isinstance(p, list) and len(p) == 2 and is_int(p[0]) for p in found) or not all(
            p[1] is None or is_number(p[1]) for p in found
        ):
            self._refuse(name, "list of [step, value]")
            return ()
        return tuple((step, float(value)) for step, value in found if value is not None)

    def _refuse(self, name: str, kind: str) -> None:
        place = f"{self._where}.{name}" if self._where else name
        self.problems.append(f"{place} is {'missing' if name not in self._raw else f'no {kind}'}")


def _trial(raw: _Reader, keys: Sequence[str]) -> Trial:
    number, step = raw.value("number", int), raw.number("step")
    values = raw.value("values", Mapping) or {}
    metrics = raw.optional("metrics", {})
    return Trial(
        number=number if is_int(number) else 0,
        state=raw.text("state"),
        reason=raw.optional("reason", "")[:_MOST_REASON],
        violations=tuple(str(text)[:_MOST_REASON] for text in raw.optional("violations", [])),
        values={key: values.get(key) for key in keys},
        metric=raw.number("metric"),
        spread=raw.number("spread"),
        metrics={str(name): float(value) for name, value in metrics.items() if is_number(value)},
        step=None if step is None else int(step),
        seconds=raw.number("seconds"),
        history=raw.pairs("history"),
    )
