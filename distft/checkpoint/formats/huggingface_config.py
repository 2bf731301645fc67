"""`config.json` of transformers: to a model's configuration, and written for one. No files, no tensors.

A distft model can be a Llama, Mistral, Qwen2, Qwen3, Mixtral, Qwen2-MoE, Qwen3-MoE, GPT-2, BERT, RoBERTa,
DistilBERT, ModernBERT or T5. Both the older spelling of a key (`rope_theta`, `torch_dtype`) and the newer one
(`rope_parameters`, `dtype`) are read and written.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from pydantic import ValidationError

from distft.checkpoint.formats.huggingface_decoders import (
    decoder_options,
    gpt2_keys,
    gpt2_problems,
    gpt2_sizes,
    llama_keys,
    llama_problems,
    llama_sizes,
)
from distft.checkpoint.formats.huggingface_encoders import (
    CLASSIFIER_LAYERS,
    ENCODERS,
    encoder_keys,
    encoder_problems,
    encoder_sizes,
    required_options,
)
from distft.checkpoint.formats.huggingface_experts import (
    MODELS_WITH_EXPERTS,
    expert_keys,
    expert_options,
    expert_problems,
    expert_sizes,
    unsupported_experts,
)
from distft.checkpoint.formats.huggingface_keys import (
    DEFAULTS,
    BertKeys,
    DistilBertKeys,
    ExpertKeys,
    Gpt2Keys,
    Keys,
    LlamaKeys,
    ModernBertKeys,
    T5Keys,
    named_as_in_file,
    with_own_names,
)
from distft.checkpoint.formats.huggingface_modernbert import POOLINGS
from distft.checkpoint.formats.huggingface_t5 import t5_keys, t5_options, t5_problems, t5_sizes
from distft.config import parse
from distft.errors import ConfigError
from distft.model.config import Pooling
from distft.model.encoder_decoder_config import EncoderDecoderConfig
from distft.model.transformer_config import TransformerConfig

# `model_type` of transformers
Architecture: TypeAlias = Literal[
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "gpt2",
    "bert",
    "roberta",
    "distilbert",
    "modernbert",
    "t5",
]
# The types of model that transformers has
KnownConfig: TypeAlias = TransformerConfig | EncoderDecoderConfig
HeadKind: TypeAlias = Literal["language_model", "classifier", "none"]

_WITH_EXPERTS: tuple[Architecture, ...] = ("mixtral", "qwen3_moe", "qwen2_moe")
_PREFERENCE_ORDER: tuple[Architecture, ...] = ("llama", "qwen2", "qwen3", "gpt2", *ENCODERS)
_WITHOUT_PAD_ROW = ("gpt2", "t5")  # whose embedding has no row for padding
_CLASS_PREFIXES: dict[Architecture, str] = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "mixtral": "Mixtral",
    "qwen2_moe": "Qwen2Moe",
    "qwen3_moe": "Qwen3Moe",
    "gpt2": "GPT2",
    "bert": "Bert",
    "roberta": "Roberta",
    "distilbert": "DistilBert",
    "modernbert": "ModernBert",
    "t5": "T5",
}
_KEYS: dict[Architecture, type[Keys]] = {
    "mixtral": ExpertKeys,
    "qwen2_moe": ExpertKeys,
    "qwen3_moe": ExpertKeys,
    "gpt2": Gpt2Keys,
    "bert": BertKeys,
    "roberta": BertKeys,
    "distilbert": DistilBertKeys,
    "modernbert": ModernBertKeys,
    "t5": T5Keys,
}  # of the others LlamaKeys


@dataclass(frozen=True, kw_only=True, slots=True)
class HuggingFaceModelSpec:
    """A model as its `config.json` describes it."""

    architecture: Architecture
    model: KnownConfig
    head: HeadKind
    label_names: tuple[str, ...] | None  # of a classifier, by class
    pooling: Pooling | None = None  # of a classifier, where its architecture has several

    @property
    def objective(self) -> dict[str, str] | None:
        """Settings of the objective whose head a classifier with a layer has; None: there is no such head."""
        layer = CLASSIFIER_LAYERS.get(self.architecture)
        if self.head != "classifier" or layer is None:
            return None
        pooling = self.pooling or classifier_poolings(self.architecture)[0]
        return {"type": "classification", "pooling": pooling, "hidden": layer}


def classifier_poolings(architecture: Architecture) -> tuple[Pooling, ...]:
    """How the classifiers of an architecture make one vector of a row's hidden states."""
    if architecture == "modernbert":
        return tuple(POOLINGS.values())
    return ("first",) if architecture in ENCODERS else ("last",)


def class_name(architecture: Architecture, head: HeadKind) -> str:
    """Name of the transformers class with this head."""
    language_model = "LMHeadModel" if architecture == "gpt2" else "ForCausalLM"
    if architecture in ENCODERS:
        language_model = "ForMaskedLM"
    if architecture == "t5":
        language_model = "ForConditionalGeneration"
    suffix = {"language_model": language_model, "classifier": "ForSequenceClassification", "none": "Model"}
    return _CLASS_PREFIXES[architecture] + suffix[head]


def parse_config(raw: Mapping[str, Any]) -> HuggingFaceModelSpec:
    """The model that a `config.json` describes. Raises `ConfigError` with every unsupported feature."""
    model_type = raw.get("model_type")
    architecture = next((name for name in get_args(Architecture) if name == model_type), None)
    if architecture is None:
        known = ", ".join(get_args(Architecture))
        raise ConfigError(f"model_type={model_type!r} is not supported: it must be one of {known}.")
    raw = with_own_names(raw, architecture)
    try:
        keys = _KEYS.get(architecture, LlamaKeys).model_validate({**DEFAULTS[architecture], **raw})
    except ValidationError as error:
        raise ConfigError(
            "\n".join(
                f"{'.'.join(map(str, found['loc']))}={repr(found['input'])[:100]}: {found['msg'].lower()}."
                for found in error.errors(include_url=False)
            )
        ) from None
    head, problems = _parse_head(keys, architecture)
    sizes, size_problems = _sizes_and_problems(keys, architecture, head)
    problems += size_problems
    if architecture not in _WITHOUT_PAD_ROW and not _is_id(raw.get("pad_token_id"), keys.vocab_size):
        problems.append(
            f"pad_token_id={raw['pad_token_id']} is not an id of vocab_size={keys.vocab_size}: set one of "
            "its ids, or null."
        )
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
    kind: type[KnownConfig] = EncoderDecoderConfig if architecture == "t5" else TransformerConfig
    try:
        model: KnownConfig = parse(kind, common | sizes, where="model")
    except ConfigError as error:
        raise ConfigError(named_as_in_file(str(error), architecture)) from None
    # transformers leaves names of its own making out of a config.json.
    names = keys.id2label or {0: "LABEL_0", 1: "LABEL_1"}
    labels = tuple(names[index] for index in sorted(names)) if head == "classifier" else None
    pooling = POOLINGS[keys.classifier_pooling] if labels and isinstance(keys, ModernBertKeys) else None
    return HuggingFaceModelSpec(
        architecture=architecture, model=model, head=head, label_names=labels, pooling=pooling
    )


def _is_id(value: Any, vocab_size: int) -> bool:
    """Whether transformers accepts it for padding: negative ids count from the end."""
    return value is None or (isinstance(value, int) and -vocab_size <= value < vocab_size)


def _sizes_and_problems(
    keys: Keys, architecture: Architecture, head: HeadKind
) -> tuple[dict[str, Any], list[str]]:
    """Fields of the model's configuration, and options that distft does not support."""
    if isinstance(keys, T5Keys):
        return t5_sizes(keys), t5_problems(keys)
    if isinstance(keys, Gpt2Keys):
        return gpt2_sizes(keys), gpt2_problems(keys)
    if isinstance(keys, ExpertKeys):
        return expert_sizes(keys, architecture), expert_problems(keys, architecture)
    if isinstance(keys, LlamaKeys):
        return llama_sizes(keys, architecture), llama_problems(keys)
    assert isinstance(keys, BertKeys | DistilBertKeys | ModernBertKeys)
    assert architecture in ENCODERS
    return encoder_sizes(keys, architecture), encoder_problems(keys, architecture, head=head)


def _parse_head(keys: Keys, architecture: Architecture) -> tuple[HeadKind, list[str]]:
    """The model's head, from its class in `architectures` (default: a language model), and problems."""
    classes: dict[str, HeadKind] = {class_name(architecture, kind): kind for kind in get_args(HeadKind)}
    if architecture == "t5":  # its classifier reads a hidden state that distft's have not
        del classes["T5ForSequenceClassification"]
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


def choose_architecture(config: KnownConfig, wanted: str | None = None) -> Architecture:
    """The first of Llama, Qwen2, Qwen3 and GPT-2 that supports `config`, or `wanted`.

    Raises `ConfigError` with each option that `wanted`, or the nearest architecture, does not support.
    """
    candidates: tuple[Architecture, ...] = _PREFERENCE_ORDER
    if isinstance(config, EncoderDecoderConfig):
        candidates = ("t5",)
    elif config.experts is not None:
        candidates = _WITH_EXPERTS
    elif config.sliding_window is not None:
        candidates = ("mistral", *candidates)
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


def _unsupported_options(config: KnownConfig, architecture: Architecture) -> list[str]:
    """Options that the architecture does not support, each with the value that it needs."""
    if isinstance(config, EncoderDecoderConfig) != (architecture == "t5"):
        needed = "encoder_decoder" if architecture == "t5" else "transformer"
        return [f"model.type={config.type} would have to be {needed}."]
    if isinstance(config, EncoderDecoderConfig):
        required = t5_options(config)
    elif architecture in ENCODERS:
        required = required_options(config, architecture)
    elif architecture in MODELS_WITH_EXPERTS:
        required = expert_options(config, architecture)
    else:
        required = decoder_options(config, architecture)
    if isinstance(config, TransformerConfig) and architecture in {"gpt2", *ENCODERS}:
        required["num_kv_heads"] = config.num_heads
        if config.head_dim * config.num_heads != config.d_model:
            required["head_dim"] = f"d_model / num_heads = {config.d_model / config.num_heads:g}"
    found = {name: getattr(config, name) for name in required}
    problems = [
        f"model.{name}={_yaml_text(found[name])} would have to be {_yaml_text(value)}."
        for name, value in required.items()
        if found[name] != value
    ]
    if isinstance(config, TransformerConfig):
        problems += unsupported_experts(config, architecture)
    if architecture == "llama" and config.d_model % config.num_heads:
        problems.append(
            f"model.d_model={config.d_model} would have to be a multiple of num_heads={config.num_heads}; "
            "mistral (--architecture mistral), which is llama without biases, does not require that."
        )
    return problems


def _yaml_text(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def make_config(
    spec: HuggingFaceModelSpec, *, dtype: str, special_ids: Mapping[str, int | None]
) -> dict[str, Any]:
    """The `config.json` of a model; `special_ids` has the tokenizer's bos, eos and pad ids.

    Only GPT-2 and the encoders get the model's dropout: the others have dropout on attention weights only.
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
    if isinstance(config, EncoderDecoderConfig):
        return common | t5_keys(config)
    if spec.architecture == "gpt2":
        return common | gpt2_keys(config)
    if spec.architecture in ENCODERS:
        return common | encoder_keys(config, spec.architecture, spec.pooling)
    if spec.architecture in MODELS_WITH_EXPERTS:
        return common | expert_keys(config, spec.architecture)
    return common | llama_keys(config, spec.architecture)
