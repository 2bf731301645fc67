"""Writes a checkpoint as a model directory of transformers; at most one tensor is in memory."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from distft import storage
from distft.checkpoint.formats.huggingface_classifier import (
    CLASSIFIER,
    CLASSIFIER_OUTPUT,
    HEAD_FILE,
    README_FILE,
    head_files,
)
from distft.checkpoint.formats.huggingface_config import (
    Architecture,
    HeadKind,
    HuggingFaceModelSpec,
    KnownConfig,
    choose_architecture,
    classifier_poolings,
    make_config,
)
from distft.checkpoint.formats.huggingface_encoders import CLASSIFIER_LAYERS, ENCODERS
from distft.checkpoint.formats.huggingface_files import INDEX_FILE, WEIGHTS_FILE
from distft.checkpoint.formats.huggingface_modernbert import classifier_misfit
from distft.checkpoint.formats.huggingface_tensors import (
    LM_HEAD,
    LM_TRANSFORM,
    HuggingFaceTensor,
    TensorMap,
    map_tensors,
)
from distft.checkpoint.formats.names import CONFIG_FILE
from distft.checkpoint.fragments import WEIGHT
from distft.checkpoint.mup import folded
from distft.checkpoint.rank_file import bytes_of
from distft.checkpoint.safetensors_header import safetensors_header
from distft.checkpoint.sources import CheckpointSource
from distft.checkpoint.target import UNFINISHED_MARKER
from distft.config import parse
from distft.errors import CheckpointError, ConfigError
from distft.model.config import ModelConfig, Pooling
from distft.model.encoder_decoder_config import EncoderDecoderConfig
from distft.model.settings import AnyModelConfig
from distft.model.transformer_config import TransformerConfig
from distft.tokenizer import Tokenizer

_NO_PADDING = (
    "There is no pad id, which a classifier of transformers needs to find the last token of a padded row: "
    "classify one row at a time."
)
_CHUNK_NUMEL = 1 << 22  # elements read and written at a time
_EXPORT_FILES = re.compile(  # names of the files that an export writes before config.json
    r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
    r"|tokenizer(\.model|\.json|_config\.json)|special_tokens_map\.json|added_tokens\.json|generation_config\.json|classifier\.safetensors|classifier\.md"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Export:
    """Settings of one export."""

    source: CheckpointSource
    target: str
    tensor_map: TensorMap
    dtype: torch.dtype | None
    on_progress: Callable[[int], None]

    def dtype_of(self, tensor: HuggingFaceTensor) -> torch.dtype:
        """The dtype to write a tensor in: the wanted one, or the widest dtype of its parameters."""
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
    on_note: Callable[[str], None] | None = None,
) -> list[str]:
    """Write the model of `source` to the directory `target`; returns notes on what it had to leave out.

    `on_note` gets them before the work. `dtype` None keeps the dtype of each tensor; `architecture` None
    chooses the first that fits.
    `on_progress` gets the number of bytes of weights written since the last call. `config.json` is written
    last: a directory without it is not a model, and the next export replaces its files.

    Raises `ConfigError` for a model that transformers cannot represent or a target that is not empty, and
    `CheckpointError` for a source that lacks parameters; then nothing is written.
    """
    source = folded(source)
    model = known_model(source)
    chosen = choose_architecture(model, architecture)
    head, own, notes = choose_head(source, model, chosen)
    classifier, beside = (own, None) if head == "classifier" else (None, own)
    labels = () if classifier is None else tuple(source.manifest.label_names or ())
    spec = HuggingFaceModelSpec(
        architecture=chosen,
        model=model,
        head=head,
        label_names=labels or None,
        pooling=None if classifier is None else classifier[0],
    )
    tensor_map = map_tensors(model, chosen, head, num_labels=len(labels), has_prefix=head != "none")
    _check_parameters(source, tensor_map)
    files, special_ids, tokenizer_notes = tokenizer_files(
        source, model, is_classifier=(head == "classifier" and chosen not in ENCODERS) or beside is not None
    )
    notes += [*tokenizer_notes, *_dropout_notes(model, chosen)]
    if on_note is not None:
        for note in notes:
            on_note(note)
    _prepare_directory(target)
    on_progress = on_progress or (lambda _: None)
    export = _Export(
        source=source, target=target, tensor_map=tensor_map, dtype=dtype, on_progress=on_progress
    )
    _write_weights(export, max_shard_bytes)
    if beside is not None:
        files |= head_files(source, *beside, list(source.manifest.label_names or ()))
    for name, data in files.items():
        storage.commit_bytes(storage.join(target, name), data)
    if isinstance(model, EncoderDecoderConfig) and special_ids.get("pad") is None:
        special_ids["pad"] = model.start_id  # without a pad transformers shifts no labels
    if head == "language_model":
        commit_json(target, "generation_config.json", _generation_ids(model, special_ids))
    widest = _widest([export.dtype_of(tensor) for tensor in tensor_map.tensors.values()])
    raw = make_config(spec, dtype=str(widest).removeprefix("torch."), special_ids=special_ids)
    commit_json(target, CONFIG_FILE, raw)
    return notes


def _generation_ids(model: KnownConfig, special_ids: Mapping[str, int | None]) -> dict[str, Any]:
    ids: dict[str, Any] = {f"{name}_token_id": i for name, i in special_ids.items() if i is not None}
    if isinstance(model, EncoderDecoderConfig):
        ids["decoder_start_token_id"] = model.start_id
    return ids


def known_model(source: CheckpointSource) -> KnownConfig:
    """The configuration of a model that transformers may have. Raises `ConfigError` for another."""
    raw = source.manifest.config.get("model")
    if raw is None:
        raise ConfigError(
            f"{source.path} does not contain the model's configuration, which transformers needs: "
            "give the run's configuration with --run-config."
        )
    config: ModelConfig = parse(AnyModelConfig, raw, where="model")
    if not isinstance(config, TransformerConfig | EncoderDecoderConfig):
        raise ConfigError(
            f"{source.path} has model.type={raw.get('type')}, which has no export to transformers: only "
            "model.type=transformer and encoder_decoder can be exported. Convert it to distft or universal."
        )
    return config


def choose_head(
    source: CheckpointSource, model: KnownConfig, architecture: Architecture
) -> tuple[HeadKind, tuple[Pooling, str] | None, list[str]]:
    """The head to export, and notes on what is left out.

    Between them `pooling` and `hidden` of a classifier; with the head `none` it lies beside the model.
    """
    parameters = source.manifest.parameters
    record = parameters.get(CLASSIFIER) or parameters.get(f"{CLASSIFIER_OUTPUT}.weight")
    if record is None:
        if _has_logits(source, model):
            return "language_model", None, []
        return "none", None, [f"{source.path} has no head, so the export has none."]
    if isinstance(model, EncoderDecoderConfig):
        return "none", None, ["The classifier is left out: T5's of transformers read another hidden state."]
    names = source.manifest.label_names
    if names is None or len(names) != record.shape[0]:
        count = "no" if names is None else len(names)
        note = f"it has {record.shape[0]} classes, but the checkpoint has {count} names for them."
        return "none", None, [f"The classifier is left out: {note}"]
    objective = source.manifest.config.get("objective")
    own = objective if isinstance(objective, dict) else {}
    pooling, hidden = own.get("pooling", "last"), own.get("hidden", "none")
    poolings, layer = classifier_poolings(architecture), CLASSIFIER_LAYERS.get(architecture, "none")
    reason = classifier_misfit(model) if architecture == "modernbert" else None
    if pooling not in poolings:
        reason = f"it pools {pooling!r}, but those pool the {' or '.join(poolings)} token"
    elif hidden != layer:
        reason = f"it has hidden={hidden}, but those of {architecture} have hidden={layer}"
    if reason is None:
        return "classifier", (pooling, hidden), []
    note = (
        f"The classifier is not one of transformers: {reason}. "
        f"Its weights are written to {HEAD_FILE}, and {README_FILE} shows the lines that apply them."
    )
    return "none", (pooling, hidden), [note]


def _has_logits(source: CheckpointSource, model: KnownConfig) -> bool:
    parameters = source.manifest.parameters
    if isinstance(model, TransformerConfig) and model.lm_head_transform:
        return f"{LM_TRANSFORM}.weight" in parameters
    return model.tie_embeddings or LM_HEAD in parameters


def _dropout_notes(model: KnownConfig, architecture: str) -> list[str]:
    is_modernbert = architecture == "modernbert"
    if (
        architecture == "t5"
        or not model.dropout
        or architecture == "gpt2"
        or (architecture in ENCODERS and not is_modernbert)
    ):
        return []
    places = "in other places" if is_modernbert else "on attention weights only"
    return [
        f"dropout={model.dropout} is left out, as {architecture} has dropout {places}. This "
        "affects training only."
    ]


def _check_parameters(source: CheckpointSource, tensor_map: TensorMap) -> None:
    """Raise unless the source contains the weights of the model that it describes."""
    problems = []
    for name, location in tensor_map.parameters.items():
        if not source.has(name, WEIGHT):
            problems.append(f"it lacks the weight of {name} {list(location.shape)}.")
        elif source.shape(name) != location.shape:
            problems.append(
                f"its {name} has shape {list(source.shape(name) or ())}, but its configuration requires "
                f"{list(location.shape)}."
            )
    if problems:
        raise CheckpointError(f"{source.path} cannot be exported:\n" + "\n".join(problems))


def _prepare_directory(target: str) -> None:
    """Create the directory, or empty it if it contains only files of an interrupted export."""
    names = [name for name in storage.list_names(target) if name != UNFINISHED_MARKER]
    foreign = [name for name in names if not _EXPORT_FILES.fullmatch(name)]
    if foreign:
        shown = ", ".join(foreign[:5]) + (" ..." if len(foreign) > 5 else "")
        raise ConfigError(f"{target} is not empty ({shown}): choose another directory, or empty it.")
    for name in names:
        storage.remove(storage.join(target, name))
    storage.remove_temporary_files(target)
    storage.make_directory(target)


def _write_weights(export: _Export, max_shard_bytes: int) -> None:
    shards = _plan_shards(export, max_shard_bytes)
    names = [WEIGHTS_FILE]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        with storage.open_write(storage.join(export.target, name), durable=False) as file:
            file.write(safetensors_header((t.name, export.dtype_of(t), t.shape) for t in shard))
            for tensor in shard:
                for chunk in _tensor_chunks(export, tensor):
                    file.write(bytes_of(chunk))
                    export.on_progress(chunk.numel() * chunk.element_size())
    if len(shards) > 1:
        all_tensors = export.tensor_map.tensors.values()
        commit_json(
            export.target,
            INDEX_FILE,
            {
                "metadata": {"total_size": sum(t.numel * export.dtype_of(t).itemsize for t in all_tensors)},
                "weight_map": {
                    tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard
                },
            },
        )


def _plan_shards(export: _Export, max_shard_bytes: int) -> list[list[HuggingFaceTensor]]:
    """The tensors of each file, in the model's order; a tensor larger than the limit gets its own file."""
    shards: list[list[HuggingFaceTensor]] = [[]]
    num_bytes = 0
    for tensor in export.tensor_map.tensors.values():
        size = tensor.numel * export.dtype_of(tensor).itemsize
        if shards[-1] and num_bytes + size > max_shard_bytes:
            shards.append([])
            num_bytes = 0
        shards[-1].append(tensor)
        num_bytes += size
    # Larger elements first, so that all elements are aligned.
    return [sorted(shard, key=lambda tensor: -export.dtype_of(tensor).itemsize) for shard in shards]


def _tensor_chunks(export: _Export, tensor: HuggingFaceTensor) -> Iterator[Tensor]:
    """The elements of a tensor in order, in 1-D chunks; a transposed tensor is in memory as a whole."""
    dtype = export.dtype_of(tensor)
    if not tensor.is_transposed:
        for name in tensor.parameters:
            numel = export.tensor_map.parameters[name].numel
            first = 0 if tensor.expert is None else tensor.expert * tensor.numel
            stop = numel if tensor.expert is None else first + tensor.numel
            for start in range(first, stop, _CHUNK_NUMEL):
                values = export.source.read(name, WEIGHT, start, min(start + _CHUNK_NUMEL, stop))
                yield _cast(values, dtype, name)
        return
    out = torch.empty(tensor.shape, dtype=dtype)
    row_numel = tensor.shape[0]
    for name in tensor.parameters:
        first = export.tensor_map.parameters[name].first_row
        for start, values in _parameter_chunks(export, name, row_numel):
            rows = _cast(values, dtype, name).view(-1, row_numel)
            row = first + start // row_numel
            out[:, row : row + rows.shape[0]] = rows.T
    yield from torch.split(out.view(-1), _CHUNK_NUMEL)


def _parameter_chunks(export: _Export, name: str, row_numel: int) -> Iterator[tuple[int, Tensor]]:
    """Start and values of chunks of a parameter, each a multiple of `row_numel` elements."""
    location = export.tensor_map.parameters[name]
    numel = location.numel
    step = max(_CHUNK_NUMEL // row_numel, 1) * row_numel
    for start in range(0, numel, step):
        yield start, export.source.read(name, WEIGHT, start, min(start + step, numel))


def _cast(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`values` in `dtype`. Raises `ConfigError` if a finite value would become infinite."""
    cast = values.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(values.dtype).max and bool(
        (torch.isfinite(values) & ~torch.isfinite(cast)).any()
    ):
        raise ConfigError(
            f"{name} has values beyond {torch.finfo(dtype).max:g}, the largest of {dtype}: "
            "export as bf16 or fp32 (--dtype)."
        )
    return cast


def _stored_dtype(source: CheckpointSource, name: str) -> torch.dtype:
    dtype = getattr(torch, source.manifest.parameters[name].states[WEIGHT].dtype, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise CheckpointError(f"{source.path}: {name} has no floating-point dtype, so it cannot be exported.")
    return dtype


def _widest(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    return reduce(torch.promote_types, dtypes)


def tokenizer_files(
    source: CheckpointSource, model: KnownConfig, *, is_classifier: bool
) -> tuple[dict[str, bytes], dict[str, int | None], list[str]]:
    """The files of the source's tokenizer, if it has one, its bos, eos and pad ids, and notes."""
    record = source.manifest.tokenizer
    if record is None or record.file is None:
        notes = [f"{source.path} has no tokenizer, so the export has none."]
        return {}, {}, [*notes, *([_NO_PADDING] if is_classifier else [])]
    tokenizer = Tokenizer.load(storage.join(source.path, record.file))
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    notes = []
    needs_pad = is_classifier or isinstance(model, EncoderDecoderConfig)  # whose labels are padded
    if needs_pad and tokenizer.pad_id is None:
        ids["pad"] = tokenizer.padding_id()
        piece = "" if ids["pad"] is None else tokenizer.piece_texts[ids["pad"]]
        notes = [
            f"The tokenizer has no pad: the export pads with {piece!r}, which no text has."
            if piece
            else _NO_PADDING
        ]
    files, tokenizer_notes = tokenizer.huggingface_files(
        max_seq_len=model.max_seq_len,
        pad_id=ids["pad"],
        begins_with_bos=tokenizer.bos_id is not None and record.document_start == (tokenizer.bos_id,),
        ends_with_eos=tokenizer.eos_id is not None and _ends_sources(source, model),
    )
    return dict(files), ids, [*notes, *tokenizer_notes]


def _ends_sources(source: CheckpointSource, model: KnownConfig) -> bool:
    """Whether an encoder's sources ended with eos in training: all do but parts of texts."""
    objective = source.manifest.config.get("objective")
    own = objective if isinstance(objective, dict) else {}
    is_part = own.get("type") == "prefix_lm" and own.get("prefix", "random") == "random"
    return isinstance(model, EncoderDecoderConfig) and not is_part


def commit_json(target: str, name: str, value: dict[str, Any]) -> None:
    """Write a file of JSON as transformers does."""
    text = json.dumps(value, ensure_ascii=False, indent=2) + "\n"
    storage.commit_bytes(storage.join(target, name), text.encode())
