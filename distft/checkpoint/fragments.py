"""What a checkpoint is made of: intervals of flattened parameters. Arithmetic only; no files."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

WEIGHT = "weight"  # the optimizer's own fp32 value while it trains; what is computed with while it is frozen
MOMENTS = ("exp_avg", "exp_avg_sq")
STATES = (WEIGHT, *MOMENTS)

_BLOCK_ROWS, _BLOCK_COLUMNS = 256, 256
_COLUMNS = np.stack([np.ones(_BLOCK_COLUMNS), np.arange(_BLOCK_COLUMNS, dtype=np.float64)], axis=1)
_ROW_STARTS = np.arange(_BLOCK_ROWS, dtype=np.int64) * _BLOCK_COLUMNS


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

    sum of bits[i] * (2 * i + 1) modulo 2**64, i counted from the parameter's first element; elements of 8
    bytes count as two of 4. The factors are odd, so a change of any one element always shows. Finds damage
    and mix-ups; no defence against malice.
    """
    size = values.element_size()
    bits = {1: torch.int8, 2: torch.int16}.get(size, torch.int32)
    flat = values.detach().cpu().contiguous().view(bits).numpy()
    position = start * max(size // 4, 1)
    total = 0
    block = np.zeros((_BLOCK_ROWS, _BLOCK_COLUMNS))
    for offset in range(0, flat.size, block.size):
        chunk = flat[offset : offset + block.size]
        if chunk.size < block.size:
            block.fill(0)
        block.reshape(-1)[: chunk.size] = chunk
        # Row by row: the sum of bits, and of bits * column. Below 2**47, so exact in float64, and a product
        # of matrices is the fastest sum there is: 2 to 3 times as fast as int64 arithmetic in numpy.
        sums, ramped_sums = (block @ _COLUMNS).astype(np.int64).T
        plain = int(sums.sum())
        ramped = int(ramped_sums.sum()) + int(np.dot(sums, _ROW_STARTS))
        total += 2 * (ramped + (position + offset) * plain) + plain
    return total % (1 << 64)
