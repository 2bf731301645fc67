"""Progress of long work: a bar on a terminal, a plain line every few seconds in a log file."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from distft.tracker.number_format import amount, duration


class ProgressDisplay(Protocol):
    """The object that `progress` yields; thread-safe."""

    def advance(self, count: float = 1) -> None:
        """Report `count` more units as done."""

    def set_total(self, total: float) -> None:
        """Set or correct the total number of units."""


@contextmanager
def progress(
    total: float | None,
    description: str,
    unit: str,
    *,
    console: Console | None = None,
    interval_s: float = 5.0,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[ProgressDisplay]:
    """Show the progress of some work, with its rate and the time left.

    `total` is in units (None: unknown). `unit` is a plural such as `documents`; `bytes` are scaled to MiB.
    Writes to stderr by default. `interval_s` is the minimum time between plain lines.
    """
    screen = console or Console(stderr=True, highlight=False)
    if not screen.is_terminal:
        plain = _PlainProgress(total, description, unit, console=screen, interval_s=interval_s, clock=clock)
        try:
            yield plain
        except BaseException:
            if plain.has_advanced:
                plain.close("stopped")
            raise
        plain.close("done")
        return
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        _AmountColumn(unit),
        TimeRemainingColumn(),
        console=screen,
    )
    with bar:
        yield _BarProgress(bar, total, description)


class _BarProgress:
    def __init__(self, bar: Progress, total: float | None, description: str) -> None:
        self._bar = bar
        self._task = bar.add_task(escape(description), total=total)

    def advance(self, count: float = 1) -> None:
        self._bar.advance(self._task, count)

    def set_total(self, total: float) -> None:
        self._bar.update(self._task, total=total)


class _AmountColumn(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        whole = f" of {amount(task.total, self._unit)}" if task.total else ""
        speed = task.finished_speed or task.speed
        rate = f", {amount(speed, self._unit)}/s" if speed else ""
        return Text(f"{amount(task.completed, self._unit)}{whole}{rate}")


class _PlainProgress:
    def __init__(
        self,
        total: float | None,
        description: str,
        unit: str,
        *,
        console: Console,
        interval_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._total, self._description, self._unit = total, description, unit
        self._console, self._interval_s, self._clock = console, interval_s, clock
        self._lock = threading.Lock()
        self._done = 0.0
        self._started_at = self._printed_at = clock()

    @property
    def has_advanced(self) -> bool:
        """Whether any unit is done. A failure before that needs no progress line."""
        return self._done > 0

    def advance(self, count: float = 1) -> None:
        with self._lock:
            self._done += count
            now = self._clock()
            if now - self._printed_at >= self._interval_s:
                self._printed_at = now
                self._print(self._line(now))

    def set_total(self, total: float) -> None:
        with self._lock:
            self._total = total

    def close(self, result: str) -> None:
        with self._lock:
            elapsed = self._clock() - self._started_at
            self._print(
                f"{amount(self._done, self._unit)} {result} in {duration(elapsed)}{self._rate(elapsed)}"
            )

    def _line(self, now: float) -> str:
        elapsed = now - self._started_at
        if not self._total:
            return f"{amount(self._done, self._unit)}{self._rate(elapsed)}"
        share = self._done / self._total
        left = f", {duration(elapsed / share - elapsed)} left" if 0 < share <= 1 else ""
        whole = f"{amount(self._done, self._unit)} of {amount(self._total, self._unit)} ({share:.0%})"
        return f"{whole}{self._rate(elapsed)}{left}"

    def _rate(self, elapsed: float) -> str:
        return f", {amount(self._done / elapsed, self._unit)}/s" if elapsed > 0 and self._done else ""

    def _print(self, line: str) -> None:
        self._console.print(f"{self._description}: {line}", markup=False, highlight=False, soft_wrap=True)
