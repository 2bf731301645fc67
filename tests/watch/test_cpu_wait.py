"""The time for which processes wait for a CPU does not count against a rank."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distft.watch.cpu_wait import CpuWaits, counted_s

if not Path("/proc/self/schedstat").exists():
    pytest.skip("this kernel keeps no account of waits", allow_module_level=True)


@pytest.fixture
def rivals() -> Iterator[list[int]]:
    """The pids of two processes that both work without a break on the same CPU."""
    one = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, {{{one}}})\nprint('ready', flush=True)\nwhile True: pass"
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(2)]
    for process in started:
        assert process.stdout is not None
        process.stdout.readline()
    yield [process.pid for process in started]
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_of_two_busy_processes_on_one_cpu_one_waits_at_any_time(rivals: list[int]) -> None:
    waits = CpuWaits()
    assert [waits.since_last(pid) for pid in rivals] == [0.0, 0.0]
    began, waited_s = time.monotonic(), 0.0
    while waited_s < 0.5:  # on a busier machine both wait, so this comes sooner
        time.sleep(0.05)
        waited_s += sum(waits.since_last(pid) for pid in rivals)
    assert waited_s <= 2 * (time.monotonic() - began)


def test_a_stopped_process_does_not_wait(rivals: list[int]) -> None:
    os.kill(rivals[0], signal.SIGSTOP)
    while Path(f"/proc/{rivals[0]}/stat").read_text().split()[2] != "T":
        time.sleep(0.01)
    waits = CpuWaits()
    waits.since_last(rivals[0])
    time.sleep(0.2)
    assert waits.since_last(rivals[0]) == 0.0


def test_the_waits_of_all_threads_add_up_and_a_process_that_is_gone_has_none(
    tmp_path: Path,
) -> None:
    def write(**threads: int) -> None:
        for name, waited_ns in threads.items():
            folder = tmp_path / "7" / "task" / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "schedstat").write_text(f"5 {waited_ns} 3\n")

    waits = CpuWaits(tmp_path)
    assert waits.since_last(8) == waits.since_last(8) == 0.0
    write(main=4_000_000_000)
    assert waits.since_last(7) == 0.0
    write(main=4_500_000_000, new=250_000_000)
    assert waits.since_last(7) == 0.75


@given(elapsed_s=st.floats(0, 10), waited_s=st.floats(0, 100))
def test_waits_do_not_count_but_a_tenth_of_the_time_always_does(elapsed_s: float, waited_s: float) -> None:
    counted = counted_s(elapsed_s, waited_s)
    assert elapsed_s / 10 <= counted <= elapsed_s
    assert counted >= elapsed_s - waited_s
    if waited_s == 0:
        assert counted == elapsed_s
