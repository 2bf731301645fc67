"""Intervals of flattened parameters, the unit that ranks save and load. Arithmetic only; no files."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

WEIGHT = "weight"  # of a trainable parameter the optimizer's fp32 value, of a frozen one the model's
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


@dataclass(frozen=True, slots=True)
class Interval:
    """Elements [start, stop) of a flattened parameter that one file or rank stores."""

    start: int
    stop: int
    owner: int  # index of that file or rank


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
