"""A convolutional text model: kernels of several widths over the tokens, side by side.

Shape letters: B rows, T positions, N = B * T, D documents, G = N + gaps between documents, C input width,
F filters of a kernel, H = output_size.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from distft.model.documents import documents_of
from distft.model.dropout import dropout
from distft.model.layers import MatmulDtype
from distft.model.layout import RowLayout, without_left_padding
from distft.model.older_configs import ConvolutionalConfig
from distft.model.with_heads import ModelWithHeads


class Kernel(nn.Module):
    """A convolution without padding: `weight` [F, C, size] and `bias` [F]."""

    __call__: Callable[..., Tensor]

    def __init__(self, width: int, num_filters: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_filters, width, size))
        self.bias = nn.Parameter(torch.empty(num_filters))
        self.matmul_dtype = MatmulDtype()

    def forward(self, x_BCG: Tensor) -> Tensor:
        dtype = self.matmul_dtype(x_BCG)
        y_BFG = functional.conv1d(x_BCG.to(dtype), self.weight.to(dtype), self.bias.to(dtype))
        return y_BFG.to(x_BCG.dtype)


class ConvolutionalBlock(nn.Module):
    """Kernels of all sizes over the same tokens, then ReLU."""

    __call__: Callable[..., Tensor]

    def __init__(self, config: ConvolutionalConfig, width: int) -> None:
        super().__init__()
        self.is_causal = config.is_causal
        self.kernel_sizes = config.kernel_sizes
        self.kernels = nn.ModuleList(Kernel(width, config.num_filters, size) for size in config.kernel_sizes)

    def forward(self, x_BGC: Tensor, positions: Tensor) -> Tensor:
        """The outputs [B, len(positions), H] at `positions` of the second axis of `x_BGC`.

        There must be max(kernel_sizes) - 1 elements before the first of them; bidirectional, also after the
        last.
        """
        x_BCG = x_BGC.transpose(1, 2)
        outputs = []
        for size, kernel in zip(self.kernel_sizes, self.kernels, strict=True):
            # Output i of a convolution without padding reads i ... i + size - 1. Centred kernels of even size
            # read one token more to the right, as torch's padding="same".
            first = size - 1 if self.is_causal else (size - 1) // 2
            outputs.append(kernel(x_BCG)[..., positions - first])
        return torch.relu(torch.cat(outputs, dim=1)).transpose(1, 2)


class ConvolutionalModel(ModelWithHeads):
    """Embedding, convolutional blocks and heads."""

    config: ConvolutionalConfig

    def make_backbone(self) -> None:
        self.blocks = nn.ModuleList(
            ConvolutionalBlock(self.config, width) for width in self.config.input_widths()
        )
        self._gap = max(self.config.kernel_sizes) - 1

    def encode(self, x_BTC: Tensor, layout: RowLayout, dropout_keys_B: Tensor | None) -> Tensor:
        # All documents become one row with zeros between them, so that no kernel sees two of them.
        documents = documents_of(layout)
        numbers_N = documents.numbers
        places_N = torch.arange(len(numbers_N), device=x_BTC.device) + (numbers_N + 1) * self._gap
        num_places = len(numbers_N) + (documents.num_documents + 1) * self._gap
        for index, block in enumerate(self.blocks):
            x_GC = x_BTC.new_zeros(num_places, x_BTC.shape[-1]).index_copy(0, places_N, x_BTC.flatten(0, 1))
            x_BTC = block(x_GC[None], places_N).view(*layout.shape, -1)
            if dropout_keys_B is not None:
                x_BTC = dropout(x_BTC, self.config.dropout, dropout_keys_B, site=index + 1)
        return x_BTC

    def new_caches(self, num_positions: int) -> Sequence[dict[str, Tensor]]:  # noqa: ARG002
        return [{} for _ in self.blocks]  # the last inputs of each block, [B, max(kernel_sizes) - 1, C]

    def encode_cached(
        self,
        x_BTC: Tensor,
        position_ids: Tensor,  # noqa: ARG002
        caches: Sequence[Any],
        num_padding_B: Tensor | None,
    ) -> Tensor:
        num_rows, num_new, _ = x_BTC.shape
        positions = torch.arange(num_new, device=x_BTC.device)
        for block, cache in zip(self.blocks, caches, strict=True):
            if not cache:
                x_BTC = without_left_padding(x_BTC, num_padding_B)
            before = cache.get("inputs", x_BTC.new_zeros(num_rows, self._gap, x_BTC.shape[-1]))
            x_BGC = torch.cat((before, x_BTC), dim=1)
            cache["inputs"] = x_BGC[:, x_BGC.shape[1] - self._gap :]
            x_BTC = block(x_BGC, positions + self._gap)
        return x_BTC
