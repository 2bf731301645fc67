"""Sizes and variants of a Transformer: covers Llama, Mistral, Qwen 2 and 3, and GPT-2."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import gcd
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from distft.config import Settings
from distft.errors import ConfigError

# Far above any model: a file with a larger size is damaged or hostile, and would cost memory before it fails.
_MOST = (1 << 31) - 1
_MOST_LAYERS = 4096  # each is a module, also on the meta device


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
    # 8/3 * d_model: SwiGLU has three matrices instead of two, so two thirds of 4 * d_model give as many
    # weights. Rounded up to a multiple of 16, since matrix products are fast on whole vectors.
    return -(-8 * d_model // 48) * 16


class ModelConfig(Settings):
    """Sizes and variants of a Transformer. Widths are in elements, lengths in tokens."""

    vocab_size: int | None = Field(None, ge=1, le=_MOST)  # null: the tokenizer's size
    pad_vocab_to: int = Field(1, ge=1, le=_MOST)  # rows of the embedding are rounded up to a multiple of this
    max_seq_len: int = Field(ge=1, le=_MOST)  # longest row that the model accepts
    d_model: int = Field(ge=1, le=_MOST)
    num_layers: int = Field(ge=1, le=_MOST_LAYERS)
    num_heads: int = Field(ge=1, le=_MOST)
    num_kv_heads: int = Field(default_factory=_default_num_kv_heads, ge=1, le=_MOST)  # default: num_heads
    head_dim: int = Field(default_factory=_default_head_dim, ge=1, le=_MOST)  # default: d_model / num_heads
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = Field(1e-5, gt=0)
    positions: Literal["rotary", "learned"] = "rotary"
    rope_theta: float = Field(10_000.0, gt=0)
    mlp: Literal["swiglu", "gelu"] = "swiglu"  # gelu: the tanh approximation, as in GPT-2
    d_ff: int = Field(
        default_factory=_default_d_ff, ge=1, le=_MOST
    )  # default: 8/3 * d_model; gelu: 4 * d_model
    attention_bias: bool = False  # on q, k, v and o
    qkv_bias: bool = False  # on q, k and v only, as in Qwen 2
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head of q and k, as in Qwen 3
    tie_embeddings: bool = True
    dropout: float = Field(0.0, ge=0, lt=1)  # of embeddings, attention weights and both residual branches
    attention: Literal["causal", "bidirectional"] = "causal"
    attention_kernel: Literal["auto", "sdpa", "cudnn", "flex"] = "auto"  # auto: flex for packed rows on CUDA
    init_std: float | None = Field(0.02, gt=0)  # of matrices; null: d_model ** -0.5

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        errors = []
        if self.num_heads % self.num_kv_heads:
            errors.append(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}: each "
                f"key-value head serves the same number of query heads."
            )
        if "head_dim" not in self.model_fields_set and self.d_model % self.num_heads:
            errors.append(
                f"d_model={self.d_model} is not a multiple of num_heads={self.num_heads}: "
                f"change one of them, or set head_dim."
            )
        if self.positions == "rotary" and self.head_dim % 2:
            errors.append(
                f"head_dim={self.head_dim} is odd, but rotary positions rotate pairs of elements: "
                f"set head_dim: {self.head_dim + 1}, or positions: learned."
            )
        if self.attention_kernel == "flex" and self.dropout:
            errors.append(
                f"dropout={self.dropout} is set, but attention_kernel: flex cannot drop attention weights: "
                f"set dropout: 0, or attention_kernel: sdpa."
            )
        if errors:
            raise ValueError("\n".join(errors))
        return self

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding. Raises `ConfigError` if `vocab_size` is not set."""
        if self.vocab_size is None:
            raise ConfigError(
                "model.vocab_size is not set, and no tokenizer has been read: set it to the tokenizer's size."
            )
        return -(-self.vocab_size // self.pad_vocab_to) * self.pad_vocab_to

    @property
    def is_causal(self) -> bool:
        return self.attention == "causal"

    @property
    def has_qkv_bias(self) -> bool:
        return self.attention_bias or self.qkv_bias

    def for_vocabulary(self, vocab_size: int) -> "ModelConfig":
        """This configuration with `vocab_size` filled in, for a tokenizer of that many pieces.

        Raises `ConfigError` if `vocab_size` is already set and smaller: the embedding would lack rows.
        """
        if self.vocab_size is None:
            # model_copy keeps the defaults that were derived from other sizes; it recomputes nothing.
            return self.model_copy(update={"vocab_size": vocab_size})
        if self.vocab_size < vocab_size:
            raise ConfigError(
                f"model.vocab_size={self.vocab_size} is less than the tokenizer's {vocab_size} pieces: "
                f"raise it to {vocab_size}, or leave it out."
            )
        return self


Pooling: TypeAlias = Literal["last", "mean", "first"]  # of a row's real tokens, to one vector
HeadName: TypeAlias = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=40)]


@dataclass(frozen=True, slots=True)
class LanguageModelHead:
    """Logits over the vocabulary at every position."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassificationHead:
    """Logits over the classes, once per row."""

    num_labels: int
    pooling: Pooling = "last"


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenHead:
    """`num_outputs` numbers at every position."""

    num_outputs: int


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingHead:
    """One vector per row, and with a learned temperature one parameter: the logarithm of its change, [1].

    The vector is divided by the square root of the temperature, so that products of two are similarities
    divided by the temperature. That makes the temperature a part of the model like any other.
    """

    pooling: Pooling = "mean"
    normalize: bool = True  # to length 1, before the temperature
    temperature: float = 1.0
    learns_temperature: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratorHead:
    """Logits over the vocabulary from small blocks of its own, beside the model's: ELECTRA's generator.

    They read the model's embeddings, projected to their width, and the output's weight is the embedding.
    """

    num_layers: int
    size: float  # its width, heads and feed-forward, relative to the model's
    output_share: float = 1.0  # of the positions whose logits are computed; for counts of FLOPs alone

    def config(self, model: ModelConfig) -> ModelConfig:
        """The sizes of its blocks. Heads stay as wide as the model's, so both share rotary angles."""
        num_heads = max(round(model.num_heads * self.size), 1)
        sizes = {
            "num_layers": self.num_layers,
            "d_model": max(round(model.d_model * self.size), 1),
            "num_heads": num_heads,
            "num_kv_heads": gcd(num_heads, model.num_kv_heads),
            "d_ff": max(round(model.d_ff * self.size), 1),
        }
        return model.model_copy(update=sizes)


Head: TypeAlias = LanguageModelHead | ClassificationHead | TokenHead | EmbeddingHead | GeneratorHead
Heads: TypeAlias = Mapping[str, Head]  # by the name of the head's module
LANGUAGE_MODEL: Heads = {"lm_head": LanguageModelHead()}


def check_pooling(pooling: Pooling, model: ModelConfig, setting: str = "objective.pooling") -> None:
    """Raise `ConfigError` if the pooled hidden state cannot depend on the whole row; `setting` gave it."""
    if pooling == "first" and model.is_causal:
        raise ConfigError(
            f"{setting}=first with model.attention=causal: the first token attends only to itself, so the "
            f"rest of the text has no effect. Set {setting}=last or mean."
        )
