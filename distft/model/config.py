"""The shape of a Transformer: enough choices to be a Llama, a Mistral, a Qwen 2 or 3, or a GPT-2."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from distft.config import Settings
from distft.errors import ConfigError


def _default_num_kv_heads(data: dict[str, Any]) -> int:
    return int(data["num_heads"])


def _default_head_dim(data: dict[str, Any]) -> int:
    d_model: int = data["d_model"]
    num_heads: int = data["num_heads"]
    return max(d_model // num_heads, 1)


def _default_d_ff(data: dict[str, Any]) -> int:
    d_model: int = data["d_model"]
    if data["mlp"] == "gelu":
        return 4 * d_model
    # Three matrices instead of two, so two thirds of the width; whole vectors of 16 suit the products.
    return -(-8 * d_model // 48) * 16


class ModelConfig(Settings):
    """Sizes and kinds of a Transformer's parts. Widths count elements, lengths count tokens."""

    vocab_size: int | None = Field(None, ge=1)  # None: filled in from the data
    pad_vocab_to: int = Field(1, ge=1)  # the vocabulary is padded to a multiple of this
    max_seq_len: int = Field(ge=1)
    d_model: int = Field(ge=1)
    num_layers: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    num_kv_heads: int = Field(default_factory=_default_num_kv_heads, ge=1)
    head_dim: int = Field(default_factory=_default_head_dim, ge=1)
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = Field(1e-5, gt=0)
    positions: Literal["rotary", "learned"] = "rotary"
    rope_theta: float = Field(10_000.0, gt=0)
    mlp: Literal["swiglu", "gelu"] = "swiglu"  # gelu: the tanh form, as GPT-2 has it
    d_ff: int = Field(default_factory=_default_d_ff, ge=1)
    attention_bias: bool = False  # on q, k, v and o
    qkv_bias: bool = False  # on q, k and v only, as Qwen 2 has it
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head of q and k, as Qwen 3 has it
    tie_embeddings: bool = True
    dropout: float = Field(0.0, ge=0, lt=1)  # on embeddings, attention weights and both residual branches
    attention: Literal["causal", "bidirectional"] = "causal"
    attention_kernel: Literal["auto", "sdpa", "flex"] = "auto"  # auto: flex for packed rows on CUDA
    init_std: float | None = Field(0.02, gt=0)  # None: d_model ** -0.5

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        faults = []
        if self.num_heads % self.num_kv_heads:
            faults.append(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}: each "
                f"key-value head serves equally many query heads."
            )
        if "head_dim" not in self.model_fields_set and self.d_model % self.num_heads:
            faults.append(
                f"d_model={self.d_model} is not a multiple of num_heads={self.num_heads}: "
                f"change one of them, or set head_dim."
            )
        if self.positions == "rotary" and self.head_dim % 2:
            faults.append(
                f"head_dim={self.head_dim} is odd, but rotary positions turn pairs of elements: "
                f"take {self.head_dim + 1}, or positions: learned."
            )
        if self.attention_kernel == "flex" and self.dropout:
            faults.append(
                f"dropout={self.dropout} cannot go with attention_kernel: flex, which drops no attention "
                f"weights: set dropout: 0, or attention_kernel: sdpa."
            )
        if faults:
            raise ValueError("\n".join(faults))
        return self

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding. Raises `ConfigError` where the vocabulary is not known yet."""
        if self.vocab_size is None:
            raise ConfigError(
                "model.vocab_size is not set, and no data has filled it in: set it to the tokenizer's size."
            )
        return -(-self.vocab_size // self.pad_vocab_to) * self.pad_vocab_to

    @property
    def is_causal(self) -> bool:
        return self.attention == "causal"

    @property
    def has_qkv_bias(self) -> bool:
        return self.attention_bias or self.qkv_bias

    def for_vocabulary(self, vocab_size: int) -> "ModelConfig":
        """The same shape for a tokenizer of `vocab_size` pieces.

        Raises `ConfigError` where a smaller vocabulary is already set, since its embedding would lack rows.
        """
        if self.vocab_size is None:
            # Defaults that hang on other sizes are kept as they were found: model_copy recomputes nothing.
            return self.model_copy(update={"vocab_size": vocab_size})
        if self.vocab_size < vocab_size:
            raise ConfigError(
                f"model.vocab_size={self.vocab_size} is less than the tokenizer's {vocab_size} pieces: "
                f"raise it to {vocab_size}, or leave it out."
            )
        return self
