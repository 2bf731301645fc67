"""The command that shows a run while it goes on: `watch`."""

import contextlib
import select
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from distft.cli.arguments import expanded


def watch(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Its run_dir.", callback=expanded)],
    interval_s: Annotated[float, typer.Option("--interval", min=0.1, help="Seconds between looks.")] = 2.0,
    wait_s: Annotated[
        float, typer.Option("--wait", min=0, help="Seconds to wait for a run that has not begun.")
    ] = 60.0,
) -> None:
    """Show a run while it goes on: state, time left, loss, best validation, speed, newest events.

    Ends with the run, with q or Ctrl-C. The run does not notice.
    """
    from rich.console import Console

    from distft.report.live import plain_line

    console = Console(highlight=False)
    states = _states(run, interval_s, wait_s)
    if console.is_terminal:
        _show(console, states)
        return
    shown = ""
    for state in states:
        line = plain_line(state)
        if line != shown:
            print(line, flush=True)
        shown = line


def _states(directory: Path, interval_s: float, wait_s: float) -> Iterator[Any]:
    """The run at each look, until it is over. Raises `ConfigError` if it does not begin within `wait_s`."""
    from distft.errors import ConfigError
    from distft.report.live import LiveState
    from distft.report.recorded_run import FollowedRun, RecordedRun, is_run

    followed = FollowedRun(directory)
    give_up_s = time.monotonic() + wait_s
    while True:
        if not is_run(directory) and time.monotonic() >= give_up_s:
            RecordedRun.of(followed)  # raises
            raise ConfigError(f"{directory} is no run.")
        recorded = RecordedRun.of(followed) if is_run(directory) else None
        state = LiveState(directory=directory, run=recorded, now_s=time.time())
        yield state
        if state.is_over:
            return
        if _is_left(interval_s):
            return


def _show(console: Any, states: Iterator[Any]) -> None:
    from rich.live import Live

    from distft.report.live import panel_of

    with _single_keys(), Live(console=console, auto_refresh=False, transient=False) as live:
        for state in states:
            live.update(panel_of(state, console.width), refresh=True)


def _is_left(seconds: float) -> bool:
    """Wait; returns at once, and True, if q is pressed."""
    if not sys.stdin.isatty():
        time.sleep(seconds)
        return False
    readable, _, _ = select.select([sys.stdin], [], [], seconds)
    return bool(readable) and sys.stdin.read(1).lower() in {"q", ""}


@contextlib.contextmanager
def _single_keys() -> Iterator[None]:
    """A key counts when it is pressed, without Enter; Ctrl-C interrupts as ever."""
    if not sys.stdin.isatty():
        yield
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
