"""Plain data is measured before it is copied, however often a value appears in it."""

from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distft.config.bounds import MOST_LEVELS, MOST_VALUES, require_bounded
from distft.errors import ConfigError

leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
)
trees = st.recursive(leaves, lambda v: st.lists(v) | st.dictionaries(st.text("ab."), v))


@given(trees)
def test_ordinary_data_passes_unchanged(tree: Any) -> None:
    before = deepcopy(tree)
    assert _refusal(tree) == ""
    assert tree == before


def _refusal(value: Any) -> str:
    try:
        require_bounded(value)
    except ConfigError as error:
        return str(error)
    return ""


@given(trees, st.sampled_from([float("nan"), float("inf"), 2**64, -(2**63) - 1, "a\ud800", {"\udfff": 1}]))
def test_one_bad_value_is_found_anywhere_and_named(tree: Any, bad: Any) -> None:
    with pytest.raises(ConfigError, match=r"^where\.a\.1\.b") as caught:
        require_bounded({"z": tree, "a": [tree, {"b": bad}]}, "where")
    str(caught.value).encode()  # can be printed


def _doubling(levels: int) -> Any:
    value: Any = "x"
    for _ in range(levels):
        value = [value, value]
    return value


def test_values_that_appear_many_times_count_each_time() -> None:
    require_bounded(_doubling(16))
    for value in (_doubling(60), [["x" * (1 << 20)] * 100], {str(i): _doubling(10) for i in range(2000)}):
        with pytest.raises(ConfigError, match=f"more than {MOST_VALUES:,} values"):
            require_bounded(value)


def test_nesting_is_bounded() -> None:
    value: Any = 1
    for _ in range(MOST_LEVELS):
        value = {"a": value}
    require_bounded(value)
    for deeper in ([value], {"a": {"b": value}}):
        with pytest.raises(ConfigError, match="inside each other"):
            require_bounded(deeper)
    endless: dict[str, Any] = {}
    endless["a"] = endless
    with pytest.raises(ConfigError, match="inside each other"):
        require_bounded(endless)


def test_all_bad_values_are_told_at_once_but_not_thousands() -> None:
    with pytest.raises(ConfigError) as caught:
        require_bounded({"a": float("inf"), "b": {"c": 2**70}})
    assert str(caught.value).splitlines() == [
        "a: inf is not a finite number.",
        "b.c: the integer does not fit into 64 bits.",
    ]
    with pytest.raises(ConfigError) as caught:
        require_bounded([float("nan")] * 100_000)
    assert len(str(caught.value).splitlines()) == 20
