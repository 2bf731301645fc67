"""The console tracker shows plain lines in a log file, a bar on a terminal, and the same metrics in both."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from distft.tracker import ConsoleTracker
from distft.tracker.number_format import amount, duration, number

METRICS = {
    "loss": 3.21454,
    "lr": 3e-4,
    "grad_norm": 1.0213,
    "tokens_per_s": 12345.4,
    "step_s": 1.2,
    "mfu": 0.3,
}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def plain() -> tuple[ConsoleTracker, io.StringIO, Clock]:
    out, clock = io.StringIO(), Clock()
    return ConsoleTracker(200, console=Console(file=out), interval_s=5, clock=clock), out, clock


def test_a_plain_line_shows_step_loss_speed_and_time_left() -> None:
    tracker, out, clock = plain()
    tracker.start("run", {}, Path())
    clock.now += 100
    tracker.log(METRICS, step=1)
    clock.now += 39
    tracker.log(METRICS, step=40)
    assert out.getvalue().splitlines(keepends=True)[-1] == (
        "step 40/200 | loss 3.2145 | lr 3.0e-04 | grad norm 1.02 | 12,345 tok/s | 1.2 s/step | 02:40 left\n"
    )


TERMS = {
    "loss": 3.2,
    "topic/loss": 0.53126,
    "topic/accuracy": 0.5,
    "pair/loss": 2.7,
    "pair/sentence_order/loss": 0.7,
    "pair/masked_token/loss": 2.0,
}


def test_a_line_shows_the_losses_of_single_terms_if_there_are_several() -> None:
    tracker, out, _ = plain()
    tracker.log(TERMS, step=200)
    tracker.log({"loss": 3.2, "topic/loss": 3.2, "epoch": 1.0}, step=200)
    assert out.getvalue().splitlines() == [
        "step 200/200 | loss 3.2000 (topic 0.5313, pair/sentence_order 0.7, pair/masked_token 2)",
        "step 200/200 | loss 3.2000",
    ]


@pytest.mark.parametrize(("width", "shows_terms"), [(80, False), (119, True), (160, True)])
def test_a_terminal_shows_the_losses_of_terms_where_they_fit(width: int, shows_terms: bool) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width, legacy_windows=False)
    tracker = ConsoleTracker(200, console=console, clock=Clock())
    tracker.start("run", {}, Path())
    tracker.log(TERMS, step=40)
    assert tracker._bar is not None
    shown = str(tracker._bar[0].tasks[0].description)
    tracker.finish("preempted")
    assert shown.startswith("loss 3.2000")
    assert ("(topic 0.5313, " in shown) is shows_terms


def test_plain_lines_appear_at_intervals_and_for_the_last_step() -> None:
    tracker, out, clock = plain()
    tracker.start("run", {}, Path())
    for step in range(1, 201):
        clock.now += 0.5
        tracker.log({"loss": 1.0}, step=step)
    steps = [int(n) for n in re.findall(r"^step (\d+)/", out.getvalue(), re.MULTILINE)]
    assert steps == [*range(1, 200, 10), 200]
    assert out.getvalue().count("a line every 5 s; metrics.jsonl has all logged steps\n") == 1


def test_nothing_is_said_of_gaps_while_there_are_none() -> None:
    tracker, out, clock = plain()
    tracker.start("run", {}, Path())
    for step in (1, 2):
        clock.now += 6
        tracker.log({"loss": 1.0}, step=step)
    assert "every" not in out.getvalue()


def test_the_last_step_of_a_preempted_run_is_shown() -> None:
    tracker, out, clock = plain()
    tracker.start("run", {}, Path())
    for step in (1, 2, 3):
        clock.now += 0.1
        tracker.log({"loss": step}, step=step)
    tracker.finish("preempted")
    assert out.getvalue().splitlines()[-2:] == [
        "step 3/200 | loss 3.0000 | 00:20 left",
        "preempted after 00:00",
    ]


def test_time_left_is_estimated_from_the_first_logged_step() -> None:
    tracker, out, clock = plain()
    tracker.start("run", {}, Path(), resume_step=100)
    clock.now += 50  # loading, compiling
    tracker.log({"loss": 1.0}, step=101)
    assert "left" not in out.getvalue()
    clock.now += 10
    tracker.log({"loss": 1.0}, step=151)
    assert out.getvalue().endswith("00:10 left\n")


def test_evaluations_and_events_have_their_own_lines() -> None:
    tracker, out, _ = plain()
    tracker.start("run", {}, Path())
    tracker.log({"valid_loss": 3.21454, "perplexity": 24.9, "num_target_tokens": 12345}, step=40)
    tracker.event("checkpoint_saved", step=1000, path="runs/[a]/x", seconds=0.5)
    assert out.getvalue().splitlines() == [
        "step 40/200 | valid_loss 3.2145 | perplexity 24.9 | num_target_tokens 12,345",
        "checkpoint saved | step 1,000 | path runs/[a]/x | seconds 0.5",
    ]


def test_a_long_line_is_not_wrapped_in_a_log_file() -> None:
    tracker, out, _ = plain()
    tracker.event("x", text="y " * 300)
    assert len(out.getvalue().splitlines()) == 1


def test_a_terminal_shows_a_bar_until_the_end() -> None:
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, force_terminal=True, width=120, legacy_windows=False)
    tracker = ConsoleTracker(200, console=console, clock=clock)
    tracker.start("run", {}, Path(), resume_step=10)
    clock.now += 3
    tracker.log(METRICS, step=40)
    tracker.event("checkpoint_saved", step=40)
    tracker.finish("completed")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert "step 40/200" in text
    assert "━" in text
    assert "loss 3.2145" in text
    assert "checkpoint saved | step 40" in text
    assert text.rstrip().endswith("completed after 00:03")


def test_a_narrow_terminal_shows_the_bar_the_loss_and_the_time_left() -> None:
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, force_terminal=True, width=80, legacy_windows=False)
    tracker = ConsoleTracker(100_000, console=console, clock=clock)
    tracker.start("run", {}, Path())
    clock.now += 30
    tracker.log(METRICS, step=1)
    clock.now += 3999.9
    tracker.log(METRICS, step=40_000)
    tracker.finish("completed")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert re.search(r"step 40000/100000 ━+.* loss 3\.2145 \| 12,345 tok/s \| 1:40:00 left", text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "00:00"), (12.4, "00:12"), (3723, "1:02:03"), (183845, "2d 03:04:05"), (-1, "00:00")],
)
def test_durations_are_shown_as_days_hours_minutes_seconds(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (3, "3"), (12345, "12,345"), (1e-5, "1e-05"), (0.5, "0.5"), (1e6, "1,000,000")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(12345, "documents", "12,345 documents"), (1.5, "files", "1.5 files"), (1536, "bytes", "1.5 KiB"),
     (10, "bytes", "10 B"), (1 << 60, "bytes", "1,024.0 PiB")],
)  # fmt: skip
def test_amounts_have_a_unit(value: float, unit: str, text: str) -> None:
    assert amount(value, unit) == text
