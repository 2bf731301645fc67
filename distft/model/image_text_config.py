"""Settings of two models side by side, one of images and one of their texts (CLIP)."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from distft.config import Component
from distft.model.config import MOST, ImageShape, ModelConfig, Pooling
from distft.model.image_configs import ConvolutionalImageConfig, VisionTransformerConfig
from distft.model.older_configs import ConvolutionalConfig, DeepAveragingConfig, RecurrentConfig
from distft.model.products import Product
from distft.model.transformer_config import TransformerConfig

if TYPE_CHECKING:
    from distft.model.heads import Heads
    from distft.model.image_text import ImageTextModel

ImageConfig: TypeAlias = Annotated[VisionTransformerConfig | ConvolutionalImageConfig, Component()]
TextConfig: TypeAlias = Annotated[
    TransformerConfig | DeepAveragingConfig | ConvolutionalConfig | RecurrentConfig,
    Component(default="transformer"),
]
# Parameters before all products of a tower.
_INPUTS = ("embed.", "position_embed.", "segment_embed.", "embed_norm.", "patch_embed.")


class ImageTextConfig(ModelConfig):
    """A vector for an image and one for its text, in the same space (Radford et al. 2021, arXiv:2103.00020).

    A row is an image and a text. Each tower pools its hidden states and projects them without a bias.
    """

    type: Literal["clip"] = "clip"
    image: ImageConfig
    text: TextConfig
    d_embedding: int = Field(ge=1, le=MOST)  # width of both vectors
    image_pooling: Pooling | None = None  # null: the first state of a vit with a class token, else the mean
    text_pooling: Pooling | None = None  # null: the last state of a causal model, else the mean

    @model_validator(mode="after")
    def _check_text(self) -> Self:
        if isinstance(self.text, TransformerConfig) and self.text.experts is not None:
            raise ValueError("text.experts: the towers of clip have one feed-forward a block: leave it out.")
        if isinstance(self.text, TransformerConfig) and self.text.parametrization != "standard":
            raise ValueError(
                "text.parametrization: the towers of clip have the standard one alone: leave it out."
            )
        return self

    @property
    def longest_row(self) -> int:
        return self.text.longest_row

    @property
    def image_shape(self) -> ImageShape:
        return self.image.image_shape

    @property
    def vocabulary_size(self) -> int | None:
        return self.text.vocab_size

    @property
    def padded_vocab_size(self) -> int:
        return self.text.padded_vocab_size

    @property
    def num_embedding_parameters(self) -> int:
        return self.text.num_embedding_parameters

    @property
    def has_dropout(self) -> bool:
        return self.image.has_dropout or self.text.has_dropout

    @property
    def attention_dropout(self) -> float:
        return max(self.image.attention_dropout, self.text.attention_dropout)

    @property
    def has_noise(self) -> bool:
        return self.text.has_noise

    @property
    def is_causal(self) -> bool:
        return False

    @property
    def output_size(self) -> int:
        return self.d_embedding

    @property
    def attention_reach(self) -> int | None:
        return self.text.attention_reach

    @property
    def num_blocks(self) -> int:
        return self.image.num_blocks + self.text.num_blocks

    @property
    def block_names(self) -> list[str]:
        return [f"{tower}.{name}" for tower, own in self.towers.items() for name in own.block_names]

    @property
    def towers(self) -> dict[str, ModelConfig]:
        return {"image": self.image, "text": self.text}

    def pooling_of(self, tower: str) -> Pooling:
        """How the tower `image` or `text` makes one vector of its hidden states."""
        own: Pooling | None = getattr(self, f"{tower}_pooling")
        return own or self.towers[tower].default_pooling

    def for_vocabulary(self, vocab_size: int) -> Self:
        return self.model_copy(update={"text": self.text.for_vocabulary(vocab_size)})

    def build(self, heads: "Heads") -> "ImageTextModel":
        from distft.model.image_text import ImageTextModel

        return ImageTextModel(self, heads)

    def num_backbone_parameters(self) -> int:
        towers = self.towers.values()
        return sum(own.num_backbone_parameters() + own.output_size * self.d_embedding for own in towers)

    def backbone_products(self, seq_len: int) -> Iterator[Product]:
        for chain in self.product_chains(seq_len):
            yield from chain

    def product_chains(self, seq_len: int) -> Sequence[Iterator[Product]]:
        return [self._tower_products(name, own, seq_len) for name, own in self.towers.items()]

    def _tower_products(self, name: str, config: ModelConfig, seq_len: int) -> Iterator[Product]:
        before = tuple(f"{name}.{own}" for own in _INPUTS)
        for product in config.backbone_products(seq_len):
            yield product.scaled(1.0, prefix=f"{name}.", before=before)
        numel = config.output_size * self.d_embedding / seq_len
        yield Product(f"{name}_projection.", numel, (*before, f"{name}.blocks.", f"{name}.norm."))

    def initial_std(self, name: str, shape: tuple[int, ...]) -> float:
        tower, _, own = name.partition(".")
        if tower in self.towers:
            return self.towers[tower].initial_std(own, shape)
        return math.sqrt(1 / shape[1])
