"""Writes a checkpoint's adapters as a directory that PEFT loads, beside the model that they belong to.

Shape letters: I inputs, O outputs, R rank.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from distft import storage
from distft.checkpoint.adapters import adapters_of
from distft.checkpoint.formats.detect import detect_format, open_source
from distft.checkpoint.formats.huggingface_classifier import head_files
from distft.checkpoint.formats.huggingface_config import HeadKind, choose_architecture
from distft.checkpoint.formats.huggingface_encoders import ENCODERS
from distft.checkpoint.formats.huggingface_target import (
    choose_head,
    commit_json,
    known_model,
    tokenizer_files,
)
from distft.checkpoint.formats.huggingface_tensors import TensorMap, map_tensors
from distft.checkpoint.formats.names import ADAPTER_CONFIG, ADAPTER_FILE
from distft.checkpoint.formats.peft_names import (
    PREFIX,
    SUFFIXES,
    AdaptedTensor,
    has_transposed_layers,
    linear_tensors,
)
from distft.checkpoint.formats.peft_source import PeftCheckpoint
from distft.checkpoint.fragments import WEIGHT
from distft.checkpoint.rank_file import bytes_of
from distft.checkpoint.safetensors_header import safetensors_header
from distft.checkpoint.sources import CheckpointSource
from distft.checkpoint.steps import absolute
from distft.errors import ConfigError, UnsupportedFormatError
from distft.model.config import ModelConfig
from distft.model.lora_config import MAGNITUDE, A, B, LoraConfig

_TASKS: dict[HeadKind, str] = {"language_model": "CAUSAL_LM", "classifier": "SEQ_CLS"}


def write_peft(
    source: CheckpointSource,
    target: str,
    *,
    architecture: str | None = None,
    on_progress: Callable[[int], None],
) -> list[str]:
    """Write the adapters of `source`, and in full what else trains; returns notes.

    Raises `ConfigError` for a checkpoint without adapters, or if something trains that PEFT has no place for.
    """
    lora = adapters_of(source)
    if lora is None:
        raise ConfigError(f"{source.path} has no adapters: it was not trained with lora.")
    model = known_model(source)
    chosen = choose_architecture(model, architecture)
    head, own, notes = choose_head(source, model, chosen)
    beside = own if head == "none" else None
    labels = list(source.manifest.label_names or ())
    tensor_map = map_tensors(model, chosen, head, num_labels=len(labels), has_prefix=head != "none")
    adapted = _adapted_tensors(source, tensor_map)
    saved = _saved_modules(source, tensor_map, adapted)
    tensors: dict[str, Tensor] = {}
    for tensor in adapted:
        tensors |= _joined(source, lora, tensor)
    tensors |= {f"{PREFIX}{name}": _whole_tensor(source, tensor_map, name) for name in saved}
    files, _, tokenizer_notes = tokenizer_files(
        source, model, is_classifier=(head == "classifier" and chosen not in ENCODERS) or beside is not None
    )
    if beside is not None:
        files |= head_files(source, *beside, labels)
    base, base_notes = _base(source)
    with storage.open_write(storage.join(target, ADAPTER_FILE)) as file:
        file.write(safetensors_header((name, v.dtype, tuple(v.shape)) for name, v in tensors.items()))
        for values in tensors.values():
            file.write(bytes_of(values.reshape(-1)))
            on_progress(values.numel() * values.element_size())
    for name, data in files.items():
        storage.commit_bytes(storage.join(target, name), data)
    config = {
        "peft_type": "LORA",
        "task_type": _task(model, head),
        "base_model_name_or_path": base,
        "fan_in_fan_out": has_transposed_layers(chosen),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in saved}) or None,
        **_settings(lora, adapted),
    }
    commit_json(target, ADAPTER_CONFIG, config)
    return [*notes, *tokenizer_notes, *base_notes]


def _task(model: ModelConfig, head: HeadKind) -> str | None:
    if head == "language_model" and model.is_encoder_decoder:
        return "SEQ_2_SEQ_LM"
    if head == "language_model" and not model.is_causal:
        return None  # PEFT has none for masked tokens
    return _TASKS.get(head, "FEATURE_EXTRACTION")


def _settings(lora: LoraConfig, adapted: list[AdaptedTensor]) -> dict[str, Any]:
    """Those of the adapters. A joined layer, such as GPT-2's q, k and v, has the ranks of all its parts."""
    ranks = {tensor.module: lora.rank * len(tensor.rows) for tensor in adapted}
    other = {module: rank for module, rank in ranks.items() if rank != lora.rank}
    return {
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "target_modules": list(ranks),
        "rank_pattern": other,
        "alpha_pattern": {m: lora.scale * (r**0.5 if lora.rslora else r) for m, r in other.items()},
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _adapted_tensors(source: CheckpointSource, tensor_map: TensorMap) -> list[AdaptedTensor]:
    """The layers with adapters, each with its adapted parameters alone."""
    records = source.manifest.parameters
    found = []
    for tensor in linear_tensors(tensor_map).values():
        rows = {name: span for name, span in tensor.rows.items() if _part(name, A) in records}
        if rows:
            found.append(AdaptedTensor(tensor.module, rows, tensor.num_inputs, tensor.num_outputs))
    return found


def _saved_modules(
    source: CheckpointSource, tensor_map: TensorMap, adapted: list[AdaptedTensor]
) -> list[str]:
    """Transformers' names of the tensors that the adapter has whole: of modules of which a part trains."""
    trained = {
        location.tensor.name.rpartition(".")[0]
        for name, location in tensor_map.parameters.items()
        if source.manifest.parameters[name].trainable
    }
    problems = [
        f"{module} trains beside its adapter" for module in trained & {tensor.module for tensor in adapted}
    ]
    embedding = tensor_map.embedding_name.rpartition(".")[0]
    if embedding in trained and source.manifest.tied:
        problems.append(f"{embedding}, which is tied to the logits, trains")
    if problems:
        raise ConfigError(
            f"{source.path}: {'; '.join(sorted(problems)[:5])}, for which PEFT has no place: convert it to "
            "huggingface, which merges the adapters."
        )
    return [name for name in tensor_map.tensors if name.rpartition(".")[0] in trained]


def _joined(source: CheckpointSource, lora: LoraConfig, tensor: AdaptedTensor) -> dict[str, Tensor]:
    """PEFT's tensors of a layer: one below the other the A of its parts, and B with a block for each."""
    parts = list(tensor.rows)
    rank = lora.rank
    a_RI = torch.cat([_read(source, _part(name, A)) for name in parts])
    b_OR = torch.zeros(tensor.num_outputs, rank * len(parts))
    for number, name in enumerate(parts):
        first, last = tensor.rows[name]
        b_OR[first:last, number * rank : (number + 1) * rank] = _read(source, _part(name, B))
    values = {A: a_RI, B: b_OR}
    if lora.dora:
        if sum(last - first for first, last in tensor.rows.values()) < tensor.num_outputs:
            raise ConfigError(
                f"{source.path}: {tensor.module} has adapters for {', '.join(parts)} alone, and DoRA of PEFT "
                "has a magnitude for all of it: convert it to huggingface, which merges the adapters."
            )
        values[MAGNITUDE] = torch.cat([_read(source, _part(name, MAGNITUDE)) for name in parts])
    return {f"{PREFIX}{tensor.module}{SUFFIXES[kind]}": value for kind, value in values.items()}


def _part(weight: str, kind: str) -> str:
    """Name of the adapter's parameter beside a weight."""
    return f"{weight.removesuffix('.weight')}.{kind}"


def _read(source: CheckpointSource, name: str) -> Tensor:
    shape = source.manifest.parameters[name].shape
    return source.read(name, WEIGHT, 0, prod(shape)).float().view(shape)


def _whole_tensor(source: CheckpointSource, tensor_map: TensorMap, name: str) -> Tensor:
    tensor = tensor_map.tensors[name]
    joined = torch.cat([_read(source, parameter) for parameter in tensor.parameters])
    return joined.T.contiguous() if tensor.is_transposed else joined


_MOST_RUNS = 100  # one after the other, with the same adapters


def _base(source: CheckpointSource) -> tuple[str | None, list[str]]:
    """The directory of transformers that the adapters belong to, if the run began with one.

    A run that goes on with adapters began with what they belong to.
    """
    init_from = source.manifest.config.get("init_from")
    try:
        for _ in range(_MOST_RUNS):
            below = None if not isinstance(init_from, str) else _base_below_adapters(init_from)
            if below is None:
                break
            init_from = below
        if isinstance(init_from, str) and detect_format(init_from) == "huggingface":
            return absolute(init_from), []
    except UnsupportedFormatError:
        pass
    return None, [
        f"The base is {init_from}, not a model of transformers: convert it with `distft checkpoint convert "
        f"{init_from} BASE --to huggingface`, and give peft BASE."
    ]


def _base_below_adapters(path: str) -> str | None:
    """Where the weights are to which the adapters at `path` add; None: there are none at `path`.

    Raises as `open_source`.
    """
    if detect_format(path) == "peft":
        return PeftCheckpoint.open(path).base_path
    source = open_source(path, weights_only=True)
    if adapters_of(source) is None:
        return None
    base, config = source.manifest.base, source.manifest.config
    found = config.get("init_from") if base is None else base.path
    return absolute(found) if isinstance(found, str) else None
