"""What a checkpoint is made of: intervals of flattened parameters. Arithmetic only; no files."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

WEIGHT = "weight"  # the optimizer's own fp32 value while it trains; what is computed with while it is frozen
MOMENTS = ("exp_avg", "exp_avg_sq")
STATES = (WEIGHT, *MOMENTS)

_CHUNK_NUMEL = 1 << 20


@dataclass(frozen=True, slots=True)
class Fragment:
    """Elements [start, start + len(values)) of one state of a flattened parameter."""

    parameter: str
    state: str
    start: int
    values: Tensor  # 1-D, on any device; a view of the live state where that is possible

    @property
    def stop(self) -> int:
        return self.start + self.values.numel()


@dataclass(frozen=True, slots=True)
class Interval:
    """Elements [start, stop) of a parameter that `holder` (a file, a rank) has."""

    start: int
    stop: int
    holder: int


def cover(start: int, stop: int, held: Iterable[Interval]) -> list[Interval]:
    """Which parts of `held` make up [start, stop), in order, each element once.

    Where two holders have the same elements the first by start serves. Returns intervals cut to the wish;
    raises `ValueError` with the first element that nobody holds.
    """
    wanted: list[Interval] = []
    position = start
    for piece in sorted(held, key=lambda interval: (interval.start, -interval.stop)):
        if position >= stop:
            break
        if piece.stop <= position:
            continue
        if piece.start > position:
            raise ValueError(position)
        upper = min(piece.stop, stop)
        wanted.append(Interval(position, upper, piece.holder))
        position = upper
    if position < stop:
        raise ValueError(position)
    return wanted


def even_share(numel: int, rank: int, world_size: int) -> tuple[int, int]:
    """The [start, stop) that `rank` writes of a tensor of which every rank has a copy."""
    return numel * rank // world_size, numel * (rank + 1) // world_size


def fingerprint(values: Tensor, start: int) -> int:
    """A 64-bit sum over (position, bits) that adds up over fragments, however a parameter is cut.

    sum of bits[i] * (2 * i + 1) modulo 2**64, i counted from the parameter's first element. The factors are
    odd, so a change of any one element always shows. Finds damage and mix-ups; no defence against malice.
    """
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    flat = values.detach().cpu().contiguous().view(bits).numpy()
    total = 0
    ramp = np.arange(min(_CHUNK_NUMEL, flat.size), dtype=np.int64)
    for offset, chunk in _chunks(flat):
        wide = chunk.astype(np.int64)
        plain = int(wide.sum())
        ramped = int(np.dot(wide, ramp[: wide.size]))
        total += 2 * (ramped + (start + offset) * plain) + plain
    return total % (1 << 64)


def _chunks(
    flat: "np.ndarray[tuple[int], np.dtype[np.int32]]",
) -> Iterator[tuple[int, "np.ndarray[tuple[int], np.dtype[np.int32]]"]]:
    for offset in range(0, flat.size, _CHUNK_NUMEL):
        yield offset, flat[offset : offset + _CHUNK_NUMEL]
