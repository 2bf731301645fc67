"""A transformers model that was trained under DeepSpeed, by the Trainer or accelerate: under distft's names.

`config.json` beside the tag's directory says what the model is like and which tensor is which parameter.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from distft import storage
from distft.checkpoint.formats.deepspeed.reader import DeepSpeedCheckpoint
from distft.checkpoint.formats.deepspeed.segments import SegmentedSource
from distft.checkpoint.formats.huggingface_config import HuggingFaceModelSpec, parse_config
from distft.checkpoint.formats.huggingface_files import INDEX_FILE, WEIGHTS_FILE, read_json
from distft.checkpoint.formats.huggingface_source import HuggingFaceCheckpoint, model_fields
from distft.checkpoint.formats.huggingface_tensors import TensorMap, map_saved_tensors, read_parameter
from distft.checkpoint.formats.names import CONFIG_FILE, has_model_states
from distft.checkpoint.fragments import WEIGHT
from distft.checkpoint.manifest import GroupRecord, Manifest
from distft.checkpoint.sources import CheckpointSource, ManifestSource
from distft.checkpoint.steps import absolute
from distft.errors import CheckpointError, ConfigError

_MOST_NAMES = 3  # in a message
_COMPARED_PARAMETERS = 32
_COMPARED_NUMEL = 1024  # of each


def open_deepspeed(
    path: str,
    *,
    trust: bool = False,
    groups: Sequence[Sequence[str]] | None = None,
    weights_only: bool = False,
) -> CheckpointSource:
    """The DeepSpeed checkpoint at `path`; if it is of a transformers model, under distft's names.

    With `weights_only`, the model's safetensors in `path` are used if there are any; `notes` of the result
    say so. Raises as `DeepSpeedCheckpoint.open`.
    """
    if weights_only and _has_weights(path):
        weights = HuggingFaceCheckpoint.open(path)
        weights.notes.append(
            f"The weights are those of the safetensors in {path}, in {_dtypes(weights)}. DeepSpeed's files "
            "beside them, which have fp32, were not read: to use those, name the directory of the tag."
        )
        return weights
    return with_distft_names(
        DeepSpeedCheckpoint.open(path, trust=trust, groups=groups, weights_only=weights_only), path
    )


def with_distft_names(checkpoint: SegmentedSource, path: str) -> CheckpointSource:
    """`checkpoint`, which was opened at `path`, under distft's names if config.json of its model is there."""
    folder = _find_config(path)
    if folder is None:
        return checkpoint
    try:
        found = TransformersCheckpoint.of(checkpoint, folder)
        found.has_safetensors = _has_weights(path)
        return found
    except ConfigError as error:
        checkpoint.notes.append(
            f"{storage.join(folder, CONFIG_FILE)} was not used, so parameters keep their own names: {error}"
        )
        return checkpoint


def _dtypes(source: CheckpointSource) -> str:
    records = source.manifest.parameters.values()
    return ", ".join(sorted({state.dtype for record in records for state in record.states.values()}))


def _find_config(path: str) -> str | None:
    """The directory that has config.json: `path` itself, or the one above if `path` is a tag's directory."""
    folders = [path, storage.parent(absolute(path))] if has_model_states(path) else [path]
    return next((d for d in folders if storage.exists(storage.join(d, CONFIG_FILE))), None)


def _has_weights(folder: str) -> bool:
    names = (WEIGHTS_FILE, INDEX_FILE) if storage.exists(storage.join(folder, CONFIG_FILE)) else ()
    return any(storage.exists(storage.join(folder, name)) for name in names)


class TransformersCheckpoint(ManifestSource):
    """A `CheckpointSource` over DeepSpeed's files: each parameter is rows of a tensor of transformers."""

    def __init__(
        self,
        folder: str,
        deepspeed: SegmentedSource,
        tensor_map: TensorMap,
        manifest: Manifest,
        tensor_names: dict[str, str],
    ) -> None:
        super().__init__(folder, manifest)
        self.format = deepspeed.format
        self.deepspeed = deepspeed  # the same under transformers' names, for the Trainer to go on with
        self.notes = deepspeed.notes
        self.has_safetensors = False  # of the same step, beside DeepSpeed's files
        self._parameters = tensor_map.parameters
        self._tensor_names = tensor_names  # parameter -> its tensor's name in DeepSpeed's files

    @classmethod
    def of(cls, deepspeed: SegmentedSource, folder: str) -> "TransformersCheckpoint":
        """Raises `ConfigError` if config.json in `folder` is of an unsupported model, or of another one."""
        spec = parse_config(read_json(storage.join(folder, CONFIG_FILE)))
        saved = {name: name for name in deepspeed.manifest.parameters} | deepspeed.manifest.tied
        tensor_map = map_saved_tensors(spec, saved)
        names = {
            parameter: saved[location.tensor.name]
            for parameter, location in tensor_map.parameters.items()
            if all(tensor.name in saved for tensor in location.tensors)
        }
        _check_tensors(deepspeed, tensor_map, names, spec)
        return cls(
            folder, deepspeed, tensor_map, _manifest(deepspeed, tensor_map, names, spec, folder), names
        )

    def read(self, parameter: str, state: str, start: int, stop: int) -> Tensor:
        if not self.has(parameter, state):
            raise CheckpointError(f"{self.path} has no {state} of {parameter!r}.")
        name, location = self._tensor_names[parameter], self._parameters[parameter]

        def read_from(tensor: str, begin: int, end: int) -> Tensor:
            stored = name if tensor == location.tensor.name else tensor
            return self.deepspeed.read(stored, state, begin, end)

        return read_parameter(location, read_from, start, stop)

    def find_damage(self) -> list[str]:
        """Damage of DeepSpeed's files, and of the model's safetensors beside them."""
        found = self.deepspeed.find_damage()
        if not self.has_safetensors:
            return found
        try:
            beside = HuggingFaceCheckpoint.open(self.path)
        except CheckpointError as error:
            return [*found, str(error)]
        found += beside.find_damage()
        names = [name for name in self.manifest.parameters if beside.has(name, WEIGHT)]
        sampled = names[:: max(len(names) // _COMPARED_PARAMETERS, 1)]
        differing = [name for name in sampled if not self._has_weight_of(beside, name)]
        if 2 * len(differing) > len(sampled):
            found.append(
                f"The safetensors in {self.path} are of another step than DeepSpeed's files there: their "
                f"weights differ, such as {differing[0]}. Copy the checkpoint again."
            )
        return found

    def _has_weight_of(self, other: CheckpointSource, name: str) -> bool:
        numel = min(prod(self.manifest.parameters[name].shape), _COMPARED_NUMEL)
        weight = other.read(name, WEIGHT, 0, numel)
        return torch.equal(self.read(name, WEIGHT, 0, numel).to(weight.dtype), weight)


def _check_tensors(
    deepspeed: SegmentedSource, tensor_map: TensorMap, names: dict[str, str], spec: HuggingFaceModelSpec
) -> None:
    """Raise `ConfigError` if the parameters are not those of the model; note those that were not saved."""
    problems = []
    for parameter, name in names.items():
        shape, expected = deepspeed.shape(name), tensor_map.parameters[parameter].tensor.shape
        if shape != expected:
            problems.append(f"{name} has shape {list(shape or ())}, and not {list(expected)}.")
    records, known = deepspeed.manifest.parameters, set(names.values())
    known |= {tensor.name for name in names for tensor in tensor_map.parameters[name].tensors}
    foreign = [name for name, record in records.items() if name not in known and not record.is_buffer]
    if foreign:
        problems.append(
            f"{_list(foreign)} {'is' if len(foreign) == 1 else 'are'} no part of this {spec.architecture}."
        )
    missing = [name for name in tensor_map.parameters if name not in names]
    if not names or problems:
        raise ConfigError(
            "\n".join(problems) or f"it describes other parameters than {_list(list(records))}."
        )
    if missing:
        deepspeed.notes.append(f"Not saved, perhaps because frozen weights were left out: {_list(missing)}.")


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _manifest(
    deepspeed: SegmentedSource,
    tensor_map: TensorMap,
    names: dict[str, str],
    spec: HuggingFaceModelSpec,
    folder: str,
) -> Manifest:
    saved, shapes = deepspeed.manifest, tensor_map.parameters
    parameters = {
        parameter: saved.parameters[name].model_copy(update={"shape": shapes[parameter].shape})
        for parameter, name in names.items()
    }
    parameters_of: dict[str, list[str]] = {}
    for parameter, name in names.items():
        parameters_of.setdefault(name, []).append(parameter)
    groups = []
    for group in saved.groups:
        members = [parameter for name in group.parameters for parameter in parameters_of[name]]
        groups.append(GroupRecord(parameters=tuple(members), settings=group.settings))
    return saved.model_copy(
        update={
            **model_fields(spec, folder),
            "written_by": {**saved.written_by, "architecture": spec.architecture},
            "parameters": parameters,
            "groups": groups,
        }
    )
