"""Sizes and variants of a Transformer: covers Llama, Mistral, Qwen 2 and 3, GPT-2, and BERT's relatives."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from distft.config import Widths
from distft.model.config import MOST, MOST_LAYERS, TokenModelConfig
from distft.model.experts_config import ExpertsConfig
from distft.model.mup import attention_scale, mup_problems, mup_std, mup_widths
from distft.model.products import Product
from distft.model.rope_scaling import RopeScaling

if TYPE_CHECKING:
    from distft.model.heads import Heads
    from distft.model.transformer import Transformer


GATED_MLPS = ("swiglu", "geglu", "geglu_tanh")  # with a matrix `gate` beside `up` and `down`


def _default_num_kv_heads(data: dict[str, Any]) -> int:
    return int(data["num_heads"])


def default_head_dim(data: dict[str, Any]) -> int:
    d_model: int = data["d_model"]
    num_heads: int = data["num_heads"]
    return max(d_model // num_heads, 1)


def default_d_ff(data: dict[str, Any]) -> int:
    d_model: int = data["d_model"]
    if data["mlp"] not in GATED_MLPS:
        return 4 * d_model
    # 8/3 * d_model: a gated one has three matrices instead of two, so two thirds of 4 * d_model give as many
    # weights. Rounded up to a multiple of 16, since matrix products are fast on whole vectors.
    return -(-8 * d_model // 48) * 16


class TransformerConfig(TokenModelConfig):
    """Sizes and variants of a Transformer. Widths are in elements, lengths in tokens."""

    type: Literal["transformer"] = "transformer"
    num_layers: int = Field(ge=1, le=MOST_LAYERS)
    num_heads: int = Field(ge=1, le=MOST)
    num_kv_heads: int = Field(default_factory=_default_num_kv_heads, ge=1, le=MOST)  # default: num_heads
    head_dim: int = Field(default_factory=default_head_dim, ge=1, le=MOST)  # default: d_model / num_heads
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    norm_eps: float = Field(1e-5, gt=0)
    norm_bias: bool = True  # of layernorm
    # pre: before attention and feed-forward, and after the last block. post: after each sum, as in BERT.
    norm_position: Literal["pre", "post"] = "pre"
    embedding_norm: bool = False  # a norm over the sum of the embeddings, as in BERT
    first_attention_norm: bool = True  # with `pre` the norm before the first attention; ModernBERT has none
    positions: Literal["rotary", "learned"] = "rotary"
    position_offset: int = Field(0, ge=0, le=MOST)  # row of the first learned position; RoBERTa: 2
    num_segments: int = Field(
        0, ge=0, le=MOST
    )  # kinds of text that have an embedding ("token types"); 0: none
    rope_theta: float = Field(10_000.0, gt=0)
    rope_scaling: RopeScaling | None = None  # rotary positions beyond the length of the pretraining
    # Layers with a window: theta of their rotary positions, which are then not scaled; null: as the others.
    local_rope_theta: float | None = Field(None, gt=0)
    # Tokens that one attends to, itself included; bidirectional: half of it to each side; null: all.
    sliding_window: int | None = Field(None, ge=1, le=MOST)
    global_attention_every: int | None = Field(
        None, ge=1, le=MOST_LAYERS
    )  # one of so many layers has no window
    global_attention_offset: int = Field(0, ge=0, le=MOST_LAYERS)  # the first of these; Gemma 2: 1
    global_layers: tuple[int, ...] = ()  # or the layers without a window by their number, from 0
    # scores s of attention become cap * tanh(s / cap), as in Gemma 2; so do the logits of lm_head
    attention_logit_softcap: float | None = Field(None, gt=0)
    final_logit_softcap: float | None = Field(None, gt=0)
    # gelu: the tanh approximation, as in GPT-2; gelu_exact: BERT's; geglu: gated by the exact one, geglu_tanh
    # by the other.
    mlp: Literal["swiglu", "geglu", "geglu_tanh", "gelu", "gelu_exact", "relu"] = "swiglu"
    d_ff: int = Field(
        default_factory=default_d_ff, ge=1, le=MOST
    )  # default: 8/3 * d_model; without a gate 4 * d_model
    experts: ExpertsConfig | None = None  # in place of the feed-forward; null: none
    attention_bias: bool = False  # on q, k, v and o
    qkv_bias: bool = False  # on q, k and v only, as in Qwen 2
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head of q and k, as in Qwen 3
    # Of lm_head: a matrix, GELU and a norm before the logits, and a bias on them, as in BERT.
    lm_head_transform: bool = False
    lm_head_transform_bias: bool = True  # of that matrix; ModernBERT has none
    dropout: float = Field(0.0, ge=0, lt=1)  # of embeddings, attention weights and both residual branches
    attention: Literal["causal", "bidirectional"] = "causal"
    attention_kernel: Literal["auto", "sdpa", "cudnn", "flex"] = "auto"  # auto: flex for packed rows on CUDA
    init_std: float | None = Field(0.02, gt=0)  # of matrices; null: d_model ** -0.5
    # mup: rates, initial weights and logits follow the width, so that the best rate of a narrow model is that
    # of a wide one (Yang et al. 2022, arXiv:2203.03466). At the base width it is `standard`.
    parametrization: Literal["standard", "mup"] = "standard"
    mup_base_d_model: int | None = Field(None, ge=1, le=MOST)  # the width at which the rates were found
    mup_base_head_dim: int | None = Field(None, ge=1, le=MOST)  # the head_dim of the model of that width

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
        if self.position_offset and self.positions != "learned":
            errors.append(
                f"position_offset={self.position_offset} is a row of learned positions: set positions: "
                "learned, or leave it out."
            )
        errors += self._attention_problems()
        errors += mup_problems(self.parametrization, self.mup_base_d_model, self.mup_base_head_dim)
        if self.experts is not None:
            errors += self.experts.problems(self.num_layers, mlp_bias=self.mlp_bias)
        if self.attention_kernel == "flex" and self.dropout:
            errors.append(
                f"dropout={self.dropout} is set, but attention_kernel: flex cannot drop attention weights: "
                f"set dropout: 0, or attention_kernel: auto."
            )
        if errors:
            raise ValueError("\n".join(errors))
        return self

    def _attention_problems(self) -> list[str]:
        """Of windows, caps and the scaling of rotary positions."""
        problems = []
        rotary = {"rope_scaling": self.rope_scaling, "local_rope_theta": self.local_rope_theta}
        if self.positions != "rotary":
            problems += [
                f"{name} is set, but positions={self.positions}: set positions: rotary, or leave it out."
                for name, value in rotary.items()
                if value is not None
            ]
        if self.rope_scaling is not None and self.rope_scaling.type == "ntk" and self.head_dim < 4:
            problems.append(
                f"head_dim={self.head_dim} has no second pair to slow down: leave out rope_scaling: ntk."
            )
        if self.rope_scaling is not None and self.rope_scaling.type == "yarn" and self.rope_theta <= 1:
            problems.append(
                f"rope_theta={self.rope_theta:g} must be above 1 for rope_scaling of type yarn: raise it."
            )
        if self.sliding_window is None:
            local = ("local_rope_theta", "global_attention_every", "global_attention_offset", "global_layers")
            problems += [
                f"{name} is set, but no layer has a window: set sliding_window, or leave it out."
                for name in local
                if getattr(self, name)
            ]
        elif self.attention_kernel == "cudnn":
            problems.append(
                f"sliding_window={self.sliding_window} is set, but attention_kernel: cudnn computes no "
                "windows: set attention_kernel: auto."
            )
        if self.attention_logit_softcap is not None and self.attention_kernel in {"cudnn", "sdpa"}:
            problems.append(
                f"attention_logit_softcap={self.attention_logit_softcap:g} is set, but attention_kernel: "
                f"{self.attention_kernel} cannot cap scores: set attention_kernel: auto."
            )
        if not self.first_attention_norm and self.norm_position != "pre":
            problems.append(
                "first_attention_norm=false is of norms before the sums: set norm_position: pre, or leave it "
                "out."
            )
        return [*problems, *self._global_layer_problems()]

    def _global_layer_problems(self) -> list[str]:
        every, offset, layers = (
            self.global_attention_every,
            self.global_attention_offset,
            self.global_layers,
        )
        problems = []
        if every is not None and layers:
            problems.append("global_attention_every and global_layers name the same layers: leave one out.")
        if offset >= (every or 1) and offset:
            problems.append(
                f"global_attention_offset={offset} must be less than global_attention_every="
                f"{every or 'null'}: lower it."
            )
        unknown = [layer for layer in layers if not 0 <= layer < self.num_layers]
        if unknown:
            problems.append(
                f"global_layers has {unknown[0]}, but the layers are 0 to {self.num_layers - 1}: take it out."
            )
        return problems

    def has_window(self, layer: int) -> bool:
        """Whether attention of this layer is restricted to `sliding_window`."""
        if self.sliding_window is None or layer in self.global_layers:
            return False
        every = self.global_attention_every
        return every is None or layer % every != self.global_attention_offset

    def rope_of(self, *, has_window: bool) -> tuple[float, RopeScaling | None]:
        """Theta and scaling of the rotary positions of layers with and without a window."""
        if has_window and self.local_rope_theta is not None:
            return self.local_rope_theta, None
        return self.rope_theta, self.rope_scaling

    @property
    def attention_reach(self) -> int | None:
        if self.sliding_window is None:
            return None
        return self.sliding_window - 1 if self.is_causal else self.sliding_window // 2

    @property
    def attention_dropout(self) -> float:
        return self.dropout

    @property
    def is_causal(self) -> bool:
        return self.attention == "causal"

    @property
    def direction_setting(self) -> str:
        return "attention"

    @property
    def has_segments(self) -> bool:
        return self.num_segments > 1

    @property
    def num_blocks(self) -> int:
        return self.num_layers

    @property
    def has_qkv_bias(self) -> bool:
        return self.attention_bias or self.qkv_bias

    def build(self, heads: "Heads") -> "Transformer":
        from distft.model.transformer import Transformer

        return Transformer(self, heads)

    def num_backbone_parameters(self) -> int:
        num_norms = self.has_final_norm + self.embedding_norm
        num_rows = self.num_positions + self.num_segments
        blocks = sum(self.num_block_parameters(self.experts_of(layer)) for layer in range(self.num_layers))
        num_norms -= not self.first_attention_norm
        return num_norms * self.norm_numel + num_rows * self.d_model + blocks

    @property
    def num_positions(self) -> int:
        """Rows of the table of learned positions."""
        return self.max_seq_len + self.position_offset if self.positions == "learned" else 0

    @property
    def has_final_norm(self) -> bool:
        """Whether a norm follows the last block; with `norm_position: post` it is a part of that block."""
        return self.norm_position == "pre"

    @property
    def is_gated(self) -> bool:
        return self.mlp in GATED_MLPS

    @property
    def norm_numel(self) -> int:
        """Parameters of a norm over hidden states."""
        return self.d_model * (2 if self.norm == "layernorm" and self.norm_bias else 1)

    def experts_of(self, layer: int) -> ExpertsConfig | None:
        """The experts of a block; None: it has one feed-forward for all tokens."""
        return self.experts if self.experts is not None and self.experts.is_in(layer) else None

    @property
    def num_idle_parameters(self) -> int:
        if self.experts is None:
            return 0
        sizes = self.d_model, self.d_ff, 2 if self.is_gated else 1
        of_block = self.experts.num_parameters(*sizes) - self.experts.num_parameters(*sizes, active=True)
        return len(self.experts.layers(self.num_layers)) * of_block

    def num_block_parameters(self, experts: ExpertsConfig | None = None) -> int:
        """Of one block, with `experts` or without."""
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = self.d_model * (2 * q_size + 2 * kv_size)
        if self.has_qkv_bias:
            attention += q_size + 2 * kv_size
        if self.attention_bias:
            attention += self.d_model
        if self.qk_norm:
            attention += 2 * self.head_dim
        num_up = 2 if self.is_gated else 1
        mlp = self.d_model * self.d_ff * (num_up + 1)
        if self.mlp_bias:
            mlp += num_up * self.d_ff + self.d_model
        if experts is not None:
            mlp = experts.num_parameters(self.d_model, self.d_ff, num_up)
        return attention + mlp + 2 * self.norm_numel

    def backbone_products(self, seq_len: int) -> Iterator[Product]:  # noqa: ARG002
        for index in range(self.num_layers):
            first, *rest = self.block_products(
                f"blocks.{index}.", has_window=self.has_window(index), experts=self.experts_of(index)
            )
            yield replace(first, before=(*first.before, f"blocks.{index - 1}.")) if index else first
            yield from rest

    def block_products(
        self, block: str, *, has_window: bool, experts: ExpertsConfig | None = None
    ) -> Iterator[Product]:
        """Of the block whose parameters' names begin with `block`."""
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        width, hidden = self.d_model, self.d_ff
        is_pre_norm = self.norm_position == "pre"
        yield Product(f"{block}attn.q.", width * q_size, (f"{block}attn_norm.",) if is_pre_norm else ())
        yield Product(f"{block}attn.k.", width * kv_size)
        yield Product(
            f"{block}attn.v.",
            width * kv_size,
            flops_per_pair=0 if has_window else self.flops_per_pair,
            flops_per_local_pair=self.flops_per_pair if has_window else 0,
        )
        yield Product(f"{block}attn.o.", width * q_size)
        after_attention = (f"{block}attn.", f"{block}{'mlp' if is_pre_norm else 'attn'}_norm.")
        if experts is not None:
            yield from experts.products(block, width, hidden, is_gated=self.is_gated, before=after_attention)
            return
        if self.is_gated:
            yield Product(f"{block}mlp.gate.", width * hidden, after_attention)
        yield Product(f"{block}mlp.up.", width * hidden, after_attention)
        yield Product(f"{block}mlp.down.", width * hidden, (f"{block}mlp.gate.", f"{block}mlp.up."))

    @property
    def flops_per_pair(self) -> int:
        """Forward, of one layer: a score, and its share of the weighted sum of values."""
        return 4 * self.num_heads * self.head_dim

    def input_width(self, name: str, shape: tuple[int, ...]) -> int:  # noqa: ARG002
        return self.d_model  # also of `o` and `down`, as in Llama's relatives

    def initial_std(self, name: str, shape: tuple[int, ...]) -> float:
        base = self.mup_base_d_model
        if base is None:
            return super().initial_std(name, shape)
        std = self.init_std if self.init_std is not None else base**-0.5
        return mup_std(name, shape, std, self.width_ratio) * self.residual_init_factor(name)

    def widths(self, named_shapes: Mapping[str, tuple[int, ...]]) -> Widths | None:
        return None if self.mup_base_d_model is None else mup_widths(named_shapes, self.width_ratio)

    @property
    def width_ratio(self) -> float:
        """Of the model to its base under mup, by which a tied table's logits are divided."""
        return self.d_model / self.mup_base_d_model if self.mup_base_d_model is not None else 1.0

    @property
    def attention_scale(self) -> float | None:
        """Of the products of queries and keys; None: head_dim ** -0.5."""
        return attention_scale(self.head_dim, self.mup_base_head_dim)

    def residual_init_factor(self, name: str) -> float:
        """Of `o` and `down`, which write into the residual stream: its variance does not grow with depth.

        1 / sqrt(2 * num_layers) as in Radford et al. 2019, GPT-2. With `norm_position: post` the norms do it.
        """
        writes_residual = self.norm_position == "pre" and name.endswith((".o.weight", ".down.weight"))
        return 1 / math.sqrt(2 * self.num_layers) if writes_residual else 1.0
