"""Reads an adapter directory of PEFT (LoRA, rsLoRA, DoRA) with the transformers model that it belongs to.

Shape letters: I inputs, O outputs, R rank.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import Tensor

from distft import storage
from distft.checkpoint.formats.huggingface_classifier import CLASSIFIER, CLASSIFIER_OUTPUT
from distft.checkpoint.formats.huggingface_config import HuggingFaceModelSpec
from distft.checkpoint.formats.huggingface_files import read_json
from distft.checkpoint.formats.huggingface_source import HuggingFaceCheckpoint, model_fields
from distft.checkpoint.formats.huggingface_tensors import (
    TensorMap,
    base_prefix,
    map_tensors,
    read_parameter,
)
from distft.checkpoint.formats.huggingface_tokenizer import find_tokenizer
from distft.checkpoint.formats.names import ADAPTER_CONFIG, ADAPTER_FILE, ADAPTER_MODEL
from distft.checkpoint.formats.peft_names import (
    A_SUFFIX,
    B_SUFFIX,
    MAGNITUDE_SUFFIX,
    PREFIX,
    AdaptedTensor,
    AdapterKeys,
    linear_tensors,
    parse_adapter_config,
)
from distft.checkpoint.fragments import WEIGHT
from distft.checkpoint.manifest import Manifest, ParameterRecord, Progress, StateRecord
from distft.checkpoint.rank_file import read_elements
from distft.checkpoint.safetensors_header import TensorLocation, read_safetensors_header
from distft.checkpoint.sources import ManifestSource
from distft.errors import CheckpointError
from distft.model.lora_config import MAGNITUDE, A, B, LoraConfig

_MOST_PROBLEMS = 10


@dataclass(kw_only=True, slots=True)
class _Matched:
    """The tensors of an adapter's file, by what they are of."""

    tensor_map: TensorMap  # of the model with the adapter's head
    lora: LoraConfig
    layers: dict[str, AdaptedTensor]  # by module
    scales: dict[str, float]  # of each layer's B A
    stored: dict[str, TensorLocation]  # by name without prefixes
    whole: dict[str, str] = field(default_factory=dict)  # transformers' tensor -> name in `stored`


class PeftCheckpoint(ManifestSource):
    """A `CheckpointSource` over an adapter and its base; weights only."""

    format = "peft"

    def __init__(self, path: str, base: HuggingFaceCheckpoint, manifest: Manifest, matched: _Matched) -> None:
        super().__init__(path, manifest)
        self.notes = list(base.notes)
        self._base, self._matched = base, matched
        self._layer_of = {
            f"{parameter.removesuffix('.weight')}.{kind}": (layer, parameter)
            for layer in matched.layers.values()
            for parameter in layer.rows
            for kind in (A, B, MAGNITUDE)
        }

    @classmethod
    def open(cls, path: str) -> "PeftCheckpoint":
        """Open the adapter at `path`, and the base that its adapter_config.json names; reads headers alone.

        Raises `CheckpointError` for another kind of adapter, or one of another base.
        """
        where = storage.join(path, ADAPTER_CONFIG)
        keys = parse_adapter_config(read_json(where), where)
        base = _open_base(path, keys, where)
        file, pickled = storage.join(path, ADAPTER_FILE), storage.join(path, f"{ADAPTER_MODEL}.bin")
        if not storage.exists(file) and storage.exists(pickled):
            raise CheckpointError(
                f"{pickled} is a pickle, which can run code when it is read, and there is no {ADAPTER_FILE}: "
                "load the adapter with peft and save it again (save_pretrained)."
            )
        stored = read_safetensors_header(file)
        matched, spec = _match(base, keys, stored, file)
        return cls(path, base, _manifest(path, base, spec, matched), matched)

    @property
    def base_path(self) -> str:
        """The directory of the base."""
        return self._base.path

    def read(self, parameter: str, state: str, start: int, stop: int) -> Tensor:
        if not self.has(parameter, state):
            raise CheckpointError(f"{self.path} has no {state} of {parameter!r}.")
        if parameter in self._layer_of:
            return self._adapter(parameter).reshape(-1)[start:stop]
        location = self._matched.tensor_map.parameters[parameter]
        if location.tensor.name not in self._matched.whole:
            return self._base.read(parameter, state, start, stop)
        return read_parameter(location, self._read_whole, start, stop)

    def _read_whole(self, name: str, start: int, stop: int) -> Tensor:
        return _elements(self._matched.stored[self._matched.whole[name]], start, stop)

    def _adapter(self, parameter: str) -> Tensor:
        """An adapter's parameter. One of a lower rank, or another scale, is made equal to the others'."""
        layer, weight = self._layer_of[parameter]
        kind, rank = parameter.rpartition(".")[2], self._matched.lora.rank
        first, last = layer.rows[weight]
        if kind == MAGNITUDE:
            return self._tensor(layer.module + MAGNITUDE_SUFFIX)[first:last]
        if kind == A:
            a_RI = self._tensor(layer.module + A_SUFFIX)
            return torch.nn.functional.pad(a_RI, (0, 0, 0, rank - len(a_RI)))
        b_OR = self._tensor(layer.module + B_SUFFIX)[first:last]
        b_OR = b_OR * (self._matched.scales[layer.module] / self._matched.lora.scale)
        return torch.nn.functional.pad(b_OR, (0, rank - b_OR.shape[1]))

    def _tensor(self, name: str) -> Tensor:
        location = self._matched.stored[name]
        return _elements(location, 0, prod(location.shape)).float().view(location.shape)

    def find_damage(self) -> list[str]:
        damage = self._base.find_damage()
        end = max((location.stop for location in self._matched.stored.values()), default=0)
        file = storage.join(self.path, ADAPTER_FILE)
        if storage.size(file) < end:
            damage.append(f"{file} is cut short: it has {storage.size(file):,} of {end:,} bytes.")
        return damage


def _elements(location: TensorLocation, start: int, stop: int) -> Tensor:
    assert location.dtype is not None
    offset = location.offset + start * location.dtype.itemsize
    return read_elements(location.path, offset, location.dtype, stop - start)


def _open_base(path: str, keys: AdapterKeys, where: str) -> HuggingFaceCheckpoint:
    """The model that the adapter was trained on: from here, or from the adapter's directory."""
    name = keys.base_model_name_or_path or ""
    for base in (name, os.path.join(path, name)):  # noqa: PTH118
        if name and not storage.is_url(name) and storage.is_directory(base):
            return HuggingFaceCheckpoint.open(base)
    raise CheckpointError(
        f"{where}: base_model_name_or_path={keys.base_model_name_or_path!r} is no directory here: set it to "
        "that of the transformers model that the adapter was trained on."
    )


def _match(
    base: HuggingFaceCheckpoint, keys: AdapterKeys, stored: Mapping[str, TensorLocation], file: str
) -> tuple[_Matched, HuggingFaceModelSpec]:
    prefix = base_prefix(base.spec.architecture)
    short = {name.removeprefix(PREFIX).removeprefix(prefix): location for name, location in stored.items()}
    spec, tensor_map = _with_own_head(base, short)
    whole = {name.removeprefix(prefix): name for name in tensor_map.tensors}
    linear = linear_tensors(tensor_map, prefix)
    layers: dict[str, AdaptedTensor] = {}
    problems = [f"{name} is of no dtype that distft reads." for name, at in short.items() if at.dtype is None]
    found = _Matched(tensor_map=tensor_map, lora=LoraConfig(rank=1), layers=layers, scales={}, stored=short)
    for name, location in short.items():
        module, kind = _split(name)
        if not kind:
            tensor = tensor_map.tensors.get(whole.get(name, ""))
            if tensor is None or tensor.shape != location.shape:
                problems.append(f"{name} {list(location.shape)} is not of it.")
            else:
                found.whole[tensor.name] = name
        elif module not in linear or not _fits(linear[module], module, short):
            problems.append(f"{name} {list(location.shape)} fits no linear layer of it.")
        else:
            layers[module] = linear[module]
    if not problems and not layers:
        problems.append("there is no adapter in it.")
    if problems:
        shown = "\n".join(problems[:_MOST_PROBLEMS])
        raise CheckpointError(f"{file} does not belong to the base {base.path}:\n{shown}")
    found.lora, found.scales = _settings(keys, found, prefix)
    return found, spec


def _split(name: str) -> tuple[str, str]:
    """The module and the kind of an adapter's tensor; the kind of any other is empty."""
    for suffix in (A_SUFFIX, B_SUFFIX, MAGNITUDE_SUFFIX):
        if name.endswith(suffix):
            return name.removesuffix(suffix), suffix
    return name, ""


def _fits(layer: AdaptedTensor, module: str, stored: Mapping[str, TensorLocation]) -> bool:
    """Whether A, B, and if there are any the magnitudes, have the layer's sizes and the same rank."""
    shapes = [
        stored[module + suffix].shape if module + suffix in stored else None
        for suffix in (A_SUFFIX, B_SUFFIX)
    ]
    magnitudes = stored.get(module + MAGNITUDE_SUFFIX)
    if shapes[0] is None or shapes[1] is None or len(shapes[0]) != 2 or not shapes[0][0]:
        return False
    rank = shapes[0][0]
    return shapes == [(rank, layer.num_inputs), (layer.num_outputs, rank)] and (
        magnitudes is None or magnitudes.shape == (layer.num_outputs,)
    )


def _settings(keys: AdapterKeys, found: _Matched, prefix: str) -> tuple[LoraConfig, dict[str, float]]:
    """The adapters' settings as those of a run, and the scale of each layer.

    A layer's name of transformers may have `prefix` or not; a pattern is the whole name, or its end from a
    dot on.
    """
    ranks = {module: found.stored[module + A_SUFFIX].shape[0] for module in found.layers}
    scales = {}
    for module, rank in ranks.items():
        whole_name = f".{prefix}{module}"
        alphas = [alpha for end, alpha in keys.alpha_pattern.items() if whole_name.endswith(f".{end}")]
        scales[module] = keys.scale(alphas[0] if alphas else keys.lora_alpha, rank)
    rank = max(ranks.values())
    first = scales[next(module for module, own in ranks.items() if own == rank)]
    parameters = [name for layer in found.layers.values() for name in layer.rows]
    lora = LoraConfig(
        rank=rank,
        alpha=first * (rank**0.5 if keys.use_rslora else rank),
        rslora=keys.use_rslora,
        dora=keys.use_dora,
        dropout=keys.lora_dropout,
        targets=tuple(name.removesuffix(".weight") for name in parameters),
    )
    return lora, scales


def _with_own_head(
    base: HuggingFaceCheckpoint, short: Mapping[str, TensorLocation]
) -> tuple[HuggingFaceModelSpec, TensorMap]:
    """The base with the classifier that the adapter has whole, if it has one."""
    spec, prefix = base.spec, base_prefix(base.spec.architecture)
    if spec.head == "classifier" or spec.architecture == "t5":
        return spec, base.tensor_map
    has_prefix = any(name.startswith(prefix) for name in base.tensor_map.tensors)
    probe = map_tensors(spec.model, spec.architecture, "classifier", num_labels=1, has_prefix=has_prefix)
    for parameter in (CLASSIFIER, f"{CLASSIFIER_OUTPUT}.weight"):
        location = probe.parameters.get(parameter)
        own = None if location is None else short.get(location.tensor.name.removeprefix(prefix))
        if own is not None and len(own.shape) == 2:
            labels = tuple(f"LABEL_{number}" for number in range(own.shape[0]))
            spec = replace(spec, head="classifier", label_names=labels)
            return spec, map_tensors(
                spec.model, spec.architecture, "classifier", num_labels=len(labels), has_prefix=has_prefix
            )
    return spec, base.tensor_map


def _manifest(
    path: str, base: HuggingFaceCheckpoint, spec: HuggingFaceModelSpec, matched: _Matched
) -> Manifest:
    parameters = {}
    for name, location in matched.tensor_map.parameters.items():
        if location.tensor.name in matched.whole:
            stored = matched.stored[matched.whole[location.tensor.name]]
            states = {WEIGHT: StateRecord(dtype=str(stored.dtype).removeprefix("torch."))}
            parameters[name] = ParameterRecord(shape=location.shape, trainable=True, updates=0, states=states)
        elif name in base.manifest.parameters:
            parameters[name] = base.manifest.parameters[name].model_copy(update={"trainable": False})
    lora, weight = matched.lora, {WEIGHT: StateRecord(dtype="float32")}
    for layer in matched.layers.values():
        for name, (first, last) in layer.rows.items():
            shapes: dict[str, tuple[int, ...]] = {
                A: (lora.rank, layer.num_inputs),
                B: (last - first, lora.rank),
                **({MAGNITUDE: (last - first,)} if lora.dora else {}),
            }
            for kind, shape in shapes.items():
                parameters[f"{name.removesuffix('.weight')}.{kind}"] = ParameterRecord(
                    shape=shape, trainable=True, updates=0, states=weight
                )
    fields = model_fields(spec, base.path)
    fields["config"] = {**fields["config"], "lora": lora.model_dump(mode="json")}
    fields["tokenizer"] = find_tokenizer(path)
    return Manifest(
        **fields,
        run_id=path.rstrip("/").rpartition("/")[2],
        progress=Progress(),
        written_by=base.manifest.written_by,
        parameters=parameters,
        files=[],
    )
