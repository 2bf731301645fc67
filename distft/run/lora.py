"""Adapters of a run: what trains beside them, and whether a checkpoint's adapters fit its settings."""

from collections.abc import Mapping
from typing import Any

from distft.data.dataset import Labels
from distft.data.images import ImagesConfig
from distft.data.labelled import LabelledConfig
from distft.data.streams import StreamsConfig
from distft.data.token_labels import TokenLabelsConfig
from distft.errors import ConfigError
from distft.model.heads import EmbeddingHead, GeneratorHead, Heads, LanguageModelHead
from distft.model.lora_config import LoraConfig
from distft.objective.interface import Objective

_PLACEHOLDER_LABELS = ("a", "b")
_MOST_SHOWN = 8


def heads_of_any_labels(objective: Objective, data: Any) -> Heads:
    """Heads that the objective accepts, before the data with the label names is read."""
    streams = data.streams if isinstance(data, StreamsConfig) else {}
    of_streams: Labels = {
        name: _PLACEHOLDER_LABELS
        for name, stream in streams.items()
        if isinstance(stream.data, LabelledConfig | TokenLabelsConfig | ImagesConfig)
    }
    try:
        return objective.heads(of_streams or None)
    except ConfigError:
        return objective.heads(_PLACEHOLDER_LABELS)


def default_trainable(given: Mapping[str, Any]) -> tuple[str, ...]:
    """Patterns of the parameters that train unless `trainable` says otherwise; `given` are other settings.

    With adapters those alone, and the heads of new tasks: not those over the vocabulary, which are the
    largest matrices of a model, and pretrained.
    """
    if given.get("lora") is None:
        return ("*",)
    if "objective" not in given:  # it has errors of its own
        return ("@lora",)
    try:
        heads = heads_of_any_labels(given["objective"], given.get("data"))
    except ConfigError:  # raised again where the data is read
        return ("@lora",)
    return ("@lora", *(f"{name}.*" for name, head in heads.items() if _is_of_task(head)))


def _is_of_task(head: Any) -> bool:
    if isinstance(head, EmbeddingHead):
        return head.learns_temperature
    return not isinstance(head, LanguageModelHead | GeneratorHead)


def require_same_adapters(saved: LoraConfig, config: LoraConfig, path: str) -> None:
    """Raise `ConfigError` unless the adapters of the checkpoint at `path` can go on as `config` says."""
    changed = saved.differences(config)
    if changed:
        lines = [
            f"lora.{name} is {_shown(saved, name)} in {path} and {_shown(config, name)} here."
            for name in changed
        ]
        raise ConfigError(
            "\n".join(lines) + "\nIts adapters were trained with its values: leave these settings out to go "
            "on with them. For new adapters on the model with its own merged in, convert it first, with "
            "`distft checkpoint convert --to huggingface`; without lora, its adapters are merged in."
        )


def _shown(config: LoraConfig, name: str) -> str:
    """A setting's value; of many targets, such as those of an adapter of PEFT, their number."""
    value = getattr(config, name)
    is_long = isinstance(value, tuple) and len(value) > _MOST_SHOWN
    return f"{len(value)} names" if is_long else repr(value)
