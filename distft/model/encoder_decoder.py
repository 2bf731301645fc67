"""An encoder and a decoder over rows that have a source and a target: T5.

Shape letters: B rows, T positions of a row, S of the source, D that the decoder has, C = d_model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distft.model.attention import PreallocatedKVCache
from distft.model.dropout import dropout
from distft.model.encoder_decoder_config import EncoderDecoderConfig
from distft.model.heads import Head, LanguageModelHead
from distft.model.layers import make_mlp, make_norm
from distft.model.layout import HiddenLossFn, RowLayout
from distft.model.relative_attention import KeysAndValues, RelativeAttention, RelativeBias
from distft.model.source_split import SourceSplit
from distft.model.with_heads import ModelWithHeads, OutputProjection


class EncoderBlock(nn.Module):
    """Residual block: attention of the source to itself, then feed-forward, a norm before each."""

    __call__: Callable[..., Tensor]

    def __init__(self, config: EncoderDecoderConfig, first_dropout_site: int) -> None:
        super().__init__()
        self._dropout, self._first_site = config.dropout, first_dropout_site
        self.attn_norm = make_norm(config.layers)
        self.attn = RelativeAttention(config)
        self.mlp_norm = make_norm(config.layers)
        self.mlp = make_mlp(config.layers)

    def forward(self, x_BSC: Tensor, bias: Tensor, dropout_keys_B: Tensor | None) -> Tensor:
        keys_B = None if dropout_keys_B is None else dropout_keys_B + self._first_site
        normed = self.attn_norm(x_BSC)
        x_BSC = self._add(
            x_BSC, self.attn(normed, self.attn.keys_and_values(normed), bias, keys_B), keys_B, 1
        )
        return self._add(x_BSC, self.mlp(self.mlp_norm(x_BSC)), keys_B, 2)

    def _add(self, x: Tensor, y: Tensor, keys_B: Tensor | None, site: int) -> Tensor:
        return x + (y if keys_B is None else dropout(y, self._dropout, keys_B, site=site))


@dataclass(slots=True)
class BlockCache:
    """What a decoder's block keeps while it generates."""

    target: PreallocatedKVCache
    source: KeysAndValues | None = None
    is_source_seen: Tensor | None = None  # bool [B, 1, 1, S]: not padding


class DecoderBlock(EncoderBlock):
    """The same with a causal attention, and one to the encoder's hidden states before the feed-forward."""

    def __init__(self, config: EncoderDecoderConfig, first_dropout_site: int) -> None:
        super().__init__(config, first_dropout_site)
        self.cross_norm = make_norm(config.layers)
        self.cross = RelativeAttention(config)

    def forward(
        self,
        x_BDC: Tensor,
        bias: Tensor,
        dropout_keys_B: Tensor | None,
        source_BSC: Tensor | None = None,
        cross_mask: Tensor | None = None,
        *,
        cache: BlockCache | None = None,
    ) -> Tensor:
        """`source_BSC` None: the keys and values of the source are in `cache`, which generation has only."""
        keys_B = None if dropout_keys_B is None else dropout_keys_B + self._first_site
        normed = self.attn_norm(x_BDC)
        own = self.attn.keys_and_values(normed)
        if cache is not None:
            own = cache.target.update(*own)
        x_BDC = self._add(x_BDC, self.attn(normed, own, bias, keys_B), keys_B, 1)
        source = None if source_BSC is None else self.cross.keys_and_values(source_BSC)
        if cache is not None and source is None:
            source = cache.source
        elif cache is not None:
            cache.source = source
        assert source is not None
        # Another site than that of the first attention's weights.
        cross_keys_B = None if keys_B is None else keys_B + 3
        y_BDC = self.cross(self.cross_norm(x_BDC), source, cross_mask, cross_keys_B)
        x_BDC = self._add(x_BDC, y_BDC, keys_B, 4)
        return self._add(x_BDC, self.mlp(self.mlp_norm(x_BDC)), keys_B, 2)


class Stack(nn.Module):
    """Blocks with one relative bias, and the norm behind them."""

    def __init__(self, config: EncoderDecoderConfig, blocks: Sequence[nn.Module], *, is_causal: bool) -> None:
        super().__init__()
        self.relative_bias = RelativeBias(config, is_causal=is_causal)
        self.blocks = nn.ModuleList(blocks)
        self.norm = make_norm(config.layers)


class ScaledProjection(OutputProjection):
    """Logits of hidden states times `width ** -0.5`: T5's, whose tied embeddings have unit variance."""

    def forward(self, x_BTH: Tensor, loss_from_hidden: HiddenLossFn | None = None) -> Tensor:
        return super().forward(x_BTH * x_BTH.shape[-1] ** -0.5, loss_from_hidden)


class EncoderDecoder(ModelWithHeads):
    """Embedding, encoder, decoder and heads. `SourceSplit` says which positions of a row are whose."""

    config: EncoderDecoderConfig

    def make_backbone(self) -> None:
        config = self.config
        num_sites = 3 * config.num_encoder_layers
        encoder = [EncoderBlock(config, 3 * index + 1) for index in range(config.num_encoder_layers)]
        decoder = [DecoderBlock(config, num_sites + 5 * i + 1) for i in range(config.num_decoder_layers)]
        self.encoder = Stack(config, encoder, is_causal=False)
        self.decoder = Stack(config, decoder, is_causal=True)

    def encode(self, x_BTC: Tensor, layout: RowLayout, dropout_keys_B: Tensor | None) -> Tensor:
        split = SourceSplit.of(layout)
        source = self._encode_source(split.source.take(x_BTC), split.source_mask(), dropout_keys_B)
        target = torch.where(split.is_start[..., None], self._start(), split.target.take(x_BTC))
        bias, cross_mask = self._target_bias(target.shape[1], split.target_mask()), split.cross_mask()
        for block in self.decoder.blocks:
            target = block(target, bias, dropout_keys_B, source, cross_mask)
        return split.rows(source, self.decoder.norm(target))

    def _encode_source(self, x_BSC: Tensor, mask: Tensor, dropout_keys_B: Tensor | None = None) -> Tensor:
        bias = self.encoder.relative_bias(x_BSC.shape[1], x_BSC.shape[1], mask)
        for block in self.encoder.blocks:
            x_BSC = block(x_BSC, bias, dropout_keys_B)
        y_BSC: Tensor = self.encoder.norm(x_BSC)
        return y_BSC

    def _target_bias(self, num_positions: int, mask: Tensor) -> Tensor:
        return self.decoder.relative_bias(num_positions, num_positions, mask)

    def _start(self) -> Tensor:
        """The decoder's first input [1, 1, C], of which dropout drops nothing."""
        device = self.embed.weight.device
        x_11C: Tensor = self.embed(torch.full((1, 1), self.config.start_id, device=device))
        return x_11C

    def new_caches(self, num_positions: int) -> Sequence[BlockCache]:
        return [BlockCache(PreallocatedKVCache(num_positions)) for _ in self.decoder.blocks]

    def encode_cached(
        self,
        x_BTC: Tensor,
        position_ids: Tensor,  # noqa: ARG002
        caches: Sequence[Any],
        num_padding_B: Tensor | None,
    ) -> Tensor:
        """At first `x_BTC` is the whole source, and there is one hidden state, of the decoder's start."""
        source = None
        if caches[0].source is None:
            is_real_BS = torch.ones(x_BTC.shape[:2], dtype=torch.bool, device=x_BTC.device)
            if num_padding_B is not None:
                columns_S = torch.arange(x_BTC.shape[1], device=x_BTC.device)
                is_real_BS = columns_S >= num_padding_B[:, None]
            is_seen = is_real_BS[:, None, None, :]
            source = self._encode_source(x_BTC, is_seen | ~is_real_BS[:, None, :, None])
            x_BTC = self._start().expand(len(x_BTC), -1, -1)
            for cache in caches:
                cache.is_source_seen = is_seen
        bias = self.decoder.relative_bias(1, len(caches[0].target) + 1, None)
        for block, cache in zip(self.decoder.blocks, caches, strict=True):
            x_BTC = block(x_BTC, bias, None, source, cache.is_source_seen, cache=cache)
        y_BTC: Tensor = self.decoder.norm(x_BTC)
        return y_BTC

    def make_head(self, head: Head) -> nn.Module:
        if isinstance(head, LanguageModelHead) and self.config.scale_logits:
            return self.tied(ScaledProjection(self.config.d_model, self.config.padded_vocab_size, bias=False))
        return super().make_head(head)
