"""What `evaluate` and its like may change in the configuration of a trained model."""

from collections.abc import Mapping, Sequence
from typing import Any

from distft.config import split_override
from distft.data.split import SplitConfig
from distft.errors import ConfigError

# The settings that have an effect on an evaluation.
_EFFECTIVE = (
    "batch.micro_batch_size",
    "batch.seq_len",
    "device",
    "engine.allow_tf32",
    "engine.param_dtype",
    "evaluation.max_sequences",
    "evaluation.micro_batch_size",
    "model.attention_kernel",
    "num_threads",
    "objective",
    "timeout_s",
    "tokenizer",
    "chat",
    "validation",
)
NO_PATH = "none"  # stands for data that a substitute does not have
# Settings of data that say which rows, in which order, and not how a row is read.
_OF_ROWS = ("path", "source", "max_rows", "shuffle", "data_seed", "augment", "views")


def keys_of(overrides: Sequence[str]) -> list[str]:
    """The keys of the overrides that have one: `apply_overrides` reports the others."""
    return [key for key, equals, _ in map(split_override, overrides) if equals]


def names_validation(saved: Any, keys: Sequence[str]) -> bool:
    """Whether overrides name validation data for a run that has none of its own, or a split of its data."""
    own = [key.removeprefix("validation.") for key in keys if key.startswith("validation.")]
    if isinstance(saved, dict) and saved.get("type") == "split":
        return any(key == "type" or key not in SplitConfig.model_fields for key in own)
    return saved is None and bool(own)


def empty_validation(data: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """What overrides of single fields complete: as the training data, with its names of columns.

    Of another kind, nothing of them.
    """
    has_sources = any(key.startswith("validation.sources.") for key in keys_of(overrides))
    sources = {"sources": [{"path": NO_PATH}]} if has_sources else {}
    kinds = [value for key, _, value in map(split_override, overrides) if key == "validation.type"]
    is_alike = "path" in data and all(kind == data["type"] for kind in kinds)
    names = {key: value for key, value in data.items() if key not in _OF_ROWS} if is_alike else {}
    return {**names, "type": data["type"], **sources}


def check_overrides(overrides: Sequence[str]) -> None:
    """Raise `ConfigError` for settings that have no effect on an evaluation."""
    idle = [
        key
        for key in keys_of(overrides)
        if not any(f"{key}.".startswith(f"{known}.") or known.startswith(f"{key}.") for known in _EFFECTIVE)
    ]
    if idle:
        raise ConfigError(
            f"{', '.join(idle)} {'have' if len(idle) > 1 else 'has'} no effect on an evaluation: leave "
            f"{'them' if len(idle) > 1 else 'it'} out. These have: {', '.join(_EFFECTIVE)}."
        )
