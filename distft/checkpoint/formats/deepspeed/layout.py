"""Layout of parameters in DeepSpeed's ZeRO partitions, stages 1 to 3. Arithmetic only; no files."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

FLAT_ALIGNMENT = 2  # elements per rank: DeepSpeed pads a flat group to a multiple of this times the ranks
DEFAULT_SUB_GROUP_SIZE = 1_000_000_000  # DeepSpeed's default of zero_optimization.sub_group_size, in elements


@dataclass(frozen=True, slots=True)
class Span:
    """Elements [start, stop) of a flattened parameter; padding with zeros if `parameter` is None."""

    parameter: str | None
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


def with_offsets(spans: Iterable[Span]) -> Iterator[tuple[str, Span, int]]:
    """Each span of a parameter, with its name and its first element's place if all lie end to end."""
    offset = 0
    for span in spans:
        if span.parameter is not None:
            yield span.parameter, span, offset
        offset += span.numel


def stage12_spans(
    numels: Mapping[str, int], start: int, stop: int, paddings: Sequence[int] = ()
) -> Iterator[Span]:
    """Spans in [start, stop) of a flat group at stages 1 and 2: parameters end to end, then padding.

    `paddings` are the zeros after each parameter, for checkpoints whose parameters DeepSpeed aligned.
    """
    position = 0
    all_paddings = [*paddings, *[0] * (len(numels) - len(paddings))]
    for (name, numel), padding in zip(numels.items(), all_paddings, strict=True):
        for parameter, size in ((name, numel), (None, padding)):
            first, last = max(start - position, 0), min(stop - position, size)
            if first < last:
                yield Span(parameter, first, last)
            position += size
    if stop > max(position, start):
        yield Span(None, 0, stop - max(position, start))


def stage12_partition_numel(numels: Mapping[str, int], world_size: int) -> int:
    """Elements in each rank's partition of a flat group at stages 1 and 2, padding included."""
    return -(-sum(numels.values()) // (FLAT_ALIGNMENT * world_size)) * FLAT_ALIGNMENT


def stage3_partition_numel(numel: int, world_size: int) -> int:
    """Elements in each rank's partition of one parameter at stage 3, padding included."""
    return -(-numel // world_size)


def stage3_spans(numels: Mapping[str, int], rank: int, world_size: int) -> Iterator[Span]:
    """Spans of a rank's flat group at stage 3: its partition of each parameter, each padded with zeros."""
    for name, numel in numels.items():
        size = stage3_partition_numel(numel, world_size)
        start, stop = min(rank * size, numel), min((rank + 1) * size, numel)
        if start < stop:
            yield Span(name, start, stop)
        if stop - start < size:
            yield Span(None, 0, size - (stop - start))


def sub_groups(
    numels: Mapping[str, int], world_size: int, sub_group_size: int = DEFAULT_SUB_GROUP_SIZE
) -> list[dict[str, int]]:
    """Split a group's parameters into sub-groups as stage 3 does.

    A sub-group ends after the parameter with which its partitions on one rank reach `sub_group_size`.
    """
    groups: list[dict[str, int]] = []
    num_filled = sub_group_size
    for name, numel in numels.items():
        if num_filled >= sub_group_size:
            groups.append({})
            num_filled = 0
        groups[-1][name] = numel
        num_filled += stage3_partition_numel(numel, world_size)
    return groups
