"""Saving in the background: training waits only for a copy to host memory; a thread writes it."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from distft.checkpoint.config import CheckpointConfig
from distft.checkpoint.snapshot import CheckpointSnapshot
from distft.checkpoint.staging import Copier, HostCopier, StagingArena
from distft.checkpoint.store import CheckpointStore
from distft.errors import StorageError


@dataclass(frozen=True, slots=True)
class SaveResult:
    """A commit, and how long it took."""

    step: int
    path: str
    stall_s: float  # how long training waited
    write_s: float  # how long writing took; in the background, training goes on meanwhile
    cleanup_problem: str = ""  # why old commits could not be deleted; the next save tries again


class CheckpointSaver:
    """Saves snapshots to a store, at most one at a time. All ranks call `save` and `wait` together.

    To save in the background, the store needs its own process group: the writer threads of the ranks
    communicate with each other while the engines do.
    """

    def __init__(
        self,
        store: CheckpointStore,
        config: CheckpointConfig,
        copier: Copier | None = None,
        on_commit: Callable[[SaveResult], None] | None = None,
    ) -> None:
        """`copier` copies from the engine's device; None: from the CPU.

        `on_commit` is called once a manifest is in place, in the background by the thread that wrote it.
        """
        self._store = store
        self._config = config
        self._arena = StagingArena(HostCopier() if copier is None else copier)
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._on_commit = on_commit
        self._results: list[SaveResult] = []
        self._last_problem = ""  # of deleting old commits

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
            snapshot.fragments, is_constant=lambda f: snapshot.parameters[f.parameter].is_constant
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
            write_s = time.perf_counter() - began
            stall_s = write_s if stall_s is None else stall_s
            result = SaveResult(snapshot.progress.step, path, stall_s, write_s)
            if self._on_commit is not None:
                self._on_commit(result)
            self._results.append(replace(result, cleanup_problem=self._prune()))
        except BaseException as error:  # raised again in the training thread, by `wait`
            self._failure = error

    def _prune(self) -> str:
        """Delete old commits; returns why that failed, unless it was told after the last save."""
        try:
            self._store.prune(self._config)
        except StorageError as error:  # the commit is good all the same
            is_new, self._last_problem = str(error) != self._last_problem, str(error)
            return str(error) if is_new else ""
        self._last_problem = ""
        return ""

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
