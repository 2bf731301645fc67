"""Intervals of used sequences against plain counting."""

from collections import Counter
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from distft.topology import BatchPlan, MicroBatch
from distft.train.ledger import Ledger, merged

intervals = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=12)


def places(found: tuple[tuple[int, int], ...]) -> set[int]:
    return {place for start, stop in found for place in range(start, stop)}


@given(intervals)
def test_what_is_used_and_what_is_used_again_is_what_counting_says(
    given_intervals: list[tuple[int, int]],
) -> None:
    counts = Counter(place for start, stop in given_intervals for place in range(start, stop))
    union, repeated = merged(given_intervals)
    assert places(union) == set(counts)
    assert places(repeated) == {place for place, count in counts.items() if count > 1}
    for found in (union, repeated):
        assert list(found) == sorted(found)
        assert all(start < stop for start, stop in found)
        assert all(a[1] < b[0] for a, b in pairwise(found))


@given(
    global_batch_size=st.integers(1, 30),
    micro_batch_size=st.integers(1, 8),
    world_sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
)
def test_ranks_that_come_and_go_leave_one_interval(
    global_batch_size: int, micro_batch_size: int, world_sizes: list[int]
) -> None:
    used: list[tuple[int, int]] = []
    for step, world_size in enumerate(world_sizes):
        plan = BatchPlan(
            global_batch_size=global_batch_size,
            micro_batch_size=min(micro_batch_size, global_batch_size),
            seq_len=8,
            dp_world_size=min(world_size, global_batch_size),
        )
        for rank in range(plan.dp_world_size):
            ledger = Ledger()
            for micro_batch in plan.micro_batches(step, rank):
                ledger.add(micro_batch)
            used += ledger.take()
            assert ledger.take() == []
    assert merged(used) == (((0, len(world_sizes) * global_batch_size),), ())


def test_an_empty_micro_batch_uses_nothing() -> None:
    ledger = Ledger()
    ledger.add(MicroBatch(5, 5))
    assert ledger.take() == []
