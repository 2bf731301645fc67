"""The keys of `config.json` that distft looks at, with their types and the defaults of transformers 5.23."""

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from distft.errors import ConfigError

# Modules without memory are built to learn the shapes: more layers than any model has would take minutes.
_Layers = Annotated[int, Field(ge=0, le=2000)]
_Size = Annotated[int, Field(ge=0, le=1 << 28)]


class Keys(BaseModel):
    """Keys of all architectures, with the defaults of transformers 5.23."""

    model_config = ConfigDict(extra="ignore", strict=True)  # a number in quotes is none

    vocab_size: _Size = 32000
    initializer_range: float | None = 0.02
    tie_word_embeddings: bool = False
    architectures: list[str] | None = None
    problem_type: str | None = None
    id2label: dict[Annotated[int, Field(strict=False)], str] | None = None  # keys of JSON are texts
    quantization_config: Any = None
    auto_map: Any = None


class LlamaKeys(Keys):
    hidden_size: _Size = 4096
    intermediate_size: _Size = 22016
    num_hidden_layers: _Layers = 32
    num_attention_heads: _Size = 32
    num_key_value_heads: _Size | None = None  # None: num_attention_heads
    head_dim: _Size | None = None  # None: hidden_size / num_attention_heads
    hidden_act: str = "silu"
    max_position_embeddings: _Size = 32768
    rms_norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: _Size | None = None
    use_sliding_window: bool = False
    max_window_layers: _Size = 28
    layer_types: list[str] | None = None
    rope_theta: float | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    partial_rotary_factor: float | None = None


class ExpertKeys(LlamaKeys):
    num_local_experts: _Size | None = None  # None: num_experts
    num_experts: _Size = 8
    num_experts_per_tok: _Size = 2
    moe_intermediate_size: _Size = 1408
    shared_expert_intermediate_size: _Size = 5632
    norm_topk_prob: bool = False
    decoder_sparse_step: _Size = 1
    mlp_only_layers: list[int] | None = None
    router_aux_loss_coef: float = 0.001
    router_jitter_noise: float = 0.0
    qkv_bias: bool = True


class Gpt2Keys(Keys):
    vocab_size: _Size = 50257
    n_positions: _Size = 1024
    n_embd: _Size = 768
    n_layer: _Layers = 12
    n_head: _Size = 12
    n_inner: _Size | None = None  # None: 4 * n_embd
    activation_function: str = "gelu_new"
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    tie_word_embeddings: bool = True
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    add_cross_attention: bool = False


class _EncoderKeys(Keys):
    vocab_size: _Size = 30522
    tie_word_embeddings: bool = True
    max_position_embeddings: _Size = 512


class BertKeys(_EncoderKeys):
    hidden_size: _Size = 768
    num_hidden_layers: _Layers = 12
    num_attention_heads: _Size = 12
    intermediate_size: _Size = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    type_vocab_size: _Size = 2
    layer_norm_eps: float = 1e-12
    pad_token_id: _Size = 0  # None: 0
    position_embedding_type: str = "absolute"  # of transformers before 5
    is_decoder: bool = False
    add_cross_attention: bool = False

    @field_validator("pad_token_id", mode="before")
    @classmethod
    def _without_padding(cls, value: Any) -> Any:
        return 0 if value is None else value


class ModernBertKeys(_EncoderKeys):
    vocab_size: _Size = 50368
    hidden_size: _Size = 768
    num_hidden_layers: _Layers = 22
    num_attention_heads: _Size = 12
    intermediate_size: _Size = 1152
    hidden_activation: str = "gelu"
    max_position_embeddings: _Size = 8192
    norm_eps: float = 1e-5
    norm_bias: bool = False
    attention_bias: bool = False
    attention_dropout: float = 0.0
    layer_types: list[str] | None = None
    rope_parameters: dict[str, dict[str, Any] | None] | None = None
    rope_scaling: dict[str, Any] | None = None  # of transformers before 5, as the next three
    global_attn_every_n_layers: Annotated[int, Field(ge=1, le=2000)] = 3
    global_rope_theta: float | None = 160_000.0
    local_rope_theta: float | None = 10_000.0
    local_attention: _Size = 128
    embedding_dropout: float = 0.0
    mlp_bias: bool = False
    mlp_dropout: float = 0.0
    decoder_bias: bool = True
    classifier_bias: bool = False
    classifier_activation: str = "gelu"
    classifier_pooling: str = "cls"


class T5Keys(Keys):
    vocab_size: _Size = 32128
    d_model: _Size = 512
    d_kv: _Size = 64
    d_ff: _Size = 2048
    num_layers: _Layers = 6
    num_decoder_layers: _Layers | None = None  # None: num_layers
    num_heads: _Size = 8
    relative_attention_num_buckets: _Size = 32
    relative_attention_max_distance: _Size = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool | None = None  # None: tie_word_embeddings
    n_positions: _Size | None = None  # of older files: tokens of a source
    pad_token_id: _Size | None = 0
    decoder_start_token_id: _Size | None = None  # None: pad_token_id
    is_decoder: bool = False


class DistilBertKeys(_EncoderKeys):
    dim: _Size = 768
    n_layers: _Layers = 6
    n_heads: _Size = 12
    hidden_dim: _Size = 3072
    activation: str = "gelu"
    dropout: float = 0.1
    attention_dropout: float = 0.1


# Other names of keys, which transformers reads too (`attribute_map`).
ALIASES: Mapping[str, Mapping[str, str]] = {
    "gpt2": {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
    "distilbert": {"hidden_size": "dim", "num_attention_heads": "n_heads", "num_hidden_layers": "n_layers"},
    "t5": {
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "head_dim": "d_kv",
    },
    "mixtral": {"num_experts": "num_local_experts"},
    "qwen3_moe": {"num_local_experts": "num_experts"},
}
# The keys that distft's settings are of, for messages; without an entry the names are the same.
_LLAMA_NAMES = {
    "d_model": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "d_ff": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
    "experts.num_experts": "num_experts",
    "experts.experts_per_token": "num_experts_per_tok",
    "experts_per_token": "num_experts_per_tok",
    "experts.d_ff": "moe_intermediate_size",
    "experts.every": "decoder_sparse_step",
    "experts.dense_layers": "mlp_only_layers",
    "experts.shared_d_ff": "shared_expert_intermediate_size",
    "experts.load_balance_weight": "router_aux_loss_coef",
}
_BERT_NAMES = _LLAMA_NAMES | {
    "norm_eps": "layer_norm_eps",
    "dropout": "hidden_dropout_prob",
    "num_segments": "type_vocab_size",
}
FILE_NAMES: Mapping[str, Mapping[str, str]] = {
    "gpt2": {
        "d_model": "n_embd",
        "num_layers": "n_layer",
        "num_heads": "n_head",
        "d_ff": "n_inner",
        "max_seq_len": "n_positions",
        "norm_eps": "layer_norm_epsilon",
        "dropout": "resid_pdrop",
        "init_std": "initializer_range",
    },
    "bert": _BERT_NAMES,
    "roberta": _BERT_NAMES,
    "distilbert": {
        "d_model": "dim",
        "num_layers": "n_layers",
        "num_heads": "n_heads",
        "d_ff": "hidden_dim",
        "max_seq_len": "max_position_embeddings",
        "init_std": "initializer_range",
    },
    "modernbert": {**_LLAMA_NAMES, "norm_eps": "norm_eps", "sliding_window": "local_attention"},
    "mixtral": {
        **_LLAMA_NAMES,
        "experts.num_experts": "num_local_experts",
        "num_experts": "num_local_experts",
    },
    "t5": {
        "num_encoder_layers": "num_layers",
        "head_dim": "d_kv",
        "norm_eps": "layer_norm_epsilon",
        "num_buckets": "relative_attention_num_buckets",
        "max_distance": "relative_attention_max_distance",
        "start_id": "decoder_start_token_id",
        "dropout": "dropout_rate",
        "max_seq_len": "n_positions",
    },
}  # of the others _LLAMA_NAMES


def named_as_in_file(message: str, architecture: str) -> str:
    """A message about distft's settings, with the keys of config.json in their place."""
    names = FILE_NAMES.get(architecture, _LLAMA_NAMES)
    longest_first = sorted(names, key=len, reverse=True)
    known = "|".join(map(re.escape, longest_first))
    renamed = re.sub(rf"\b(?:model\.)?({known})(?==)", lambda found: names[found[1]], message)
    return re.sub(r"\bmodel(\.|: )", "", renamed)


def with_own_names(raw: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """The keys of a config.json under the names of `Keys`. Raises `ConfigError` if two names contradict."""
    own, problems = dict(raw), []
    for alias, name in ALIASES.get(architecture, {}).items():
        value = own.pop(alias, None)
        if value is None:
            continue
        if own.setdefault(name, value) != value:
            problems.append(
                f"{alias}={value!r} and {name}={own[name]!r} are the same setting of {architecture}: leave "
                "one out."
            )
    if problems:
        raise ConfigError("\n".join(problems))
    return own


_QWEN = {"vocab_size": 151936, "sliding_window": 4096, "num_key_value_heads": 32}
_QWEN_WITH_EXPERTS = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "sliding_window": 4096,
}
DEFAULTS: Mapping[str, dict[str, Any]] = {  # where they differ from those above
    "llama": {"intermediate_size": 11008, "max_position_embeddings": 2048},
    "mistral": {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
        "sliding_window": 4096,
    },
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
    "mixtral": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
    },
    "qwen2_moe": {
        **_QWEN_WITH_EXPERTS,
        "intermediate_size": 5632,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
    },
    "qwen3_moe": {
        **_QWEN_WITH_EXPERTS,
        "intermediate_size": 6144,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    "gpt2": {},
    "bert": {},
    "roberta": {"vocab_size": 50265, "pad_token_id": 1},
    "distilbert": {},
    "modernbert": {},
    "t5": {},
}
