"""Intervals of flattened parameters, the unit that ranks save and load. Arithmetic only; no files."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

WEIGHT = "weight"  # of a trainable parameter the optimizer's fp32 value, of a frozen one what it came as
EMA = "ema"  # exponential moving average of the weight, fp32

# Further states have the names that the optimizer gives them, such as exp_avg. Only `WEIGHT` is special here.


@dataclass(frozen=True, slots=True)
class Fragment:
    """Elements [start, start + len(values)) of one state of a flattened parameter."""

    parameter: str
    state: str
    start: int
    values: Tensor  # 1-D, on any device; a view of the live state where possible

    @property
    def stop(self) -> int:
        return self.start + self.values.numel()

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype


class UnloadedFragment(Fragment):
    """A fragment of a weight that is not in memory: each use of `values` reads it anew."""

    __slots__ = ("dtype", "read", "stop")
    dtype: torch.dtype
    read: Callable[[], Tensor]
    stop: int

    def __init__(
        self, parameter: str, start: int, stop: int, dtype: torch.dtype, read: Callable[[], Tensor]
    ) -> None:
        own = {"stop": stop, "dtype": dtype, "read": read}
        for name, value in {"parameter": parameter, "state": WEIGHT, "start": start, **own}.items():
            object.__setattr__(self, name, value)  # the base is frozen

    @property
    def values(self) -> Tensor:
        return self.read()


@dataclass(frozen=True, slots=True)
class Interval:
    """Elements [start, stop) of a flattened parameter that one file or rank stores."""

    start: int
    stop: int
    owner: int  # index of that file or rank


class StoredIntervals:
    """The stored intervals of one parameter, in an order in which those for a range are found quickly.

    A rank of 512 needs one interval of 512 of each parameter; looking at all of them takes it 30 s for 70B.
    """

    def __init__(self, stored: Iterable[tuple[int, int, int]]) -> None:
        """`stored` are start, stop and owner of each interval."""
        self._stored = sorted((start, -stop, owner) for start, stop, owner in stored)
        self._starts = [start for start, _, _ in self._stored]
        self._furthest = list(accumulate((-stop for _, stop, _ in self._stored), max))  # stop so far

    def cover(self, start: int, stop: int) -> list[Interval]:
        """As `cover`, of these intervals."""
        first = bisect_right(self._furthest, start)
        last = bisect_left(self._starts, stop, lo=first)
        found = self._stored[first:last]
        return cover(start, stop, [Interval(begin, -end, owner) for begin, end, owner in found])


def cover(start: int, stop: int, stored: Iterable[Interval]) -> list[Interval]:
    """Cut the `stored` intervals so that they make up [start, stop), in order, each element once.

    Where intervals overlap, the one that starts first is used. Raises `ValueError` with the first element
    that no interval stores.
    """
    covering: list[Interval] = []
    position = start
    for interval in sorted(stored, key=lambda interval: (interval.start, -interval.stop)):
        if position >= stop:
            break
        if interval.stop <= position:
            continue
        if interval.start > position:
            raise ValueError(position)
        upper = min(interval.stop, stop)
        covering.append(Interval(position, upper, interval.owner))
        position = upper
    if position < stop:
        raise ValueError(position)
    return covering


def even_slice(numel: int, rank: int, world_size: int) -> tuple[int, int]:
    """Elements [start, stop) that `rank` writes of a tensor of which every rank has a copy."""
    return numel * rank // world_size, numel * (rank + 1) // world_size
