"""The commands that read what runs have written: `runs`, `compare` and `report`."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from distft.cli.arguments import all_expanded, expanded, print_note, say


def _expanded_if_given(path: Path | None) -> Path | None:
    return None if path is None else expanded(path)


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def runs(
    directory: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="With runs in it, up to four folders down.", callback=expanded),
    ] = Path("runs"),
    metric: Annotated[
        str | None, typer.Option(help="To show, with its best value. Default: a run's own.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the runs in a directory: state, step, metric, and when each wrote last. The newest comes first.

    A run is silent if it has neither ended nor written anything for its hang_timeout_s.
    """
    from distft.errors import ConfigError
    from distft.report.recorded_run import RecordedRun, find_runs

    found = []
    for path in find_runs(directory):
        try:
            found.append(RecordedRun.read(path))
        except (ConfigError, OSError) as error:
            print_note(f"{path} left out: {error}")
    if not found:
        raise ConfigError(f"No run has begun in {directory}.")
    if metric is not None and not any(run.values(metric) for run in found):
        known = sorted({name for run in found for name in run.metric_names()})
        raise ConfigError(f"--metric {metric}: no run has logged it; there are {', '.join(known) or 'none'}.")
    found.sort(key=lambda run: -run.written_at)
    rows = [_summary(run, directory, metric or run.main_metric) for run in found]
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        _print_runs(rows)


def _summary(run: Any, directory: Path, metric: str) -> dict[str, Any]:
    best = run.best(metric)
    return {
        "run": str(run.directory.relative_to(directory)),
        "state": run.state(),
        "step": run.step,
        "max_steps": run.max_steps,
        "starts": run.num_starts,
        "metric": metric,
        "value": best and best[1],
        "at_step": best and best[0],
        "written_at": run.written_at,
    }


def _print_runs(rows: list[dict[str, Any]]) -> None:
    from datetime import datetime

    from distft.tracker.number_format import number

    cells = []
    for row in rows:
        of = "" if row["max_steps"] is None else f"/{row['max_steps']:,}"
        value = "-" if row["value"] is None else f"{number(row['value'])} at {row['at_step']:,}"
        when = datetime.fromtimestamp(row["written_at"]).strftime("%Y-%m-%d %H:%M")
        cells.append((row["run"], row["state"], f"{row['step']:,}{of}", row["metric"], value, when))
    print_table(("run", "state", "step", "metric", "best", "written"), cells)


def compare(
    directories: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Two runs or more.", callback=all_expanded)
    ],
    as_json: AsJson = False,
) -> None:
    """Print the settings in which runs differ, and what each of them reached."""
    from distft.errors import ConfigError
    from distft.report.comparison import differing_settings, results
    from distft.report.recorded_run import RecordedRun

    if len(directories) < 2:
        raise ConfigError("One run has nothing to be compared with: give two or more.")
    found = [RecordedRun.read(path) for path in directories]
    settings, reached = differing_settings(found), results(found)
    if as_json:
        tables = {"settings": settings, "results": reached}
        print(json.dumps({name: {r.name: r.values for r in rows} for name, rows in tables.items()}, indent=1))
        return
    from distft.tracker.number_format import number

    print_table(("setting", *directories), [(r.name, *map(_text, r.values)) for r in settings])
    print()
    cells = [(r.name, *("-" if v is None else number(v) for v in r.values)) for r in reached]
    print_table(("result", *directories), cells)


def report(
    directories: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="One run, several, or a search.", callback=all_expanded),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="The file to write, such as report.html.", callback=_expanded_if_given
        ),
    ] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Show it as a page on this machine that follows the runs.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of --serve. Default: one that is free.")] = 0,
) -> None:
    """Write one HTML file about runs or a search, which needs no network: curves, mistakes, settings."""
    from distft.errors import ConfigError
    from distft.report.page import write_report

    if serve == (output is not None):
        raise ConfigError("Name either a file with -o, such as report.html, or --serve.")
    if serve:
        _serve(directories, port)
        return
    assert output is not None
    for note in write_report(directories, output):
        print_note(note)
    say(f"{output}: {output.stat().st_size / 1e6:.1f} MB")


def _serve(directories: list[str], port: int) -> None:
    from distft.report.server import ReportServer

    server = ReportServer(directories, port)
    say(f"{server.url} shows it until Ctrl-C")
    try:
        server.serve()
    except KeyboardInterrupt:
        say("closed")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def print_table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print a table: its head, and a line of texts for each row. Control characters in them are escaped."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from distft.config.printable import printable

    def cells(texts: Iterable[str]) -> Iterator[str]:
        return (escape(printable(text)) for text in texts)

    table = Table(*cells(heads), box=None, pad_edge=False)
    for row in rows:
        table.add_row(*cells(row))
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 10_000  # nothing is cut in a file or a pipe
    console.print(table)
