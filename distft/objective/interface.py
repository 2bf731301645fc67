"""`Objective`, the base of all objectives: what a run minimizes and how it is measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self, TypeAlias

from distft.config import Settings
from distft.data.dataset import DataContext, Labels, TransformContext
from distft.errors import ConfigError
from distft.model.config import ModelConfig
from distft.model.heads import Heads
from distft.objective.findings import ClassifierFindings

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Passes:
    """How often a step runs the model on a row of the batch, on average; each view of a text is a row."""

    trained: float = 1.0  # forward and backward
    forward_only: float = 0.0  # forward without gradient, such as a teacher's
    logits_share: float = 1.0  # of a row's positions, for which a language model's head computes logits


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

    def resolved(self, model: ModelConfig, train: AnyFeed | None) -> Self:  # noqa: ARG002
        """The same with a value for each setting whose default depends on the model or the training data.

        A run saves these values, so its checkpoints keep their meaning. `train` is without transforms; None:
        there is no training data, and what depends on it stays.
        """
        return self

    @property
    def needs_text(self) -> bool:
        """Whether it makes no sense for a model of images alone."""
        return True

    @property
    def row_labels(self) -> str | None:
        """What it learns of `data.type=labelled`: the value of `labels` that it needs; None: any."""
        return None

    @abstractmethod
    def term_weights(self, step: int) -> Mapping[str, float]:
        """The weight of each term in the loss of optimizer step `step` (from 0); the names do not change."""

    def transforms(self, context: TransformContext) -> Sequence[Transform]:  # noqa: ARG002
        """What makes this objective's inputs and targets of the data's rows. Raises `ConfigError`."""
        return ()

    def notes(self, context: TransformContext) -> Sequence[str]:  # noqa: ARG002
        """Lines for the log on what `transforms` does with the training data and tokenizer."""
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
            numbers=feed.numbers,
        )
        transforms = self.transforms(own)
        is_for_training = feed.step_share is not None  # validation data would get the same notes again
        return feed.with_transforms(*transforms, notes=self.notes(own) if is_for_training else ())

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
    def reference_target(self) -> str | None:
        """The name of a target [B] that a reference model gives the rows, once a run; None: none is needed.

        The run computes it before the first step and stores it; the rows of `loss_sums` and `evaluate` have
        it, those of `transforms` and `num_targets` not yet. The reference is the checkpoint of the setting
        `reference` if that is not null, else the run's `init_from`.
        """
        return None

    def reference_values(self, model: Model, batch: AnyBatch, context: ObjectiveContext) -> Tensor:
        """float32 [B]: the target `reference_target`, computed with the reference."""
        raise NotImplementedError

    @property
    def passes(self) -> Passes:
        """What a step costs: `config check` and MFU count it. Of a mixture, each part has its own."""
        return Passes()

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
        """Each term summed over its targets in the batch, as differentiable fp32 scalars.

        It may have scalar sums for `training_metrics` beside them, which take no part in the loss.
        """

    def term_metrics(self, terms: Mapping[str, float], step: int) -> dict[str, float]:
        """Training's losses of single terms, named as in `metrics`: `<term>/loss`, if there are several.

        `terms` has those that some step until `step` has measured.
        """
        is_several = len(self.term_weights(step)) > 1
        return {f"{name}/loss": value for name, value in terms.items()} if is_several else {}

    @property
    def training_sum_names(self) -> Sequence[str]:
        """The names of `training_sums` and of what `loss_sums` has beside its terms; they do not change."""
        return ()

    def training_sums(self, batch: AnyBatch) -> Mapping[str, Tensor]:  # noqa: ARG002
        """Scalar sums over a micro-batch of `prepare_step`, for `training_metrics`."""
        return {}

    def training_metrics(self, sums: Mapping[str, float]) -> dict[str, float]:  # noqa: ARG002
        """Metrics besides losses, of the `training_sums` of all ranks since the last logged step."""
        return {}

    @property
    def per_row(self) -> frozenset[str]:
        """Outputs of `evaluate` with a row for each target: concatenated in the data's order, not added."""
        return frozenset()

    @abstractmethod
    def evaluate(self, model: Model, batch: AnyBatch, context: ObjectiveContext) -> dict[str, Tensor]:
        """Sums over the batch, which may be added over batches and ranks, and `per_row` outputs."""

    @abstractmethod
    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Metrics from the sums over a whole data set; `loss` is one of them.

        Those of one of several terms have its name before theirs, as `<term>/loss`.
        """

    def report(self, sums: Mapping[str, Tensor], label_names: Labels) -> Sequence[str]:  # noqa: ARG002
        """Lines about the sums over a whole data set that say more than `metrics`; none by default."""
        return ()

    def findings(
        self,
        sums: Mapping[str, Tensor],  # noqa: ARG002
        label_names: Labels,  # noqa: ARG002
    ) -> Mapping[str, ClassifierFindings]:
        """What a run keeps of an evaluation besides `metrics`, by stream; of a single one it is empty."""
        return {}


def only_batch(batch: AnyBatch) -> Batch:
    """The batch of an objective that takes no streams; `transform_feed` has refused any."""
    from distft.data.batch import Batch

    assert isinstance(batch, Batch)
    return batch
