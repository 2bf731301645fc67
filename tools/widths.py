"""The model of a configuration at another width, in muP or the standard parametrization; for tools."""

from collections.abc import Sequence
from typing import Any

from distft.errors import ConfigError
from distft.model.transformer_config import TransformerConfig
from distft.run.config import RunConfig, load_run_config

PARAMETRIZATIONS = ("standard", "mup")


def base_model(config: RunConfig) -> TransformerConfig:
    """The configured model. Raises `ConfigError` unless it is a Transformer with random weights."""
    if not isinstance(config.model, TransformerConfig) or config.init_from is not None:
        raise ConfigError(
            "Widths are compared of model.type=transformer from random weights: set model, without init_from."
        )
    return config.model


def at_width(
    path: str, overrides: Sequence[str], width: int, parametrization: str, *, widens_heads: bool = False
) -> RunConfig:
    """The run of `path` with a `d_model` of `width`, and heads and feed-forward in proportion.

    The base is the configuration's own, or its width. `widens_heads`: as many heads, each of them wider.
    """
    own = base_model(load_run_config(path, overrides))
    base = own.mup_base_d_model or own.d_model
    factor = width / own.d_model
    sizes: dict[str, Any] = {
        "d_model": width,
        "num_heads": own.num_heads if widens_heads else own.num_heads * factor,
        "num_kv_heads": own.num_kv_heads if widens_heads else own.num_kv_heads * factor,
        "head_dim": own.head_dim * factor if widens_heads else own.head_dim,
    }
    if "d_ff" in own.model_fields_set:
        sizes["d_ff"] = own.d_ff * factor
    broken = [name for name, size in sizes.items() if size != int(size) or size < 1]
    if broken:
        raise ConfigError(
            f"--widths: a width of {width} would have {broken[0]}={sizes[broken[0]]:g}: give multiples of "
            f"{own.d_model // own.num_heads}."
        )
    is_mup = parametrization == "mup"
    settings = {name: int(size) for name, size in sizes.items()} | {
        "parametrization": parametrization,
        "mup_base_d_model": base if is_mup else "null",
        "mup_base_head_dim": (own.mup_base_head_dim or own.head_dim) if is_mup else "null",
    }
    return load_run_config(path, [*overrides, *(f"model.{name}={value}" for name, value in settings.items())])
