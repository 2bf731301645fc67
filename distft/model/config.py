"""What the settings of all models have in common; each type of model has a class of its own."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, Self, TypeAlias

from pydantic import Field

from distft.config import Settings
from distft.errors import ConfigError
from distft.model.products import Product

if TYPE_CHECKING:  # a configuration is checked without torch, which takes 2 s to import
    from distft.model.heads import Heads
    from distft.model.with_heads import ModelWithHeads

# Far above any model: a file with a larger size is damaged or hostile, and would cost memory before it fails.
MOST = (1 << 31) - 1
MOST_LAYERS = 4096  # each is a module, also on the meta device

Pooling: TypeAlias = Literal["last", "mean", "first", "max"]  # of a row's real tokens, to one vector


class ModelConfig(Settings, ABC):
    """Embedding, vocabulary and rows. Widths are in elements, lengths in tokens.

    A subclass adds the settings of its layers, `type`, and the abstract methods.
    """

    vocab_size: int | None = Field(None, ge=1, le=MOST)  # null: the tokenizer's size
    pad_vocab_to: int = Field(1, ge=1, le=MOST)  # rows of the embedding are rounded up to a multiple of this
    max_seq_len: int = Field(ge=1, le=MOST)  # longest row that the model accepts
    d_model: int = Field(ge=1, le=MOST)
    tie_embeddings: bool = True
    dropout: float = Field(0.0, ge=0, lt=1)
    init_std: float | None = Field(None, gt=0)  # of matrices; null: (width of the product's input) ** -0.5

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding. Raises `ConfigError` if `vocab_size` is not set."""
        if self.vocab_size is None:
            raise ConfigError(
                "model.vocab_size is not set, and no tokenizer has been read: set it to the tokenizer's size."
            )
        return -(-self.vocab_size // self.pad_vocab_to) * self.pad_vocab_to

    @property
    @abstractmethod
    def is_causal(self) -> bool:
        """Whether a position's hidden state depends on the positions before it alone."""

    @property
    def direction_setting(self) -> str:
        """Name of the setting that is `causal` or `bidirectional`."""
        return "direction"

    @property
    def has_segments(self) -> bool:
        """Whether the texts of a pair have segment ids of their own."""
        return False

    @property
    def output_size(self) -> int:
        """Width of the hidden states that the heads read."""
        return self.d_model

    @property
    @abstractmethod
    def num_blocks(self) -> int:
        """Number of modules `blocks.0`, `blocks.1`, ..., which all backbones consist of."""

    @abstractmethod
    def build(self, heads: "Heads") -> "ModelWithHeads":
        """The module. Build it under `torch.device("meta")`."""

    @abstractmethod
    def num_backbone_parameters(self) -> int:
        """Elements of all parameters but the token embedding and the heads."""

    @abstractmethod
    def backbone_products(self, seq_len: int) -> Iterator[Product]:
        """The matrix products per token between embedding and heads, in the order of the forward pass.

        For rows of one document of `seq_len` tokens.
        """

    def input_width(self, name: str, shape: tuple[int, ...]) -> int:  # noqa: ARG002
        """Elements that each output of the matrix `name` sums; for `init_std: null`."""
        return math.prod(shape[1:])

    def residual_init_factor(self, name: str) -> float:  # noqa: ARG002
        """Factor of the initial standard deviation of the matrix `name`."""
        return 1.0

    def for_vocabulary(self, vocab_size: int) -> Self:
        """This configuration with `vocab_size` filled in, for a tokenizer of that many pieces.

        Raises `ConfigError` if `vocab_size` is already set and smaller: the embedding would lack rows.
        """
        if self.vocab_size is None:
            # model_copy keeps the defaults that were derived from other sizes; it recomputes nothing.
            return self.model_copy(update={"vocab_size": vocab_size})
        if self.vocab_size < vocab_size:
            raise ConfigError(
                f"model.vocab_size={self.vocab_size} is less than the tokenizer's {vocab_size} pieces: "
                f"raise it to {vocab_size}, or leave it out."
            )
        return self


def check_pooling(pooling: Pooling, model: ModelConfig, setting: str = "objective.pooling") -> None:
    """Raise `ConfigError` if the pooled hidden state cannot depend on the whole row; `setting` gave it."""
    if pooling == "first" and model.is_causal:
        raise ConfigError(
            f"{setting}=first with model.{model.direction_setting}=causal: the first token sees only itself, "
            f"so the rest of the text has no effect. Set {setting}=last or mean."
        )
