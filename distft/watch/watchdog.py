"""The watchdog of a rank: a thread that finds hung and slow ranks, and ends the run after a hang."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from torch._C._distributed_c10d import HashStore

from distft.collectives import Collectives
from distft.errors import DistftError, TrainingError
from distft.tracker import HANG_EVENT, EventLog
from distft.watch.cpu_wait import CpuWaits, counted_s
from distft.watch.device_clock import CudaClock, DeviceClock
from distft.watch.hang_detection import Hang, LastSeen, describe_hang, find_hang, hang_event
from distft.watch.heartbeat import HeartbeatRecorder
from distft.watch.heartbeat_exchange import HangReport, HeartbeatExchange
from distft.watch.rank_process import RankProcess
from distft.watch.stragglers import Straggler, StragglerDetector

_NUM_DECIDERS = 2  # ranks that watch all; the others watch only these, so the store's load is O(ranks)
_STORE_TIMEOUT_S = 2.0  # for a store whose process may have stopped
_CLOSER_LOOK = 0.25  # of `hang_timeout_s`, from which on the waits for a CPU are read
_POLL_S = 0.1
_OUTPUT_S = 1.0  # time for Ray's thread to forward a rank's last output to the driver


class Watchdog:
    """Inside its `with` block, finds ranks that hang and ranks that are slow.

    A hang ends the run on every rank. A rank of the same launcher kills the hung process, which frees the
    ranks that wait for it in a collective, and their blocks raise `TrainingError`. A rank that stays blocked
    ends its own process with exit code 1, so that the launcher can restart all ranks. A single rank watches
    its GPU, if it has one.
    """

    def __init__(
        self,
        collectives: Collectives,
        run_dir: Path,
        *,
        heartbeat_s: float,
        hang_timeout_s: float,
        interval_steps: int,
        clock: DeviceClock | None = None,
    ) -> None:
        """Called by all ranks together. With `heartbeat_s=0`, or a single rank on a CPU, it watches nothing.

        `clock` is that of the rank's device; None: of the CPU.
        """
        store = collectives.store() if heartbeat_s > 0 else None
        if heartbeat_s > 0 and store is None and isinstance(clock, CudaClock):
            store = HashStore()  # in this process, which is the only one
        self.heartbeat = HeartbeatRecorder(None if store is None else clock)
        self._begun_at = time.time()
        self._rank = collectives.rank
        self._world_size = collectives.world_size
        self._run_dir = run_dir
        self._heartbeat_s = heartbeat_s
        self._hang_timeout_s = hang_timeout_s
        self._is_closed = threading.Event()
        self._hang_message = ""  # of a hang that ends the run
        self._suspicion = ""  # a hang that this rank sees and that has not been reported
        self._num_checks_of_hang = 0
        self._straggler_detector = StragglerDetector(interval_steps=interval_steps)
        self._stragglers: list[tuple[Straggler, RankProcess]] = []
        self._cpu_waits = CpuWaits()
        self._own_process = RankProcess.current()
        self._processes: list[RankProcess] = []
        self._exchange: HeartbeatExchange | None = None
        self._thread = threading.Thread(target=self._watch, name="distft-watchdog", daemon=True)
        if store is not None:
            deciders = range(min(_NUM_DECIDERS, self._world_size))
            watched = range(self._world_size) if self._rank in deciders else (*deciders, self._rank)
            self._exchange = HeartbeatExchange(
                store, self.heartbeat, rank=self._rank, watched=watched, heartbeat_s=heartbeat_s
            )
            self._exchange.post()
            self._processes = collectives.all_gather(self._own_process)

    def __enter__(self) -> Self:
        if self._exchange is not None:
            self._exchange.start()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Post that this rank has ended. Raises `TrainingError` if another rank's hang ended the block."""
        if self._exchange is None:
            return
        self.heartbeat.end()
        self._is_closed.set()
        self._exchange.end(_STORE_TIMEOUT_S)
        self._thread.join(_STORE_TIMEOUT_S)
        report = self._exchange.hang_report
        if report is not None and not self._hang_message:
            self._kill(report.ranks)
            self._hang_message = report.text
        message = self._hang_message or self._suspicion
        if message and isinstance(error, Exception) and not isinstance(error, DistftError):
            raise TrainingError(message) from error

    def take_stragglers(self) -> list[tuple[Straggler, RankProcess]]:
        """The slow ranks found since the last call; always empty on ranks other than 0."""
        found, self._stragglers = self._stragglers, []
        return found

    def _watch(self) -> None:
        assert self._exchange is not None
        last_s = time.monotonic()
        while self._exchange.is_running and not self._is_closed.wait(self._heartbeat_s):
            now_s = time.monotonic()
            # More time passed only if this process itself was stopped, which says nothing about the others.
            last_seen = self._advance(min(now_s - last_s, 2 * self._heartbeat_s))
            last_s = now_s
            if (report := self._exchange.hang_report) is not None:
                self._end_run(report.ranks, report.text)
                return
            hang = find_hang(
                last_seen,
                observer=self._rank,
                hang_timeout_s=self._hang_timeout_s,
                sees_all=self._rank < _NUM_DECIDERS,
            )
            self._suspicion = "" if hang is None else self._summarize(hang)
            self._num_checks_of_hang = 0 if hang is None else self._num_checks_of_hang + 1
            if hang is not None and self._is_reporter(hang, last_seen):
                self._report(hang, last_seen)
                return
            if self._rank == 0 and last_seen:
                works = {rank: seen.heartbeat.work for rank, seen in last_seen.items()}
                for straggler in self._straggler_detector.update(works, now_s):
                    self._stragglers.append((straggler, self._processes[straggler.rank]))

    def _advance(self, elapsed_s: float) -> Mapping[int, LastSeen]:
        """When each rank was last seen, without the time for which its heartbeats waited for a CPU here.

        On their way are the rank, this process, and rank 0 or the launcher: one of those serves the store.
        """
        assert self._exchange is not None
        last_seen = self._exchange.last_seen
        if all(seen.unmoved_s < self._hang_timeout_s * _CLOSER_LOOK for seen in last_seen.values()):
            return self._exchange.advance(lambda _: elapsed_s)
        waited = {pid: self._cpu_waits.since_last(pid) for pid in self._pids_on_the_way(last_seen)}
        return self._exchange.advance(
            lambda rank: counted_s(elapsed_s, sum(waited[pid] for pid in self._pids_on_the_way([rank])))
        )

    def _pids_on_the_way(self, ranks: Iterable[int]) -> set[int]:
        processes = [self._processes[rank] for rank in {0, *ranks}]
        here = {process.pid for process in processes if self._own_process.shares_machine_with(process)}
        return {*here, self._own_process.pid, self._own_process.parent_pid}

    def _is_closed_within(self, seconds: float) -> bool:
        """Whether the block ends in `seconds`, without the time for which this process waits for a CPU."""
        waits, last_s = CpuWaits(), time.monotonic()
        waits.since_last(self._own_process.pid)
        while seconds > 0:
            if self._is_closed.wait(min(seconds, _POLL_S)):
                return True
            now_s = time.monotonic()
            seconds -= counted_s(now_s - last_s, waits.since_last(self._own_process.pid))
            last_s = now_s
        return False

    def _is_reporter(self, hang: Hang, last_seen: Mapping[int, LastSeen]) -> bool:
        """The first rank that does not hang reports; a later one only if the ranks before it do not."""
        before = [
            rank
            for rank in range(self._rank)
            if rank not in hang.ranks and not (rank in last_seen and last_seen[rank].has_ended)
        ]
        return self._num_checks_of_hang > 2 * min(len(before), _NUM_DECIDERS)

    def _report(self, hang: Hang, last_seen: Mapping[int, LastSeen]) -> None:
        assert self._exchange is not None
        message = describe_hang(hang, last_seen, {rank: str(self._processes[rank]) for rank in hang.ranks})
        self._log_events(hang, last_seen)
        if hang.reason != "unreachable":
            self._exchange.publish(HangReport(hang.ranks, self._summarize(hang)), _STORE_TIMEOUT_S)
        self._end_run(hang.ranks, message)

    def _summarize(self, hang: Hang) -> str:
        ranks = " and ".join(f"rank {rank} ({self._processes[rank]})" for rank in hang.ranks)
        return f"{ranks} {'hangs' if len(hang.ranks) == 1 else 'hang'}; events.jsonl has the Python stack."

    def _log_events(self, hang: Hang, last_seen: Mapping[int, LastSeen]) -> None:
        with contextlib.suppress(DistftError, OSError):  # the message matters more than the events
            log = EventLog(self._run_dir)
            for rank in hang.ranks:
                process = self._processes[rank]
                fields = hang_event(hang.reason, rank, last_seen[rank])
                # On a busy machine, a later rank may report before the first one is done.
                key = {"rank": fields.pop("rank"), "host": process.host, "pid": process.pid}
                log.write_once(HANG_EVENT, key, since=self._begun_at, **fields, found_by=self._rank)
            log.close()

    def _end_run(self, ranks: tuple[int, ...], message: str) -> None:
        """Kill `ranks` to free the ranks that wait for them; end this process if its block does not end."""
        self._hang_message = message
        self._kill(ranks)
        if self._is_closed_within(_OUTPUT_S + 2 * self._heartbeat_s):
            return
        print(f"training error: {message}", file=sys.stderr, flush=True)
        time.sleep(_OUTPUT_S)
        sys.stdout.flush()
        os._exit(TrainingError.exit_code)

    def _kill(self, ranks: tuple[int, ...]) -> None:
        for rank in ranks:
            self._own_process.kill_sibling(self._processes[rank])
