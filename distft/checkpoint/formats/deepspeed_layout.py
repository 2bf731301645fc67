"""Where DeepSpeed's ZeRO keeps the elements of parameters. Arithmetic only; no files."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

FLAT_ALIGNMENT = 2  # elements, for each rank: a flat group is padded to a multiple of this
SUB_GROUP_NUMEL = 1_000_000_000  # zero_optimization.sub_group_size, unless a script sets it


@dataclass(frozen=True, slots=True)
class Run:
    """Elements [start, stop) of a parameter, or as many zeros where `parameter` is None."""

    parameter: str | None
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return self.stop - self.start


def flat_runs(
    numels: Mapping[str, int], start: int, stop: int, paddings: Sequence[int] = ()
) -> Iterator[Run]:
    """What lies at [start, stop) of parameters laid end to end (stages 1 and 2), zeros behind the last.

    `paddings` are the zeros after each parameter, where DeepSpeed was told to align parameters.
    """
    position = 0
    after = [*paddings, *[0] * (len(numels) - len(paddings))]
    for (name, numel), padding in zip(numels.items(), after, strict=True):
        for parameter, size in ((name, numel), (None, padding)):
            first, last = max(start - position, 0), min(stop - position, size)
            if first < last:
                yield Run(parameter, first, last)
            position += size
    if stop > max(position, start):
        yield Run(None, 0, stop - max(position, start))


def flat_partition_numel(numels: Mapping[str, int], world_size: int) -> int:
    """Elements of a flat group that each rank has at stages 1 and 2, padding included."""
    return -(-sum(numels.values()) // (FLAT_ALIGNMENT * world_size)) * FLAT_ALIGNMENT


def slice_numel(numel: int, world_size: int) -> int:
    """Elements that each rank has of one parameter at stage 3, padding included."""
    return -(-numel // world_size)


def sliced_runs(numels: Mapping[str, int], rank: int, world_size: int) -> Iterator[Run]:
    """What a rank has of a group at stage 3: its slice of each parameter, filled up with zeros."""
    for name, numel in numels.items():
        size = slice_numel(numel, world_size)
        start, stop = min(rank * size, numel), min((rank + 1) * size, numel)
        if start < stop:
            yield Run(name, start, stop)
        if stop - start < size:
            yield Run(None, 0, size - (stop - start))


def sub_groups(
    numels: Mapping[str, int], world_size: int, sub_group_numel: int = SUB_GROUP_NUMEL
) -> list[dict[str, int]]:
    """A group's parameters as stage 3 splits them: a sub-group ends once it has its size on a rank."""
    groups: list[dict[str, int]] = []
    filled = sub_group_numel
    for name, numel in numels.items():
        if filled >= sub_group_numel:
            groups.append({})
            filled = 0
        groups[-1][name] = numel
        filled += slice_numel(numel, world_size)
    return groups
