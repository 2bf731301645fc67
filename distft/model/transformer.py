"""The Transformer. It knows no ranks, no freezing, no optimizer: those act on it from outside, by name.

Shape letters: B rows, T positions, N = B * T, C = d_model, V = padded_vocab_size, K classes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from distft.errors import ConfigError
from distft.model.attention import Attention, LayerCache, Mask, Rotation, make_mask, rotation
from distft.model.config import ModelConfig
from distft.model.head import ClassificationHead, FromHidden, Head, LanguageModelHead
from distft.model.linear import Linear


def _norm(config: ModelConfig) -> nn.Module:
    kind = nn.RMSNorm if config.norm == "rmsnorm" else nn.LayerNorm
    return kind(config.d_model, eps=config.norm_eps)


class SwiGLU(nn.Module):
    """Shazeer 2020 (arXiv:2002.05202): `gate`, `up`, `down`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Linear(config.d_model, config.d_ff, bias=config.mlp_bias)
        self.up = Linear(config.d_model, config.d_ff, bias=config.mlp_bias)
        self.down = Linear(config.d_ff, config.d_model, bias=config.mlp_bias)

    def forward(self, x_BTC: Tensor) -> Tensor:
        y_BTC: Tensor = self.down(functional.silu(self.gate(x_BTC)) * self.up(x_BTC))
        return y_BTC


class GELU(nn.Module):
    """The two-matrix feed-forward of GPT-2: `up`, `down`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = Linear(config.d_model, config.d_ff, bias=config.mlp_bias)
        self.down = Linear(config.d_ff, config.d_model, bias=config.mlp_bias)

    def forward(self, x_BTC: Tensor) -> Tensor:
        y_BTC: Tensor = self.down(functional.gelu(self.up(x_BTC), approximate="tanh"))
        return y_BTC


class Block(nn.Module):
    """Attention, then feed-forward, each normalised before and added after."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attn_norm = _norm(config)
        self.attn = Attention(config)
        self.mlp_norm = _norm(config)
        self.mlp = SwiGLU(config) if config.mlp == "swiglu" else GELU(config)
        self.dropout = config.dropout

    def forward(
        self, x_BTC: Tensor, turn: Rotation | None, mask: Mask, cache: LayerCache | None = None
    ) -> Tensor:
        x_BTC = x_BTC + self._drop(self.attn(self.attn_norm(x_BTC), turn, mask, cache))
        return x_BTC + self._drop(self.mlp(self.mlp_norm(x_BTC)))

    def _drop(self, x_BTC: Tensor) -> Tensor:
        return functional.dropout(x_BTC, self.dropout, self.training) if self.dropout else x_BTC


class OutputProjection(Linear):
    """Scores over the vocabulary, or what a caller makes of hidden states, weight and labels directly."""

    def forward(
        self, x_BTC: Tensor, labels_BT: Tensor | None = None, reduce: FromHidden | None = None
    ) -> Tensor:
        if reduce is None or labels_BT is None:
            return super().forward(x_BTC)
        # Here, not in the objective: ZeRO 3 gathers a weight for the forward of the module that owns it.
        dtype = self.product_format(x_BTC)
        return reduce(x_BTC.flatten(0, -2).to(dtype), self.weight.to(dtype), labels_BT.flatten())


class Transformer(nn.Module):
    """Embedding, blocks, norm and head. Holds parameters only, no buffers.

    Build it under `torch.device("meta")` and fill it by name (`distft.model.initialisation`): the values
    that its layers draw for themselves on another device are not the project's.
    """

    def __init__(self, config: ModelConfig, head: Head | None = None) -> None:
        super().__init__()
        self.config = config
        self.head = head if head is not None else LanguageModelHead()
        self.activation_checkpointing = False  # recompute each block in the backward pass
        self.embed = _embedding(config.padded_vocab_size, config.d_model)
        if config.positions == "learned":
            self.position_embed = _embedding(config.max_seq_len, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = _norm(config)
        if isinstance(self.head, ClassificationHead):
            self.classifier = Linear(config.d_model, self.head.num_labels, bias=False)
        else:
            self.lm_head = OutputProjection(config.d_model, config.padded_vocab_size, bias=False)
            if config.tie_embeddings:
                self.lm_head.weight = self.embed.weight

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        lengths: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        reduce: FromHidden | None = None,
        caches: Sequence[LayerCache] | None = None,
        cache_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, V] of a language model, or [B, K] of a classifier.

        `input_ids`, `position_ids` (None: 0, 1, 2, ...) and `document_ids` (attention stays among equal ids)
        are int64 [B, T]; `lengths` is int64 [B], the real tokens at each row's start. With `labels` [B, T]
        and `reduce`, a language model returns `reduce(hidden [N, C], weight [V, C], labels [N])`, so that
        the logits need never exist whole. With `caches` (one a block) the rows continue what those hold,
        `cache_mask` bool [B, 1, T, S] says what they see, and only the last position's logits [B, 1, V] come.

        Raises `ConfigError` for rows longer than `max_seq_len`.
        """
        if input_ids.shape[1] > self.config.max_seq_len:
            raise ConfigError(
                f"A row of {input_ids.shape[1]} tokens is longer than model.max_seq_len="
                f"{self.config.max_seq_len}: shorten the rows, or raise it before pretraining."
            )
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        mask = (
            make_mask(self.config, input_ids.shape, document_ids, lengths) if caches is None else cache_mask
        )
        x_BTC, turn = self._embed(input_ids, position_ids)
        x_BTC = self._run_blocks(x_BTC, turn, mask, caches)
        if caches is not None:
            x_BTC = x_BTC[:, -1:]
        x_BTC = self.norm(x_BTC)
        if isinstance(self.head, ClassificationHead):
            logits: Tensor = self.classifier(_pool(x_BTC, lengths, self.head.pooling))
            return logits
        scores: Tensor = self.lm_head(x_BTC, labels, reduce)
        return scores

    def compile_blocks(self) -> None:
        """Let torch.compile make each block's kernels, at its first use.

        Block by block, as the whole model would unroll the slices of the cross entropy: as fast a step, and
        2-12 s of compiling instead of 20 (6.9M parameters, 6 layers, one core).
        """
        for block in self.blocks:
            block.compile()

    def _embed(self, input_ids: Tensor, position_ids: Tensor) -> tuple[Tensor, Rotation | None]:
        x_BTC = self.embed(input_ids)
        turn = None
        if self.config.positions == "learned":
            x_BTC = x_BTC + self.position_embed(position_ids)
        else:
            turn = rotation(position_ids, self.config.head_dim, self.config.rope_theta)
        if self.config.dropout:
            x_BTC = functional.dropout(x_BTC, self.config.dropout, self.training)
        return x_BTC, turn

    def _run_blocks(
        self, x_BTC: Tensor, turn: Rotation | None, mask: Mask, caches: Sequence[LayerCache] | None
    ) -> Tensor:
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for i, block in enumerate(self.blocks):
            if recompute:
                keeps_rng = self.config.dropout > 0
                x_BTC = checkpoint(
                    block, x_BTC, turn, mask, use_reentrant=False, preserve_rng_state=keeps_rng
                )
            else:
                x_BTC = block(x_BTC, turn, mask, None if caches is None else caches[i])
        return x_BTC


def _pool(x_BTC: Tensor, lengths: Tensor | None, pooling: str) -> Tensor:
    """One vector a row, [B, C], from its real tokens."""
    if pooling == "first":
        return x_BTC[:, 0]
    if lengths is None:
        return x_BTC[:, -1] if pooling == "last" else x_BTC.mean(dim=1)
    if pooling == "last":
        rows = torch.arange(x_BTC.shape[0], device=x_BTC.device)
        return x_BTC[rows, (lengths - 1).clamp_min(0)]
    is_real_BT = torch.arange(x_BTC.shape[1], device=x_BTC.device) < lengths[:, None]
    total_BC = (x_BTC * is_real_BT[..., None]).sum(dim=1)
    return total_BC / lengths.clamp_min(1)[:, None].to(x_BTC.dtype)


def _embedding(num_rows: int, d_model: int) -> nn.Embedding:
    """A table without torch's own draw: on the meta device that would import torch's compiler, 2 s."""
    return nn.Embedding(num_rows, d_model, _weight=torch.zeros(num_rows, d_model))
