"""Writes a checkpoint as a model directory of transformers, in the memory of its largest tensor."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from distft import storage
from distft.checkpoint.formats.huggingface_files import CONFIG_FILE, INDEX_FILE, WEIGHTS_FILE
from distft.checkpoint.formats.huggingface_shape import (
    HeadKind,
    HuggingFaceShape,
    choose_architecture,
    write_shape,
)
from distft.checkpoint.formats.huggingface_tensors import TensorMap, TheirTensor, map_tensors
from distft.checkpoint.formats.huggingface_tokenizer import tokenizer_files
from distft.checkpoint.formats.safetensors_file import header_bytes
from distft.checkpoint.fragments import WEIGHT
from distft.checkpoint.sources import CheckpointSource
from distft.checkpoint.target import UNFINISHED
from distft.config import parse
from distft.errors import CheckpointError, ConfigError
from distft.model.config import ModelConfig
from distft.tokenizer import Tokenizer

_CLASSIFIER, _LM_HEAD = "classifier.weight", "lm_head.weight"
_CHUNK_NUMEL = 1 << 22  # elements read and written at a time
_BEFORE_CONFIG = re.compile(  # names of what is written before config.json
    r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
    r"|tokenizer(\.model|\.json|_config\.json)|generation_config\.json"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Export:
    """What is to be written, and how."""

    source: CheckpointSource
    target: str
    tensors: TensorMap
    dtype: torch.dtype | None
    on_progress: Callable[[int], None]

    def dtype_of(self, tensor: TheirTensor) -> torch.dtype:
        """What a tensor is written in: the wanted dtype, or the widest that its parameters are kept in."""
        if self.dtype is not None:
            return self.dtype
        return _widest([_stored_dtype(self.source, name) for name in tensor.parameters])


def write_huggingface(
    source: CheckpointSource,
    target: str,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 << 30,
    architecture: str | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Write the model of `source` to the directory `target`; returns notes on what it could not carry over.

    `dtype` None keeps each tensor's own; `architecture` None is the first that fits. `on_progress` is told
    the bytes of weights written since the last call. `config.json` comes last: without it, a directory is
    no model, and what an interrupted export left there is replaced.

    Raises `ConfigError` for a model that transformers does not have, or a target that is in use, and
    `CheckpointError` for a source that lacks parameters; nothing is written then.
    """
    model = _model_config(source)
    kind = choose_architecture(model, architecture)
    head, notes = _choose_head(source, model)
    labels = source.manifest.label_names if head == "classifier" else None
    shape = HuggingFaceShape(
        architecture=kind, model=model, head=head, label_names=None if labels is None else tuple(labels)
    )
    tensors = map_tensors(model, kind, head, num_labels=len(labels or ()), has_prefix=head != "none")
    _check_parameters(source, tensors)
    _clear(target)
    export = _Export(
        source=source,
        target=target,
        tensors=tensors,
        dtype=dtype,
        on_progress=on_progress or (lambda _: None),
    )
    _write_weights(export, max_shard_bytes)
    special_ids = _write_tokenizer(export, model, notes)
    if head == "language_model":
        ids = {f"{name}_token_id": i for name, i in special_ids.items() if i is not None}
        _commit_json(target, "generation_config.json", ids)
    if head == "classifier" and special_ids.get("pad") is None:
        notes.append(
            "The tokenizer has no pad id, by which a classifier of transformers finds a row's last token: "
            "give it rows one at a time."
        )
    if model.dropout and kind != "gpt2":
        notes.append(
            f"dropout={model.dropout} is left out: {kind} has none but on attention weights. It matters in "
            "training only."
        )
    widest = _widest([export.dtype_of(tensor) for tensor in tensors.theirs.values()])
    raw = write_shape(shape, dtype=str(widest).removeprefix("torch."), special_ids=special_ids)
    _commit_json(target, CONFIG_FILE, raw)
    return notes


def _model_config(source: CheckpointSource) -> ModelConfig:
    raw = source.manifest.config.get("model")
    if raw is None:
        raise ConfigError(
            f"{source.path} does not say what its model is like, so transformers cannot be told: name the "
            "configuration of its run by --run-config."
        )
    config: ModelConfig = parse(ModelConfig, raw, where="model")
    return config


def _choose_head(source: CheckpointSource, model: ModelConfig) -> tuple[HeadKind, list[str]]:
    """What can be exported of the source's head, with a note where that is not all of it."""
    parameters = source.manifest.parameters
    record = parameters.get(_CLASSIFIER)
    if record is None:
        if model.tie_embeddings or _LM_HEAD in parameters:
            return "language_model", []
        return "none", [f"{source.path} has no head, so none is written."]
    objective = source.manifest.config.get("objective")
    pooling = objective.get("pooling", "last") if isinstance(objective, dict) else "last"
    names = source.manifest.label_names
    if pooling != "last":
        return "none", [
            f"The classifier is left out: it pools {pooling!r}, and those of transformers the last token."
        ]
    if names is None or len(names) != record.shape[0]:
        known = "no names are" if names is None else f"{len(names)} names are"
        return "none", [f"The classifier is left out: it has {record.shape[0]} classes, and {known} known."]
    return "classifier", []


def _check_parameters(source: CheckpointSource, tensors: TensorMap) -> None:
    """Refuse a source that does not hold the model that it describes."""
    faults = []
    for name, slot in tensors.ours.items():
        if not source.has(name, WEIGHT):
            faults.append(f"{name} {list(slot.shape)} has no weight in it.")
        elif source.shape(name) != slot.shape:
            faults.append(
                f"{name} is {list(source.shape(name) or ())} in it, and {list(slot.shape)} by its config."
            )
    if faults:
        raise CheckpointError(f"{source.path} cannot be exported:\n" + "\n".join(faults))


def _clear(target: str) -> None:
    """Make the directory ready; refuse one that holds anything but the rest of an interrupted export."""
    names = [name for name in storage.list_names(target) if name != UNFINISHED]
    foreign = [name for name in names if not _BEFORE_CONFIG.fullmatch(name)]
    if foreign:
        shown = ", ".join(foreign[:5]) + (" ..." if len(foreign) > 5 else "")
        raise ConfigError(f"{target} is not empty ({shown}): choose another directory, or empty it.")
    for name in names:
        storage.remove(storage.join(target, name))
    storage.remove_drafts(target)
    storage.make_directory(target)


def _write_weights(export: _Export, max_shard_bytes: int) -> None:
    shards = _plan_shards(export, max_shard_bytes)
    names = [WEIGHTS_FILE]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        with storage.open_write(storage.join(export.target, name), durable=False) as file:
            file.write(header_bytes((t.name, export.dtype_of(t), t.shape) for t in shard))
            for tensor in shard:
                for piece in _their_values(export, tensor):
                    file.write(_bytes_of(piece))
                    export.on_progress(piece.numel() * piece.element_size())
    if len(shards) > 1:
        all_tensors = export.tensors.theirs.values()
        _commit_json(
            export.target,
            INDEX_FILE,
            {
                "metadata": {"total_size": sum(t.numel * export.dtype_of(t).itemsize for t in all_tensors)},
                "weight_map": {
                    tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard
                },
            },
        )


def _plan_shards(export: _Export, max_shard_bytes: int) -> list[list[TheirTensor]]:
    """Tensors in the model's order, file by file; a tensor larger than a file may be has one of its own."""
    shards: list[list[TheirTensor]] = [[]]
    num_bytes = 0
    for tensor in export.tensors.theirs.values():
        size = tensor.numel * export.dtype_of(tensor).itemsize
        if shards[-1] and num_bytes + size > max_shard_bytes:
            shards.append([])
            num_bytes = 0
        shards[-1].append(tensor)
        num_bytes += size
    # Larger elements first, so that all are aligned.
    return [sorted(shard, key=lambda tensor: -export.dtype_of(tensor).itemsize) for shard in shards]


def _their_values(export: _Export, tensor: TheirTensor) -> Iterator[Tensor]:
    """A tensor's elements in order, flattened; held as a whole where it is transposed."""
    dtype = export.dtype_of(tensor)
    if not tensor.is_transposed:
        for name in tensor.parameters:
            for _, values in _our_values(export, name, 1):
                yield _converted(values, dtype, name)
        return
    out = torch.empty(tensor.shape, dtype=dtype)
    row_numel = tensor.shape[0]
    for name in tensor.parameters:
        first = export.tensors.ours[name].row
        for start, values in _our_values(export, name, row_numel):
            rows = _converted(values, dtype, name).view(-1, row_numel)
            row = first + start // row_numel
            out[:, row : row + rows.shape[0]] = rows.T
    yield from torch.split(out.view(-1), _CHUNK_NUMEL)


def _our_values(export: _Export, name: str, row_numel: int) -> Iterator[tuple[int, Tensor]]:
    """Start and values of pieces of a parameter of ours, each of whole rows."""
    slot = export.tensors.ours[name]
    numel = slot.numel
    step = max(_CHUNK_NUMEL // row_numel, 1) * row_numel
    for start in range(0, numel, step):
        yield start, export.source.read(name, WEIGHT, start, min(start + step, numel))


def _converted(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`values` in `dtype`. Raises `ConfigError` where finite ones would become infinite."""
    converted = values.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(values.dtype).max and bool(
        (torch.isfinite(values) & ~torch.isfinite(converted)).any()
    ):
        raise ConfigError(
            f"{name} has values beyond {torch.finfo(dtype).max:g}, the largest of {dtype}: "
            "export as bfloat16 or float32."
        )
    return converted


def _stored_dtype(source: CheckpointSource, name: str) -> torch.dtype:
    dtype = getattr(torch, source.manifest.parameters[name].states[WEIGHT].dtype, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise CheckpointError(f"{source.path}: {name} is of a dtype that is not read.")
    return dtype


def _widest(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    return reduce(torch.promote_types, dtypes)


def _bytes_of(values: Tensor) -> memoryview:
    flat: Any = values.contiguous().view(torch.uint8).numpy()
    return memoryview(flat)


def _write_tokenizer(export: _Export, model: ModelConfig, notes: list[str]) -> dict[str, int | None]:
    """Write the source's tokenizer, if it has one; returns its bos, eos and pad."""
    record = export.source.manifest.tokenizer
    if record is None or record.file is None:
        notes.append(f"There is no tokenizer in {export.source.path}, so none is written.")
        return {}
    tokenizer = Tokenizer.load(storage.join(export.source.path, record.file))
    files, remarks = tokenizer_files(tokenizer, max_seq_len=model.max_seq_len)
    for name, data in files.items():
        storage.commit_bytes(storage.join(export.target, name), data)
    notes += remarks
    return {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}


def _commit_json(target: str, name: str, value: dict[str, Any]) -> None:
    text = json.dumps(value, ensure_ascii=False, indent=2) + "\n"
    storage.commit_bytes(storage.join(target, name), text.encode())
