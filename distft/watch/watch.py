"""The watch that each rank keeps over the others, and what it does about one that hangs."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from distft.collectives import Collectives
from distft.errors import DistftError, TrainingError
from distft.tracker import EventLog
from distft.watch.exchange import Exchange, Told
from distft.watch.member import Member
from distft.watch.pulse import Pulse
from distft.watch.stragglers import Straggler, StragglerWatch
from distft.watch.verdict import HANG, Hang, Sighting, as_event, explain, find_hang

_NUM_DECIDERS = 2  # ranks that watch all; the others watch these, so beats cost the store O(ranks)
_STORE_S = 2.0  # to wait for the store where it may have stopped
_LAST_WORDS_S = 1.0  # Ray carries what a rank prints to the driver from a thread of its own


class Watch:
    """Within its block, ranks that hang are found, and ranks that are slow are noted.

    A hang ends the run on every rank: the stopped process is killed by another rank of its launcher, which
    frees those that wait for it in a collective, and the block raises `TrainingError`. A rank that stays
    blocked all the same ends its process with code 1, so that the launcher can start all again.
    """

    def __init__(
        self,
        collectives: Collectives,
        run_dir: Path,
        *,
        heartbeat_s: float,
        hang_timeout_s: float,
        interval_steps: int,
    ) -> None:
        """Made by all ranks together. `heartbeat_s` of 0, or one rank alone: nothing is watched."""
        self.pulse = Pulse()
        self._rank = collectives.rank
        self._world_size = collectives.world_size
        self._run_dir = run_dir
        self._heartbeat_s = heartbeat_s
        self._hang_timeout_s = hang_timeout_s
        self._is_closed = threading.Event()
        self._verdict = ""
        self._suspicion = ""  # what another rank is about to tell, if it does not end the run before
        self._num_looks_at_hang = 0
        self._stragglers = StragglerWatch(interval_steps=interval_steps)
        self._found: list[tuple[Straggler, Member]] = []
        self._me = Member.here()
        self._members: list[Member] = []
        self._exchange: Exchange | None = None
        self._thread = threading.Thread(target=self._look_on, name="distft-watch", daemon=True)
        store = collectives.store() if heartbeat_s > 0 else None
        if store is not None:
            deciders = range(min(_NUM_DECIDERS, self._world_size))
            watched = range(self._world_size) if self._rank in deciders else (*deciders, self._rank)
            self._exchange = Exchange(
                store, self.pulse, rank=self._rank, watched=watched, heartbeat_s=heartbeat_s
            )
            self._exchange.post()
            self._members = collectives.all_gather(self._me)

    def __enter__(self) -> Self:
        if self._exchange is not None:
            self._exchange.start()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Post that this rank is done, and raise `TrainingError` if what ended it was another that hangs."""
        if self._exchange is None:
            return
        self.pulse.enter("end")
        self._is_closed.set()
        self._exchange.end(_STORE_S)
        self._thread.join(_STORE_S)
        told = self._exchange.told
        if told is not None and not self._verdict:
            self._kill(told.ranks)
            self._verdict = told.text
        verdict = self._verdict or self._suspicion
        if verdict and isinstance(error, Exception) and not isinstance(error, DistftError):
            raise TrainingError(verdict) from error

    def collect(self) -> list[tuple[Straggler, Member]]:
        """The slow ranks that were found since the last call; on rank 0 only."""
        found, self._found = self._found, []
        return found

    def _look_on(self) -> None:
        assert self._exchange is not None
        last_s = time.monotonic()
        while self._exchange.is_running and not self._is_closed.wait(self._heartbeat_s):
            now_s = time.monotonic()
            # More has gone by when this process was stopped itself, and says nothing of the others.
            sightings = self._exchange.later(min(now_s - last_s, 2 * self._heartbeat_s))
            last_s = now_s
            if (told := self._exchange.told) is not None:
                self._end_run(told.ranks, told.text)
                return
            hang = find_hang(
                sightings,
                observer=self._rank,
                hang_timeout_s=self._hang_timeout_s,
                sees_all=self._rank < _NUM_DECIDERS,
            )
            self._suspicion = "" if hang is None else self._in_short(hang)
            if hang is None:
                self._num_looks_at_hang = 0
            elif self._is_mine_to_tell(hang, sightings):
                self._tell(hang, sightings)
                return
            if self._rank == 0 and sightings:
                works = {rank: seen.beat.work for rank, seen in sightings.items()}
                for straggler in self._stragglers.look(works, now_s):
                    self._found.append((straggler, self._members[straggler.rank]))

    def _is_mine_to_tell(self, hang: Hang, sightings: Mapping[int, Sighting]) -> bool:
        """One rank tells: the first that does not hang; the next ones only if that does not."""
        self._num_looks_at_hang += 1
        before = [
            rank
            for rank in range(self._rank)
            if rank not in hang.ranks and not (rank in sightings and sightings[rank].has_ended)
        ]
        return self._num_looks_at_hang > 2 * min(len(before), _NUM_DECIDERS)

    def _tell(self, hang: Hang, sightings: Mapping[int, Sighting]) -> None:
        assert self._exchange is not None
        text = explain(hang, sightings, {rank: str(self._members[rank]) for rank in hang.ranks})
        self._record(hang, sightings)
        if hang.reason != "unreachable":
            self._exchange.tell(Told(hang.ranks, self._in_short(hang)), _STORE_S)
        self._end_run(hang.ranks, text)

    def _in_short(self, hang: Hang) -> str:
        ranks = " and ".join(f"rank {rank} ({self._members[rank]})" for rank in hang.ranks)
        return f"{ranks} {'hangs' if len(hang.ranks) == 1 else 'hang'}; events.jsonl has the Python stack."

    def _record(self, hang: Hang, sightings: Mapping[int, Sighting]) -> None:
        with contextlib.suppress(DistftError, OSError):  # the message counts more than its record
            log = EventLog(self._run_dir)
            for rank in hang.ranks:
                member = self._members[rank]
                about = as_event(hang.reason, rank, sightings[rank])
                log.write(HANG, **about, host=member.host, pid=member.pid, found_by=self._rank)
            log.close()

    def _end_run(self, ranks: tuple[int, ...], text: str) -> None:
        """Free those that wait for `ranks`; end this process if that does not bring its block to its end."""
        self._verdict = text
        self._kill(ranks)
        if self._is_closed.wait(_LAST_WORDS_S + 2 * self._heartbeat_s):
            return
        print(f"training error: {text}", file=sys.stderr, flush=True)
        time.sleep(_LAST_WORDS_S)
        sys.stdout.flush()
        os._exit(TrainingError.exit_code)

    def _kill(self, ranks: tuple[int, ...]) -> None:
        for rank in ranks:
            self._me.kill_brother(self._members[rank])
