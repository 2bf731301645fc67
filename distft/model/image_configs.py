"""Settings of the models of images: a Transformer over patches, and a convolutional network."""

import math
from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from distft.model.config import MOST, MOST_LAYERS, ImageShape, ModelConfig, Pooling
from distft.model.products import Product
from distft.model.transformer_config import TransformerConfig

if TYPE_CHECKING:
    from distft.model.heads import Heads
    from distft.model.image_models import ConvolutionalImageModel, VisionTransformer

_MOST_PIXELS = 1 << 14  # of a side
_MOST_KERNEL = 255


class ImageModelConfig(ModelConfig):
    """A model of square images, whose pixels it scales to about -1 to 1. An image counts as one token."""

    image_size: int = Field(ge=1, le=_MOST_PIXELS)  # height and width in pixels
    num_channels: Literal[1, 3] = 3  # 1: grey, 3: RGB
    image_mean: float = Field(0.5, ge=0, le=1)  # of pixels between 0 and 1: it is subtracted,
    image_std: float = Field(0.5, gt=0, allow_inf_nan=False)  # and the rest divided by this
    dropout: float = Field(0.0, ge=0, lt=1)
    init_std: float | None = Field(None, gt=0)  # of matrices; null: (width of the product's input) ** -0.5

    @property
    def longest_row(self) -> int:
        return 1

    @property
    def reads_tokens(self) -> bool:
        return False

    @property
    def image_shape(self) -> ImageShape:
        return (self.num_channels, self.image_size, self.image_size)

    @property
    def has_dropout(self) -> bool:
        return self.dropout > 0

    @property
    def is_causal(self) -> bool:
        return False

    def initial_std(self, name: str, shape: tuple[int, ...]) -> float:
        std = self.init_std if self.init_std is not None else math.prod(shape[1:]) ** -0.5
        return std * self._init_factor(name)

    @abstractmethod
    def _init_factor(self, name: str) -> float:
        """Factor of the initial standard deviation of the matrix `name`."""


class VisionTransformerConfig(ImageModelConfig):
    """A Transformer over an image's patches, with learned positions (Dosovitskiy et al. 2021).

    arXiv:2010.11929. Its blocks are those of `model.type=transformer`.
    """

    type: Literal["vit"] = "vit"
    patch_size: int = Field(ge=1, le=_MOST_PIXELS)  # height and width in pixels
    class_token: bool = True  # a learned one before the patches, whose hidden state stands for the image
    d_model: int = Field(ge=1, le=MOST)
    num_layers: int = Field(ge=1, le=MOST_LAYERS)
    num_heads: int = Field(ge=1, le=MOST)
    d_ff: int | None = Field(None, ge=1, le=MOST)  # null: that of a Transformer
    norm: Literal["rmsnorm", "layernorm"] = "layernorm"
    norm_eps: float = Field(1e-6, gt=0)
    mlp: Literal["swiglu", "geglu", "gelu", "gelu_exact"] = "gelu_exact"
    attention_bias: bool = True
    mlp_bias: bool = True
    qk_norm: bool = False
    attention_kernel: Literal["auto", "sdpa", "cudnn", "flex"] = "auto"

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        errors = []
        if self.image_size % self.patch_size:
            fitting = [size for size in range(1, self.image_size + 1) if self.image_size % size == 0]
            nearest = min(fitting, key=lambda size: abs(size - self.patch_size))
            errors.append(
                f"patch_size={self.patch_size} does not divide image_size={self.image_size}: set one that "
                f"does, such as {nearest}."
            )
        if self.d_model % self.num_heads:
            errors.append(f"d_model={self.d_model} is not a multiple of num_heads={self.num_heads}.")
        if errors:
            raise ValueError("\n".join(errors))
        return self

    @property
    def attention_dropout(self) -> float:
        return self.dropout

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_positions(self) -> int:
        """Of the Transformer's rows: the patches, behind the class token if there is one."""
        return self.num_patches + self.class_token

    @property
    def patch_numel(self) -> int:
        """Numbers of a patch."""
        return self.num_channels * self.patch_size**2

    @property
    def transformer(self) -> TransformerConfig:
        """That of the blocks and of what is around them."""
        shared = set(TransformerConfig.model_fields) & set(VisionTransformerConfig.model_fields)
        settings = {name: getattr(self, name) for name in shared - {"type", "d_ff"}}
        if self.d_ff is not None:
            settings["d_ff"] = self.d_ff
        return TransformerConfig(
            max_seq_len=self.num_positions, positions="learned", attention="bidirectional", **settings
        )

    @property
    def default_pooling(self) -> Pooling:
        return "first" if self.class_token else "mean"

    @property
    def output_size(self) -> int:
        return self.d_model

    @property
    def num_blocks(self) -> int:
        return self.num_layers

    def build(self, heads: "Heads") -> "VisionTransformer":
        from distft.model.image_models import VisionTransformer

        return VisionTransformer(self, heads)

    def num_backbone_parameters(self) -> int:
        inputs = (self.patch_numel + 1 + self.class_token) * self.d_model
        return inputs + self.transformer.num_backbone_parameters()

    def backbone_products(self, seq_len: int) -> Iterator[Product]:
        """A row, of which an image is the whole or a part, has `seq_len` tokens."""
        yield Product(
            "patch_embed.projection.",
            self.patch_numel * self.d_model * self.num_patches / seq_len,
            depends_on=(),
        )
        before: tuple[str, ...] = ("patch_embed.", "position_embed.")
        num_positions = self.num_positions
        for product in self.transformer.backbone_products(num_positions):
            yield product.scaled(num_positions / seq_len, before=before)
            before = ()

    def _init_factor(self, name: str) -> float:
        return self.transformer.residual_init_factor(name)


class ConvolutionalImageConfig(ImageModelConfig):
    """Layers of a convolution, ReLU and max-pooling; what is left of the grid are the hidden states."""

    type: Literal["image_cnn"] = "image_cnn"
    num_filters: tuple[int, ...] = Field(min_length=1, max_length=64)  # of each layer
    kernel_size: int = Field(3, ge=1, le=_MOST_KERNEL)  # odd; zeros around the image keep its size
    pool_size: int = Field(2, ge=1, le=_MOST_PIXELS)  # each layer makes height and width this much smaller

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        errors = []
        if not all(1 <= filters <= MOST for filters in self.num_filters):
            errors.append(f"num_filters={list(self.num_filters)}: each must be 1 or more.")
        if self.kernel_size % 2 == 0:
            errors.append(
                f"kernel_size={self.kernel_size} is even, so it has no centre: set it to an odd number."
            )
        if not self.sizes[-1]:
            errors.append(
                f"image_size={self.image_size}: after {len(self.num_filters)} layers of pool_size="
                f"{self.pool_size} nothing is left of it. Take fewer layers, or a smaller pool_size."
            )
        if errors:
            raise ValueError("\n".join(errors))
        return self

    @property
    def sizes(self) -> list[int]:
        """Height and width of the image, and behind each layer."""
        sizes = [self.image_size]
        for _ in self.num_filters:
            sizes.append(sizes[-1] // self.pool_size)
        return sizes

    @property
    def input_channels(self) -> list[int]:
        """Of each layer."""
        return [self.num_channels, *self.num_filters[:-1]]

    @property
    def output_size(self) -> int:
        return self.num_filters[-1]

    @property
    def num_blocks(self) -> int:
        return len(self.num_filters)

    def build(self, heads: "Heads") -> "ConvolutionalImageModel":
        from distft.model.image_models import ConvolutionalImageModel

        return ConvolutionalImageModel(self, heads)

    def num_backbone_parameters(self) -> int:
        kernel = self.kernel_size**2
        layers = zip(self.input_channels, self.num_filters, strict=True)
        return sum((channels * kernel + 1) * filters for channels, filters in layers)

    def backbone_products(self, seq_len: int) -> Iterator[Product]:
        layers = zip(self.input_channels, self.num_filters, self.sizes, strict=False)
        for index, (channels, filters, size) in enumerate(layers):
            numel = channels * self.kernel_size**2 * filters * size**2 / seq_len
            yield Product(f"blocks.{index}.", numel, depends_on=() if index == 0 else None)

    def _init_factor(self, name: str) -> float:
        return 2**0.5 if name.startswith("blocks.") else 1.0  # He et al. 2015: ReLU halves the variance
