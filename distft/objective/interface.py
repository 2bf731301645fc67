"""`Objective`, the base of all objectives: what a run minimizes and how it is measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from distft.config import Settings
from distft.data.dataset import DataContext, Labels, TransformContext
from distft.errors import ConfigError
from distft.model.config import Heads, ModelConfig

if TYPE_CHECKING:  # a configuration is checked without torch, which takes 2 s to import
    from torch import Tensor

    from distft.collectives import Collectives
    from distft.data.batch import AnyBatch, Batch
    from distft.data.feed import AnyFeed, Transform

# A Transformer, or an engine around it: the arguments of `Transformer.forward`, and the outputs by head.
Model: TypeAlias = "Callable[..., Mapping[str, Tensor]]"


@dataclass(frozen=True, slots=True)
class ObjectiveContext:
    """What an objective may use besides the model and the batch."""

    vocab_size: int  # logits from this index on belong to padding
    collectives: Collectives  # of the data-parallel ranks
    compiles: bool = False  # the model is compiled, so the loss may be too
    state: dict[str, Tensor] = field(default_factory=dict)  # `Objective.initial_state`, saved with the run
    step: int = 0  # optimizer steps before this one
    # Inside it the model computes with the moving average of its weights; None: without optim.ema_decay.
    averaged_weights: Callable[[], AbstractContextManager[None]] | None = None


class Objective(Settings, ABC):
    """One or more loss terms, by name.

    A term is a sum over targets. `train_step` divides each sum by the number of its targets in the *global*
    batch and multiplies it by its weight, so the loss does not depend on how the batch was split.
    """

    @abstractmethod
    def heads(self, label_names: Labels) -> Heads:
        """The heads that this objective trains. Raises `ConfigError` if the data has no such labels."""

    @abstractmethod
    def check_model(self, model: ModelConfig) -> None:
        """Raise `ConfigError` if this objective makes no sense for the model."""

    @abstractmethod
    def term_weights(self, step: int) -> Mapping[str, float]:
        """The weight of each term in the loss of optimizer step `step` (from 0); the names do not change."""

    def transforms(self, context: TransformContext) -> Sequence[Transform]:  # noqa: ARG002
        """What makes this objective's inputs and targets of the data's rows. Raises `ConfigError`."""
        return ()

    def notes(self, context: TransformContext) -> Sequence[str]:  # noqa: ARG002
        """Lines for the log on what `transforms` does with this data and tokenizer."""
        return ()

    def transform_feed(self, feed: AnyFeed, context: DataContext, seed: int) -> AnyFeed:
        """The feed with this objective's inputs and targets. Raises `ConfigError` if data do not fit."""
        from distft.data.feed import Feed

        if not isinstance(feed, Feed):
            raise ConfigError(
                "data.type=streams has rows of several kinds, but there is one objective for all: set "
                "objective.type=mixture, with a part for each stream."
            )
        own = TransformContext(
            data=context,
            seed=seed,
            num_sequences=feed.num_sequences,
            rows=feed.rows,
            step_share=feed.step_share,
            number_range=feed.number_range,
        )
        return feed.with_transforms(*self.transforms(own), notes=self.notes(own))

    def initial_state(self, heads: Heads) -> Mapping[str, Sequence[float]]:  # noqa: ARG002
        """What the objective remembers from step to step: equal on all ranks, saved with the run."""
        return {}

    def prepare_step(
        self,
        model: Model,  # noqa: ARG002
        micro_batches: Sequence[AnyBatch],
        context: ObjectiveContext,  # noqa: ARG002
    ) -> Sequence[AnyBatch]:
        """Called before a step's first backward: the micro-batches, with targets that need all of them.

        Such as a teacher's predictions. All ranks call it together; the micro-batches are on the device.
        """
        return micro_batches

    @property
    def needs_averaged_weights(self) -> bool:
        """Whether `prepare_step` uses `context.averaged_weights`, for which optim.ema_decay must be set."""
        return False

    @property
    def supervised_parts(self) -> Sequence[str] | None:
        """The data streams of the parts that learn from labels; None: no part learns without."""
        return None

    @abstractmethod
    def num_targets(self, batch: AnyBatch) -> Mapping[str, int]:
        """The number of targets of each term in the batch, known before the forward pass."""

    @abstractmethod
    def loss_sums(self, model: Model, batch: AnyBatch, context: ObjectiveContext) -> Mapping[str, Tensor]:
        """Each term summed over its targets in the batch, as differentiable fp32 scalars."""

    @property
    def per_row(self) -> frozenset[str]:
        """Outputs of `evaluate` with a row for each target: concatenated in the data's order, not added."""
        return frozenset()

    @abstractmethod
    def evaluate(self, model: Model, batch: AnyBatch, context: ObjectiveContext) -> dict[str, Tensor]:
        """Sums over the batch, which may be added over batches and ranks, and `per_row` outputs."""

    @abstractmethod
    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Metrics from the sums over a whole data set; `loss` is one of them."""


def only_batch(batch: AnyBatch) -> Batch:
    """The batch of an objective that takes no streams; `transform_feed` has refused any."""
    from distft.data.batch import Batch

    assert isinstance(batch, Batch)
    return batch
