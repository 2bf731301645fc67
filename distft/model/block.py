"""A Transformer block, and how it trains: compiled, or with activations recomputed selectively.

Shape letters: B rows, T positions, C = d_model.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from distft.model.attention import Attention, KVCache, RotaryCosSin
from distft.model.attention_kernels import AttentionMask
from distft.model.dropout import dropout
from distft.model.layers import make_mlp, make_norm
from distft.model.mixture_of_experts import MixtureOfExperts
from distft.model.transformer_config import TransformerConfig

# Hidden states, and of a block with experts in training what its router chose: `routing_sums`
BlockOutput: TypeAlias = Tensor | tuple[Tensor, Tensor]

_aten = torch.ops.aten
# Selective activation checkpointing keeps the results of these: the products of linear layers and attention,
# which take nearly all time. Attention written out (`bmm`, T x T numbers a head) is recomputed.
_KEPT_OPS = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten._scaled_mm.default,
    torch.ops.distft.grouped_product.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}


def _keep_or_recompute(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    # Flex attention is no operation of aten but a "higher-order" one, known by its name alone.
    is_kept = operation in _KEPT_OPS or str(operation) == "flex_attention"
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


class Block(nn.Module):
    """Residual block: attention, then feed-forward; a norm before each, or after the sum with each."""

    __call__: Callable[..., Any]

    def __init__(self, config: TransformerConfig, index: int) -> None:
        super().__init__()
        # Three places of dropout a block: attention weights and both branches; 0 is that of the embeddings.
        self.first_dropout_site = 3 * index + 1
        has_attention_norm = index > 0 or config.first_attention_norm
        self.attn_norm = make_norm(config) if has_attention_norm else nn.Identity()
        self.attn = Attention(config)
        self.mlp_norm = make_norm(config)
        experts = config.experts_of(index)
        self.mlp = make_mlp(config) if experts is None else MixtureOfExperts(config, experts)
        self.is_pre_norm = config.norm_position == "pre"
        self.dropout = config.dropout
        self.recomputes_selectively = False  # keep only what `_KEPT_OPS` lists for the backward
        # With a gradient only: other batch shapes, as in evaluation, would compile once more for each.
        self.compiled_train: Callable[..., BlockOutput] | None = None

    def forward(
        self,
        x_BTC: Tensor,
        rope: RotaryCosSin | None,
        mask: AttentionMask,
        dropout_keys_B: Tensor | None = None,
        kv_cache: KVCache | None = None,
        *,
        is_real_BT: Tensor | None = None,
    ) -> BlockOutput:
        """`dropout_keys_B` is given in training with dropout only, `kv_cache` in generation only.

        `is_real_BT` is False in padding; it changes only what the router of a block with experts tells.
        """
        if dropout_keys_B is not None:
            # Here and not in what is compiled, for which blocks would differ: each would compile once more.
            dropout_keys_B = dropout_keys_B + self.first_dropout_site
        if kv_cache is not None or not torch.is_grad_enabled():
            return self._compute(x_BTC, rope, mask, dropout_keys_B, kv_cache)
        train = self.compiled_train or self._train
        return train(x_BTC, rope, mask, dropout_keys_B, is_real_BT)

    def compile_training(self) -> None:
        """Compile this block with torch.compile at its first call that needs a gradient."""
        # Not `self.compile()`, which compiles hooks too: those of ZeRO 3 gather and free the weights.
        self.compiled_train = torch.compile(self._train)

    def _train(
        self,
        x_BTC: Tensor,
        rope: RotaryCosSin | None,
        mask: AttentionMask,
        dropout_keys_B: Tensor | None,
        is_real_BT: Tensor | None,
    ) -> BlockOutput:
        if not self.recomputes_selectively:
            return self._compute(x_BTC, rope, mask, dropout_keys_B, is_real_BT=is_real_BT)
        # Here and not around the block, so that torch.compile sees it and recomputes within one kernel.
        contexts = partial(create_selective_checkpoint_contexts, _keep_or_recompute)
        output: BlockOutput = checkpoint(
            self._compute,
            x_BTC,
            rope,
            mask,
            dropout_keys_B,
            is_real_BT=is_real_BT,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=contexts,
        )
        return output

    def _compute(
        self,
        x_BTC: Tensor,
        rope: RotaryCosSin | None,
        mask: AttentionMask,
        dropout_keys_B: Tensor | None = None,
        kv_cache: KVCache | None = None,
        *,
        is_real_BT: Tensor | None = None,
    ) -> BlockOutput:
        y_BTC = self.attn(
            self.attn_norm(x_BTC) if self.is_pre_norm else x_BTC, rope, mask, dropout_keys_B, kv_cache
        )
        if dropout_keys_B is not None:
            y_BTC = dropout(y_BTC, self.dropout, dropout_keys_B, site=1)
        x_BTC = x_BTC + y_BTC
        if not self.is_pre_norm:
            x_BTC = self.attn_norm(x_BTC)
        inputs_BTC, routing = self.mlp_norm(x_BTC) if self.is_pre_norm else x_BTC, None
        if isinstance(self.mlp, MixtureOfExperts):
            tells_routing = kv_cache is None and torch.is_grad_enabled()
            y_BTC, routing = self.mlp(inputs_BTC, is_real_BT, tells_routing=tells_routing)
        else:
            y_BTC = self.mlp(inputs_BTC)
        if dropout_keys_B is not None:
            y_BTC = dropout(y_BTC, self.dropout, dropout_keys_B, site=2)
        x_BTC = x_BTC + y_BTC
        x_BTC = x_BTC if self.is_pre_norm else self.mlp_norm(x_BTC)
        return x_BTC if routing is None else (x_BTC, routing)
