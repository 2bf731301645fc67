"""How large a model is and what a token costs, from its configuration alone."""

from distft.model.config import ModelConfig
from distft.model.head import ClassificationHead, Head, LanguageModelHead


def num_parameters(config: ModelConfig, head: Head | None = None) -> int:
    """Elements of all parameters, tied ones once."""
    head = head if head is not None else LanguageModelHead()
    norm = config.d_model * (2 if config.norm == "layernorm" else 1)
    total = config.padded_vocab_size * config.d_model + config.num_layers * _block(config, norm) + norm
    if config.positions == "learned":
        total += config.max_seq_len * config.d_model
    if isinstance(head, ClassificationHead):
        total += config.d_model * head.num_labels
    elif not config.tie_embeddings:
        total += config.padded_vocab_size * config.d_model
    return total


def _block(config: ModelConfig, norm: int) -> int:
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = config.d_model * (2 * query + 2 * key)
    if config.has_qkv_bias:
        attention += query + 2 * key
    if config.attention_bias:
        attention += config.d_model
    if config.qk_norm:
        attention += 2 * config.head_dim
    num_up = 2 if config.mlp == "swiglu" else 1
    mlp = config.d_model * config.d_ff * (num_up + 1)
    if config.mlp_bias:
        mlp += num_up * config.d_ff + config.d_model
    return attention + mlp + 2 * norm


def forward_flops_per_token(config: ModelConfig, seq_len: int, head: Head | None = None) -> float:
    """Matrix products of the forward pass, 2 FLOPs a multiplication, on a row of `seq_len` tokens.

    Causal attention is counted in full, as kernels that skip the upper half are credited elsewhere too
    (PaLM, Chowdhery et al. 2022, appendix B).
    """
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    num_mlp = 3 if config.mlp == "swiglu" else 2
    products = config.d_model * (2 * query + 2 * key) + num_mlp * config.d_model * config.d_ff
    attention = 2 * seq_len * query  # scores, and their sum over values
    total = config.num_layers * (products + attention)
    if isinstance(head, ClassificationHead):
        return 2 * (total + config.d_model * head.num_labels / seq_len)
    return 2 * (total + config.d_model * config.padded_vocab_size)


def training_flops_per_token(config: ModelConfig, seq_len: int, head: Head | None = None) -> float:
    """Forward and backward: the backward does each product twice, once for each operand's gradient."""
    return 3 * forward_flops_per_token(config, seq_len, head)
