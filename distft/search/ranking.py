"""The trials of a search in order, the best first, and the tables and files that show them."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distft import storage
from distft.config import redact
from distft.search.journal import TrialRecord, mean_and_spread
from distft.search.metrics import sign_of
from distft.search.settings import SearchConfig
from distft.tracker.jsonl import EVENTS_FILE, read_lines

SEARCH_FILE = "search.json"
SEARCH_VERSION = 1  # of that file


@dataclass(frozen=True, slots=True)
class Ranked:
    """A trial with what it counts for; the runs of its repetitions included."""

    trial: TrialRecord
    value: float | None  # the mean over its runs
    spread: float | None  # the standard deviation; None of a single run
    num_runs: int
    violations: tuple[str, ...]

    @property
    def is_feasible(self) -> bool:
        return not self.violations


def ranked(
    trials: Sequence[TrialRecord], metric: str | None, search: SearchConfig, *, best: bool
) -> list[Ranked]:
    """The trials, the best first: those that keep the constraints before the others, failed ones last.

    Of equal values the lower number comes first. A trial that was stopped counts with the value that it had.
    """
    sign = 1 if metric is None else sign_of(metric, search.mode)
    repeats: dict[int, list[TrialRecord]] = {}
    for trial in trials:
        if trial.repeat_of is not None:
            repeats.setdefault(trial.repeat_of, []).append(trial)
    rows = []
    for trial in trials:
        if trial.repeat_of is not None:
            continue
        group = [trial, *(one for one in repeats.get(trial.number, ()) if one.state == "completed")]
        values = [value for one in group for value in one.values_of_runs(sign, best=best)]
        mean, spread = mean_and_spread(values)
        violations = tuple(dict.fromkeys(text for one in group for text in one.violations))
        rows.append(Ranked(trial, mean, spread, len(values), violations))

    def key(row: Ranked) -> tuple[bool, bool, bool, float, int]:
        value = -math.inf if row.value is None else sign * row.value
        return (
            row.trial.state == "failed",
            row.value is None,
            not row.is_feasible,
            -value,
            row.trial.number,
        )

    return sorted(rows, key=key)


def best_of(rows: Sequence[Ranked]) -> Ranked | None:
    """The best trial that is complete; None if there is none that keeps the constraints.

    Once the best have been repeated, it is one of them: the mean of several runs is less lucky than one run.
    """
    complete = [
        row for row in rows if row.trial.state == "completed" and row.value is not None and row.is_feasible
    ]
    most_runs = max((row.num_runs for row in complete), default=0)
    return next((row for row in complete if row.num_runs == most_runs), None)


def search_json(
    rows: Sequence[Ranked], metric: str | None, search: SearchConfig, directory: Path
) -> dict[str, Any]:
    """What `search.json` says: for reports and scripts. Trials in the order of their rank."""
    less = metric is not None and sign_of(metric, search.mode) < 0
    return {
        "version": SEARCH_VERSION,
        "metric": metric,
        "direction": "min" if less else "max",
        "space": redact({key: one.model_dump(mode="json") for key, one in search.space.items()}),
        "sampler": search.sampler.model_dump(mode="json"),
        "scheduler": search.scheduler.model_dump(mode="json"),
        "trials": [_trial_json(row, directory) for row in rows],
    }


def _trial_json(row: Ranked, directory: Path) -> dict[str, Any]:
    trial = row.trial
    return {
        "number": trial.number,
        "state": trial.state,
        "reason": trial.reason,
        "values": redact(trial.values),
        "ranks": trial.ranks,
        "metric": row.value,
        "spread": row.spread,
        "num_runs": row.num_runs,
        "violations": list(row.violations),
        "metrics": trial.metrics(),
        "step": trial.step,
        "seconds": round(trial.seconds, 1),
        "run_dirs": [_relative(run.run_dir, directory) for run in trial.runs.values()],
        "history": [[step, value] for step, value in trial.history()],
    }


def num_trained_steps(trials: Sequence[TrialRecord]) -> int:
    """Steps that the runs of these trials have taken, with those after the last value of a stopped one."""
    total = 0
    for trial in trials:
        for run in trial.runs.values():
            events = read_lines(Path(run.run_dir) / EVENTS_FILE)
            steps = [event["step"] for event in events if isinstance(event.get("step"), int)]
            begins = [event["step"] for event in events if event.get("kind") in {"start", "resume"}]
            total += max(steps, default=0) - (begins[0] if begins else 0)  # a fork begins at its parent's
    return total


def _relative(run_dir: str, directory: Path) -> str:
    path = Path(run_dir)
    return str(path.relative_to(directory)) if path.is_relative_to(directory) else run_dir


def write_search_json(directory: Path, content: Mapping[str, Any]) -> None:
    """Replace the file in one step."""
    text = json.dumps(content, indent=1, allow_nan=False, default=str)
    storage.commit_bytes(directory / SEARCH_FILE, text.encode() + b"\n", durable=False)


def table(rows: Sequence[Ranked], metric: str | None, search: SearchConfig) -> list[tuple[str, ...]]:
    """The head and a line of texts for each trial."""
    from distft.tracker.number_format import number

    keys = list(search.space)
    others = list(dict.fromkeys(name for row in rows for name in row.trial.metrics()))
    with_spread = any(row.spread is not None for row in rows)
    head = ("", "trial", "state", *keys, metric or "metric", *(["±"] * with_spread), *others, "step", "time")
    lines = [head]
    for place, row in enumerate(rows, 1):
        trial, metrics = row.trial, row.trial.metrics()
        cells = [str(place), str(trial.number), trial.state]
        cells += [_shown(trial.values.get(key)) for key in keys]
        cells.append(_number(row.value, number))
        if with_spread:
            cells.append(_number(row.spread, number))
        cells += [_number(metrics.get(name), number) for name in others]
        cells += [f"{trial.step:,}", f"{trial.seconds:.0f} s"]
        lines.append(tuple(cells))
    return lines


def _number(value: float | None, show: Any) -> str:
    return "-" if value is None else str(show(value))


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(redact(value), default=str)
