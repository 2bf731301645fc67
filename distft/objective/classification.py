"""Classification: one label per row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from distft.data.dataset import ClassNames, Labels, TransformContext
from distft.data.targets import IGNORE_INDEX, LABEL
from distft.errors import ConfigError, suggest_name
from distft.model.heads import Heads
from distft.objective.findings import MOST_LABELS, ClassifierFindings, mistakes_of, wrong_rows
from distft.objective.interface import Model, ObjectiveContext, only_batch
from distft.objective.row_objective import RowObjective, require_targets

if TYPE_CHECKING:  # a configuration is checked without torch, which takes 2 s to import
    from torch import Tensor

    from distft.data.batch import AnyBatch, Batch
    from distft.data.feed import AnyFeed, Transform
    from distft.model.config import ModelConfig


ClassWeight = Annotated[float, Field(gt=0, allow_inf_nan=False)]
R_DROP = "r_drop"  # name of the term; its targets are rows
_LEAST_MISS = 1e-6  # 1 - p in a focal loss: at 0 a power below 1 has no gradient
_MISTAKES = "mistakes"  # an output of `evaluate` by row
_MOST_CONFUSED = 1024  # classes of a confusion matrix, which has 8 MiB


class Classification(RowObjective):
    """Cross entropy of each row's label; the classifier is a new head."""

    type: Literal["classification"] = "classification"
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    # Factors of the classes' losses: by label, 1 for others; in their order; or balanced: rows / (K * own).
    class_weights: Literal["balanced"] | dict[str, ClassWeight] | tuple[ClassWeight, ...] | None = None
    focal_gamma: float = Field(0.0, ge=0, le=10)  # focal loss: times (1 - p) ** gamma (arXiv:1708.02002)
    # R-Drop's coefficient: each row passes twice, and its two predictions, which dropout makes differ, are to
    # agree (Wu et al. 2021, arXiv:2106.14448). Twice the work; papers: 0.5 to 5.
    r_drop: float = Field(0.0, ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _check_focal(self) -> Self:
        if self.focal_gamma and self.label_smoothing:
            raise ValueError("focal_gamma and label_smoothing do not go together: leave one of them out")
        return self

    def check_model(self, model: ModelConfig) -> None:
        super().check_model(model)
        if self.r_drop and not (model.has_dropout or model.has_noise):
            raise ConfigError(
                f"objective.r_drop={self.r_drop:g} with model.dropout=0: a row's two passes would be equal. "
                "Set model.dropout, such as 0.1, or leave r_drop out."
            )

    def resolved(self, model: ModelConfig, train: AnyFeed | None) -> Self:
        own = super().resolved(model, train)
        names, counts = getattr(train, "label_names", None), getattr(train, "label_counts", None)
        if own.class_weights is None or isinstance(own.class_weights, tuple) or names is None:
            return own
        return own.model_copy(update={"class_weights": _weights(own.class_weights, names, counts)})

    def heads(self, label_names: Labels) -> Heads:
        """`classifier`. Raises `ConfigError` for data without labels."""
        if not isinstance(label_names, tuple):
            raise ConfigError(
                "objective.type=classification needs labels: set data.type=labelled, or label of images."
            )
        weights = self.class_weights
        if isinstance(weights, tuple) and len(weights) != len(label_names):
            raise ConfigError(
                f"objective.class_weights has {len(weights)} numbers, and the data {len(label_names)} labels."
            )
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
        if not self.r_drop or context.step_share is None:
            return ()
        from distft.objective.views import twice

        return (twice,)

    def term_weights(self, step: int) -> Mapping[str, float]:  # noqa: ARG002
        return {LABEL: 1.0, R_DROP: self.r_drop} if self.r_drop else {LABEL: 1.0}

    def num_targets(self, batch: AnyBatch) -> Mapping[str, int]:
        return dict.fromkeys(self.term_weights(0), only_batch(batch).num_targets[LABEL])

    def loss_sums(self, model: Model, batch: AnyBatch, context: ObjectiveContext) -> Mapping[str, Tensor]:  # noqa: ARG002
        from torch.nn.functional import cross_entropy

        logits_BK, labels_B = self.outputs(model, only_batch(batch)), only_batch(batch).targets[LABEL]
        weights = self.class_weights
        losses_B = cross_entropy(
            logits_BK,
            labels_B,
            weight=logits_BK.new_tensor(weights) if isinstance(weights, tuple) else None,
            ignore_index=IGNORE_INDEX,
            label_smoothing=self.label_smoothing,
            reduction="none",
        )
        if self.focal_gamma:
            nll_B = cross_entropy(logits_BK, labels_B, ignore_index=IGNORE_INDEX, reduction="none")
            losses_B = losses_B * (-(-nll_B).expm1()).clamp_min(_LEAST_MISS) ** self.focal_gamma
        if not self.r_drop:
            return {LABEL: losses_B.sum()}
        return {LABEL: losses_B.sum() / 2, R_DROP: _disagreement(logits_BK, labels_B)}

    def predictions(self, outputs_BK: Tensor, label_names: ClassNames | None) -> Sequence[Mapping[str, Any]]:
        names = label_names or [str(label) for label in range(outputs_BK.shape[1])]
        return [
            {
                "label": names[max(range(len(names)), key=row.__getitem__)],
                "probability": max(row),
                "probabilities": dict(zip(names, row, strict=True)),
            }
            for row in outputs_BK.softmax(dim=1).tolist()
        ]

    def evaluate(self, model: Model, batch: AnyBatch, context: ObjectiveContext) -> dict[str, Tensor]:  # noqa: ARG002
        """Sums over the rows: loss, float64; by class [3, K]: correct, labelled, predicted, int64.

        Of up to 1,024 classes also [K, K]: the rows of each label by predicted label. Of rows that are known
        by number, the batch's surest mistakes, as `wrong_rows` describes them.
        """
        rows = only_batch(batch)
        logits, labels = self.counted_outputs(model, rows)
        sums = self.sums(logits, labels)
        if rows.sequence_numbers is None:
            return sums
        numbers = rows.sequence_numbers[rows.targets[LABEL] != IGNORE_INDEX]
        return {**sums, _MISTAKES: wrong_rows(logits, labels, numbers)}

    @property
    def per_row(self) -> frozenset[str]:
        return frozenset({_MISTAKES})

    def counted_outputs(self, model: Model, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [B, K] without gradient, and labels, of the rows that count."""
        import torch

        with torch.no_grad():
            logits = self.outputs(model, batch)
        counts = batch.targets[LABEL] != IGNORE_INDEX
        return logits[counts], batch.targets[LABEL][counts]

    def sums(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """What `evaluate` adds up over rows with these outputs, all of which count."""
        import torch
        from torch.nn.functional import cross_entropy

        num_classes, predicted = logits.shape[1], logits.argmax(dim=1)
        of_classes = (labels[labels == predicted], labels, predicted)
        by_class = [torch.bincount(ids, minlength=num_classes) for ids in of_classes]
        loss_sum = cross_entropy(logits.double(), labels, reduction="sum")
        sums = {"loss_sum": loss_sum, "by_class": torch.stack(by_class)}
        if num_classes <= _MOST_CONFUSED:
            pairs = torch.bincount(labels * num_classes + predicted, minlength=num_classes**2)
            sums["confusion"] = pairs.view(num_classes, num_classes)
        return sums

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Loss, accuracy, and F1 averaged over the classes that occur as label or prediction."""
        num_correct, num_labelled, num_predicted = sums["by_class"].double()
        num_rows = num_labelled.sum().clamp_min(1)
        return {
            "loss": float(sums["loss_sum"] / num_rows),
            "accuracy": float(num_correct.sum() / num_rows),
            "macro_f1": macro_f1(num_correct, num_labelled, num_predicted),
        }

    def report(self, sums: Mapping[str, Tensor], label_names: Labels) -> Sequence[str]:
        from distft.objective.classification_report import report_lines

        by_class = sums["by_class"].tolist()
        confusion = sums["confusion"].tolist() if "confusion" in sums else None
        return report_lines(by_class, confusion, class_names(label_names, len(by_class[0])))

    def findings(self, sums: Mapping[str, Tensor], label_names: Labels) -> Mapping[str, ClassifierFindings]:
        num_correct, num_rows, _ = sums["by_class"].sum(dim=1).tolist()
        names = class_names(label_names, sums["by_class"].shape[1])
        is_shown = "confusion" in sums and len(names) <= MOST_LABELS
        found = ClassifierFindings(
            labels=names if is_shown else (),
            num_rows=num_rows,
            num_wrong=num_rows - num_correct,
            confusion=sums["confusion"].tolist() if is_shown else None,
            mistakes=mistakes_of(sums[_MISTAKES], names) if _MISTAKES in sums else (),
        )
        return {"": found}


def class_names(label_names: Labels, num_classes: int) -> tuple[str, ...]:
    """Those of the data; their numbers if it has none."""
    return label_names if isinstance(label_names, tuple) else tuple(map(str, range(num_classes)))


def _disagreement(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
    """The mean of both Kullback-Leibler divergences of each pair of neighbouring rows, summed over pairs."""
    log_p, log_q = logits_BK.log_softmax(dim=1).view(-1, 2, logits_BK.shape[1]).unbind(dim=1)
    of_pairs = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(dim=1) / 2
    return of_pairs.where(labels_B[::2] != IGNORE_INDEX, 0).sum()


def _weights(
    given: str | Mapping[str, float], names: Sequence[str], counts: Sequence[int] | None
) -> tuple[float, ...]:
    """Of each class in the labels' order. Raises `ConfigError` for labels that the data does not have."""
    if isinstance(given, Mapping):
        unknown = [name for name in given if name not in names]
        if unknown:
            raise ConfigError(
                f"objective.class_weights: no label of the data is {' or '.join(map(repr, unknown))}."
                f"{suggest_name(unknown[0], list(names))}"
            )
        return tuple(given.get(name, 1.0) for name in names)
    if counts is None:
        raise ConfigError("objective.class_weights=balanced needs labels that are counted: give the weights.")
    found = [*counts, *[0] * (len(names) - len(counts))]
    return tuple(sum(found) / (len(names) * count) if count else 1.0 for count in found)


def macro_f1(num_correct: Tensor, num_labelled: Tensor, num_predicted: Tensor) -> float:
    """F1 averaged over the classes that occur as label or prediction, from counts [K]."""
    occurs = (num_labelled + num_predicted) > 0
    f1 = 2 * num_correct[occurs] / (num_labelled + num_predicted)[occurs]
    return float(f1.mean()) if len(f1) else 0.0
