"""Maps `ModelConfig` to an architecture of transformers and its `config.json`. No files, no tensors.

A distft model can be a Llama, Mistral, Qwen2, Qwen3 or GPT-2 of transformers. Both the older spelling of a
key (`rope_theta`, `torch_dtype`) and the newer one (`rope_parameters`, `dtype`) are read and written.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from distft.errors import ConfigError
from distft.model.config import ModelConfig

# `model_type` of transformers
Architecture: TypeAlias = Literal["llama", "mistral", "qwen2", "qwen3", "gpt2"]
HeadKind: TypeAlias = Literal["language_model", "classifier", "none"]

_PREFERENCE_ORDER: tuple[Architecture, ...] = ("llama", "qwen2", "qwen3", "gpt2")
_CLASS_PREFIXES: dict[Architecture, str] = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gpt2": "GPT2",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class HuggingFaceModelSpec:
    """A model as its `config.json` describes it."""

    architecture: Architecture
    model: ModelConfig
    head: HeadKind
    label_names: tuple[str, ...] | None  # of a classifier, by class


def class_name(architecture: Architecture, head: HeadKind) -> str:
    """Name of the transformers class with this head."""
    language_model = "LMHeadModel" if architecture == "gpt2" else "ForCausalLM"
    suffix = {"language_model": language_model, "classifier": "ForSequenceClassification", "none": "Model"}
    return _CLASS_PREFIXES[architecture] + suffix[head]


def choose_architecture(config: ModelConfig, wanted: str | None = None) -> Architecture:
    """The first of Llama, Qwen2, Qwen3 and GPT-2 that supports `config`, or `wanted`.

    Raises `ConfigError` with each option that `wanted`, or the nearest architecture, does not support.
    """
    candidates = _PREFERENCE_ORDER
    if wanted is not None:
        known = {str(name): name for name in get_args(Architecture)}
        if wanted not in known:
            raise ConfigError(f"architecture={wanted!r} is not one of {', '.join(known)}.")
        candidates = (known[wanted],)
    problems = {name: _unsupported_options(config, name) for name in candidates}
    nearest = min(candidates, key=lambda name: len(problems[name]))
    if problems[nearest]:
        reason = (
            f"none of {', '.join(candidates)} supports it. The nearest is {nearest}, where"
            if wanted is None
            else f"{nearest} does not support it, as"
        )
        raise ConfigError(
            f"transformers cannot represent the model: {reason}\n" + "\n".join(problems[nearest])
        )
    return nearest


def _unsupported_options(config: ModelConfig, architecture: Architecture) -> list[str]:
    """Options that the architecture does not support, each with the value that it needs."""
    is_gpt2 = architecture == "gpt2"
    required: dict[str, Any] = {
        "norm": "layernorm" if is_gpt2 else "rmsnorm",
        "positions": "learned" if is_gpt2 else "rotary",
        "mlp": "gelu" if is_gpt2 else "swiglu",
        "attention": "causal",
        "qk_norm": architecture == "qwen3",
    }
    if architecture != "llama":
        required["mlp_bias"] = is_gpt2
    if architecture in {"mistral", "qwen2", "gpt2"}:
        required["attention_bias"] = is_gpt2
    if architecture == "qwen2":
        required["qkv_bias"] = True
    elif not is_gpt2 and not config.attention_bias:  # attention_bias includes the biases of q, k and v
        required["qkv_bias"] = False
    if is_gpt2:
        required["num_kv_heads"] = config.num_heads
        if config.head_dim * config.num_heads != config.d_model:
            required["head_dim"] = f"d_model / num_heads = {config.d_model / config.num_heads:g}"
    found = {name: getattr(config, name) for name in required}
    problems = [
        f"model.{name}={_yaml_text(found[name])} would have to be {_yaml_text(value)}."
        for name, value in required.items()
        if found[name] != value
    ]
    if architecture == "llama" and config.d_model % config.num_heads:
        problems.append(
            f"model.d_model={config.d_model} would have to be a multiple of num_heads={config.num_heads}; "
            "mistral (--architecture mistral), which is llama without biases, does not require that."
        )
    return problems


def _yaml_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def make_config(
    spec: HuggingFaceModelSpec, *, dtype: str, special_ids: Mapping[str, int | None]
) -> dict[str, Any]:
    """The `config.json` of a model; `special_ids` has the tokenizer's bos, eos and pad ids.

    Only GPT-2 gets the model's dropout: the other architectures have dropout on attention weights only.
    """
    config = spec.model
    common = {
        "architectures": [class_name(spec.architecture, spec.head)],
        "model_type": spec.architecture,
        "vocab_size": config.padded_vocab_size,
        "initializer_range": config.init_std if config.init_std is not None else config.d_model**-0.5,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,  # for transformers before 4.56
        **{f"{name}_token_id": special_ids.get(name) for name in ("bos", "eos", "pad")},
    }
    if spec.label_names is not None:
        common["id2label"] = {str(i): name for i, name in enumerate(spec.label_names)}
        common["label2id"] = {name: i for i, name in enumerate(spec.label_names)}
        common["problem_type"] = "single_label_classification"
    return common | (_gpt2_keys(config) if spec.architecture == "gpt2" else _llama_keys(spec))


def _gpt2_keys(config: ModelConfig) -> dict[str, Any]:
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


def _llama_keys(spec: HuggingFaceModelSpec) -> dict[str, Any]:
    config = spec.model
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
        "rope_theta": config.rope_theta,  # for transformers before 5
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_dropout": 0.0,
    }
    if spec.architecture in {"llama", "qwen3"}:
        keys["attention_bias"] = config.attention_bias
    if spec.architecture == "llama":
        keys["mlp_bias"] = config.mlp_bias
    if spec.architecture != "llama":
        keys["sliding_window"] = None
    if spec.architecture in {"qwen2", "qwen3"}:
        keys["use_sliding_window"] = False
    return keys
