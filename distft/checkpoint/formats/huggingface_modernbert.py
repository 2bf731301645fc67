"""ModernBERT of transformers: what sets its config.json and the names of its tensors apart.

It has norms before the sums, no biases, GeGLU, rotary positions and, in most layers, attention in a window.
"""

from collections.abc import Mapping
from typing import Any, Literal

from distft.checkpoint.formats.huggingface_attention import (
    FULL,
    SLIDING,
    global_layers,
    layer_type_problems,
    layer_types,
    older_rope_keys,
    rope_keys,
    rope_problems,
    rope_settings,
)
from distft.checkpoint.formats.huggingface_keys import ModernBertKeys
from distft.model.heads import CLASSIFIER_NORM_EPS
from distft.model.transformer_config import TransformerConfig

LAYERS = "model.layers"
MODULES: Mapping[str, str] = {
    "embed": "model.embeddings.tok_embeddings",
    "embed_norm": "model.embeddings.norm",
    "norm": "model.final_norm",
    "attn.q": "attn.Wqkv",
    "attn.k": "attn.Wqkv",
    "attn.v": "attn.Wqkv",
    "attn.o": "attn.Wo",
    "attn_norm": "attn_norm",
    "mlp.gate": "mlp.Wi",
    "mlp.up": "mlp.Wi",
    "mlp.down": "mlp.Wo",
    "mlp_norm": "mlp_norm",
    "lm_head": "decoder",
    "lm_head.dense": "head.dense",
    "lm_head.norm": "head.norm",
    "classifier.hidden": "head.dense",
    "classifier.norm": "head.norm",
    "classifier.output": "classifier",
}
TIED_COPIES: Mapping[str, str | None] = {"decoder.weight": None}
_GELUS = ("gelu", "gelu_python")
POOLINGS: Mapping[str, Literal["first", "mean"]] = {"cls": "first", "mean": "mean"}  # `classifier_pooling`


def _kinds(keys: ModernBertKeys) -> list[str]:
    if keys.layer_types is not None:
        return keys.layer_types
    every = max(keys.global_attn_every_n_layers, 1)
    return [SLIDING if layer % every else FULL for layer in range(keys.num_hidden_layers)]


def _rope(keys: ModernBertKeys, kind: str) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of the layers of one kind."""
    theta = keys.global_rope_theta if kind == FULL else keys.local_rope_theta
    return rope_settings(_rope_given(keys, kind), theta, keys.max_position_embeddings)


def _rope_given(keys: ModernBertKeys, kind: str) -> dict[str, Any]:
    return (keys.rope_parameters or {}).get(kind) or keys.rope_scaling or {}


def modernbert_sizes(keys: ModernBertKeys) -> dict[str, Any]:
    """Fields of `TransformerConfig`."""
    kinds = _kinds(keys)
    sizes = {
        "norm": "layernorm",
        "norm_bias": keys.norm_bias,
        "norm_eps": keys.norm_eps,
        "embedding_norm": True,
        "first_attention_norm": False,
        "attention_bias": keys.attention_bias,
        "mlp_bias": keys.mlp_bias,
        "mlp": "geglu",
        "attention": "bidirectional",
        "lm_head_transform": True,
        "lm_head_transform_bias": keys.classifier_bias,
        "max_seq_len": keys.max_position_embeddings,
        "d_model": keys.hidden_size,
        "num_layers": keys.num_hidden_layers,
        "num_heads": keys.num_attention_heads,
        "d_ff": keys.intermediate_size,
        **_rope(keys, FULL if FULL in kinds else SLIDING),
    }
    if SLIDING not in kinds:
        return sizes
    sizes |= {"sliding_window": max(keys.local_attention, 1)}
    sizes |= global_layers([kind == SLIDING for kind in kinds])
    if FULL in kinds and _rope(keys, FULL) != _rope(keys, SLIDING):
        sizes["local_rope_theta"] = _rope(keys, SLIDING)["rope_theta"]
    return sizes


def modernbert_problems(keys: ModernBertKeys) -> list[str]:
    """Options that distft does not support."""
    problems = layer_type_problems(keys.layer_types, keys.num_hidden_layers)
    kinds = dict.fromkeys(_kinds(keys))
    for kind in kinds:
        problems += rope_problems(_rope_given(keys, kind), f"rope_parameters.{kind}", None)
    if len(kinds) > 1 and _rope(keys, FULL) != _rope(keys, SLIDING) and _rope(keys, SLIDING)["rope_scaling"]:
        problems.append(
            f"rope_parameters.{SLIDING}={_rope_given(keys, SLIDING)}: scaled rotary positions of layers with "
            f"a window are not supported, unless those of {FULL} are the same."
        )
    for name in ("hidden_activation", "classifier_activation"):
        if getattr(keys, name) not in _GELUS:
            problems.append(
                f"{name}={getattr(keys, name)!r} is not supported: it must be {' or '.join(_GELUS)}."
            )
    if not keys.decoder_bias:
        problems.append("decoder_bias=false is not supported: it must be true.")
    problems += [
        f"{name}={getattr(keys, name)}: dropout in these places is not supported. It affects training only: "
        "set it to 0 in a copy of the file."
        for name in ("embedding_dropout", "attention_dropout", "mlp_dropout")
        if getattr(keys, name)
    ]
    return problems


def modernbert_classifier_problems(keys: ModernBertKeys) -> list[str]:
    """Options of a classifier that distft does not support."""
    required: dict[str, Any] = {"classifier_bias": False, "norm_bias": False, "norm_eps": CLASSIFIER_NORM_EPS}
    problems = [
        f"{name}={getattr(keys, name)} is not supported for a classifier: it must be {value}."
        for name, value in required.items()
        if getattr(keys, name) != value
    ]
    if keys.classifier_pooling not in POOLINGS:
        problems.append(
            f"classifier_pooling={keys.classifier_pooling!r} is not supported: it must be "
            f"{' or '.join(POOLINGS)}."
        )
    return problems


def classifier_misfit(config: TransformerConfig) -> str | None:
    """Why the classifier of such a model cannot be ModernBERT's, whose norms are alike; None if it can."""
    if config.norm_bias or config.norm_eps != CLASSIFIER_NORM_EPS:
        return (
            f"its norm has no bias and norm_eps={CLASSIFIER_NORM_EPS:g}, but model.norm_bias="
            f"{str(config.norm_bias).lower()} and model.norm_eps={config.norm_eps:g}"
        )
    return None


def required_modernbert_options(config: TransformerConfig) -> dict[str, Any]:
    """The values of settings that a ModernBERT must have."""
    required: dict[str, Any] = {
        "attention": "bidirectional",
        "norm": "layernorm",
        "norm_position": "pre",
        "embedding_norm": True,
        "first_attention_norm": False,
        "positions": "rotary",
        "num_segments": 0,
        "mlp": "geglu",
        "qk_norm": False,
        "lm_head_transform": True,
        "tie_embeddings": True,
    }
    if not config.attention_bias:  # which includes the biases of q, k and v
        required["qkv_bias"] = False
    return required


def modernbert_keys(config: TransformerConfig, pooling: str | None) -> dict[str, Any]:
    """Keys of config.json, with those of transformers before 5 beside the newer ones.

    `pooling` is that of a classifier.
    """
    ropes = {
        kind: rope_keys(*config.rope_of(has_window=kind == SLIDING), config.head_dim)
        for kind in (FULL, SLIDING)
    }
    keys = {
        "max_position_embeddings": config.max_seq_len,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.d_ff,
        "hidden_activation": "gelu",
        "norm_eps": config.norm_eps,
        "norm_bias": config.norm_bias,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "decoder_bias": True,
        "classifier_bias": config.lm_head_transform_bias and pooling is None,
        "classifier_activation": "gelu",
        "layer_types": layer_types(config),
        "rope_parameters": ropes,
        "global_rope_theta": older_rope_keys(ropes[FULL])["rope_theta"],
        "local_rope_theta": older_rope_keys(ropes[SLIDING])["rope_theta"],
        **dict.fromkeys(("embedding_dropout", "attention_dropout", "mlp_dropout"), 0.0),
    }
    if config.sliding_window is not None:
        keys["local_attention"] = config.sliding_window
    if pooling is not None:
        keys["classifier_pooling"] = next(key for key, own in POOLINGS.items() if own == pooling)
    is_periodic = config.global_attention_every is not None and not config.global_attention_offset
    return {**keys, "global_attn_every_n_layers": config.global_attention_every} if is_periodic else keys
