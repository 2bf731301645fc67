"""The page about a search: its trials by rank, and what its settings explain."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from distft.report.html import Content, cards, figures, paragraph, section, table, text_of
from distft.report.importance import LEAST_TRIALS
from distft.report.search import RecordedSearch, Trial
from distft.report.search_charts import search_charts
from distft.tracker.number_format import duration, number


def search_page(search: RecordedSearch) -> Content:
    """The page about a search, which may go on."""
    ranked = search.ranked
    charts = search_charts(search)
    parts = [section(search.directory.resolve().name, cards(_facts(search, ranked)))]
    if ranked:
        best = [(key, text_of(value)) for key, value in ranked[0].values.items()]
        parts.append(
            section(f"The best settings: trial {ranked[0].number}", table(("setting", "value"), best))
        )
    if charts:
        few = f"Importance needs {LEAST_TRIALS} trials with a value."
        note = paragraph(few) if len(ranked) < LEAST_TRIALS else ""
        parts.append(section("Trials and settings", note + figures(charts, 0)))
    others = [trial for trial in search.trials if trial.metric is None]
    parts.append(
        section("Trials by rank", _trials(search, ranked) if ranked else paragraph("None has a value yet."))
    )
    if others:
        rows = [_cells(search, None, trial) for trial in others]
        parts.append(section("Trials without a value", table(_heads(search), rows)))
    return Content(title=search.directory.resolve().name, body="\n".join(parts), charts=charts)


def notes_on_search(search: RecordedSearch) -> list[str]:
    """What the report of this search lacks."""
    return [] if search.ranked else [f"{search.directory}: no trial has a value yet"]


def _facts(search: RecordedSearch, ranked: Sequence[Trial]) -> dict[str, str]:
    states = Counter(trial.state for trial in search.trials)
    facts = {
        "metric": search.metric,
        "best is": "the largest" if search.direction == "max" else "the smallest",
        "trials": f"{len(search.trials):,}",
        **{state: f"{count:,}" for state, count in states.items()},
    }
    if ranked:
        spread = "" if ranked[0].spread is None else f" ± {number(ranked[0].spread)}"
        facts["best value"] = f"{number(ranked[0].metric or 0.0)}{spread} (trial {ranked[0].number})"
    seconds = sum(trial.seconds or 0.0 for trial in search.trials)
    steps = sum(trial.step or 0 for trial in search.trials)
    return {**facts, "steps of all trials": f"{steps:,}", "time of all trials": duration(seconds)}


def _heads(search: RecordedSearch) -> tuple[str, ...]:
    return ("rank", "trial", "state", search.metric, "spread", *search.keys, "step", "time", "reason")


def _trials(search: RecordedSearch, ranked: Sequence[Trial]) -> str:
    return table(_heads(search), [_cells(search, rank, trial) for rank, trial in enumerate(ranked, start=1)])


def _cells(search: RecordedSearch, rank: int | None, trial: Trial) -> tuple[str, ...]:
    return (
        "-" if rank is None else str(rank),
        str(trial.number),
        trial.state,
        _number(trial.metric),
        _number(trial.spread),
        *(_value(trial.values[key]) for key in search.keys),
        "-" if trial.step is None else f"{trial.step:,}",
        "-" if trial.seconds is None else duration(trial.seconds),
        "; ".join(filter(None, (trial.reason, *trial.violations))),
    )


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else text_of(value)


def _number(value: float | None) -> str:
    return "-" if value is None else number(value)
