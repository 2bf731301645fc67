"""Which kernel computes attention, the mask that it takes, and the call.

Shape letters: B rows, T query positions, S key positions, H query heads, G key-value heads, D head_dim.
"""

from __future__ import annotations

import contextlib
import logging
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias, Union

import torch
from torch import Tensor
from torch.nn import functional

from distft.errors import ConfigError
from distft.model.compiler import missing_for_compile
from distft.model.dropout import dropout

if TYPE_CHECKING:  # flex attention imports torch's compiler, 2 s
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from torch.nn.attention.flex_attention import BlockMask

    from distft.model.transformer_config import TransformerConfig

# bool [B or 1, 1, T, S] (True: the query attends to the key), flex attention's block mask, or None: every
# key, or in a causal model every key up to the query
AttentionMask: TypeAlias = Union[Tensor, "BlockMask", None]

_log = logging.getLogger(__name__)


def require_attention_kernel(config: TransformerConfig, device: torch.device) -> None:
    """Raise `ConfigError` if `config.attention_kernel` cannot run on `device`."""
    kernel = config.attention_kernel
    if kernel in {"auto", "sdpa"}:
        return
    lack = "a CUDA device" if device.type != "cuda" else None
    if lack is None and kernel == "flex":
        lack = missing_for_compile(device)
    if lack is not None:
        raise ConfigError(
            f"model.attention_kernel={kernel} needs {lack}: set model.attention_kernel=auto, which takes the "
            "best kernel that this machine has."
        )


def uses_flex_attention(config: TransformerConfig, device: torch.device) -> bool:
    """Whether rows packed with several documents go through flex attention on `device`."""
    if config.attention_kernel != "auto":
        return config.attention_kernel == "flex"
    return device.type == "cuda" and _lacks_for_flex(config, device) is None


def _lacks_for_flex(config: TransformerConfig, device: torch.device) -> str | None:
    """Why the compiled kernel cannot compute this model's attention; None if it can."""
    if config.dropout:
        return f"it drops no attention weights (model.dropout={config.dropout})"
    if config.head_dim < 16 or config.head_dim & (config.head_dim - 1):
        return f"it takes heads of 16, 32, 64, ... elements (model.head_dim={config.head_dim})"
    lack = missing_for_compile(device)
    return lack and f"it needs {lack}, which this machine lacks"


def make_attention_mask(
    config: TransformerConfig,
    shape: torch.Size,
    document_ids: Tensor | None,
    lengths: Tensor | None,
    is_prefix: Tensor | None = None,
    *,
    reach: int | None = None,
    device: torch.device | None = None,
) -> AttentionMask:
    """The mask of rows of `shape` [B, T] on `device`; None if the kernel needs none.

    Every position attends to itself, also in padding: a softmax over no keys would give NaN. Tokens attend to
    those of their document that `is_prefix` marks, wherever these are; padding is never marked. `reach` is
    that of a layer with a window: nothing farther away is seen, a prefix neither.
    """
    if config.is_causal:
        lengths = None  # padding is on the right, so no real token attends to it anyway
    else:
        is_prefix = None  # every token attends to all others anyway
    num_positions = shape[1]
    if reach is not None and reach >= num_positions - 1:
        reach = None  # the window covers the row
    given = [x for x in (document_ids, lengths, is_prefix) if x is not None]
    device = given[0].device if given else device or torch.device("cpu")
    # No other kernel caps scores, and without one all T x T of them would be in memory.
    is_capped_by_flex = config.attention_logit_softcap is not None and uses_flex_attention(config, device)
    if not given and reach is None and not is_capped_by_flex:
        return None
    if lengths is None and is_prefix is None and uses_flex_attention(config, device):
        return _flex_block_mask(shape, document_ids, device, is_causal=config.is_causal, reach=reach)
    if device.type == "cuda" and (document_ids is not None or reach is not None):
        _warn_of_dense_mask(_lacks_for_flex(config, device) or "model.attention_kernel excludes it")
    positions = torch.arange(num_positions, device=device)
    mask = torch.ones(1, 1, num_positions, num_positions, dtype=torch.bool, device=device)
    if config.is_causal:
        mask = mask.tril()
    if is_prefix is not None:
        mask = mask | is_prefix[:, None, None, :]
    if reach is not None:
        mask = mask & ((positions[:, None] - positions).abs() <= reach)
    if document_ids is not None:
        mask = mask & (document_ids[:, None, :, None] == document_ids[:, None, None, :])
    if lengths is not None:
        is_real = positions < lengths[:, None]
        mask = mask & (is_real[:, None, None, :] | (positions[:, None] == positions))
    return mask


@cache
def _warn_of_dense_mask(reason: str) -> None:
    _log.warning(
        "Packed rows and windows are computed with a dense mask, as slow as rows of one document and with "
        "T x T bytes of memory per row: flex attention cannot serve them, because %s.",
        reason,
    )


def _flex_block_mask(
    shape: torch.Size,
    document_ids: Tensor | None,
    device: torch.device,
    *,
    is_causal: bool,
    reach: int | None,
) -> BlockMask:
    def attends(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        sees = query >= key if is_causal else key >= 0
        if document_ids is not None:
            sees = sees & (document_ids[row, query] == document_ids[row, key])
        if reach is not None:
            sees = sees & (query - key <= reach) & (key - query <= reach)
        return sees

    from torch.nn.attention.flex_attention import create_block_mask

    num_rows, num_positions = shape
    create = _compiled("create_block_mask") if _compiles_flex(device) else create_block_mask
    of_rows = None if document_ids is None else num_rows  # None: one for all
    return create(attends, of_rows, None, num_positions, num_positions, device=str(device))


def _compiles_flex(device: torch.device) -> bool:
    """Whether to compile flex attention by itself: on a GPU, unless an enclosing torch.compile does."""
    return device.type == "cuda" and not torch.compiler.is_compiling()


@cache
def _capped(cap: float) -> Callable[..., Tensor]:
    """The change of scores for flex attention; the same function for each call, so that it compiles once."""

    def change(score: Tensor, _row: Tensor, _head: Tensor, _query: Tensor, _key: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return change


@cache
def _compiled(name: str) -> Any:
    from torch.nn.attention import flex_attention

    return torch.compile(getattr(flex_attention, name))


def attention(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    mask: AttentionMask,
    *,
    is_causal: bool,
    kernel: str,
    softcap: float | None = None,
    scale: float | None = None,
) -> Tensor:
    """Weighted sums of the values, [B, H, T, D]; `kernel` is the setting `model.attention_kernel`.

    `scale` None: D ** -0.5.
    """
    is_grouped = q_BHTD.shape[1] != k_BGSD.shape[1]
    if mask is not None and not isinstance(mask, Tensor):
        # Flex skips blocks of keys that no query of a block attends to, so packed documents cost little
        # more than the sum of their squared lengths. SDPA with a dense mask computes all T x S scores.
        from torch.nn.attention.flex_attention import flex_attention

        flex = _compiled("flex_attention") if _compiles_flex(q_BHTD.device) else flex_attention
        change = None if softcap is None else _capped(softcap)
        return flex(  # type: ignore[no-any-return]
            q_BHTD, k_BGSD, v_BGSD, score_mod=change, block_mask=mask, scale=scale, enable_gqa=is_grouped
        )
    if softcap is not None:
        return attention_written_out(
            q_BHTD, k_BGSD, v_BGSD, mask, is_causal=is_causal, softcap=softcap, scale=scale
        )
    if is_grouped and mask is not None and q_BHTD.is_cuda:
        # No fused kernel takes both a mask and grouped heads: SDPA would keep all T x S scores in memory.
        k_BGSD, v_BGSD = (_for_each_head(x, q_BHTD) for x in (k_BGSD, v_BGSD))
        is_grouped = False
    with _cudnn_first() if kernel == "cudnn" else contextlib.nullcontext():
        return functional.scaled_dot_product_attention(
            q_BHTD,
            k_BGSD,
            v_BGSD,
            attn_mask=mask,
            is_causal=is_causal and mask is None,  # SDPA refuses both a mask and is_causal
            scale=scale,
            enable_gqa=is_grouped,
        )


def _for_each_head(x_BGSD: Tensor, q_BHTD: Tensor) -> Tensor:
    """Keys or values repeated for each query head that they serve, [B, H, S, D]."""
    return x_BGSD.repeat_interleave(q_BHTD.shape[1] // x_BGSD.shape[1], dim=1)


def _cudnn_first() -> AbstractContextManager[None]:
    """SDPA tries cuDNN's kernel, and its usual ones where cuDNN has none."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    return sdpa_kernel(order, set_priority=True)


def attention_written_out(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    mask: AttentionMask,
    *,
    is_causal: bool,
    softcap: float | None = None,
    scale: float | None = None,
    rate: float = 0.0,
    keys_B: Tensor | None = None,
) -> Tensor:
    """Attention with all T x S weights in memory: no kernel drops weights, and none but flex caps scores.

    `keys_B` is given to drop weights at `rate`.
    """
    assert mask is None or isinstance(mask, Tensor)  # `uses_flex_attention` rules a block mask out
    k_BHSD, v_BHSD = (_for_each_head(x, q_BHTD) for x in (k_BGSD, v_BGSD))
    scores_BHTS = q_BHTD @ k_BHSD.transpose(2, 3) * (q_BHTD.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores_BHTS = softcap * torch.tanh(scores_BHTS.float() / softcap)
    if mask is None and is_causal:
        mask = torch.ones(scores_BHTS.shape[2:], dtype=torch.bool, device=scores_BHTS.device).tril()
    if mask is not None:
        scores_BHTS = scores_BHTS.masked_fill(~mask, -torch.inf)
    weights_BHTS = torch.softmax(scores_BHTS, dim=-1, dtype=torch.float32)
    if keys_B is not None:
        weights_BHTS = dropout(weights_BHTS, rate, keys_B, site=0)
    return weights_BHTS.to(v_BHSD.dtype) @ v_BHSD
