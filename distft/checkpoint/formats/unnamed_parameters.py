"""Which parameters an optimizer's state belongs to, where a file keeps it by number alone.

DeepSpeed without ZeRO saves what the optimizer says of itself, and optimizers do not know names. Parameters
are taken to stand in each group in the order of the model, as scripts make their groups; shapes, and values
where there are any, tell the groups apart.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from distft.checkpoint.formats.torch_file import StoredTensor

_COMPARED_NUMEL = 4096
_Places = tuple[int, ...]  # how far each group is filled
_Trail = tuple[Any, int, str] | None  # the trail before, and the group that got the last parameter
_MOST_STATES = 20_000  # of the search: where it takes more, too much is alike to tell anything apart


class UnnamedGroup(Protocol):
    """The members of one optimizer group, of which something is known."""

    end: int  # the place behind the last member

    def place_after(self, place: int, name: str) -> int | None:
        """The place behind parameter `name` if it can stand at `place`, else None."""

    def room(self, name: str) -> int:
        """How many places a parameter would take."""


class MembersByShape:
    """Members with a state of their own: the shape is known, and the fp32 weight where there is one."""

    def __init__(
        self,
        module: dict[str, StoredTensor],
        shapes: Sequence[tuple[int, ...] | None],  # None: a member without state, of any shape
        masters: Sequence[StoredTensor] | None = None,
    ) -> None:
        self._module, self._shapes, self._masters = module, shapes, masters
        self.end = len(shapes)

    def place_after(self, place: int, name: str) -> int | None:
        if place >= self.end:
            return None
        tensor, shape = self._module[name], self._shapes[place]
        if shape is not None and shape != tensor.shape:
            return None
        if self._masters is not None and not _agree(self._masters[place], 0, tensor):
            return None
        return place + 1

    def room(self, name: str) -> int:  # noqa: ARG002
        return 1


class MembersInFlat:
    """Members laid end to end in one fp32 tensor; places are elements of it."""

    def __init__(self, module: dict[str, StoredTensor], flat: StoredTensor) -> None:
        self._module, self._flat = module, flat
        self.end = flat.numel

    def place_after(self, place: int, name: str) -> int | None:
        tensor = self._module[name]
        after = place + tensor.numel
        return after if after <= self.end and _agree(self._flat, place, tensor) else None

    def room(self, name: str) -> int:
        return self._module[name].numel


def _agree(master: StoredTensor, start: int, weight: StoredTensor) -> bool:
    """Whether the first elements of an fp32 weight, rounded, are those that the model computes with."""
    numel = min(weight.numel, _COMPARED_NUMEL)
    rounded: Tensor = master.read(start, start + numel).to(weight.dtype)
    return bool((rounded == weight.read(0, numel)).all())


def assign_names(names: Sequence[str], groups: Sequence[UnnamedGroup]) -> list[list[str]]:
    """The names of each group's members: the only way to place them, in the order of `names`.

    Raises `ValueError` with the reason where there is no way, or more than one.
    """
    reached: dict[_Places, tuple[int, _Trail]] = {(0,) * len(groups): (1, None)}
    room_left = sum(groups[0].room(name) for name in names) if groups else 0
    for name in names:
        room_left -= groups[0].room(name) if groups else 0
        further = dict(reached)  # the parameter may be in no group: it is frozen
        for places, (ways, trail) in reached.items():
            for number, group in enumerate(groups):
                after = group.place_after(places[number], name)
                if after is not None:
                    key = (*places[:number], after, *places[number + 1 :])
                    known_ways, _ = further.get(key, (0, None))
                    further[key] = (known_ways + ways, (trail, number, name))
        ends = [group.end for group in groups]
        # Without those that the parameters to come cannot fill any more.
        reached = {places: way for places, way in further.items() if sum(ends) - sum(places) <= room_left}
        if len(reached) > _MOST_STATES:
            raise ValueError("too many parameters are alike")
    ways, trail = reached.get(tuple(group.end for group in groups), (0, None))
    if ways != 1:
        raise ValueError("several orders fit" if ways else "no order of the model's parameters fits")
    members: list[list[str]] = [[] for _ in groups]
    while trail is not None:
        trail, number, name = trail
        members[number].insert(0, name)
    return members
