"""Models of images: a Transformer over patches, and a convolutional network.

Shape letters: B images, E channels, Y and X height and width, P patches, T positions, C = d_model,
F filters, H = output_size.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from distft.errors import ConfigError
from distft.model.dropout import dropout
from distft.model.heads import Heads
from distft.model.image_configs import (
    ConvolutionalImageConfig,
    ImageModelConfig,
    VisionTransformerConfig,
)
from distft.model.layers import Linear, MatmulDtype
from distft.model.layout import RowLayout
from distft.model.transformer import Transformer
from distft.model.with_heads import ModelWithHeads


def scaled_images(images: Tensor | None, config: ImageModelConfig, dtype: torch.dtype) -> Tensor:
    """uint8 images [B, E, Y, X] as the model's numbers.

    Raises `ConfigError` for none, and for another shape.
    """
    if images is None or tuple(images.shape[1:]) != config.image_shape:
        found = "none" if images is None else f"images of shape {list(images.shape[1:])}"
        raise ConfigError(
            f"The model reads images of shape {list(config.image_shape)} (channels, height, width), and the "
            f"rows have {found}."
        )
    # In fp32: a pixel has 8 bits, as many as bf16, and the mean needs more.
    return ((images.float() / 255 - config.image_mean) / config.image_std).to(dtype)


def layout_of_images(input_ids: Tensor, num_positions: int) -> RowLayout:
    """The layout of hidden states of images, one a row, whatever the row's tokens are."""
    position_ids = torch.arange(num_positions, device=input_ids.device)[None]
    return RowLayout(shape=torch.Size([len(input_ids), num_positions]), position_ids=position_ids)


class PatchEmbedding(nn.Module):
    """A vector for each patch, row by row, behind a learned one if there is a class token."""

    __call__: Callable[..., Tensor]

    def __init__(self, config: VisionTransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.projection = Linear(config.patch_numel, config.d_model, bias=True)
        self.class_token = nn.Parameter(torch.empty(1, config.d_model)) if config.class_token else None

    def forward(self, images: Tensor | None) -> Tensor:
        config = self.config
        x_BEYX = scaled_images(images, config, self.projection.weight.dtype)
        num_sides, size = config.image_size // config.patch_size, config.patch_size
        x = x_BEYX.view(len(x_BEYX), config.num_channels, num_sides, size, num_sides, size)
        x_BTC = self.projection(x.permute(0, 2, 4, 1, 3, 5).reshape(len(x), -1, config.patch_numel))
        if self.class_token is None:
            return x_BTC
        return torch.cat([self.class_token.to(x_BTC.dtype).expand(len(x_BTC), 1, -1), x_BTC], dim=1)


class VisionTransformer(Transformer):
    """A Transformer whose rows are the patches of images."""

    def __init__(self, config: VisionTransformerConfig, heads: Heads) -> None:
        super().__init__(config.transformer, heads)
        self.patch_embed = PatchEmbedding(config)

    def make_inputs(self) -> None:
        """No embedding of tokens."""

    def layout_of(self, input_ids: Tensor, *_: Any, **__: Any) -> RowLayout:
        return layout_of_images(input_ids, self.config.max_seq_len)

    def embed_inputs(
        self,
        input_ids: Tensor,  # noqa: ARG002
        layout: RowLayout,
        segment_ids: Tensor | None = None,  # noqa: ARG002
        images: Tensor | None = None,
        dropout_keys_B: Tensor | None = None,
    ) -> Tensor:
        x_BTC: Tensor = self.patch_embed(images) + self.position_embed(layout.position_ids)
        if dropout_keys_B is None:
            return x_BTC
        return dropout(x_BTC, self.config.dropout, dropout_keys_B, site=0)


class ImageBlock(nn.Module):
    """A convolution that keeps the size, ReLU, max-pooling: `weight` [F, E, size, size] and `bias` [F]."""

    __call__: Callable[..., Tensor]

    def __init__(self, num_channels: int, num_filters: int, config: ConvolutionalImageConfig) -> None:
        super().__init__()
        size = config.kernel_size
        self.weight = nn.Parameter(torch.empty(num_filters, num_channels, size, size))
        self.bias = nn.Parameter(torch.empty(num_filters))
        self.config = config
        self.matmul_dtype = MatmulDtype()

    def forward(self, x_BEYX: Tensor) -> Tensor:
        dtype = self.matmul_dtype(self.weight)
        y_BFYX = functional.conv2d(
            x_BEYX.to(dtype), self.weight.to(dtype), self.bias.to(dtype), padding=self.config.kernel_size // 2
        )
        return functional.max_pool2d(functional.relu(y_BFYX), self.config.pool_size).to(self.weight.dtype)


class ConvolutionalImageModel(ModelWithHeads):
    """Convolutional layers; the hidden states are the positions of what they leave of the image."""

    config: ConvolutionalImageConfig

    def make_inputs(self) -> None:
        """The first layer reads the images."""

    def make_backbone(self) -> None:
        config = self.config
        layers = zip(config.input_channels, config.num_filters, strict=True)
        self.blocks = nn.ModuleList(ImageBlock(channels, filters, config) for channels, filters in layers)

    def layout_of(self, input_ids: Tensor, *_: Any, **__: Any) -> RowLayout:
        return layout_of_images(input_ids, self.config.sizes[-1] ** 2)

    def embed_inputs(
        self,
        input_ids: Tensor,  # noqa: ARG002
        layout: RowLayout,  # noqa: ARG002
        segment_ids: Tensor | None = None,  # noqa: ARG002
        images: Tensor | None = None,
        dropout_keys_B: Tensor | None = None,  # noqa: ARG002
    ) -> Tensor:
        """The scaled pixels [B, E, Y, X]."""
        return scaled_images(images, self.config, torch.float32)

    def encode(self, x_BTC: Tensor, layout: RowLayout, dropout_keys_B: Tensor | None) -> Tensor:  # noqa: ARG002
        x_BEYX = x_BTC  # of images, pixels instead of tokens
        for index, block in enumerate(self.blocks):
            x_BEYX = block(x_BEYX)
            if dropout_keys_B is not None:
                x_BEYX = dropout(x_BEYX, self.config.dropout, dropout_keys_B, site=index + 1)
        return x_BEYX.flatten(2).transpose(1, 2)
