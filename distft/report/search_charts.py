"""History, parallel coordinates, importance and learning curves of a search as charts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from distft.report.chart import Chart
from distft.report.html import text_of
from distft.report.importance import LEAST_TRIALS, importances
from distft.report.search import RecordedSearch, Trial
from distft.report.values import is_number
from distft.tracker.number_format import number

_WIDE_RANGE = 30.0  # between the smallest and the largest value: from there on an axis is logarithmic
_MOST_CURVES = 60  # trials whose learning curves are drawn: the best ones
_MOST_TICKS = 8
_TICK = {"fontSize": 10, "fontWeight": "bold", "color": "currentColor"}


def search_charts(search: RecordedSearch) -> list[Chart]:
    """Those for which there are trials enough."""
    ranked = search.ranked
    charts = [_history(search, ranked)] if ranked else []
    if len(ranked) >= LEAST_TRIALS and search.keys:
        charts.append(_importance(search, ranked))
    if any(len(trial.history) > 1 for trial in ranked):
        charts.append(_curves(search, ranked))
    if len(ranked) > 1 and search.keys:
        charts.append(_parallel(search, ranked))
    return charts


def _history(search: RecordedSearch, ranked: Sequence[Trial]) -> Chart:
    in_order = sorted(ranked, key=lambda trial: trial.number)
    best_of = max if search.direction == "max" else min
    worst = -math.inf if search.direction == "max" else math.inf
    valid = (worst if trial.violations else trial.metric or 0.0 for trial in in_order)
    so_far = (best if math.isfinite(best) else None for best in accumulate(valid, best_of))
    rows = [
        {
            "trial": trial.number,
            "value": trial.metric,
            "best": best,
            "state": trial.state,
            "low": (trial.metric or 0.0) - (trial.spread or 0.0),
            "high": (trial.metric or 0.0) + (trial.spread or 0.0),
        }
        for trial, best in zip(in_order, so_far, strict=True)
    ]
    y = {"type": "quantitative", "title": search.metric, "scale": {"zero": False}}
    layers = [
        {
            "mark": {"type": "line", "interpolate": "step-after", "strokeDash": [4, 3]},
            "encoding": {"y": {"field": "best", **y}},
        },
        {
            "transform": [{"filter": "datum.high > datum.low"}],
            "mark": "rule",
            "encoding": {"y": {"field": "low", **y}, "y2": {"field": "high"}},
        },
        {
            "mark": {"type": "point", "filled": True, "size": 50},
            "encoding": {
                "y": {"field": "value", **y},
                "color": {"field": "state", "type": "nominal", "legend": {"orient": "top", "title": None}},
                "tooltip": [{"field": field} for field in ("trial", "value", "best", "state")],
            },
        },
    ]
    x = {
        "field": "trial",
        "type": "quantitative",
        "title": "trial",
        "axis": {"tickMinStep": 1, "format": "d"},
    }
    spec = {"data": {"values": rows}, "encoding": {"x": x}, "layer": layers}
    return Chart(title="History: each trial, and the best so far (dashed)", spec=spec)


@dataclass(frozen=True, slots=True)
class _Axis:
    """Heights of values on an axis, from 0 to 1, and those at which a text stands."""

    heights: Sequence[float]
    ticks: Mapping[str, float]


def _axis(values: Sequence[Any]) -> _Axis:
    if all(is_number(value) for value in values) and len(set(values)) > 1:
        low, high = min(values), max(values)
        is_logarithmic = low > 0 and high / low > _WIDE_RANGE

        def place(value: float) -> float:
            return math.log(value) if is_logarithmic else value

        span = place(high) - place(low)
        if span > 0:
            middle = math.sqrt(low * high) if is_logarithmic else (low + high) / 2
            few = sorted(set(values)) if len(set(values)) <= _MOST_TICKS else [low, middle, high]
            heights = [(place(value) - place(low)) / span for value in values]
            return _Axis(heights, {_short(value): (place(value) - place(low)) / span for value in few})
    texts = [_short(value) for value in values]
    distinct = sorted(set(texts))
    places = {text: (i + 0.5) / len(distinct) for i, text in enumerate(distinct)}
    every = -(-len(distinct) // _MOST_TICKS)
    return _Axis([places[text] for text in texts], {text: places[text] for text in distinct[::every]})


def _short(value: Any) -> str:
    text = f"{value:.3g}" if is_number(value) and abs(value) >= 1e-2 else ""
    text = text or (number(value) if is_number(value) else text_of(value))
    return text if len(text) <= 18 else f"{text[:17]}…"


def _parallel(search: RecordedSearch, ranked: Sequence[Trial]) -> Chart:
    columns = {key: [trial.values[key] for trial in ranked] for key in search.keys}
    columns[search.metric] = [trial.metric for trial in ranked]
    names = _axis_names(list(columns))
    axes = {names[key]: _axis(values) for key, values in columns.items()}
    lines = [
        {
            "trial": trial.number,
            "axis": name,
            "height": axis.heights[position],
            "metric": trial.metric,
            "setting": _short(columns[key][position]),
        }
        for position, trial in enumerate(ranked)
        for (name, axis), key in zip(axes.items(), columns, strict=True)
    ]
    ticks = [
        {"axis": name, "height": height, "text": text}
        for name, axis in axes.items()
        for text, height in axis.ticks.items()
    ]
    x = {
        "field": "axis",
        "type": "nominal",
        "sort": list(axes),
        "title": None,
        "axis": {"labelAngle": -25, "labelLimit": 220, "grid": True, "domain": False, "labelOverlap": False},
    }
    y = {"field": "height", "type": "quantitative", "axis": None, "scale": {"domain": [0, 1]}}
    scheme = "viridis"
    color = {
        "field": "metric",
        "type": "quantitative",
        "title": search.metric,
        "scale": {"scheme": scheme, "reverse": search.direction == "min", "zero": False},
        "legend": {"orient": "top", "direction": "horizontal"},
    }
    tooltip = [{"field": field} for field in ("trial", "setting", "metric")]
    layers = [
        {
            "data": {"values": lines},
            "mark": {"type": "line", "opacity": 0.75, "strokeWidth": 2},
            "encoding": {"x": x, "y": y, "color": color, "detail": {"field": "trial"}, "tooltip": tooltip},
        },
        {
            "data": {"values": ticks},
            "mark": {"type": "text", "align": "left", "baseline": "bottom", "dx": 4, "dy": -3, **_TICK},
            "encoding": {"x": x, "y": y, "text": {"field": "text"}},
        },
    ]
    spec = {"height": 280, "padding": {"left": 16, "right": 5, "top": 5, "bottom": 5}, "layer": layers}
    better = "the lighter, the better"
    return Chart(title=f"Parallel coordinates: a line for each trial, {better}", spec=spec, is_broad=True)


def _axis_names(keys: Sequence[str]) -> dict[str, str]:
    """The last parts of dotted keys, where these differ."""
    lasts = [key.rsplit(".", 1)[-1] for key in keys]
    return {
        key: last if lasts.count(last) == 1 and "/" not in key else key
        for key, last in zip(keys, lasts, strict=True)
    }


def _importance(search: RecordedSearch, ranked: Sequence[Trial]) -> Chart:
    columns = {key: [trial.values[key] for trial in ranked] for key in search.keys}
    shares = importances(columns, [trial.metric or 0.0 for trial in ranked])
    rows = [{"setting": key, "share": share} for key, share in shares.items()]
    spec = {
        "height": 28 * len(rows),
        "data": {"values": rows},
        "mark": "bar",
        "encoding": {
            "x": {
                "field": "share",
                "type": "quantitative",
                "title": "share of the variance of ranks",
                "axis": {"format": "%"},
                "scale": {"domain": [0, 1]},
            },
            "y": {
                "field": "setting",
                "type": "nominal",
                "sort": list(shares),
                "title": None,
                "axis": {"labelLimit": 180},
            },
            "tooltip": [{"field": "setting"}, {"field": "share", "format": ".1%"}],
        },
    }
    return Chart(title="Importance: what each setting alone explains", spec=spec)


def _curves(search: RecordedSearch, ranked: Sequence[Trial]) -> Chart:
    rows = [
        {"trial": trial.number, "step": step, "value": value, "rank": rank}
        for rank, trial in enumerate(ranked[:_MOST_CURVES], start=1)
        for step, value in trial.history
    ]
    spec = {
        "data": {"values": rows},
        "mark": {"type": "line", "point": {"size": 15}},
        "encoding": {
            "x": {"field": "step", "type": "quantitative", "title": "step", "axis": {"tickCount": 6}},
            "y": {
                "field": "value",
                "type": "quantitative",
                "title": search.metric,
                "scale": {"zero": False},
            },
            "color": {
                "field": "rank",
                "type": "quantitative",
                "title": "rank",
                "scale": {"scheme": "viridis", "reverse": True},
            },
            "detail": {"field": "trial"},
            "tooltip": [{"field": field} for field in ("trial", "rank", "step", "value")],
        },
    }
    return Chart(title="Learning curves of the trials", spec=spec)
