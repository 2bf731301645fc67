"""95 % intervals of what an evaluation measures, which say how much chance there is in its rows."""

import math
from collections.abc import Sequence

import numpy as np

_Z = 1.959964  # of a two-sided interval of 95 %
_NUM_RESAMPLES = 1000


def wilson_interval(num_correct: float, num_rows: float) -> tuple[float, float]:
    """That of a share (Wilson 1927), which holds for few rows and shares near 0 and 1, too."""
    if not num_rows:
        return 0.0, 1.0
    share, squared = num_correct / num_rows, _Z**2 / num_rows
    middle = (share + squared / 2) / (1 + squared)
    half = _Z / (1 + squared) * math.sqrt(share * (1 - share) / num_rows + squared / (4 * num_rows))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def share_line(num_right: float, num_all: float, things: str, metric: str) -> str:
    """A line that says how many of the `things` are right, and the interval of the metric that this is."""
    low, high = wilson_interval(num_right, num_all)
    right = f"{num_right:,.1f}".removesuffix(".0")  # a tie may count half
    return (
        f"{right} of {num_all:,.0f} {things} are right; 95 % interval of the {metric} (Wilson): "
        f"{low:.4f} to {high:.4f}"
    )


def correlation_interval(
    correlation: float, num_rows: int, *, is_of_ranks: bool
) -> tuple[float, float] | None:
    """That of Pearson's correlation by Fisher's transform, of Spearman's with the error of Bonett and Wright.

    None for fewer than 4 rows, of which it says nothing, for 1, and for 0, which stands for none.
    """
    if num_rows < 4 or not 0 < abs(correlation) < 1:
        return None
    inflation = 1 + correlation**2 / 2 if is_of_ranks else 1.0
    half = _Z * math.sqrt(inflation / (num_rows - 3))
    return math.tanh(math.atanh(correlation) - half), math.tanh(math.atanh(correlation) + half)


def macro_f1_interval(confusion: Sequence[Sequence[int]]) -> tuple[float, float]:
    """That of macro-F1: between the quantiles of it over resamples of the rows, the same in each call."""
    counts = np.asarray(confusion)
    labels, predicted = counts.nonzero()
    num_rows, found = int(counts.sum()), counts[labels, predicted]
    if not num_rows:
        return 0.0, 1.0
    source, is_right, size = np.random.default_rng(0), labels == predicted, len(counts)

    def macro_f1(drawn: np.ndarray) -> float:
        correct = np.bincount(labels, drawn * is_right, size)
        total = np.bincount(labels, drawn, size) + np.bincount(predicted, drawn, size)
        return float((2 * correct[total > 0] / total[total > 0]).mean())

    # A row's cell is all that counts of it, so rows need not be drawn one by one.
    values = [macro_f1(source.multinomial(num_rows, found / num_rows)) for _ in range(_NUM_RESAMPLES)]
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
