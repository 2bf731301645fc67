"""Token classification: one label per word, such as names or parts of speech.

Shape letters: B rows, T positions, N words that count, K labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field

from distft.data.dataset import ClassNames, Labels, TransformContext
from distft.data.targets import IGNORE_INDEX, TOKEN_LABEL
from distft.errors import ConfigError
from distft.model.heads import HeadName, Heads, TokenHead
from distft.objective.entities import Span, entity_types, precision_recall_f1, spans_of
from distft.objective.interface import Model, Objective, ObjectiveContext, only_batch
from distft.objective.row_objective import require_targets

if TYPE_CHECKING:  # a configuration is checked without torch, which takes 2 s to import
    from torch import Tensor

    from distft.data.batch import AnyBatch, Batch
    from distft.data.feed import AnyFeed, Transform
    from distft.model.config import ModelConfig


SPANS = "spans"  # of a prediction


class TokenClassification(Objective):
    """Cross entropy of each word's label at the word's first token; the classifier is a new head."""

    type: Literal["token_classification"] = "token_classification"
    # Name of its parameters; null: token_classifier, in a mixture that of its part.
    head: HeadName | None = None
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    labels: tuple[str, ...] | None = None  # in the order of the head's outputs; null: those of the data

    @property
    def head_name(self) -> str:
        return self.head or "token_classifier"

    def heads(self, label_names: Labels) -> Heads:
        """Raises `ConfigError` for data without labels, or with others than `labels`."""
        if not isinstance(label_names, tuple):
            raise ConfigError(
                f"objective.type={self.type} needs labels of words: set data.type=token_labels."
            )
        if self.labels is not None and self.labels != label_names:
            raise ConfigError(
                f"objective.labels are {', '.join(self.labels[:10])}, and those of the data "
                f"{', '.join(label_names[:10])}: leave objective.labels out."
            )
        return {self.head_name: TokenHead(num_outputs=len(label_names))}

    def check_model(self, model: ModelConfig) -> None:
        if model.is_encoder_decoder:
            raise ConfigError(
                f"objective.type={self.type} with model.type=encoder_decoder: its hidden states of a text "
                "are the decoder's, which repeats none. Take an encoder."
            )

    def resolved(self, model: ModelConfig, train: AnyFeed | None) -> Self:
        own = super().resolved(model, train)
        names = getattr(train, "label_names", None)
        return own if own.labels or names is None else own.model_copy(update={"labels": names})

    def transforms(self, context: TransformContext) -> Sequence[Transform]:
        if context.data.label_names is not None:  # otherwise `heads` tells
            require_targets(context, TOKEN_LABEL, f"objective.type={self.type}", "set data.type=token_labels")
        return ()

    def term_weights(self, step: int) -> Mapping[str, float]:  # noqa: ARG002
        return {TOKEN_LABEL: 1.0}

    def num_targets(self, batch: AnyBatch) -> Mapping[str, int]:
        return {TOKEN_LABEL: only_batch(batch).num_targets[TOKEN_LABEL]}

    def outputs(self, model: Model, batch: Batch) -> Tensor:
        """float32 [B, T, K]."""
        return model(**batch.model_inputs, heads=(self.head_name,))[self.head_name].float()

    def loss_sums(self, model: Model, batch: AnyBatch, context: ObjectiveContext) -> Mapping[str, Tensor]:  # noqa: ARG002
        from torch.nn.functional import cross_entropy

        batch = only_batch(batch)
        loss_sum = cross_entropy(
            self.outputs(model, batch).flatten(0, 1),
            batch.targets[TOKEN_LABEL].flatten(),
            ignore_index=IGNORE_INDEX,
            label_smoothing=self.label_smoothing,
            reduction="sum",
        )
        return {TOKEN_LABEL: loss_sum}

    def word_labels(self, model: Model, batch: Batch) -> list[list[int]]:
        """The predicted class of each word of each row."""
        import torch

        with torch.no_grad():
            predicted_BT = self.outputs(model, batch).argmax(dim=2)
        return _by_row(predicted_BT, batch.targets[TOKEN_LABEL] != IGNORE_INDEX)

    def predictions(self, classes: Sequence[int], label_names: ClassNames | None) -> Mapping[str, Any]:
        """Of one sentence its labels, and its spans of words if labels mark entities, as plain data."""
        names = label_names or self.labels or ()
        labels = [names[number] for number in classes]
        if not entity_types(names):
            return {"labels": labels}
        return {"labels": labels, SPANS: [span._asdict() for span in spans_of(labels)]}

    def evaluate(self, model: Model, batch: AnyBatch, context: ObjectiveContext) -> dict[str, Tensor]:  # noqa: ARG002
        """Sums over words: loss, float64; by class [3, K]: correct, labelled, predicted, int64.

        With labels of entities also [3, types] of whole entities, packed documents each for itself.
        """
        import torch
        from torch.nn.functional import cross_entropy

        batch = only_batch(batch)
        with torch.no_grad():
            logits_BTK = self.outputs(model, batch)
        labels_BT = batch.targets[TOKEN_LABEL]
        counts_BT, predicted_BT = labels_BT != IGNORE_INDEX, logits_BTK.argmax(dim=2)
        labels, predicted, num_classes = labels_BT[counts_BT], predicted_BT[counts_BT], logits_BTK.shape[2]
        of_classes = (labels[labels == predicted], labels, predicted)
        sums = {
            "loss_sum": cross_entropy(logits_BTK[counts_BT].double(), labels, reduction="sum"),
            "by_class": torch.stack([torch.bincount(ids, minlength=num_classes) for ids in of_classes]),
        }
        if types := entity_types(self.labels or ()):
            real = self._entities(labels_BT, counts_BT, batch.document_ids)
            found = self._entities(predicted_BT, counts_BT, batch.document_ids)
            kinds = [[span.type for *_, span in spans] for spans in (real & found, real, found)]
            by_type = [[own.count(kind) for kind in types] for own in kinds]
            sums["entities"] = torch.tensor(by_type, device=labels.device)
        return sums

    def _entities(
        self, classes_BT: Tensor, counts_BT: Tensor, document_ids_BT: Tensor | None
    ) -> set[tuple[int, int, Span]]:
        """The spans of each row's documents, whose words are those that count."""
        import torch

        assert self.labels is not None
        documents_BT = torch.zeros_like(classes_BT) if document_ids_BT is None else document_ids_BT
        of_words: dict[tuple[int, int], list[str]] = {}
        rows = zip(_by_row(classes_BT, counts_BT), _by_row(documents_BT, counts_BT), strict=True)
        for row, (classes, documents) in enumerate(rows):
            for number, document in zip(classes, documents, strict=True):
                of_words.setdefault((row, document), []).append(self.labels[number])
        return {(*place, span) for place, labels in of_words.items() for span in spans_of(labels)}

    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Loss and accuracy of words, macro-F1 of labels; of whole entities precision, recall and F1."""
        from distft.objective.classification import macro_f1

        num_correct, num_labelled, num_predicted = sums["by_class"].double()
        num_words = num_labelled.sum().clamp_min(1)
        metrics = {
            "loss": float(sums["loss_sum"] / num_words),
            "accuracy": float(num_correct.sum() / num_words),
            "macro_f1": macro_f1(num_correct, num_labelled, num_predicted),
        }
        if "entities" in sums:
            num_right, num_real, num_found = sums["entities"].sum(dim=1).tolist()
            names = ("entity_precision", "entity_recall", "entity_f1")
            metrics |= dict(zip(names, precision_recall_f1(num_right, num_found, num_real), strict=True))
        return metrics

    def report(self, sums: Mapping[str, Tensor], label_names: Labels) -> Sequence[str]:
        """Precision, recall and F1 by type of entity, else by label, with 95 % intervals."""
        from distft.objective.classification import class_names
        from distft.objective.classification_report import class_table
        from distft.objective.intervals import share_line

        by_class = sums["by_class"].tolist()
        accuracy = share_line(sum(by_class[0]), sum(by_class[1]), "words", "accuracy")
        if "entities" in sums:
            names, of_classes, unit = entity_types(self.labels or ()), sums["entities"].tolist(), "entities"
        else:
            names = list(class_names(label_names, len(by_class[0])))
            of_classes, unit = by_class, "words"
        return [accuracy, "", *class_table(of_classes, names, unit)]


def _by_row(values_BT: Tensor, counts_BT: Tensor) -> list[list[int]]:
    """Of each row the values that count."""
    rows = zip(values_BT.cpu(), counts_BT.cpu(), strict=True)
    return [values[counts].tolist() for values, counts in rows]
