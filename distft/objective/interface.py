"""The `Objective` interface: what a run minimizes and how it is measured."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from torch import Tensor

from distft.collectives import Collectives
from distft.data.batch import Batch
from distft.model.config import Heads, ModelConfig

# A Transformer, or an engine around it: the arguments of `Transformer.forward`, and the outputs by head.
Model: TypeAlias = Callable[..., Mapping[str, Tensor]]


@dataclass(frozen=True, slots=True)
class ObjectiveContext:
    """What an objective may use besides the model and the batch."""

    vocab_size: int  # logits from this index on belong to padding
    collectives: Collectives  # of the data-parallel ranks
    compiles: bool = False  # the model is compiled, so the loss may be too


class Objective(Protocol):
    """One or more loss terms, by name.

    A term is a sum over targets. `train_step` divides each sum by the number of its targets in the *global*
    batch and multiplies it by its weight, so the loss does not depend on how the batch was split.
    """

    def heads(self, label_names: tuple[str, ...] | None) -> Heads:
        """The heads that this objective trains. Raises `ConfigError` if the data has no such labels."""

    def check_model(self, model: ModelConfig) -> None:
        """Raise `ConfigError` if this objective makes no sense for the model."""

    def term_weights(self, step: int) -> Mapping[str, float]:
        """The weight of each term in the loss of optimizer step `step` (from 0); the names do not change."""

    def num_targets(self, batch: Batch) -> Mapping[str, int]:
        """The number of targets of each term in the batch, known before the forward pass."""

    def loss_sums(self, model: Model, batch: Batch, context: ObjectiveContext) -> Mapping[str, Tensor]:
        """Each term summed over its targets in the batch, as differentiable fp32 scalars."""

    def evaluate(self, model: Model, batch: Batch, context: ObjectiveContext) -> dict[str, Tensor]:
        """Sums over the batch, which may be added over batches and ranks."""

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Metrics from the sums over a whole data set; `loss` is one of them."""
