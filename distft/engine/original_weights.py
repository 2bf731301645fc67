"""Frozen weights as they came, which the engine may hold in fewer bits; checkpoints have them so."""

from functools import partial

import torch
from torch import Tensor

from distft.checkpoint.fragments import WEIGHT, Fragment, UnloadedFragment
from distft.checkpoint.sources import StateSource, read_state


class OriginalWeights:
    """Reads frozen weights from where they came from, if the engine has them in another dtype.

    A phase that freezes a block would otherwise round its fp32 weights for good.
    """

    def __init__(self) -> None:
        self._source: StateSource | None = None

    def load(self, source: StateSource) -> None:
        self._source = source

    def held(self, name: str, start: int, values: Tensor) -> Fragment:
        """Of `values` from `start` on, which the engine holds: themselves, or what they were made of."""
        source = self._source
        if source is None or source.dtype(name, WEIGHT) == values.dtype:
            return Fragment(name, WEIGHT, start, values)
        return self.unloaded(name, start, start + values.numel())

    def unloaded(self, name: str, start: int, stop: int) -> Fragment:
        """Elements [start, stop), which are read at each use."""
        assert self._source is not None
        dtype = self._source.dtype(name, WEIGHT)
        return UnloadedFragment(
            name, start, stop, dtype, partial(read_weight, self._source, name, start, stop, dtype)
        )


def read_weight(source: StateSource, name: str, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Elements [start, stop) of a weight in `dtype`, on the CPU."""
    values = torch.empty(stop - start, dtype=dtype)
    read_state(source, name, WEIGHT, values, start)
    return values
