"""A classifier's confusion matrix as a chart."""

from collections.abc import Sequence
from typing import Any

from distft.report.chart import Chart
from distft.report.evaluations import ShownClassifier

_MOST_COUNTS = 20  # labels of a matrix whose cells show their counts
_NARROW = 8  # labels of one that does not take the width of the page


def confusion_chart(found: ShownClassifier) -> Chart:
    """Rows by label and prediction; the colour is the share of the label's rows."""
    labels = list(found.labels)
    rows = [
        {"label": label, "predicted": labels[column], "rows": count, "share": count / max(sum(counts), 1)}
        for label, counts in zip(labels, found.confusion, strict=True)
        for column, count in enumerate(counts)
        if count or len(labels) <= _MOST_COUNTS
    ]
    layers = [_cells()]
    if len(labels) <= _MOST_COUNTS:
        color = {"condition": {"test": "datum.share > 0.55", "value": "white"}, "value": "currentColor"}
        mark = {"type": "text", "fontSize": 11}
        layers.append({"mark": mark, "encoding": {"text": {"field": "rows"}, "color": color}})
    fields = [{"field": "label"}, {"field": "predicted"}, {"field": "rows"}]
    spec = {
        "height": min(24 * len(labels) + 40, 620),
        "data": {"values": rows},
        "encoding": {
            "x": _axis("predicted", labels, labelAngle=-50),
            "y": _axis("label", labels),
            "tooltip": [*fields, {"field": "share", "format": ".1%"}],
        },
        "layer": layers,
    }
    of = f" of {found.stream}" if found.stream else ""
    title = f"Confusion{of} at step {found.step:,}, in rows"
    return Chart(title=title, spec=spec, is_broad=len(labels) > _NARROW)


def _cells() -> dict[str, Any]:
    legend = {"format": "%", "values": [0, 0.5, 1], "orient": "bottom", "direction": "horizontal"}
    color = {
        "field": "share",
        "type": "quantitative",
        "title": "share of the label's rows",
        "scale": {"domain": [0, 1], "range": ["#8881", "#2b6cb0"]},
        "legend": legend,
    }
    return {"mark": "rect", "encoding": {"color": color}}


def _axis(field: str, labels: Sequence[str], **options: Any) -> dict[str, Any]:
    size = 11 if len(labels) <= 24 else 8
    return {
        "field": field,
        "type": "nominal",
        "sort": list(labels),
        "scale": {"domain": list(labels)},
        "title": field,
        "axis": {"labelLimit": 140, "labelOverlap": False, "labelFontSize": size, **options},
    }
