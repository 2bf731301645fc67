"""T5 of transformers, 1.0 and 1.1: what sets its config.json and names apart."""

from collections.abc import Collection
from typing import Any

from distft.checkpoint.formats.huggingface_keys import T5Keys
from distft.model.encoder_decoder_config import EncoderDecoderConfig

# T5 1.1 has the tanh approximation under the plain name.
_FEED_FORWARDS = {
    "relu": "relu",
    "gated-gelu": "geglu_tanh",
    "gated-gelu_new": "geglu_tanh",
    "gated-silu": "swiglu",
    "gelu": "gelu_exact",
    "gelu_new": "gelu",
}
# The published 1.0 have it, though attention to the source has no positions; transformers ignores it.
UNREAD = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
_LONGEST_SOURCE = 512  # of its pretraining; relative positions have no longest row


def t5_sizes(keys: T5Keys) -> dict[str, Any]:
    """Fields of `EncoderDecoderConfig`.

    Since transformers 5, tie_word_embeddings says nothing: T5 1.1, whose logits are not scaled, has a weight
    of its own for them if the file has one (`with_saved_head`).
    """
    is_scaled = keys.tie_word_embeddings if keys.scale_decoder_outputs is None else keys.scale_decoder_outputs
    start_id = keys.pad_token_id if keys.decoder_start_token_id is None else keys.decoder_start_token_id
    return {
        "type": "encoder_decoder",
        "max_seq_len": 2 * (keys.n_positions or _LONGEST_SOURCE),
        "d_model": keys.d_model,
        "num_encoder_layers": keys.num_layers,
        "num_decoder_layers": keys.num_layers if keys.num_decoder_layers is None else keys.num_decoder_layers,
        "num_heads": keys.num_heads,
        "head_dim": keys.d_kv,
        "mlp": _FEED_FORWARDS.get(keys.feed_forward_proj, "relu"),
        "d_ff": keys.d_ff,
        "norm_eps": keys.layer_norm_epsilon,
        "num_buckets": keys.relative_attention_num_buckets,
        "max_distance": keys.relative_attention_max_distance,
        "tie_embeddings": keys.tie_word_embeddings and is_scaled,
        "scale_logits": is_scaled,
        "start_id": start_id or 0,
        "dropout": keys.dropout_rate,
        "init_std": None,
    }


def with_saved_head(config: EncoderDecoderConfig, names: Collection[str]) -> EncoderDecoderConfig:
    """`config` with the embedding as the logits' weight, if the tensors of these names have no other."""
    if config.tie_embeddings or "lm_head.weight" in names:
        return config
    return config.model_copy(update={"tie_embeddings": True})


def t5_problems(keys: T5Keys) -> list[str]:
    """Options that distft does not support."""
    problems = []
    if keys.feed_forward_proj not in _FEED_FORWARDS:
        known = ", ".join(_FEED_FORWARDS)
        problems.append(
            f"feed_forward_proj={keys.feed_forward_proj!r} is not supported: it must be one of {known}."
        )
    if keys.is_decoder:
        problems.append("is_decoder is not supported: it must be false.")
    return problems


def t5_options(config: EncoderDecoderConfig) -> dict[str, Any]:
    """The values of settings that a T5 must have."""
    return {} if config.mlp in _FEED_FORWARDS.values() else {"mlp": "geglu_tanh"}


def t5_keys(config: EncoderDecoderConfig) -> dict[str, Any]:
    """Keys of config.json."""
    return {
        "d_model": config.d_model,
        "d_kv": config.head_dim,
        "d_ff": config.d_ff,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "num_heads": config.num_heads,
        "relative_attention_num_buckets": config.num_buckets,
        "relative_attention_max_distance": config.max_distance,
        "dropout_rate": config.dropout,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_factor": 1.0,
        "feed_forward_proj": next(key for key, own in _FEED_FORWARDS.items() if own == config.mlp),
        "n_positions": -(-config.max_seq_len // 2),
        "scale_decoder_outputs": config.scale_logits,
        "is_encoder_decoder": True,
        "decoder_start_token_id": config.start_id,
    }


def t5_copies(*, is_tied: bool) -> tuple[str, ...]:
    """Tensors that a file may have as copies of the embedding; `is_tied`: that of the logits is one."""
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    return (*copies, "lm_head.weight") if is_tied else copies


def t5_name(parameter: str, config: EncoderDecoderConfig) -> str:
    """Name of the tensor of transformers that is the parameter."""
    stack, _, rest = parameter.partition(".")
    if stack not in {"encoder", "decoder"}:
        return "shared.weight" if stack == "embed" else parameter
    if not rest.startswith("blocks."):
        kind = rest.rpartition(".")[2]
        if rest.startswith("norm."):
            return f"{stack}.final_layer_norm.{kind}"
        return f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.{kind}"
    _, number, module, *inner, kind = rest.split(".")
    is_gated, last = config.layers.is_gated, 1 if stack == "encoder" else 2
    layer = {"attn": 0, "cross": 1, "mlp": last}[module.removesuffix("_norm")]
    part = {"attn": "SelfAttention", "cross": "EncDecAttention", "mlp": "DenseReluDense"}
    names = {"gate": "wi_0", "up": "wi_1" if is_gated else "wi", "down": "wo"}
    own = "layer_norm" if not inner else f"{part[module]}.{names.get(inner[0], inner[0])}"
    return f"{stack}.block.{number}.layer.{layer}.{own}.{kind}"
