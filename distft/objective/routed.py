"""An objective on a model with experts: its terms, and those of the routers' losses beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import SkipValidation

from distft.data.dataset import Labels
from distft.model.config import ModelConfig
from distft.model.experts_config import ExpertsConfig
from distft.model.heads import Heads
from distft.model.layout import ROUTING
from distft.objective.interface import Model, Objective, ObjectiveContext, Passes
from distft.objective.mixture import Mixture

if TYPE_CHECKING:
    from torch import Tensor

    from distft.data.batch import AnyBatch

LOAD_BALANCE, ROUTER_Z = "load_balance", "router_z"
Record = Callable[[Any], None]  # of each pass with gradient: the numbers of tokens [layers, experts]


def with_router_losses(objective: Objective, experts: ExpertsConfig, record: Record) -> Objective:
    """The objective with the routers' losses as further terms, those of a mixture in each of its parts."""
    if not isinstance(objective, Mixture):
        return RoutedObjective(objective=objective, experts=experts, record=record)
    parts = {
        name: part.model_copy(update={"objective": with_router_losses(objective.part(name), experts, record)})
        for name, part in objective.parts.items()
    }
    return objective.model_copy(update={"parts": parts})


class RoutedObjective(Objective):
    """The terms `load_balance` and `router_z` are means over tokens, and over the layers with experts.

    Passes without gradient, such as a teacher's, and rows that stand for none count in neither.
    """

    objective: SkipValidation[Objective]
    experts: ExpertsConfig
    record: SkipValidation[Record]

    def _weights(self) -> dict[str, float]:
        weights = {LOAD_BALANCE: self.experts.load_balance_weight, ROUTER_Z: self.experts.router_z_weight}
        return {name: weight for name, weight in weights.items() if weight}

    def heads(self, label_names: Labels) -> Heads:
        return self.objective.heads(label_names)

    def check_model(self, model: ModelConfig) -> None:
        self.objective.check_model(model)

    @property
    def passes(self) -> Passes:
        return self.objective.passes

    def term_weights(self, step: int) -> Mapping[str, float]:
        return {**self.objective.term_weights(step), **self._weights()}

    def prepare_step(
        self, model: Model, micro_batches: Sequence[AnyBatch], context: ObjectiveContext
    ) -> Sequence[AnyBatch]:
        return self.objective.prepare_step(model, micro_batches, context)

    def num_targets(self, batch: AnyBatch) -> Mapping[str, int]:
        own = dict.fromkeys(self._weights(), batch.num_real_tokens)
        return {**self.objective.num_targets(batch), **own}

    def loss_sums(self, model: Model, batch: AnyBatch, context: ObjectiveContext) -> Mapping[str, Tensor]:
        from distft.model.mixture_of_experts import NUM_LOSSES

        routed = _RoutedModel(model)
        sums = self.objective.loss_sums(routed, batch, context)
        if not routed.passes:
            zero = next(iter(sums.values())).detach() * 0
            return {**sums, **dict.fromkeys(self._weights(), zero)}
        # Every rank runs a backward through its routers, also with rows that stand for none.
        is_counted = float(batch.num_real_tokens > 0)
        routing = sum(routed.passes[1:], start=routed.passes[0]) * is_counted
        self.record(routing[:, NUM_LOSSES:].detach())
        of_layers = routing[:, :NUM_LOSSES].mean(dim=0) / self.passes.trained
        own = dict(zip((LOAD_BALANCE, ROUTER_Z), of_layers, strict=True))
        return {**sums, **{name: own[name] for name in self._weights()}}

    def term_metrics(self, terms: Mapping[str, float], step: int) -> dict[str, float]:
        inner = {name: value for name, value in terms.items() if name not in self._weights()}
        return {**super().term_metrics(terms, step), **self.objective.term_metrics(inner, step)}

    @property
    def training_sum_names(self) -> Sequence[str]:
        return self.objective.training_sum_names

    def training_sums(self, batch: AnyBatch) -> Mapping[str, Tensor]:
        return self.objective.training_sums(batch)

    def training_metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        return self.objective.training_metrics(sums)

    @property
    def per_row(self) -> frozenset[str]:
        return self.objective.per_row

    def evaluate(self, model: Model, batch: AnyBatch, context: ObjectiveContext) -> dict[str, Tensor]:
        return self.objective.evaluate(model, batch, context)

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        return self.objective.metrics(sums)


class _RoutedModel:
    """A model that keeps what its routers chose, and returns what the objective asked for."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.passes: list[Tensor] = []  # `routing_sums` of each layer, of the passes with gradient

    def __call__(self, *args: Any, **kwargs: Any) -> Mapping[str, Tensor]:
        outputs = dict(self._model(*args, tells_routing=True, **kwargs))
        routing = outputs.pop(ROUTING, None)
        if routing is not None:
            self.passes.append(routing)
        return outputs
