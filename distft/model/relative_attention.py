"""T5's attention: scores without a scale, with a learned bias for each distance (Raffel et al. 2019).

Shape letters: B rows, T query positions, S key positions, H heads, D head_dim, C = d_model.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from distft.model.dropout import dropout
from distft.model.encoder_decoder_config import EncoderDecoderConfig
from distft.model.layers import Linear, MatmulDtype, make_embedding

KeysAndValues = tuple[Tensor, Tensor]  # [B, S, H, D] each


class RelativeBias(nn.Module):
    """The bias of each head's scores by how far key and query are apart; all blocks of a stack share it."""

    __call__: Callable[..., Tensor]

    def __init__(self, config: EncoderDecoderConfig, *, is_causal: bool) -> None:
        super().__init__()
        self._is_causal = is_causal
        self._num_buckets, self._max_distance = config.num_buckets, config.max_distance
        self.embed = make_embedding(config.num_buckets, config.num_heads)

    def forward(self, num_queries: int, num_keys: int, mask: Tensor | None) -> Tensor:
        """[B or 1, H, T, S] of the last `num_queries` of `num_keys` positions; -inf where `mask` is False."""
        device = self.embed.weight.device
        keys_S = torch.arange(num_keys, device=device)
        distances_TS = keys_S - keys_S[num_keys - num_queries :, None]
        buckets_TS = relative_buckets(
            distances_TS, self._num_buckets, self._max_distance, is_causal=self._is_causal
        )
        bias_1HTS: Tensor = self.embed(buckets_TS).permute(2, 0, 1)[None]
        return bias_1HTS if mask is None else bias_1HTS.masked_fill(~mask, -torch.inf)


def relative_buckets(distances: Tensor, num_buckets: int, max_distance: int, *, is_causal: bool) -> Tensor:
    """The bucket of each distance, key minus query. Half of a direction's buckets have one distance each.

    The others grow with the distance's logarithm, up to `max_distance`. A causal model has no keys ahead.
    """
    first = torch.zeros_like(distances)
    if is_causal:
        apart = (-distances).clamp_min(0)
    else:
        num_buckets //= 2
        first = (distances > 0) * num_buckets
        apart = distances.abs()
    num_exact = num_buckets // 2
    ratio = (apart.clamp_min(num_exact).float() / num_exact).log() / math.log(max_distance / num_exact)
    far = num_exact + (ratio * (num_buckets - num_exact)).long()
    return first + torch.where(apart < num_exact, apart, far.clamp_max(num_buckets - 1))


class RelativeAttention(nn.Module):
    """Multi-head attention with a bias on its scores, to the same or another sequence: `q`, `k`, `v`, `o`."""

    __call__: Callable[..., Tensor]

    def __init__(self, config: EncoderDecoderConfig) -> None:
        super().__init__()
        self._num_heads, self._head_dim = config.num_heads, config.head_dim
        self._dropout = config.dropout
        size = config.num_heads * config.head_dim
        self.q = Linear(config.d_model, size, bias=False)
        self.k = Linear(config.d_model, size, bias=False)
        self.v = Linear(config.d_model, size, bias=False)
        self.o = Linear(size, config.d_model, bias=False)
        self.matmul_dtype = MatmulDtype()

    def keys_and_values(self, x_BSC: Tensor) -> KeysAndValues:
        return self._heads(self.k(x_BSC)), self._heads(self.v(x_BSC))

    def forward(
        self, x_BTC: Tensor, keys_and_values: KeysAndValues, bias: Tensor, dropout_keys_B: Tensor | None
    ) -> Tensor:
        """`bias` [B or 1, H or 1, T, S] is added to the scores, or bool: whether a query sees a key."""
        q_BTHD = self._heads(self.q(x_BTC))
        dtype = self.matmul_dtype(q_BTHD)
        q_BHTD, k_BHSD, v_BHSD = (x.to(dtype).transpose(1, 2) for x in (q_BTHD, *keys_and_values))
        if bias.dtype != torch.bool:
            bias = bias.to(dtype)
        if dropout_keys_B is None:
            y_BHTD = functional.scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD, bias, scale=1.0)
        else:
            scores_BHTS = q_BHTD @ k_BHSD.transpose(2, 3)
            if bias.dtype == torch.bool:
                scores_BHTS = scores_BHTS.masked_fill(~bias, -torch.inf)
            else:
                scores_BHTS = scores_BHTS + bias
            weights_BHTS = torch.softmax(scores_BHTS, dim=-1, dtype=torch.float32)
            weights_BHTS = dropout(weights_BHTS, self._dropout, dropout_keys_B, site=0)
            y_BHTD = weights_BHTS.to(dtype) @ v_BHSD
        return self.o(y_BHTD.transpose(1, 2).flatten(2).to(x_BTC.dtype))

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self._num_heads, self._head_dim)
