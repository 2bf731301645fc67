"""A run while it goes on, as lines for a terminal."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeGuard

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from distft.config.printable import printable
from distft.report.recorded_run import RecordedRun
from distft.report.series import time_spent
from distft.report.values import is_number
from distft.search.metrics import VALIDATION
from distft.tracker import LEDGER_EVENT
from distft.tracker.jsonl import BEGINS
from distft.tracker.number_format import duration, number

_BARS = "▁▂▃▄▅▆▇█"
_MOST_EVENTS = 6
_PACE_LINES = 50  # newest logged steps, whose pace tells the time left
_SHOWN_STATES = ("running", "silent")  # of a run that may go on


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveState:
    """A run at one moment."""

    directory: Path
    run: RecordedRun | None  # None: it has not begun
    now_s: float

    @property
    def is_over(self) -> bool:
        return self.run is not None and self.run.state(self.now_s) not in _SHOWN_STATES

    def facts(self) -> dict[str, str]:
        """What is shown, by name, in the order of the lines."""
        if self.run is None:
            return {"state": "waiting for the run to begin"}
        run, last = self.run, self._last_step()
        of = "" if run.max_steps is None else f" of {run.max_steps:,}"
        facts = {"state": run.state(self.now_s), "step": f"{run.step:,}{of}"}
        left_s = seconds_left(run)
        if left_s is not None and not self.is_over:
            facts["time left"] = duration(left_s)
        for name, label in (("loss", "loss"), ("lr", "learning rate"), ("grad_norm", "gradient norm")):
            if is_number(last.get(name)):
                facts[label] = number(last[name])
        facts |= self._best()
        if is_number(last.get("tokens_per_s")):
            facts["tokens/s"] = f"{last['tokens_per_s']:,.0f}"
        if is_number(last.get("mfu")):
            facts["MFU"] = f"{last['mfu']:.1%}"
        if last.get("skipped_steps"):
            facts["skipped steps"] = str(last["skipped_steps"])
        stalls_s = time_spent(run)["waiting for saves"]
        if stalls_s >= 0.05:
            facts["waited for saves"] = f"{stalls_s:.1f} s"
        facts["last written"] = f"{duration(max(self.now_s - run.written_at, 0.0))} ago"
        return {printable(name): printable(value) for name, value in facts.items()}

    def _last_step(self) -> dict[str, float]:
        assert self.run is not None
        for line in reversed(self.run.metrics):
            if "loss" in line:
                return dict(line)
        return {}

    def _best(self) -> dict[str, str]:
        assert self.run is not None
        metric = self.run.main_metric
        best, values = self.run.best(metric), self.run.values(metric)
        if best is None or not metric.startswith(VALIDATION):
            return {}
        now = f"{number(values[-1][1])}, best {number(best[1])} at step {best[0]:,}"
        return {metric: now}

    def events(self) -> list[str]:
        """The newest ones, without those that are for `distft audit`."""
        if self.run is None:
            return []
        shown = [event for event in self.run.events if event["kind"] not in (LEDGER_EVENT, "data")]
        return [_event_line(event) for event in shown[-_MOST_EVENTS:]]


def seconds_left(run: RecordedRun) -> float | None:
    """By the pace of the newest logged steps of the last start; None: there are too few of them."""
    begun_s = max(
        (e["time"] for e in run.events if e["kind"] in BEGINS and is_number(e.get("time"))), default=0.0
    )
    lines = [line for line in run.metrics if is_number(line.get("time")) and line["time"] >= begun_s]
    lines = [line for line in lines if "loss" in line][-_PACE_LINES:]
    if run.max_steps is None or len(lines) < 2 or lines[-1]["step"] <= lines[0]["step"]:
        return None
    pace_s = (lines[-1]["time"] - lines[0]["time"]) / (lines[-1]["step"] - lines[0]["step"])
    return float(max(pace_s * (run.max_steps - lines[-1]["step"]), 0.0))


def sparkline(values: Sequence[float], width: int) -> str:
    """The values as `width` bars at most: each is the mean of its stretch."""
    if not values:
        return ""
    count = min(width, len(values))
    bounds = [len(values) * i // count for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(bounds)]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] for value in means)


def panel_of(state: LiveState, width: int) -> RenderableType:
    """What a terminal shows."""
    facts = Table.grid(padding=(0, 2))
    for name, value in state.facts().items():
        facts.add_row(Text(name, style="dim"), Text(value))
    parts: list[RenderableType] = [facts]
    for metric in () if state.run is None else ("loss", state.run.main_metric):
        values = [value for _, value in state.run.values(metric)] if state.run is not None else []
        if len(values) > 1 and (metric == "loss" or metric.startswith(VALIDATION)):
            ends = f"{number(values[0])} → {number(values[-1])}"
            bars = sparkline(values, max(width - 8, 10))
            parts.append(Text(f"\n{printable(metric)}  {ends}\n{bars}", no_wrap=True, overflow="crop"))
    events = state.events()
    if events:
        parts.append(Text("\n" + "\n".join(events), style="dim", no_wrap=True, overflow="ellipsis"))
    return Panel(
        Group(*parts), title=Text(printable(str(state.directory))), subtitle=Text("q or Ctrl-C: leave")
    )


def plain_line(state: LiveState) -> str:
    """What a file or a pipe gets."""
    return " | ".join(f"{name} {value}" for name, value in state.facts().items() if name != "last written")


def _event_line(event: Mapping[str, Any]) -> str:
    seconds = event.get("time")
    when = time.strftime("%H:%M:%S", time.localtime(seconds)) if is_time(seconds) else "--:--:--"
    fields = [f"{k.replace('_', ' ')} {v}" for k, v in event.items() if k not in ("time", "kind", "start_id")]
    return printable(f"{when} {event['kind']} {' | '.join(fields)}")


def is_time(value: Any) -> TypeGuard[float]:
    """Whether it is a time, in seconds since 1970, that a clock can show."""
    return is_number(value) and 0 <= value < 4e9
