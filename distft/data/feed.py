"""Batches by sequence number, and a thread that prefetches them."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from time import perf_counter
from types import TracebackType
from typing import Any, Self, TypeAlias

import numpy as np
import torch

from distft.data.batch import AnyBatch, Batch, MixedBatch, merge_batches
from distft.data.dataset import ClassNames, NumberSpread, SequenceDataset
from distft.data.device_copy import BatchCopier, HostBatches
from distft.data.mixture import MixtureSampler, Sampler, SequentialSampler
from distft.data.sampler import Indices
from distft.topology import MicroBatch

# Changes a batch: masks tokens, for instance. Each row must depend on the row and its `sequence_numbers`
# entry alone: then it is another one in each epoch, and the same however a batch is split.
Transform: TypeAlias = Callable[[Batch], Batch]


class Feed:
    """Batches as a function of sequence numbers alone, independent of rank, step and earlier calls."""

    def __init__(
        self,
        datasets: Sequence[SequenceDataset],
        sampler: Sampler,
        *,
        label_names: ClassNames | None = None,
        document_start: tuple[int, ...] | None = None,
        numbers: NumberSpread | None = None,
        label_counts: Sequence[int] | None = None,
    ) -> None:
        self._datasets = tuple(datasets)
        self._sampler = sampler
        self._transforms: tuple[Transform, ...] = ()
        self._notes: tuple[str, ...] = ()
        self.label_names = label_names  # class names by id; None: not a classification
        self.document_start = document_start  # ids with which each document begins; None: unknown
        self.numbers = numbers  # of the rows, as targets; None: they have none
        self.label_counts = label_counts  # rows of each class; None: unknown, or not a classification
        self.num_sequences = sum(self.dataset_sizes)  # of all datasets; one epoch, unless weighted
        self.step_share: float | None = 1.0  # mean share of a training step's sequences; None: for evaluation
        # The sampler of datasets of other sizes, in the same order of draws.
        self._sampler_of: Callable[[Sequence[int]], Sampler] = SequentialSampler

    @classmethod
    def for_training(
        cls,
        *datasets: SequenceDataset,
        weights: Sequence[float] = (1.0,),
        seed: int,
        shuffle: bool,
        label_names: ClassNames | None = None,
        document_start: tuple[int, ...] | None = None,
        numbers: NumberSpread | None = None,
        label_counts: Sequence[int] | None = None,
    ) -> "Feed":
        """Infinitely many epochs, each in another order; datasets are mixed by `weights`."""

        def sampler_of(sizes: Sequence[int]) -> Sampler:
            return MixtureSampler(list(zip(sizes, weights, strict=True)), seed, shuffle=shuffle)

        feed = cls(
            datasets,
            sampler_of([rows.num_sequences for rows in datasets]),
            label_names=label_names,
            document_start=document_start,
            numbers=numbers,
            label_counts=label_counts,
        )
        feed._sampler_of = sampler_of
        return feed

    @classmethod
    def for_evaluation(
        cls,
        *datasets: SequenceDataset,
        label_names: ClassNames | None = None,
        numbers: NumberSpread | None = None,
    ) -> "Feed":
        """Every row once in file order, as sequences [0, num_sequences)."""
        sampler = SequentialSampler([dataset.num_sequences for dataset in datasets])
        feed = cls(datasets, sampler, label_names=label_names, numbers=numbers)
        feed.step_share = None
        return feed

    def with_rows(
        self,
        rows: SequenceDataset,
        *,
        numbers: NumberSpread | None = None,
        label_counts: Sequence[int] | None = None,
    ) -> "Feed":
        """The same seed and transforms over the rows of one other dataset, which has these targets."""
        feed = copy(self)
        feed._datasets = (rows,)
        feed._sampler = self._sampler_of([rows.num_sequences])
        feed.numbers, feed.label_counts = numbers, label_counts
        feed.num_sequences = rows.num_sequences
        return feed

    def once_in_order(self) -> "Feed":
        """The same rows and transforms for evaluation, as `for_evaluation`."""
        feed = copy(self)
        feed._sampler, feed._sampler_of = SequentialSampler(self.dataset_sizes), SequentialSampler
        feed.step_share = None
        return feed

    def with_step_share(self, step_share: float) -> "Feed":
        """The same sequences, which are this share of a training step's on average."""
        feed = copy(self)
        feed.step_share = step_share
        return feed

    def with_transforms(self, *transforms: Transform, notes: Sequence[str] = ()) -> "Feed":
        """The same sequences, whose batches go through `transforms`, one after another."""
        feed = copy(self)
        feed._transforms = (*self._transforms, *transforms)
        feed._notes = (*self._notes, *notes)
        return feed

    def first(self, num_sequences: int) -> "Feed":
        """Of a feed for evaluation: its first rows, at most that many."""
        feed = copy(self)
        feed.num_sequences = min(self.num_sequences, num_sequences)
        return feed

    @property
    def summary(self) -> str:
        """One line per dataset, and those on the transforms, for the log."""
        return "\n".join([*(dataset.summary for dataset in self._datasets), *self._notes])

    @property
    def datasets(self) -> Sequence[SequenceDataset]:
        """Their rows, without transforms."""
        return self._datasets

    @property
    def dataset_sizes(self) -> list[int]:
        """Number of rows of each dataset."""
        return [dataset.num_sequences for dataset in self._datasets]

    @property
    def fingerprint(self) -> str | None:
        """Equal for two feeds whose datasets have the same content in the same order; None: unknown."""
        fingerprints = [dataset.fingerprint for dataset in self._datasets]
        return None if None in fingerprints else "+".join(map(str, fingerprints))

    def lookup(self, start: int, stop: int) -> tuple[Indices, Indices]:
        """Dataset index and row of each of the sequences [start, stop)."""
        return self._sampler.lookup(start, stop)

    def rows(self, numbers: Indices) -> Batch:
        """The sequences of these numbers, without transforms."""
        found = [self._sampler.lookup(number, number + 1) for number in numbers.tolist()]
        dataset_ids, rows = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return self._merged_batch(dataset_ids, rows)

    def batch(self, start: int, stop: int) -> Batch:
        """Sequences [start, stop); for an empty range, one sequence without targets."""
        dataset_ids, rows = self._sampler.lookup(start, stop)
        if not len(rows):
            batch, numbers = self._datasets[0].batch(rows), np.array([start])
        else:
            batch, numbers = self._merged_batch(dataset_ids, rows), np.arange(start, stop)
        numbers = np.repeat(numbers, batch.rows_per_sequence)
        batch = replace(batch, sequence_numbers=torch.from_numpy(numbers))
        for transform in self._transforms:
            batch = transform(batch)
        # A transform may make targets of any row; those of the row that stands for none must not count.
        return batch if len(rows) else batch.without_targets()

    def _merged_batch(self, dataset_ids: Indices, rows: Indices) -> Batch:
        used = np.unique(dataset_ids)
        row_positions = [np.flatnonzero(dataset_ids == dataset) for dataset in used]
        batches = [
            self._datasets[dataset].batch(rows[positions])
            for dataset, positions in zip(used, row_positions, strict=True)
        ]
        return merge_batches(batches, row_positions)


class StreamFeed:
    """As `Feed`, of several streams, each with an order, transforms and kind of rows of its own."""

    document_start: tuple[int, ...] | None = None

    def __init__(self, streams: Mapping[str, Feed], sampler: Sampler, *, steps_of: int | None = None) -> None:
        """`sampler` gives the index of a sequence's stream, and its number in that stream.

        With `steps_of`, all that many sequences of an optimizer step are of one stream.
        """
        self.streams = dict(streams)
        self._sampler = sampler
        self._steps_of = steps_of
        self.num_sequences = sum(feed.num_sequences for feed in streams.values())

    def with_streams(self, streams: Mapping[str, Feed]) -> "StreamFeed":
        """The same order of other feeds of the same names."""
        return StreamFeed(streams, self._sampler, steps_of=self._steps_of)

    def first(self, num_sequences: int) -> "StreamFeed":
        """Of a feed for evaluation: at most that many rows of each stream."""
        streams = {name: feed.first(num_sequences) for name, feed in self.streams.items()}
        return StreamFeed(streams, SequentialSampler([feed.num_sequences for feed in streams.values()]))

    @property
    def label_names(self) -> Mapping[str, ClassNames]:
        return {name: feed.label_names for name, feed in self.streams.items() if feed.label_names is not None}

    @property
    def summary(self) -> str:
        lines = [
            f"{name}: {line}" for name, feed in self.streams.items() for line in feed.summary.splitlines()
        ]
        return "\n".join(lines)

    @property
    def dataset_sizes(self) -> list[int]:
        return [size for feed in self.streams.values() for size in feed.dataset_sizes]

    @property
    def fingerprint(self) -> str | None:
        fingerprints = [feed.fingerprint for feed in self.streams.values()]
        return None if None in fingerprints else "+".join(map(str, fingerprints))

    def lookup(self, start: int, stop: int) -> tuple[Indices, Indices]:
        stream_ids, numbers = self._sampler.lookup(start, stop)
        dataset_ids, rows = np.empty_like(numbers), np.empty_like(numbers)
        first_dataset = 0
        for stream, feed in enumerate(self.streams.values()):
            positions = np.flatnonzero(stream_ids == stream)
            first, last = _bounds(numbers[positions])
            dataset_ids[positions], rows[positions] = feed.lookup(first, last)
            dataset_ids[positions] += first_dataset
            first_dataset += len(feed.dataset_sizes)
        return dataset_ids, rows

    def batch(self, start: int, stop: int) -> MixedBatch:
        stream_ids, numbers = self._sampler.lookup(start, stop)
        used = set(range(len(self.streams)))
        if self._steps_of is not None:
            # An empty range is at the end of a rank's share of a step.
            used = set(self._sampler.lookup(min(start, stop - 1), stop)[0].tolist())
        batches = {}
        for stream, (name, feed) in enumerate(self.streams.items()):
            if stream in used:
                batches[name] = feed.batch(*_bounds(numbers[stream_ids == stream]))
        return MixedBatch(batches)


AnyFeed: TypeAlias = Feed | StreamFeed


def _bounds(numbers: Indices) -> tuple[int, int]:
    """[first, last + 1) of consecutive numbers."""
    return (int(numbers[0]), int(numbers[-1]) + 1) if len(numbers) else (0, 0)


class Prefetcher:
    """Iterator over the batches of `micro_batches`, made by a thread that runs at most `depth` ahead.

    The thread also applies `prepare` to each batch and starts its copy to the device. Leaving the context
    ends the thread. An exception in the thread is raised by the `next` that would have returned the batch.
    `wait_s` is the total time that `next` has waited for data.
    """

    def __init__(
        self,
        feed: AnyFeed,
        micro_batches: Iterable[MicroBatch],
        *,
        depth: int = 4,
        prepare: Callable[[AnyBatch], AnyBatch] | None = None,
        copier: BatchCopier | None = None,
    ) -> None:
        self._prepare = prepare
        self._copier = HostBatches() if copier is None else copier
        self.wait_s = 0.0
        self.last_micro_batch = MicroBatch(0, 0)  # sequences of the batch that `next` returned last
        self._queue: queue.Queue[tuple[MicroBatch, AnyBatch, Any] | BaseException | None] = queue.Queue(depth)
        self._is_closed = threading.Event()
        self._thread = threading.Thread(
            target=self._produce, args=(feed, iter(micro_batches)), name="distft-prefetch", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> AnyBatch:
        """The next batch; `StopIteration` after the last one and after `close`."""
        if self._is_closed.is_set():
            raise StopIteration
        started = perf_counter()
        item = self._queue.get()
        self.wait_s += perf_counter() - started
        if isinstance(item, tuple):
            self.last_micro_batch, batch, copied = item
            self._copier.receive(batch, copied)
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
        """End the thread and discard its batches. Idempotent."""
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

    def _produce(self, feed: AnyFeed, micro_batches: Iterator[MicroBatch]) -> None:
        try:
            for micro_batch in micro_batches:
                if self._is_closed.is_set():
                    return
                batch = feed.batch(micro_batch.start, micro_batch.stop)
                if self._prepare is not None:
                    batch = self._prepare(batch)
                self._queue.put((micro_batch, *self._copier.start(batch)))
        except BaseException as error:  # `__next__` raises it in the consumer's thread
            self._queue.put(error)
        else:
            self._queue.put(None)
