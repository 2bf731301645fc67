"""Numbers that change during a run."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distft.config import Settings, parse
from distft.config.step_function import StepFunction, value_at, values_of
from distft.errors import ConfigError


class Weighted(Settings):
    weight: StepFunction = 1.0


VALUES = st.floats(-1e3, 1e3)


@given(st.dictionaries(st.integers(0, 10_000), VALUES, min_size=1, max_size=6), st.integers(0, 12_000))
def test_points_are_joined_by_lines_and_constant_outside(points: dict[int, float], step: int) -> None:
    ordered = tuple(sorted(points.items()))
    expected = np.interp(step, [point for point, _ in ordered], [value for _, value in ordered])
    found = value_at(ordered, step)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert min(values_of(ordered)) - 1e-9 <= found <= max(values_of(ordered)) + 1e-9
    for point, value in ordered:
        assert value_at(ordered, point) == value


@given(VALUES, st.integers(0, 10**9))
def test_a_number_is_constant(value: float, step: int) -> None:
    assert value_at(value, step) == value
    assert values_of(value) == [value]


@pytest.mark.parametrize(
    "points",
    [
        [],
        [[3, 1.0], [3, 2.0]],
        [[5, 1.0], [2, 1.0]],
        [[-1, 1.0]],
        [[1]],
        "x",
        float("nan"),
        [[0, float("inf")]],
    ],
)
def test_points_that_are_no_function_are_refused(points: Any) -> None:
    with pytest.raises(ConfigError, match="weight"):
        parse(Weighted, {"weight": points})


def test_points_are_read_from_lists() -> None:
    config: Weighted = parse(Weighted, {"weight": [[0, 1.0], [10, 0.0]]})
    assert value_at(config.weight, 5) == 0.5
