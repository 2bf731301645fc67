"""What happened in a search, a line of JSON for each event, and the trials that these lines tell of.

Everything else that a search writes follows from this file and from the runs. A search that goes on reads it,
so a line counts as soon as it is there, and a torn last line does not. Damaged lines are left out, and their
number is told.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from distft.errors import ConfigError
from distft.search.journal_lines import ENDED, sound_lines
from distft.search.metrics import final_value, is_number
from distft.search.settings import SearchConfig
from distft.search.space import Values
from distft.tracker.jsonl import LineWriter, parse_line

JOURNAL_FILE = "search.jsonl"
VERSION = 1
RUNNING, WAITING = "running", "waiting"


@dataclass(slots=True)
class RunRecord:
    """One run of a trial, as far as it is told."""

    run_dir: str
    history: dict[int, float | None] = field(default_factory=dict)  # by step; None: not finite
    metrics: dict[str, float | None] = field(default_factory=dict)  # the others', at the end
    violations: list[str] = field(default_factory=list)
    is_complete: bool = False

    def value(self, sign: int, *, best: bool) -> float | None:
        """The last value or the best one; None if there is none."""
        return final_value([value for _, value in sorted(self.history.items())], sign, best=best)


@dataclass(slots=True)
class TrialRecord:
    """One trial, from all that the journal says of it."""

    number: int
    values: Values  # by dotted key; of a population those of its newest run
    ranks: int = 1
    repeat_of: int | None = None  # the trial whose settings it runs again with further seeds
    state: str = WAITING  # waiting, running, completed, stopped, failed
    reason: str = ""  # why it failed
    runs: dict[str, RunRecord] = field(default_factory=dict)  # by name, in the order of their starts
    step: int = 0  # that it reached; of several runs in all
    seconds: float = 0.0
    _segment_s: float = 0.0  # since its last start

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED

    def values_of_runs(self, sign: int, *, best: bool) -> list[float | None]:
        """One of each run; the runs of a population follow on each other, so the newest counts."""
        runs = list(self.runs.values())
        if self.is_population:
            runs = runs[-1:]
        return [run.value(sign, best=best) for run in runs]

    @property
    def is_population(self) -> bool:
        return any(name.startswith("fork") for name in self.runs)

    def history(self) -> list[tuple[int, float | None]]:
        """Step and value; of several runs, or of forks, one after the other."""
        return [pair for run in self.runs.values() for pair in sorted(run.history.items())]

    @property
    def violations(self) -> list[str]:
        return list(dict.fromkeys(text for run in self.runs.values() for text in run.violations))

    def metrics(self) -> dict[str, float | None]:
        """The mean over runs of each other metric."""
        names = dict.fromkeys(name for run in self.runs.values() for name in run.metrics)
        return {name: _mean([run.metrics.get(name) for run in self.runs.values()]) for name in names}


def mean_and_spread(values: Iterable[float | None]) -> tuple[float | None, float | None]:
    """The mean, None if a value is missing; and the standard deviation, None of fewer than two."""
    known = list(values)
    mean = _mean(known)
    if mean is None or len(known) < 2:
        return mean, None
    return mean, stdev(value for value in known if value is not None)


def _mean(values: Iterable[float | None]) -> float | None:
    known = list(values)
    finite = [value for value in known if value is not None and math.isfinite(value)]
    return fmean(finite) if known and len(finite) == len(known) else None


def metric_of(lines: Iterable[Mapping[str, Any]], search: SearchConfig) -> str | None:
    """The metric that a search compares: the one that its trials have reported, else that of its settings."""
    return next((line["metric"] for line in lines if line.get("metric")), search.metric)


@dataclass(frozen=True, slots=True)
class JournalContent:
    """What a journal's file says."""

    lines: list[dict[str, Any]]
    num_damaged: int = 0  # lines that are left out

    @property
    def notes(self) -> list[str]:
        """What the user should know of the file."""
        if not self.num_damaged:
            return []
        what = "line is" if self.num_damaged == 1 else "lines are"
        return [f"{JOURNAL_FILE}: {self.num_damaged:,} {what} damaged and left out"]


class Journal:
    """The journal of the search in one directory, open for writing, and what it says so far."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / JOURNAL_FILE
        content = read_journal(directory)
        self.lines, self.notes = content.lines, content.notes
        self.trials = trials_of(self.lines)
        self._writer = LineWriter(self.path)

    def append(self, kind: str, **fields: Any) -> None:
        """Write one event, and take it into account. Raises `StorageError` when the disk is full."""
        line = {"kind": kind, **fields}
        self._writer.append(line)
        self.lines.append(line)
        _apply(self.trials, line)

    def close(self) -> None:
        self._writer.close()


def read_journal(directory: Path) -> JournalContent:
    """The events so far; none if no search has begun there. A torn last line may still be written.

    Raises `ConfigError` for a file of a newer version, and one that is no journal or cannot be read.
    """
    path = directory / JOURNAL_FILE
    try:
        with path.open("rb") as file:
            written = list(file)
    except (FileNotFoundError, NotADirectoryError):
        return JournalContent([])
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    if written and not written[-1].endswith(b"\n"):
        written.pop()
    written = [line for line in written if line.strip()]
    records = [record for line in written if (record := parse_line(line)) is not None]
    if not written:
        return JournalContent([])
    first = records[0] if records else {}
    version = first.get("version")
    if first.get("kind") != "search" or not isinstance(version, int):
        raise ConfigError(f"{path} is no journal of a search: choose another run_dir.")
    if version > VERSION:
        raise ConfigError(
            f"{path} is of version {version}, and this distft reads up to {VERSION}: upgrade distft."
        )
    lines = sound_lines(records)
    if not any(line["kind"] == "search" for line in lines):
        raise ConfigError(
            f"{path} is damaged: no line has the settings of its search. Restore it, or choose "
            "another run_dir."
        )
    return JournalContent(lines, len(written) - len(lines))


def trials_of(lines: Iterable[Mapping[str, Any]]) -> dict[int, TrialRecord]:
    """The trials by number. Lines that say nothing of a trial, or twice the same, change nothing."""
    trials: dict[int, TrialRecord] = {}
    for line in lines:
        _apply(trials, line)
    return trials


def _apply(trials: dict[int, TrialRecord], line: Mapping[str, Any]) -> None:
    number, kind = line.get("number"), line.get("kind")
    if not isinstance(number, int):
        return
    if kind == "trial":
        trials.setdefault(
            number,
            TrialRecord(number, dict(line["values"]), line.get("ranks", 1), repeat_of=line.get("repeat_of")),
        )
        return
    trial = trials.get(number)
    if trial is None:
        return
    if kind == "start":
        trial.state, trial.reason, trial._segment_s = RUNNING, "", 0.0
    elif kind == "fork":
        trial.values, trial.ranks = dict(line["values"]), line.get("ranks", trial.ranks)
    elif kind == "result":
        _apply_result(trial, line)
    elif kind == "again" and trial.state == "failed":
        trial.state, trial.reason = WAITING, ""
    elif kind == "end":
        trial.state, trial.reason = line["state"], line.get("reason", "")
        trial.step = max(trial.step, line.get("step") or 0)


def _apply_result(trial: TrialRecord, line: Mapping[str, Any]) -> None:
    run = trial.runs.setdefault(line["run"], RunRecord(line["run_dir"]))
    step, value = line.get("step"), line.get("value")
    if isinstance(step, int):
        run.history[step] = value if is_number(value) else None
    run.metrics |= line.get("metrics", {})
    run.violations = line.get("violations", [])
    run.is_complete = line.get("is_complete", False)
    trial.step = max(trial.step, line.get("total_step", 0))
    seconds = line.get("seconds", 0.0)
    trial.seconds += max(seconds - trial._segment_s, 0.0)
    trial._segment_s = max(trial._segment_s, seconds)
