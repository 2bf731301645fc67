"""Number of parameters and FLOPs per token, computed from the configuration alone."""

from distft.model.config import LANGUAGE_MODEL, ClassificationHead, Heads, ModelConfig


def num_parameters(config: ModelConfig, heads: Heads = LANGUAGE_MODEL) -> int:
    """Elements of all parameters; tied embeddings count once."""
    norm = config.d_model * (2 if config.norm == "layernorm" else 1)
    total = config.padded_vocab_size * config.d_model + norm
    total += config.num_layers * _num_block_parameters(config, norm)
    if config.positions == "learned":
        total += config.max_seq_len * config.d_model
    for head in heads.values():
        if isinstance(head, ClassificationHead):
            total += config.d_model * head.num_labels
        elif not config.tie_embeddings:
            total += config.padded_vocab_size * config.d_model
    return total


def _num_block_parameters(config: ModelConfig, norm: int) -> int:
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = config.d_model * (2 * q_size + 2 * kv_size)
    if config.has_qkv_bias:
        attention += q_size + 2 * kv_size
    if config.attention_bias:
        attention += config.d_model
    if config.qk_norm:
        attention += 2 * config.head_dim
    num_up = 2 if config.mlp == "swiglu" else 1
    mlp = config.d_model * config.d_ff * (num_up + 1)
    if config.mlp_bias:
        mlp += num_up * config.d_ff + config.d_model
    return attention + mlp + 2 * norm


def forward_flops_per_token(config: ModelConfig, seq_len: int, heads: Heads = LANGUAGE_MODEL) -> float:
    """FLOPs of the forward pass's matrix products per token of a row of `seq_len`; a multiply-add counts 2.

    Causal attention counts all seq_len ** 2 scores, although kernels skip the upper half: so does the usual
    definition of MFU (PaLM, Chowdhery et al. 2022, appendix B).
    """
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    num_matrices = 3 if config.mlp == "swiglu" else 2
    projections = config.d_model * (2 * q_size + 2 * kv_size) + num_matrices * config.d_model * config.d_ff
    attention = 2 * seq_len * q_size  # scores, and weighted sums of values
    total: float = config.num_layers * (projections + attention)
    for head in heads.values():
        if isinstance(head, ClassificationHead):
            total += config.d_model * head.num_labels / seq_len  # once per row
        else:
            total += config.d_model * config.padded_vocab_size
    return 2 * total


def training_flops_per_token(config: ModelConfig, seq_len: int, heads: Heads = LANGUAGE_MODEL) -> float:
    """FLOPs of forward and backward, which computes a gradient for each of a product's two operands."""
    return 3 * forward_flops_per_token(config, seq_len, heads)
