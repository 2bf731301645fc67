"""Parses the `config.json` of transformers, and rejects features that distft's Transformer lacks."""

from collections.abc import Mapping
from typing import Any, get_args

from distft.checkpoint.formats.huggingface_architecture import (
    Architecture,
    HeadKind,
    HuggingFaceModelSpec,
    class_name,
)
from distft.config import parse
from distft.errors import ConfigError
from distft.model.config import ModelConfig

# Defaults of transformers 5.23, for keys that a config.json leaves out.
_COMMON: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,  # None: num_attention_heads
    "head_dim": None,  # None: hidden_size / num_attention_heads
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
        "n_inner": None,  # None: 4 * n_embd
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
_DEFAULT_LABELS = {"0": "LABEL_0", "1": "LABEL_1"}  # transformers leaves them out of a config.json


def parse_config(raw: Mapping[str, Any]) -> HuggingFaceModelSpec:
    """The model that a `config.json` describes. Raises `ConfigError` with every unsupported feature."""
    known = {str(name): name for name in get_args(Architecture)}
    model_type = raw.get("model_type")
    if model_type not in known:
        raise ConfigError(
            f"model_type={model_type!r} is not supported: it must be one of {', '.join(known)}."
        )
    architecture = known[model_type]
    keys = {**_DEFAULTS[architecture], **raw}
    problems = _general_problems(keys)
    head, head_problems = _parse_head(keys, architecture)
    parse_sizes = _parse_gpt2 if architecture == "gpt2" else _parse_llama
    sizes, size_problems = parse_sizes(keys, architecture)
    problems += head_problems + size_problems
    if problems:
        raise ConfigError("\n".join(problems))
    model: ModelConfig = parse(ModelConfig, sizes, where="model")
    labels = _label_names(keys) if head == "classifier" else None
    return HuggingFaceModelSpec(architecture=architecture, model=model, head=head, label_names=labels)


def _general_problems(keys: Mapping[str, Any]) -> list[str]:
    problems = []
    if keys.get("quantization_config"):
        problems.append("quantization_config: quantized weights are not supported; save them in bf16.")
    if keys.get("auto_map"):
        problems.append("auto_map: the model has code of its own, which distft does not run.")
    return problems


def _parse_head(keys: Mapping[str, Any], architecture: Architecture) -> tuple[HeadKind, list[str]]:
    """The model's head, from its class in `architectures` (default: a language model), and problems."""
    given = keys.get("architectures")
    named = given[0] if isinstance(given, list) and given else None
    classes = {class_name(architecture, kind): kind for kind in get_args(HeadKind)}
    if named is not None and named not in classes:
        return "none", [f"architectures={given} is not supported: it must be one of {', '.join(classes)}."]
    head: HeadKind = "language_model" if named is None else classes[named]
    problem = keys.get("problem_type")
    if head == "classifier" and problem not in {None, "single_label_classification"}:
        return head, [f"problem_type={problem!r} is not supported: it must be single_label_classification."]
    return head, []


def _label_names(keys: Mapping[str, Any]) -> tuple[str, ...]:
    names = keys.get("id2label") or _DEFAULT_LABELS
    return tuple(str(name) for _, name in sorted((int(i), name) for i, name in names.items()))


def _parse_llama(keys: Mapping[str, Any], architecture: Architecture) -> tuple[dict[str, Any], list[str]]:
    """Fields of `ModelConfig`, and problems."""
    rope_theta, problems = _parse_rope(keys)
    problems += _sliding_window_problems(keys, architecture)
    if keys["hidden_act"] not in _SILU:
        problems.append(
            f"hidden_act={keys['hidden_act']!r} is not supported: it must be {' or '.join(_SILU)}."
        )
    if keys["attention_dropout"]:
        problems.append(
            f"attention_dropout={keys['attention_dropout']}: dropout on attention weights alone is not "
            "supported. It affects training only: set it to 0 in a copy of the file."
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
        # Mistral and Qwen2 ignore these keys.
        "attention_bias": architecture in {"llama", "qwen3"} and keys["attention_bias"],
        "qkv_bias": architecture == "qwen2",
        "mlp_bias": architecture == "llama" and keys["mlp_bias"],
        "qk_norm": architecture == "qwen3",
        "tie_embeddings": keys["tie_word_embeddings"],
        "init_std": keys["initializer_range"] or 0.02,
    }
    if keys["head_dim"] is not None:
        sizes["head_dim"] = keys["head_dim"]
    return sizes, problems


def _parse_rope(keys: Mapping[str, Any]) -> tuple[float, list[str]]:
    """`rope_theta`, and problems: options of rotary positions that distft does not support."""
    name = "rope_scaling" if keys.get("rope_scaling") else "rope_parameters"
    given = keys.get(name) or {}
    if not isinstance(given, Mapping) or any(isinstance(value, Mapping) for value in given.values()):
        return 1.0, [f"{name}={given}: rotary positions that differ by layer are not supported."]
    problems = []
    kind = given.get("rope_type", given.get("type", "default"))
    if kind != "default":
        problems.append(f"{name}={dict(given)}: rotary positions of type {kind!r} are not supported.")
    for prefix, options in (("", keys), (f"{name}.", given)):
        factor = options.get("partial_rotary_factor")
        if factor not in {None, 1}:
            problems.append(f"{prefix}partial_rotary_factor={factor} is not supported: it must be 1.")
    base = given.get("rope_theta", keys.get("rope_theta"))
    return (_DEFAULT_ROPE_THETA if base is None else base), problems


def _sliding_window_problems(keys: Mapping[str, Any], architecture: Architecture) -> list[str]:
    """Problems of a sliding window that is shorter than the longest row."""
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
        f"sliding_window={window} is less than max_position_embeddings={longest}, but distft's attention has "
        f"no window. Rows of up to {window} tokens need none: set max_position_embeddings to {window} in a "
        "copy of the file."
    ]


def _parse_gpt2(keys: Mapping[str, Any], _architecture: Architecture) -> tuple[dict[str, Any], list[str]]:
    """Fields of `ModelConfig`, and problems."""
    problems = []
    activation = keys["activation_function"]
    if activation not in _TANH_GELU:
        problems.append(
            f"activation_function={activation!r} is not supported: it must be {' or '.join(_TANH_GELU)}."
        )
    if not keys["scale_attn_weights"]:
        problems.append("scale_attn_weights=false is not supported: it must be true.")
    if keys["scale_attn_by_inverse_layer_idx"]:
        problems.append("scale_attn_by_inverse_layer_idx=true is not supported: it must be false.")
    if keys["add_cross_attention"]:
        problems.append("add_cross_attention=true is not supported: distft's models have no encoder.")
    rates = {name: keys[name] for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop")}
    if len(set(rates.values())) > 1:
        given = ", ".join(f"{name}={rate}" for name, rate in rates.items())
        problems.append(
            f"{given}: different dropout rates are not supported. They affect training only: make them equal "
            "in a copy of the file."
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
    }, problems
