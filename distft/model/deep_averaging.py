"""A deep averaging network: the mean of a document's embeddings, then feed-forward layers.

Shape letters: B rows, T positions, N = B * T, D documents, C = d_model, H = output_size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distft.model.documents import documents_of
from distft.model.dropout import dropout
from distft.model.layers import Linear
from distft.model.layout import RowLayout, without_left_padding
from distft.model.older_configs import DeepAveragingConfig
from distft.model.with_heads import ModelWithHeads


class DeepAveragingModel(ModelWithHeads):
    """All positions of a document have the same hidden state; causal: that of the document up to there."""

    config: DeepAveragingConfig

    def make_backbone(self) -> None:
        config = self.config
        self.runs_layers_on_rows = config.is_causal  # else on documents, of which a row may have several
        self.blocks = nn.ModuleList(
            Linear(width, config.d_hidden, bias=True) for width in config.input_widths()
        )

    def encode(self, x_BTC: Tensor, layout: RowLayout, dropout_keys_B: Tensor | None) -> Tensor:
        documents = documents_of(layout)
        num_rows, num_positions = layout.shape
        if self.config.is_causal:
            offsets_BT = documents.offsets.view(layout.shape)
            starts_BT = torch.arange(num_positions, device=x_BTC.device) - offsets_BT
            mean_BTC = _running_sums(x_BTC, starts_BT) / (offsets_BT[..., None] + 1)
            return self._layers(mean_BTC.to(x_BTC.dtype), dropout_keys_B)
        sums_DC = torch.zeros(documents.num_documents, x_BTC.shape[-1], device=x_BTC.device)
        sums_DC = sums_DC.index_add(0, documents.numbers, x_BTC.flatten(0, 1).float())
        mean_DC = (sums_DC / documents.lengths[:, None]).to(x_BTC.dtype)
        keys_D = None
        if dropout_keys_B is not None:
            # The documents of a row draw different numbers.
            firsts_D = (documents.offsets == 0).nonzero()[:, 0]
            keys_D = dropout_keys_B[firsts_D // num_positions] ^ (firsts_D % num_positions) << 32
        y_DH = self._layers(mean_DC, keys_D)
        return y_DH[documents.numbers].view(num_rows, num_positions, -1)

    def new_caches(self, num_positions: int) -> Sequence[dict[str, Tensor]]:  # noqa: ARG002
        return [{}]  # the sum of the embeddings so far, float64 [B, 1, C]

    def encode_cached(
        self, x_BTC: Tensor, position_ids: Tensor, caches: Sequence[Any], num_padding_B: Tensor | None
    ) -> Tensor:
        (cache,) = caches
        if not cache:
            x_BTC = without_left_padding(x_BTC, num_padding_B)
        sums_BTC = x_BTC.double().cumsum(1) + cache.get("sum", 0.0)
        cache["sum"] = sums_BTC[:, -1:]
        return self._layers((sums_BTC / (position_ids[..., None] + 1)).to(x_BTC.dtype), None)

    def _layers(self, x: Tensor, dropout_keys: Tensor | None) -> Tensor:
        for index, layer in enumerate(self.blocks):
            x = torch.relu(layer(x))
            if dropout_keys is not None:
                x = dropout(x, self.config.dropout, dropout_keys, site=index + 1)
        return x


def _running_sums(x_BTC: Tensor, starts_BT: Tensor) -> Tensor:
    """Of each position and those before it, from `starts_BT` on; in fp64, since it is a difference."""
    sums_BTC = x_BTC.double().cumsum(1)
    before_BTC = (sums_BTC - x_BTC).gather(1, starts_BT[..., None].expand_as(sums_BTC))
    return sums_BTC - before_BTC
