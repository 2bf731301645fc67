"""Charts of runs as Vega-Lite specifications, which the page draws."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distft.report.recorded_run import VALIDATION, RecordedRun
from distft.report.series import Row, curve_rows, places_of, time_spent

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
    "hang": "hang",
    "straggler": "straggler",
    "damaged_checkpoint": "damaged checkpoint",
    "stop_requested": "stop requested",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """A title, and what Vega-Lite needs. `has_steps`: its x may be steps, tokens or hours."""

    title: str
    spec: dict[str, Any]
    has_steps: bool = False


@dataclass(frozen=True, slots=True)
class _Placed:
    """A run, its name on the page, and the places of its lines, which all of its curves share."""

    run: RecordedRun
    name: str
    places: Sequence[Row]


def charts_of(runs: Sequence[RecordedRun], names: Sequence[str]) -> list[Chart]:
    """Those of which some run has values: validation first, then training, then where the time went."""
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
    found = [chart for chart in charts if chart is not None]
    return [*found, *_time_line(runs, names), _spent(runs, names)]


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
            "x": {"field": "step", "type": "quantitative", "title": "step", "scale": {"zero": False}},
            "y": {"field": "value", "type": "quantitative", "title": unit, "scale": {"zero": False}},
            "color": _color([run.name for run in runs]),
            "tooltip": tooltip,
        },
        "layer": layers,
    }
    return Chart(title=title[0].upper() + title[1:], spec=spec, has_steps=True)


def _color(names: Sequence[str]) -> dict[str, Any]:
    legend = None if len(names) == 1 else {"orient": "top", "columns": 1, "labelLimit": 300, "title": None}
    return {"field": "run", "type": "nominal", "legend": legend, "scale": {"domain": list(names)}}


def _time_line(runs: Sequence[RecordedRun], names: Sequence[str]) -> list[Chart]:
    charts = []
    for run, name in zip(runs, names, strict=True):
        rows = [
            {
                "time": int(event["time"] * 1000),
                "event": _EVENTS[event["kind"]],
                "about": ", ".join(
                    f"{k}: {v}" for k, v in event.items() if k not in ("time", "kind", "start_id")
                )[:300],
            }
            for event in run.events
            if event["kind"] in _EVENTS and isinstance(event.get("time"), float | int)
        ]
        spec = {
            "data": {"values": rows},
            "mark": {"type": "tick", "thickness": 3},
            "encoding": {
                "x": {"field": "time", "type": "temporal", "title": "time (of this computer's zone)"},
                "y": {"field": "event", "type": "nominal", "title": None, "sort": list(_EVENTS.values())},
                "color": {"field": "event", "type": "nominal", "legend": None},
                "tooltip": [
                    {"field": "event"},
                    {"field": "time", "type": "temporal", "format": "%Y-%m-%d %H:%M:%S"},
                    {"field": "about"},
                ],
            },
        }
        charts.append(Chart(title="Time line" if len(runs) == 1 else f"Time line of {name}", spec=spec))
    return charts


def _spent(runs: Sequence[RecordedRun], names: Sequence[str]) -> Chart:
    rows = [
        {"run": name, "what": what, "minutes": seconds / 60}
        for run, name in zip(runs, names, strict=True)
        for what, seconds in time_spent(run).items()
    ]
    spec = {
        "data": {"values": rows},
        "mark": "bar",
        "encoding": {
            "x": {"field": "minutes", "type": "quantitative", "title": "minutes"},
            "y": {"field": "run", "type": "nominal", "title": None, "axis": {"labelLimit": 120}},
            "color": {
                "field": "what",
                "type": "nominal",
                "legend": {"orient": "top", "title": None, "columns": 3},
            },
            "tooltip": [{"field": "run"}, {"field": "what"}, {"field": "minutes", "format": ".2f"}],
        },
    }
    return Chart(title="Where the time went", spec=spec)
