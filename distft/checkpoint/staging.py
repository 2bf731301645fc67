"""Copies fragments to host memory, so that training can go on while a thread writes a checkpoint."""

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from distft.checkpoint.fragments import Fragment

_ALIGNMENT = 64  # bytes: a cache line, and a multiple of every element's size
_PORTABLE = 1  # cudaHostRegisterPortable: pinned in every context of the process
_log = logging.getLogger(__name__)


class Copier(Protocol):
    """Copies tensors from one device to host memory."""

    def start(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Begin to copy the first tensor of each pair, as it is now, to the second."""

    def wait(self) -> None:
        """Return once the copies are complete; any thread may call it."""

    def hold_stream(self) -> None:
        """Have what this thread enqueues from now on wait for the copies. The host does not wait."""


class HostCopier:
    """The `Copier` of a CPU: its copies are complete when `start` returns."""

    def start(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        for source, target in pairs:
            target.copy_(source)

    def wait(self) -> None:
        pass

    def hold_stream(self) -> None:
        pass


class SideStreamCopier:
    """The `Copier` of a GPU: the next step's forward and backward run beside the copies."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._complete: torch.cuda.Event | None = None

    def start(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for source, target in pairs:
                target.copy_(source, non_blocking=True)
                if source.is_cuda:  # it may be a temporary, whose memory must not be reused before the copy
                    source.record_stream(self._stream)
            self._complete = self._stream.record_event()

    def wait(self) -> None:
        if self._complete is not None:
            with torch.cuda.device(self._device):
                self._complete.synchronize()

    def hold_stream(self) -> None:
        if self._complete is not None:
            torch.cuda.current_stream(self._device).wait_event(self._complete)


class StagingArena:
    """One block of host memory for the copies of all fragments, reused from save to save.

    For fragments on a GPU it is pinned, by registering ordinary memory: torch's own pinned blocks are rounded
    up to a power of two, so that 17 GB would take 32.
    """

    def __init__(self, copier: Copier) -> None:
        self._copier = copier
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._must_hold = False

    @property
    def num_bytes(self) -> int:
        return self._memory.numel()

    def stage(self, fragments: Iterable[Fragment], is_constant: Callable[[Fragment], bool]) -> list[Fragment]:
        """Begin to copy fragments as they are now; `is_constant` ones are returned without a copy.

        The copies may be read after `wait`, until the next call. Before the originals change, call
        `hold_update`.
        """
        fragments = list(fragments)
        to_copy = [fragment for fragment in fragments if not is_constant(fragment)]
        sizes = [f.values.numel() * f.values.element_size() for f in to_copy]
        offsets, total = _offsets(sizes)
        if total != self.num_bytes:
            self._memory = torch.empty(0, dtype=torch.uint8)  # free the old block first
            self._memory = _allocate(total, pinned=any(f.values.is_cuda for f in to_copy))
        copies = [
            self._memory[offset : offset + size].view(f.values.dtype)
            for f, offset, size in zip(to_copy, offsets, sizes, strict=True)
        ]
        self._copier.start([(f.values.detach(), copy) for f, copy in zip(to_copy, copies, strict=True)])
        self._must_hold = True
        remaining = iter(copies)
        return [f if is_constant(f) else replace(f, values=next(remaining)) for f in fragments]

    def wait(self) -> None:
        """Return once the copies of the last `stage` are complete; any thread may call it."""
        self._copier.wait()

    def hold_update(self) -> None:
        """Have the device complete the copies before what is enqueued from now on; the host does not wait."""
        if self._must_hold:
            self._copier.hold_stream()
            self._must_hold = False


def copier_from(device: torch.device) -> Copier:
    """The way to copy from `device` to host memory."""
    return SideStreamCopier(device) if device.type == "cuda" else HostCopier()


def _offsets(sizes: Iterable[int]) -> tuple[list[int], int]:
    """Where each of the pieces starts in one block, and the size of the block, in bytes."""
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    return offsets, end


def _allocate(num_bytes: int, *, pinned: bool) -> Tensor:
    memory = torch.empty(num_bytes, dtype=torch.uint8)
    if not pinned or not num_bytes:
        return memory
    address = memory.data_ptr()
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    error = int(runtime.cudaHostRegister(address, num_bytes, _PORTABLE))
    if error:
        _log.warning(
            "CUDA error %d: %.1f GB of host memory for background saves could not be pinned, so training "
            "waits longer for each save. Raise the limit of locked memory (ulimit -l).",
            error,
            num_bytes / 1e9,
        )
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device="cuda")  # consumes the error: the next kernel would raise it
        return memory
    # The memory must not be returned to the system while CUDA counts it as pinned.
    weakref.finalize(memory, runtime.cudaHostUnregister, address).atexit = False
    return memory
