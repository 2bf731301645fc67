"""Saving in the background: training waits only for a copy to host memory; a thread writes it."""

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distft.checkpoint.config import CheckpointConfig
from distft.checkpoint.fragments import Fragment
from distft.checkpoint.snapshot import CheckpointSnapshot
from distft.checkpoint.store import CheckpointStore


@dataclass(frozen=True, slots=True)
class SaveResult:
    """A commit, and how long it took."""

    step: int
    path: str
    stall_s: float  # how long training waited
    write_s: float  # how long writing and pruning took; in the background, training goes on meanwhile


class StagingBuffers:
    """Host memory for copies of fragments: reused from save to save, and pinned for fragments on a GPU."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}

    def stage(self, fragments: Iterable[Fragment], is_constant: Callable[[Fragment], bool]) -> list[Fragment]:
        """Copy fragments so that training can go on; `is_constant` ones are returned without a copy.

        The copies are valid until the next call.
        """
        staged = []
        is_on_gpu = False
        for fragment in fragments:
            if is_constant(fragment):
                staged.append(fragment)
                continue
            values = fragment.values.detach()
            buffer = self._buffer(fragment, values)
            buffer.copy_(values, non_blocking=True)
            is_on_gpu |= values.is_cuda
            staged.append(replace(fragment, values=buffer))
        if is_on_gpu:
            torch.cuda.current_stream().synchronize()
        return staged

    def _buffer(self, fragment: Fragment, values: Tensor) -> Tensor:
        key = (fragment.parameter, fragment.state)
        found = self._buffers.get(key)
        if found is None or found.shape != values.shape or found.dtype != values.dtype:
            found = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
            self._buffers[key] = found
        return found


class CheckpointSaver:
    """Saves snapshots to a store, at most one at a time. All ranks call `save` and `wait` together.

    To save in the background, the store needs its own process group: the writer threads of the ranks
    communicate with each other while the engines do.
    """

    def __init__(self, store: CheckpointStore, config: CheckpointConfig) -> None:
        self._store = store
        self._config = config
        self._buffers = StagingBuffers()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._results: list[SaveResult] = []

    def save(self, snapshot: CheckpointSnapshot) -> None:
        """Copy the snapshot and let a thread write it; without `in_background`, write it before returning.

        First waits for the previous save, and raises its failure.
        """
        began = time.perf_counter()
        self.wait()
        if not self._config.in_background:
            self._write(snapshot, began, None)
            self._raise_failure()
            return
        fragments = self._buffers.stage(
            snapshot.fragments, is_constant=lambda f: not snapshot.parameters[f.parameter].trainable
        )
        staged = replace(snapshot, fragments=fragments)
        stall_s = time.perf_counter() - began
        self._thread = threading.Thread(
            target=self._write, args=(staged, time.perf_counter(), stall_s), name="distft-save", daemon=True
        )
        self._thread.start()

    def _write(self, snapshot: CheckpointSnapshot, began: float, stall_s: float | None) -> None:
        try:
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
