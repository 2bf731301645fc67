"""DeepSpeed's universal format: a file for each state of each parameter, whatever wrote or loads it."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from math import prod
from pathlib import PurePosixPath
from typing import Any

import torch

from distft import storage
from distft.checkpoint.formats.deepspeed_files import (
    LATEST_UNIVERSAL,
    MODEL_FILE,
    TagFiles,
    find_tag,
    sliced_model_file,
)
from distft.checkpoint.formats.deepspeed_model import ModelReading, ScriptState, build_manifest
from distft.checkpoint.formats.deepspeed_optimizer import Trained, update_count
from distft.checkpoint.formats.pieces import Pieces, PiecewiseSource
from distft.checkpoint.formats.target_state import DEEPSPEED_VERSION, TargetState
from distft.checkpoint.formats.torch_file import (
    StoredTensor,
    read_torch_file,
    torch_file_faults,
    write_torch_file,
)
from distft.checkpoint.formats.torch_pickle import is_plain
from distft.checkpoint.fragments import MOMENTS, WEIGHT
from distft.checkpoint.manifest import Manifest
from distft.checkpoint.sources import CheckpointSource
from distft.errors import CheckpointError, ConfigError, Mistakes

_ZERO = "zero"
_OPTIMIZER_STATE = "optimizer_state.pt"
_FILE_NAMES = {WEIGHT: "fp32"}  # of states; others are called as they are
_STEP = "step"
_FORMAT_VERSION = 0.4  # of DeepSpeed's universal_checkpoint_info


class UniversalCheckpoint(PiecewiseSource):
    """What DeepSpeed's ds_to_universal, or `write_universal` here, wrote."""

    format = "universal"

    def __init__(
        self, path: str, manifest: Manifest, pieces: Pieces, script: ScriptState, files: list[str]
    ) -> None:
        super().__init__(path, manifest, pieces)
        self.script = script
        self._files = files

    @classmethod
    def open(cls, path: str, *, trust: bool = False) -> "UniversalCheckpoint":
        """The checkpoint at `path`: a directory with `zero`, or the one that `latest_universal` there names.

        `trust` as for `DeepSpeedCheckpoint.open`. Raises `CheckpointError` with all that is wrong.
        """
        directory = find_tag(path, LATEST_UNIVERSAL)
        files = _model_files(directory)
        try:
            mistakes = Mistakes()
            models: dict[int, Any] = {}
            for rank, name in sorted(files.model.items()):
                with mistakes.gather():
                    models[rank] = read_torch_file(files.file_path(name), trust=trust)
            mistakes.raise_if_any()
            return cls._from_models(files, models, trust=trust)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(
                f"{directory} is not laid out as ds_to_universal does it ({type(error).__name__}: {error}): "
                "it is damaged, or of a version that is not known here."
            ) from error

    @classmethod
    def _from_models(
        cls, files: TagFiles, models: Mapping[int, Any], *, trust: bool
    ) -> "UniversalCheckpoint":
        model = models[0]
        if files.is_sliced and len(models) != model["dp_world_size"]:
            raise CheckpointError(
                f"{files.path} holds the model files of {len(models)} of {model['dp_world_size']} ranks, so "
                "frozen parameters are not whole: convert the checkpoint again."
            )
        reading = ModelReading.of(models, is_sliced=files.is_sliced)
        folder = storage.join(files.path, _ZERO)
        common = read_torch_file(storage.join(folder, _OPTIMIZER_STATE), trust=trust)
        trained, state_files = _trained(folder, model, common, is_sliced=files.is_sliced, trust=trust)
        manifest, pieces = build_manifest(
            model,
            reading,
            trained,
            run_id=PurePosixPath(files.path).name,
            loss_scale=None,
            zero_stage="universal",
        )
        paths = [files.file_path(name) for name in files.model.values()]
        paths += [storage.join(folder, _OPTIMIZER_STATE), *state_files]
        script = ScriptState.of(model, common.get("loss_scaler"))
        return cls(files.path, manifest, pieces, script, paths)

    def faults(self) -> list[str]:
        """What is wrong with its files now: each is read whole, and held against the checksums of its zip."""
        return [fault for path in self._files for fault in torch_file_faults(path)]


def _model_files(directory: str) -> TagFiles:
    """The model files: the one that all ranks share, where there is one, else each rank's."""
    if not storage.exists(storage.join(directory, _ZERO, _OPTIMIZER_STATE)):
        raise CheckpointError(
            f"{directory} holds no {_ZERO}/{_OPTIMIZER_STATE}: it is no universal checkpoint of DeepSpeed's."
        )
    if storage.exists(storage.join(directory, MODEL_FILE)):
        return TagFiles(directory, model={0: MODEL_FILE})
    return TagFiles.find(directory)


def _trained(
    folder: str, model: Mapping[str, Any], common: Mapping[str, Any], *, is_sliced: bool, trust: bool
) -> tuple[Trained, list[str]]:
    """What the files below `zero` tell of all trained parameters, and their paths."""
    trained, paths, mistakes = Trained(), [], Mistakes()
    inner = common["optimizer_state_dict"] if is_sliced else common
    groups = inner["param_groups"]
    for number, shapes in enumerate(model["param_shapes"]):
        group = next((g for g in groups if number in g["params"]), {}) if is_sliced else groups[number]
        updates = update_count(inner["state"].get(number, {}), group) if is_sliced else 0
        for name, shape in shapes.items():
            trained.shapes[name] = tuple(shape)
            trained.updates[name] = updates
            with mistakes.gather():
                paths += _add_parameter(trained, storage.join(folder, name), name, trust=trust)
    with mistakes.gather():
        _check_same_states(trained, folder)
    mistakes.raise_if_any()
    for number, group in enumerate(groups):
        members = group["params"] if is_sliced else [number]
        trained.add_group([name for i in members for name in model["param_shapes"][i]], group)
    return trained, paths


def _check_same_states(trained: Trained, folder: str) -> None:
    """One optimizer wrote them: what some of the parameters have, all have."""
    states = {name: set(trained.pieces.states(name)) for name in trained.shapes}
    all_states = set().union(*states.values())
    missing = [
        f"{storage.join(folder, name)} lacks {state}.pt, which others have: convert the checkpoint again."
        for name, held in states.items()
        for state in sorted(all_states - held - {WEIGHT})
        if held
    ]
    if missing:
        raise CheckpointError("\n".join(missing))


def _add_parameter(trained: Trained, folder: str, name: str, *, trust: bool) -> list[str]:
    states = {file.removesuffix(".pt"): storage.join(folder, file) for file in storage.list_names(folder)}
    if _FILE_NAMES[WEIGHT] not in states:
        raise CheckpointError(
            f"{folder} lacks fp32.pt, the weight of {name!r}: convert the checkpoint again."
        )
    for state, path in states.items():
        content = read_torch_file(path, trust=trust)
        if state == _STEP:
            trained.updates[name] = update_count({_STEP: content}, {})
            continue
        tensor = content["param"] if isinstance(content, dict) else content
        expected = prod(trained.shapes[name])
        if not isinstance(tensor, StoredTensor) or tensor.numel != expected:
            raise CheckpointError(
                f"{path} does not hold the {expected:,} elements of {name!r}: files of another run are "
                "there, or the model was split over ranks by tensors, which is not read here."
            )
        trained.pieces.add_whole(name, WEIGHT if state == _FILE_NAMES[WEIGHT] else state, tensor)
    return list(states.values())


def write_universal(
    source: CheckpointSource, target: str, *, on_progress: Callable[[int], None] = lambda _num_bytes: None
) -> None:
    """Write `source` to a directory in `target`, for DeepSpeed's `load_universal`; `latest_universal` last.

    DeepSpeed then loads it at stages 1 to 3 and any number of ranks. It takes no frozen parameters and no
    buffers from such a checkpoint (they are there for other readers), and at stage 3 it gives every group
    the settings and the update count of the first. `on_progress` is told the bytes of each piece written.
    """
    state = TargetState(source)
    tag = f"global_step{state.manifest.progress.step}_universal"
    directory = storage.join(target, tag)
    if storage.list_names(directory):
        raise ConfigError(f"{directory} is not empty: give another target, or remove what is there.")
    common = _common_state(state)
    for group in state.groups:
        updates = state.updates(group.parameters)
        moments = dict.fromkeys([*MOMENTS, *state.moments(group.parameters)])
        for name in group.parameters:
            folder = storage.join(directory, _ZERO, name)
            for kind in (*moments, WEIGHT):
                content = {"param": state.whole(name, kind, torch.float32), "cat_dim": 0}
                path = storage.join(folder, f"{_FILE_NAMES.get(kind, kind)}.pt")
                write_torch_file(path, content, on_progress=on_progress)
            step = torch.tensor(float(updates))
            write_torch_file(storage.join(folder, f"{_STEP}.pt"), step, on_progress=on_progress)
    path = storage.join(directory, _ZERO, _OPTIMIZER_STATE)
    write_torch_file(path, common, on_progress=on_progress)
    # DeepSpeed looks for the one name at stages 1 and 2, for the other at stage 3.
    for name, is_sliced in ((sliced_model_file(0), True), (MODEL_FILE, False)):
        content = _model_state(state, is_sliced=is_sliced)
        write_torch_file(storage.join(directory, name), content, on_progress=on_progress)
    storage.commit_bytes(storage.join(target, LATEST_UNIVERSAL), tag.encode())


def _common_state(state: TargetState) -> dict[str, Any]:
    """What is the same for all parameters: one reading of it for stages 1 and 2, one for stage 3."""
    numbers = range(len(state.groups))
    updates = [state.updates(group.parameters) for group in state.groups]
    groups = [state.settings(number, [number]) for number in numbers]
    return {
        "ds_version": DEEPSPEED_VERSION,
        "param_groups": groups,
        "optimizer_state_dict": {
            "state": {number: {_STEP: torch.tensor(float(updates[number]))} for number in numbers},
            "param_groups": groups,
        },
    }


def _model_state(state: TargetState, *, is_sliced: bool) -> dict[str, Any]:
    """The file of the run's progress; the shared one has the weights that are not below `zero`, too."""
    manifest, progress = state.manifest, state.manifest.progress
    module: OrderedDict[str, Any] = OrderedDict()
    for name, record in manifest.parameters.items():
        dtype = getattr(torch, record.states[WEIGHT].dtype)
        is_elsewhere = record.trainable or is_sliced
        module[name] = torch.empty(0, dtype=dtype) if is_elsewhere else state.whole(name, WEIGHT, dtype)
    client = state.script.client_state or {}
    return {
        **{key: value for key, value in client.items() if is_plain(value)},
        "module": module,
        "buffer_names": [name for name, record in manifest.parameters.items() if record.is_buffer],
        "optimizer": None,
        "param_shapes": [
            OrderedDict((name, torch.Size(manifest.parameters[name].shape)) for name in group.parameters)
            for group in state.groups
        ],
        "frozen_param_shapes": None,
        "shared_params": dict(manifest.tied),
        "frozen_param_fragments": None,
        "lr_scheduler": state.lr_scheduler(),
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": progress.skipped_steps,
        "global_steps": progress.step,
        "global_samples": progress.sequences_seen,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "universal_checkpoint_info": {"universal_checkpoint_version": _FORMAT_VERSION},
        "ds_config": {},
        "ds_version": DEEPSPEED_VERSION,
    }
