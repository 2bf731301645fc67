"""Entropy minimisation: predictions on unlabelled rows are to be confident."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from distft.data.targets import ROW
from distft.objective.interface import Model, ObjectiveContext, only_batch
from distft.objective.unlabelled import UnlabelledObjective, counts

if TYPE_CHECKING:  # a configuration is checked without torch, which takes 2 s to import
    from torch import Tensor

    from distft.data.batch import AnyBatch


class Entropy(UnlabelledObjective):
    """The entropy of the classifier's prediction (Grandvalet & Bengio 2004), with gradient."""

    type: Literal["entropy"] = "entropy"

    def loss_sums(self, model: Model, batch: AnyBatch, context: ObjectiveContext) -> Mapping[str, Tensor]:  # noqa: ARG002
        log_p = self.logits(model, only_batch(batch), 0).log_softmax(dim=1)
        entropy = -(log_p.exp() * log_p).sum(dim=1)
        return {ROW: entropy.where(counts(only_batch(batch)), 0.0).sum()}
