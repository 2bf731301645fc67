"""Arithmetic of intervals."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distft.checkpoint.fragments import Interval, cover, even_slice


@given(numel=st.integers(1, 200), data=st.data())
def test_cover_has_each_element_once_and_in_order(numel: int, data: st.DataObject) -> None:
    cuts = sorted({0, numel, *data.draw(st.lists(st.integers(0, numel), max_size=6))})
    stored = [Interval(a, b, i) for i, (a, b) in enumerate(pairwise(cuts))]
    # Overlapping copies of further owners must not be used twice.
    copies = data.draw(st.lists(st.tuples(st.integers(0, numel), st.integers(0, numel)), max_size=4))
    stored += [Interval(min(c), max(c), 100 + i) for i, c in enumerate(copies)]
    start, stop = sorted((data.draw(st.integers(0, numel)), data.draw(st.integers(0, numel))))
    covering = cover(start, stop, data.draw(st.permutations(stored)))
    elements = [e for interval in covering for e in range(interval.start, interval.stop)]
    assert elements == list(range(start, stop))
    by_owner = {interval.owner: interval for interval in stored}
    for interval in covering:
        whole = by_owner[interval.owner]
        assert whole.start <= interval.start < interval.stop <= whole.stop


def test_cover_raises_with_the_first_element_that_no_interval_stores() -> None:
    with pytest.raises(ValueError, match=r"^4$"):
        cover(0, 10, [Interval(0, 4, 0), Interval(6, 10, 1)])
    with pytest.raises(ValueError, match=r"^8$"):
        cover(0, 10, [Interval(0, 8, 0)])


@given(numel=st.integers(0, 50), world_size=st.integers(1, 9))
def test_even_slices_partition_a_tensor(numel: int, world_size: int) -> None:
    slices = [even_slice(numel, rank, world_size) for rank in range(world_size)]
    assert [e for start, stop in slices for e in range(start, stop)] == list(range(numel))
