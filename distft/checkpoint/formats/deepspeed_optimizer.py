"""What the optimizers of plain DeepSpeed wrote: master weights, moments, update counts, groups."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from distft.checkpoint.formats.deepspeed_layout import flat_runs, sliced_runs
from distft.checkpoint.formats.pieces import Pieces
from distft.checkpoint.formats.torch_file import StoredTensor
from distft.checkpoint.formats.unnamed_parameters import (
    MembersByShape,
    MembersInFlat,
    UnnamedGroup,
    assign_names,
)
from distft.checkpoint.fragments import WEIGHT
from distft.checkpoint.manifest import GroupRecord
from distft.checkpoint.unread import UnreadError
from distft.errors import CheckpointError

_NO_SETTINGS = frozenset(["params", "param_names", "step"])


@dataclass(slots=True)
class Trained:
    """All that the optimizer's state tells of the parameters that it trains."""

    pieces: Pieces = field(default_factory=Pieces)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    updates: dict[str, int] = field(default_factory=dict)
    groups: list[GroupRecord] = field(default_factory=list)

    def add_group(self, names: Sequence[str], group: Mapping[str, Any]) -> None:
        settings = {key: _setting(value) for key, value in group.items() if key not in _NO_SETTINGS}
        self.groups.append(GroupRecord(parameters=tuple(names), settings=settings))

    def add_moments(self, state: Mapping[str, Any], numel: int) -> dict[str, StoredTensor]:
        """The tensors of a state that have at least `numel` elements, and one dimension or more."""
        return {
            name: values
            for name, values in state.items()
            if isinstance(values, StoredTensor) and values.shape and values.numel >= numel and name != "step"
        }


def _setting(value: Any) -> Any:
    if isinstance(value, StoredTensor):
        return value.number()  # a learning rate that lives on the device
    if isinstance(value, list | tuple):
        return [_setting(entry) for entry in value]
    return value if isinstance(value, bool | int | float | str) else None


def update_count(state: Mapping[str, Any], group: Mapping[str, Any]) -> int:
    """The optimizer's own count of updates; some optimizers keep it in the group."""
    step = state.get("step", group.get("step", 0)) if state else 0
    return int(step.number() if isinstance(step, StoredTensor) else step)


def read_flat(model: Mapping[str, Any], optimizers: Sequence[Mapping[str, Any]], where: str) -> Trained:
    """Stages 1 and 2: one flat buffer a group, cut among the ranks."""
    trained = Trained()
    states = [optimizer["optimizer_state_dict"] for optimizer in optimizers]
    bases = [state["base_optimizer_state"] for state in states]
    if not all(isinstance(base, dict) for base in bases):
        raise UnreadError(
            f"{where} was written with zero_optimization.elastic_checkpoint, which leaves out the settings "
            "of the optimizer: load it with DeepSpeed and save it again without."
        )
    for number, (shapes, group) in enumerate(
        zip(model["param_shapes"], bases[0]["param_groups"], strict=True)
    ):
        numels = _take_shapes(trained, shapes)
        paddings = states[0].get("param_alignment_paddings", [[]] * (number + 1))[number]
        start, index = 0, group["params"][0]
        for state, base in zip(states, bases, strict=True):
            master = state["single_partition_of_fp32_groups"][number]
            runs = list(flat_runs(numels, start, start + master.numel, paddings))
            trained.pieces.add_runs(WEIGHT, runs, master)
            # Moments keep the padding behind the last parameter, which some writers cut off the weights.
            for name, values in trained.add_moments(base["state"].get(index, {}), master.numel).items():
                trained.pieces.add_runs(name, runs, values)
            start += master.numel
        _check_whole(start, sum(numels.values()) + sum(paddings), f"group {number}", where)
        updates = update_count(bases[0]["state"].get(index, {}), group)
        trained.updates |= dict.fromkeys(shapes, updates)
        trained.add_group(list(shapes), group)
    return trained


def read_sliced(model: Mapping[str, Any], optimizers: Sequence[Mapping[str, Any]], where: str) -> Trained:
    """Stage 3: every rank has a slice of each parameter; a group may be split into sub-groups."""
    trained = Trained()
    states = [optimizer["optimizer_state_dict"] for optimizer in optimizers]
    if any("ds_zero_partition_groups" in state for state in states):
        raise UnreadError(f"{where} holds experts that only some ranks share, which is not read here.")
    inner = states[0]["optimizer_state_dict"]
    group_of = {index: group for group in inner["param_groups"] for index in group["params"]}
    for number, shapes in enumerate(model["param_shapes"]):
        numels = _take_shapes(trained, shapes)
        for rank, state in enumerate(states):
            flat = state["fp32_flat_groups"][number]
            runs = list(sliced_runs(numels, rank, len(states)))
            expected = sum(run.numel for run in runs)
            _check_whole(flat.numel, expected, f"sub-group {number} of rank {rank}", where)
            trained.pieces.add_runs(WEIGHT, runs, flat)
            moments = state["optimizer_state_dict"]["state"].get(number, {})
            for name, values in trained.add_moments(moments, expected).items():
                trained.pieces.add_runs(name, runs, values)
        updates = update_count(inner["state"].get(number, {}), group_of.get(number, {}))
        trained.updates |= dict.fromkeys(shapes, updates)
    for group in inner["param_groups"]:
        names = [name for index in group["params"] for name in model["param_shapes"][index]]
        trained.add_group(names, group)
    return trained


def _take_shapes(trained: Trained, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    trained.shapes |= {name: tuple(shape) for name, shape in shapes.items()}
    return {name: prod(shape) for name, shape in shapes.items()}


def _check_whole(numel: int, expected: int, what: str, where: str) -> None:
    if numel < expected:
        raise CheckpointError(
            f"{where} holds {numel:,} of the {expected:,} elements of {what}: "
            "files of another run are among these, or a rank's file is missing."
        )


def read_whole(
    model: Mapping[str, Any],
    module: dict[str, StoredTensor],
    where: str,
    named_groups: Sequence[Sequence[str]] | None,
) -> Trained:
    """Stage 0: the optimizer's own state dict, whose parameters are numbers.

    `module` holds the weights that may be trained, in the model's order; `named_groups` are the names of
    each group's parameters, for where they cannot be found out. Files of ours tell them.
    """
    trained = Trained()
    saved = model["optimizer"]
    if saved is None:
        return trained
    inner = saved.get("optimizer_state_dict", saved)  # under the fp16 and bf16 wrappers, or plain
    flats: Sequence[StoredTensor] | None = saved.get("fp32_groups_flat")
    masters: Sequence[Sequence[StoredTensor]] | None = saved.get("fp32_groups")
    unnamed: list[UnnamedGroup] = []
    for number, group in enumerate(inner["param_groups"]):
        if flats is not None:
            unnamed.append(MembersInFlat(module, flats[number]))
        else:
            known = None if masters is None else masters[number]
            shapes = [
                _state_shape(inner["state"].get(index)) if known is None else known[place].shape
                for place, index in enumerate(group["params"])
            ]
            unnamed.append(MembersByShape(module, shapes, known))
    if named_groups is None and model["param_shapes"] is not None:
        named_groups = [list(shapes) for shapes in model["param_shapes"]]
    names = _names_of(inner["param_groups"], list(module), unnamed, named_groups, where)
    for number, (group, members) in enumerate(zip(inner["param_groups"], names, strict=True)):
        trained.shapes |= {name: module[name].shape for name in members}
        if flats is not None:
            _take_flat(trained, inner["state"].get(group["params"][0], {}), group, members, flats[number])
        else:
            known = [module[name] for name in members] if masters is None else masters[number]
            _take_members(trained, inner["state"], group, members, known)
        trained.add_group(members, group)
    return trained


def _state_shape(state: Mapping[str, Any] | None) -> tuple[int, ...] | None:
    tensors = [value for name, value in (state or {}).items() if name != "step"]
    return next((value.shape for value in tensors if isinstance(value, StoredTensor)), None)


def _take_members(
    trained: Trained,
    states: Mapping[int, Mapping[str, Any]],
    group: Mapping[str, Any],
    members: Sequence[str],
    masters: Sequence[StoredTensor],
) -> None:
    for name, index, master in zip(members, group["params"], masters, strict=True):
        state = states.get(index, {})
        trained.pieces.add_whole(name, WEIGHT, master)
        for moment, values in state.items():
            if isinstance(values, StoredTensor) and moment != "step" and values.numel == master.numel:
                trained.pieces.add_whole(name, moment, values)
        trained.updates[name] = update_count(state, group)


def _take_flat(
    trained: Trained,
    state: Mapping[str, Any],
    group: Mapping[str, Any],
    members: Sequence[str],
    master: StoredTensor,
) -> None:
    numels = {name: prod(trained.shapes[name]) for name in members}
    runs = list(flat_runs(numels, 0, master.numel))
    trained.pieces.add_runs(WEIGHT, runs, master)
    for moment, values in trained.add_moments(state, master.numel).items():
        trained.pieces.add_runs(moment, runs, values)
    trained.updates |= dict.fromkeys(members, update_count(state, group))


def _names_of(
    groups: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    unnamed: Sequence[UnnamedGroup],
    named_groups: Sequence[Sequence[str]] | None,
    where: str,
) -> Sequence[Sequence[str]]:
    """The names of each group's parameters: as they were given, as torch kept them, or as they must be."""
    if named_groups is None and all(
        name in names for group in groups for name in group.get("param_names", [None])
    ):
        named_groups = [group["param_names"] for group in groups]
    if named_groups is not None:
        _check_named(named_groups, names, unnamed, where)
        return named_groups
    try:
        return assign_names(names, unnamed)
    except ValueError as reason:
        raise UnreadError(
            f"{where} keeps the optimizer's state by number, and {reason}: give the names of each group's "
            "parameters, in the order in which the script gave them to the optimizer."
        ) from None


def _check_named(
    named_groups: Sequence[Sequence[str]],
    names: Sequence[str],
    unnamed: Sequence[UnnamedGroup],
    where: str,
) -> None:
    if len(named_groups) != len(unnamed):
        raise CheckpointError(
            f"{where} has {len(unnamed)} groups of parameters, and names for {len(named_groups)} were given."
        )
    for number, (members, group) in enumerate(zip(named_groups, unnamed, strict=True)):
        place: int | None = 0
        for name in members:
            place = None if place is None or name not in names else group.place_after(place, name)
            if place is None:
                raise CheckpointError(
                    f"{name!r} does not fit where it was put in group {number} of {where}: "
                    "it is no parameter of the model, or has another shape or other values there."
                )
        if place != group.end:
            raise CheckpointError(
                f"Group {number} of {where} has more parameters than the {len(members)} names given."
            )
