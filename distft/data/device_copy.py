"""Copies batches to a GPU beside its computation."""

from typing import Any, Protocol

import torch

from distft.data.batch import AnyBatch


class BatchCopier(Protocol):
    """Moves batches to a device: one thread starts the copies, another one receives them."""

    def start(self, batch: AnyBatch) -> tuple[AnyBatch, Any]:
        """Enqueue the copy of `batch`; returns it on the device, and what `receive` needs."""

    def receive(self, batch: AnyBatch, copied: Any) -> None:
        """Have what the calling thread enqueues from now on wait for the copy. The host does not wait."""


class HostBatches:
    """The `BatchCopier` of a CPU: it copies nothing."""

    def start(self, batch: AnyBatch) -> tuple[AnyBatch, None]:
        return batch, None

    def receive(self, batch: AnyBatch, copied: None) -> None:
        pass


class SideStream:
    """The `BatchCopier` of a GPU: a stream of its own, so that copies overlap with kernels."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def start(self, batch: AnyBatch) -> tuple[AnyBatch, torch.cuda.Event]:
        torch.cuda.set_device(self._device)  # a thread starts on device 0, and would make a context there
        # From pageable memory a copy would wait, and not overlap. The allocator of pinned memory reuses a
        # block only when the copy from it is done.
        with torch.cuda.stream(self._stream):
            on_device = batch.pin_memory().to(self._device)
            return on_device, self._stream.record_event()

    def receive(self, batch: AnyBatch, copied: torch.cuda.Event) -> None:
        consumer = torch.cuda.current_stream(self._device)
        consumer.wait_event(copied)
        # The tensors' memory belongs to the copying stream: without this, it could be reused for the next
        # batch while kernels of this one still read it.
        for tensor in batch.tensors():
            tensor.record_stream(consumer)


def batch_copier(device: torch.device) -> BatchCopier:
    return SideStream(device) if device.type == "cuda" else HostBatches()
