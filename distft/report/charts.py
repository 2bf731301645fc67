"""Curves, time line, confusion and time of runs as charts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distft.report.chart import Chart
from distft.report.recorded_run import RecordedRun
from distft.report.series import Row, curve_rows, pauses, places_of, time_spent
from distft.report.values import is_number
from distft.search.metrics import VALIDATION

# Metrics of training steps, in the order of the page: title, unit of the axis, factor of the values.
_OF_STEPS = {
    "loss": ("Training loss", "nats", 1.0),
    "lr": ("Learning rate", "of the first group", 1.0),
    "grad_norm": ("Gradient norm", "before clipping", 1.0),
    "tokens_per_s": ("Throughput", "tokens/s", 1.0),
    "mfu": ("Model FLOPs utilization", "%", 100.0),
    "step_s": ("Time of a step", "s", 1.0),
    "data_wait_s": ("Waiting for data", "s a step", 1.0),
    "peak_memory_bytes": ("Peak memory of a rank", "GiB", 2.0**-30),
    "skipped_steps": ("Skipped steps", "so far", 1.0),
}
_QUIET = ("skipped_steps", "data_wait_s")  # shown only if they are ever more than nothing
_EVENTS = {  # kinds on the time line
    "start": "start",
    "resume": "resume",
    "resize": "resize",
    "restart": "restart",
    "save": "save",
    "finish": "end",
    "fault": "fault",
    "hang": "hang",
    "straggler": "straggler",
    "damaged_checkpoint": "damaged checkpoint",
    "stop_requested": "stop requested",
    "superseded": "superseded",
}
_STALL, _AWAY, _SKIPPED = "stall of a save", "not running", "skipped steps"
_MOST_S = 1e11  # of a time since 1970 that can be shown


@dataclass(frozen=True, slots=True)
class _Placed:
    """A run, its name on the page, and the places of its lines, which all of its curves share."""

    run: RecordedRun
    name: str
    places: Sequence[Row]


def curves_of(runs: Sequence[RecordedRun], names: Sequence[str]) -> list[Chart]:
    """Those of which some run has values: validation first, then training."""
    metrics = list(dict.fromkeys(name for run in runs for name in run.metric_names()))
    placed = [_Placed(run, name, places_of(run)) for run, name in zip(runs, names, strict=True)]
    charts = [
        _curve(placed, name, (name.replace("/", " "), _unit(name), 1.0), marks_best=True)
        for name in metrics
        if name.startswith(VALIDATION)
    ]
    charts += [_curve(placed, name, about) for name, about in _OF_STEPS.items() if name in metrics]
    terms = [name for name in metrics if name.endswith("/loss") and not name.startswith(VALIDATION)]
    charts += [_curve(placed, name, (name.replace("/", " "), "nats", 1.0)) for name in terms]
    return [chart for chart in charts if chart is not None]


def _unit(metric: str) -> str:
    last = metric.rsplit("/", 1)[-1]
    return {"loss": "nats", "bits_per_byte": "bits a byte"}.get(last, last.replace("_", " "))


def _curve(
    runs: Sequence[_Placed], metric: str, about: tuple[str, str, float], *, marks_best: bool = False
) -> Chart | None:
    title, unit, factor = about
    rows = [row for run in runs for row in curve_rows(run.run, run.name, metric, run.places)]
    rows = [{**row, "value": row["value"] * factor} for row in rows]
    if not rows or (metric in _QUIET and not any(row["value"] > 1e-3 for row in rows)):
        return None
    tooltip = [{"field": field} for field in ("run", "step", "tokens", "hours")]
    tooltip.append({"field": "value", "title": title})
    layers: list[dict[str, Any]] = [{"mark": {"type": "line", "point": len(rows) <= 60 * len(runs)}}]
    if marks_best:
        best = {run.name: run.run.best(metric) for run in runs}
        steps = {(name, found[0]) for name, found in best.items() if found is not None}
        rows = [{**row, "best": (row["run"], row["step"]) in steps} for row in rows]
        mark = {"type": "point", "shape": "diamond", "size": 160, "filled": True}
        layers.append({"transform": [{"filter": "datum.best"}], "mark": mark})
    spec = {
        "data": {"values": rows},
        "encoding": {
            "x": {
                "field": "step",
                "type": "quantitative",
                "title": "step",
                "scale": {"zero": False},
                "axis": {"tickCount": 6},
            },
            "y": {"field": "value", "type": "quantitative", "title": unit, "scale": {"zero": False}},
            "color": _color([run.name for run in runs]),
            "tooltip": tooltip,
        },
        "layer": layers,
    }
    shown = title[0].upper() + title[1:] + (", best marked" if marks_best else "")
    return Chart(title=shown, spec=spec, has_steps=True)


def _color(names: Sequence[str]) -> dict[str, Any]:
    legend = None if len(names) == 1 else {"orient": "top", "columns": 1, "labelLimit": 300, "title": None}
    return {"field": "run", "type": "nominal", "legend": legend, "scale": {"domain": list(names)}}


def time_lines_of(runs: Sequence[RecordedRun], names: Sequence[str]) -> list[Chart]:
    """What happened when: of each run its starts, saves, stalls and troubles."""
    charts = []
    for run, name in zip(runs, names, strict=True):
        rows = [
            row for row in (*_events(run), *_spans(run), *_skips(run)) if 0 < row["time"] < _MOST_S * 1000
        ]
        kinds = {row["event"] for row in rows}
        order = [kind for kind in (*_EVENTS.values(), _STALL, _SKIPPED, _AWAY) if kind in kinds]
        encoding = {
            "x": {"field": "time", "type": "temporal", "title": "time (of this computer's zone)"},
            "y": {"field": "event", "type": "nominal", "title": None, "sort": order},
            "color": {"field": "event", "type": "nominal", "legend": None},
            "tooltip": [
                {"field": "event"},
                {"field": "time", "type": "temporal", "format": "%Y-%m-%d %H:%M:%S"},
                {"field": "about"},
            ],
        }
        layers = [
            {"mark": {"type": "bar", "height": {"band": 0.6}}, "encoding": {"x2": {"field": "until"}}},
            {"mark": {"type": "tick", "thickness": 2}},
        ]
        spec = {
            "height": 24 * len(order),
            "data": {"values": rows},
            "encoding": encoding,
            "layer": layers,
        }
        title = "Time line" if len(runs) == 1 else f"Time line of {name}"
        if rows:
            charts.append(Chart(title=title, spec=spec, is_broad=True))
    return charts


def _events(run: RecordedRun) -> Iterator[Row]:
    for event in run.events:
        kind, time = event["kind"], event.get("time")
        if kind in _EVENTS and is_number(time):
            begin = time - (_seconds(event, "write_s") if kind == "save" else 0.0)
            about = ", ".join(f"{k}: {v}" for k, v in event.items() if k not in ("time", "kind", "start_id"))
            yield _span(_EVENTS[kind], begin, time, about[:300])


def _spans(run: RecordedRun) -> Iterator[Row]:
    for event in run.events:
        stall_s = _seconds(event, "stall_s")
        if event["kind"] == "save" and stall_s > 0 and is_number(event.get("time")):
            begin = event["time"] - _seconds(event, "write_s") - stall_s
            yield _span(_STALL, begin, begin + stall_s, f"the loop waited {stall_s:g} s for a save")
    for begin, end in pauses(run):
        yield _span(_AWAY, begin, end, f"{end - begin:.0f} s until the next start")


def _skips(run: RecordedRun) -> Iterator[Row]:
    """Where the number of skipped steps has grown."""
    before = 0.0
    for line in run.metrics:
        now, time = line.get("skipped_steps"), line.get("time")
        if is_number(now) and is_number(time):
            if now > before:
                yield _span(_SKIPPED, time, time, f"{now - before:g} up to step {line['step']}")
            before = now


def _span(event: str, begin_s: float, end_s: float, about: str) -> Row:
    return {"event": event, "time": _ms(begin_s), "until": _ms(end_s), "about": about}


def _ms(time_s: float) -> int:
    return int(min(max(time_s, 0.0), _MOST_S) * 1000)


def _seconds(event: Mapping[str, Any], field: str) -> float:
    value = event.get(field)
    return max(float(value), 0.0) if is_number(value) else 0.0


def spent_chart(runs: Sequence[RecordedRun], names: Sequence[str]) -> Chart:
    """Where the time went."""
    spent = [(name, time_spent(run)) for run, name in zip(runs, names, strict=True)]
    longest_s = max(sum(seconds.values()) for _, seconds in spent)
    unit, factor = ("hours", 3600.0) if longest_s > 2 * 3600 else ("minutes", 60.0)
    rows = [
        {"run": name, "what": what, "order": order, unit: seconds / factor}
        for name, of_run in spent
        for order, (what, seconds) in enumerate(of_run.items())
    ]
    kinds = list(spent[0][1])
    spec = {
        "height": 28 * len(runs) + 10,
        "data": {"values": rows},
        "mark": "bar",
        "encoding": {
            "x": {"field": unit, "type": "quantitative", "title": unit, "axis": {"tickCount": 5}},
            "y": {
                "field": "run",
                "type": "nominal",
                "title": None,
                "sort": list(names),
                "axis": {"labelLimit": 120},
            },
            "color": {
                "field": "what",
                "type": "nominal",
                "scale": {"domain": kinds},
                "legend": {"orient": "top", "title": None, "columns": 2},
            },
            "order": {"field": "order"},
            "tooltip": [{"field": "run"}, {"field": "what"}, {"field": unit, "format": ".2f"}],
        },
    }
    return Chart(title="Where the time went", spec=spec)
