"""The Transformer: embedding, blocks and heads.

Shape letters: B rows, T positions, S positions with those in a cache, C = d_model.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from distft.errors import ConfigError
from distft.model.attention import (
    PreallocatedKVCache,
    RotaryCosSin,
    SlidingKVCache,
    inverse_frequencies,
    rotary_cos_sin,
)
from distft.model.attention_kernels import AttentionMask, make_attention_mask
from distft.model.block import Block
from distft.model.heads import GeneratorHead, Head, LanguageModelHead, require_mup_head
from distft.model.layers import Linear, activation_of, make_embedding, make_norm
from distft.model.layout import HiddenLosses, HiddenLossFn, RowLayout
from distft.model.transformer_config import TransformerConfig
from distft.model.with_heads import ModelWithHeads, OutputProjection

# rotation angles and mask; a model may have one for layers with a window, and one for the others
AttentionInputs: TypeAlias = tuple[RotaryCosSin | None, AttentionMask]


class Generator(nn.Module):
    """Blocks beside the model's from its embeddings to logits, as a `GeneratorHead` describes them."""

    def __init__(self, model: TransformerConfig, head: GeneratorHead) -> None:
        super().__init__()
        config = self.config = head.config(model)
        self.input = Linear(model.d_model, config.d_model, bias=False)
        # Indices after the model's own, so that dropout draws other numbers.
        indices = range(model.num_layers, model.num_layers + head.num_layers)
        self.blocks = nn.ModuleList(Block(config, index) for index in indices)
        self.norm = _make_final_norm(config)
        self.hidden = Linear(config.d_model, model.d_model, bias=False)
        self.output = OutputProjection(model.d_model, model.padded_vocab_size, bias=False)

    def forward(
        self,
        x_BTC: Tensor,
        inputs: Sequence[AttentionInputs],
        dropout_keys_B: Tensor | None,
        loss_from_hidden: HiddenLossFn | None,
        *,
        recomputes_blocks: bool,
    ) -> Tensor:
        x_BTC = self.input(x_BTC)
        x_BTC, _ = _run_blocks(self.blocks, x_BTC, inputs, dropout_keys_B, recompute=recomputes_blocks)
        output: Tensor = self.output(self.hidden(self.norm(x_BTC)), loss_from_hidden)
        return output


class TransformedProjection(OutputProjection):
    """BERT's logits: of the hidden states behind a layer of their own, and with a bias."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config.d_model, config.padded_vocab_size, bias=True)
        self.dense = Linear(config.d_model, config.d_model, bias=config.lm_head_transform_bias)
        # Behind a gate there is no activation of one input; BERT's relatives have GELU here.
        self.activation = functional.gelu if config.is_gated else activation_of(config)
        self.norm = make_norm(config)

    def forward(self, x_BTH: Tensor, loss_from_hidden: HiddenLossFn | None = None) -> Tensor:
        return super().forward(self.norm(self.activation(self.dense(x_BTH))), loss_from_hidden)


class Transformer(ModelWithHeads):
    """Embedding, blocks, norm and one or more heads, by name."""

    config: TransformerConfig

    def make_backbone(self) -> None:
        config = self.config
        self._recomputes_blocks = False
        self._rotary_cos_sin: Callable[..., RotaryCosSin] = rotary_cos_sin
        if config.positions == "learned":
            self.position_embed = make_embedding(config.num_positions, config.d_model)
        if config.num_segments:
            self.segment_embed = make_embedding(config.num_segments, config.d_model)
        if config.embedding_norm:
            self.embed_norm = make_norm(config)
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.num_layers))
        self.norm = _make_final_norm(config)

    def embed_tokens(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        segment_ids: Tensor | None = None,
        noise_BTC: Tensor | None = None,
    ) -> Tensor:
        x_BTC = self.token_vectors(input_ids, noise_BTC)
        if self.config.positions == "learned":
            x_BTC = x_BTC + self.position_embed(position_ids + self.config.position_offset)
        if segment_ids is not None:
            self._check_segments(segment_ids)
        if self.config.num_segments:
            x_BTC = x_BTC + self.segment_embed(
                torch.zeros_like(input_ids) if segment_ids is None else segment_ids
            )
        return self.embed_norm(x_BTC) if self.config.embedding_norm else x_BTC

    def _check_segments(self, segment_ids: Tensor) -> None:
        """Raise `ConfigError` for ids without a row; on a GPU, for which it would wait, if none has one."""
        num_rows = self.config.num_segments
        largest = int(segment_ids.max()) if segment_ids.device.type == "cpu" and segment_ids.numel() else 0
        if largest >= num_rows:
            raise ConfigError(
                f"The rows have the segment id {largest}, and model.num_segments={num_rows}: leave segment "
                f"ids out, or raise it to {largest + 1} before pretraining."
            )

    def encode(self, x_BTC: Tensor, layout: RowLayout, dropout_keys_B: Tensor | None) -> Tensor:
        return self.encode_with_routing(x_BTC, layout, dropout_keys_B)[0]

    def encode_with_routing(
        self, x_BTC: Tensor, layout: RowLayout, dropout_keys_B: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        inputs, recompute = self._attention_inputs(layout, self.config), self._recomputes_blocks
        is_real_BT = None
        if self.config.experts is not None and layout.lengths is not None:
            positions_T = torch.arange(layout.shape[1], device=layout.lengths.device)
            is_real_BT = positions_T < layout.lengths[:, None]
        x_BTC, routing = _run_blocks(
            self.blocks, x_BTC, inputs, dropout_keys_B, is_real_BT, recompute=recompute
        )
        y_BTC: Tensor = self.norm(x_BTC)
        return y_BTC, torch.stack(routing) if routing else None

    def outputs_beside_backbone(
        self,
        names: Sequence[str],
        x_BTC: Tensor,
        layout: RowLayout,
        dropout_keys_B: Tensor | None,
        losses: HiddenLosses,
    ) -> dict[str, Tensor]:
        outputs = {}
        for name in names:
            if isinstance(self.heads[name], GeneratorHead):
                generator: Generator = self.get_submodule(name)  # type: ignore[assignment]
                outputs[name] = generator(
                    x_BTC,
                    self._attention_inputs(layout, generator.config),
                    dropout_keys_B,
                    losses.get(name),
                    recomputes_blocks=self._recomputes_blocks,
                )
        return outputs

    def new_caches(self, num_positions: int) -> Sequence[PreallocatedKVCache | SlidingKVCache]:
        reach = self.config.attention_reach
        return [
            PreallocatedKVCache(num_positions)
            if reach is None or not self.config.has_window(layer)
            else SlidingKVCache(reach)
            for layer in range(self.config.num_layers)
        ]

    def encode_cached(
        self, x_BTC: Tensor, position_ids: Tensor, caches: Sequence[Any], num_padding_B: Tensor | None
    ) -> Tensor:
        num_cached, num_new = len(caches[0]), x_BTC.shape[1]
        inputs = self._by_layer(
            self.config,
            lambda reach: (
                self._rope(position_ids, has_window=reach is not None),
                _cached_mask(num_cached, num_new, num_padding_B, x_BTC.device, reach),
            ),
        )
        for block, (rope, mask), cache in zip(self.blocks, inputs, caches, strict=True):
            x_BTC = block(x_BTC, rope, mask, kv_cache=cache)
        y_BTC: Tensor = self.norm(x_BTC)
        return y_BTC

    def make_head(self, head: Head) -> nn.Module:
        if isinstance(head, LanguageModelHead):
            projection = self._make_projection(head)
            projection.softcap = self.config.final_logit_softcap
            if self.config.tie_embeddings and self.config.width_ratio != 1:
                projection.multiplier = 1 / self.config.width_ratio
            return projection
        if self.config.parametrization == "mup":
            require_mup_head(head)
        if not isinstance(head, GeneratorHead):
            return super().make_head(head)
        generator = Generator(self.config, head)
        generator.output.weight = self.embed.weight
        return generator

    def _make_projection(self, head: LanguageModelHead) -> OutputProjection:
        if self.config.lm_head_transform:
            return self.tied(TransformedProjection(self.config))
        projection = super().make_head(head)
        assert isinstance(projection, OutputProjection)
        return projection

    def set_activation_checkpointing(self, mode: Literal["none", "selective", "full"]) -> None:
        self._recomputes_blocks = mode == "full"
        for block in self._all_blocks():
            block.recomputes_selectively = mode == "selective"

    def compile_blocks(self) -> None:
        """Compile the training pass of each block, final norm and rotary angles, at their first calls.

        Compiling the whole model would unroll the cross entropy's chunks. Block by block, the step is as fast
        and compiling takes 2-12 s instead of 20 (6.9M parameters, 6 layers, one core).
        """
        for block in self._all_blocks():
            block.compile_training()
        # Cheap to compile for any shape at once, so these two are compiled for evaluation too.
        if self.config.has_final_norm:
            self.norm.forward = torch.compile(self.norm.forward, dynamic=True)
        self._rotary_cos_sin = torch.compile(rotary_cos_sin, dynamic=True)

    @property
    def fp8_layers(self) -> nn.Module:
        return self.blocks

    def _all_blocks(self) -> list[Block]:
        return [module for module in self.modules() if isinstance(module, Block)]

    def _attention_inputs(self, layout: RowLayout, config: TransformerConfig) -> list[AttentionInputs]:
        """Of each of the layers that `config` describes: the model's, or those of a generator beside it."""

        def inputs(reach: int | None) -> AttentionInputs:
            mask = make_attention_mask(
                config,
                layout.shape,
                layout.document_ids,
                layout.lengths,
                layout.is_prefix,
                reach=reach,
                device=layout.position_ids.device,
            )
            return self._rope(layout.position_ids, has_window=reach is not None), mask

        return self._by_layer(config, inputs)

    @staticmethod
    def _by_layer(
        config: TransformerConfig, make: Callable[[int | None], AttentionInputs]
    ) -> list[AttentionInputs]:
        """`make` of the reach of each layer's attention, computed once for all layers of the same."""
        reaches = [
            config.attention_reach if config.has_window(layer) else None for layer in range(config.num_layers)
        ]
        made = {reach: make(reach) for reach in dict.fromkeys(reaches)}
        return [made[reach] for reach in reaches]

    def _rope(self, position_ids: Tensor, *, has_window: bool) -> RotaryCosSin | None:
        config = self.config
        if config.positions == "learned":
            return None
        theta, scaling = config.rope_of(has_window=has_window)
        frequencies_R = inverse_frequencies(config.head_dim, theta, scaling, position_ids.device)
        return self._rotary_cos_sin(
            position_ids, frequencies_R, 1.0 if scaling is None else scaling.magnitude
        )


def _make_final_norm(config: TransformerConfig) -> nn.Module:
    return make_norm(config) if config.has_final_norm else nn.Identity()


def _cached_mask(
    num_cached: int,
    num_new: int,
    num_padding_B: Tensor | None,
    device: torch.device,
    reach: int | None,
) -> Tensor | None:
    """Which of S positions each of the last T sees, bool [B or 1, 1, T, S]; None: causal, from the start.

    With a window, `reach`, a cache has no more than that many of the positions before.
    """
    if num_padding_B is None:
        if num_cached == 0 and (reach is None or reach >= num_new - 1):
            return None
        num_padding_B = torch.zeros(1, dtype=torch.int64, device=device)
    columns_S = torch.arange(num_cached + num_new, device=device)
    rows_T = columns_S[num_cached:, None]
    if reach is not None:
        columns_S = columns_S[max(num_cached - reach, 0) :]
    is_real_B1S = (columns_S >= num_padding_B[:, None])[:, None]
    # Padding attends to itself: a softmax over no keys would give NaN, and 0 * NaN would spread it to
    # the real positions.
    sees_TS = columns_S <= rows_T
    if reach is not None:
        sees_TS = sees_TS & (rows_T - columns_S <= reach)
    return (sees_TS & is_real_B1S | (columns_S == rows_T))[:, None]


def _run_blocks(
    blocks: Iterable[nn.Module],
    x_BTC: Tensor,
    inputs: Sequence[AttentionInputs],
    dropout_keys_B: Tensor | None,
    is_real_BT: Tensor | None = None,
    *,
    recompute: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Hidden states, and what the routers of the blocks with experts chose, in training."""
    routing = []
    for block, (rope, mask) in zip(blocks, inputs, strict=True):
        if recompute and torch.is_grad_enabled():
            # Dropout depends on its keys alone, so the generators' states need no copy.
            output = checkpoint(
                block,
                x_BTC,
                rope,
                mask,
                dropout_keys_B,
                is_real_BT=is_real_BT,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        else:
            output = block(x_BTC, rope, mask, dropout_keys_B, is_real_BT=is_real_BT)
        if isinstance(output, tuple):
            x_BTC, of_block = output
            routing.append(of_block)
        else:
            x_BTC = output
    return x_BTC, routing
