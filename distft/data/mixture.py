"""Several sources in one order, each with its share at every moment of the run."""

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from distft.data.order import Indices, SequenceOrder
from distft.errors import ConfigError

_MAX_PERIOD = 100_000  # sequences; the table of one period is built and kept in memory


class MixtureOrder:
    """Which row of which source is read as sequence number `i`.

    Among the first `n` sequences of the run each source has its weight's share of `n`, less than one
    sequence off, at every `n`. Each source goes through its own `SequenceOrder` at its own pace, so a small
    source with a large weight begins new, reshuffled epochs while a large one is in its first.
    """

    def __init__(self, sources: Sequence[tuple[int, float]], seed: int, *, shuffle: bool = True) -> None:
        """`sources`: rows and weight of each. Weights are taken as the decimals that they print as.

        Raises `ConfigError` where weights only repeat after more than 100,000 sequences.
        """
        self._shares = whole_shares([weight for _, weight in sources])
        self._period = sum(self._shares)
        self._table = np.array(chairman_assignment(self._shares), dtype=np.int64)
        self._slots = [np.flatnonzero(self._table == source) for source in range(len(sources))]
        seeds = np.random.SeedSequence(seed).generate_state(len(sources), np.uint64)
        self._orders = [
            SequenceOrder(num_sequences, int(source_seed), shuffle=shuffle)
            for (num_sequences, _), source_seed in zip(sources, seeds, strict=True)
        ]

    def counts(self, stop: int) -> list[int]:
        """How many of the first `stop` sequences each source gives."""
        periods, rest = divmod(stop, self._period)
        return [
            periods * share + int(np.searchsorted(slots, rest))
            for share, slots in zip(self._shares, self._slots, strict=True)
        ]

    def locate(self, start: int, stop: int) -> tuple[Indices, Indices]:
        """Source and row of each of the sequences [start, stop)."""
        offset = start % self._period
        source_ids = self._table[np.arange(offset, offset + max(stop - start, 0)) % self._period]
        rows = np.empty(len(source_ids), np.int64)
        begins = self.counts(start)
        for source, order in enumerate(self._orders):
            places = np.flatnonzero(source_ids == source)
            rows[places] = order.indices(begins[source], begins[source] + len(places))
        return source_ids, rows


class FileOrder:
    """Every row of every source once, one source after the other: how held-out data is read."""

    def __init__(self, nums_sequences: Sequence[int]) -> None:
        self._stops = np.cumsum(np.array(nums_sequences, dtype=np.int64))

    def locate(self, start: int, stop: int) -> tuple[Indices, Indices]:
        """Source and row of each of the sequences [start, stop), all of which must exist."""
        numbers = np.arange(start, max(stop, start), dtype=np.int64)
        if len(numbers) and not 0 <= start < stop <= self._stops[-1]:
            raise ValueError(f"Sequences [{start}, {stop}) of {self._stops[-1]} that are read once.")
        source_ids = np.searchsorted(self._stops, numbers, side="right")
        begins = np.concatenate([np.zeros(1, np.int64), self._stops])
        return source_ids.astype(np.int64), numbers - begins[source_ids]


def whole_shares(weights: Sequence[float]) -> list[int]:
    """The smallest whole numbers in the proportion of `weights`.

    Raises `ConfigError` for a weight that is not above zero, and where the numbers add up to too much.
    """
    exact = [Fraction(str(weight)) if math.isfinite(weight) else Fraction(0) for weight in weights]
    faults = [
        f"weight={weight} of source {i}: a weight is a number above 0; leave the source out instead."
        for i, (weight, fraction) in enumerate(zip(weights, exact, strict=True))
        if fraction <= 0
    ]
    if faults:
        raise ConfigError("\n".join(faults))
    unit = math.lcm(*(fraction.denominator for fraction in exact))
    numbers = [int(fraction * unit) for fraction in exact]
    divisor = math.gcd(*numbers)
    shares = [number // divisor for number in numbers]
    if sum(shares) > _MAX_PERIOD:
        raise ConfigError(
            f"The weights {', '.join(str(weight) for weight in weights)} repeat only after {sum(shares):,} "
            f"sequences, and at most {_MAX_PERIOD:,} can be planned: round the weights to fewer digits."
        )
    return shares


def chairman_assignment(shares: Sequence[int]) -> list[int]:
    """Give each of sum(shares) slots to a source, so that every prefix is shared within less than one slot.

    The number `j` of a source with `share` of `period` slots may not come before slot `j * period / share`
    (or the source would be one ahead), nor after slot `(j + 1) * period / share` (one behind). Giving each
    slot to the earliest deadline among those that may come meets every deadline that can be met, and
    Tijdeman (The chairman assignment problem, 1980) showed that all of these can.
    """
    period = sum(shares)
    waiting = [(0, source) for source, share in enumerate(shares) if share]  # (first slot, source)
    ready: list[tuple[int, int]] = []  # (last slot, source)
    given = [0] * len(shares)
    slots = []
    for slot in range(period):
        while waiting and waiting[0][0] <= slot:
            _, source = heapq.heappop(waiting)
            deadline = -(-(given[source] + 1) * period // shares[source]) - 1
            heapq.heappush(ready, (deadline, source))
        _, source = heapq.heappop(ready)
        slots.append(source)
        given[source] += 1
        if given[source] < shares[source]:
            heapq.heappush(waiting, (given[source] * period // shares[source], source))
    return slots
