"""Blocks of an interleaving, and the ends of one pass over datasets."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from distft.data.mixture import Interleaving, SequentialSampler


@given(
    weights=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    block_size=st.integers(1, 5),
    start=st.integers(0, 60),
    length=st.integers(0, 60),
)
@example(weights=[2, 1], block_size=3, start=4, length=7)
def test_a_block_is_of_one_source_and_continues_where_its_last_one_ended(
    weights: list[int], block_size: int, start: int, length: int
) -> None:
    interleaving = Interleaving(weights, block_size=block_size)
    stop = start + length
    sources, numbers = interleaving.lookup(0, stop)
    by_block = [sources[first : first + block_size] for first in range(0, stop, block_size)]
    assert all((block == block[0]).all() for block in by_block)
    alone, _ = Interleaving(weights).lookup(0, len(by_block))
    assert [block[0] for block in by_block] == alone.tolist()
    counts = interleaving.counts(stop)
    assert all(type(count) is int for count in counts)
    for source, count in enumerate(counts):
        assert numbers[sources == source].tolist() == list(range(count))
    part = interleaving.lookup(start, stop)
    assert [values.dtype for values in part] == [np.int64, np.int64]
    assert part[0].tolist() == sources[start:].tolist()
    assert part[1].tolist() == numbers[start:].tolist()


def test_one_pass_ends_with_the_very_last_row() -> None:
    sampler = SequentialSampler([2, 3, 4])
    dataset_ids, rows = sampler.lookup(8, 9)
    assert (dataset_ids.tolist(), rows.tolist()) == ([2], [3])
    assert sampler.lookup(0, 9)[1].tolist() == [0, 1, 0, 1, 2, 0, 1, 2, 3]
    assert sampler.lookup(9, 9)[0].tolist() == []
    with pytest.raises(ValueError, match=r"\[8, 10\) are outside the 9 "):
        sampler.lookup(8, 10)
