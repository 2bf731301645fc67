"""Progress of long work is shown as plain lines or a bar, and counts the units of all threads."""

import io
import threading

import pytest
from rich.console import Console

from distft.tracker import progress


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_show_percentage_rate_and_time_left() -> None:
    out, clock = io.StringIO(), Clock()
    with progress(
        1000, "tokenizing", "documents", console=Console(file=out), interval_s=5, clock=clock
    ) as shown:
        for _ in range(10):
            clock.now += 1
            shown.advance(100)
    assert out.getvalue().splitlines() == [
        "tokenizing: 500 documents of 1,000 documents (50%), 100 documents/s, 00:05 left",
        "tokenizing: 1,000 documents of 1,000 documents (100%), 100 documents/s, 00:00 left",
        "tokenizing: 1,000 documents done in 00:10, 100 documents/s",
    ]


def test_work_of_unknown_size_shows_a_rate_and_its_total_can_be_set_later() -> None:
    out, clock = io.StringIO(), Clock()
    with progress(None, "reading", "bytes", console=Console(file=out), interval_s=5, clock=clock) as shown:
        clock.now = 6
        shown.advance(6 << 20)
        shown.set_total(12 << 20)
        clock.now = 12
        shown.advance(3 << 20)
    assert out.getvalue().splitlines() == [
        "reading: 6.0 MiB, 1.0 MiB/s",
        "reading: 9.0 MiB of 12.0 MiB (75%), 768.0 KiB/s, 00:04 left",
        "reading: 9.0 MiB done in 00:12, 768.0 KiB/s",
    ]


def test_failed_work_is_shown_as_stopped() -> None:
    out = io.StringIO()

    def fail() -> None:
        with progress(10, "reading", "files", console=Console(file=out), clock=Clock()) as shown:
            shown.advance(3)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert out.getvalue() == "reading: 3 files stopped in 00:00\n"


def test_work_that_fails_before_the_first_unit_has_no_line() -> None:
    out = io.StringIO()
    with pytest.raises(RuntimeError), progress(10, "reading", "files", console=Console(file=out)):
        raise RuntimeError
    assert out.getvalue() == ""


@pytest.mark.parametrize("is_terminal", [False, True])
def test_units_of_all_threads_are_counted(is_terminal: bool) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=is_terminal, width=100)
    with progress(4000, "tokenizing", "documents", console=console) as shown:
        threads = [threading.Thread(target=lambda: [shown.advance() for _ in range(1000)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert "4,000 documents" in out.getvalue()
