"""Samplers over several datasets: a weighted mixture for training, one sequential pass for evaluation."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from distft.data.sampler import EpochSampler, Indices
from distft.data.shares import chairman_assignment, integer_shares


class Sampler(Protocol):
    """Maps the run's sequence numbers to rows of datasets."""

    def lookup(self, start: int, stop: int) -> tuple[Indices, Indices]:
        """Dataset index and row of each of the sequences [start, stop)."""


class MixtureSampler:
    """Interleaves datasets by weight.

    Among the first `n` sequences, for every `n`, the count of each dataset differs from its exact share of
    `n` by less than one. Each dataset has its own `EpochSampler`, so a small dataset with a large weight
    starts new, reshuffled epochs while a large one is still in its first.
    """

    def __init__(self, datasets: Sequence[tuple[int, float]], seed: int, *, shuffle: bool = True) -> None:
        """`datasets`: number of rows and weight of each. A weight is read in its shortest decimal notation.

        Raises `ConfigError` if the weights need a period of more than 100,000 sequences.
        """
        self._shares = integer_shares([weight for _, weight in datasets])
        self._period = sum(self._shares)
        self._assignment = np.array(chairman_assignment(self._shares), dtype=np.int64)
        self._slots = [np.flatnonzero(self._assignment == dataset) for dataset in range(len(datasets))]
        seeds = np.random.SeedSequence(seed).generate_state(len(datasets), np.uint64)
        self._samplers = [
            EpochSampler(num_sequences, int(dataset_seed), shuffle=shuffle)
            for (num_sequences, _), dataset_seed in zip(datasets, seeds, strict=True)
        ]

    def counts(self, stop: int) -> list[int]:
        """Number of sequences from each dataset among the first `stop`."""
        periods, rest = divmod(stop, self._period)
        return [
            periods * share + int(np.searchsorted(slots, rest))
            for share, slots in zip(self._shares, self._slots, strict=True)
        ]

    def lookup(self, start: int, stop: int) -> tuple[Indices, Indices]:
        """Dataset index and row of each of the sequences [start, stop)."""
        offset = start % self._period
        dataset_ids = self._assignment[np.arange(offset, offset + max(stop - start, 0)) % self._period]
        rows = np.empty(len(dataset_ids), np.int64)
        counts_before = self.counts(start)
        for dataset, sampler in enumerate(self._samplers):
            positions = np.flatnonzero(dataset_ids == dataset)
            first = counts_before[dataset]
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
