"""Rows of different length, kept flat and handed out padded."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from distft.data.order import Indices


class RaggedRows:
    """Rows of numbers one behind the other: 4 bytes a number and 8 a row, whatever their lengths."""

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        lengths = np.fromiter((len(row) for row in rows), np.int64, count=len(rows))
        self._starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        self._flat = np.empty(self._starts[-1], np.int32)
        for row, start in zip(rows, self._starts, strict=False):
            self._flat[start : start + len(row)] = row

    @property
    def largest(self) -> int:
        """The largest number in any row."""
        return int(self._flat.max(initial=0))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def lengths(self, indices: Indices) -> Indices:
        """How long each of the rows is."""
        lengths: Indices = self._starts[indices + 1] - self._starts[indices]
        return lengths

    def padded(self, indices: Indices, fill: int) -> NDArray[np.int64]:
        """Rows [B, T] with T the longest of them, the shorter ones filled up on the right."""
        lengths = self.lengths(indices)
        columns = np.arange(lengths.max(), dtype=np.int64)
        is_real = columns < lengths[:, None]
        table = np.full(is_real.shape, fill, np.int64)
        places = (self._starts[indices][:, None] + columns)[is_real]
        table[is_real] = self._flat[places]
        return table
