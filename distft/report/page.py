"""One HTML file about one run or several, with everything in it: no server, no network."""

import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from distft import storage
from distft.config import redact
from distft.errors import ConfigError
from distft.report.charts import Chart, charts_of
from distft.report.comparison import Row, differing_settings, flatten, results
from distft.report.recorded_run import BEGINS, RecordedRun
from distft.tracker.number_format import duration, number

MAX_BYTES = 5_000_000
_MARK = b"<!-- A report of distft"  # in the first bytes of each


def write_report(runs: Sequence[RecordedRun], path: Path) -> list[str]:
    """Write the report of these runs; returns notes on what it lacks.

    Raises `ConfigError` if something else is at `path`, without the library that draws, and for a file of
    more than `MAX_BYTES`.
    """
    if path.is_dir() or (path.exists() and _MARK not in _first_bytes(path)):
        raise ConfigError(f"{path} exists, and is no report of distft: name another file.")
    page = report_page(runs)
    data = page.encode()
    if len(data) > MAX_BYTES:
        raise ConfigError(
            f"A report of these {len(runs)} runs would have {len(data):,} bytes, more than {MAX_BYTES:,}: "
            "give fewer runs."
        )
    storage.commit_bytes(path, data)
    return [f"{run.directory} has logged no metrics yet" for run in runs if not run.metrics]


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(200)


def report_page(runs: Sequence[RecordedRun]) -> str:
    """The page, as text."""
    names = _names(runs)
    charts = charts_of(runs, names)
    parts = [*_heads(runs, names)]
    if len(runs) > 1:
        different = differing_settings(runs)
        parts.append(
            _section("Differences of the settings", _table(("setting", *names), map(_cells, different)))
        )
    parts.append(_section("Results", _table(("", *names), map(_number_cells, results(runs)))))
    parts.append(_section("Curves", _PLACE_SELECT + _figures(charts)))
    for run, name in zip(runs, names, strict=True):
        suffix = "" if len(runs) == 1 else f" of {name}"
        parts.append(_folded(f"Data{suffix}", _data_table(run)))
        settings = [(key, _text(value)) for key, value in flatten(redact(dict(run.settings))).items()]
        parts.append(_folded(f"Settings{suffix}", _table(("setting", "value"), settings)))
    folder = resources.files("distft.report")
    return Template((folder / "page.html").read_text(encoding="utf-8")).substitute(
        title=escape(", ".join(names)),
        style=(folder / "page.css").read_text(encoding="utf-8"),
        library=_drawing_library(),
        script=(folder / "page.js").read_text(encoding="utf-8"),
        charts=_as_script([{"spec": chart.spec, "hasSteps": chart.has_steps} for chart in charts]),
        body="\n".join(parts),
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )


def _drawing_library() -> str:
    """Vega, Vega-Lite and vega-embed in one script (0.9 MB), which sets `window.vegaEmbed`."""
    try:
        from vl_convert import javascript_bundle
    except ImportError:
        raise ConfigError(
            "A report needs vl-convert-python, which brings the library that draws its charts: "
            "pip install 'distft[report]'."
        ) from None
    bundle = javascript_bundle("window.vegaEmbed = vegaEmbed")
    return bundle.replace("</script", "<\\/script")


def _names(runs: Sequence[RecordedRun]) -> list[str]:
    """Short names: the directories without what is common to all."""
    paths = [run.directory.resolve() for run in runs]
    if len(paths) == 1:
        return [paths[0].name]
    common = 0
    while len({path.parts[common] for path in paths if len(path.parts) > common + 1}) == 1 and all(
        len(path.parts) > common + 1 for path in paths
    ):
        common += 1
    return [str(Path(*path.parts[common:])) for path in paths]


def _heads(runs: Sequence[RecordedRun], names: Sequence[str]) -> Iterable[str]:
    for run, name in zip(runs, names, strict=True):
        model, engine = run.settings.get("model"), run.settings.get("engine")
        facts = {
            "state": run.state(),
            "step": f"{run.step:,}" + ("" if run.max_steps is None else f" of {run.max_steps:,}"),
            "starts": f"{run.num_starts}",
            "ranks": " → ".join(_changes(run, "world_size")) or "-",
            "engine": _kind(engine),
            "device": " → ".join(_changes(run, "device")) or "-",
            "model": _kind(model),
            "last written": datetime.fromtimestamp(run.written_at).strftime("%Y-%m-%d %H:%M"),
        }
        best = run.best(run.main_metric)
        if best is not None:
            facts[f"best {run.main_metric}"] = f"{number(best[1])} at step {best[0]:,}"
        times = [line["time"] for line in run.events if isinstance(line.get("time"), float | int)]
        if times:
            facts["from first to last event"] = duration(max(times) - min(times))
        cards = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items())
        yield f"<section><h2>{escape(name)}</h2><dl class=cards>{cards}</dl></section>"


def _changes(run: RecordedRun, field: str) -> list[str]:
    """The values of a field of the starts, each once in a row."""
    found = [str(e[field]) for e in run.events if e["kind"] in BEGINS and field in e]
    return [value for index, value in enumerate(found) if index == 0 or value != found[index - 1]]


def _kind(section: Any) -> str:
    return str(section.get("type", "transformer")) if isinstance(section, dict) else "-"


def _data_table(run: RecordedRun) -> str:
    lines = {(str(e.get("use")), str(e.get("summary"))): None for e in run.events if e["kind"] == "data"}
    return _table(("use", "what it has"), list(lines))


def _cells(row: Row) -> tuple[str, ...]:
    return (row.name, *map(_text, row.values))


def _number_cells(row: Row) -> tuple[str, ...]:
    return (row.name, *("-" if value is None else number(value) for value in row.values))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


_PLACE_SELECT = (
    '<p><label>Along <select id="place"><option value="step">steps</option>'
    '<option value="tokens">tokens</option><option value="hours">hours of work</option></select></label></p>'
)


def _figures(charts: Sequence[Chart]) -> str:
    figures = "".join(
        f"<figure><figcaption>{escape(chart.title)}</figcaption>"
        f'<div class="chart" id="chart{index}"></div></figure>'
        for index, chart in enumerate(charts)
    )
    return f'<div class="figures">{figures}</div>'


def _as_script(value: Any) -> str:
    """JSON that stands in a script element: no string in it can end the element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
