"""A thread that exchanges heartbeats and hang reports with the other ranks through a shared store."""

import json
import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from distft.watch.hang_detection import LastSeen
from distft.watch.heartbeat import Heartbeat, HeartbeatRecorder

_HANG_REPORT = "hang_report"
_END_POLL_S = 0.02  # rank 0 checks this often whether the other ranks have ended
_log = logging.getLogger(__name__)


class Store(Protocol):
    """Methods of torch.distributed's Store. They block while the process that serves the store is stopped."""

    def set(self, key: str, value: str, /) -> None: ...
    def multi_get(self, keys: list[str], /) -> list[bytes]: ...


@dataclass(frozen=True, slots=True)
class HangReport:
    """One rank's finding, published to all ranks."""

    ranks: tuple[int, ...]  # that hang
    text: str


class HeartbeatExchange:
    """Every `heartbeat_s`, posts this rank's heartbeat and reads those of `watched`, itself included."""

    def __init__(
        self,
        store: Store,
        recorder: HeartbeatRecorder,
        *,
        rank: int,
        watched: Iterable[int],
        heartbeat_s: float,
    ) -> None:
        self._store = store
        self._recorder = recorder
        self._rank = rank
        self._watched = tuple(watched)
        self._heartbeat_s = heartbeat_s
        self._number = 0
        self._lock = threading.Lock()
        self._last_seen: dict[int, LastSeen] = {}
        self._received: HangReport | None = None
        self._to_publish: HangReport | None = None
        self._is_published = threading.Event()
        self._is_ending = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._exchange_until_end, name="distft-heartbeat", daemon=True)

    def post(self) -> None:
        """Post the first heartbeat, from the caller's thread. Every rank must post before any rank starts."""
        if self._rank == 0:
            self._store.set(_HANG_REPORT, "")
        self._post()

    def start(self) -> None:
        """Exchange heartbeats in a thread from now on."""
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """False after `end`, and when the process that serves the store is gone."""
        return self._thread.is_alive()

    @property
    def hang_report(self) -> HangReport | None:
        """The report that a rank published, once this rank has read it."""
        return self._received

    @property
    def last_seen(self) -> Mapping[int, LastSeen]:
        """When each watched rank was last seen; empty before the first exchange."""
        with self._lock:
            return dict(self._last_seen)

    def advance(self, elapsed_s: Callable[[int], float]) -> Mapping[int, LastSeen]:
        """Add `elapsed_s(rank)` to the time since each rank was last seen; return when each was."""
        with self._lock:
            self._last_seen = {rank: seen.advanced(elapsed_s(rank)) for rank, seen in self._last_seen.items()}
            return dict(self._last_seen)

    def publish(self, report: HangReport, timeout_s: float) -> None:
        """Publish `report` to all ranks; returns once the store has it, or after `timeout_s`."""
        self._to_publish = report
        self._wake.set()
        self._is_published.wait(timeout_s)

    def end(self, timeout_s: float) -> None:
        """Post and read a last time; rank 0 also waits until all ranks have ended. Takes at most `timeout_s`.

        Rank 0 may serve the store: if it left first, the others would lose the store.
        """
        self._is_ending.set()
        self._wake.set()
        self._thread.join(timeout_s)

    def _exchange_until_end(self) -> None:
        try:
            self._recorder.enter_thread()
            while True:
                is_ending = self._is_ending.is_set()
                self._exchange()
                if is_ending and (self._rank != 0 or self._have_others_ended):
                    return
                self._wake.wait(_END_POLL_S if is_ending else self._heartbeat_s)
                self._wake.clear()
        except Exception as error:  # torch raises several types for a lost connection
            if not self._is_ending.is_set():
                _log.info("Heartbeats end: the ranks' store is gone (%s).", error)

    @property
    def _have_others_ended(self) -> bool:
        return all(seen.has_ended for rank, seen in self._last_seen.items() if rank != self._rank)

    def _exchange(self) -> None:
        self._post()
        if self._to_publish is not None:
            report = {"ranks": self._to_publish.ranks, "text": self._to_publish.text}
            self._store.set(_HANG_REPORT, json.dumps(report))
            self._is_published.set()
        published, *heartbeats = self._store.multi_get([_HANG_REPORT, *map(_heartbeat_key, self._watched)])
        self._update_last_seen(heartbeats)
        if published:
            record = json.loads(published)
            self._received = HangReport(tuple(record["ranks"]), record["text"])

    def _post(self) -> None:
        self._number += 1
        self._store.set(_heartbeat_key(self._rank), self._recorder.heartbeat(self._number).to_text())

    def _update_last_seen(self, heartbeats: list[bytes]) -> None:
        with self._lock:
            for rank, text in zip(self._watched, heartbeats, strict=True):
                heartbeat = Heartbeat.from_text(text)
                before = self._last_seen.get(rank)
                now = LastSeen(heartbeat=heartbeat) if before is None else before.updated(heartbeat)
                self._last_seen[rank] = now


def _heartbeat_key(rank: int) -> str:
    return f"heartbeat/{rank}"
