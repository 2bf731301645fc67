"""The decoders of transformers: Llama, Mistral, Qwen2, Qwen3 and GPT-2. What sets their config.json apart."""

from collections.abc import Mapping
from typing import Any

from distft.checkpoint.formats.huggingface_attention import (
    layer_type_problems,
    layer_types,
    older_rope_keys,
    rope_keys,
    rope_problems,
    rope_settings,
    window_settings,
)
from distft.checkpoint.formats.huggingface_keys import Gpt2Keys, LlamaKeys
from distft.model.transformer_config import TransformerConfig

_SILU = ("silu", "swish")
_TANH_GELU = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh")


def llama_sizes(keys: LlamaKeys, architecture: str) -> dict[str, Any]:
    """Fields of `TransformerConfig`."""
    given = keys.rope_scaling or keys.rope_parameters or {}
    sizes = {
        **rope_settings(given, keys.rope_theta, keys.max_position_embeddings),
        **window_settings(keys, architecture),
        "max_seq_len": keys.max_position_embeddings,
        "d_model": keys.hidden_size,
        "num_layers": keys.num_hidden_layers,
        "num_heads": keys.num_attention_heads,
        "num_kv_heads": keys.num_key_value_heads or keys.num_attention_heads,
        "norm_eps": keys.rms_norm_eps,
        "d_ff": keys.intermediate_size,
        # Mistral and Qwen2 ignore these keys.
        "attention_bias": architecture in {"llama", "qwen3"} and keys.attention_bias,
        "qkv_bias": architecture == "qwen2",
        "mlp_bias": architecture == "llama" and keys.mlp_bias,
        "qk_norm": architecture == "qwen3",
    }
    return sizes if keys.head_dim is None else {**sizes, "head_dim": keys.head_dim}


def llama_problems(keys: LlamaKeys) -> list[str]:
    problems = _rope_problems(keys) + layer_type_problems(keys.layer_types, keys.num_hidden_layers)
    if keys.hidden_act not in _SILU:
        problems.append(f"hidden_act={keys.hidden_act!r} is not supported: it must be {' or '.join(_SILU)}.")
    if keys.attention_dropout:
        problems.append(
            f"attention_dropout={keys.attention_dropout}: dropout on attention weights alone is not "
            "supported. It affects training only: set it to 0 in a copy of the file."
        )
    return problems


def _rope_problems(keys: LlamaKeys) -> list[str]:
    """Options of rotary positions that distft does not support."""
    name = "rope_scaling" if keys.rope_scaling else "rope_parameters"
    given = getattr(keys, name) or {}
    if any(isinstance(value, Mapping) for value in given.values()):
        return [f"{name}={given}: rotary positions that differ by layer are not supported."]
    problems = rope_problems(given, name, keys.partial_rotary_factor)
    if "rope_theta" in keys.model_fields_set and keys.rope_theta is None and "rope_theta" not in given:
        problems.append("rope_theta=null is not a number: set one, such as 10000.0, or leave the key out.")
    return problems


def gpt2_sizes(keys: Gpt2Keys) -> dict[str, Any]:
    """Fields of `TransformerConfig`."""
    return {
        "max_seq_len": keys.n_positions,
        "d_model": keys.n_embd,
        "num_layers": keys.n_layer,
        "num_heads": keys.n_head,
        "norm": "layernorm",
        "norm_eps": keys.layer_norm_epsilon,
        "positions": "learned",
        "mlp": "gelu",
        "d_ff": keys.n_inner or 4 * keys.n_embd,
        "attention_bias": True,
        "mlp_bias": True,
        "dropout": keys.resid_pdrop,
    }


def gpt2_problems(keys: Gpt2Keys) -> list[str]:
    problems = []
    if keys.activation_function not in _TANH_GELU:
        problems.append(
            f"activation_function={keys.activation_function!r} is not supported: it must be "
            f"{' or '.join(_TANH_GELU)}."
        )
    if not keys.scale_attn_weights:
        problems.append("scale_attn_weights=false is not supported: it must be true.")
    if keys.scale_attn_by_inverse_layer_idx:
        problems.append("scale_attn_by_inverse_layer_idx=true is not supported: it must be false.")
    if keys.add_cross_attention:
        problems.append("add_cross_attention=true is not supported: distft's models have no encoder.")
    rates = {name: getattr(keys, name) for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop")}
    if len(set(rates.values())) > 1:
        given = ", ".join(f"{name}={rate}" for name, rate in rates.items())
        problems.append(
            f"{given}: different dropout rates are not supported. They affect training only: make them equal "
            "in a copy of the file."
        )
    return problems


def decoder_options(config: TransformerConfig, architecture: str) -> dict[str, Any]:
    """The values of settings that a model of this architecture, which is no encoder, must have."""
    is_gpt2 = architecture == "gpt2"
    required: dict[str, Any] = {
        "norm": "layernorm" if is_gpt2 else "rmsnorm",
        "positions": "learned" if is_gpt2 else "rotary",
        "mlp": "gelu" if is_gpt2 else "swiglu",
        "attention": "causal",
        "qk_norm": architecture == "qwen3",
        "norm_position": "pre",
        "embedding_norm": False,
        "position_offset": 0,
        "num_segments": 0,
        "lm_head_transform": False,
        "first_attention_norm": True,
        "local_rope_theta": None,
        "attention_logit_softcap": None,
        "final_logit_softcap": None,
    }
    if architecture in {"llama", "gpt2"}:
        required["sliding_window"] = None
    elif architecture == "mistral":  # a window in all layers, or in none
        required |= {"global_attention_every": None, "global_layers": ()}
    if is_gpt2:
        required["norm_bias"] = True
    if architecture != "llama":
        required["mlp_bias"] = is_gpt2
    if architecture in {"mistral", "qwen2", "gpt2"}:
        required["attention_bias"] = is_gpt2
    if architecture == "qwen2":
        required["qkv_bias"] = True
    elif not is_gpt2 and not config.attention_bias:  # attention_bias includes the biases of q, k and v
        required["qkv_bias"] = False
    return required


def gpt2_keys(config: TransformerConfig) -> dict[str, Any]:
    return {
        "n_positions": config.max_seq_len,
        "n_embd": config.d_model,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.d_ff,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.norm_eps,
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), config.dropout),
    }


def llama_keys(config: TransformerConfig, architecture: str) -> dict[str, Any]:
    rope = rope_keys(config.rope_theta, config.rope_scaling, config.head_dim)
    keys = {
        "max_position_embeddings": config.max_seq_len,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.d_ff,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": rope,
        **older_rope_keys(rope),
        "attention_dropout": 0.0,
    }
    if architecture in {"llama", "qwen3"}:
        keys["attention_bias"] = config.attention_bias
    if architecture == "llama":
        keys["mlp_bias"] = config.mlp_bias
    if architecture != "llama":
        keys["sliding_window"] = config.sliding_window
    if architecture in {"qwen2", "qwen3"}:
        keys["use_sliding_window"] = config.sliding_window is not None
        if config.sliding_window is not None:
            keys["layer_types"] = layer_types(config)
    return keys
