"""The ledger's intervals of used sequences, compared with plain counting."""

from collections import Counter
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from distft.topology import BatchPlan, MicroBatch
from distft.train.ledger import SequenceLedger, merge_intervals

interval_lists = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=12)


def numbers_in(intervals: tuple[tuple[int, int], ...]) -> set[int]:
    return {number for start, stop in intervals for number in range(start, stop)}


@given(interval_lists)
def test_union_and_repetitions_agree_with_counting(intervals: list[tuple[int, int]]) -> None:
    counts = Counter(number for start, stop in intervals for number in range(start, stop))
    union, repeated = merge_intervals(intervals)
    assert numbers_in(union) == set(counts)
    assert numbers_in(repeated) == {number for number, count in counts.items() if count > 1}
    for found in (union, repeated):
        assert list(found) == sorted(found)
        assert all(start < stop for start, stop in found)
        assert all(a[1] < b[0] for a, b in pairwise(found))


@given(
    global_batch_size=st.integers(1, 30),
    micro_batch_size=st.integers(1, 8),
    world_sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
)
def test_steps_on_changing_numbers_of_ranks_leave_one_interval(
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
            ledger = SequenceLedger()
            for micro_batch in plan.micro_batches(step, rank):
                ledger.add(micro_batch)
            used += ledger.take()
            assert ledger.take() == []
    assert merge_intervals(used) == (((0, len(world_sizes) * global_batch_size),), ())


@given(gaps_and_sizes=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=12))
def test_a_ledger_joins_adjacent_micro_batches_and_no_others(gaps_and_sizes: list[tuple[int, int]]) -> None:
    ledger, used, position = SequenceLedger(), list[int](), 0
    for gap, size in gaps_and_sizes:
        start, position = position + gap, position + gap + size
        ledger.add(MicroBatch(start, position))
        used += range(start, position)
    taken = ledger.take()
    assert [number for start, stop in taken for number in range(start, stop)] == used
    assert all(a[1] < b[0] for a, b in pairwise(taken))


def test_an_empty_micro_batch_adds_no_interval() -> None:
    ledger = SequenceLedger()
    ledger.add(MicroBatch(5, 5))
    assert ledger.take() == []
