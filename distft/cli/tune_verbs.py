"""`distft tune`: searches over settings, and shows how far a search is."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distft.cli.arguments import Overrides, expanded, print_note, say

if TYPE_CHECKING:
    from distft.cluster.tune.driver import Outcome

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
_STATUS = "status"


def _expanded(path: Path | None) -> Path | None:
    return None if path is None else expanded(path)


def tune(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG | status", help="A YAML file with a section `search`.", callback=expanded
        ),
    ],
    overrides: Overrides = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Run the trials again that failed before.")
    ] = False,
    rate_range: Annotated[
        bool,
        typer.Option("--lr-range", help="Instead: one short run whose rate rises until the loss diverges."),
    ] = False,
    lowest: Annotated[float, typer.Option(help="With --lr-range: the rate of the first step.")] = 1e-6,
    highest: Annotated[float, typer.Option(help="With --lr-range: that of the last step.")] = 1.0,
    steps: Annotated[int, typer.Option(help="With --lr-range: steps at most.")] = 150,
    directory: Annotated[
        Path | None,
        typer.Option(
            help="With --lr-range: of its run. Default: run_dir with _lr_range.", callback=_expanded
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="With --lr-range: its chart, .html or .svg.", callback=_expanded),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Search for better settings: each trial is a run with some of them changed. Goes on where it stopped.

    Trials run on the Ray cluster at RAY_ADDRESS, or on this machine. `distft tune status DIR` shows the
    trials of the search in DIR, the run_dir of its configuration, while it runs and later. The exit code is 1
    if no trial is complete and within the constraints. With --lr-range it
    trains once instead, while the learning rate rises, and says which to take.
    """
    if rate_range:
        from distft.cli.lr_range_verb import lr_range

        options = {"lowest": lowest, "highest": highest, "steps": steps}
        lr_range(config, overrides or (), **options, directory=directory, output=output, as_json=as_json)  # type: ignore[arg-type]
        return
    if config == _STATUS:
        show_status(overrides or [], as_json=as_json)
        return
    if not _search(config, overrides or (), retry_failed=retry_failed, as_json=as_json):
        raise typer.Exit(1)


def _search(config: str, overrides: Sequence[str], *, retry_failed: bool, as_json: bool) -> bool:
    """Run the search, and print what it has found; whether there is a best trial."""
    # Ray reads this when it is imported. Hides its long message about a lost worker.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed")
    from distft.cluster.tune.driver import run_search

    def show(text: str) -> None:
        say(text, file=sys.stderr if as_json else None)
        sys.stdout.flush()

    found = run_search(config, overrides, environ=os.environ, retry_failed=retry_failed, show=show)
    if found.metric is not None:
        _write_report(found.directory, show)
    if as_json:
        from distft.search.ranking import search_json

        print(json.dumps(search_json(found.rows, found.metric, found.search, found.directory), indent=1))
    else:
        print_outcome(found)
    return found.best is not None


def _write_report(directory: Path, show: Callable[[str], None]) -> None:
    """Write the search's report beside its files, or say why there is none: the search itself is done."""
    from distft.errors import DistftError
    from distft.report.page import write_report

    path = directory / "report.html"
    try:
        for note in write_report([directory], path):
            show(note)
    except DistftError as error:
        show(f"No report was written: {error}")
    else:
        show(f"report: {path}")


def show_status(arguments: list[str], *, as_json: bool) -> None:
    """Print the trials of a search as its files say."""
    from distft.errors import ConfigError
    from distft.search.status import read_status

    if len(arguments) != 1:
        raise ConfigError("distft tune status DIR: give the run_dir of one search.")
    status = read_status(Path(expanded(arguments[0])))
    for note in status.notes:
        print_note(note)
    if as_json:
        print(json.dumps(status.content, indent=1))
        return
    print_rows(status.table)
    say(status.summary)


def print_outcome(found: "Outcome") -> None:
    """The ranked table, why trials failed, and the best settings."""
    from distft.search.ranking import num_trained_steps, table

    print_rows(table(found.rows, found.metric, found.search))
    say(f"{num_trained_steps(found.trials):,} steps were trained in all.")
    for row in found.rows:
        if row.trial.state == "failed":
            say(f"trial {row.trial.number} failed: {row.trial.reason}")
        if row.violations:
            more = f" (and {len(row.violations) - 1} more)" if len(row.violations) > 1 else ""
            say(f"trial {row.trial.number} breaks a constraint: {row.violations[0]}{more}")
    if found.best is None:
        say("No trial is complete and within the constraints, so there is no best one.")
    else:
        say(f"best: trial {found.best.trial.number}. Train with its settings: distft train {found.best_file}")


def print_rows(rows: list[tuple[str, ...]]) -> None:
    """Print a head and its lines."""
    from distft.cli.report_verbs import print_table

    print_table(rows[0], rows[1:])
