"""Sources of an engine's state: an initialiser, a checkpoint, or several in order of preference."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from distft.checkpoint.fragments import EMA, WEIGHT
from distft.checkpoint.manifest import Manifest
from distft.errors import CheckpointError

_READ_NUMEL = 1 << 22  # elements read at a time into a larger tensor
_CHUNK_NUMEL = 1 << 20


class StateSource(Protocol):
    """State by parameter name, read as intervals of flattened parameters."""

    def has(self, parameter: str, state: str) -> bool:
        """Whether `read` can return this state."""

    def shape(self, parameter: str) -> tuple[int, ...] | None:
        """The parameter's shape; None if the source does not have it."""

    def read(self, parameter: str, state: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened state: 1-D, on the CPU, in the stored dtype."""

    def dtype(self, parameter: str, state: str) -> torch.dtype:
        """Of what `read` returns."""

    def updates(self, parameter: str) -> int:
        """Number of optimizer updates that the parameter has had."""


class CheckpointSource(StateSource, Protocol):
    """A checkpoint on disk, in any format: the input of the tools of `distft checkpoint`.

    `read` loads only the interval that it returns.
    """

    path: str
    format: str  # distft, deepspeed, universal, huggingface
    manifest: Manifest  # of a foreign format: the equivalent, without files

    def find_damage(self) -> list[str]:
        """Read every byte; return a message for each damaged file, as far as the format shows damage."""


class ManifestSource(ABC):
    """A `CheckpointSource` with the states that its manifest lists."""

    format: str

    def __init__(self, path: str, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    def has(self, parameter: str, state: str) -> bool:
        record = self.manifest.parameters.get(parameter)
        return record is not None and state in record.states

    def shape(self, parameter: str) -> tuple[int, ...] | None:
        record = self.manifest.parameters.get(parameter)
        return None if record is None else record.shape

    def dtype(self, parameter: str, state: str) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.manifest.parameters[parameter].states[state].dtype)
        return found

    def updates(self, parameter: str) -> int:
        record = self.manifest.parameters.get(parameter)
        return 0 if record is None else record.updates

    @abstractmethod
    def read(self, parameter: str, state: str, start: int, stop: int) -> Tensor:
        """As `StateSource.read`."""

    @abstractmethod
    def find_damage(self) -> list[str]:
        """As `CheckpointSource.find_damage`."""


def notes_of(source: StateSource) -> list[str]:
    """What the user should know about a checkpoint: what was used, left out, or could not be compared."""
    return list(getattr(source, "notes", ()))


class InitialSource:
    """Freshly initialised weights, computed from name and interval; no moments."""

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

    def dtype(self, parameter: str, state: str) -> torch.dtype:  # noqa: ARG002
        return torch.float32

    def updates(self, parameter: str) -> int:  # noqa: ARG002
        return 0


class WeightsOnly:
    """Another source without its moments and update counts, as `init_from` loads a checkpoint."""

    def __init__(
        self, source: StateSource, *, without: tuple[str, ...] = (), states: tuple[str, ...] = (WEIGHT,)
    ) -> None:
        """Leaves out parameters whose names begin with one of `without`, and all but these `states`."""
        self._source = source
        self._without = without
        self._states = states

    def has(self, parameter: str, state: str) -> bool:
        is_included = state in self._states and not parameter.startswith(self._without)
        return is_included and self._source.has(parameter, state)

    def shape(self, parameter: str) -> tuple[int, ...] | None:
        return self._source.shape(parameter)

    def read(self, parameter: str, state: str, start: int, stop: int) -> Tensor:
        return self._source.read(parameter, state, start, stop)

    def dtype(self, parameter: str, state: str) -> torch.dtype:
        return self._source.dtype(parameter, state)

    def updates(self, parameter: str) -> int:  # noqa: ARG002
        return 0


class FirstOf:
    """Each parameter from the first source that has it."""

    def __init__(self, sources: Sequence[StateSource]) -> None:
        self._sources = tuple(sources)

    def _source_of(self, parameter: str) -> StateSource | None:
        return next((source for source in self._sources if source.has(parameter, WEIGHT)), None)

    def has(self, parameter: str, state: str) -> bool:
        source = self._source_of(parameter)
        return source is not None and source.has(parameter, state)

    def shape(self, parameter: str) -> tuple[int, ...] | None:
        source = self._source_of(parameter)
        return None if source is None else source.shape(parameter)

    def dtype(self, parameter: str, state: str) -> torch.dtype:
        return self._require(parameter).dtype(parameter, state)

    def read(self, parameter: str, state: str, start: int, stop: int) -> Tensor:
        return self._require(parameter).read(parameter, state, start, stop)

    def _require(self, parameter: str) -> StateSource:
        source = self._source_of(parameter)
        if source is None:
            raise CheckpointError(f"{parameter!r} is in none of {len(self._sources)} sources.")
        return source

    def updates(self, parameter: str) -> int:
        source = self._source_of(parameter)
        return 0 if source is None else source.updates(parameter)


def read_state(source: StateSource, parameter: str, state: str, out: Tensor, start: int) -> None:
    """Fill the 1-D tensor `out` with elements from `start` on.

    A state that does not exist yet begins as zeros; an average of weights begins as the weight.
    """
    if not out.numel():
        return
    with torch.no_grad():
        if source.has(parameter, state):
            for chunk in torch.split(out, _READ_NUMEL):
                chunk.copy_(source.read(parameter, state, start, start + chunk.numel()))
                start += chunk.numel()
        elif state == EMA:
            read_state(source, parameter, WEIGHT, out, start)
        elif state == WEIGHT:
            raise CheckpointError(f"No source has the weight of {parameter!r}.")
        else:
            out.zero_()


def stored_states(source: CheckpointSource, parameter: str) -> list[str]:
    """The states that a checkpoint has of a parameter, the weight first."""
    return list(source.manifest.parameters[parameter].states)


def num_state_bytes(source: CheckpointSource) -> int:
    """Size of all states of all parameters."""
    return sum(
        prod(record.shape) * getattr(torch, state.dtype).itemsize
        for record in source.manifest.parameters.values()
        for state in record.states.values()
    )


def read_chunks(
    source: CheckpointSource, parameter: str, state: str, on_progress: Callable[[int], None] | None = None
) -> Iterator[tuple[int, Tensor]]:
    """A state from end to end, as (start, values) of a few MiB each.

    After each chunk is consumed, `on_progress` is called with its number of bytes.
    """
    numel = prod(source.manifest.parameters[parameter].shape)
    for start in range(0, numel, _CHUNK_NUMEL):
        values = source.read(parameter, state, start, min(start + _CHUNK_NUMEL, numel))
        yield start, values
        if on_progress is not None:
            on_progress(values.numel() * values.element_size())
