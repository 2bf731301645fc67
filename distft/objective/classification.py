"""Classification: one label per row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from distft.data.dataset import Labels, TransformContext
from distft.data.targets import IGNORE_INDEX, LABEL
from distft.errors import ConfigError
from distft.model.heads import Heads
from distft.objective.interface import Model, ObjectiveContext, only_batch
from distft.objective.row_objective import RowObjective, require_targets

if TYPE_CHECKING:  # a configuration is checked without torch, which takes 2 s to import
    from torch import Tensor

    from distft.data.batch import AnyBatch
    from distft.data.feed import Transform


class Classification(RowObjective):
    """Cross entropy of each row's label; the classifier is a new head."""

    type: Literal["classification"] = "classification"
    label_smoothing: float = Field(0.0, ge=0, lt=1)

    def heads(self, label_names: Labels) -> Heads:
        """`classifier`. Raises `ConfigError` for data without labels."""
        if not isinstance(label_names, tuple):
            raise ConfigError("objective.type=classification needs labels: set data.type=labelled.")
        return {self.head_name: self.row_head(len(label_names))}

    @property
    def row_labels(self) -> str:
        return "one"

    def transforms(self, context: TransformContext) -> Sequence[Transform]:
        if context.data.label_names is not None:  # otherwise `heads` tells
            require_targets(
                context,
                LABEL,
                "objective.type=classification",
                "set labels=one for the data, or objective.type=multi_label for several labels a row",
            )
        return ()

    def term_weights(self, step: int) -> Mapping[str, float]:  # noqa: ARG002
        return {LABEL: 1.0}

    def loss_sums(self, model: Model, batch: AnyBatch, context: ObjectiveContext) -> Mapping[str, Tensor]:  # noqa: ARG002
        from torch.nn.functional import cross_entropy

        loss_sum = cross_entropy(
            self.outputs(model, only_batch(batch)),
            only_batch(batch).targets[LABEL],
            ignore_index=IGNORE_INDEX,
            label_smoothing=self.label_smoothing,
            reduction="sum",
        )
        return {LABEL: loss_sum}

    def evaluate(self, model: Model, batch: AnyBatch, context: ObjectiveContext) -> dict[str, Tensor]:  # noqa: ARG002
        """Sums over the rows: loss, float64; by class [3, K]: correct, labelled, predicted, int64."""
        import torch
        from torch.nn.functional import cross_entropy

        with torch.no_grad():
            logits = self.outputs(model, only_batch(batch))
        counts = only_batch(batch).targets[LABEL] != IGNORE_INDEX
        labels, logits = only_batch(batch).targets[LABEL][counts], logits[counts]
        predicted = logits.argmax(dim=1)
        of_classes = (labels[labels == predicted], labels, predicted)
        by_class = [torch.bincount(ids, minlength=logits.shape[1]) for ids in of_classes]
        loss_sum = cross_entropy(logits.double(), labels, reduction="sum")
        return {"loss_sum": loss_sum, "by_class": torch.stack(by_class)}

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Loss, accuracy, and F1 averaged over the classes that occur as label or prediction."""
        num_correct, num_labelled, num_predicted = sums["by_class"].double()
        num_rows = num_labelled.sum().clamp_min(1)
        return {
            "loss": float(sums["loss_sum"] / num_rows),
            "accuracy": float(num_correct.sum() / num_rows),
            "macro_f1": macro_f1(num_correct, num_labelled, num_predicted),
        }


def macro_f1(num_correct: Tensor, num_labelled: Tensor, num_predicted: Tensor) -> float:
    """F1 averaged over the classes that occur as label or prediction, from counts [K]."""
    occurs = (num_labelled + num_predicted) > 0
    f1 = 2 * num_correct[occurs] / (num_labelled + num_predicted)[occurs]
    return float(f1.mean()) if len(f1) else 0.0
