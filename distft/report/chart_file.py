"""A chart in a file of its own: HTML or SVG, with everything in it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distft import storage
from distft.errors import ConfigError
from distft.report.chart import Chart

_MARK = "<!-- A chart of distft -->"
_SUFFIXES = (".html", ".svg")


def require_chart_file(path: Path) -> None:
    """Raise `ConfigError` for a name without a chart's ending, and if something else is at `path`."""
    if path.suffix not in _SUFFIXES:
        raise ConfigError(f"{path}: a chart is written as {' or '.join(_SUFFIXES)}: name such a file.")
    if not path.parent.is_dir():
        raise ConfigError(f"{path.parent} is no directory: make it, or name a file elsewhere.")
    if path.is_dir() or (path.exists() and _MARK.encode() not in path.read_bytes()[-200:]):
        raise ConfigError(f"{path} exists, and is no chart of distft: name another file.")
    _library()


def write_chart(chart: Chart, path: Path) -> None:
    """Write the chart in the format of the name's ending. Raises what `require_chart_file` does."""
    require_chart_file(path)
    library = _library()
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


def _library() -> Any:
    try:
        import vl_convert
    except ImportError:
        raise ConfigError(
            "A chart needs vl-convert-python, which draws it: pip install 'distft[report]'."
        ) from None
    return vl_convert


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
