"""Numbers of runs as rows that a chart draws: thinned out, with the places at which they were logged."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from distft.report.recorded_run import RecordedRun
from distft.report.values import is_number
from distft.tracker.jsonl import BEGINS

MAX_POINTS = 800  # of a curve; more than a screen has pixels for would only make the file larger

Row = dict[str, Any]


def curve_rows(run: RecordedRun, name: str, metric: str, places: Sequence[Row]) -> list[Row]:
    """A row for each value of `metric`: run, value, and the places of its line, as `places_of` has them.

    Of more than `MAX_POINTS` values, each stretch of the curve keeps its lowest and highest, so no spike is
    lost.
    """
    rows = [
        {"run": name, "value": line[metric], **place}
        for line, place in zip(run.metrics, places, strict=True)
        if is_number(line.get(metric))
    ]
    return _thinned(rows)


def places_of(run: RecordedRun) -> list[Row]:
    """Where each line of metrics stands: step, tokens (None: unknown), and hours of work.

    Hours in which the run was not there do not count.
    """
    places: list[Row] = []
    tokens: float | None = None
    hours, before = 0.0, None
    stops = pauses(run)
    for line in run.metrics:
        tokens = line["tokens_seen"] if is_number(line.get("tokens_seen")) else tokens
        now = line.get("time")
        if is_number(now):
            if before is not None and now > before:
                hours += (now - before - _overlap(stops, before, now)) / 3600
            before = now
        places.append({"step": line["step"], "tokens": tokens, "hours": round(max(hours, 0.0), 5)})
    return places


def pauses(run: RecordedRun) -> list[tuple[float, float]]:
    """From the last sign of each start to the beginning of the next one, in seconds since 1970."""
    signs = sorted(line["time"] for line in (*run.metrics, *run.events) if is_number(line.get("time")))
    begins = [e["time"] for e in run.events if e["kind"] in BEGINS and is_number(e.get("time"))]
    found = []
    for begin in begins[1:]:
        earlier = bisect_left(signs, begin)
        if earlier:
            found.append((signs[earlier - 1], begin))
    return found


def _overlap(pauses: Sequence[tuple[float, float]], start: float, stop: float) -> float:
    return sum(max(0.0, min(stop, end) - max(start, begin)) for begin, end in pauses)


def _thinned(rows: list[Row]) -> list[Row]:
    if len(rows) <= MAX_POINTS:
        return rows
    size = -(-2 * len(rows) // MAX_POINTS)
    kept: list[Row] = []
    for begin in range(0, len(rows), size):
        part = rows[begin : begin + size]
        ends = {id(row): row for row in (min(part, key=_value), max(part, key=_value))}
        kept += sorted(ends.values(), key=lambda row: row["step"])
    return kept


def _value(row: Row) -> float:
    value: float = row["value"]
    return value


def time_spent(run: RecordedRun) -> dict[str, float]:
    """Seconds by what they were spent on; `other` are starts, evaluations and what was done again."""
    steps_s = waits_s = 0.0
    last = 0
    for line in run.metrics:
        if is_number(line.get("step_s")):
            count = max(line["step"] - last, 0)
            wait_s = line["data_wait_s"] if is_number(line.get("data_wait_s")) else 0.0
            steps_s += count * max(line["step_s"] - wait_s, 0.0)
            waits_s += count * wait_s
            last = line["step"]
    stalls_s = sum(event["stall_s"] for event in run.events if is_number(event.get("stall_s")))
    times = [line["time"] for line in (*run.metrics, *run.events) if is_number(line.get("time"))]
    whole_s = max(times) - min(times) if times else 0.0
    away_s = _overlap(pauses(run), min(times, default=0.0), max(times, default=0.0))
    spent = {
        "steps": steps_s,
        "waiting for data": waits_s,
        "waiting for saves": stalls_s,
        "not running": away_s,
    }
    return {**spent, "other": max(whole_s - sum(spent.values()), 0.0)}
