"""The reports of `distft evaluate` and their intervals, against scikit-learn, SciPy and resampled rows."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr
from sklearn.metrics import confusion_matrix, f1_score, precision_recall_fscore_support

from distft.objective.classification import Classification
from distft.objective.intervals import correlation_interval, macro_f1_interval, wilson_interval
from distft.objective.multi_label import MultiLabel
from distft.objective.preference import Preference
from distft.objective.regression import Regression

NAMES = ("a", "b", "a label of more than sixteen characters")


def _sums(labels: list[int], predicted: list[int], num_classes: int) -> dict[str, torch.Tensor]:
    ids, found = torch.tensor(labels), torch.tensor(predicted)
    by_class = [torch.bincount(x, minlength=num_classes) for x in (ids[ids == found], ids, found)]
    confusion = torch.bincount(ids * num_classes + found, minlength=num_classes**2)
    return {"by_class": torch.stack(by_class), "confusion": confusion.view(num_classes, num_classes)}


def test_the_report_has_scikit_learns_figures_with_intervals() -> None:
    labels, predicted = [0, 0, 0, 1, 1, 2, 2, 2, 2], [0, 1, 0, 1, 2, 2, 2, 0, 2]
    lines = Classification().report(_sums(labels, predicted, 3), NAMES)
    assert lines[0].startswith("6 of 9 rows are right; ")
    assert lines[0].endswith("(Wilson): 0.3542 to 0.8794")
    assert lines[1].startswith("95 % interval of macro_f1")
    table = [line.split() for line in lines[4:7]]
    expected = precision_recall_fscore_support(labels, predicted)
    numbers = [(predicted.count(label), labels.count(label)) for label in range(3)]
    for row, counts, *figures in zip(table, numbers, *expected, strict=True):
        precision, low, _, high, recall, lowest, _, highest, *others = row[-10:]
        assert [float(cell) for cell in (precision, recall, *others)] == pytest.approx(figures, abs=5e-5)
        intervals = [
            *wilson_interval(figures[0] * counts[0], counts[0]),
            *wilson_interval(figures[1] * counts[1], counts[1]),
        ]
        assert [float(cell) for cell in (low, high, lowest, highest)] == pytest.approx(intervals, abs=5e-5)
    assert lines[6].startswith("a label of more…")
    assert len({len(line) for line in lines[3:7]}) == 1, "its columns stand below each other"
    matrix = [[int(cell) for cell in line.split()[-3:]] for line in lines[-3:]]
    assert matrix == confusion_matrix(labels, predicted).tolist()


def test_a_class_that_never_occurs_has_no_figures() -> None:
    lines = Classification().report(_sums([0, 0], [0, 0], 3), NAMES)
    assert lines[5].split() == ["b", "-", "-", "-", "-", "-", "0"]


@pytest.mark.parametrize(("correct", "rows"), [(0, 5), (5, 5), (81, 263), (1, 1000)])
def test_the_interval_solves_wilsons_equation(correct: int, rows: int) -> None:
    """Its ends are the shares p from which correct / rows is 1.96 standard errors of p away."""
    share = correct / rows
    for p in wilson_interval(correct, rows):
        error = math.sqrt(p * (1 - p) / rows)
        assert abs(share - p) == pytest.approx(1.959964 * error, abs=1e-7)


def test_macro_f1_varies_as_over_resampled_rows() -> None:
    source = np.random.default_rng(5)
    labels = source.choice(3, size=150, p=[0.6, 0.3, 0.1])
    predicted = np.where(source.random(150) < 0.7, labels, source.choice(3, size=150))
    figures = []
    for _ in range(400):
        rows = source.choice(150, size=150)
        figures.append(f1_score(labels[rows], predicted[rows], average="macro"))
    confusion = confusion_matrix(labels, predicted).tolist()
    interval = macro_f1_interval(confusion)
    assert interval == pytest.approx(np.quantile(figures, [0.025, 0.975]), abs=0.025)
    assert interval == macro_f1_interval(confusion), "the same in each call"
    assert macro_f1_interval([[0, 0], [0, 0]]) == (0.0, 1.0)
    assert macro_f1_interval([[3, 0], [0, 0]]) == (1.0, 1.0)


def test_the_interval_of_pearsons_correlation_is_scipys() -> None:
    source = np.random.default_rng(0)
    x = source.normal(size=40)
    found = pearsonr(x, x + source.normal(size=40))
    expected = found.confidence_interval(0.95)
    interval = correlation_interval(float(found.statistic), 40, is_of_ranks=False)
    assert interval == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_the_interval_of_spearmans_correlation_holds_it_in_95_of_100_samples() -> None:
    """Of normal pairs with correlation r it is 6 / pi * asin(r / 2)."""
    source, r, num_rows, num_samples = np.random.default_rng(1), 0.7, 60, 3000
    x = source.normal(size=(num_samples, num_rows))
    y = r * x + math.sqrt(1 - r**2) * source.normal(size=(num_samples, num_rows))
    ranks = [values.argsort(axis=1).argsort(axis=1) - (num_rows - 1) / 2 for values in (x, y)]
    correlations = (ranks[0] * ranks[1]).sum(axis=1) / (ranks[0] ** 2).sum(axis=1)
    true, covered = 6 / math.pi * math.asin(r / 2), 0
    for correlation in correlations:
        interval = correlation_interval(float(correlation), num_rows, is_of_ranks=True)
        assert interval is not None
        covered += interval[0] < true < interval[1]
    assert 0.935 < covered / num_samples < 0.965


@pytest.mark.parametrize(("correlation", "num_rows"), [(0.5, 3), (1.0, 10), (-1.0, 10), (0.0, 10)])
def test_a_correlation_may_have_no_interval(correlation: float, num_rows: int) -> None:
    assert correlation_interval(correlation, num_rows, is_of_ranks=True) is None


def test_numbers_have_intervals_of_both_correlations() -> None:
    numbers = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    sums = {"loss_sum": torch.tensor(1.0), "numbers": numbers, "predictions": numbers[[0, 1, 2, 4, 3]]}
    assert Regression().report(sums, None) == [
        "95 % interval of pearson (Fisher): 0.0861 to 0.9934",
        "95 % interval of spearman (Bonett and Wright): -0.1689 to 0.9961",
    ]


def test_rows_with_several_labels_have_figures_by_class() -> None:
    has = torch.tensor([[1, 0], [1, 1], [0, 1]]).bool()
    found = torch.tensor([[1, 0], [1, 0], [1, 1]]).bool()
    by_class = torch.stack([(has & found).sum(0), has.sum(0), found.sum(0)])
    sums = {"by_class": by_class, "num_rows": torch.tensor(3), "num_exact": torch.tensor(1)}
    lines = MultiLabel().report(sums, ("a", "b"))
    assert lines[0].startswith("1 of 3 rows are right; 95 % interval of the exact_match (Wilson): 0.0615 to ")
    expected = precision_recall_fscore_support(has.numpy(), found.numpy())
    for row, *figures in zip([line.split() for line in lines[3:]], *expected, strict=True):
        assert [float(row[i]) for i in (1, 5, 9, 10)] == pytest.approx(figures, abs=5e-5)


def test_pairs_have_intervals_in_which_a_tie_counts_half() -> None:
    sums = {"pairs": torch.tensor(10.0), "accuracy": torch.tensor(7.5)}
    sums["log_probabilities/accuracy"] = torch.tensor(4.0)
    low, high = wilson_interval(7.5, 10)
    assert Preference().report(sums, None) == [
        f"7.5 of 10 pairs are right; 95 % interval of the accuracy (Wilson): {low:.4f} to {high:.4f}",
        "4 of 10 pairs are right; 95 % interval of the log_probabilities/accuracy (Wilson): 0.1682 to 0.6873",
    ]
