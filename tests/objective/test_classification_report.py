"""The report of `distft evaluate` on a classifier, against scikit-learn."""

import math

import pytest
import torch
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from distft.objective.classification import Classification
from distft.objective.classification_report import wilson_interval

NAMES = ("a", "b", "a label of more than sixteen characters")


def _sums(labels: list[int], predicted: list[int], num_classes: int) -> dict[str, torch.Tensor]:
    ids, found = torch.tensor(labels), torch.tensor(predicted)
    by_class = [torch.bincount(x, minlength=num_classes) for x in (ids[ids == found], ids, found)]
    confusion = torch.bincount(ids * num_classes + found, minlength=num_classes**2)
    return {"by_class": torch.stack(by_class), "confusion": confusion.view(num_classes, num_classes)}


def test_the_report_has_scikit_learns_figures() -> None:
    labels, predicted = [0, 0, 0, 1, 1, 2, 2, 2, 2], [0, 1, 0, 1, 2, 2, 2, 0, 2]
    lines = Classification().report(_sums(labels, predicted, 3), NAMES)
    assert lines[0].startswith("6 of 9 rows are right; ")
    assert lines[0].endswith("(Wilson): 0.3542 to 0.8794")
    table = [line.split() for line in lines[3:6]]
    expected = precision_recall_fscore_support(labels, predicted)
    for row, *figures in zip(table, *expected, strict=True):
        assert [float(cell) for cell in row[-4:]] == pytest.approx(figures, abs=5e-5)
    assert lines[5].startswith("a label of more…")
    matrix = [[int(cell) for cell in line.split()[-3:]] for line in lines[-3:]]
    assert matrix == confusion_matrix(labels, predicted).tolist()


def test_a_class_that_never_occurs_has_no_figures() -> None:
    lines = Classification().report(_sums([0, 0], [0, 0], 3), NAMES)
    assert lines[4].split() == ["b", "-", "-", "-", "0"]


@pytest.mark.parametrize(("correct", "rows"), [(0, 5), (5, 5), (81, 263), (1, 1000)])
def test_the_interval_solves_wilsons_equation(correct: int, rows: int) -> None:
    """Its ends are the shares p from which correct / rows is 1.96 standard errors of p away."""
    share = correct / rows
    for p in wilson_interval(correct, rows):
        error = math.sqrt(p * (1 - p) / rows)
        assert abs(share - p) == pytest.approx(1.959964 * error, abs=1e-7)
