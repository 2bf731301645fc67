"""What an evaluation finds of a classifier besides numbers: its confusion matrix and its worst mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a configuration is checked without torch, which takes 2 s to import
    from torch import Tensor

MOST_MISTAKES = 20  # that are kept of an evaluation
MOST_LABELS = 50  # of a confusion matrix that is kept of each evaluation


@dataclass(frozen=True, kw_only=True, slots=True)
class Mistake:
    """A row whose label the model does not predict."""

    number: int  # of its sequence in the evaluation's order
    label: str
    predicted: str
    probability: float  # of the predicted label


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifierFindings:
    """`confusion[i][j]` rows of label i were predicted to be label j; None: there are too many labels."""

    labels: tuple[str, ...]
    num_rows: int
    num_wrong: int
    confusion: Sequence[Sequence[int]] | None
    mistakes: Sequence[Mistake]  # the surest ones first, at most `MOST_MISTAKES`


def wrong_rows(logits_BK: Tensor, labels_B: Tensor, numbers_B: Tensor) -> Tensor:
    """float64 [n, 4] of the surest mistakes of a batch: sequence number, label, prediction, probability."""
    import torch

    probability_B, predicted_B = logits_BK.double().softmax(dim=1).max(dim=1)
    rows = torch.stack([numbers_B.double(), labels_B.double(), predicted_B.double(), probability_B], dim=1)
    return _surest(rows[predicted_B != labels_B])


def mistakes_of(rows: Tensor, labels: Sequence[str]) -> list[Mistake]:
    """The surest of the rows that `wrong_rows` gave of all batches, whatever the batches were."""
    return [
        Mistake(
            number=int(number),
            label=labels[int(label)],
            predicted=labels[int(predicted)],
            probability=probability,
        )
        for number, label, predicted, probability in _surest(rows).tolist()
    ]


def _surest(rows: Tensor) -> Tensor:
    """Of rows in the data's order: by probability, and those with the same in that order."""
    order = rows[:, 3].argsort(descending=True, stable=True)
    return rows[order[:MOST_MISTAKES]]
