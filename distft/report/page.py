"""One self-contained HTML page: everything that it shows is in it, the library that draws included."""

import functools
import json
from collections.abc import Sequence
from datetime import datetime
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from distft import storage
from distft.errors import ConfigError
from distft.report.html import Content
from distft.report.output_file import drawing_library, require_free_or_own
from distft.report.recorded_run import RecordedRun, is_run
from distft.report.run_page import notes_on, runs_page
from distft.report.search import RecordedSearch, is_search
from distft.report.search_page import notes_on_search, search_page

MAX_BYTES = 5_000_000
_MARK = "<!-- A report of distft"


def content_of(directories: Sequence[str | Path]) -> tuple[Content, list[str]]:
    """The page about these runs, or this search, and notes on what it lacks.

    Raises `ConfigError` for directories that are neither, or damaged.
    """
    paths, repeated = _different(directories)
    searches = [path for path in paths if is_search(path) and not is_run(path)]
    if not searches:
        runs = [RecordedRun.read(path) for path in paths]
        return runs_page(runs), [*repeated, *(note for run in runs for note in notes_on(run))]
    if len(paths) > 1:
        raise ConfigError(f"{searches[0]} is a search, which has a report of its own: give it alone.")
    search = RecordedSearch.read(searches[0])
    return search_page(search), notes_on_search(search)


def _different(directories: Sequence[str | Path]) -> tuple[list[Path], list[str]]:
    """Each directory once, and a note on every further time that it was given."""
    found: dict[Path, Path] = {}
    notes = []
    for path in map(Path, directories):
        if path.resolve() in found:
            notes.append(f"{path} was given twice, and is shown once.")
        found.setdefault(path.resolve(), path)
    return list(found.values()), notes


def write_report(directories: Sequence[str | Path], path: Path) -> list[str]:
    """Write the report of these runs, or of a search; returns notes on what it lacks.

    Raises `ConfigError` as `content_of`, if something else is at `path` or its folder is not there, without
    the library that draws, and for a file of more than `MAX_BYTES`.
    """
    require_free_or_own(path, _MARK, "report", is_mark_last=False)
    content, notes = content_of(directories)
    data = page_of(content)
    if len(data) > MAX_BYTES:
        raise ConfigError(
            f"A report of these {len(directories)} runs would have {len(data):,} bytes, more than "
            f"{MAX_BYTES:,}: give fewer runs."
        )
    storage.commit_bytes(path, data)
    return notes


def page_of(content: Content, *, version: str | None = None) -> bytes:
    """The page, in UTF-8. With a `version` it follows its server, as `server.py` describes."""
    folder = resources.files("distft.report")
    page = Template((folder / "page.html").read_text(encoding="utf-8")).substitute(
        title=escape(content.title),
        connect="" if version is None else "; connect-src 'self'",
        style=(folder / "page.css").read_text(encoding="utf-8"),
        library=_drawing_library(),
        script=(folder / "page.js").read_text(encoding="utf-8"),
        charts=as_script(charts_data(content)),
        version=as_script(version),
        body=content.body,
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )
    return page.encode("utf-8", "replace")  # half a character may stand in a damaged file


def charts_data(content: Content) -> list[dict[str, Any]]:
    """The charts as the page's script reads them."""
    return [{"spec": chart.spec, "hasSteps": chart.has_steps} for chart in content.charts]


def require_drawing_library() -> None:
    """Raise `ConfigError` if the library that draws is not installed."""
    _drawing_library()


@functools.cache  # to bundle it takes a second
def _drawing_library() -> str:
    """Vega, Vega-Lite and vega-embed in one script (0.9 MB), which sets `window.vegaEmbed`."""
    bundle: str = drawing_library("report").javascript_bundle("window.vegaEmbed = vegaEmbed")
    return bundle.replace("</script", "<\\/script")


def as_script(value: Any) -> str:
    """JSON that stands in a script element: no string in it can end the element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
