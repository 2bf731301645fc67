"""Multi-label classification: any number of labels per row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from distft.data.dataset import ClassNames, Labels, TransformContext
from distft.data.targets import IGNORE_INDEX, LABELS
from distft.errors import ConfigError
from distft.model.heads import Heads
from distft.objective.classification import class_names, macro_f1
from distft.objective.interface import Model, ObjectiveContext, only_batch
from distft.objective.row_objective import RowObjective, require_targets

if TYPE_CHECKING:  # a configuration is checked without torch, which takes 2 s to import
    from torch import Tensor

    from distft.data.batch import AnyBatch
    from distft.data.feed import Transform


class MultiLabel(RowObjective):
    """Binary cross entropy of each class, averaged over the classes; a row may have several, or none."""

    type: Literal["multi_label"] = "multi_label"
    threshold: float = Field(0.5, gt=0, lt=1)  # the probability from which a class counts as predicted

    def heads(self, label_names: Labels) -> Heads:
        if not isinstance(label_names, tuple):
            raise ConfigError(
                "objective.type=multi_label needs labels: set data.type=labelled with labels=several."
            )
        return {self.head_name: self.row_head(len(label_names))}

    @property
    def row_labels(self) -> str:
        return "several"

    def transforms(self, context: TransformContext) -> Sequence[Transform]:
        if context.data.label_names is not None:  # otherwise `heads` tells
            remedy = "set labels=several for the data, or objective.type=classification for one label a row"
            require_targets(context, LABELS, "objective.type=multi_label", remedy)
        return ()

    def term_weights(self, step: int) -> Mapping[str, float]:  # noqa: ARG002
        return {LABELS: 1.0}

    def loss_sums(self, model: Model, batch: AnyBatch, context: ObjectiveContext) -> Mapping[str, Tensor]:  # noqa: ARG002
        from torch.nn.functional import binary_cross_entropy_with_logits

        labels = only_batch(batch).targets[LABELS]
        logits = self.outputs(model, only_batch(batch))
        loss_BK = binary_cross_entropy_with_logits(logits, labels.clamp_min(0).float(), reduction="none")
        return {LABELS: loss_BK.where(labels != IGNORE_INDEX, 0.0).sum() / logits.shape[1]}

    def predictions(self, outputs_BK: Tensor, label_names: ClassNames | None) -> Sequence[Mapping[str, Any]]:
        names = label_names or [str(label) for label in range(outputs_BK.shape[1])]
        return [
            {
                "labels": [name for name, share in zip(names, row, strict=True) if share >= self.threshold],
                "probabilities": dict(zip(names, row, strict=True)),
            }
            for row in outputs_BK.sigmoid().tolist()
        ]

    def evaluate(self, model: Model, batch: AnyBatch, context: ObjectiveContext) -> dict[str, Tensor]:  # noqa: ARG002
        """Sums over the rows: loss, rows, rows that are exact; by class: correct, labelled, predicted."""
        import torch
        from torch.nn.functional import binary_cross_entropy_with_logits

        with torch.no_grad():
            logits = self.outputs(model, only_batch(batch)).double()
        labels = only_batch(batch).targets[LABELS]
        counts = labels[:, 0] != IGNORE_INDEX
        logits, has = logits[counts], labels[counts].bool()
        predicted = logits.sigmoid() >= self.threshold
        loss_sum = binary_cross_entropy_with_logits(logits, has.double(), reduction="sum")
        return {
            "loss_sum": loss_sum / labels.shape[1],
            "num_rows": counts.sum(),
            "num_exact": (predicted == has).all(dim=1).sum(),
            "by_class": torch.stack([(predicted & has).sum(0), has.sum(0), predicted.sum(0)]),
        }

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Loss, share of rows with exactly their labels, and F1 over all labels and averaged over classes.

        The average is over the classes that occur as label or prediction.
        """
        num_rows = sums["num_rows"].clamp_min(1)
        correct, labelled, predicted = sums["by_class"].double()
        return {
            "loss": float(sums["loss_sum"] / num_rows),
            "exact_match": float(sums["num_exact"] / num_rows),
            "micro_f1": float(2 * correct.sum() / (labelled.sum() + predicted.sum()).clamp_min(1)),
            "macro_f1": macro_f1(correct, labelled, predicted),
        }

    def report(self, sums: Mapping[str, Tensor], label_names: Labels) -> Sequence[str]:
        from distft.objective.classification_report import class_table
        from distft.objective.intervals import share_line

        by_class = sums["by_class"].tolist()
        exact = share_line(float(sums["num_exact"]), float(sums["num_rows"]), "rows", "exact_match")
        return [exact, "", *class_table(by_class, class_names(label_names, len(by_class[0])))]
