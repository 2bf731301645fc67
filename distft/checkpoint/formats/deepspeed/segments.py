"""A checkpoint source whose parameter states are assembled from segments of stored tensors."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distft.checkpoint.formats.deepspeed.contents import ExtraState
from distft.checkpoint.formats.deepspeed.layout import Span, with_offsets
from distft.checkpoint.formats.torch_file import find_torch_file_damage
from distft.checkpoint.formats.torch_file.values import StoredTensor
from distft.checkpoint.fragments import Interval, cover
from distft.checkpoint.manifest import Manifest
from distft.checkpoint.sources import ManifestSource
from distft.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Segment:
    """Elements [start, stop) of a flattened parameter, stored in `tensor` from its element `offset` on."""

    start: int
    stop: int
    tensor: StoredTensor
    offset: int


class SegmentTable:
    """The segments of each state of each parameter."""

    def __init__(self) -> None:
        self.by_parameter: dict[str, dict[str, list[Segment]]] = {}  # parameter -> state -> segments

    def add_whole(self, parameter: str, state: str, tensor: StoredTensor) -> None:
        """Add a tensor that contains all elements of a state."""
        self._add(parameter, state, Segment(0, tensor.numel, tensor, 0))

    def add_spans(self, state: str, spans: Iterable[Span], tensor: StoredTensor) -> None:
        """Add a flat tensor that contains `spans` end to end, from its first element on."""
        for parameter, span, offset in with_offsets(spans):
            self._add(parameter, state, Segment(span.start, span.stop, tensor, offset))

    def _add(self, parameter: str, state: str, segment: Segment) -> None:
        self.by_parameter.setdefault(parameter, {}).setdefault(state, []).append(segment)

    def dtypes(self, parameter: str) -> dict[str, torch.dtype]:
        """The dtype of each state that the parameter has."""
        return {state: found[0].tensor.dtype for state, found in self.by_parameter.get(parameter, {}).items()}


class SegmentedSource(ManifestSource):
    """A checkpoint of DeepSpeed: a manifest, a segment table, and the paths of all files that were read."""

    def __init__(
        self,
        path: str,
        manifest: Manifest,
        segments: SegmentTable,
        extra_state: ExtraState,
        file_paths: Sequence[str],
    ) -> None:
        super().__init__(path, manifest)
        self.extra_state = extra_state
        self.notes: list[str] = []  # what was used, or could not be compared
        self._segments = segments.by_parameter
        self._file_paths = file_paths

    def find_damage(self) -> list[str]:
        """Problems of its files: each is read whole and compared with the CRC-32s of its zip entries."""
        return [problem for path in self._file_paths for problem in find_torch_file_damage(path)]

    def read(self, parameter: str, state: str, start: int, stop: int) -> Tensor:
        segments = self._segments.get(parameter, {}).get(state, [])
        stored = [Interval(segment.start, segment.stop, i) for i, segment in enumerate(segments)]
        try:
            covering = cover(start, stop, stored)
        except ValueError as gap:
            raise CheckpointError(f"{self.path} lacks element {gap} of {state} of {parameter!r}.") from None
        values = [_read(segments[interval.owner], interval) for interval in covering]
        if not values:
            dtype = segments[0].tensor.dtype if segments else torch.float32
            return torch.empty(0, dtype=dtype)
        return values[0] if len(values) == 1 else torch.cat(values)


def _read(segment: Segment, interval: Interval) -> Tensor:
    shift = segment.offset - segment.start
    return segment.tensor.read(shift + interval.start, shift + interval.stop)
