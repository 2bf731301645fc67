"""Numbers that change during a run: constant, or linear between given steps."""

import math
from itertools import pairwise
from typing import Annotated, TypeAlias

from pydantic import AfterValidator, Field

_Points: TypeAlias = tuple[tuple[Annotated[int, Field(ge=0)], float], ...]


def _check_points(value: float | _Points) -> float | _Points:
    if isinstance(value, tuple):
        steps = [step for step, _ in value]
        if not steps or any(later <= earlier for earlier, later in pairwise(steps)):
            raise ValueError("points [step, value] need one step or more, in ascending order")
    if not all(map(math.isfinite, values_of(value))):
        raise ValueError("a value must be a finite number")
    return value


# A number, or points [[step, value], ...]: constant before the first and after the last, linear in between.
StepFunction: TypeAlias = Annotated[float | _Points, AfterValidator(_check_points)]


def value_at(function: float | _Points, step: int) -> float:
    """The value in optimizer step `step` (from 0)."""
    if not isinstance(function, tuple):
        return function
    for (start, first), (stop, last) in pairwise(function):
        if start <= step < stop:
            return first + (last - first) * (step - start) / (stop - start)
    return function[0][1] if step < function[0][0] else function[-1][1]


def values_within(function: float | _Points, num_steps: int) -> list[float]:
    """Its lowest and highest values in the steps [0, num_steps) are among these."""
    points = [step for step, _ in function if step < num_steps] if isinstance(function, tuple) else []
    return [value_at(function, step) for step in (0, *points, num_steps - 1)]


def values_of(function: float | _Points) -> list[float]:
    """Its lowest and highest values are among these."""
    return [value for _, value in function] if isinstance(function, tuple) else [function]
