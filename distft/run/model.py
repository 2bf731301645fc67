"""The model of a run on the meta device, and whether a checkpoint has its parameters."""

from collections.abc import Collection, Mapping
from typing import Any

import torch

from distft.checkpoint.sources import CheckpointSource
from distft.config import Settings, parse
from distft.data.dataset import ClassNames, Labels
from distft.errors import ConfigError, ErrorCollector, suggest_name
from distft.model.config import ModelConfig
from distft.model.fp8 import require_fp8_layers
from distft.model.heads import ClassificationHead, Heads
from distft.model.lora import add_adapters
from distft.model.lora_config import LoraConfig
from distft.model.settings import AnyModelConfig
from distft.model.transformer_config import TransformerConfig
from distft.model.with_heads import ModelWithHeads
from distft.run.config import RunConfig


def build_module(model: ModelConfig, heads: Heads, lora: LoraConfig | None = None) -> ModelWithHeads:
    """The model on the meta device: shapes and names, no memory."""
    with torch.device("meta"):
        module = model.build(heads)
        if lora is not None:
            add_adapters(module, lora)
    return module


def parameter_shapes(
    model: ModelConfig, heads: Heads, lora: LoraConfig | None = None
) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by name; tied parameters appear once."""
    return shapes_of(checked_module(model, heads, lora))


def checked_module(model: ModelConfig, heads: Heads, lora: LoraConfig | None = None) -> ModelWithHeads:
    """`build_module` of a configuration whose sizes may be too large: then it raises `ConfigError`."""
    try:
        return build_module(model, heads, lora)
    except RuntimeError as error:  # a parameter with more elements than an integer of 64 bits can count
        raise ConfigError(f"model: no parameter can have these sizes ({error}): lower them.") from None


def shapes_of(module: ModelWithHeads) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by name; tied parameters appear once."""
    return {name: tuple(param.shape) for name, param in module.named_parameters()}


def prepare_for_engine(module: ModelWithHeads, config: RunConfig) -> None:
    """Set what the backward recomputes. Raises one `ConfigError` with all of `engine` the model cannot do."""
    engine, errors = config.engine, ErrorCollector()
    with errors.collect():
        module.set_activation_checkpointing(engine.activation_checkpointing)
    with errors.collect():
        if engine.fp8 != "none" and module.fp8_layers is None:
            raise ConfigError(f"engine.fp8={engine.fp8} needs model.type=transformer: set engine.fp8=none.")
        if engine.fp8 != "none" and config.lora is not None:
            raise ConfigError(f"engine.fp8={engine.fp8} with lora: adapters have no FP8; set it to none.")
        if engine.fp8 != "none" and module.fp8_layers is not None:
            require_fp8_layers(module.fp8_layers, engine.fp8, engine.fp8_min_features)
    with errors.collect():
        # A block that is recomputed is not passed the keys of its rows again.
        if config.lora is not None and config.lora.dropout and engine.activation_checkpointing != "none":
            raise ConfigError(
                f"lora.dropout={config.lora.dropout:g} with engine.activation_checkpointing="
                f"{engine.activation_checkpointing}: set one of them to 0 or none."
            )
    errors.raise_if_any()


def require_routers_learn(model: ModelConfig, trainable: Collection[str]) -> None:
    """Raise `ConfigError` if a router trains that gets no gradient."""
    experts = model.experts if isinstance(model, TransformerConfig) else None
    if experts is None or not experts.routes_without_gradient:
        return
    if any(".router." in name for name in trainable):
        raise ConfigError(
            "model.experts.experts_per_token=1 with normalize_weights=true: the weight of the only expert is "
            "1, so that the router learns nothing from the loss. Set model.experts.normalize_weights=false, "
            "or freeze the routers in trainable: ['*', '!*.router.*']."
        )


def require_parameters(
    source: CheckpointSource, shapes: Mapping[str, tuple[int, ...]], *, may_lack: tuple[str, ...] = ()
) -> None:
    """Raise one `ConfigError` with all parameters that `source` lacks or has in another shape.

    Parameters whose names start with one of `may_lack` may be absent.
    """
    problems = []
    for name, shape in shapes.items():
        found = source.shape(name)
        if found is None and not name.startswith(may_lack):
            problems.append(
                f"{name} is missing from it.{suggest_name(name, list(source.manifest.parameters))}"
            )
        elif found is not None and found != shape:
            problems.append(f"{name} has shape {list(found)} there and {list(shape)} in this model.")
    if problems:
        shown = "\n".join(problems[:20]) + (f"\nand {len(problems) - 20} more" if len(problems) > 20 else "")
        raise ConfigError(f"The checkpoint {source.path} does not fit model:\n{shown}")


def head_prefixes(heads: Heads) -> tuple[str, ...]:
    """Name prefixes of parameters that `init_from` may lack: a new task has a new head."""
    return tuple(f"{name}." for name in heads)


def new_parameter_prefixes(
    init_from: CheckpointSource, heads: Heads, label_names: Labels, objective: Settings
) -> tuple[str, ...]:
    """Name prefixes of parameters not taken from `init_from`: heads whose classes, units or layers differ."""
    saved_objective, own_objective = init_from.manifest.config.get("objective"), objective.model_dump()
    saved = _by_head(saved_label_names(init_from), saved_objective)
    own = _by_head(label_names, own_objective)
    saved_units, own_units = _units_by_head(saved_objective), _units_by_head(own_objective)

    def is_same(name: str, head: ClassificationHead) -> bool:
        has_hidden_layer = f"{name}.hidden.weight" in init_from.manifest.parameters
        # Without names, as of a regression, on both sides there are no classes that could differ.
        has_same_classes = _of_head(saved, name) == _of_head(own, name)
        has_same_units = saved_units.get(name) == own_units.get(name)
        return has_same_classes and has_same_units and has_hidden_layer == (head.hidden != "none")

    classifiers = {name: head for name, head in heads.items() if isinstance(head, ClassificationHead)}
    return tuple(f"{name}." for name, head in classifiers.items() if not is_same(name, head))


def saved_label_names(source: CheckpointSource) -> Labels:
    """The class names that a checkpoint records."""
    names = source.manifest.label_names
    if isinstance(names, Mapping):
        return {stream: tuple(of_stream) for stream, of_stream in names.items()}
    return None if names is None else tuple(names)


def _parts(objective: Any) -> dict[str, Mapping[str, Any]]:
    """The settings of each part of a mixture, by the name of its stream; of another objective none."""
    parts = objective.get("parts") if isinstance(objective, Mapping) else None
    if not isinstance(parts, Mapping):
        return {}
    found = {name: part.get("objective") for name, part in parts.items() if isinstance(part, Mapping)}
    return {name: own for name, own in found.items() if isinstance(own, Mapping)}


def _by_head(label_names: Labels, objective: Any) -> Labels:
    """The class names of each head of a mixture: it has its stream's name unless the part gives another."""
    if not isinstance(label_names, Mapping):
        return label_names
    parts = _parts(objective)
    return {parts.get(stream, {}).get("head") or stream: names for stream, names in label_names.items()}


def _units_by_head(objective: Any) -> dict[str, tuple[Any, Any]]:
    """Of each head of a regression the offset and scale of its numbers, from an objective's settings."""
    named = _parts(objective) or ({"classifier": objective} if isinstance(objective, Mapping) else {})
    return {
        own.get("head") or name: (own.get("offset"), own.get("scale"))
        for name, own in named.items()
        if own.get("type") == "regression"
    }


def _of_head(label_names: Labels, head: str) -> ClassNames | None:
    """The class names of one head; the only ones are those of any head."""
    return label_names.get(head) if isinstance(label_names, Mapping) else label_names


# Fields of a model that say nothing about what its weights mean.
_FREE_FIELDS = {"dropout", "neftune_alpha", "attention_kernel", "init_std", "max_seq_len"}


def model_of(source: CheckpointSource) -> ModelConfig:
    """The configuration of a checkpoint's model, which its manifest must have. Raises `ConfigError`."""
    model: ModelConfig = parse(AnyModelConfig, source.manifest.config["model"], where=f"{source.path}: model")
    return model


def require_same_model(init_from: CheckpointSource, model: ModelConfig, allowed: Collection[str]) -> None:
    """Raise `ConfigError` with every field in which `model` differs from that of the checkpoint.

    Otherwise weights would get another meaning, be dropped, or start anew, without a word. `allowed` are the
    fields that may differ.
    """
    if "model" not in init_from.manifest.config:
        return  # of plain DeepSpeed: only names and shapes are known
    before, after = _compared(model_of(init_from)), _compared(model)
    if before["type"] != after["type"]:
        raise ConfigError(
            f"model.type is {before['type']} in {init_from.path} and {after['type']} here: another type of "
            "model has no use for its weights. Leave model out, or leave init_from out."
        )
    changed = [
        name
        for name in after
        if after[name] != before.get(name) and not {name, name.partition(".")[0]} & {*_FREE_FIELDS, *allowed}
    ]
    if changed:
        lines = [
            f"model.{n} is {before.get(n)!r} in {init_from.path} and {after[n]!r} here." for n in changed
        ]
        changes = dict.fromkeys(name.partition(".")[0] for name in changed)
        raise ConfigError(
            "\n".join(lines)
            + "\nThe checkpoint's weights were trained with its values. Leave these settings "
            f"out, or allow the changes: allow_model_changes=[{', '.join(changes)}]."
        )


def _compared(model: ModelConfig) -> dict[str, Any]:
    """The settings, those of experts by their own names, but not how training balances them."""
    settings = model.model_dump()
    experts = settings.pop("experts", None) or {}
    rate = experts.pop("bias_update_rate", None)
    own = {f"experts.{name}": value for name, value in experts.items() if not name.endswith("_weight")}
    return {**settings, "experts": bool(experts), "experts.has_bias": rate is not None, **own}


def added_block_prefixes(init_from: CheckpointSource, config: RunConfig) -> tuple[str, ...]:
    """Name prefixes of blocks that `init_from` lacks, if the configuration allows it to."""
    changes = config.allow_model_changes  # num_layers, or those of an encoder or a decoder
    if config.model is None or not any(name.endswith("_layers") for name in changes):
        return ()
    names = init_from.manifest.parameters
    blocks = [f"{name}." for name in config.model.block_names]
    return tuple(block for block in blocks if not any(name.startswith(block) for name in names))
