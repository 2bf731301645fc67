"""How much each setting of a search explains of its metric."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distft.report.values import is_number

LEAST_TRIALS = 6  # with a value: of fewer, chance explains too much


def importances(columns: Mapping[str, Sequence[Any]], metric: Sequence[float]) -> dict[str, float]:
    """By setting, the share of the variance of the metric's ranks that this setting alone explains.

    It is the adjusted coefficient of determination (Fisher 1924), at least 0, of a parabola over the ranks of
    a number, or of the means of each value of anything else. Ranks, so that neither one diverged trial nor a
    logarithmic scale decides; a parabola, since the best value is often in the middle. Settings that act only
    together are not seen. Empty for fewer than `LEAST_TRIALS` trials.
    """
    if len(metric) < LEAST_TRIALS:
        return {}
    target = _ranks(np.array(metric, np.float64))
    shares = {name: _explained(_design(values), target) for name, values in columns.items()}
    return dict(sorted(shares.items(), key=lambda pair: -pair[1]))


def _design(values: Sequence[Any]) -> NDArray[np.float64]:
    """A column for each parameter but the mean."""
    distinct = list(dict.fromkeys(map(repr, values)))
    if all(is_number(value) for value in values) and len(distinct) > 2:
        ranks = _ranks(np.array(values, np.float64))
        centred = ranks - ranks.mean()
        parabola: NDArray[np.float64] = np.stack([centred, centred**2], axis=1)
        return parabola
    ids = np.array([distinct.index(repr(value)) for value in values])
    columns: NDArray[np.float64] = (ids[:, None] == np.arange(1, len(distinct))).astype(np.float64)
    return columns


def _explained(design: NDArray[np.float64], target: NDArray[np.float64]) -> float:
    num_rows, num_columns = design.shape
    variance = float(np.var(target))
    if not num_columns or num_rows <= num_columns + 1 or not variance:
        return 0.0
    centred = design - design.mean(axis=0)
    fitted = centred @ np.linalg.lstsq(centred, target - target.mean(), rcond=None)[0]
    unexplained = float(np.var(target - target.mean() - fitted)) / variance
    return float(max(1.0 - unexplained * (num_rows - 1) / (num_rows - num_columns - 1), 0.0))


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """From 0; equal values have the mean of their ranks."""
    below = (values[:, None] > values).sum(axis=1)
    equal = (values[:, None] == values).sum(axis=1)
    ranks: NDArray[np.float64] = below + (equal - 1) / 2
    return ranks
