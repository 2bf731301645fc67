"""Optimizer files of ZeRO stages 1 to 3: master weights, moments, update counts, parameter groups."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from distft.checkpoint.formats.deepspeed.contents import (
    ParamGroup,
    Shapes,
    Stage3State,
    Stage12State,
    moments,
    parse_content,
    update_count,
)
from distft.checkpoint.formats.deepspeed.layout import Span, stage3_spans, stage12_spans, with_offsets
from distft.checkpoint.formats.deepspeed.segments import SegmentTable
from distft.checkpoint.formats.torch_file.values import OpaqueObject
from distft.checkpoint.fragments import WEIGHT
from distft.checkpoint.manifest import GroupRecord
from distft.errors import CheckpointError, UnsupportedFormatError


@dataclass(slots=True)
class OptimizerStates:
    """States, shapes, update counts and groups of the parameters that the optimizer trains."""

    segments: SegmentTable = field(default_factory=SegmentTable)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    updates: dict[str, int | None] = field(default_factory=dict)  # None: the optimizer does not count
    groups: list[GroupRecord] = field(default_factory=list)

    def add_group(self, names: Iterable[str], group: ParamGroup) -> None:
        self.groups.append(GroupRecord(parameters=tuple(names), settings=group.settings))

    def add_shapes(self, shapes: Shapes) -> dict[str, int]:
        """Add parameters with their shapes; returns their numbers of elements."""
        self.shapes |= shapes
        return {name: prod(shape) for name, shape in shapes.items()}


def read_stage12(shapes: Sequence[Shapes], optimizers: Sequence[Any], path: str) -> OptimizerStates:
    """Stages 1 and 2: one flat buffer per group, partitioned among the ranks, whose files come in order."""
    result = OptimizerStates()
    if not all(isinstance(state.get("base_optimizer_state"), Mapping) for state in optimizers):
        raise UnsupportedFormatError(
            f"{path} was written with zero_optimization.elastic_checkpoint, which omits the optimizer's "
            "settings: load it with DeepSpeed, and save it with elastic_checkpoint set to false."
        )
    states = [parse_content(Stage12State, state, path) for state in optimizers]
    for state in states:
        groups, masters = state.base_optimizer_state.param_groups, state.single_partition_of_fp32_groups
        _require_equal(len(groups), len(shapes), "parameter groups", path)
        _require_equal(len(masters), len(shapes), "flat buffers", path)
    for number, members in enumerate(shapes):
        numels = result.add_shapes(members)
        paddings = dict(enumerate(states[0].param_alignment_paddings)).get(number, ())
        _require_equal(min(len(paddings), len(numels)), len(paddings), f"paddings of group {number}", path)
        start = 0
        for rank, state in enumerate(states):
            master = state.single_partition_of_fp32_groups[number]
            spans = list(stage12_spans(numels, start, start + master.numel, paddings))
            _check_slices(state, number, spans, f"{path}, rank {rank}")
            result.segments.add_spans(WEIGHT, spans, master)
            # Moments include the padding after the last parameter; some writers cut it off the weights.
            for name, values in moments(_state_of(state, number), master.numel).items():
                result.segments.add_spans(name, spans, values)
            start += master.numel
        total = sum(numels.values()) + sum(paddings)
        if start < total:
            raise _too_small(start, total, f"group {number}", path)
        group = states[0].base_optimizer_state.param_groups[number]
        result.updates |= dict.fromkeys(members, update_count(_state_of(states[0], number), group))
        result.add_group(members, group)
    return result


def _state_of(state: Stage12State, number: int) -> dict[str, Any]:
    """The moments and the update count of a group, which are stored under its only parameter."""
    base = state.base_optimizer_state
    return base.state.get(next(iter(base.param_groups[number].params), -1), {})


def _check_slices(state: Stage12State, number: int, spans: Sequence[Span], where: str) -> None:
    """Compare the slices that the file says it has with those that its rank must have."""
    if state.param_slice_mappings is None:
        return
    _require_equal(
        len(state.param_slice_mappings), len(state.base_optimizer_state.param_groups), "maps", where
    )
    expected = {name: (offset, span.numel) for name, span, offset in with_offsets(spans)}
    addresses = state.param_slice_mappings[number]
    found = {
        name: (address.fields.get("start"), address.fields.get("numel"))
        for name, address in addresses.items()
        if isinstance(address, OpaqueObject)
    }
    if found != expected:
        raise CheckpointError(
            f"{where}: the optimizer file is of another rank or another run. It has "
            f"{_list_slices(found)} of group {number}, but this rank has {_list_slices(expected)}."
        )


def _list_slices(slices: Mapping[str, tuple[Any, Any]]) -> str:
    listed = [f"{numel} elements of {name!r}" for name, (_, numel) in list(slices.items())[:3]]
    return ", ".join(listed) + " and others" * (len(slices) > 3) if listed else "nothing"


def read_stage3(shapes: Sequence[Shapes], optimizers: Sequence[Any], path: str) -> OptimizerStates:
    """Stage 3: every rank has a partition of each parameter; a group may be split into sub-groups."""
    result = OptimizerStates()
    if any("ds_zero_partition_groups" in state for state in optimizers):
        raise UnsupportedFormatError(
            f"{path} contains expert-parallel parameters, which distft does not read."
        )
    states = [parse_content(Stage3State, state, path) for state in optimizers]
    for state in states:
        _require_equal(len(state.fp32_flat_groups), len(shapes), "sub-groups", path)
    inner = states[0].optimizer_state_dict
    group_of = {index: group for group in inner.param_groups for index in group.params}
    _require_equal(len(group_of.keys() & set(range(len(shapes)))), len(shapes), "sub-groups in groups", path)
    for number, members in enumerate(shapes):
        numels = result.add_shapes(members)
        for rank, state in enumerate(states):
            flat = state.fp32_flat_groups[number]
            spans = list(stage3_spans(numels, rank, len(states)))
            expected = sum(span.numel for span in spans)
            if flat.numel < expected:
                raise _too_small(flat.numel, expected, f"sub-group {number} of rank {rank}", path)
            result.segments.add_spans(WEIGHT, spans, flat)
            saved = state.optimizer_state_dict.state.get(number, {})
            for name, values in moments(saved, expected).items():
                result.segments.add_spans(name, spans, values)
        updates = update_count(inner.state.get(number, {}), group_of[number])
        result.updates |= dict.fromkeys(members, updates)
    for group in inner.param_groups:
        result.add_group([name for index in group.params for name in shapes[index]], group)
    return result


def _require_equal(found: int, expected: int, what: str, path: str) -> None:
    if found != expected:
        raise CheckpointError(
            f"{path} has {found} {what} in an optimizer file, but {expected} in the model file: "
            "its files are of different runs, or damaged."
        )


def _too_small(numel: int, expected: int, owner: str, path: str) -> CheckpointError:
    return CheckpointError(
        f"{path} has {numel:,} of the {expected:,} elements of {owner}: "
        "a rank's file is missing, or one belongs to another run."
    )
