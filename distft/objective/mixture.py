"""Several objectives in one run, each on a stream of its own: their weighted sum, or one after another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar

from pydantic import Field, model_validator

from distft.config import Component, Settings
from distft.config.step_function import StepFunction, value_at, values_of, values_within
from distft.data.dataset import ClassNames, DataContext, Labels
from distft.data.streams import StreamName
from distft.errors import ConfigError, ErrorCollector
from distft.model.config import ModelConfig
from distft.model.heads import ClassificationHead, Head, Heads, TokenHead
from distft.objective.causal_lm import CausalLM
from distft.objective.classification import Classification
from distft.objective.consistency import Consistency
from distft.objective.contrastive import Contrastive
from distft.objective.entropy import Entropy
from distft.objective.findings import ClassifierFindings
from distft.objective.interface import Model, Objective, ObjectiveContext
from distft.objective.masked_lm import MaskedLM
from distft.objective.mean_teacher import MeanTeacher
from distft.objective.multi_label import MultiLabel
from distft.objective.prefix_lm import PrefixLM
from distft.objective.pseudo_label import PseudoLabel
from distft.objective.regression import Regression
from distft.objective.replaced_token import ReplacedToken
from distft.objective.sentence_pairs import NextSentence, SentenceOrder
from distft.objective.span_corruption import SpanCorruption
from distft.objective.unlabelled import UnlabelledObjective

_Value = TypeVar("_Value")

if TYPE_CHECKING:  # a configuration is checked without torch, which takes 2 s to import
    from torch import Tensor

    from distft.data.batch import AnyBatch, Batch
    from distft.data.feed import AnyFeed

VALIDATION = "validation"  # metrics of validation data have this and a / before their names
_AT_THE_END = 1 << 62  # a step after the last point of any weight

SingleObjective = Annotated[
    CausalLM
    | MaskedLM
    | PrefixLM
    | SpanCorruption
    | ReplacedToken
    | NextSentence
    | SentenceOrder
    | Classification
    | MultiLabel
    | Regression
    | Contrastive
    | PseudoLabel
    | MeanTeacher
    | Consistency
    | Entropy,
    Component(),
]


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
        if VALIDATION in self.parts:
            raise ValueError(
                f"a part cannot be called {VALIDATION}, with which the names of validation metrics begin"
            )
        return self

    def part(self, name: str) -> Objective:
        """A part's objective; its head has the part's name unless the settings give another."""
        objective: Objective = self.parts[name].objective
        if getattr(objective, "head", name) is None:
            return objective.model_copy(update={"head": name})
        return objective

    def heads(self, label_names: Labels) -> Heads:
        names = label_names if isinstance(label_names, Mapping) else {}
        first: dict[str, _PartHead] = {}
        errors = ErrorCollector()
        for name in self.parts:
            with errors.collect(), _naming(name):
                for head_name, head in self.part(name).heads(names.get(name)).items():
                    needed = _PartHead(name, head, names.get(name))
                    first.setdefault(head_name, needed).require_equal(needed, head_name)
        heads = {head_name: of_part.head for head_name, of_part in first.items()}
        for name in self.parts:
            part = self.part(name)
            if isinstance(part, UnlabelledObjective):
                with errors.collect(), _naming(name):
                    part.require_head(dict.fromkeys(self._classifiers().values()), heads)
        errors.raise_if_any()
        return heads

    def _classifiers(self) -> dict[str, str]:
        """The heads of the parts that give each row one label, by part."""
        parts = {name: self.part(name) for name in self.parts}
        return {name: part.head_name for name, part in parts.items() if isinstance(part, Classification)}

    def heads_of_part(self, name: str, label_names: Labels) -> list[str]:
        """The heads that rows of this part's stream go through."""
        names = label_names if isinstance(label_names, Mapping) else {}
        part = self.part(name)
        shared = [part.head] if isinstance(part, UnlabelledObjective) else []  # of another part
        return [*part.heads(names.get(name)), *shared]

    def describe(self) -> Iterator[str]:
        """A line for each part."""
        for name, part in self.parts.items():
            if isinstance(part.weight, tuple):
                shown = ", ".join(f"{value:g} in step {step:,}" for step, value in part.weight)
            else:
                shown = f"{part.weight:g}"
            yield f"{name}: {part.objective.type}, weight {shown}"

    def check_model(self, model: ModelConfig) -> None:
        errors = ErrorCollector()
        for name in self.parts:
            with errors.collect(), _naming(name):
                self.part(name).check_model(model)
        errors.raise_if_any()

    def check_weights(self, num_steps: int, *, is_fresh: bool) -> None:
        """Raise `ConfigError` for weights with which a run of that many steps learns nothing.

        `is_fresh`: every head of the run starts at random.
        """
        learns = [n for n, part in self.parts.items() if max(values_within(part.weight, num_steps)) > 0]
        if not learns:
            raise ConfigError(
                f"objective.parts: all weights are 0 in the {num_steps:,} steps of the run, so that nothing "
                "would be learnt: give a part a weight above 0 within them."
            )
        trained = {getattr(self.part(n), "head_name", None) for n in learns}
        errors = ErrorCollector()
        for name in learns if is_fresh else ():
            part = self.part(name)
            if isinstance(part, UnlabelledObjective) and part.head not in trained:
                with errors.collect(), _naming(name):
                    raise ConfigError(
                        f"head={part.head!r} is of a part whose weight is 0 in all {num_steps:,} steps, so "
                        "that it would be trained by its own guesses: give that part a weight above 0."
                    )
        errors.raise_if_any()

    @property
    def needs_text(self) -> bool:
        return any(part.objective.needs_text for part in self.parts.values())

    @property
    def needs_averaged_weights(self) -> bool:
        return any(part.objective.needs_averaged_weights for part in self.parts.values())

    @property
    def supervised_parts(self) -> Sequence[str] | None:
        unlabelled = [n for n, p in self.parts.items() if isinstance(p.objective, UnlabelledObjective)]
        return [name for name in self.parts if name not in unlabelled] if unlabelled else None

    def resolved(self, model: ModelConfig, train: AnyFeed | None) -> Self:
        streams, parts = getattr(train, "streams", {}), {}
        for name, part in self.parts.items():
            own = part.objective.resolved(model, streams.get(name))
            if isinstance(own, UnlabelledObjective):
                labelled = [name for name, head in self._classifiers().items() if head == own.head]
                own = own.with_labelled([streams[name] for name in labelled if name in streams])
            parts[name] = part.model_copy(update={"objective": own})
        return self.model_copy(update={"parts": parts})

    def term_weights(self, step: int) -> Mapping[str, float]:
        return {
            f"{name}/{term}": value_at(part.weight, step) * weight
            for name, part in self.parts.items()
            for term, weight in self.part(name).term_weights(step).items()
        }

    def transform_feed(self, feed: AnyFeed, context: DataContext, seed: int) -> AnyFeed:
        from distft.data.feed import Feed, StreamFeed
        from distft.keyed_random import stream_seed

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
        for name, stream in feed.streams.items():
            with errors.collect(), _naming(name):
                own_context = replace(context, label_names=stream.label_names)
                part = self.part(name)
                of_part = part.transform_feed(stream, own_context, stream_seed(seed, name))
                assert isinstance(of_part, Feed)
                transformed[name] = of_part
                labels = context.label_names if isinstance(context.label_names, Mapping) else {}
                if isinstance(part, UnlabelledObjective):
                    owner, *_ = [n for n, head in self._classifiers().items() if head == part.head] or [""]
                    part.require_classes(len(labels.get(owner, ())) or None)
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

    def term_metrics(self, terms: Mapping[str, float], step: int) -> dict[str, float]:
        """Each part's loss, as the part weights its terms, and those of its terms if it has several."""
        metrics: dict[str, float] = {}
        for name in self.parts:
            part, own = self.part(name), _of_part(terms, name)
            weights = part.term_weights(step)
            if weights.keys() <= own.keys():
                metrics[f"{name}/loss"] = sum(weight * own[term] for term, weight in weights.items())
            metrics |= {f"{name}/{key}": value for key, value in part.term_metrics(own, step).items()}
        return metrics

    @property
    def training_sum_names(self) -> Sequence[str]:
        return [f"{name}/{key}" for name in self.parts for key in self.part(name).training_sum_names]

    def training_sums(self, batch: AnyBatch) -> Mapping[str, Tensor]:
        return {
            f"{name}/{key}": value
            for name in self.parts
            if (own := _stream(batch, name)) is not None
            for key, value in self.part(name).training_sums(own).items()
        }

    def training_metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {
            f"{name}/{key}": value
            for name in self.parts
            for key, value in self.part(name).training_metrics(_of_part(sums, name)).items()
        }

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
            own = _of_part(sums, name)
            if not own:
                continue
            of_part = self.part(name).metrics(own)
            metrics |= {f"{name}/{key}": value for key, value in of_part.items()}
            metrics["loss"] += value_at(part.weight, _AT_THE_END) * of_part["loss"]
        return metrics

    def report(self, sums: Mapping[str, Tensor], label_names: Labels) -> Sequence[str]:
        lines: list[str] = []
        for name in self.parts:
            names = label_names.get(name) if isinstance(label_names, Mapping) else label_names
            own = _of_part(sums, name)
            of_part = self.part(name).report(own, names) if own else ()
            lines += [f"{name}:", *of_part, ""] if of_part else []
        return lines

    def findings(self, sums: Mapping[str, Tensor], label_names: Labels) -> Mapping[str, ClassifierFindings]:
        found: dict[str, ClassifierFindings] = {}
        for name in self.parts:
            names = label_names.get(name) if isinstance(label_names, Mapping) else label_names
            own = _of_part(sums, name)
            of_part = self.part(name).findings(own, names) if own else {}
            if of_part:
                found[name] = of_part[""]
        return found


def _stream(batch: AnyBatch, name: str) -> Batch | None:
    from distft.data.batch import MixedBatch

    assert isinstance(batch, MixedBatch)
    return batch.streams.get(name)


def _own(context: ObjectiveContext, name: str) -> ObjectiveContext:
    """The context of one part; its state is changed in place, so it need not be copied back."""
    return replace(context, state=_of_part(context.state, name))


def _of_part(values: Mapping[str, _Value], name: str) -> dict[str, _Value]:
    """Those whose names begin with the part's, without it."""
    prefix = f"{name}/"
    return {k.removeprefix(prefix): value for k, value in values.items() if k.startswith(prefix)}


@dataclass(frozen=True, slots=True)
class _PartHead:
    """A head as one part needs it."""

    part: str
    head: Head
    label_names: ClassNames | None

    def require_equal(self, other: _PartHead, name: str) -> None:
        """Raise `ConfigError` unless the head `name` of both parts can be one."""
        problem = None
        if self.head != other.head:
            problem = f"{self.head}, and here {other.head}"
        elif isinstance(self.head, ClassificationHead | TokenHead) and self.label_names != other.label_names:
            problem = f"one of the labels {_shown(self.label_names)}, and here of {_shown(other.label_names)}"
        if problem is not None:
            raise ConfigError(
                f"its head {name!r} is that of objective.parts.{self.part}, there it is {problem}. Give one "
                "of them another name by the setting head, or make them equal."
            )


def _shown(names: Sequence[str] | None) -> str:
    return "none" if names is None else ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


@contextmanager
def _naming(part: str) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        raise type(error)(f"objective.parts.{part}: {error}") from error
