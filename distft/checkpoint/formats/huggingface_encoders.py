"""The encoders of transformers: BERT and its relatives. What sets their config.json and names apart.

Their classifiers have a layer over the first token's hidden state, and their language models one before the
logits.
"""

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, get_args

from distft.checkpoint.formats import huggingface_modernbert as modernbert
from distft.checkpoint.formats.huggingface_keys import BertKeys, DistilBertKeys, ModernBertKeys
from distft.model.heads import HiddenLayer
from distft.model.transformer_config import TransformerConfig

EncoderArchitecture: TypeAlias = Literal["bert", "roberta", "distilbert", "modernbert"]
ENCODERS: tuple[EncoderArchitecture, ...] = get_args(EncoderArchitecture)
CLASSIFIER_LAYERS: Mapping[str, HiddenLayer] = {
    "bert": "tanh",
    "roberta": "tanh",
    "distilbert": "relu",
    "modernbert": "gelu_norm",
}

_ROBERTA_OFFSET = 2  # the id of its padding, and one
_DISTILBERT_EPS = 1e-12
_GELUS = {
    "gelu": "gelu_exact",
    "gelu_python": "gelu_exact",
    "gelu_new": "gelu",
    "gelu_fast": "gelu",
    "gelu_pytorch_tanh": "gelu",
}

_BERT_BLOCK = {
    "attn.q": "attention.self.query",
    "attn.k": "attention.self.key",
    "attn.v": "attention.self.value",
    "attn.o": "attention.output.dense",
    "attn_norm": "attention.output.LayerNorm",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
_DISTILBERT_BLOCK = {
    "attn.q": "attention.q_lin",
    "attn.k": "attention.k_lin",
    "attn.v": "attention.v_lin",
    "attn.o": "attention.out_lin",
    "attn_norm": "sa_layer_norm",
    "mlp.up": "ffn.lin1",
    "mlp.down": "ffn.lin2",
    "mlp_norm": "output_layer_norm",
}
_HEADS: Mapping[str, Mapping[str, str]] = {
    "bert": {
        "lm_head": "cls.predictions",
        "lm_head.dense": "cls.predictions.transform.dense",
        "lm_head.norm": "cls.predictions.transform.LayerNorm",
        "classifier.hidden": "bert.pooler.dense",
        "classifier.output": "classifier",
    },
    "roberta": {
        "lm_head": "lm_head",
        "lm_head.dense": "lm_head.dense",
        "lm_head.norm": "lm_head.layer_norm",
        "classifier.hidden": "classifier.dense",
        "classifier.output": "classifier.out_proj",
    },
    "distilbert": {
        "lm_head": "vocab_projector",
        "lm_head.dense": "vocab_transform",
        "lm_head.norm": "vocab_layer_norm",
        "classifier.hidden": "pre_classifier",
        "classifier.output": "classifier",
    },
}
# Copies of tied tensors that a file may have, and what each is a copy of; None: of the embedding.
TIED_COPIES: Mapping[str, Mapping[str, str | None]] = {
    "bert": {
        "cls.predictions.decoder.weight": None,
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    "roberta": {"lm_head.decoder.weight": None, "lm_head.decoder.bias": "lm_head.bias"},
    "distilbert": {"vocab_projector.weight": None},
    "modernbert": modernbert.TIED_COPIES,
}


def encoder_modules(architecture: EncoderArchitecture) -> Mapping[str, str]:
    """The names of transformers by those of distft's modules; those of a block are relative to it."""
    if architecture == "modernbert":
        return modernbert.MODULES
    return {
        "embed": f"{architecture}.embeddings.word_embeddings",
        "position_embed": f"{architecture}.embeddings.position_embeddings",
        "segment_embed": f"{architecture}.embeddings.token_type_embeddings",
        "embed_norm": f"{architecture}.embeddings.LayerNorm",
        **(_DISTILBERT_BLOCK if architecture == "distilbert" else _BERT_BLOCK),
        **_HEADS[architecture],
    }


def encoder_layers(architecture: EncoderArchitecture) -> str:
    """The name of transformers before a block's number."""
    if architecture == "modernbert":
        return modernbert.LAYERS
    return f"{architecture}.{'transformer' if architecture == 'distilbert' else 'encoder'}.layer"


def encoder_sizes(
    keys: BertKeys | DistilBertKeys | ModernBertKeys, architecture: EncoderArchitecture
) -> dict[str, Any]:
    """Fields of `TransformerConfig`."""
    if isinstance(keys, ModernBertKeys):
        return modernbert.modernbert_sizes(keys)
    common = {
        "norm": "layernorm",
        "norm_position": "post",
        "embedding_norm": True,
        "positions": "learned",
        "attention_bias": True,
        "mlp_bias": True,
        "attention": "bidirectional",
        "lm_head_transform": True,
    }
    if isinstance(keys, DistilBertKeys):
        return common | {
            "max_seq_len": keys.max_position_embeddings,
            "d_model": keys.dim,
            "num_layers": keys.n_layers,
            "num_heads": keys.n_heads,
            "d_ff": keys.hidden_dim,
            "norm_eps": _DISTILBERT_EPS,
            "mlp": _GELUS.get(keys.activation, "gelu_exact"),
            "dropout": keys.dropout,
        }
    offset = keys.pad_token_id + 1 if architecture == "roberta" else 0
    return common | {
        "max_seq_len": keys.max_position_embeddings - offset,
        "position_offset": offset,
        "d_model": keys.hidden_size,
        "num_layers": keys.num_hidden_layers,
        "num_heads": keys.num_attention_heads,
        "d_ff": keys.intermediate_size,
        "num_segments": keys.type_vocab_size,
        "norm_eps": keys.layer_norm_eps,
        "mlp": _GELUS.get(keys.hidden_act, "gelu_exact"),
        "dropout": keys.hidden_dropout_prob,
    }


def encoder_problems(
    keys: BertKeys | DistilBertKeys | ModernBertKeys,
    architecture: EncoderArchitecture,
    *,
    head: str,
) -> list[str]:
    """Options that distft does not support."""
    if isinstance(keys, ModernBertKeys):
        problems = modernbert.modernbert_problems(keys)
        problems += modernbert.modernbert_classifier_problems(keys) if head == "classifier" else []
    else:
        problems = _bert_problems(keys, architecture)
    if head == "language_model" and not keys.tie_word_embeddings:
        problems.append("tie_word_embeddings=false is not supported: it must be true.")
    return problems


def _bert_problems(keys: BertKeys | DistilBertKeys, architecture: EncoderArchitecture) -> list[str]:
    problems = []
    if isinstance(keys, DistilBertKeys):
        name, activation = "activation", keys.activation
        rates = {"dropout": keys.dropout, "attention_dropout": keys.attention_dropout}
    else:
        name, activation = "hidden_act", keys.hidden_act
        rates = {
            "hidden_dropout_prob": keys.hidden_dropout_prob,
            "attention_probs_dropout_prob": keys.attention_probs_dropout_prob,
        }
        if keys.is_decoder or keys.add_cross_attention:
            problems.append("is_decoder and add_cross_attention are not supported: they must be false.")
        if keys.position_embedding_type != "absolute":
            problems.append(
                f"position_embedding_type={keys.position_embedding_type!r} is not supported: it must be "
                "'absolute'."
            )
        if architecture == "roberta" and keys.max_position_embeddings <= keys.pad_token_id + 1:
            problems.append(
                f"max_position_embeddings={keys.max_position_embeddings} leaves no position behind "
                f"pad_token_id={keys.pad_token_id}."
            )
    # RoBERTa's layer before the logits has the exact GELU whatever the blocks have.
    known = [key for key, own in _GELUS.items() if architecture != "roberta" or own == "gelu_exact"]
    if activation not in known:
        problems.append(f"{name}={activation!r} is not supported: it must be {' or '.join(known)}.")
    if len(set(rates.values())) > 1:
        given = ", ".join(f"{rate_name}={rate}" for rate_name, rate in rates.items())
        problems.append(
            f"{given}: different dropout rates are not supported. They affect training only: make them equal "
            "in a copy of the file."
        )
    return problems


def required_options(config: TransformerConfig, architecture: EncoderArchitecture) -> dict[str, Any]:
    """The values of settings that a model of this architecture must have."""
    uncapped = dict.fromkeys(("attention_logit_softcap", "final_logit_softcap"))
    if architecture == "modernbert":
        return modernbert.required_modernbert_options(config) | uncapped
    required: dict[str, Any] = {
        **uncapped,
        "sliding_window": None,
        "lm_head_transform_bias": True,
        "attention": "bidirectional",
        "norm": "layernorm",
        "norm_bias": True,
        "norm_position": "post",
        "embedding_norm": True,
        "positions": "learned",
        "attention_bias": True,
        "mlp_bias": True,
        "qk_norm": False,
        "lm_head_transform": True,
        "tie_embeddings": True,
    }
    if architecture == "roberta" or config.mlp not in _GELUS.values():
        required["mlp"] = "gelu_exact"
    if architecture == "distilbert":
        required |= {"num_segments": 0, "norm_eps": _DISTILBERT_EPS}
    elif not config.num_segments:
        required["num_segments"] = 2 if architecture == "bert" else 1
    if architecture != "roberta":
        required["position_offset"] = 0
    elif not config.position_offset:
        required["position_offset"] = _ROBERTA_OFFSET
    return required


def encoder_keys(
    config: TransformerConfig, architecture: EncoderArchitecture, pooling: str | None
) -> dict[str, Any]:
    """Keys of config.json; `pooling` is that of a classifier."""
    if architecture == "modernbert":
        return modernbert.modernbert_keys(config, pooling)
    activation = next(key for key, own in _GELUS.items() if own == config.mlp)
    num_positions = config.num_positions
    if architecture == "distilbert":
        return {
            "max_position_embeddings": num_positions,
            "dim": config.d_model,
            "n_layers": config.num_layers,
            "n_heads": config.num_heads,
            "hidden_dim": config.d_ff,
            "activation": activation,
            "sinusoidal_pos_embds": False,
            "dropout": config.dropout,
            "attention_dropout": config.dropout,
        }
    keys = {
        "max_position_embeddings": num_positions,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.d_ff,
        "hidden_act": activation,
        "type_vocab_size": config.num_segments,
        "layer_norm_eps": config.norm_eps,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "position_embedding_type": "absolute",  # for transformers before 5
    }
    if architecture == "roberta":
        keys["pad_token_id"] = config.position_offset - 1  # from which transformers computes the offset
    return keys
