"""Optimizer files of DeepSpeed: master weights, moments, update counts, parameter groups."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from distft.checkpoint.formats.deepspeed_layout import stage3_spans, stage12_spans
from distft.checkpoint.formats.segments import SegmentTable
from distft.checkpoint.formats.torch_values import StoredTensor
from distft.checkpoint.formats.unnamed_parameters import (
    FlatGroup,
    PerParameterGroup,
    UnnamedGroup,
    assign_names,
)
from distft.checkpoint.fragments import WEIGHT
from distft.checkpoint.manifest import GroupRecord
from distft.errors import CheckpointError, UnsupportedFormatError

_NON_SETTINGS = frozenset(["params", "param_names", "step"])  # keys of a torch parameter group


@dataclass(slots=True)
class OptimizerStates:
    """States, shapes, update counts and groups of the parameters that the optimizer trains."""

    segments: SegmentTable = field(default_factory=SegmentTable)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    updates: dict[str, int] = field(default_factory=dict)
    groups: list[GroupRecord] = field(default_factory=list)

    def add_group(self, names: Sequence[str], group: Mapping[str, Any]) -> None:
        """Add an entry of torch's `param_groups` whose parameters are `names`."""
        settings = {key: _plain(value) for key, value in group.items() if key not in _NON_SETTINGS}
        self.groups.append(GroupRecord(parameters=tuple(names), settings=settings))

    def add_shapes(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """Add parameters with their shapes; returns their numbers of elements."""
        self.shapes |= {name: tuple(shape) for name, shape in shapes.items()}
        return {name: prod(shape) for name, shape in shapes.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, StoredTensor):
        return value.item()  # a learning rate that is a tensor on the device
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value if isinstance(value, bool | int | float | str) else None


def update_count(state: Mapping[str, Any], group: Mapping[str, Any]) -> int:
    """The optimizer's `step`, from a parameter's state or, for optimizers that keep it there, the group."""
    step = state.get("step", group.get("step", 0)) if state else 0
    return int(step.item() if isinstance(step, StoredTensor) else step)


def _moments(state: Mapping[str, Any], numel: int) -> dict[str, StoredTensor]:
    """The tensors of an optimizer state with one dimension or more and at least `numel` elements."""
    return {
        name: values
        for name, values in state.items()
        if isinstance(values, StoredTensor) and values.shape and values.numel >= numel and name != "step"
    }


def read_stage12(
    model: Mapping[str, Any], optimizers: Sequence[Mapping[str, Any]], path: str
) -> OptimizerStates:
    """Stages 1 and 2: one flat buffer per group, partitioned among the ranks."""
    result = OptimizerStates()
    states = [optimizer["optimizer_state_dict"] for optimizer in optimizers]
    bases = [state["base_optimizer_state"] for state in states]
    if not all(isinstance(base, dict) for base in bases):
        raise UnsupportedFormatError(
            f"{path} was written with zero_optimization.elastic_checkpoint, which omits the optimizer's "
            "settings: load it with DeepSpeed, and save it with elastic_checkpoint set to false."
        )
    for number, (shapes, group) in enumerate(
        zip(model["param_shapes"], bases[0]["param_groups"], strict=True)
    ):
        numels = result.add_shapes(shapes)
        paddings = states[0].get("param_alignment_paddings", [[]] * (number + 1))[number]
        start, index = 0, group["params"][0]
        for state, base in zip(states, bases, strict=True):
            master = state["single_partition_of_fp32_groups"][number]
            spans = list(stage12_spans(numels, start, start + master.numel, paddings))
            result.segments.add_spans(WEIGHT, spans, master)
            # Moments include the padding after the last parameter; some writers cut it off the weights.
            for name, values in _moments(base["state"].get(index, {}), master.numel).items():
                result.segments.add_spans(name, spans, values)
            start += master.numel
        _require_numel(start, sum(numels.values()) + sum(paddings), f"group {number}", path)
        updates = update_count(bases[0]["state"].get(index, {}), group)
        result.updates |= dict.fromkeys(shapes, updates)
        result.add_group(list(shapes), group)
    return result


def read_stage3(
    model: Mapping[str, Any], optimizers: Sequence[Mapping[str, Any]], path: str
) -> OptimizerStates:
    """Stage 3: every rank has a partition of each parameter; a group may be split into sub-groups."""
    result = OptimizerStates()
    states = [optimizer["optimizer_state_dict"] for optimizer in optimizers]
    if any("ds_zero_partition_groups" in state for state in states):
        raise UnsupportedFormatError(
            f"{path} contains expert-parallel parameters, which distft does not read."
        )
    inner = states[0]["optimizer_state_dict"]
    group_of = {index: group for group in inner["param_groups"] for index in group["params"]}
    for number, shapes in enumerate(model["param_shapes"]):
        numels = result.add_shapes(shapes)
        for rank, state in enumerate(states):
            flat = state["fp32_flat_groups"][number]
            spans = list(stage3_spans(numels, rank, len(states)))
            expected = sum(span.numel for span in spans)
            _require_numel(flat.numel, expected, f"sub-group {number} of rank {rank}", path)
            result.segments.add_spans(WEIGHT, spans, flat)
            moments = state["optimizer_state_dict"]["state"].get(number, {})
            for name, values in _moments(moments, expected).items():
                result.segments.add_spans(name, spans, values)
        updates = update_count(inner["state"].get(number, {}), group_of.get(number, {}))
        result.updates |= dict.fromkeys(shapes, updates)
    for group in inner["param_groups"]:
        names = [name for index in group["params"] for name in model["param_shapes"][index]]
        result.add_group(names, group)
    return result


def _require_numel(numel: int, expected: int, owner: str, path: str) -> None:
    if numel < expected:
        raise CheckpointError(
            f"{path} has {numel:,} of the {expected:,} elements of {owner}: "
            "a rank's file is missing, or one belongs to another run."
        )


def read_stage0(
    model: Mapping[str, Any],
    module: dict[str, StoredTensor],
    path: str,
    group_names: Sequence[Sequence[str]] | None,
) -> OptimizerStates:
    """Stage 0: the optimizer's own state dict, which numbers its parameters.

    `module` contains the weights that may be trained, in the model's order. `group_names` are the names of
    each group's parameters. If it is None, they come from the file (distft and recent versions of torch
    record them) or, for other files, from `assign_names`.
    """
    result = OptimizerStates()
    saved = model["optimizer"]
    if saved is None:
        return result
    inner = saved.get("optimizer_state_dict", saved)  # DeepSpeed wraps it in fp16 and bf16 training
    flats: Sequence[StoredTensor] | None = saved.get("fp32_groups_flat")
    masters: Sequence[Sequence[StoredTensor]] | None = saved.get("fp32_groups")
    unnamed: list[UnnamedGroup] = []
    for number, group in enumerate(inner["param_groups"]):
        if flats is not None:
            unnamed.append(FlatGroup(module, flats[number]))
        else:
            weights = None if masters is None else masters[number]
            shapes = [
                _moment_shape(inner["state"].get(index)) if weights is None else weights[i].shape
                for i, index in enumerate(group["params"])
            ]
            unnamed.append(PerParameterGroup(module, shapes, weights))
    if group_names is None and model["param_shapes"] is not None:
        group_names = [list(shapes) for shapes in model["param_shapes"]]
    all_names = _find_group_names(inner["param_groups"], list(module), unnamed, group_names, path)
    for number, (group, names) in enumerate(zip(inner["param_groups"], all_names, strict=True)):
        result.shapes |= {name: module[name].shape for name in names}
        if flats is not None:
            _add_flat_states(result, inner["state"].get(group["params"][0], {}), group, names, flats[number])
        else:
            weights = [module[name] for name in names] if masters is None else masters[number]
            _add_parameter_states(result, inner["state"], group, names, weights)
        result.add_group(names, group)
    return result


def _moment_shape(state: Mapping[str, Any] | None) -> tuple[int, ...] | None:
    tensors = [value for name, value in (state or {}).items() if name != "step"]
    return next((value.shape for value in tensors if isinstance(value, StoredTensor)), None)


def _add_parameter_states(
    result: OptimizerStates,
    states: Mapping[int, Mapping[str, Any]],
    group: Mapping[str, Any],
    names: Sequence[str],
    weights: Sequence[StoredTensor],
) -> None:
    for name, index, weight in zip(names, group["params"], weights, strict=True):
        state = states.get(index, {})
        result.segments.add_whole(name, WEIGHT, weight)
        for moment, values in state.items():
            if isinstance(values, StoredTensor) and moment != "step" and values.numel == weight.numel:
                result.segments.add_whole(name, moment, values)
        result.updates[name] = update_count(state, group)


def _add_flat_states(
    result: OptimizerStates,
    state: Mapping[str, Any],
    group: Mapping[str, Any],
    names: Sequence[str],
    weights: StoredTensor,
) -> None:
    numels = {name: prod(result.shapes[name]) for name in names}
    spans = list(stage12_spans(numels, 0, weights.numel))
    result.segments.add_spans(WEIGHT, spans, weights)
    for moment, values in _moments(state, weights.numel).items():
        result.segments.add_spans(moment, spans, values)
    result.updates |= dict.fromkeys(names, update_count(state, group))


def _find_group_names(
    groups: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    unnamed: Sequence[UnnamedGroup],
    group_names: Sequence[Sequence[str]] | None,
    path: str,
) -> Sequence[Sequence[str]]:
    """The names of each group's parameters: `group_names`, else those in the file, else the only match."""
    if group_names is None and all(
        name in names for group in groups for name in group.get("param_names", [None])
    ):
        group_names = [group["param_names"] for group in groups]
    if group_names is not None:
        _check_group_names(group_names, names, unnamed, path)
        return group_names
    try:
        return assign_names(names, unnamed)
    except ValueError as reason:
        raise UnsupportedFormatError(
            f"{path} numbers the optimizer's parameters instead of naming them, and {reason}: give the names "
            "of each group's parameters, in the order in which the script gave them to the optimizer."
        ) from None


def _check_group_names(
    group_names: Sequence[Sequence[str]],
    names: Sequence[str],
    unnamed: Sequence[UnnamedGroup],
    path: str,
) -> None:
    if len(group_names) != len(unnamed):
        raise CheckpointError(
            f"{path} has {len(unnamed)} parameter groups, but names for {len(group_names)} were given."
        )
    for number, (members, group) in enumerate(zip(group_names, unnamed, strict=True)):
        position: int | None = 0
        for name in members:
            position = None if position is None or name not in names else group.next_position(position, name)
            if position is None:
                raise CheckpointError(
                    f"{name!r} does not fit its position in group {number} of {path}: it is not a parameter "
                    "of the model, or the parameter at that position has another shape or other values."
                )
        if position != group.end:
            raise CheckpointError(
                f"Group {number} of {path} has more parameters than the {len(members)} names given."
            )
