"""What config.json of transformers says of rotary positions and windows, as settings of distft and back."""

from collections.abc import Mapping, Sequence
from typing import Any

from distft.checkpoint.formats.huggingface_keys import LlamaKeys
from distft.model.rope_scaling import NtkScaling, RopeScaling, yarn_magnitude
from distft.model.transformer_config import TransformerConfig

FULL, SLIDING = "full_attention", "sliding_attention"  # of `layer_types`
_DEFAULT_ROPE_THETA = 10_000.0
_NUMBERS = (  # of `rope_parameters`
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
)
_SCALINGS = ("default", "linear", "dynamic", "yarn", "llama3")


def rope_settings(given: Mapping[str, Any], theta: float | None, longest: int) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of `TransformerConfig`; `theta` is that outside of `given`, if any.

    `longest` is `max_position_embeddings`.
    """
    theta = given.get("rope_theta", theta)
    return {
        "rope_theta": _DEFAULT_ROPE_THETA if theta is None else theta,
        "rope_scaling": _scaling(given, longest),
    }


def rope_type(given: Mapping[str, Any]) -> Any:
    return given.get("rope_type", given.get("type", "default"))


def _scaling(given: Mapping[str, Any], longest: int) -> dict[str, Any] | None:
    kind = rope_type(given)
    # "dynamic" begins beyond `max_position_embeddings`, and no model of distft accepts rows so long.
    if kind not in ("linear", "yarn", "llama3"):
        return None
    names = {"linear": (), "llama3": ("low_freq_factor", "high_freq_factor"), "yarn": ("truncate",)}[kind]
    scaling = {"type": kind, **{name: given[name] for name in ("factor", *names) if name in given}}
    if kind == "linear":
        return scaling
    original = given.get("original_max_position_embeddings", longest)
    scaling["original_max_seq_len"] = original
    if kind == "llama3":
        return scaling
    factor = given.get("factor")
    if factor is None and isinstance(original, int) and original:
        factor = scaling["factor"] = longest / original
    scaling |= {"beta_fast": given.get("beta_fast") or 32, "beta_slow": given.get("beta_slow") or 1}
    scaling["attention_factor"] = given.get("attention_factor")
    scales = [given.get(name) for name in ("mscale", "mscale_all_dim")]
    numbers = [value for value in (factor, *scales) if isinstance(value, int | float) and value]
    if scaling["attention_factor"] is None and len(numbers) == 3:
        stretch, one, other = numbers
        scaling["attention_factor"] = yarn_magnitude(stretch, one) / yarn_magnitude(stretch, other)
    return scaling


def rope_problems(given: Mapping[str, Any], where: str, partial_rotary_factor: float | None) -> list[str]:
    """Options of rotary positions in `given`, which is `where` in config.json, that distft does not have."""
    problems = []
    kind = rope_type(given)
    if kind not in _SCALINGS:
        problems.append(
            f"{where}: rotary positions of type {kind!r} are not supported: it must be one of "
            f"{', '.join(_SCALINGS)}."
        )
    problems += [
        f"{where}.{name}={given[name]!r} is not a number: set one, or leave it out."
        for name in _NUMBERS
        if name in given and not _is_number(given[name]) and (given[name] is not None or name == "rope_theta")
    ]
    required = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
    if kind in required and (missing := [name for name in required[kind] if given.get(name) is None]):
        problems.append(
            f"{where} of type {kind!r} lacks {', '.join(missing)}, without a default: copy the model's own "
            "config.json."
        )
    factors = {"": partial_rotary_factor, f"{where}.": given.get("partial_rotary_factor")}
    problems += [
        f"{prefix}partial_rotary_factor={factor!r} is not supported: it must be 1."
        for prefix, factor in factors.items()
        if factor not in (None, 1)
    ]
    return problems


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def rope_keys(theta: float, scaling: RopeScaling | None, head_dim: int) -> dict[str, Any]:
    """`rope_parameters` of rotary positions."""
    if isinstance(scaling, NtkScaling):  # which transformers has no name for: it is another theta
        theta, scaling = scaling.theta(theta, head_dim), None
    if scaling is None:
        return {"rope_type": "default", "rope_theta": theta}
    keys = scaling.model_dump(exclude={"type", "original_max_seq_len"}, exclude_none=True)
    original = getattr(scaling, "original_max_seq_len", None)
    if original is not None:
        keys["original_max_position_embeddings"] = original
    return {"rope_type": scaling.type, "rope_theta": theta, **keys}


def older_rope_keys(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of transformers before 5 that say the same as `rope_parameters`."""
    scaling = {name: value for name, value in keys.items() if name != "rope_theta"}
    is_scaled = keys["rope_type"] != "default"
    return {"rope_theta": keys["rope_theta"], **({"rope_scaling": scaling} if is_scaled else {})}


def window_settings(keys: LlamaKeys, architecture: str) -> dict[str, Any]:
    """`sliding_window` of `TransformerConfig`, and the layers without one."""
    window = keys.sliding_window
    is_qwen = architecture in {"qwen2", "qwen3"}
    if architecture == "llama" or window is None or window >= keys.max_position_embeddings:
        return {}
    if is_qwen and not keys.use_sliding_window:
        return {}
    layers = range(keys.num_hidden_layers)
    if is_qwen and keys.layer_types is not None:
        has_window = [kind == SLIDING for kind in keys.layer_types]
    else:
        has_window = [not is_qwen or layer >= keys.max_window_layers for layer in layers]
    return {"sliding_window": window, **global_layers(has_window)} if any(has_window) else {}


def global_layers(has_window: Sequence[bool]) -> dict[str, Any]:
    """The settings that name the layers without a window."""
    found = [layer for layer, windowed in enumerate(has_window) if not windowed]
    if len(found) > 1:
        first, every = found[0], found[1] - found[0]
        if first < every and found == list(range(first, len(has_window), every)):
            return {"global_attention_every": every, "global_attention_offset": first}
    return {"global_layers": found} if found else {}


def layer_types(config: TransformerConfig) -> list[str]:
    return [SLIDING if config.has_window(layer) else FULL for layer in range(config.num_layers)]


def layer_type_problems(given: Sequence[str] | None, num_layers: int) -> list[str]:
    """Of `layer_types`."""
    if given is None:
        return []
    problems = [
        f"layer_types has {kind!r}, which is not supported: it must be {FULL} or {SLIDING}."
        for kind in dict.fromkeys(given)
        if kind not in {FULL, SLIDING}
    ]
    if len(given) != num_layers:
        problems.append(
            f"layer_types has {len(given)} layers, but num_hidden_layers={num_layers}: name each layer once."
        )
    return problems
