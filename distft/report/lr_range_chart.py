"""The chart of a learning-rate range test."""

from typing import Any

from distft.report.chart import Chart
from distft.run.lr_range import LrRange


def lr_range_chart(found: LrRange) -> Chart:
    """Loss by rate, with a line at each of the two rates that the test finds."""
    rows = [
        {"rate": rate, "loss": loss, "smoothed": smoothed}
        for rate, loss, smoothed in zip(found.rates, found.losses, found.smoothed, strict=True)
    ]
    marks = [
        {"rate": rate, "what": f"{what}: {rate:.2g}"}
        for rate, what in (
            (found.tenth_of_minimum, "a tenth of the rate of the lowest loss"),
            (found.steepest, "steepest descent"),
        )
        if rate is not None
    ]
    # A diverging loss would squeeze the part that matters into a line.
    first, lowest = found.smoothed[0], min(found.smoothed)
    top = max(first, *found.losses[:5]) + 0.3 * (first - lowest)
    x: dict[str, Any] = {
        "field": "rate",
        "type": "quantitative",
        "title": "learning rate (optim.peak_lr)",
        "scale": {"type": "log", "nice": False},
        "axis": {"format": ".0e"},
    }
    scale = {"zero": False, "domainMax": top} if top > lowest else {"zero": False}
    y = {"type": "quantitative", "title": "training loss", "scale": scale}
    spec = {
        "width": 560,
        "height": 320,
        "layer": [
            {
                "data": {"values": rows},
                "mark": {"type": "point", "size": 12, "opacity": 0.4, "clip": True},
                "encoding": {"x": x, "y": {"field": "loss", **y}},
            },
            {
                "data": {"values": rows},
                "mark": {"type": "line", "clip": True},
                "encoding": {"x": x, "y": {"field": "smoothed", **y}},
            },
            {
                "data": {"values": marks},
                "mark": {"type": "rule", "strokeDash": [5, 4], "strokeWidth": 2},
                "encoding": {
                    "x": x,
                    "color": {
                        "field": "what",
                        "type": "nominal",
                        "legend": {"orient": "bottom", "title": None, "columns": 1, "labelLimit": 500},
                        "scale": {"range": ["#c44e52", "#2a9d5c"]},
                    },
                },
            },
        ],
    }
    ending = "the loss diverged" if found.has_diverged else "the range ended"
    return Chart(title=f"Learning-rate range test, until {ending}", spec=spec)
