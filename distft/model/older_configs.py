"""Settings of the models before the Transformer: averaged embeddings, convolutions, recurrent networks."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from distft.model.config import MOST, MOST_LAYERS, TokenModelConfig
from distft.model.products import Product

if TYPE_CHECKING:
    from distft.model.convolutional import ConvolutionalModel
    from distft.model.deep_averaging import DeepAveragingModel
    from distft.model.heads import Heads
    from distft.model.recurrent import RecurrentModel

_MOST_KERNEL = 4096


class DirectedConfig(TokenModelConfig):
    """A model whose `direction` says what a position sees of its document."""

    direction: Literal["causal", "bidirectional"] = "causal"  # what comes before it, or all

    @property
    def is_causal(self) -> bool:
        return self.direction == "causal"

    def _size_errors(self, hint: str) -> list[str]:
        if self.tie_embeddings and self.output_size != self.d_model:
            return [
                f"tie_embeddings needs hidden states as wide as the embedding, d_model={self.d_model}, and "
                f"they have {self.output_size} elements: {hint}, or set tie_embeddings: false."
            ]
        return []


def _default_d_hidden(data: dict[str, Any]) -> int:
    d_model: int = data["d_model"]
    return d_model


class DeepAveragingConfig(DirectedConfig):
    """The mean of a document's embeddings, then feed-forward layers (Iyyer et al. 2015, D15-1162 in the ACL).

    It knows nothing of the order of tokens. `direction: causal` averages what a position has before it.
    """

    type: Literal["deep_averaging"] = "deep_averaging"
    num_layers: int = Field(0, ge=0, le=MOST_LAYERS)  # of a ReLU behind a matrix; 0: the mean alone
    d_hidden: int = Field(default_factory=_default_d_hidden, ge=1, le=MOST)  # default: d_model

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if errors := self._size_errors("leave d_hidden out"):
            raise ValueError("\n".join(errors))
        return self

    @property
    def output_size(self) -> int:
        return self.d_hidden if self.num_layers else self.d_model

    @property
    def num_blocks(self) -> int:
        return self.num_layers

    def build(self, heads: "Heads") -> "DeepAveragingModel":
        from distft.model.deep_averaging import DeepAveragingModel

        return DeepAveragingModel(self, heads)

    def num_backbone_parameters(self) -> int:
        return sum(width * self.d_hidden + self.d_hidden for width in self.input_widths())

    def input_widths(self) -> list[int]:
        """Of each layer."""
        return [self.d_model, *[self.d_hidden] * (self.num_layers - 1)][: self.num_layers]

    def backbone_products(self, seq_len: int) -> Iterator[Product]:
        uses = 1 if self.is_causal else 1 / seq_len
        for index, width in enumerate(self.input_widths()):
            yield Product(f"blocks.{index}.", width * self.d_hidden * uses)


def _default_num_filters(data: dict[str, Any]) -> int:
    d_model: int = data["d_model"]
    return max(d_model // len(data["kernel_sizes"]), 1)


class ConvolutionalConfig(DirectedConfig):
    """Convolutions over the tokens with several widths side by side (Kim 2014, arXiv:1408.5882).

    With `objective.pooling: max` and one layer it is Kim's classifier. `direction: causal` sees no later
    token.
    """

    type: Literal["cnn"] = "cnn"
    kernel_sizes: tuple[int, ...] = Field((3, 4, 5), min_length=1, max_length=64)  # in tokens
    num_filters: int = Field(default_factory=_default_num_filters, ge=1, le=MOST)  # of each kernel size
    num_layers: int = Field(1, ge=1, le=MOST_LAYERS)

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        errors = self._size_errors(
            f"make d_model a multiple of the {len(self.kernel_sizes)} kernel_sizes and leave num_filters out"
        )
        if not all(1 <= size <= _MOST_KERNEL for size in self.kernel_sizes):
            errors.append(f"kernel_sizes={list(self.kernel_sizes)}: each must be 1 to {_MOST_KERNEL} tokens.")
        if errors:
            raise ValueError("\n".join(errors))
        return self

    @property
    def output_size(self) -> int:
        return len(self.kernel_sizes) * self.num_filters

    @property
    def num_blocks(self) -> int:
        return self.num_layers

    def build(self, heads: "Heads") -> "ConvolutionalModel":
        from distft.model.convolutional import ConvolutionalModel

        return ConvolutionalModel(self, heads)

    def num_backbone_parameters(self) -> int:
        weights = sum(p.numel for p in self.backbone_products(1))
        return int(weights) + self.num_layers * self.output_size

    def input_widths(self) -> list[int]:
        """Of each layer."""
        return [self.d_model, *[self.output_size] * (self.num_layers - 1)]

    def backbone_products(self, seq_len: int) -> Iterator[Product]:  # noqa: ARG002
        for index, width in enumerate(self.input_widths()):
            for number, size in enumerate(self.kernel_sizes):
                yield Product(f"blocks.{index}.kernels.{number}.", width * size * self.num_filters)


def _default_d_recurrent(data: dict[str, Any]) -> int:
    d_model: int = data["d_model"]
    return d_model if data["direction"] == "causal" else max(d_model // 2, 1)


_NUM_GATES = {"rnn": 1, "lstm": 4, "gru": 3}


class RecurrentConfig(DirectedConfig):
    """A stack of recurrent layers: Elman's (1990), LSTM (Hochreiter and Schmidhuber 1997) or GRU (Cho 2014).

    Each computes as torch.nn.RNN, LSTM or GRU does. A bidirectional layer puts its two directions side by
    side.
    """

    type: Literal["rnn", "lstm", "gru"]
    num_layers: int = Field(1, ge=1, le=MOST_LAYERS)
    # Of each direction; default: d_model, bidirectional: half of it.
    d_hidden: int = Field(default_factory=_default_d_recurrent, ge=1, le=MOST)

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if errors := self._size_errors("make d_model even and leave d_hidden out"):
            raise ValueError("\n".join(errors))
        return self

    @property
    def num_directions(self) -> int:
        return 1 if self.is_causal else 2

    @property
    def num_gates(self) -> int:
        """Rows of a layer's matrices, in units of `d_hidden`."""
        return _NUM_GATES[self.type]

    @property
    def output_size(self) -> int:
        return self.num_directions * self.d_hidden

    @property
    def num_blocks(self) -> int:
        return self.num_layers

    def build(self, heads: "Heads") -> "RecurrentModel":
        from distft.model.recurrent import RecurrentModel

        return RecurrentModel(self, heads)

    def num_backbone_parameters(self) -> int:
        biases = 2 * self.num_layers * self.num_directions * self.num_gates * self.d_hidden
        return int(sum(p.numel for p in self.backbone_products(1))) + biases

    def input_widths(self) -> list[int]:
        """Of each layer."""
        return [self.d_model, *[self.output_size] * (self.num_layers - 1)]

    def backbone_products(self, seq_len: int) -> Iterator[Product]:  # noqa: ARG002
        for index, width in enumerate(self.input_widths()):
            numel = (width + self.d_hidden) * self.num_gates * self.d_hidden
            yield Product(f"blocks.{index}.", numel * self.num_directions)

    def input_width(self, name: str, shape: tuple[int, ...]) -> int:
        # As torch.nn.LSTM: of all matrices of a layer, the variance of its uniform distribution.
        return super().input_width(name, shape) if name.startswith("embed.") else 3 * self.d_hidden
