"""Reads the `config.json` of transformers, and refuses by name what our Transformer does not have."""

from collections.abc import Mapping
from typing import Any, get_args

from distft.checkpoint.formats.huggingface_shape import (
    Architecture,
    HeadKind,
    HuggingFaceShape,
    class_name,
)
from distft.config import parse
from distft.errors import ConfigError
from distft.model.config import ModelConfig

# What transformers takes for keys that a config.json leaves out (transformers 5.23).
_COMMON: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,  # as many as num_attention_heads
    "head_dim": None,  # hidden_size / num_attention_heads
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
    "layer_types": None,
}
_QWEN = {**_COMMON, "vocab_size": 151936, "sliding_window": 4096, "max_window_layers": 28}
_DEFAULTS: dict[Architecture, dict[str, Any]] = {
    "llama": {**_COMMON, "intermediate_size": 11008, "max_position_embeddings": 2048},
    "mistral": {
        **_COMMON,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
        "sliding_window": 4096,
    },
    "qwen2": {**_QWEN, "num_key_value_heads": 32},
    "qwen3": {**_QWEN, "num_key_value_heads": 32, "head_dim": 128},
    "gpt2": {
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": None,  # 4 * n_embd
        "activation_function": "gelu_new",
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
        "resid_pdrop": 0.1,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
}
_SILU = ("silu", "swish")
_TANH_GELU = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh")
_DEFAULT_ROPE_THETA = 10_000.0
_TWO_LABELS = {"0": "LABEL_0", "1": "LABEL_1"}  # which transformers leaves out of a config.json


def read_shape(raw: Mapping[str, Any]) -> HuggingFaceShape:
    """The model that a `config.json` describes. Raises `ConfigError` with every feature that is not ours."""
    known = {str(name): name for name in get_args(Architecture)}
    model_type = raw.get("model_type")
    if model_type not in known:
        raise ConfigError(f"model_type={model_type!r} is not read; these are: {', '.join(known)}.")
    architecture = known[model_type]
    keys = {**_DEFAULTS[architecture], **raw}
    faults = _general_faults(keys)
    head, head_faults = _head(keys, architecture)
    sizes, size_faults = (_gpt2_sizes if architecture == "gpt2" else _llama_sizes)(keys, architecture)
    faults += head_faults + size_faults
    if faults:
        raise ConfigError("\n".join(faults))
    model: ModelConfig = parse(ModelConfig, sizes, where="model")
    labels = _label_names(keys) if head == "classifier" else None
    return HuggingFaceShape(architecture=architecture, model=model, head=head, label_names=labels)


def _general_faults(keys: Mapping[str, Any]) -> list[str]:
    faults = []
    if keys.get("quantization_config"):
        faults.append("quantization_config: quantized weights are not read; save the model in bf16 first.")
    if keys.get("auto_map"):
        faults.append("auto_map: the model runs code of its own, which may compute anything.")
    return faults


def _head(keys: Mapping[str, Any], architecture: Architecture) -> tuple[HeadKind, list[str]]:
    """What the model ends in, by its class; a language model where none is named."""
    given = keys.get("architectures")
    named = given[0] if isinstance(given, list) and given else None
    classes = {class_name(architecture, kind): kind for kind in get_args(HeadKind)}
    if named is not None and named not in classes:
        return "none", [f"architectures={given}: its head is not read; these are: {', '.join(classes)}."]
    head: HeadKind = "language_model" if named is None else classes[named]
    problem = keys.get("problem_type")
    if head == "classifier" and problem not in {None, "single_label_classification"}:
        return head, [f"problem_type={problem!r}: only single_label_classification is one of ours."]
    return head, []


def _label_names(keys: Mapping[str, Any]) -> tuple[str, ...]:
    names = keys.get("id2label") or _TWO_LABELS
    return tuple(str(name) for _, name in sorted((int(i), name) for i, name in names.items()))


def _llama_sizes(keys: Mapping[str, Any], architecture: Architecture) -> tuple[dict[str, Any], list[str]]:
    """Fields of our `ModelConfig`, and what does not fit into them."""
    rope_theta, faults = _rope(keys)
    faults += _window_faults(keys, architecture)
    if keys["hidden_act"] not in _SILU:
        faults.append(f"hidden_act={keys['hidden_act']!r}: the feed-forward must be {' or '.join(_SILU)}.")
    if keys["attention_dropout"]:
        faults.append(
            f"attention_dropout={keys['attention_dropout']}: dropout on attention weights alone is not "
            "ours. It matters in training only: set it to 0 in a copy of the file."
        )
    num_heads = keys["num_attention_heads"]
    sizes = {
        "vocab_size": keys["vocab_size"],
        "max_seq_len": keys["max_position_embeddings"],
        "d_model": keys["hidden_size"],
        "num_layers": keys["num_hidden_layers"],
        "num_heads": num_heads,
        "num_kv_heads": keys["num_key_value_heads"] or num_heads,
        "norm_eps": keys["rms_norm_eps"],
        "rope_theta": rope_theta,
        "d_ff": keys["intermediate_size"],
        # Mistral and Qwen2 do not look at the keys that the others have.
        "attention_bias": architecture in {"llama", "qwen3"} and keys["attention_bias"],
        "qkv_bias": architecture == "qwen2",
        "mlp_bias": architecture == "llama" and keys["mlp_bias"],
        "qk_norm": architecture == "qwen3",
        "tie_embeddings": keys["tie_word_embeddings"],
        "init_std": keys["initializer_range"] or 0.02,
    }
    if keys["head_dim"] is not None:
        sizes["head_dim"] = keys["head_dim"]
    return sizes, faults


def _rope(keys: Mapping[str, Any]) -> tuple[float, list[str]]:
    """The base of the angles, and what else the positions would do that ours do not."""
    name = "rope_scaling" if keys.get("rope_scaling") else "rope_parameters"
    given = keys.get(name) or {}
    if not isinstance(given, Mapping) or any(isinstance(value, Mapping) for value in given.values()):
        return 1.0, [f"{name}={given}: positions that differ by layer are not ours."]
    faults = []
    kind = given.get("rope_type", given.get("type", "default"))
    if kind != "default":
        faults.append(f"{name}={dict(given)}: rotary positions of the kind {kind!r} are not ours.")
    for where, part in (("", keys), (f"{name}.", given)):
        factor = part.get("partial_rotary_factor")
        if factor not in {None, 1}:
            faults.append(f"{where}partial_rotary_factor={factor}: our positions turn all of a head.")
    base = given.get("rope_theta", keys.get("rope_theta"))
    return (_DEFAULT_ROPE_THETA if base is None else base), faults


def _window_faults(keys: Mapping[str, Any], architecture: Architecture) -> list[str]:
    """Sliding windows, where a row can be long enough to feel them."""
    window, longest = keys["sliding_window"], keys["max_position_embeddings"]
    if architecture == "llama" or window is None or window >= longest:
        return []
    if architecture in {"qwen2", "qwen3"}:
        layer_types = keys["layer_types"]
        if layer_types is None:
            is_windowed = keys["num_hidden_layers"] > keys["max_window_layers"]
        else:
            is_windowed = "sliding_attention" in layer_types
        if not keys.get("use_sliding_window") or not is_windowed:
            return []
    return [
        f"sliding_window={window} is in effect, as max_position_embeddings={longest} is more: our attention "
        f"sees the whole row. Rows of up to {window} tokens are the same: set max_position_embeddings to "
        f"{window} in a copy of the file."
    ]


def _gpt2_sizes(keys: Mapping[str, Any], _architecture: Architecture) -> tuple[dict[str, Any], list[str]]:
    """Fields of our `ModelConfig`, and what does not fit into them."""
    faults = []
    activation = keys["activation_function"]
    if activation not in _TANH_GELU:
        faults.append(f"activation_function={activation!r}: it must be the tanh form, {_TANH_GELU[0]}.")
    if not keys["scale_attn_weights"]:
        faults.append(
            "scale_attn_weights=false: our attention divides by the square root of the head's size."
        )
    if keys["scale_attn_by_inverse_layer_idx"]:
        faults.append("scale_attn_by_inverse_layer_idx=true: our attention is scaled alike in all layers.")
    if keys["add_cross_attention"]:
        faults.append("add_cross_attention=true: there is no encoder to attend to.")
    rates = {name: keys[name] for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop")}
    if len(set(rates.values())) > 1:
        told = ", ".join(f"{name}={rate}" for name, rate in rates.items())
        faults.append(
            f"{told}: our dropout is the same everywhere. It matters in training only: make them equal in a "
            "copy of the file."
        )
    return {
        "vocab_size": keys["vocab_size"],
        "max_seq_len": keys["n_positions"],
        "d_model": keys["n_embd"],
        "num_layers": keys["n_layer"],
        "num_heads": keys["n_head"],
        "norm": "layernorm",
        "norm_eps": keys["layer_norm_epsilon"],
        "positions": "learned",
        "mlp": "gelu",
        "d_ff": keys["n_inner"] or 4 * keys["n_embd"],
        "attention_bias": True,
        "mlp_bias": True,
        "tie_embeddings": keys["tie_word_embeddings"],
        "dropout": rates["resid_pdrop"],
        "init_std": keys["initializer_range"] or 0.02,
    }, faults
