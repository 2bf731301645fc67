"""Consistency: predictions on two views of a text are to agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from distft.config.step_function import StepFunction, value_at, values_of
from distft.data.targets import IGNORE_INDEX, ROW
from distft.objective.interface import Model, ObjectiveContext, only_batch
from distft.objective.unlabelled import (
    SOFT_LABEL,
    ConsistencyLoss,
    UnlabelledObjective,
    View,
    consistency_sum,
    counts,
)

if TYPE_CHECKING:  # a configuration is checked without torch, which takes 2 s to import
    from torch import Tensor

    from distft.data.batch import AnyBatch


class Consistency(UnlabelledObjective):
    """UDA (Xie et al. 2019, arXiv:1904.12848); with rate 0 in both views the Pi model (arXiv:1610.02242).

    No gradient flows into the prediction on the first view.
    """

    type: Literal["consistency"] = "consistency"
    loss: ConsistencyLoss = "kl"  # between the two predictions
    min_confidence: StepFunction = 0.0  # leave out rows whose first view is predicted with less
    # Of the first view's prediction; below 1 it is sharpened, at 1e-4 to a label.
    temperature: float = Field(1.0, ge=1e-4, allow_inf_nan=False)
    first: View = View()  # the view whose prediction is the target
    second: View = View(rate=0.2)  # the view that learns

    @model_validator(mode="after")
    def _check(self) -> Self:
        if any(not 0 <= value <= 1 for value in values_of(self.min_confidence)):
            raise ValueError("min_confidence must be from 0 to 1")
        return self

    @property
    def views(self) -> Mapping[str, View]:
        return {"first": self.first, "second": self.second}

    @property
    def confident_target(self) -> str | None:
        return SOFT_LABEL if max(values_of(self.min_confidence)) > 0 else None

    def prepare_step(
        self, model: Model, micro_batches: Sequence[AnyBatch], context: ObjectiveContext
    ) -> Sequence[AnyBatch]:
        """Adds the predictions on the first view."""
        import torch

        least, prepared = value_at(self.min_confidence, context.step), []
        with torch.no_grad():
            for batch in map(only_batch, micro_batches):
                logits = self.logits(model, batch, 0)
                is_target = counts(batch) & (logits.softmax(dim=1).amax(dim=1) >= least)
                soft = (logits / self.temperature).softmax(dim=1).where(is_target[:, None], IGNORE_INDEX)
                prepared.append(replace(batch, targets={**batch.targets, SOFT_LABEL: soft}))
        return prepared

    def loss_sums(self, model: Model, batch: AnyBatch, context: ObjectiveContext) -> Mapping[str, Tensor]:  # noqa: ARG002
        batch = only_batch(batch)
        return {ROW: consistency_sum(self.loss, batch.targets[SOFT_LABEL], self.logits(model, batch, 1))}
