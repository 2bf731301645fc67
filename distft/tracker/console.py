"""Shows a run on the console: a progress bar on a terminal, plain lines in a log file."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from distft.tracker.interface import LEDGER_EVENT, Metrics, plain_number
from distft.tracker.jsonl import METRICS_FILE
from distft.tracker.number_format import duration, loss_terms, number, step_line

_WIDE_COLUMNS = 120  # a narrower terminal shows fewer metrics beside the bar
_BAR_COLUMNS = 44  # of the bar and the step's number; losses of single terms are shown if they fit beside
_SAMPLE_CHARACTERS = 160  # of a text that the model has generated
_NARROW_METRICS = ("loss", "tokens_per_s", "skipped_steps", "steps_without_targets")


class ConsoleTracker:
    """Shows steps with loss, lr, speed and time left. Metrics without a loss, and events, get their own line.

    `interval_s` is the minimum time between plain lines; the first and the last step are always shown, and
    that others are not is told once.
    """

    def __init__(
        self,
        max_steps: int,
        *,
        console: Console | None = None,
        interval_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_steps = max_steps
        self._console = console or Console(highlight=False)
        self._interval_s = interval_s
        self._clock = clock
        self._bar: tuple[Progress, TaskID] | None = None
        self._started_at = clock()
        self._first_logged: tuple[float, int] | None = None  # time and step
        self._printed_at = float("-inf")
        self._unprinted = ""
        self._has_told_of_gaps = False

    @property
    def console(self) -> Console:
        """The console in use; printing through it keeps the progress bar intact."""
        return self._console

    def start(
        self,
        run_id: str,  # noqa: ARG002
        config: Mapping[str, Any],  # noqa: ARG002
        run_dir: Path,  # noqa: ARG002
        *,
        resume_step: int | None = None,
    ) -> None:
        self._started_at = self._clock()
        if self._console.is_terminal:
            bar = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=20),
                TextColumn("{task.description}"),
                console=self._console,
                transient=True,
            )
            self._bar = (bar, bar.add_task("", total=self._max_steps, completed=resume_step or 0))
            bar.start()

    def log(self, metrics: Metrics, *, step: int) -> None:
        numbers = {name: plain_number(value) for name, value in metrics.items()}
        if "loss" not in numbers:
            shown = " | ".join(f"{name} {number(value)}" for name, value in numbers.items())
            self._print(f"step {step}/{self._max_steps} | {shown}")
            return
        self._unprinted = f"step {step}/{self._max_steps} | {self._line(numbers, step)}"
        if self._bar is not None:
            bar, task = self._bar
            terms = loss_terms(numbers)
            if self._console.width < _WIDE_COLUMNS:
                names = (*_NARROW_METRICS, *terms)
                numbers = {name: value for name, value in numbers.items() if name in names}
            line = self._line(numbers, step)
            if len(line) > self._console.width - _BAR_COLUMNS:
                numbers = {name: value for name, value in numbers.items() if name not in terms}
                line = self._line(numbers, step)
            bar.update(task, completed=step, description=escape(line))
        elif step >= self._max_steps or self._clock() - self._printed_at >= self._interval_s:
            self._print_step()
        elif not self._has_told_of_gaps:
            self._has_told_of_gaps = True
            self._print(f"a line every {self._interval_s:g} s; {METRICS_FILE} has all logged steps")

    def show(self, record: Mapping[str, Any], *, step: int) -> None:
        """Shows the texts that were generated; tables are for `distft report`."""
        for sample in record.get("samples", ()):
            text = f"{sample['prompt']}|{sample['text']}".replace("\n", " ")
            self._print(f"step {step} | {text[:_SAMPLE_CHARACTERS]}")

    def event(self, kind: str, **fields: Any) -> None:
        if kind == LEDGER_EVENT:
            return  # only for `distft audit`; it can be long
        shown = [f"{name.replace('_', ' ')} {_field(value)}" for name, value in fields.items()]
        self._print(" | ".join([kind.replace("_", " "), *shown]))

    def finish(self, status: str) -> None:
        if self._bar is not None:
            self._bar[0].stop()
            self._bar = None
        self._print_step()
        self._print(f"{status} after {duration(self._clock() - self._started_at)}")

    def _line(self, numbers: dict[str, float | int], step: int) -> str:
        return " | ".join(text for text in (step_line(numbers), self._time_left(step)) if text)

    def _time_left(self, step: int) -> str:
        """Estimated from the pace since the first logged step, which excludes compilation."""
        now = self._clock()
        since, first_step = self._first_logged = self._first_logged or (now, step)
        if step <= first_step or step >= self._max_steps:
            return ""
        return f"{duration((now - since) / (step - first_step) * (self._max_steps - step))} left"

    def _print_step(self) -> None:
        if self._unprinted:
            self._print(self._unprinted)
            self._printed_at = self._clock()
            self._unprinted = ""

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _field(value: Any) -> str:
    return number(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
