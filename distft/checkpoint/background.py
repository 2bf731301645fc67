"""Saving in the background: training waits only for a copy to host memory; a thread writes it."""

import threading
import time
from dataclasses import dataclass, replace

from distft.checkpoint.config import CheckpointConfig
from distft.checkpoint.snapshot import CheckpointSnapshot
from distft.checkpoint.staging import Copier, HostCopier, StagingArena
from distft.checkpoint.store import CheckpointStore


@dataclass(frozen=True, slots=True)
class SaveResult:
    """A commit, and how long it took."""

    step: int
    path: str
    stall_s: float  # how long training waited
    write_s: float  # how long writing and pruning took; in the background, training goes on meanwhile


class CheckpointSaver:
    """Saves snapshots to a store, at most one at a time. All ranks call `save` and `wait` together.

    To save in the background, the store needs its own process group: the writer threads of the ranks
    communicate with each other while the engines do.
    """

    def __init__(
        self, store: CheckpointStore, config: CheckpointConfig, copier: Copier | None = None
    ) -> None:
        """`copier` copies from the engine's device; None: from the CPU."""
        self._store = store
        self._config = config
        self._arena = StagingArena(HostCopier() if copier is None else copier)
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._results: list[SaveResult] = []

    def save(self, snapshot: CheckpointSnapshot) -> None:
        """Copy the snapshot and let a thread write it; without `in_background`, write it before returning.

        First waits for the previous save, and raises its failure. Call `hold_update` before the next update.
        """
        began = time.perf_counter()
        self.wait()
        if not self._config.in_background:
            self._write(snapshot, began, None)
            self._raise_failure()
            return
        fragments = self._arena.stage(
            snapshot.fragments, is_constant=lambda f: not snapshot.parameters[f.parameter].trainable
        )
        staged = replace(snapshot, fragments=fragments)
        stall_s = time.perf_counter() - began
        self._thread = threading.Thread(
            target=self._write, args=(staged, time.perf_counter(), stall_s), name="distft-save", daemon=True
        )
        self._thread.start()

    def hold_update(self) -> None:
        """Have the device copy the state that is being saved before it changes it. The host does not wait."""
        self._arena.hold_update()

    def _write(self, snapshot: CheckpointSnapshot, began: float, stall_s: float | None) -> None:
        try:
            if stall_s is not None:
                self._arena.wait()
            path = self._store.save(snapshot)
            self._store.prune(self._config)
        except BaseException as error:  # raised again in the training thread, by `wait`
            self._failure = error
            return
        write_s = time.perf_counter() - began
        self._results.append(
            SaveResult(snapshot.progress.step, path, write_s if stall_s is None else stall_s, write_s)
        )

    @property
    def has_failed(self) -> bool:
        """Whether a save has failed and `wait` has not raised that yet."""
        return self._failure is not None

    def collect(self) -> list[SaveResult]:
        """The commits made since the last call."""
        results, self._results = self._results, []
        return results

    def wait(self) -> None:
        """Wait until nothing is being written; raises the failure of the last save."""
        self.join()
        self._raise_failure()

    def join(self) -> None:
        """Wait until nothing is being written; raises nothing."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
