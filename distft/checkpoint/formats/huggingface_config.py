"""`config.json` of transformers: to a `TransformerConfig`, chosen and written for one. No files, no tensors.

A distft model can be a Llama, Mistral, Qwen2, Qwen3, GPT-2, BERT, RoBERTa or DistilBERT. Both the older spelling of a
key (`rope_theta`, `torch_dtype`) and the newer one (`rope_parameters`, `dtype`) are read and written.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from pydantic import ValidationError

from distft.checkpoint.formats.huggingface_encoders import (
    CLASSIFIER_LAYERS,
    ENCODERS,
    encoder_keys,
    encoder_problems,
    encoder_sizes,
    required_options,
)
from distft.checkpoint.formats.huggingface_keys import (
    DEFAULTS,
    BertKeys,
    DistilBertKeys,
    Gpt2Keys,
    Keys,
    LlamaKeys,
)
from distft.config import parse
from distft.errors import ConfigError
from distft.model.transformer_config import TransformerConfig

# `model_type` of transformers
Architecture: TypeAlias = Literal[
    "llama", "mistral", "qwen2", "qwen3", "gpt2", "bert", "roberta", "distilbert"
]
HeadKind: TypeAlias = Literal["language_model", "classifier", "none"]

_PREFERENCE_ORDER: tuple[Architecture, ...] = ("llama", "qwen2", "qwen3", "gpt2", *ENCODERS)
_CLASS_PREFIXES: dict[Architecture, str] = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gpt2": "GPT2",
    "bert": "Bert",
    "roberta": "Roberta",
    "distilbert": "DistilBert",
}
_KEYS: dict[Architecture, type[Keys]] = {
    "gpt2": Gpt2Keys,
    "bert": BertKeys,
    "roberta": BertKeys,
    "distilbert": DistilBertKeys,
}  # of the others LlamaKeys
_SILU = ("silu", "swish")
_TANH_GELU = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh")
_DEFAULT_ROPE_THETA = 10_000.0


@dataclass(frozen=True, kw_only=True, slots=True)
class HuggingFaceModelSpec:
    """A model as its `config.json` describes it."""

    architecture: Architecture
    model: TransformerConfig
    head: HeadKind
    label_names: tuple[str, ...] | None  # of a classifier, by class

    @property
    def objective(self) -> dict[str, str] | None:
        """Settings of the objective whose head a classifier with a layer has; None: there is no such head."""
        layer = CLASSIFIER_LAYERS.get(self.architecture)
        if self.head != "classifier" or layer is None:
            return None
        return {"type": "classification", "pooling": classifier_pooling(self.architecture), "hidden": layer}


def classifier_pooling(architecture: Architecture) -> Literal["first", "last"]:
    """How the classifiers of an architecture make one vector of a row's hidden states."""
    return "first" if architecture in ENCODERS else "last"


def class_name(architecture: Architecture, head: HeadKind) -> str:
    """Name of the transformers class with this head."""
    language_model = "LMHeadModel" if architecture == "gpt2" else "ForCausalLM"
    if architecture in ENCODERS:
        language_model = "ForMaskedLM"
    suffix = {"language_model": language_model, "classifier": "ForSequenceClassification", "none": "Model"}
    return _CLASS_PREFIXES[architecture] + suffix[head]


def parse_config(raw: Mapping[str, Any]) -> HuggingFaceModelSpec:
    """The model that a `config.json` describes. Raises `ConfigError` with every unsupported feature."""
    model_type = raw.get("model_type")
    architecture = next((name for name in get_args(Architecture) if name == model_type), None)
    if architecture is None:
        known = ", ".join(get_args(Architecture))
        raise ConfigError(f"model_type={model_type!r} is not supported: it must be one of {known}.")
    try:
        keys = _KEYS.get(architecture, LlamaKeys).model_validate({**DEFAULTS[architecture], **raw})
    except ValidationError as error:
        raise ConfigError(
            "\n".join(
                f"{'.'.join(map(str, found['loc']))}={str(found['input'])[:100]!r}: {found['msg'].lower()}."
                for found in error.errors(include_url=False)
            )
        ) from None
    head, problems = _parse_head(keys, architecture)
    sizes, size_problems = _sizes_and_problems(keys, architecture, head)
    problems += size_problems
    if keys.quantization_config:
        problems.append("quantization_config: quantized weights are not supported; save them in bf16.")
    if keys.auto_map:
        problems.append("auto_map: the model has code of its own, which distft does not run.")
    if problems:
        raise ConfigError("\n".join(problems))
    common = {
        "vocab_size": keys.vocab_size,
        "tie_embeddings": keys.tie_word_embeddings,
        "init_std": keys.initializer_range or 0.02,
    }
    model: TransformerConfig = parse(TransformerConfig, common | sizes, where="model")
    # transformers leaves names of its own making out of a config.json.
    names = keys.id2label or {0: "LABEL_0", 1: "LABEL_1"}
    labels = tuple(names[index] for index in sorted(names)) if head == "classifier" else None
    return HuggingFaceModelSpec(architecture=architecture, model=model, head=head, label_names=labels)


def _sizes_and_problems(
    keys: Keys, architecture: Architecture, head: HeadKind
) -> tuple[dict[str, Any], list[str]]:
    """Fields of `TransformerConfig`, and options that distft does not support."""
    if isinstance(keys, Gpt2Keys):
        return _gpt2_sizes(keys), _gpt2_problems(keys)
    if isinstance(keys, LlamaKeys):
        return _llama_sizes(keys, architecture), _llama_problems(keys, architecture)
    assert isinstance(keys, BertKeys | DistilBertKeys)
    assert architecture in ENCODERS
    is_language_model = head == "language_model"
    problems = encoder_problems(keys, architecture, is_language_model=is_language_model)
    return encoder_sizes(keys, architecture), problems


def _parse_head(keys: Keys, architecture: Architecture) -> tuple[HeadKind, list[str]]:
    """The model's head, from its class in `architectures` (default: a language model), and problems."""
    classes: dict[str, HeadKind] = {class_name(architecture, kind): kind for kind in get_args(HeadKind)}
    if architecture == "bert":
        classes["BertForPreTraining"] = "language_model"
    named = keys.architectures[0] if keys.architectures else class_name(architecture, "language_model")
    if named not in classes:
        given = keys.architectures
        return "none", [f"architectures={given} is not supported: it must be one of {', '.join(classes)}."]
    head: HeadKind = classes[named]
    problem = keys.problem_type
    if head == "classifier" and problem not in {None, "single_label_classification"}:
        return head, [f"problem_type={problem!r} is not supported: it must be single_label_classification."]
    return head, []


def _llama_sizes(keys: LlamaKeys, architecture: Architecture) -> dict[str, Any]:
    """Fields of `TransformerConfig`."""
    given = keys.rope_scaling or keys.rope_parameters or {}
    theta = given.get("rope_theta", keys.rope_theta)
    sizes = {
        "max_seq_len": keys.max_position_embeddings,
        "d_model": keys.hidden_size,
        "num_layers": keys.num_hidden_layers,
        "num_heads": keys.num_attention_heads,
        "num_kv_heads": keys.num_key_value_heads or keys.num_attention_heads,
        "norm_eps": keys.rms_norm_eps,
        "rope_theta": _DEFAULT_ROPE_THETA if theta is None else theta,
        "d_ff": keys.intermediate_size,
        # Mistral and Qwen2 ignore these keys.
        "attention_bias": architecture in {"llama", "qwen3"} and keys.attention_bias,
        "qkv_bias": architecture == "qwen2",
        "mlp_bias": architecture == "llama" and keys.mlp_bias,
        "qk_norm": architecture == "qwen3",
    }
    return sizes if keys.head_dim is None else {**sizes, "head_dim": keys.head_dim}


def _llama_problems(keys: LlamaKeys, architecture: Architecture) -> list[str]:
    problems = [*_rope_problems(keys), *_sliding_window_problems(keys, architecture)]
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
    problems = []
    kind = given.get("rope_type", given.get("type", "default"))
    if kind != "default":
        problems.append(f"{name}={given}: rotary positions of type {kind!r} are not supported.")
    factors = {"": keys.partial_rotary_factor, f"{name}.": given.get("partial_rotary_factor")}
    problems += [
        f"{prefix}partial_rotary_factor={factor} is not supported: it must be 1."
        for prefix, factor in factors.items()
        if factor not in (None, 1)
    ]
    return problems


def _sliding_window_problems(keys: LlamaKeys, architecture: Architecture) -> list[str]:
    """Problems of a sliding window that is shorter than the longest row."""
    window, longest = keys.sliding_window, keys.max_position_embeddings
    if architecture == "llama" or window is None or window >= longest:
        return []
    if architecture in {"qwen2", "qwen3"}:
        is_windowed = keys.num_hidden_layers > keys.max_window_layers
        if keys.layer_types is not None:
            is_windowed = "sliding_attention" in keys.layer_types
        if not keys.use_sliding_window or not is_windowed:
            return []
    return [
        f"sliding_window={window} is less than max_position_embeddings={longest}, but distft's attention has "
        f"no window. Rows of up to {window} tokens need none: set max_position_embeddings to {window} in a "
        "copy of the file."
    ]


def _gpt2_sizes(keys: Gpt2Keys) -> dict[str, Any]:
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


def _gpt2_problems(keys: Gpt2Keys) -> list[str]:
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


def choose_architecture(config: TransformerConfig, wanted: str | None = None) -> Architecture:
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


def _unsupported_options(config: TransformerConfig, architecture: Architecture) -> list[str]:
    """Options that the architecture does not support, each with the value that it needs."""
    is_gpt2 = architecture == "gpt2"
    has_heads_of_gpt2 = is_gpt2 or architecture in ENCODERS
    required: dict[str, Any]
    if architecture in ENCODERS:
        required = required_options(config, architecture)
    else:
        required = _options_of_decoders(config, architecture)
    if has_heads_of_gpt2:
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


def _options_of_decoders(config: TransformerConfig, architecture: Architecture) -> dict[str, Any]:
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
    }
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


def _yaml_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def make_config(
    spec: HuggingFaceModelSpec, *, dtype: str, special_ids: Mapping[str, int | None]
) -> dict[str, Any]:
    """The `config.json` of a model; `special_ids` has the tokenizer's bos, eos and pad ids.

    Only GPT-2 and the encoders get the model's dropout: the other architectures have dropout on attention weights only.
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
    if spec.architecture == "gpt2":
        return common | _gpt2_keys(config)
    if spec.architecture in ENCODERS:
        return common | encoder_keys(config, spec.architecture)
    return common | _llama_keys(spec)


def _gpt2_keys(config: TransformerConfig) -> dict[str, Any]:
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
