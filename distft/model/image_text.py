"""A model of images and one of their texts, whose vectors are in the same space.

Shape letters: B rows of an image and a text, T tokens of a text, H the width of the vectors.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from distft.errors import ConfigError
from distft.model.heads import EmbeddingHead, Head
from distft.model.image_text_config import ImageTextConfig
from distft.model.layers import Linear
from distft.model.layout import HiddenLossFn, RowLayout
from distft.model.with_heads import ModelWithHeads, pool


class ImageTextModel(ModelWithHeads):
    """The towers `image` and `text`, and the projection behind each.

    An embedding has two vectors a row, [2 * B, H]: the image's, then its text's.
    """

    config: ImageTextConfig

    def make_inputs(self) -> None:
        """The towers have their own."""

    def make_backbone(self) -> None:
        config = self.config
        self.image, self.text = config.image.build({}), config.text.build({})
        self.image_projection = Linear(config.image.output_size, config.d_embedding, bias=False)
        self.text_projection = Linear(config.text.output_size, config.d_embedding, bias=False)

    def embed_inputs(
        self,
        input_ids: Tensor,
        layout: RowLayout,
        segment_ids: Tensor | None = None,
        images: Tensor | None = None,
        dropout_keys_B: Tensor | None = None,
    ) -> Tensor:
        """The projected vectors [B, 2, H] of each row's image and text."""
        image_layout = self.image.layout_of(input_ids)
        x_BTC = self.image.embed_inputs(input_ids, image_layout, images=images, dropout_keys_B=dropout_keys_B)
        image_BTH = self.image.encode(x_BTC, image_layout, dropout_keys_B)
        image_BH = self.image_projection(pool(image_BTH, None, self.config.pooling_of("image")))
        # Other draws than the image's.
        text_keys_B = None if dropout_keys_B is None else ~dropout_keys_B
        x_BTC = self.text.embed_inputs(input_ids, layout, segment_ids, dropout_keys_B=text_keys_B)
        text_BTH = self.text.encode(x_BTC, layout, text_keys_B)
        text_BH = self.text_projection(pool(text_BTH, layout.lengths, self.config.pooling_of("text")))
        return torch.stack([image_BH, text_BH], dim=1)

    def encode(self, x_BTC: Tensor, layout: RowLayout, dropout_keys_B: Tensor | None) -> Tensor:  # noqa: ARG002
        return x_BTC  # no layer reads both

    def set_activation_checkpointing(self, mode: Literal["none", "selective", "full"]) -> None:
        self.image.set_activation_checkpointing(mode)
        self.text.set_activation_checkpointing(mode)

    def compile_blocks(self) -> None:
        self.image.compile_blocks()
        self.text.compile_blocks()

    def make_head(self, head: Head) -> nn.Module:
        if not isinstance(head, EmbeddingHead):
            raise ConfigError(
                "model.type=clip has a vector for each image and text, and no other output: set "
                "objective.type=contrastive."
            )
        return super().make_head(head)

    def _head_output(
        self,
        name: str,
        x_BTH: Tensor,
        lengths: Tensor | None,  # noqa: ARG002
        loss_from_hidden: HiddenLossFn | None,  # noqa: ARG002
    ) -> Tensor:
        output: Tensor = self.get_submodule(name)(x_BTH.flatten(0, 1))
        return output
