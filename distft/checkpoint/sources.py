"""Where an engine's state comes from: an initialiser, a checkpoint, or several in order of preference."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from distft.checkpoint.fragments import WEIGHT
from distft.checkpoint.manifest import Manifest
from distft.errors import CheckpointError

_READ_NUMEL = 1 << 22  # elements held beside the ones that they are copied to


class StateSource(Protocol):
    """State by parameter name, in flattened pieces; nothing is held whole unless the whole is asked for."""

    def has(self, parameter: str, state: str) -> bool:
        """Whether `read` would serve this state."""

    def shape(self, parameter: str) -> tuple[int, ...] | None:
        """The parameter's shape here; None where it is not held."""

    def read(self, parameter: str, state: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened state: 1-D, on the CPU, in the dtype it is kept in."""

    def updates(self, parameter: str) -> int:
        """How many optimizer updates the parameter has had here."""


class CheckpointSource(StateSource, Protocol):
    """A checkpoint on disk, in whatever format: what the tools of `distft checkpoint` work on.

    Nothing is loaded until `read` asks for it, and no more than that: a reader's memory is what it returns.
    """

    path: str
    format: str  # distft, deepspeed, universal, huggingface
    manifest: Manifest  # ours, or what a foreign format tells of the same; without files there

    def faults(self) -> list[str]:
        """What is wrong with its files, as far as the format can tell: every byte of them is read."""


class InitialSource:
    """Fresh weights, made by a function of name and interval; no moments."""

    def __init__(
        self,
        shapes: dict[str, tuple[int, ...]],
        fragment: Callable[[str, tuple[int, ...], int, int], Tensor],
    ) -> None:
        self._shapes = shapes
        self._fragment = fragment

    def has(self, parameter: str, state: str) -> bool:
        return state == WEIGHT and parameter in self._shapes

    def shape(self, parameter: str) -> tuple[int, ...] | None:
        return self._shapes.get(parameter)

    def read(self, parameter: str, state: str, start: int, stop: int) -> Tensor:  # noqa: ARG002
        return self._fragment(parameter, self._shapes[parameter], start, stop)

    def updates(self, parameter: str) -> int:  # noqa: ARG002
        return 0


class WeightsOnly:
    """Another source without its moments and update counts: what `init_from` takes from a checkpoint."""

    def __init__(self, source: StateSource, *, without: tuple[str, ...] = ()) -> None:
        """Parameters whose names begin with one of `without` are not offered."""
        self._source = source
        self._without = without

    def has(self, parameter: str, state: str) -> bool:
        is_offered = state == WEIGHT and not parameter.startswith(self._without)
        return is_offered and self._source.has(parameter, state)

    def shape(self, parameter: str) -> tuple[int, ...] | None:
        return self._source.shape(parameter)

    def read(self, parameter: str, state: str, start: int, stop: int) -> Tensor:
        return self._source.read(parameter, state, start, stop)

    def updates(self, parameter: str) -> int:  # noqa: ARG002
        return 0


class FirstOf:
    """Each parameter from the first source that holds it."""

    def __init__(self, sources: Sequence[StateSource]) -> None:
        self._sources = tuple(sources)

    def _owner(self, parameter: str) -> StateSource | None:
        return next((source for source in self._sources if source.has(parameter, WEIGHT)), None)

    def has(self, parameter: str, state: str) -> bool:
        owner = self._owner(parameter)
        return owner is not None and owner.has(parameter, state)

    def shape(self, parameter: str) -> tuple[int, ...] | None:
        owner = self._owner(parameter)
        return None if owner is None else owner.shape(parameter)

    def read(self, parameter: str, state: str, start: int, stop: int) -> Tensor:
        owner = self._owner(parameter)
        if owner is None:
            raise CheckpointError(f"{parameter!r} is in none of {len(self._sources)} sources.")
        return owner.read(parameter, state, start, stop)

    def updates(self, parameter: str) -> int:
        owner = self._owner(parameter)
        return 0 if owner is None else owner.updates(parameter)


def read_state(source: StateSource, parameter: str, state: str, out: Tensor, start: int) -> None:
    """Fill the 1-D tensor `out` with elements from `start` on; zeros where a moment does not exist yet."""
    if not out.numel():
        return
    with torch.no_grad():
        if source.has(parameter, state):
            for piece in torch.split(out, _READ_NUMEL):
                piece.copy_(source.read(parameter, state, start, start + piece.numel()))
                start += piece.numel()
        elif state == WEIGHT:
            raise CheckpointError(f"No source has the weight of {parameter!r}.")
        else:
            out.zero_()
