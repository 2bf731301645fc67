"""Stage 0: the optimizer's own state dict, which numbers its parameters; and how they get their names."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, Protocol

from distft.checkpoint.formats.deepspeed.contents import (
    ModelFile,
    ParamGroup,
    Stage0State,
    TorchOptimizer,
    moments,
    parse_content,
    update_count,
)
from distft.checkpoint.formats.deepspeed.layout import stage12_spans
from distft.checkpoint.formats.deepspeed.zero_reader import OptimizerStates
from distft.checkpoint.formats.torch_file.values import StoredTensor
from distft.checkpoint.fragments import WEIGHT
from distft.errors import CheckpointError, UnsupportedFormatError

_COMPARED_NUMEL = 4096  # elements of a weight by which it is recognised


class UnnamedGroup(Protocol):
    """An optimizer's group whose parameters are known by shape or value only, from position 0 to `end`."""

    end: int

    def size(self, name: str) -> int:
        """How many positions the parameter takes."""

    def fits(self, name: str, position: int) -> bool:
        """Whether the parameter can begin at `position`."""


class PerParameterGroup:
    """A group with a state for each parameter: the shape is known, and perhaps the fp32 master weight."""

    def __init__(
        self,
        module: Mapping[str, StoredTensor],
        shapes: Sequence[tuple[int, ...] | None],  # None: a parameter without state, of any shape
        masters: Sequence[StoredTensor] | None = None,
    ) -> None:
        self._module, self._shapes, self._masters = module, shapes, masters
        self.end = len(shapes)

    def size(self, name: str) -> int:  # noqa: ARG002
        return 1

    def fits(self, name: str, position: int) -> bool:
        tensor, shape = self._module[name], self._shapes[position]
        if shape is not None and shape != tensor.shape:
            return False
        return self._masters is None or _is_rounded(self._masters[position], 0, tensor)


class FlatGroup:
    """A group whose parameters lie end to end in one fp32 tensor; positions count its elements."""

    def __init__(self, module: Mapping[str, StoredTensor], flat: StoredTensor) -> None:
        self._module, self._flat = module, flat
        self.end = flat.numel

    def size(self, name: str) -> int:
        return self._module[name].numel

    def fits(self, name: str, position: int) -> bool:
        return _is_rounded(self._flat, position, self._module[name])


def _is_rounded(master: StoredTensor, start: int, weight: StoredTensor) -> bool:
    """Whether the first elements of an fp32 master weight, rounded, are those of the model's weight."""
    numel = min(weight.numel, _COMPARED_NUMEL)
    rounded = master.read(start, start + numel).to(weight.dtype)
    return bool((rounded == weight.read(0, numel)).all())


def assign_names(names: Sequence[str], groups: Sequence[UnnamedGroup]) -> list[list[str]]:
    """The names of each group's parameters, if each group keeps the model's order and only one choice fits.

    Raises `ValueError` with the reason if none fits, or perhaps more than one.
    """
    # Each parameter goes to the one group that can take it next. From the first parameter on, this fills
    # groups as early as possible; from the last on, as late as possible. If both agree, nothing else fits.
    early = _fill(names, groups, is_reversed=False)
    late = _fill(names[::-1], groups, is_reversed=True)
    if early != [members[::-1] for members in late]:
        raise ValueError("several orders fit")
    return early


def _fill(names: Sequence[str], groups: Sequence[UnnamedGroup], *, is_reversed: bool) -> list[list[str]]:
    members: list[list[str]] = [[] for _ in groups]
    positions = [group.end if is_reversed else 0 for group in groups]
    for name in names:
        fitting = []
        for number, group in enumerate(groups):
            start = positions[number] - group.size(name) if is_reversed else positions[number]
            if start >= 0 and start + group.size(name) <= group.end and group.fits(name, start):
                fitting.append((number, start if is_reversed else start + group.size(name)))
        if len(fitting) > 1:
            raise ValueError("several orders fit")
        for number, position in fitting:  # a parameter that fits nowhere is frozen
            members[number].append(name)
            positions[number] = position
    if positions != [0 if is_reversed else group.end for group in groups]:
        raise ValueError("the model's parameters do not fit in the model's order")
    return members


def read_stage0(
    model: ModelFile,
    module: Mapping[str, StoredTensor],
    path: str,
    group_names: Sequence[Sequence[str]] | None,
) -> OptimizerStates:
    """States of the parameters in `module`: the weights that may be trained, in the model's order.

    `group_names` are the names of each group's parameters. If it is None, they come from the file (distft and
    recent versions of torch record them) or, for other files, from `assign_names`. Raises
    `UnsupportedFormatError` if they cannot be found.
    """
    result = OptimizerStates()
    saved = model.optimizer
    if saved is None:
        return result
    wrapped = saved if "optimizer_state_dict" in saved else {"optimizer_state_dict": saved}
    state = parse_content(Stage0State, wrapped, path)  # DeepSpeed wraps it in fp16 and bf16 training
    inner, flats, masters = state.optimizer_state_dict, state.fp32_groups_flat, state.fp32_groups
    groups = inner.param_groups
    if any(found is not None and len(found) != len(groups) for found in (flats, masters)):
        raise CheckpointError(f"{path} has other numbers of groups and of fp32 weights: it is damaged.")
    unnamed: list[UnnamedGroup] = []
    for number, group in enumerate(groups):
        weights = None if masters is None else masters[number]
        if weights is not None and len(weights) != len(group.params):
            raise CheckpointError(f"{path} lacks fp32 weights of group {number}: it is damaged.")
        if flats is not None:
            unnamed.append(FlatGroup(module, flats[number]))
            continue
        shapes = [_moment_shape(inner, index) for index in group.params]
        shapes = shapes if weights is None else [weight.shape for weight in weights]
        unnamed.append(PerParameterGroup(module, shapes, weights))
    if group_names is None and model.param_shapes is not None:
        group_names = [list(shapes) for shapes in model.param_shapes]
    all_names = _find_group_names(groups, list(module), unnamed, group_names, path)
    for number, (group, names) in enumerate(zip(groups, all_names, strict=True)):
        result.shapes |= {name: module[name].shape for name in names}
        if flats is not None:
            state_of_all = inner.state.get(next(iter(group.params), -1), {})
            tensors = {WEIGHT: flats[number], **moments(state_of_all, flats[number].numel)}
            _add_states(result, state_of_all, group, names, tensors)
        else:
            weights = masters[number] if masters is not None else tuple(module[name] for name in names)
            for name, index, weight in zip(names, group.params, weights, strict=True):
                own = inner.state.get(index, {})
                tensors = {WEIGHT: weight}
                for key, value in own.items():
                    if isinstance(value, StoredTensor) and key != "step" and value.numel == weight.numel:
                        tensors[key] = value
                _add_states(result, own, group, [name], tensors)
        result.add_group(names, group)
    return result


def _moment_shape(inner: TorchOptimizer, index: int) -> tuple[int, ...] | None:
    tensors = [value for name, value in inner.state.get(index, {}).items() if name != "step"]
    return next((value.shape for value in tensors if isinstance(value, StoredTensor)), None)


def _add_states(
    result: OptimizerStates,
    state: Mapping[str, Any],
    group: ParamGroup,
    names: Sequence[str],
    tensors: Mapping[str, StoredTensor],
) -> None:
    """Add the weights and the moments of parameters that lie end to end in `tensors`."""
    numels = {name: prod(result.shapes[name]) for name in names}
    spans = list(stage12_spans(numels, 0, tensors[WEIGHT].numel))
    for name, values in tensors.items():
        result.segments.add_spans(name, spans, values)
    result.updates |= dict.fromkeys(names, update_count(state, group))


def _find_group_names(
    groups: Sequence[ParamGroup],
    names: Sequence[str],
    unnamed: Sequence[UnnamedGroup],
    group_names: Sequence[Sequence[str]] | None,
    path: str,
) -> Sequence[Sequence[str]]:
    """The names of each group's parameters: `group_names`, else those in the file, else those that fit."""
    saved = [group.param_names for group in groups]
    if group_names is None and all(
        isinstance(found, list | tuple) and {*found} <= {*names} for found in saved
    ):
        group_names = saved
    if group_names is not None:
        _check_group_names(group_names, names, unnamed, path)
        return group_names
    try:
        return assign_names(names, unnamed)
    except ValueError as reason:
        raise UnsupportedFormatError(
            f"{path} numbers the optimizer's parameters instead of naming them, and {reason}: give "
            "the names with --parameter-groups FILE, YAML with `groups`, a list of each group's names in the "
            "order in which the script gave them to the optimizer. Weights alone (init_from, convert --to "
            "huggingface) need no names."
        ) from None


def _check_group_names(
    group_names: Sequence[Sequence[str]], names: Sequence[str], unnamed: Sequence[UnnamedGroup], path: str
) -> None:
    if len(group_names) != len(unnamed):
        raise CheckpointError(
            f"{path} has {len(unnamed)} parameter groups, but names for {len(group_names)} were given."
        )
    for number, (members, group) in enumerate(zip(group_names, unnamed, strict=True)):
        position = 0
        for name in members:
            end = position + group.size(name) if name in names else group.end + 1
            if end > group.end or not group.fits(name, position):
                raise CheckpointError(
                    f"{name!r} does not fit its position in group {number} of {path}: it is not a parameter "
                    "of the model, or the parameter at that position has another shape or other values."
                )
            position = end
        if position != group.end:
            raise CheckpointError(
                f"Group {number} of {path} has more parameters than the {len(members)} names given."
            )
