"""Reads a model directory of transformers under distft's parameter names; loads only what is requested."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distft import storage
from distft.checkpoint.formats.huggingface_config import HuggingFaceModelSpec, parse_config
from distft.checkpoint.formats.huggingface_encoders import ENCODERS
from distft.checkpoint.formats.huggingface_files import read_json, scan_tensors
from distft.checkpoint.formats.huggingface_t5 import UNREAD, with_saved_head
from distft.checkpoint.formats.huggingface_tensors import (
    LM_HEAD,
    TensorMap,
    map_saved_tensors,
    read_parameter,
    tied_copies,
)
from distft.checkpoint.formats.huggingface_tokenizer import find_tokenizer
from distft.checkpoint.formats.names import CONFIG_FILE
from distft.checkpoint.fragments import WEIGHT
from distft.checkpoint.manifest import Manifest, ParameterRecord, Progress, StateRecord
from distft.checkpoint.rank_file import read_elements
from distft.checkpoint.safetensors_header import TensorLocation
from distft.checkpoint.sources import ManifestSource
from distft.errors import CheckpointError, ConfigError
from distft.model.encoder_decoder_config import EncoderDecoderConfig

_MOST_NOTES = 5
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_LAYER = re.compile(r"(.*\.)?(h|layers?|block)\.\d+\.")  # of a tensor's name: the part that names its layer
_MOST_MISSING_LAYERS = 64  # more are not listed one by one, as their modules would take seconds to build
_CHUNK_BYTES = 16 << 20  # read at a time from a tensor that has to be read whole
# Buffers that older versions of transformers saved; newer ones compute them.
_BUFFERS = re.compile(
    r"\.rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$|(^|\.)embeddings\.(position|token_type)_ids$"
)
# BERT's other heads: of sentence pairs in its pretraining, and a layer that only its own classifier reads.
_LEFT_OUT = re.compile(r"^((bert|roberta)\.)?pooler\.|^cls\.seq_relationship\.")


@dataclass(frozen=True, kw_only=True, slots=True)
class _MatchedTensors:
    """The tensors in a directory, compared with those that its config.json requires."""

    tensor_map: TensorMap
    locations: dict[str, TensorLocation]  # of tensors with the required shape, by transformers' name
    problems: list[str]
    left_out: list[str]  # names of the other heads' tensors, and of one that nobody reads


class HuggingFaceCheckpoint(ManifestSource):
    """A `CheckpointSource` over `config.json` and safetensors: one file, or several with an index.

    Weights only. A parameter whose tensor is missing or has another shape has no state; `find_damage`
    explains why.
    """

    format = "huggingface"

    def __init__(
        self, path: str, spec: HuggingFaceModelSpec, manifest: Manifest, matched: _MatchedTensors
    ) -> None:
        super().__init__(path, manifest)
        self.notes = [*matched.problems[:_MOST_NOTES]]  # for the user
        if matched.left_out:
            is_unread = matched.left_out == [UNREAD]
            reason = "transformers does not read it either" if is_unread else "the layers of another head"
            self.notes.append(f"{path}: {', '.join(matched.left_out)} left out: {reason}.")
        self.spec = spec
        self.tensor_map = matched.tensor_map
        self._locations = matched.locations

    @classmethod
    def open(cls, path: str) -> "HuggingFaceCheckpoint":
        """Open the model at `path`; reads headers, but no weights.

        Raises `CheckpointError` if there is no model or a file is missing, `ConfigError` with its unsupported
        features.
        """
        raw = read_json(storage.join(path, CONFIG_FILE))
        try:
            spec = parse_config(raw)
        except ConfigError as error:
            raise ConfigError(
                f"{storage.join(path, CONFIG_FILE)} describes a model that distft does not support:\n{error}"
            ) from None
        _require_layers(path, spec)
        if isinstance(spec.model, EncoderDecoderConfig):
            spec = replace(spec, model=with_saved_head(spec.model, scan_tensors(path).locations))
        matched = _match_tensors(path, spec)
        return cls(path, spec, _manifest(path, spec, matched, raw), matched)

    def read(self, parameter: str, state: str, start: int, stop: int) -> Tensor:
        """As `StateSource.read`. A transposed tensor is read whole, 16 MiB at a time."""
        if not self.has(parameter, state):
            raise CheckpointError(f"{self.path} has no {state} of {parameter!r}.")
        location = self.tensor_map.parameters[parameter]
        return read_parameter(location, self._read_tensor, start, stop)

    def _read_tensor(self, name: str, start: int, stop: int) -> Tensor:
        stored = self._locations[name]
        dtype = stored.dtype
        assert dtype is not None
        return read_elements(stored.path, stored.offset + start * dtype.itemsize, dtype, stop - start)

    def find_damage(self) -> list[str]:
        """Tensors that are missing, cut short, unexpected, or of another shape; files that are damaged.

        The format has no checksums, so wrong values are found only in a tied head that is stored as a copy.
        """
        return _match_tensors(self.path, self.spec, compare_tied=True).problems


def _require_layers(path: str, spec: HuggingFaceModelSpec) -> None:
    """Raise `CheckpointError` if config.json has far more layers than the tensors: a list would take long.

    A file that cannot be read has none.
    """
    scan = scan_tensors(path)
    if scan.is_weights_file_unreadable and spec.model.num_blocks > _MOST_MISSING_LAYERS:
        raise CheckpointError("\n".join(scan.damage))
    if scan.is_weights_file_unreadable:
        return
    found = {m[0] for name in (*scan.locations, *scan.unreadable) if (m := _LAYER.search(name))}
    if spec.model.num_blocks > len(found) + _MOST_MISSING_LAYERS:
        raise CheckpointError(
            f"{path}: {CONFIG_FILE} describes {spec.model.num_blocks:,} layers, but there are tensors of "
            f"{len(found)}: the download is incomplete, or the file is of another model."
        )


def _match_tensors(path: str, spec: HuggingFaceModelSpec, *, compare_tied: bool = False) -> _MatchedTensors:
    scan = scan_tensors(path)
    scan.locations = {_present_name(name): location for name, location in scan.locations.items()}
    scan.unreadable = {_present_name(name) for name in scan.unreadable}
    tensor_map = map_saved_tensors(spec, (*scan.locations, *scan.unreadable))
    problems = [*scan.damage]
    for copy_name, original_name in tied_copies(spec, tensor_map).items():
        copy = scan.locations.pop(copy_name, None)
        if copy is None:
            continue
        original = scan.locations.setdefault(original_name, copy)
        if compare_tied and not _has_same_bytes(original, copy):
            problems.append(
                f"{copy.path}: {copy_name} differs from {original_name}, though "
                "tie_word_embeddings is true: the model is damaged, or tie_word_embeddings must be false."
            )
    locations = {}
    for name, tensor in tensor_map.tensors.items():
        location = scan.locations.pop(name, None)
        if location is None:
            if not scan.is_reported(name):
                problems.append(f"{path} has no tensor {name} {list(tensor.shape)}.")
        elif location.shape != tensor.shape:
            problems.append(
                f"{location.path}: {name} has shape {list(location.shape)}, but {CONFIG_FILE} requires "
                f"{list(tensor.shape)}."
            )
        elif location.dtype not in _DTYPES:
            problems.append(
                f"{location.path}: {name} has dtype {location.dtype_code}, which distft does not read."
            )
        else:
            locations[name] = location
    left_out = [name for name in scan.locations if _is_left_out(name, spec.architecture)]
    for name in left_out:
        del scan.locations[name]
    problems += [
        f"{location.path}: {name} {list(location.shape)} is not part of the model in {CONFIG_FILE}."
        for name, location in scan.locations.items()
        if not _BUFFERS.search(name)
    ]
    return _MatchedTensors(
        tensor_map=tensor_map, locations=locations, problems=problems, left_out=sorted(left_out)
    )


def _is_left_out(name: str, architecture: str) -> bool:
    """Whether a model has no use for a tensor that files of its architecture have."""
    if architecture == "t5":
        return name == UNREAD
    return architecture in ENCODERS and _LEFT_OUT.search(name) is not None


def _present_name(name: str) -> str:
    """A tensor's name as transformers writes it now: the first BERTs have the names of TensorFlow."""
    for before, now in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
        if name.endswith(before):
            return name.removesuffix(before) + now
    return name


def _has_same_bytes(one: TensorLocation, other: TensorLocation) -> bool:
    if one == other:
        return True
    if (one.dtype_code, one.shape) != (other.dtype_code, other.shape):
        return False
    num_bytes = one.stop - one.offset
    for start in range(0, num_bytes, _CHUNK_BYTES):
        stop = min(start + _CHUNK_BYTES, num_bytes)
        chunks = [storage.read_range(t.path, t.offset + start, t.offset + stop) for t in (one, other)]
        if chunks[0] != chunks[1]:
            return False
    return True


def _manifest(
    path: str, spec: HuggingFaceModelSpec, matched: _MatchedTensors, raw: Mapping[str, Any]
) -> Manifest:
    parameters = {}
    for name, location in matched.tensor_map.parameters.items():
        stored = [matched.locations.get(tensor.name) for tensor in location.tensors]
        states = {}
        if stored[0] is not None and None not in stored:
            states[WEIGHT] = StateRecord(dtype=str(stored[0].dtype).removeprefix("torch."))
        parameters[name] = ParameterRecord(shape=location.shape, trainable=True, updates=0, states=states)
    return Manifest(
        **model_fields(spec, path),
        run_id=path.rstrip("/").rpartition("/")[2],
        progress=Progress(),
        written_by={"architecture": spec.architecture, "transformers": raw.get("transformers_version")},
        parameters=parameters,
        files=[],
    )


def model_fields(spec: HuggingFaceModelSpec, path: str) -> dict[str, Any]:
    """Fields of the manifest that describe the model in the directory `path` and its tokenizer."""
    is_tied = spec.model.tie_embeddings and spec.head == "language_model"
    config: dict[str, Any] = {"model": spec.model.model_dump(mode="json")}
    if spec.objective is not None:
        config["objective"] = spec.objective
    return {
        "config": config,
        "label_names": None if spec.label_names is None else list(spec.label_names),
        "tokenizer": find_tokenizer(path),
        "tied": {LM_HEAD: "embed.weight"} if is_tied else {},
    }
