"""What a model knows of its rows beside their tokens: positions, documents, padding, prefixes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

# (hidden [N, C], weight [V, C]) -> what the caller computes from them, such as a summed loss. A model that
# caps its logits x to cap * tanh(x / cap) passes `softcap=cap`, too.
HiddenLossFn: TypeAlias = Callable[..., Tensor]
HiddenLosses: TypeAlias = Mapping[str, HiddenLossFn]  # by the name of a head

# Beside the outputs of heads: what the routers of experts chose. No head can have this name.
ROUTING = "/routing"


class RowKeys:
    """The dropout keys of the rows that a model computes in training, for a layer that is not passed any."""

    of_rows: Tensor | None = None  # int64 [B]


def set_row_keys(layers: Sequence[RowKeys], keys_B: Tensor, first_site: int) -> None:
    """Give each of the layers keys of its own, as if they were at `first_site` and the following sites.

    Before the layers run, as compiled blocks that differ in a number would each compile once more.
    """
    sites_L1 = torch.arange(first_site, first_site + len(layers), device=keys_B.device)[:, None]
    for layer, own_B in zip(layers, (keys_B + sites_L1).unbind(), strict=True):
        layer.of_rows = own_B


def without_left_padding(x_BTC: Tensor, num_padding_B: Tensor | None) -> Tensor:
    """`x_BTC` with zeros at the first `num_padding_B` positions of each row; None: there are none."""
    if num_padding_B is None:
        return x_BTC
    is_real_BT = torch.arange(x_BTC.shape[1], device=x_BTC.device) >= num_padding_B[:, None]
    return torch.where(is_real_BT[..., None], x_BTC, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class RowLayout:
    """Of rows of shape [B, T]."""

    shape: torch.Size
    position_ids: Tensor  # int64 [1 or B, T]
    document_ids: Tensor | None = None  # int64 [B, T]: each document's tokens depend on that document alone
    lengths: Tensor | None = None  # int64 [B]: real tokens at each row's start
    is_prefix: Tensor | None = None  # bool [B, T]: tokens that a causal model's earlier tokens see, too
