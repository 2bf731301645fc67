"""Multi-head attention with rotary positions.

Shape letters: B rows, T query positions, S key positions, H query heads, G key-value heads, D head_dim,
R = D // 2 pairs that rotary positions rotate, C = d_model.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from distft.model.attention_kernels import AttentionMask, attention, attention_written_out
from distft.model.layers import Linear, MatmulDtype
from distft.model.rope_scaling import RopeScaling
from distft.model.transformer_config import TransformerConfig


class RotaryCosSin(NamedTuple):
    """Cosine and sine of each position's rotation angles, float32 [1 or B, T, 1, R]."""

    cos: Tensor
    sin: Tensor


class KVCache(Protocol):
    """Keys and values of one layer's earlier positions."""

    def update(self, k_BTGD: Tensor, v_BTGD: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values; return all so far, [B, S, G, D] each."""


class PreallocatedKVCache:
    """Keys and values of one layer. The first `update` allocates memory for `num_positions` positions."""

    def __init__(self, num_positions: int) -> None:
        self._num_positions = num_positions
        self._length = 0
        self._k_BSGD: Tensor | None = None
        self._v_BSGD: Tensor | None = None

    def __len__(self) -> int:
        """Positions so far."""
        return self._length

    def update(self, k_BTGD: Tensor, v_BTGD: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values; return all so far, [B, S, G, D] each."""
        if self._k_BSGD is None or self._v_BSGD is None:
            num_rows, _, *head_shape = k_BTGD.shape
            self._k_BSGD = k_BTGD.new_empty(num_rows, self._num_positions, *head_shape)
            self._v_BSGD = v_BTGD.new_empty(num_rows, self._num_positions, *head_shape)
        start, self._length = self._length, self._length + k_BTGD.shape[1]
        self._k_BSGD[:, start : self._length] = k_BTGD
        self._v_BSGD[:, start : self._length] = v_BTGD
        return self._k_BSGD[:, : self._length], self._v_BSGD[:, : self._length]


class SlidingKVCache:
    """Keys and values of a layer with a window: of the last positions only, which later ones can see."""

    def __init__(self, reach: int) -> None:
        self._reach = reach
        self._length = 0
        self._k_BSGD: Tensor | None = None
        self._v_BSGD: Tensor | None = None

    def __len__(self) -> int:
        """Positions so far, with those that are forgotten."""
        return self._length

    def update(self, k_BTGD: Tensor, v_BTGD: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values; return them with the last `reach` before, [B, S, G, D] each."""
        self._length += k_BTGD.shape[1]
        if self._k_BSGD is not None and self._v_BSGD is not None:
            k_BTGD = torch.cat([self._k_BSGD, k_BTGD], dim=1)
            v_BTGD = torch.cat([self._v_BSGD, v_BTGD], dim=1)
        start = max(k_BTGD.shape[1] - self._reach, 0)
        # Copies: a view of a long prompt would keep all of it in memory.
        self._k_BSGD, self._v_BSGD = k_BTGD[:, start:].clone(), v_BTGD[:, start:].clone()
        return k_BTGD, v_BTGD


def inverse_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None, device: torch.device
) -> Tensor:
    """Radians per position of each pair, float32 [R] (RoPE: Su et al. 2021, arXiv:2104.09864)."""
    exponents_R = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    return theta**-exponents_R if scaling is None else scaling.scaled(1.0 / theta**exponents_R, theta)


def rotary_cos_sin(
    position_ids: Tensor, inverse_frequencies_R: Tensor, magnitude: float = 1.0
) -> RotaryCosSin:
    """Of the rotation angles of `position_ids` [1 or B, T], times `magnitude`."""
    angles = position_ids[..., None, None].float() * inverse_frequencies_R
    if magnitude == 1:
        return RotaryCosSin(angles.cos(), angles.sin())
    return RotaryCosSin(angles.cos() * magnitude, angles.sin() * magnitude)


def apply_rotary(x_BTHD: Tensor, rope: RotaryCosSin) -> Tensor:
    """Rotate each pair (x[i], x[i + R]) of every head by its position's angle; pairs as in Llama."""
    a, b = x_BTHD.chunk(2, dim=-1)
    # cos and sin are fp32, so a bf16 input is rotated in fp32 and rounded once.
    rotated = torch.cat((a * rope.cos - b * rope.sin, b * rope.cos + a * rope.sin), dim=-1)
    return rotated.to(x_BTHD.dtype)


class Attention(nn.Module):
    """Multi-head attention with grouped key-value heads: `q`, `k`, `v`, `o`."""

    __call__: Callable[..., Tensor]

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim, self.is_causal, self.dropout = config.head_dim, config.is_causal, config.dropout
        self.kernel, self.softcap = config.attention_kernel, config.attention_logit_softcap
        self.scale = config.attention_scale
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
        if dropout_keys_B is None:
            y_BHTD = attention(
                q_BHTD,
                k_BGSD,
                v_BGSD,
                mask,
                is_causal=self.is_causal,
                kernel=self.kernel,
                softcap=self.softcap,
                scale=self.scale,
            )
        else:
            y_BHTD = attention_written_out(
                q_BHTD,
                k_BGSD,
                v_BGSD,
                mask,
                is_causal=self.is_causal,
                softcap=self.softcap,
                scale=self.scale,
                rate=self.dropout,
                keys_B=dropout_keys_B,
            )
        return y_BHTD.transpose(1, 2).to(q_BTHD.dtype)
