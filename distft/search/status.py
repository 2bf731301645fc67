"""How far a search is, from its journal and its runs, while it runs and later."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distft.config import parse
from distft.errors import ConfigError
from distft.search.journal import JOURNAL_FILE, RUNNING, read_journal, trials_of
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


def read_status(directory: Path) -> Status:
    """Raises `ConfigError` if no search has begun in `directory`."""
    lines = read_journal(directory) if directory.is_dir() else []
    if not lines:
        what = f"has no {JOURNAL_FILE}" if directory.is_dir() else "is no directory"
        raise ConfigError(f"{directory} {what}: give the run_dir of a search that has begun.")
    settings = next(line for line in reversed(lines) if line.get("kind") == "search")
    search: SearchConfig = parse(SearchConfig, settings.get("search"), where=str(directory / JOURNAL_FILE))
    trials = trials_of(lines)
    for trial in trials.values():
        if trial.state == RUNNING:  # the journal hears of a trial at its evaluations only
            folders = [
                trial_dir(directory, trial.number),
                *(Path(run.run_dir) for run in trial.runs.values()),
            ]
            trial.step = max(trial.step, *map(last_logged_step, folders))
    stopping = (settings.get("base", {}).get("train") or {}).get("early_stopping")
    best = search.value == "best" or (search.value == "auto" and stopping is not None)
    metric = next((line["metric"] for line in lines if line.get("metric")), search.metric)
    rows = ranked(list(trials.values()), metric, search, best=best)
    states: dict[str, int] = {}
    for trial in trials.values():
        states[trial.state] = states.get(trial.state, 0) + 1
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    summary = f"{directory}: {counts or 'no trial yet'} of {search.num_points} trials"
    return Status(table(rows, metric, search), search_json(rows, metric, search, directory), summary)
