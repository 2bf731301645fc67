"""How far a search is, from its journal and its runs, while it runs and later."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distft.config import parse
from distft.errors import ConfigError
from distft.search.journal import (
    JOURNAL_FILE,
    RUNNING,
    WAITING,
    TrialRecord,
    metric_of,
    read_journal,
    trials_of,
)
from distft.search.lock import is_being_run
from distft.search.ranking import ranked, search_json, table
from distft.search.settings import SearchConfig
from distft.search.trial_runs import trial_dir
from distft.tracker.jsonl import last_logged_step


@dataclass(frozen=True, slots=True)
class Status:
    """What `distft tune status` shows."""

    table: list[tuple[str, ...]]
    content: dict[str, Any]  # as search.json
    summary: str
    notes: tuple[str, ...] = ()  # what the user should know of the files


def read_status(directory: Path) -> Status:
    """Raises `ConfigError` if no search has begun in `directory`."""
    is_run = is_being_run(directory)  # before the journal is read: no search ends without its last line
    content = read_journal(directory)
    lines = content.lines
    if not lines:
        raise ConfigError(f"{_why_no_search(directory)}: give the run_dir of a search that has begun.")
    settings = next(line for line in reversed(lines) if line["kind"] == "search")
    search: SearchConfig = parse(SearchConfig, settings["search"], where=str(directory / JOURNAL_FILE))
    trials = trials_of(lines)
    for trial in trials.values():
        if trial.state == RUNNING:  # the journal hears of a trial at its evaluations only
            folders = [
                trial_dir(directory, trial.number),
                *(Path(run.run_dir) for run in trial.runs.values()),
            ]
            trial.step = max(trial.step, *map(last_logged_step, folders))
            if not is_run:
                trial.state = WAITING  # for the same command
    train = settings["base"].get("train")
    stopping = train.get("early_stopping") if isinstance(train, Mapping) else None
    metric = metric_of(lines, search)
    best = search.counts_best(stops_early=stopping is not None)
    rows = ranked(list(trials.values()), metric, search, best=best)
    summary = f"{directory}: {_counts(trials.values(), search.num_points)}"
    is_over = len(rows) >= search.num_points and all(trial.has_ended for trial in trials.values())
    if not is_run and not is_over:
        summary += "; stopped: the same `distft tune` command goes on"
    shown = search_json(rows, metric, search, directory)
    return Status(table(rows, metric, search), shown, summary, tuple(content.notes))


def _counts(trials: Iterable[TrialRecord], num_points: int) -> str:
    states = Counter(trial.state for trial in trials)
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    return f"{counts or 'no trial yet'} of {num_points} trials"


def _why_no_search(directory: Path) -> str:
    if not directory.is_dir():
        return f"{directory} is no directory"
    path = directory / JOURNAL_FILE
    return f"{path} is empty" if path.exists() else f"{directory} has no {JOURNAL_FILE}"
