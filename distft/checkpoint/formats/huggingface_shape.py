"""Between our `ModelConfig` and the `config.json` of transformers. Pure functions: no files, no tensors.

Ours can be the Llama, Mistral, Qwen2, Qwen3 and GPT-2 of transformers. Both the older spelling of a key
(`rope_theta`, `torch_dtype`) and the newer one (`rope_parameters`, `dtype`) are read, and written.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from distft.errors import ConfigError
from distft.model.config import ModelConfig

Architecture: TypeAlias = Literal["llama", "mistral", "qwen2", "qwen3", "gpt2"]  # their `model_type`
HeadKind: TypeAlias = Literal["language_model", "classifier", "none"]

_CHOSEN_IN_ORDER: tuple[Architecture, ...] = ("llama", "qwen2", "qwen3", "gpt2")
_CLASS_PREFIXES: dict[Architecture, str] = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gpt2": "GPT2",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class HuggingFaceShape:
    """What a `config.json` says of a model."""

    architecture: Architecture
    model: ModelConfig
    head: HeadKind
    label_names: tuple[str, ...] | None  # of a classifier, by class


def class_name(architecture: Architecture, head: HeadKind) -> str:
    """The class of transformers that has this head."""
    language_model = "LMHeadModel" if architecture == "gpt2" else "ForCausalLM"
    suffix = {"language_model": language_model, "classifier": "ForSequenceClassification", "none": "Model"}
    return _CLASS_PREFIXES[architecture] + suffix[head]


def choose_architecture(config: ModelConfig, wanted: str | None = None) -> Architecture:
    """The first of Llama, Qwen2, Qwen3 and GPT-2 that `config` is one of, or the one that is wanted.

    Raises `ConfigError` with each option that does not fit: of the one that is wanted, or of the nearest.
    """
    candidates = _CHOSEN_IN_ORDER
    if wanted is not None:
        known = {str(name): name for name in get_args(Architecture)}
        if wanted not in known:
            raise ConfigError(f"architecture={wanted!r} is not one of {', '.join(known)}.")
        candidates = (known[wanted],)
    faults = {name: _misfits(config, name) for name in candidates}
    nearest = min(candidates, key=lambda name: len(faults[name]))
    if faults[nearest]:
        none_of = f"none of {', '.join(candidates)}, of which the nearest is {nearest}"
        raise ConfigError(
            "The model cannot be written for transformers: it is "
            f"{none_of if wanted is None else f'no {nearest}'}, as\n" + "\n".join(faults[nearest])
        )
    return nearest


def _misfits(config: ModelConfig, architecture: Architecture) -> list[str]:
    """Options that the architecture does not have, each with the value that it would have."""
    is_gpt2 = architecture == "gpt2"
    wanted: dict[str, Any] = {
        "norm": "layernorm" if is_gpt2 else "rmsnorm",
        "positions": "learned" if is_gpt2 else "rotary",
        "mlp": "gelu" if is_gpt2 else "swiglu",
        "attention": "causal",
        "qk_norm": architecture == "qwen3",
    }
    if architecture != "llama":
        wanted["mlp_bias"] = is_gpt2
    if architecture in {"mistral", "qwen2", "gpt2"}:
        wanted["attention_bias"] = is_gpt2
    if architecture == "qwen2":
        wanted["qkv_bias"] = True
    elif not is_gpt2 and not config.attention_bias:  # which includes that of q, k and v
        wanted["qkv_bias"] = False
    if is_gpt2:
        wanted["num_kv_heads"] = config.num_heads
        if config.head_dim * config.num_heads != config.d_model:
            wanted["head_dim"] = f"d_model / num_heads = {config.d_model / config.num_heads:g}"
    found = {name: getattr(config, name) for name in wanted}
    faults = [
        f"model.{name}={_text(found[name])} would have to be {_text(value)}."
        for name, value in wanted.items()
        if found[name] != value
    ]
    if architecture == "llama" and config.d_model % config.num_heads:
        faults.append(
            f"model.d_model={config.d_model} would have to be a multiple of num_heads={config.num_heads}; "
            "the mistral of transformers, which is the same without biases, needs no multiple."
        )
    return faults


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def write_shape(
    shape: HuggingFaceShape, *, dtype: str, special_ids: Mapping[str, int | None]
) -> dict[str, Any]:
    """The `config.json` for a model of ours; `special_ids` has its bos, eos and pad.

    Dropout is GPT-2's alone: the others have it on attention weights only, so theirs is zero.
    """
    config = shape.model
    common = {
        "architectures": [class_name(shape.architecture, shape.head)],
        "model_type": shape.architecture,
        "vocab_size": config.padded_vocab_size,
        "initializer_range": config.init_std if config.init_std is not None else config.d_model**-0.5,
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,  # what transformers before 4.56 reads
        **{f"{name}_token_id": special_ids.get(name) for name in ("bos", "eos", "pad")},
    }
    if shape.label_names is not None:
        common["id2label"] = {str(i): name for i, name in enumerate(shape.label_names)}
        common["label2id"] = {name: i for i, name in enumerate(shape.label_names)}
        common["problem_type"] = "single_label_classification"
    return common | (_gpt2_keys(config) if shape.architecture == "gpt2" else _llama_keys(shape))


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


def _llama_keys(shape: HuggingFaceShape) -> dict[str, Any]:
    config = shape.model
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
        "rope_theta": config.rope_theta,  # what transformers before 5 reads
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_dropout": 0.0,
    }
    if shape.architecture in {"llama", "qwen3"}:
        keys["attention_bias"] = config.attention_bias
    if shape.architecture == "llama":
        keys["mlp_bias"] = config.mlp_bias
    if shape.architecture != "llama":
        keys["sliding_window"] = None
    if shape.architecture in {"qwen2", "qwen3"}:
        keys["use_sliding_window"] = False
    return keys
