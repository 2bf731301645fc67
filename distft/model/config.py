"""What the settings of all models have in common; each type of model has a class of its own."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, Self, TypeAlias

from pydantic import Field

from distft.config import Settings, Widths
from distft.errors import ConfigError
from distft.model.products import Product

if TYPE_CHECKING:  # a configuration is checked without torch, which takes 2 s to import
    from distft.model.heads import Heads
    from distft.model.with_heads import ModelWithHeads

# Far above any model: a file with a larger size is damaged or hostile, and would cost memory before it fails.
MOST = (1 << 31) - 1
MOST_LAYERS = 4096  # each is a module, also on the meta device

Pooling: TypeAlias = Literal["last", "mean", "first", "max"]  # of a row's real tokens, to one vector
ImageShape: TypeAlias = tuple[int, int, int]  # channels, height, width


class ModelConfig(Settings, ABC):
    """What a run knows of a model of any type. Widths are in elements, lengths in tokens.

    A subclass adds settings, `type`, and the abstract methods.
    """

    @property
    @abstractmethod
    def longest_row(self) -> int:
        """Tokens of the longest row that the model accepts. An image alone counts as one token."""

    @property
    def reads_tokens(self) -> bool:
        return True

    @property
    def image_shape(self) -> ImageShape | None:
        """Of the images that it reads; None: it reads none."""
        return None

    @property
    def vocabulary_size(self) -> int | None:
        """Different tokens that it reads; None: not known without the tokenizer."""
        return 0

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding of tokens. Raises `ConfigError` if the vocabulary's size is not known."""
        return 0

    @property
    def num_embedding_parameters(self) -> int:
        """Elements of the embedding of tokens."""
        return 0

    @property
    @abstractmethod
    def has_dropout(self) -> bool:
        """Whether training drops anything."""

    @property
    def attention_dropout(self) -> float:
        """The share of attention weights that training drops, for which all of them are in memory."""
        return 0.0

    @property
    def has_noise(self) -> bool:
        """Whether training adds noise to the embeddings of tokens."""
        return False

    @property
    @abstractmethod
    def is_causal(self) -> bool:
        """Whether a position's hidden state depends on the positions before it alone."""

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether an encoder reads what `is_prefix` marks of a row, its source, and a decoder the rest."""
        return False

    @property
    def direction_setting(self) -> str:
        """Name of the setting that is `causal` or `bidirectional`."""
        return "direction"

    @property
    def has_segments(self) -> bool:
        """Whether the texts of a pair have segment ids of their own."""
        return False

    @property
    def attention_reach(self) -> int | None:
        """How far from itself a token sees in layers whose attention has a window; None: there are none."""
        return None

    @property
    def default_pooling(self) -> Pooling:
        """Of a row's hidden states: the last of a causal model, whose last token has seen all others."""
        return "last" if self.is_causal else "mean"

    @property
    @abstractmethod
    def output_size(self) -> int:
        """Width of the hidden states that the heads read."""

    @property
    @abstractmethod
    def num_blocks(self) -> int:
        """Number of the modules `block_names`."""

    @property
    def block_names(self) -> list[str]:
        """Names of the modules that the backbone consists of, in the order of the forward pass."""
        return [f"blocks.{index}" for index in range(self.num_blocks)]

    @abstractmethod
    def build(self, heads: "Heads") -> "ModelWithHeads":
        """The module. Build it under `torch.device("meta")`."""

    @abstractmethod
    def num_backbone_parameters(self) -> int:
        """Elements of all parameters but the token embedding and the heads."""

    @property
    def num_idle_parameters(self) -> int:
        """Elements of the experts that a token does not pass through."""
        return 0

    @abstractmethod
    def backbone_products(self, seq_len: int) -> Iterator[Product]:
        """The matrix products per token between embedding and heads, in the order of the forward pass.

        For rows of one document of `seq_len` tokens.
        """

    def with_target_share(self, share: float) -> Self:  # noqa: ARG002
        """This model as `backbone_products` counts it where that share of a row's positions are targets."""
        return self

    def product_chains(self, seq_len: int) -> Sequence[Iterator[Product]]:
        """`backbone_products`, in parts none of which reads another's outputs; heads read those of all."""
        return [self.backbone_products(seq_len)]

    @abstractmethod
    def initial_std(self, name: str, shape: tuple[int, ...]) -> float:
        """Standard deviation of the initial values of the matrix `name`."""

    def widths(self, named_shapes: Mapping[str, tuple[int, ...]]) -> Widths | None:  # noqa: ARG002
        """What the rates of these parameters must know of the model's width; None: they ignore it."""
        return None

    def for_vocabulary(self, vocab_size: int) -> Self:  # noqa: ARG002
        """This configuration with `vocab_size` filled in, for a tokenizer of that many pieces.

        Raises `ConfigError` if `vocab_size` is already set and smaller: the embedding would lack rows.
        """
        return self


class TokenModelConfig(ModelConfig):
    """A model of tokens: embedding, vocabulary and rows."""

    vocab_size: int | None = Field(None, ge=1, le=MOST)  # null: the tokenizer's size
    pad_vocab_to: int = Field(1, ge=1, le=MOST)  # rows of the embedding are rounded up to a multiple of this
    max_seq_len: int = Field(ge=1, le=MOST)  # longest row that the model accepts
    d_model: int = Field(ge=1, le=MOST)
    tie_embeddings: bool = True
    dropout: float = Field(0.0, ge=0, lt=1)
    # Noise on embeddings in training, uniform in +-alpha / sqrt(row's tokens * d_model); papers: 5 to 15
    # (NEFTune, Jain et al. 2023, arXiv:2310.05914).
    neftune_alpha: float = Field(0.0, ge=0, allow_inf_nan=False)
    init_std: float | None = Field(None, gt=0)  # of matrices; null: (width of the product's input) ** -0.5

    @property
    def longest_row(self) -> int:
        return self.max_seq_len

    @property
    def vocabulary_size(self) -> int | None:
        return self.vocab_size

    @property
    def padded_vocab_size(self) -> int:
        if self.vocab_size is None:
            raise ConfigError(
                "model.vocab_size is not set, and no tokenizer has been read: set it to the tokenizer's size."
            )
        return -(-self.vocab_size // self.pad_vocab_to) * self.pad_vocab_to

    @property
    def num_embedding_parameters(self) -> int:
        return self.padded_vocab_size * self.d_model

    @property
    def has_dropout(self) -> bool:
        return self.dropout > 0

    @property
    def has_noise(self) -> bool:
        return self.neftune_alpha > 0

    @property
    def output_size(self) -> int:
        return self.d_model

    def initial_std(self, name: str, shape: tuple[int, ...]) -> float:
        std = self.init_std if self.init_std is not None else self.input_width(name, shape) ** -0.5
        return std * self.residual_init_factor(name)

    def input_width(self, name: str, shape: tuple[int, ...]) -> int:  # noqa: ARG002
        """Elements that each output of the matrix `name` sums; for `init_std: null`."""
        return math.prod(shape[1:])

    def residual_init_factor(self, name: str) -> float:  # noqa: ARG002
        """Factor of the initial standard deviation of the matrix `name`."""
        return 1.0

    def for_vocabulary(self, vocab_size: int) -> Self:
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
    if pooling != "last" and model.is_encoder_decoder:
        raise ConfigError(
            f"{setting}={pooling} with model.type=encoder_decoder: the row is the encoder's, and its vector "
            f"the decoder's first hidden state, which is at the row's last token. Set {setting}=last."
        )
    if pooling == "first" and model.is_causal:
        raise ConfigError(
            f"{setting}=first with model.{model.direction_setting}=causal: the first token sees only itself, "
            f"so the rest of the text has no effect. Set {setting}=last or mean."
        )
