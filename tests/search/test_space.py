"""What a search draws: within bounds, on the grid of steps, and the same for the same seed and number."""

from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distft.search.space import (
    ChoiceConfig,
    Distribution,
    IntUniformConfig,
    LogUniformConfig,
    UniformConfig,
    explored,
    grid_points,
    random_point,
)

numbers = st.floats(-1e6, 1e6)
positive = st.floats(1e-8, 1e6)
shares = st.floats(0, 1, exclude_max=True)


@st.composite
def ranges(draw: st.DrawFn) -> Distribution:
    kind = draw(st.sampled_from(["uniform", "stepped", "log", "int"]))
    if kind == "log":
        low = draw(positive)
        return LogUniformConfig(low=low, high=low * draw(st.floats(1.01, 1e6)))
    if kind == "int":
        low = draw(st.integers(-1000, 1000))
        high = low + draw(st.integers(1, 500))
        return IntUniformConfig(low=low, high=high, step=draw(st.integers(1, high - low)))
    low = draw(numbers)
    high = low + draw(st.floats(0.1, 1e6))
    step = (high - low) * draw(st.floats(0.01, 1)) if kind == "stepped" else None
    return UniformConfig(low=low, high=high, step=step)


def is_allowed(one: Any, value: Any) -> bool:
    """The plainest statement of what a distribution may give."""
    slack = 1e-9 * max(abs(one.low), abs(one.high))
    if not one.low - slack <= value <= one.high + slack:
        return False
    if isinstance(one, IntUniformConfig):
        return isinstance(value, int) and (value - one.low) % one.step == 0
    step = getattr(one, "step", None)
    steps = 0 if step is None else (value - one.low) / step
    return abs(steps - round(steps)) < 1e-6


@given(ranges(), shares, shares)
def test_draws_are_allowed_values_and_grow_with_the_share(one: Any, first: float, second: float) -> None:
    low, high = sorted((first, second))
    assert is_allowed(one, one.draw(low))
    assert is_allowed(one, one.draw(high))
    assert one.draw(low) <= one.draw(high)


@given(ranges(), shares, st.integers(0, 1000))
def test_a_changed_value_is_an_allowed_value(one: Any, share: float, seed: int) -> None:
    assert is_allowed(one, one.perturbed(one.draw(share), Random(seed)))


@given(ranges())
def test_the_values_that_are_tried_before_a_search_are_the_ends(one: Any) -> None:
    low, high = one.checked_values()
    assert is_allowed(one, low)
    assert is_allowed(one, high)
    assert low == pytest.approx(one.draw(0.0))
    assert high >= one.draw(1 - 1e-12) - 1e-9 * abs(high)


def test_an_integer_range_gives_each_of_its_values_and_no_other() -> None:
    one = IntUniformConfig(low=2, high=9, step=3)
    assert {one.draw(i / 300) for i in range(300)} == {2, 5, 8}


def test_half_of_the_draws_of_a_rate_are_below_its_geometric_mean() -> None:
    one = LogUniformConfig(low=1e-5, high=1e-1)
    assert one.draw(0.5) == pytest.approx(1e-3)


@given(st.lists(st.integers(), min_size=1, max_size=6, unique=True), shares, st.integers(0, 99))
def test_a_choice_gives_its_values_and_a_change_is_a_neighbour(
    values: list[int], share: float, seed: int
) -> None:
    one = ChoiceConfig(values=list(values))
    drawn = one.draw(share)
    changed = one.perturbed(drawn, Random(seed))
    assert abs(values.index(changed) - values.index(drawn)) <= 1


def test_a_random_trial_depends_on_seed_and_number_alone() -> None:
    space = {"a": UniformConfig(low=0, high=1), "b": ChoiceConfig(values=[1, 2, 3])}
    points = [random_point(space, 7, number) for number in range(50)]
    assert points == [random_point(dict(reversed(space.items())), 7, number) for number in range(50)]
    assert len({point["a"] for point in points}) == 50
    assert points[0] != random_point(space, 8, 0)
    with_more = random_point({**space, "c": UniformConfig(low=0, high=1)}, 7, 3)
    assert {key: with_more[key] for key in space} == points[3]  # another setting leaves the others alone


def test_a_grid_has_each_combination_once() -> None:
    points = grid_points({"a": [1, 2, 3], "b": ["x", "y"]})
    assert len(points) == 6
    assert {(point["a"], point["b"]) for point in points} == {(a, b) for a in (1, 2, 3) for b in "xy"}


@given(st.integers(0, 1000), st.floats(0, 1))
def test_a_fork_changes_settings_within_the_space(seed: int, probability: float) -> None:
    space = {"rate": LogUniformConfig(low=1e-4, high=1e-1), "decay": ChoiceConfig(values=[0.0, 0.1])}
    found = explored({"rate": 1e-2, "decay": 0.0}, space, probability, Random(seed))
    assert is_allowed(space["rate"], found["rate"])
    assert found["decay"] in {0.0, 0.1}
    if probability == 0:
        assert found["rate"] == pytest.approx(8e-3) or found["rate"] == pytest.approx(1.25e-2)
