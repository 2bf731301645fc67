"""Differences of runs: their settings, and what they reached."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from distft.report.recorded_run import RecordedRun
from distft.search.metrics import VALIDATION

_ABSENT = "-"
_LASTS = ("loss", "tokens_seen", "epoch", "skipped_steps")  # metrics of which the last value counts
_IDENTITY = ("run_dir",)  # settings that differ between any two runs


@dataclass(frozen=True, slots=True)
class Row:
    """One setting or result of each run."""

    name: str
    values: tuple[Any, ...]


def differing_settings(runs: Sequence[RecordedRun]) -> list[Row]:
    """The settings, by dotted key, that are not the same in all runs; `-` where a run has none."""
    flat = [flatten(run.settings) for run in runs]
    names = dict.fromkeys(name for settings in flat for name in settings)
    rows = [Row(name, tuple(settings.get(name, _ABSENT) for settings in flat)) for name in names]
    return [row for row in rows if row.name not in _IDENTITY and len(set(map(repr, row.values))) > 1]


def results(runs: Sequence[RecordedRun]) -> list[Row]:
    """What each run reached and cost; None where it logged nothing of it."""
    names = dict.fromkeys(name for run in runs for name in run.metric_names())
    rows = [Row("step", tuple(run.step for run in runs))]
    rows += [Row(name, tuple(_last(run, name) for run in runs)) for name in _LASTS if name in names]
    for name in names:
        if name.startswith(VALIDATION):
            best = [run.best(name) for run in runs]
            rows.append(Row(name, tuple(_last(run, name) for run in runs)))
            if any(
                found is not None and found[1] != _last(run, name)
                for run, found in zip(runs, best, strict=True)
            ):
                rows.append(Row(f"{name}, best", tuple(found and found[1] for found in best)))
    for name, label in (("tokens_per_s", "tokens/s, median"), ("mfu", "MFU, median")):
        if name in names:
            rows.append(Row(label, tuple(_median(run, name) for run in runs)))
    if "peak_memory_bytes" in names:
        peaks = [[value for _, value in run.values("peak_memory_bytes")] for run in runs]
        rows.append(Row("peak memory, MiB", tuple(max(found) / 2**20 if found else None for found in peaks)))
    return rows


def _last(run: RecordedRun, name: str) -> float | None:
    found = run.values(name)
    return found[-1][1] if found else None


def _median(run: RecordedRun, name: str) -> float | None:
    found = run.values(name)
    return median(value for _, value in found) if found else None


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat
