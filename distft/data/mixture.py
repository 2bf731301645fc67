"""Samplers over datasets or streams: weighted mixtures for training, one sequential pass for evaluation."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from distft.data.sampler import EpochSampler, Indices
from distft.data.shares import chairman_assignment, integer_shares


class Sampler(Protocol):
    """Maps the run's sequence numbers to rows of datasets."""

    def lookup(self, start: int, stop: int) -> tuple[Indices, Indices]:
        """Dataset index and row of each of the sequences [start, stop)."""


class Interleaving:
    """A `Sampler` that interleaves sources by weight; the row is a number in the source's own order.

    Among the first `n` blocks, for every `n`, the count of each source differs from its exact share of `n` by
    less than one.
    """

    def __init__(self, weights: Sequence[float], *, block_size: int = 1) -> None:
        """Each `block_size` sequences are of one source.

        A weight is read in its shortest decimal notation. Raises `ConfigError` if the weights need a period
        of more than 100,000 blocks.
        """
        self._shares = integer_shares(weights)
        self._period = sum(self._shares)
        self._block_size = block_size
        self._assignment = np.array(chairman_assignment(self._shares), dtype=np.int64)
        self._slots = [np.flatnonzero(self._assignment == source) for source in range(len(self._shares))]

    def counts(self, stop: int) -> list[int]:
        """Number of sequences from each source among the first `stop`."""
        blocks, rest = divmod(stop, self._block_size)
        periods, position = divmod(blocks, self._period)
        counts = [
            (periods * share + int(np.searchsorted(slots, position))) * self._block_size
            for share, slots in zip(self._shares, self._slots, strict=True)
        ]
        counts[int(self._assignment[position])] += rest
        return counts

    def lookup(self, start: int, stop: int) -> tuple[Indices, Indices]:
        """Index of the source, and number in it, of each of the sequences [start, stop)."""
        blocks = np.arange(start, max(stop, start), dtype=np.int64) // self._block_size
        sources = self._assignment[blocks % self._period]
        numbers = np.empty(len(sources), np.int64)
        for source, first in enumerate(self.counts(start)):
            positions = np.flatnonzero(sources == source)
            numbers[positions] = np.arange(first, first + len(positions))
        return sources, numbers


class MixtureSampler:
    """Interleaves datasets by weight.

    Each dataset has its own `EpochSampler`, so a small dataset with a large weight starts new, reshuffled
    epochs while a large one is still in its first.
    """

    def __init__(self, datasets: Sequence[tuple[int, float]], seed: int, *, shuffle: bool = True) -> None:
        """`datasets`: number of rows and weight of each. Raises `ConfigError` as `Interleaving` does."""
        self._interleaving = Interleaving([weight for _, weight in datasets])
        seeds = np.random.SeedSequence(seed).generate_state(len(datasets), np.uint64)
        self._samplers = [
            EpochSampler(num_sequences, int(dataset_seed), shuffle=shuffle)
            for (num_sequences, _), dataset_seed in zip(datasets, seeds, strict=True)
        ]

    def counts(self, stop: int) -> list[int]:
        """Number of sequences from each dataset among the first `stop`."""
        return self._interleaving.counts(stop)

    def lookup(self, start: int, stop: int) -> tuple[Indices, Indices]:
        """Dataset index and row of each of the sequences [start, stop)."""
        dataset_ids, rows = self._interleaving.lookup(start, stop)
        for dataset, sampler in enumerate(self._samplers):
            positions = np.flatnonzero(dataset_ids == dataset)
            if len(positions):
                first = int(rows[positions[0]])
                rows[positions] = sampler.indices(first, first + len(positions))
        return dataset_ids, rows


class SequentialSampler:
    """Every row of every dataset once, one dataset after the other, in file order."""

    def __init__(self, dataset_sizes: Sequence[int]) -> None:
        self._stops = np.cumsum(np.array(dataset_sizes, dtype=np.int64))

    def lookup(self, start: int, stop: int) -> tuple[Indices, Indices]:
        """Dataset index and row of each of the sequences [start, stop), which must all exist."""
        sequences = np.arange(start, max(stop, start), dtype=np.int64)
        if len(sequences) and not 0 <= start < stop <= self._stops[-1]:
            raise ValueError(f"Sequences [{start}, {stop}) are outside the {self._stops[-1]} of one pass.")
        dataset_ids = np.searchsorted(self._stops, sequences, side="right")
        starts = np.concatenate([np.zeros(1, np.int64), self._stops])
        return dataset_ids.astype(np.int64), sequences - starts[dataset_ids]
