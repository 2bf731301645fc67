"""Which position sees which, and the kernels that compute it.

Shape letters: B rows, T query positions, S key positions, H query heads, G key-value heads, D head_dim,
R = D // 2 rotation pairs, C = d_model.
"""

from functools import cache
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from distft.model.config import ModelConfig
from distft.model.linear import Linear, ProductFormat

# bool [B, 1, T, S] (True: sees), blocks of it, or nothing special
Mask: TypeAlias = Tensor | BlockMask | None


class Rotation(NamedTuple):
    """Cosine and sine of each position's angles, float32 [1 or B, T, 1, R]."""

    cos: Tensor
    sin: Tensor


class LayerCache(Protocol):
    """Keys and values of earlier positions of one layer."""

    def extend(self, k_BTGD: Tensor, v_BTGD: Tensor) -> tuple[Tensor, Tensor]:
        """Keep these too; return all of them, [B, S, G, D] each."""


def rotation(position_ids: Tensor, head_dim: int, theta: float) -> Rotation:
    """Angles of `position_ids` [1 or B, T] (Su et al. 2021, arXiv:2104.09864), halves paired as in Llama."""
    exponents_R = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim
    angles = position_ids[..., None, None].float() * theta**-exponents_R
    return Rotation(angles.cos(), angles.sin())


def rotate(x_BTHD: Tensor, turn: Rotation) -> Tensor:
    """Turn each pair (x[i], x[i + R]) of every head by its position's angle."""
    a, b = x_BTHD.chunk(2, dim=-1)
    turned = torch.cat((a * turn.cos - b * turn.sin, b * turn.cos + a * turn.sin), dim=-1)
    return turned.to(x_BTHD.dtype)


def uses_flex(config: ModelConfig, device: torch.device) -> bool:
    """Whether packed rows go through flex attention on `device`."""
    if config.attention_kernel != "auto":
        return config.attention_kernel == "flex"
    # The compiled kernel wants heads of 16, 32, 64, ... elements, and drops no attention weights.
    fits = config.head_dim >= 16 and config.head_dim & (config.head_dim - 1) == 0
    return device.type == "cuda" and fits and not config.dropout


def make_mask(
    config: ModelConfig, shape: torch.Size, document_ids: Tensor | None, lengths: Tensor | None
) -> Mask:
    """Who sees whom in rows of `shape` [B, T]; None where the kernel needs no telling.

    Every position sees at least itself, padding too, so that no softmax is over nothing.
    """
    if config.is_causal:
        lengths = None  # right padding lies ahead of every real token
    if document_ids is None and lengths is None:
        return None
    if document_ids is not None and lengths is None and uses_flex(config, document_ids.device):
        return _block_mask(document_ids, is_causal=config.is_causal)
    num_positions = shape[1]
    device = document_ids.device if document_ids is not None else lengths.device  # type: ignore[union-attr]
    positions = torch.arange(num_positions, device=device)
    sees = torch.ones(1, 1, num_positions, num_positions, dtype=torch.bool, device=device)
    if config.is_causal:
        sees = sees.tril()
    if document_ids is not None:
        sees = sees & (document_ids[:, None, :, None] == document_ids[:, None, None, :])
    if lengths is not None:
        is_real = positions < lengths[:, None]
        sees = sees & (is_real[:, None, None, :] | (positions[:, None] == positions))
    return sees


def _block_mask(document_ids: Tensor, *, is_causal: bool) -> BlockMask:
    def sees(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same_document = document_ids[row, query] == document_ids[row, key]
        return same_document & (query >= key) if is_causal else same_document

    num_rows, num_positions = document_ids.shape
    create = create_block_mask if not _compiles(document_ids) else _compiled_create_block_mask()
    blocks: BlockMask = create(
        sees, num_rows, None, num_positions, num_positions, device=str(document_ids.device)
    )
    return blocks


def _compiles(tensor: Tensor) -> bool:
    """Flex attention is compiled on its own on a GPU, unless the whole model is being compiled anyway."""
    return tensor.is_cuda and not torch.compiler.is_compiling()


@cache
def _compiled_create_block_mask() -> Any:
    return torch.compile(create_block_mask)


@cache
def _compiled_flex_attention() -> Any:
    return torch.compile(flex_attention)


class Attention(nn.Module):
    """Multi-head attention with grouped key-value heads: `q`, `k`, `v`, `o`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim, self.is_causal, self.dropout = config.head_dim, config.is_causal, config.dropout
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q = Linear(config.d_model, q_size, bias=config.has_qkv_bias)
        self.k = Linear(config.d_model, kv_size, bias=config.has_qkv_bias)
        self.v = Linear(config.d_model, kv_size, bias=config.has_qkv_bias)
        self.o = Linear(q_size, config.d_model, bias=config.attention_bias)
        self.q_norm = nn.RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.product_format = ProductFormat()

    def forward(
        self, x_BTC: Tensor, turn: Rotation | None, mask: Mask, cache: LayerCache | None = None
    ) -> Tensor:
        num_rows, num_positions, _ = x_BTC.shape
        q_BTHD = self.q(x_BTC).view(num_rows, num_positions, self.num_heads, self.head_dim)
        k_BTGD = self.k(x_BTC).view(num_rows, num_positions, self.num_kv_heads, self.head_dim)
        v_BTGD = self.v(x_BTC).view(num_rows, num_positions, self.num_kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHD, k_BTGD = self.q_norm(q_BTHD), self.k_norm(k_BTGD)
        if turn is not None:
            q_BTHD, k_BTGD = rotate(q_BTHD, turn), rotate(k_BTGD, turn)
        if cache is not None:
            k_BTGD, v_BTGD = cache.extend(k_BTGD, v_BTGD)
        mixed_BTHD = self._mix(q_BTHD, k_BTGD, v_BTGD, mask)
        mixed: Tensor = self.o(mixed_BTHD.flatten(2))
        return mixed

    def _mix(self, q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, mask: Mask) -> Tensor:
        dtype = self.product_format(q_BTHD)
        # Views only: the kernels take any strides, and hand back memory laid out as [B, T, H, D].
        q_BHTD, k_BGSD, v_BGSD = (x.to(dtype).transpose(1, 2) for x in (q_BTHD, k_BSGD, v_BSGD))
        is_grouped = self.num_heads != self.num_kv_heads
        if isinstance(mask, BlockMask):
            attend = _compiled_flex_attention() if _compiles(q_BTHD) else flex_attention
            mixed = attend(q_BHTD, k_BGSD, v_BGSD, block_mask=mask, enable_gqa=is_grouped)
        else:
            mixed = functional.scaled_dot_product_attention(
                q_BHTD,
                k_BGSD,
                v_BGSD,
                attn_mask=mask,
                dropout_p=self.dropout if self.training else 0.0,
                is_causal=self.is_causal and mask is None,
                enable_gqa=is_grouped,
            )
        mixed_BTHD: Tensor = mixed.transpose(1, 2).to(q_BTHD.dtype)
        return mixed_BTHD
