"""Which values in the files of a run or a search a chart can show."""

from typing import Any, TypeGuard


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether it is a finite int or float that a chart can show, and no bool."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) < 1e300  # an int may be larger than any float


def is_int(value: Any) -> TypeGuard[int]:
    """Whether it is an int that a chart can show, and no bool."""
    return isinstance(value, int) and is_number(value)
