"""Multi-head attention with rotary positions, its masks, and the choice of kernel.

Shape letters: B rows, T query positions, S key positions, H query heads, G key-value heads, D head_dim,
R = D // 2 pairs that rotary positions rotate, C = d_model.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from distft.model.config import ModelConfig
from distft.model.dropout import dropout
from distft.model.layers import Linear, MatmulDtype

# bool [B or 1, 1, T, S] (True: the query attends to the key), flex attention's block mask, or None: every
# key, or in a causal model every key up to the query
AttentionMask: TypeAlias = Tensor | BlockMask | None


class RotaryCosSin(NamedTuple):
    """Cosine and sine of each position's rotation angles, float32 [1 or B, T, 1, R]."""

    cos: Tensor
    sin: Tensor


class KVCache(Protocol):
    """Keys and values of one layer's earlier positions."""

    def update(self, k_BTGD: Tensor, v_BTGD: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values; return all so far, [B, S, G, D] each."""


def rotary_cos_sin(position_ids: Tensor, head_dim: int, theta: float) -> RotaryCosSin:
    """Rotation angles of `position_ids` [1 or B, T] (RoPE: Su et al. 2021, arXiv:2104.09864)."""
    exponents_R = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim
    angles = position_ids[..., None, None].float() * theta**-exponents_R
    return RotaryCosSin(angles.cos(), angles.sin())


def apply_rotary(x_BTHD: Tensor, rope: RotaryCosSin) -> Tensor:
    """Rotate each pair (x[i], x[i + R]) of every head by its position's angle; pairs as in Llama."""
    a, b = x_BTHD.chunk(2, dim=-1)
    # cos and sin are fp32, so a bf16 input is rotated in fp32 and rounded once.
    rotated = torch.cat((a * rope.cos - b * rope.sin, b * rope.cos + a * rope.sin), dim=-1)
    return rotated.to(x_BTHD.dtype)


def uses_flex_attention(config: ModelConfig, device: torch.device) -> bool:
    """Whether rows packed with several documents go through flex attention on `device`."""
    if config.attention_kernel != "auto":
        return config.attention_kernel == "flex"
    # The compiled kernel supports heads of 16, 32, 64, ... elements only, and no dropout.
    is_supported = config.head_dim >= 16 and config.head_dim & (config.head_dim - 1) == 0
    return device.type == "cuda" and is_supported and not config.dropout


def make_attention_mask(
    config: ModelConfig, shape: torch.Size, document_ids: Tensor | None, lengths: Tensor | None
) -> AttentionMask:
    """The mask of rows of `shape` [B, T]; None if the kernel needs none.

    Every position attends to itself, also in padding: a softmax over no keys would give NaN.
    """
    if config.is_causal:
        lengths = None  # padding is on the right, so no real token attends to it anyway
    if document_ids is None and lengths is None:
        return None
    if document_ids is not None and lengths is None and uses_flex_attention(config, document_ids.device):
        return _flex_block_mask(document_ids, is_causal=config.is_causal)
    num_positions = shape[1]
    device = document_ids.device if document_ids is not None else lengths.device  # type: ignore[union-attr]
    positions = torch.arange(num_positions, device=device)
    mask = torch.ones(1, 1, num_positions, num_positions, dtype=torch.bool, device=device)
    if config.is_causal:
        mask = mask.tril()
    if document_ids is not None:
        mask = mask & (document_ids[:, None, :, None] == document_ids[:, None, None, :])
    if lengths is not None:
        is_real = positions < lengths[:, None]
        mask = mask & (is_real[:, None, None, :] | (positions[:, None] == positions))
    return mask


def _flex_block_mask(document_ids: Tensor, *, is_causal: bool) -> BlockMask:
    def attends(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same_document = document_ids[row, query] == document_ids[row, key]
        return same_document & (query >= key) if is_causal else same_document

    num_rows, num_positions = document_ids.shape
    create = _compiled_create_block_mask() if _compiles_flex(document_ids) else create_block_mask
    return create(attends, num_rows, None, num_positions, num_positions, device=str(document_ids.device))


def _compiles_flex(tensor: Tensor) -> bool:
    """Whether to compile flex attention by itself: on a GPU, unless an enclosing torch.compile does."""
    return tensor.is_cuda and not torch.compiler.is_compiling()


@cache
def _compiled_create_block_mask() -> Callable[..., BlockMask]:
    return torch.compile(create_block_mask)


@cache
def _compiled_flex_attention() -> Any:
    return torch.compile(flex_attention)


class Attention(nn.Module):
    """Multi-head attention with grouped key-value heads: `q`, `k`, `v`, `o`."""

    __call__: Callable[..., Tensor]

    def __init__(self, config: ModelConfig, dropout_site: int) -> None:
        super().__init__()
        self.dropout_site = dropout_site
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim, self.is_causal, self.dropout = config.head_dim, config.is_causal, config.dropout
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q = Linear(config.d_model, q_size, bias=config.has_qkv_bias)
        self.k = Linear(config.d_model, kv_size, bias=config.has_qkv_bias)
        self.v = Linear(config.d_model, kv_size, bias=config.has_qkv_bias)
        self.o = Linear(q_size, config.d_model, bias=config.attention_bias)
        self.q_norm = nn.RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.matmul_dtype = MatmulDtype()

    def forward(
        self,
        x_BTC: Tensor,
        rope: RotaryCosSin | None,
        mask: AttentionMask,
        dropout_keys_B: Tensor | None = None,
        kv_cache: KVCache | None = None,
    ) -> Tensor:
        """`dropout_keys_B` is given in training with dropout only, `kv_cache` in generation only."""
        num_rows, num_positions, _ = x_BTC.shape
        q_BTHD = self.q(x_BTC).view(num_rows, num_positions, self.num_heads, self.head_dim)
        k_BTGD = self.k(x_BTC).view(num_rows, num_positions, self.num_kv_heads, self.head_dim)
        v_BTGD = self.v(x_BTC).view(num_rows, num_positions, self.num_kv_heads, self.head_dim)
        # Norm before rotation, as in Qwen 3; the order matters, because the norm has a weight per element.
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHD, k_BTGD = self.q_norm(q_BTHD), self.k_norm(k_BTGD)
        if rope is not None:
            q_BTHD, k_BTGD = apply_rotary(q_BTHD, rope), apply_rotary(k_BTGD, rope)
        if kv_cache is not None:  # generation only; keys are cached after rotation, so each is rotated once
            k_BTGD, v_BTGD = kv_cache.update(k_BTGD, v_BTGD)
        return self.o(self._attend(q_BTHD, k_BTGD, v_BTGD, mask, dropout_keys_B).flatten(2))

    def _attend(
        self,
        q_BTHD: Tensor,
        k_BSGD: Tensor,
        v_BSGD: Tensor,
        mask: AttentionMask,
        dropout_keys_B: Tensor | None,
    ) -> Tensor:
        """Weighted sums of the values, [B, T, H, D]."""
        dtype = self.matmul_dtype(q_BTHD)
        # Transposed views, no copies: the kernels accept any strides. They return memory laid out as
        # [B, T, H, D], so flatten(2) in forward copies nothing either.
        q_BHTD, k_BGSD, v_BGSD = (x.to(dtype).transpose(1, 2) for x in (q_BTHD, k_BSGD, v_BSGD))
        is_grouped = self.num_heads != self.num_kv_heads
        if dropout_keys_B is not None:
            y_BHTD = self._attend_with_dropout(q_BHTD, k_BGSD, v_BGSD, mask, dropout_keys_B)
        elif isinstance(mask, BlockMask):
            # Flex skips blocks of keys that no query of a block attends to, so packed documents cost little
            # more than the sum of their squared lengths. SDPA with a dense mask computes all T x S scores.
            flex = _compiled_flex_attention() if _compiles_flex(q_BTHD) else flex_attention
            y_BHTD = flex(q_BHTD, k_BGSD, v_BGSD, block_mask=mask, enable_gqa=is_grouped)
        else:
            y_BHTD = functional.scaled_dot_product_attention(
                q_BHTD,
                k_BGSD,
                v_BGSD,
                attn_mask=mask,
                is_causal=self.is_causal and mask is None,  # SDPA refuses both a mask and is_causal
                enable_gqa=is_grouped,
            )
        return y_BHTD.transpose(1, 2).to(q_BTHD.dtype)

    def _attend_with_dropout(
        self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask: AttentionMask, keys_B: Tensor
    ) -> Tensor:
        """Attention written out, with all T x S weights in memory: no kernel takes a mask per weight."""
        assert not isinstance(mask, BlockMask)  # `uses_flex_attention` rules it out
        num_groups = self.num_heads // self.num_kv_heads
        k_BHSD, v_BHSD = (x.repeat_interleave(num_groups, dim=1) for x in (k_BGSD, v_BGSD))
        scores_BHTS = q_BHTD @ k_BHSD.transpose(2, 3) * self.head_dim**-0.5
        if mask is None and self.is_causal:
            mask = torch.ones(scores_BHTS.shape[2:], dtype=torch.bool, device=scores_BHTS.device).tril()
        if mask is not None:
            scores_BHTS = scores_BHTS.masked_fill(~mask, -torch.inf)
        weights_BHTS = torch.softmax(scores_BHTS, dim=-1, dtype=torch.float32)
        weights_BHTS = dropout(weights_BHTS, self.dropout, keys_B, self.dropout_site)
        return weights_BHTS.to(v_BHSD.dtype) @ v_BHSD
