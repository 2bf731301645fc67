"""A chart in a file of its own: HTML or SVG, with everything in it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distft import storage
from distft.errors import ConfigError
from distft.report.chart import Chart
from distft.report.output_file import drawing_library, require_free_or_own

_MARK = "<!-- A chart of distft -->"
_SUFFIXES = (".html", ".svg")


def require_chart_file(path: Path) -> None:
    """Raise `ConfigError` for a name without a chart's ending, and if something else is at `path`."""
    if path.suffix not in _SUFFIXES:
        raise ConfigError(f"{path}: a chart is written as {' or '.join(_SUFFIXES)}: name such a file.")
    require_free_or_own(path, _MARK, "chart", is_mark_last=True)
    drawing_library("chart")


def write_chart(chart: Chart, path: Path) -> None:
    """Write the chart in the format of the name's ending. Raises what `require_chart_file` does."""
    require_chart_file(path)
    library = drawing_library("chart")
    spec = {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "title": chart.title,
        "background": "white",
        **chart.spec,
    }
    if path.suffix == ".svg":
        text = library.vegalite_to_svg(spec)
    else:
        text = library.vegalite_to_html(spec, bundle=True)
    storage.commit_bytes(path, f"{text}\n{_MARK}\n".encode())


def curves(
    rows: Sequence[dict[str, Any]],
    *,
    x: tuple[str, str],
    y: tuple[str, str],
    color: tuple[str, str],
    columns: str,
    is_color_ordered: bool,
    is_y_logarithmic: bool,
) -> dict[str, Any]:
    """A specification of lines over a logarithmic x: fields with titles, side by side by `columns`."""
    scale: dict[str, Any] = {"type": "log"} if is_y_logarithmic else {"zero": False}
    values = sorted({row[x[0]] for row in rows})
    return {
        "data": {"values": list(rows)},
        "width": 320,
        "height": 260,
        "mark": {"type": "line", "point": True},
        "encoding": {
            "x": {
                "field": x[0],
                "type": "quantitative",
                "title": x[1],
                "scale": {"type": "log", "nice": False},
                "axis": {"values": values, "format": "~g"},
            },
            "y": {
                "field": y[0],
                "type": "quantitative",
                "title": y[1],
                "scale": scale,
                "axis": {"tickCount": 6},
            },
            "color": {
                "field": color[0],
                "type": "ordinal" if is_color_ordered else "nominal",
                "title": color[1],
            },
            "column": {"field": columns, "type": "nominal", "title": None},
            "tooltip": [{"field": field} for field, _ in (x, y, color)],
        },
    }
