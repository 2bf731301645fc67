"""Sizes and variants of an encoder with a decoder, in T5's shape."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, PrivateAttr, model_validator

from distft.errors import ConfigError
from distft.model.config import MOST, MOST_LAYERS, Pooling, TokenModelConfig
from distft.model.products import Product
from distft.model.transformer_config import TransformerConfig, default_d_ff, default_head_dim

if TYPE_CHECKING:
    from distft.model.encoder_decoder import EncoderDecoder
    from distft.model.heads import Heads

_ENCODER = ("embed.", "encoder.")  # what the keys and values of cross attention depend on


def _default_num_decoder_layers(data: dict[str, Any]) -> int:
    return int(data["num_encoder_layers"])


def _default_scale_logits(data: dict[str, Any]) -> bool:
    return bool(data["tie_embeddings"])


class EncoderDecoderConfig(TokenModelConfig):
    """An encoder of the source of each row, and a decoder of the rest (T5: Raffel et al. 2019).

    `max_seq_len` is that of a row: source and target together.
    """

    type: Literal["encoder_decoder"] = "encoder_decoder"
    num_encoder_layers: int = Field(ge=1, le=MOST_LAYERS)
    num_decoder_layers: int = Field(
        default_factory=_default_num_decoder_layers, ge=1, le=MOST_LAYERS
    )  # default: num_encoder_layers
    num_heads: int = Field(ge=1, le=MOST)
    head_dim: int = Field(default_factory=default_head_dim, ge=1, le=MOST)  # default: d_model / num_heads
    # relu: T5 1.0; geglu_tanh: T5 1.1, gated by the tanh approximation of GELU
    mlp: Literal["relu", "geglu_tanh", "geglu", "swiglu", "gelu", "gelu_exact"] = "relu"
    d_ff: int = Field(default_factory=default_d_ff, ge=1, le=MOST)  # default: as of the Transformer
    norm_eps: float = Field(1e-6, gt=0)
    # Relative positions of both stacks: half of the buckets have one distance each, the others more and more.
    num_buckets: int = Field(32, ge=4, le=65536)
    max_distance: int = Field(128, ge=1, le=MOST)  # all tokens this far apart and farther share a bucket
    scale_logits: bool = Field(default_factory=_default_scale_logits)  # by d_model ** -0.5; default: if tied
    start_id: int = Field(0, ge=0, le=MOST)  # with which the decoder begins; T5: its padding
    dropout: float = Field(0.0, ge=0, lt=1)  # of embeddings, attention weights and all residual branches

    # Of a row's positions, those that the decoder has; for counts of FLOPs alone.
    _target_share: float = PrivateAttr(1.0)

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        errors = []
        if "head_dim" not in self.model_fields_set and self.d_model % self.num_heads:
            errors.append(
                f"d_model={self.d_model} is not a multiple of num_heads={self.num_heads}: change one "
                "of them, or set head_dim."
            )
        if self.num_buckets % 4:
            errors.append(
                f"num_buckets={self.num_buckets} must be a multiple of 4: the encoder halves them for both "
                f"directions. Set {-(-self.num_buckets // 4) * 4}."
            )
        if self.max_distance <= self.num_buckets // 2:
            errors.append(
                f"max_distance={self.max_distance} must be more than half of num_buckets={self.num_buckets}, "
                "which are of one distance each: raise it, or lower num_buckets."
            )
        if self.vocab_size is not None and self.start_id >= self.padded_vocab_size:
            errors.append(
                f"start_id={self.start_id} is not an id of vocab_size={self.vocab_size}: set one of its ids."
            )
        if errors:
            raise ValueError("\n".join(errors))
        return self

    @property
    def attention_dropout(self) -> float:
        return self.dropout

    @property
    def is_causal(self) -> bool:
        return False

    @property
    def is_encoder_decoder(self) -> bool:
        return True

    @property
    def default_pooling(self) -> Pooling:
        return "last"  # where the decoder begins, after it has seen the whole row

    @property
    def num_blocks(self) -> int:
        return self.num_encoder_layers + self.num_decoder_layers

    @property
    def block_names(self) -> list[str]:
        stacks = {"encoder": self.num_encoder_layers, "decoder": self.num_decoder_layers}
        return [f"{stack}.blocks.{index}" for stack, number in stacks.items() for index in range(number)]

    @property
    def layers(self) -> TransformerConfig:
        """The sizes of norms and feed-forward, for the layers that a Transformer has, too."""
        return TransformerConfig(
            max_seq_len=self.max_seq_len,
            d_model=self.d_model,
            num_layers=1,
            num_heads=1,
            head_dim=2,
            norm_eps=self.norm_eps,
            mlp=self.mlp,
            d_ff=self.d_ff,
        )

    def for_vocabulary(self, vocab_size: int) -> Self:
        model = super().for_vocabulary(vocab_size)
        if model.start_id >= model.padded_vocab_size:
            raise ConfigError(
                f"model.start_id={model.start_id} is not an id of the tokenizer's {vocab_size} pieces: "
                f"set one from 0 to {vocab_size - 1}."
            )
        return model

    def build(self, heads: "Heads") -> "EncoderDecoder":
        from distft.model.encoder_decoder import EncoderDecoder

        return EncoderDecoder(self, heads)

    def with_target_share(self, share: float) -> Self:
        counted = self.model_copy()
        counted._target_share = share
        return counted

    def num_backbone_parameters(self) -> int:
        attention = 4 * self.d_model * self.num_heads * self.head_dim + self.d_model  # with its norm
        feed_forward = self.d_model * self.d_ff * (3 if self.layers.is_gated else 2) + self.d_model
        per_stack = self.d_model + self.num_buckets * self.num_heads
        num_attentions = self.num_encoder_layers + 2 * self.num_decoder_layers
        return num_attentions * attention + self.num_blocks * feed_forward + 2 * per_stack

    def backbone_products(self, seq_len: int) -> Iterator[Product]:
        target_share = self._target_share
        source_share = 1 - target_share + 1 / seq_len  # a source's last position is the decoder's first, too
        before: tuple[str, ...] = ()
        for index in range(self.num_encoder_layers):
            block = f"encoder.blocks.{index}."
            yield from self._attention_products(f"{block}attn", before, source_share, source_share)
            yield from self._feed_forward_products(block, (f"{block}attn.",), source_share)
            before = (block,)
        before = ()
        for index in range(self.num_decoder_layers):
            block = f"decoder.blocks.{index}."
            yield from self._attention_products(f"{block}attn", before, target_share, target_share)
            yield from self._attention_products(
                f"{block}cross", (f"{block}attn.",), target_share, source_share, _ENCODER
            )
            after_attention = (f"{block}cross.", "encoder.")
            yield from self._feed_forward_products(block, after_attention, target_share)
            before = (block,)

    def _attention_products(
        self,
        name: str,
        before: tuple[str, ...],
        queries: float,
        keys: float,
        source: tuple[str, ...] | None = None,
    ) -> Iterator[Product]:
        """`queries` and `keys` are shares of a row's positions; `source` names what keys depend on alone."""
        numel = self.d_model * self.num_heads * self.head_dim
        pairs = 4 * self.num_heads * self.head_dim * queries * keys
        yield Product(f"{name}.q.", numel * queries, (*before, f"{name}_norm."))
        yield Product(f"{name}.k.", numel * keys, depends_on=source)
        yield Product(f"{name}.v.", numel * keys, flops_per_pair=pairs, depends_on=source)
        yield Product(f"{name}.o.", numel * queries)

    def _feed_forward_products(self, block: str, before: tuple[str, ...], share: float) -> Iterator[Product]:
        numel = self.d_model * self.d_ff * share
        names = ("gate", "up") if self.layers.is_gated else ("up",)
        for name in names:
            yield Product(f"{block}mlp.{name}.", numel, (*before, f"{block}mlp_norm."))
        yield Product(f"{block}mlp.down.", numel, tuple(f"{block}mlp.{name}." for name in names))

    def input_width(self, name: str, shape: tuple[int, ...]) -> int:
        """As T5 begins: unit variance of embeddings, and of q the scale that its scores do not have."""
        if name == "embed.weight":
            return 1
        if name.endswith(".q.weight"):
            return self.d_model * self.head_dim
        is_bias = name.endswith("relative_bias.embed.weight")
        return self.d_model if is_bias else super().input_width(name, shape)
