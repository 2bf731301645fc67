"""Beats of all ranks through a store that they share, in a thread that may block with the store."""

import json
import logging
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from distft.watch.pulse import Beat, Pulse
from distft.watch.verdict import Sighting

_VERDICT = "verdict"
_ENDING_S = 0.02  # between looks at who else has ended
_log = logging.getLogger(__name__)


class Store(Protocol):
    """torch.distributed's, as far as it is used; a call may block with the process that serves it."""

    def set(self, key: str, value: str, /) -> None: ...
    def multi_get(self, keys: list[str], /) -> list[bytes]: ...


@dataclass(frozen=True, slots=True)
class Told:
    """What a rank found out, and told the others."""

    ranks: tuple[int, ...]  # that hang
    text: str


class Exchange:
    """Posts this rank's beat and reads those of `watched` ranks, itself among them, every `heartbeat_s`."""

    def __init__(
        self, store: Store, pulse: Pulse, *, rank: int, watched: Iterable[int], heartbeat_s: float
    ) -> None:
        self._store = store
        self._pulse = pulse
        self._rank = rank
        self._watched = tuple(watched)
        self._heartbeat_s = heartbeat_s
        self._number = 0
        self._lock = threading.Lock()
        self._sightings: dict[int, Sighting] = {}
        self._told: Told | None = None
        self._to_tell: Told | None = None
        self._is_done_telling = threading.Event()
        self._is_ending = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, name="distft-beat", daemon=True)

    def post(self) -> None:
        """Post the first beat, from the caller's thread: reading finds one of each rank afterwards."""
        if self._rank == 0:
            self._store.set(_VERDICT, "")
        self._post()

    def start(self) -> None:
        """Go on in a thread. Called once every rank has posted."""
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """False once it ended, and where the process that serves the store is gone, which others tell of."""
        return self._thread.is_alive()

    @property
    def told(self) -> Told | None:
        """What some rank told all of them."""
        return self._told

    def later(self, elapsed_s: float) -> Mapping[int, Sighting]:
        """Everything that was seen, `elapsed_s` after the last call."""
        with self._lock:
            self._sightings = {rank: seen.later(elapsed_s) for rank, seen in self._sightings.items()}
            return dict(self._sightings)

    def tell(self, told: Told, timeout_s: float) -> None:
        """Tell all ranks; return once the store has it, or after `timeout_s`."""
        self._to_tell = told
        self._wake.set()
        self._is_done_telling.wait(timeout_s)

    def end(self, timeout_s: float) -> None:
        """Post and read a last time, and see the others end, too; wait for that no longer than `timeout_s`.

        Rank 0 may serve the store, so the others would lose it if rank 0 left first.
        """
        self._is_ending.set()
        self._wake.set()
        self._thread.join(timeout_s)

    def _beat_on(self) -> None:
        try:
            while True:
                is_ending = self._is_ending.is_set()
                self._exchange()
                if is_ending and (self._rank != 0 or self._have_others_ended):
                    return
                self._wake.wait(_ENDING_S if is_ending else self._heartbeat_s)
                self._wake.clear()
        except Exception as error:  # torch raises several kinds for a connection that is gone
            if not self._is_ending.is_set():
                _log.info("The store of the ranks is gone, and heartbeats end: %s", error)

    @property
    def _have_others_ended(self) -> bool:
        return all(seen.has_ended for rank, seen in self._sightings.items() if rank != self._rank)

    def _exchange(self) -> None:
        self._post()
        if self._to_tell is not None:
            self._store.set(_VERDICT, json.dumps({"ranks": self._to_tell.ranks, "text": self._to_tell.text}))
            self._is_done_telling.set()
        verdict, *beats = self._store.multi_get([_VERDICT, *(_key(rank) for rank in self._watched)])
        self._see(beats)
        if verdict:
            record = json.loads(verdict)
            self._told = Told(tuple(record["ranks"]), record["text"])

    def _post(self) -> None:
        self._number += 1
        self._store.set(_key(self._rank), self._pulse.beat(self._number).to_text())

    def _see(self, beats: list[bytes]) -> None:
        with self._lock:
            for rank, text in zip(self._watched, beats, strict=True):
                beat = Beat.from_text(text)
                seen = self._sightings.get(rank)
                self._sightings[rank] = Sighting(beat=beat) if seen is None else seen.updated(beat)


def _key(rank: int) -> str:
    return f"beat/{rank}"
