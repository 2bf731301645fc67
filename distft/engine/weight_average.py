"""An exponential moving average of the weights: one more per-element state that every engine keeps."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from distft.checkpoint.fragments import EMA, Fragment
from distft.checkpoint.sources import StateSource, read_state
from distft.optim.segments import MasterSlice


class WeightAverage:
    """Averages the rank's own master weights, in fp32 and in the same layout: ema = d * ema + (1 - d) * w."""

    def __init__(self, decay: float, slices: Sequence[MasterSlice]) -> None:
        self.decay = decay  # of the next update
        self._slices = list(slices)
        self._averages = [torch.empty_like(weights.values) for weights in slices]

    @torch.no_grad()
    def update(self, is_skipped: Tensor) -> None:
        """After an optimizer update; a skipped one (1.0) changes nothing, without waiting for the device."""
        share = (1 - self.decay) * (1 - is_skipped)
        for average, weights in zip(self._averages, self._slices, strict=True):
            average.lerp_(weights.values, share.to(average.device))

    def load(self, source: StateSource) -> None:
        for average, weights in zip(self._averages, self._slices, strict=True):
            read_state(source, weights.parameter, EMA, average, weights.start)

    def fragments(self) -> Iterator[Fragment]:
        for average, weights in zip(self._averages, self._slices, strict=True):
            yield Fragment(weights.parameter, EMA, weights.start, average)


@contextmanager
def replaced_values(params: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Give the parameters other values, of the same numbers of elements, without a copy of their own."""
    own = {name: params[name].data for name in values}
    try:
        for name, replacement in values.items():
            params[name].data = replacement.view(own[name].shape)
        yield
    finally:
        for name, data in own.items():
            params[name].data = data
