"""Parameters that no gradient moves, but the training loop: the selection biases of experts."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from distft.checkpoint.fragments import WEIGHT, Fragment, even_slice
from distft.checkpoint.sources import StateSource, read_state
from distft.optim.patterns import is_moved_by_rule


class MovedParameters:
    """Their values in fp32, whole and equal on every rank; the model's copies may be rounded."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        """`module` may be on the meta device."""
        self.values = {
            name: torch.zeros(param.shape, device=device)
            for name, param in module.named_parameters()
            if is_moved_by_rule(name)
        }

    def load(self, source: StateSource) -> None:
        for name, values in self.values.items():
            read_state(source, name, WEIGHT, values.view(-1), 0)

    def fragments(self, rank: int = 0, world_size: int = 1) -> Iterator[Fragment]:
        """This rank's even slices."""
        for name, values in self.values.items():
            start, stop = even_slice(values.numel(), rank, world_size)
            yield Fragment(name, WEIGHT, start, values.view(-1)[start:stop])

    @torch.no_grad()
    def add(self, deltas: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Add `deltas`, which are equal on all ranks; returns all values of the parameters that it moved."""
        for name, delta in deltas.items():
            self.values[name] += delta
        return {name: self.values[name] for name in deltas}
