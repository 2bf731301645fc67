"""Reads and writes DeepSpeed's universal checkpoints: one file per state of each parameter."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import PurePosixPath
from typing import Any

import torch

from distft import storage
from distft.checkpoint.formats.deepspeed.contents import (
    ExtraState,
    ModelFile,
    TorchOptimizer,
    parse_content,
    unknown_layout_as_checkpoint_error,
    update_count,
)
from distft.checkpoint.formats.deepspeed.files import (
    MODEL_FILE,
    DeepSpeedFiles,
    find_tag_directory,
    stage3_model_file,
)
from distft.checkpoint.formats.deepspeed.model import ModelStates, build_manifest
from distft.checkpoint.formats.deepspeed.segments import SegmentedSource
from distft.checkpoint.formats.deepspeed.writer_state import DEEPSPEED_VERSION, StateDictBuilder
from distft.checkpoint.formats.deepspeed.zero_reader import OptimizerStates
from distft.checkpoint.formats.names import LATEST_UNIVERSAL
from distft.checkpoint.formats.torch_file import read_torch_file, write_torch_file
from distft.checkpoint.formats.torch_file.values import StoredTensor
from distft.checkpoint.fragments import WEIGHT
from distft.checkpoint.sources import CheckpointSource
from distft.errors import CheckpointError, ConfigError, ErrorCollector
from distft.optim.adamw import ADAMW_MOMENTS

_ZERO = "zero"
_OPTIMIZER_STATE = "optimizer_state.pt"
_FILE_NAMES = {WEIGHT: "fp32"}  # other states have files of their own name
_STEP = "step"
_FORMAT_VERSION = 0.4  # of DeepSpeed's universal_checkpoint_info


class UniversalCheckpoint(SegmentedSource):
    """A checkpoint that DeepSpeed's ds_to_universal or `write_universal` wrote."""

    format = "universal"

    @classmethod
    def open(cls, path: str, *, trust: bool = False) -> "UniversalCheckpoint":
        """Open a directory with `zero/` in it, or the one that the file `latest_universal` in `path` names.

        `trust` as for `DeepSpeedCheckpoint.open`. Raises `CheckpointError` with all problems.
        """
        directory = find_tag_directory(path, LATEST_UNIVERSAL)
        files = _model_files(directory)
        with unknown_layout_as_checkpoint_error(directory, "ds_to_universal"):
            errors = ErrorCollector()
            models = files.read_models(errors, trust=trust)
            errors.raise_if_any()
            return cls._from_models(files, models, trust=trust)

    @classmethod
    def _from_models(
        cls, files: DeepSpeedFiles, models: Mapping[int, ModelFile], *, trust: bool
    ) -> "UniversalCheckpoint":
        model = models[0]
        if files.is_stage3 and len(models) != model.dp_world_size:
            raise CheckpointError(
                f"{files.path} has the model files of {len(models)} of {model.dp_world_size} ranks, so "
                "frozen parameters are incomplete: convert the checkpoint again."
            )
        model_states = ModelStates.of(models, files.path, is_stage3=files.is_stage3)
        folder = storage.join(files.path, _ZERO)
        common = read_torch_file(storage.join(folder, _OPTIMIZER_STATE), trust=trust)
        optimizer_states, state_files = _optimizer_states(
            folder, model, common, is_stage3=files.is_stage3, trust=trust
        )
        manifest, segments = build_manifest(
            model,
            model_states,
            optimizer_states,
            run_id=PurePosixPath(files.path).name,
            loss_scale=None,
            zero_stage="universal",
        )
        paths = [*files.paths(), storage.join(folder, _OPTIMIZER_STATE), *state_files]
        extra_state = ExtraState.of(model, common.get("loss_scaler"))
        return cls(files.path, manifest, segments, extra_state, paths)


def _model_files(directory: str) -> DeepSpeedFiles:
    """The model file that all ranks share, if there is one, else the model file of each rank."""
    if not storage.exists(storage.join(directory, _ZERO, _OPTIMIZER_STATE)):
        raise CheckpointError(
            f"{directory} is not a universal checkpoint of DeepSpeed: it has no {_ZERO}/{_OPTIMIZER_STATE}."
        )
    if storage.exists(storage.join(directory, MODEL_FILE)):
        return DeepSpeedFiles(directory, model={0: MODEL_FILE})
    return DeepSpeedFiles.find(directory)


def _optimizer_states(
    folder: str, model: ModelFile, common: Mapping[str, Any], *, is_stage3: bool, trust: bool
) -> tuple[OptimizerStates, list[str]]:
    """The states in the files below `zero/`, and the paths of these files."""
    result, paths, errors = OptimizerStates(), [], ErrorCollector()
    inner = common["optimizer_state_dict"] if is_stage3 else {"state": {}, **common}
    optimizer = parse_content(TorchOptimizer, inner, storage.join(folder, _OPTIMIZER_STATE))
    groups, all_shapes = optimizer.param_groups, model.param_shapes or ()
    for number, shapes in enumerate(all_shapes):
        if is_stage3:
            owner = next((group for group in groups if number in group.params), None)
            updates = update_count(optimizer.state.get(number, {}), owner)
        else:
            updates = None
        for name, shape in shapes.items():
            result.shapes[name] = shape
            result.updates[name] = updates
            with errors.collect():
                paths += _add_parameter(result, storage.join(folder, name), name, trust=trust)
    with errors.collect():
        _check_same_states(result, folder)
    errors.raise_if_any()
    for number, group in enumerate(groups):
        members = group.params if is_stage3 else [number]
        names = [name for i in members for name in all_shapes[i]]
        _check_same_updates(result, names, folder)
        result.add_group(names, group)
    return result, paths


def _check_same_updates(optimizer_states: OptimizerStates, names: Sequence[str], folder: str) -> None:
    """Raise unless all parameters of a group have had as many updates: ZeRO counts them by group."""
    counts = {optimizer_states.updates[name]: name for name in names}
    if len(counts) > 1:
        shown = ", ".join(f"{name!r} has had {count} updates" for count, name in list(counts.items())[:3])
        raise CheckpointError(
            f"{folder} mixes files of different tags: of one group, {shown}. Convert the checkpoint again."
        )


def _check_same_states(optimizer_states: OptimizerStates, folder: str) -> None:
    """Raise unless all parameters have the same moments: one optimizer wrote them."""
    states = {name: set(optimizer_states.segments.dtypes(name)) for name in optimizer_states.shapes}
    all_states = set().union(*states.values())
    missing = [
        f"{storage.join(folder, name)} lacks {state}.pt, which other parameters have: "
        "convert the checkpoint again."
        for name, found in states.items()
        for state in sorted(all_states - found - {WEIGHT})
        if found
    ]
    if missing:
        raise CheckpointError("\n".join(missing))


def _add_parameter(optimizer_states: OptimizerStates, folder: str, name: str, *, trust: bool) -> list[str]:
    """Add the states in a parameter's folder; returns the paths of their files."""
    states = {file.removesuffix(".pt"): storage.join(folder, file) for file in storage.list_names(folder)}
    if _FILE_NAMES[WEIGHT] not in states:
        raise CheckpointError(
            f"{folder} lacks fp32.pt, the weight of {name!r}: convert the checkpoint again."
        )
    for state, path in states.items():
        content = read_torch_file(path, trust=trust)
        if state == _STEP:
            optimizer_states.updates[name] = update_count({_STEP: content})
            continue
        tensor = content["param"] if isinstance(content, dict) else content
        expected = prod(optimizer_states.shapes[name])
        if not isinstance(tensor, StoredTensor) or tensor.numel != expected:
            raise CheckpointError(
                f"{path} does not contain the {expected:,} elements of {name!r}: it belongs to another run, "
                "or the model was tensor-parallel, which distft does not read."
            )
        kind = WEIGHT if state == _FILE_NAMES[WEIGHT] else state
        optimizer_states.segments.add_whole(name, kind, tensor)
    return list(states.values())


def write_universal(
    source: CheckpointSource, target: str, *, on_progress: Callable[[int], None] = lambda _num_bytes: None
) -> None:
    """Write `source` to a directory in `target`, then the file `latest_universal`.

    DeepSpeed loads it (`checkpoint: {load_universal: true}`) at stages 1 to 3 and any number of ranks. It
    loads neither frozen parameters nor buffers from it (they are there for other readers), and at stage 3 it
    gives every group the settings and the update count of the first. `on_progress` gets the number of bytes
    of each chunk written. Raises `ConfigError` if the directory is not empty.
    """
    builder = StateDictBuilder(source)
    tag = f"global_step{builder.manifest.progress.step}_universal"
    directory = storage.join(target, tag)
    if storage.list_names(directory):
        raise ConfigError(f"{directory} is not empty: give another target, or remove its files.")
    common = _common_state(builder)
    for group in builder.groups:
        updates = builder.updates(group.parameters)
        moments = dict.fromkeys([*ADAMW_MOMENTS, *builder.moments(group.parameters)])
        for name in group.parameters:
            folder = storage.join(directory, _ZERO, name)
            for state in (*moments, WEIGHT):
                content = {"param": builder.parameter_state(name, state, torch.float32), "cat_dim": 0}
                path = storage.join(folder, f"{_FILE_NAMES.get(state, state)}.pt")
                write_torch_file(path, content, on_progress=on_progress)
            step = torch.tensor(float(updates))
            write_torch_file(storage.join(folder, f"{_STEP}.pt"), step, on_progress=on_progress)
    path = storage.join(directory, _ZERO, _OPTIMIZER_STATE)
    write_torch_file(path, common, on_progress=on_progress)
    # DeepSpeed reads the first at stage 3, the second at stages 1 and 2.
    for name, is_stage3 in ((stage3_model_file(0), True), (MODEL_FILE, False)):
        content = _model_content(builder, is_stage3=is_stage3)
        write_torch_file(storage.join(directory, name), content, on_progress=on_progress)
    storage.commit_bytes(storage.join(target, LATEST_UNIVERSAL), tag.encode())


def _common_state(builder: StateDictBuilder) -> dict[str, Any]:
    """Content of optimizer_state.pt: groups for stages 1 and 2, groups and update counts for stage 3."""
    numbers = range(len(builder.groups))
    updates = [builder.updates(group.parameters) for group in builder.groups]
    groups = [builder.param_group(number, [number]) for number in numbers]
    return {
        "ds_version": DEEPSPEED_VERSION,
        "param_groups": groups,
        "optimizer_state_dict": {
            "state": {number: {_STEP: torch.tensor(float(updates[number]))} for number in numbers},
            "param_groups": groups,
        },
    }


def _model_content(builder: StateDictBuilder, *, is_stage3: bool) -> dict[str, Any]:
    """Content of a model file. The one for stages 1 and 2 includes frozen weights and buffers."""
    manifest = builder.manifest
    module: OrderedDict[str, Any] = OrderedDict()
    for name, record in manifest.parameters.items():
        dtype = getattr(torch, record.states[WEIGHT].dtype)
        is_elsewhere = record.trainable or is_stage3
        module[name] = (
            torch.empty(0, dtype=dtype) if is_elsewhere else builder.parameter_state(name, WEIGHT, dtype)
        )
    return builder.model_file(
        module,
        [builder.shapes(group.parameters) for group in builder.groups],
        world_size=1,
        shared_params=dict(manifest.tied),
        universal_checkpoint_info={"universal_checkpoint_version": _FORMAT_VERSION},
    )
