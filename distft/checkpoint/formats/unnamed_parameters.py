"""Names for the numbered parameters of an optimizer's state dict, found by shape and value.

DeepSpeed without ZeRO saves the optimizer's state dict, which does not name parameters. Scripts usually give
them to each group in the model's order, so the search assumes that order; shapes, and values if the file has
master weights, decide which group a parameter is in.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from distft.checkpoint.formats.torch_values import StoredTensor

_COMPARED_NUMEL = 4096
_Positions = tuple[int, ...]  # of each group: where its next parameter goes
_Assignments = tuple[Any, int, str] | None  # linked list: earlier assignments, group number, parameter name
_MAX_SEARCH_NODES = 20_000  # with more, too many parameters are alike


class UnnamedGroup(Protocol):
    """An optimizer group whose parameters are known by shape or value only."""

    end: int  # the position after the last parameter

    def next_position(self, position: int, name: str) -> int | None:
        """The position after parameter `name` if it fits at `position`, else None."""

    def num_positions(self, name: str) -> int:
        """How many positions the parameter takes."""


class PerParameterGroup:
    """A group with a state per parameter: the shape is known, and perhaps the fp32 master weight."""

    def __init__(
        self,
        module: dict[str, StoredTensor],
        shapes: Sequence[tuple[int, ...] | None],  # None: a parameter without state, of any shape
        masters: Sequence[StoredTensor] | None = None,
    ) -> None:
        self._module, self._shapes, self._masters = module, shapes, masters
        self.end = len(shapes)

    def next_position(self, position: int, name: str) -> int | None:
        if position >= self.end:
            return None
        tensor, shape = self._module[name], self._shapes[position]
        if shape is not None and shape != tensor.shape:
            return None
        if self._masters is not None and not _matches_weight(self._masters[position], 0, tensor):
            return None
        return position + 1

    def num_positions(self, name: str) -> int:  # noqa: ARG002
        return 1


class FlatGroup:
    """A group whose parameters lie end to end in one fp32 tensor; positions count its elements."""

    def __init__(self, module: dict[str, StoredTensor], flat: StoredTensor) -> None:
        self._module, self._flat = module, flat
        self.end = flat.numel

    def next_position(self, position: int, name: str) -> int | None:
        tensor = self._module[name]
        after = position + tensor.numel
        return after if after <= self.end and _matches_weight(self._flat, position, tensor) else None

    def num_positions(self, name: str) -> int:
        return self._module[name].numel


def _matches_weight(master: StoredTensor, start: int, weight: StoredTensor) -> bool:
    """Whether the first elements of an fp32 master weight, rounded, are those of the model's weight."""
    numel = min(weight.numel, _COMPARED_NUMEL)
    rounded: Tensor = master.read(start, start + numel).to(weight.dtype)
    return bool((rounded == weight.read(0, numel)).all())


def assign_names(names: Sequence[str], groups: Sequence[UnnamedGroup]) -> list[list[str]]:
    """The names of each group's parameters, if exactly one assignment fits. Each group keeps their order.

    Raises `ValueError` with the reason if no assignment fits, or more than one.
    """
    # Dynamic programming over names: the positions reached, and how many assignments lead to each.
    reached: dict[_Positions, tuple[int, _Assignments]] = {(0,) * len(groups): (1, None)}
    num_left = sum(groups[0].num_positions(name) for name in names) if groups else 0
    for name in names:
        num_left -= groups[0].num_positions(name) if groups else 0
        extended = dict(reached)  # the parameter may be in no group: it is frozen
        for positions, (num_ways, assignments) in reached.items():
            for number, group in enumerate(groups):
                after = group.next_position(positions[number], name)
                if after is not None:
                    key = (*positions[:number], after, *positions[number + 1 :])
                    known_ways, _ = extended.get(key, (0, None))
                    extended[key] = (known_ways + num_ways, (assignments, number, name))
        ends = [group.end for group in groups]
        # Drop positions from which the remaining parameters cannot fill the groups.
        reached = {
            positions: way for positions, way in extended.items() if sum(ends) - sum(positions) <= num_left
        }
        if len(reached) > _MAX_SEARCH_NODES:
            raise ValueError("too many parameters are alike")
    num_ways, assignments = reached.get(tuple(group.end for group in groups), (0, None))
    if num_ways != 1:
        raise ValueError("several orders fit" if num_ways else "no order of the model's parameters fits")
    members: list[list[str]] = [[] for _ in groups]
    while assignments is not None:
        assignments, number, name = assignments
        members[number].insert(0, name)
    return members
