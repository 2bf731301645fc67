"""Saving while training goes on: the step waits for a copy to host memory, a thread does the rest."""

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distft.checkpoint.fragments import Fragment
from distft.checkpoint.store import CheckpointConfig, CheckpointStore, Draft


@dataclass(frozen=True, slots=True)
class Saved:
    """A commit, and what it cost."""

    step: int
    path: str
    stall_s: float  # how long training stood still
    write_s: float  # how long it was written, beside training if that was in the background


class HostCopy:
    """Copies of fragments in host memory that is kept from save to save, and pinned beside a GPU."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}

    def take(self, fragments: Iterable[Fragment], keep: Callable[[Fragment], bool]) -> list[Fragment]:
        """The fragments with values that training does not change; those to `keep` stay as they are."""
        copies = []
        is_on_gpu = False
        for fragment in fragments:
            if keep(fragment):
                copies.append(fragment)
                continue
            values = fragment.values.detach()
            buffer = self._buffer(fragment, values)
            buffer.copy_(values, non_blocking=True)
            is_on_gpu |= values.is_cuda
            copies.append(replace(fragment, values=buffer))
        if is_on_gpu:
            torch.cuda.current_stream().synchronize()
        return copies

    def _buffer(self, fragment: Fragment, values: Tensor) -> Tensor:
        key = (fragment.parameter, fragment.state)
        found = self._buffers.get(key)
        if found is None or found.shape != values.shape or found.dtype != values.dtype:
            found = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
            self._buffers[key] = found
        return found


class Saver:
    """Saves drafts to a store, at most one at a time. Every method is called by all ranks together.

    In the background the store needs collectives of its own: its thread speaks to the other ranks' threads
    while the engines speak to each other.
    """

    def __init__(self, store: CheckpointStore, config: CheckpointConfig) -> None:
        self._store = store
        self._config = config
        self._copy = HostCopy()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._saved: list[Saved] = []

    def save(self, draft: Draft) -> None:
        """Take a copy of the draft and return; or write it here, where the background is not wanted.

        Waits for a save that is still being written, and raises what went wrong with it.
        """
        began = time.perf_counter()
        self.wait()
        if not self._config.in_background:
            self._write(draft, began, None)
            self._raise_failure()
            return
        copies = self._copy.take(draft.fragments, lambda f: not draft.parameters[f.parameter].trainable)
        copied = replace(draft, fragments=copies)
        stall_s = time.perf_counter() - began
        self._thread = threading.Thread(
            target=self._write, args=(copied, time.perf_counter(), stall_s), name="distft-save", daemon=True
        )
        self._thread.start()

    def _write(self, draft: Draft, began: float, stall_s: float | None) -> None:
        try:
            path = self._store.save(draft)
            self._store.retain(self._config)
        except BaseException as error:  # it is raised again where the run can act on it
            self._failure = error
            return
        write_s = time.perf_counter() - began
        self._saved.append(Saved(draft.progress.step, path, write_s if stall_s is None else stall_s, write_s))

    @property
    def has_failed(self) -> bool:
        """Whether a save went wrong that nobody has been told of yet."""
        return self._failure is not None

    def collect(self) -> list[Saved]:
        """The commits that were made since the last call."""
        found, self._saved = self._saved, []
        return found

    def wait(self) -> None:
        """Until nothing is being written; raises what went wrong."""
        self.join()
        self._raise_failure()

    def join(self) -> None:
        """Until nothing is being written; what went wrong is left for others to raise."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
