"""Arithmetic of intervals."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distft.checkpoint import fragments
from distft.checkpoint.fragments import Interval, StoredIntervals, cover, even_slice


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


@given(
    stored=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12), st.integers(0, 9)), max_size=12),
    start=st.integers(0, 12),
    stop=st.integers(0, 12),
)
def test_the_quick_search_finds_what_looking_at_all_intervals_does(
    stored: list[tuple[int, int, int]], start: int, stop: int
) -> None:
    """Also where intervals overlap, are empty, or one contains another."""
    everything = [Interval(begin, end, owner) for begin, end, owner in sorted(stored)]
    try:
        expected: object = cover(start, stop, everything)
    except ValueError as error:
        expected = str(error)
    try:
        found: object = StoredIntervals(stored).cover(start, stop)
    except ValueError as error:
        found = str(error)
    assert found == expected


def test_the_quick_search_hands_on_only_what_overlaps_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking at all intervals of 512 ranks takes each of them 30 s for 70B parameters."""
    looked_at: list[Interval] = []

    def record(start: int, stop: int, intervals: list[Interval]) -> list[Interval]:
        looked_at.extend(intervals)
        return cover(start, stop, intervals)

    monkeypatch.setattr(fragments, "cover", record)
    stored = StoredIntervals((10 * owner, 10 * owner + 10, owner) for owner in range(512))
    assert stored.cover(2500, 2520) == [Interval(2500, 2510, 250), Interval(2510, 2520, 251)]
    assert [interval.owner for interval in looked_at] == [250, 251]


@given(numel=st.integers(0, 50), world_size=st.integers(1, 9))
def test_even_slices_partition_a_tensor(numel: int, world_size: int) -> None:
    slices = [even_slice(numel, rank, world_size) for rank in range(world_size)]
    assert [e for start, stop in slices for e in range(start, stop)] == list(range(numel))
