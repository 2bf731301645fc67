"""Mean teacher: predictions with the moving average of the weights are targets for the model itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

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


class MeanTeacher(UnlabelledObjective):
    """Tarvainen & Valpola (2017, arXiv:1703.01780). The teacher is the average of `optim.ema_decay`."""

    type: Literal["mean_teacher"] = "mean_teacher"
    loss: ConsistencyLoss = "mse"  # between the two predictions
    teacher: View = View(rate=0.1)
    student: View = View(rate=0.1)

    @property
    def views(self) -> Mapping[str, View]:
        return {"teacher": self.teacher, "student": self.student}

    @property
    def needs_averaged_weights(self) -> bool:
        return True

    def prepare_step(
        self, model: Model, micro_batches: Sequence[AnyBatch], context: ObjectiveContext
    ) -> Sequence[AnyBatch]:
        """Adds the teacher's predictions."""
        import torch

        assert context.averaged_weights is not None  # the configuration was checked
        prepared = []
        with torch.no_grad(), context.averaged_weights():
            for batch in map(only_batch, micro_batches):
                soft = self.logits(model, batch, 0).softmax(dim=1)
                soft = soft.where(counts(batch)[:, None], IGNORE_INDEX)
                prepared.append(replace(batch, targets={**batch.targets, SOFT_LABEL: soft}))
        return prepared

    def loss_sums(self, model: Model, batch: AnyBatch, context: ObjectiveContext) -> Mapping[str, Tensor]:  # noqa: ARG002
        batch = only_batch(batch)
        return {ROW: consistency_sum(self.loss, batch.targets[SOFT_LABEL], self.logits(model, batch, 1))}
