"""From sequence numbers to batches, and the thread that makes them ahead of time."""

import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from time import perf_counter
from types import TracebackType
from typing import Protocol, Self

import numpy as np

from distft.data.batch import Batch
from distft.data.dataset import SequenceDataset, merge
from distft.data.mixture import FileOrder, MixtureOrder
from distft.data.order import Indices
from distft.topology import MicroBatch


class Order(Protocol):
    """Where the run's sequences lie."""

    def locate(self, start: int, stop: int) -> tuple[Indices, Indices]:
        """Dataset and row of each of the sequences [start, stop)."""


class Feed:
    """Batches by the numbers of their sequences in the run, a function of nothing else."""

    def __init__(
        self,
        datasets: Sequence[SequenceDataset],
        order: Order,
        *,
        label_names: tuple[str, ...] | None = None,
    ) -> None:
        self._datasets = tuple(datasets)
        self._order = order
        self.label_names = label_names  # of a classification: the name of each class
        self.num_sequences = sum(dataset.num_sequences for dataset in datasets)  # an epoch, unless weighted

    @classmethod
    def endless(
        cls,
        *datasets: SequenceDataset,
        weights: Sequence[float] = (1.0,),
        seed: int,
        shuffle: bool,
        label_names: tuple[str, ...] | None = None,
    ) -> "Feed":
        """Epoch after epoch, each in another order, every dataset with its weight's share; for training."""
        sources = [(rows.num_sequences, weight) for rows, weight in zip(datasets, weights, strict=True)]
        return cls(datasets, MixtureOrder(sources, seed, shuffle=shuffle), label_names=label_names)

    @classmethod
    def in_order(cls, *datasets: SequenceDataset, label_names: tuple[str, ...] | None = None) -> "Feed":
        """Every row once, in file order, for an evaluation: sequences [0, num_sequences)."""
        order = FileOrder([dataset.num_sequences for dataset in datasets])
        return cls(datasets, order, label_names=label_names)

    @property
    def summary(self) -> str:
        """One line a dataset, for the log."""
        return "\n".join(dataset.summary for dataset in self._datasets)

    @property
    def dataset_sizes(self) -> list[int]:
        """Rows of each dataset."""
        return [dataset.num_sequences for dataset in self._datasets]

    def locate(self, start: int, stop: int) -> tuple[Indices, Indices]:
        """Dataset and row of each of the sequences [start, stop)."""
        return self._order.locate(start, stop)

    def batch(self, start: int, stop: int) -> Batch:
        """Sequences [start, stop); where that is none, one row in which nothing counts."""
        source_ids, rows = self._order.locate(start, stop)
        if not len(rows):
            return self._datasets[0].batch(rows)
        used = np.unique(source_ids)
        places = [np.flatnonzero(source_ids == source) for source in used]
        parts = [
            self._datasets[source].batch(rows[where]) for source, where in zip(used, places, strict=True)
        ]
        return merge(parts, places)


class Prefetcher:
    """Makes the batches of `micro_batches` in a thread of its own, at most `depth` ahead of their use.

    An iterator over batches, and a context that ends the thread. What goes wrong in the thread is raised by
    the `next` that would have given the batch. `wait_s` adds up the time that `next` had to wait: how long
    the run stood still for want of data.
    """

    def __init__(self, feed: Feed, micro_batches: Iterable[MicroBatch], *, depth: int = 4) -> None:
        self.wait_s = 0.0
        self.taken = MicroBatch(0, 0)  # the one whose batch `next` gave last
        self._queue: queue.Queue[tuple[MicroBatch, Batch] | BaseException | None] = queue.Queue(depth)
        self._is_closed = threading.Event()
        self._thread = threading.Thread(
            target=self._fill, args=(feed, iter(micro_batches)), name="distft-prefetch", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """The next batch; `StopIteration` after the last one, and after `close`."""
        if self._is_closed.is_set():
            raise StopIteration
        started = perf_counter()
        item = self._queue.get()
        self.wait_s += perf_counter() - started
        if isinstance(item, tuple):
            self.taken, batch = item
            return batch
        self.close()
        if item is None:
            raise StopIteration
        raise item

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the thread, and drop what it had ready. May be called again."""
        self._is_closed.set()
        while self._thread.is_alive():
            self._drain()
            self._thread.join(timeout=0.01)
        self._drain()

    def _drain(self) -> None:
        while True:
            try:
                self._queue.get_nowait()
            except queue.Empty:
                return

    def _fill(self, feed: Feed, micro_batches: Iterator[MicroBatch]) -> None:
        try:
            for micro_batch in micro_batches:
                if self._is_closed.is_set():
                    return
                self._queue.put((micro_batch, feed.batch(micro_batch.start, micro_batch.stop)))
        except BaseException as error:  # whatever it is, the consumer must hear of it
            self._queue.put(error)
        else:
            self._queue.put(None)
