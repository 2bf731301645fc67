"""The model of a run on the meta device, and whether a checkpoint has its parameters."""

from collections.abc import Mapping

import torch

from distft.checkpoint.sources import CheckpointSource
from distft.errors import ConfigError, suggest_name
from distft.model.config import Heads, ModelConfig
from distft.model.transformer import Transformer

_CLASSIFIER = "classifier."
HEAD_PREFIXES = (_CLASSIFIER, "lm_head.")  # `init_from` may lack these: a new task has a new head


def build_module(model: ModelConfig, heads: Heads, *, activation_checkpointing: bool = False) -> Transformer:
    """The model on the meta device: shapes and names, no memory."""
    with torch.device("meta"):
        module = Transformer(model, heads)
    module.activation_checkpointing = activation_checkpointing
    return module


def parameter_shapes(model: ModelConfig, heads: Heads) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by name; tied parameters appear once."""
    return {name: tuple(param.shape) for name, param in build_module(model, heads).named_parameters()}


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


def new_parameter_prefixes(
    init_from: CheckpointSource, label_names: tuple[str, ...] | None
) -> tuple[str, ...]:
    """Name prefixes of parameters not taken from `init_from`: the classifier, if its classes differ."""
    saved = init_from.manifest.label_names
    has_same_labels = saved is not None and label_names is not None and tuple(saved) == label_names
    return () if has_same_labels else (_CLASSIFIER,)
