"""State by name and interval, put together from pieces of stored tensors."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from distft.checkpoint.formats.deepspeed_layout import Run
from distft.checkpoint.formats.torch_file import StoredTensor
from distft.checkpoint.fragments import Interval, cover
from distft.checkpoint.manifest import Manifest
from distft.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements [start, stop) of a flattened parameter: those of `tensor` from its element `offset` on."""

    start: int
    stop: int
    tensor: StoredTensor
    offset: int


class Pieces:
    """The pieces of each state of each parameter, as they are found."""

    def __init__(self) -> None:
        self.of: dict[str, dict[str, list[Piece]]] = {}  # parameter -> state -> pieces

    def add_whole(self, parameter: str, state: str, tensor: StoredTensor) -> None:
        """A tensor that holds all of a state."""
        self._add(parameter, state, Piece(0, tensor.numel, tensor, 0))

    def add_runs(self, state: str, runs: Iterable[Run], tensor: StoredTensor) -> None:
        """A flat tensor that holds `runs` of several parameters, from its first element on."""
        offset = 0
        for run in runs:
            if run.parameter is not None:
                self._add(run.parameter, state, Piece(run.start, run.stop, tensor, offset))
            offset += run.numel

    def _add(self, parameter: str, state: str, piece: Piece) -> None:
        self.of.setdefault(parameter, {}).setdefault(state, []).append(piece)

    def states(self, parameter: str) -> dict[str, torch.dtype]:
        """The states that are known of a parameter, with their dtypes."""
        return {state: found[0].tensor.dtype for state, found in self.of.get(parameter, {}).items()}


class PiecewiseSource:
    """The `StateSource` of a manifest and its pieces."""

    def __init__(self, path: str, manifest: Manifest, pieces: Pieces) -> None:
        self.path = path
        self.manifest = manifest
        self._pieces = pieces.of

    def has(self, parameter: str, state: str) -> bool:
        return state in self._pieces.get(parameter, {})

    def shape(self, parameter: str) -> tuple[int, ...] | None:
        record = self.manifest.parameters.get(parameter)
        return None if record is None else record.shape

    def updates(self, parameter: str) -> int:
        record = self.manifest.parameters.get(parameter)
        return 0 if record is None else record.updates

    def read(self, parameter: str, state: str, start: int, stop: int) -> Tensor:
        pieces = self._pieces.get(parameter, {}).get(state, [])
        held = [Interval(piece.start, piece.stop, number) for number, piece in enumerate(pieces)]
        try:
            wanted = cover(start, stop, held)
        except ValueError as gap:
            raise CheckpointError(f"{self.path} lacks element {gap} of {state} of {parameter!r}.") from None
        values = [_read(pieces[interval.holder], interval) for interval in wanted]
        if not values:
            dtype = pieces[0].tensor.dtype if pieces else torch.float32
            return torch.empty(0, dtype=dtype)
        return values[0] if len(values) == 1 else torch.cat(values)


def _read(piece: Piece, interval: Interval) -> Tensor:
    first = piece.offset - piece.start
    return piece.tensor.read(first + interval.start, first + interval.stop)
