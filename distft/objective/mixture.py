"""Several objectives in one run, each on a stream of its own: their weighted sum, or one after another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from distft.config import Component, Settings
from distft.data.dataset import DataContext, Labels
from distft.data.streams import StreamName
from distft.errors import ConfigError, ErrorCollector
from distft.model.config import Heads, ModelConfig
from distft.objective.causal_lm import CausalLM
from distft.objective.classification import Classification
from distft.objective.interface import Model, Objective, ObjectiveContext
from distft.objective.step_function import StepFunction, value_at, values_of

if TYPE_CHECKING:  # a configuration is checked without torch, which takes 2 s to import
    from torch import Tensor

    from distft.data.batch import AnyBatch, Batch
    from distft.data.feed import AnyFeed

_AT_THE_END = 1 << 62  # a step after the last point of any weight

SingleObjective = Annotated[CausalLM | Classification, Component()]


class MixturePart(Settings):
    """One objective of a mixture, on the stream that has its name."""

    objective: SingleObjective
    weight: StepFunction = 1.0  # of its loss; points [[step, weight], ...] for one that changes


class Mixture(Objective):
    """A weighted sum of objectives: each is divided by the number of its own targets in the global batch."""

    type: Literal["mixture"] = "mixture"
    parts: dict[StreamName, MixturePart] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        weights = {name: values_of(part.weight) for name, part in self.parts.items()}
        if problems := [name for name, values in weights.items() if min(values) < 0]:
            raise ValueError(f"the weight of {', '.join(problems)} must not be below 0")
        if not any(max(values) > 0 for values in weights.values()):
            raise ValueError("all weights are 0: nothing would be learnt")
        return self

    def part(self, name: str) -> Objective:
        """A part's objective; its head has the part's name unless the settings give another."""
        objective: Objective = self.parts[name].objective
        if getattr(objective, "head", name) is None:
            return objective.model_copy(update={"head": name})
        return objective

    def heads(self, label_names: Labels) -> Heads:
        names = label_names if isinstance(label_names, Mapping) else {}
        heads: dict[str, object] = {}
        errors = ErrorCollector()
        for name in self.parts:
            with errors.collect(), _naming(name):
                for head_name, head in self.part(name).heads(names.get(name)).items():
                    if heads.setdefault(head_name, head) != head:
                        raise ConfigError(f"its head {head_name!r} is another one in an earlier part.")
        errors.raise_if_any()
        return heads  # type: ignore[return-value]

    def check_model(self, model: ModelConfig) -> None:
        errors = ErrorCollector()
        for name in self.parts:
            with errors.collect(), _naming(name):
                self.part(name).check_model(model)
        errors.raise_if_any()

    def term_weights(self, step: int) -> Mapping[str, float]:
        return {
            f"{name}/{term}": value_at(part.weight, step) * weight
            for name, part in self.parts.items()
            for term, weight in self.part(name).term_weights(step).items()
        }

    def transform_feed(self, feed: AnyFeed, context: DataContext, seed: int) -> AnyFeed:
        from distft.data.feed import Feed, StreamFeed

        if not isinstance(feed, StreamFeed):
            raise ConfigError(
                f"objective.type=mixture needs data.type=streams, with the streams {', '.join(self.parts)}."
            )
        own, streams = set(self.parts), set(feed.streams)
        if streams - own or not streams:
            raise ConfigError(
                f"The streams {', '.join(sorted(streams - own))} have no part in objective.parts, which has "
                f"{', '.join(self.parts)}: name them alike."
            )
        transformed: dict[str, Feed] = {}
        errors = ErrorCollector()
        for index, (name, stream) in enumerate(feed.streams.items()):
            with errors.collect(), _naming(name):
                # Sequences of equal number in two streams get other random numbers.
                of_part = self.part(name).transform_feed(stream, context, seed + index)
                assert isinstance(of_part, Feed)
                transformed[name] = of_part
        errors.raise_if_any()
        return feed.with_streams(transformed)

    def initial_state(self, heads: Heads) -> Mapping[str, Sequence[float]]:
        return {
            f"{name}/{key}": values
            for name in self.parts
            for key, values in self.part(name).initial_state(heads).items()
        }

    def prepare_step(
        self, model: Model, micro_batches: Sequence[AnyBatch], context: ObjectiveContext
    ) -> Sequence[AnyBatch]:
        from distft.data.batch import MixedBatch

        prepared: list[dict[str, Any]] = [{} for _ in micro_batches]
        for name in self.parts:
            own = [_stream(batch, name) for batch in micro_batches]
            given = [batch for batch in own if batch is not None]
            if not given:
                continue
            changed = iter(self.part(name).prepare_step(model, given, _own(context, name)))
            for streams, batch in zip(prepared, own, strict=True):
                if batch is not None:
                    streams[name] = next(changed)
        return [MixedBatch(streams) for streams in prepared]

    def num_targets(self, batch: AnyBatch) -> Mapping[str, int]:
        return {
            f"{name}/{term}": count
            for name in self.parts
            if (own := _stream(batch, name)) is not None
            for term, count in self.part(name).num_targets(own).items()
        }

    def loss_sums(self, model: Model, batch: AnyBatch, context: ObjectiveContext) -> Mapping[str, Tensor]:
        """A stream that no sequence of this step is of adds zeros."""
        import torch

        sums: dict[str, Tensor] = {}
        for name in self.parts:
            part, own = self.part(name), _stream(batch, name)
            if own is None:
                zero = torch.zeros((), device=batch.tensors()[0].device)
                own_sums: Mapping[str, Tensor] = dict.fromkeys(part.term_weights(0), zero)
            else:
                own_sums = part.loss_sums(model, own, _own(context, name))
            sums |= {f"{name}/{term}": value for term, value in own_sums.items()}
        return sums

    @property
    def per_row(self) -> frozenset[str]:
        return frozenset(f"{name}/{key}" for name in self.parts for key in self.part(name).per_row)

    def evaluate(self, model: Model, batch: AnyBatch, context: ObjectiveContext) -> dict[str, Tensor]:
        return {
            f"{name}/{key}": value
            for name in self.parts
            if (own := _stream(batch, name)) is not None
            for key, value in self.part(name).evaluate(model, own, _own(context, name)).items()
        }

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """The metrics of each part that was evaluated, and the loss as weighted at the end of the run."""
        metrics: dict[str, float] = {"loss": 0.0}
        for name, part in self.parts.items():
            own = {
                key.removeprefix(f"{name}/"): value
                for key, value in sums.items()
                if key.startswith(f"{name}/")
            }
            if not own:
                continue
            of_part = self.part(name).metrics(own)
            metrics |= {f"{name}/{key}": value for key, value in of_part.items()}
            metrics["loss"] += value_at(part.weight, _AT_THE_END) * of_part["loss"]
        return metrics


def _stream(batch: AnyBatch, name: str) -> Batch | None:
    from distft.data.batch import MixedBatch

    assert isinstance(batch, MixedBatch)
    return batch.streams.get(name)


def _own(context: ObjectiveContext, name: str) -> ObjectiveContext:
    """The context of one part; its state is changed in place, so it need not be copied back."""
    prefix = f"{name}/"
    state = {k.removeprefix(prefix): v for k, v in context.state.items() if k.startswith(prefix)}
    return replace(context, state=state)


@contextmanager
def _naming(part: str) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        raise type(error)(f"objective.parts.{part}: {error}") from error
