"""Runs the phases of `gpu_check.py` in processes of their own, each with limits, and gathers their rows.

A case that raises costs itself. One that hangs or ends its process costs itself too: the phase goes on with
the next case in another process. This module imports neither torch nor distft.
"""

import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

JsonRow: TypeAlias = dict[str, Any]
_LOG_CHARACTERS = 1500
_STACKS_S = 1.0  # for a hung process to write where it is
_MIN_PHASE_S = 5.0  # a phase with less time is skipped


@dataclass(frozen=True, slots=True)
class Phase:
    """The name of a phase, and how long all its cases may take."""

    name: str
    limit_s: float
    starts_fresh: bool = False  # in a process that has run nothing else


class Worker:
    """One worker process, which waits for a phase."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                start_new_session=True,  # a process group of its own, so that its children end with it
            )
        self._messages: queue.Queue[JsonRow | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        try:
            for line in self._process.stdout:
                self._messages.put(json.loads(line))
        finally:
            self._messages.put(None)

    def send(self, request: JsonRow) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has died, which `receive` shows
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()

    def receive(self, until: float) -> JsonRow | None:
        """The next message; None if the process has ended. Raises `TimeoutError` at time `until`."""
        try:
            return self._messages.get(timeout=max(until - time.monotonic(), 0.001))
        except queue.Empty:
            raise TimeoutError from None

    def exit_code(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(timeout=5)
        return None

    def kill(self, *, with_stacks: bool = False) -> None:
        """End the process and its children; `with_stacks` lets it log first where it is."""
        if with_stacks and self._process.poll() is None:
            self._process.send_signal(signal.SIGUSR1)
            time.sleep(_STACKS_S)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join(timeout=5)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # what it was sent and has not read
            self._process.stdin.close()
        if not self._reader.is_alive():
            self._process.stdout.close()

    def log_end(self) -> str:
        return self.log.read_text(errors="replace")[-_LOG_CHARACTERS:]


class Runner:
    """Runs phases within a budget; `emit` gets each row as soon as it exists."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        work_dir: Path,
        budget_s: float,
        emit: Callable[[JsonRow], None],
        dry: bool = False,
        case_patterns: Sequence[str] = ("*",),
    ) -> None:
        self._case_patterns = list(case_patterns)
        self._command = list(command)
        self._work_dir = work_dir
        self._emit = emit
        self._dry = dry
        self._end = time.monotonic() + budget_s
        self._num_started = 0
        self._current: Worker | None = None  # has run a phase, and can run another
        self._spare = self._start_worker()

    def _start_worker(self) -> Worker:
        self._num_started += 1
        return Worker(self._command, self._work_dir / f"worker_{self._num_started:03}.log")

    def _take_worker(self, *, fresh: bool) -> Worker:
        """The current worker, or one that has had time to import everything; another begins to."""
        taken, self._current = self._current, None
        if taken is not None and not fresh:
            return taken
        if taken is not None:
            taken.kill()
        taken, self._spare = self._spare, self._start_worker()
        return taken

    def close(self) -> None:
        self._spare.kill()
        if self._current is not None:
            self._current.kill()

    def run(self, phase: Phase) -> None:
        """Run all cases of a phase, in as many processes as it takes, until its time is over."""
        began = time.monotonic()
        until = min(began + phase.limit_s, self._end)
        if until - began < min(_MIN_PHASE_S, phase.limit_s):
            left_s = max(self._end - began, 0)
            self._emit(_row(phase, "*", "skipped", f"{left_s:.0f} s of the budget were left"))
            return
        next_case: int | None = 0
        while next_case is not None:
            worker = self._take_worker(fresh=phase.starts_fresh or next_case > 0)
            attempt = _Attempt(phase, worker, until, self._emit)
            next_case = attempt.run(
                {
                    "first_case": next_case,
                    "case_patterns": self._case_patterns,
                    "work_dir": str(self._work_dir),
                    "dry": self._dry,
                }
            )
            if attempt.is_worker_usable:
                self._current = worker


class _Attempt:
    """One worker's share of a phase."""

    def __init__(self, phase: Phase, worker: Worker, until: float, emit: Callable[[JsonRow], None]) -> None:
        self._phase = phase
        self._worker = worker
        self._until = until
        self._emit = emit
        self._names: list[str] = []
        self._running: str | None = None
        self._num_started = 0  # cases that are over or in progress, those of earlier workers included
        self.is_worker_usable = False  # for another phase

    def run(self, request: JsonRow) -> int | None:
        """The first case that another worker has to run; None if the phase is over."""
        first = self._num_started = int(request["first_case"])
        self._worker.send({"phase": self._phase.name, **request})
        case_until = self._until
        try:
            while True:
                message = self._worker.receive(min(case_until, self._until))
                if message is None:
                    self._report_death()
                    break
                if message["kind"] == "cases":
                    self._names = message["names"]
                elif message["kind"] == "start":
                    self._running = self._names[message["index"]]
                    self._num_started = message["index"] + 1
                    case_until = time.monotonic() + message["limit_s"]
                elif message["kind"] == "row":
                    self._running, case_until = None, self._until
                    self._emit({"phase": self._phase.name, **message["row"]})
                elif message["kind"] == "done":
                    self.is_worker_usable = True
                    return None
                else:  # the worker asks for a new process
                    break
        except TimeoutError:
            if self._report_timeout(case_until) == "the phase is over":
                return None
        finally:
            if not self.is_worker_usable:
                self._worker.kill()
        # A worker that did not get as far as a case would fail again.
        has_progressed = first < self._num_started < len(self._names)
        return self._num_started if has_progressed else None

    def _report_death(self) -> None:
        reason = f"its process ended with exit code {self._worker.exit_code()}"
        self._emit({**_row(self._phase, self._running or "*", "died", reason), "log": self._worker.log_end()})

    def _report_timeout(self, case_until: float) -> Literal["the case is over", "the phase is over"]:
        is_phase_over = time.monotonic() >= self._until
        self._worker.kill(with_stacks=True)
        if self._running is not None and is_phase_over and case_until > self._until:
            self._emit(_row(self._phase, self._running, "skipped", "the phase's time ended while it ran"))
        else:
            row = _row(self._phase, self._running or "*", "hung", "it did not end within its time limit")
            self._emit({**row, "log": self._worker.log_end()})
        if not is_phase_over:
            return "the case is over"
        for name in self._names[self._num_started :]:
            self._emit(_row(self._phase, name, "skipped", "the phase's time was over"))
        return "the phase is over"


def _row(phase: Phase, case: str, status: str, reason: str) -> JsonRow:
    return {"phase": phase.name, "case": case, "status": status, "reason": reason}
