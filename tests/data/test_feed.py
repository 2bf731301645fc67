import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distft.data.batch import IGNORE_INDEX, Batch
from distft.data.dataset import merge
from distft.data.feed import Feed, Prefetcher
from distft.data.labelled import LabelledRows
from distft.data.order import Indices
from distft.data.ragged import RaggedRows
from distft.topology import BatchPlan, MicroBatch


class Numbers:
    """Rows that hold their own number, from `first` on."""

    summary = "numbers"

    def __init__(self, num_sequences: int, first: int = 0) -> None:
        self.num_sequences = num_sequences
        self._first = first

    def batch(self, indices: Indices) -> Batch:
        rows = indices if len(indices) else np.zeros(1, np.int64)
        ids = torch.from_numpy(rows + self._first)[:, None].repeat(1, 3)
        labels = ids if len(indices) else torch.full_like(ids, IGNORE_INDEX)
        return Batch(input_ids=ids, labels=labels, num_target_tokens=3 * len(indices), num_target_bytes=5)


def numbers_of(batch: Batch) -> list[int]:
    return batch.input_ids[:, 0].tolist() if batch.num_target_tokens else []


@given(
    step=st.integers(0, 1000),
    global_batch_size=st.integers(4, 24),
    micro_batch_size=st.integers(1, 4),
    dp_world_size=st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_what_a_step_reads_does_not_depend_on_the_number_of_ranks(
    step: int, global_batch_size: int, micro_batch_size: int, dp_world_size: int
) -> None:
    feed = Feed.endless(Numbers(13), Numbers(2000, 100), weights=[0.25, 0.75], seed=3, shuffle=True)
    plan = BatchPlan(
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        seq_len=3,
        dp_world_size=dp_world_size,
    )
    seen = [
        number
        for dp_rank in range(dp_world_size)
        for part in plan.micro_batches(step, dp_rank)
        for number in numbers_of(feed.batch(part.start, part.stop))
    ]
    begin = step * global_batch_size
    assert seen == numbers_of(feed.batch(begin, begin + global_batch_size))


def test_a_run_that_stops_and_starts_again_sees_exactly_the_remaining_sequences() -> None:
    def feed() -> Feed:
        return Feed.endless(Numbers(50), seed=9, shuffle=True)

    straight = [numbers_of(feed().batch(i, i + 7)) for i in range(0, 210, 7)]
    for stopped_at in (1, 13, 29):
        resumed = [numbers_of(feed().batch(i, i + 7)) for i in range(7 * stopped_at, 210, 7)]
        assert straight[stopped_at:] == resumed


def test_an_empty_range_is_a_batch_in_which_nothing_counts() -> None:
    batch = Feed.in_order(Numbers(4), Numbers(3)).batch(5, 5)
    assert batch.num_target_tokens == 0
    assert (batch.labels == IGNORE_INDEX).all()


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_merged_rows_of_different_lengths_are_the_rows_themselves_and_padding(data: st.DataObject) -> None:
    texts = [
        data.draw(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=8), min_size=1, max_size=4))
        for _ in range(2)
    ]
    datasets = [LabelledRows(RaggedRows(rows), np.arange(len(rows))) for rows in texts]
    count = sum(map(len, texts))
    order = np.array(data.draw(st.permutations(range(count))))
    places = [order[: len(texts[0])], order[len(texts[0]) :]]
    parts = [rows.batch(np.arange(rows.num_sequences)) for rows in datasets]
    batch = merge(parts, places)
    for rows, where in zip(texts, places, strict=True):
        for label, (row, place) in enumerate(zip(rows, where.tolist(), strict=True)):
            length = int(batch.lengths[place])
            assert batch.input_ids[place, :length].tolist() == row
            assert batch.labels[place] == label
    assert batch.num_target_tokens == count


def steps(count: int) -> Iterator[MicroBatch]:
    return (MicroBatch(i, i + 1) for i in range(count))


@pytest.mark.parametrize("depth", [1, 3, 100])
def test_prefetched_batches_are_those_of_the_feed_in_order(depth: int) -> None:
    feed = Feed.in_order(Numbers(40))
    with Prefetcher(feed, steps(40), depth=depth) as batches:
        assert [numbers_of(batch) for batch in batches] == [[i] for i in range(40)]
    with pytest.raises(StopIteration):
        next(batches)


class Counting(Numbers):
    """Counts the batches that were made; fails at row `broken`."""

    made = 0
    broken = -1

    def batch(self, indices: Indices) -> Batch:
        self.made += 1
        if self.broken in indices:
            raise OSError("the disk is gone")
        return super().batch(indices)


def wait_until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_no_more_than_the_queue_and_one_batch_are_made_ahead() -> None:
    rows = Counting(1000)
    with Prefetcher(Feed.in_order(rows), steps(1000), depth=3) as batches:
        wait_until(lambda: rows.made == 4)
        time.sleep(0.02)
        assert rows.made == 4
        next(batches)
        wait_until(lambda: rows.made == 5)


def test_an_error_in_the_thread_is_raised_where_its_batch_would_have_come() -> None:
    rows = Counting(10)
    rows.broken = 2
    with Prefetcher(Feed.in_order(rows), steps(10)) as batches:
        assert numbers_of(next(batches)) == [0]
        assert numbers_of(next(batches)) == [1]
        with pytest.raises(OSError, match="the disk is gone"):
            next(batches)


def test_leaving_the_context_ends_the_thread_however_full_the_queue_is() -> None:
    before = threading.active_count()
    endless = (MicroBatch(i % 10, i % 10 + 1) for i in iter(int, 1))
    with Prefetcher(Feed.in_order(Numbers(10)), endless, depth=2) as batches:
        next(batches)
    assert threading.active_count() == before
    batches.close()
    assert list(batches) == []


def test_waiting_for_slow_data_is_measured() -> None:
    class Slow(Numbers):
        def batch(self, indices: Indices) -> Batch:
            time.sleep(0.03)
            return super().batch(indices)

    with Prefetcher(Feed.in_order(Slow(3)), steps(3)) as batches:
        assert len(list(batches)) == 3
        assert 0.06 < batches.wait_s < 5
    with Prefetcher(Feed.in_order(Numbers(3)), steps(3)) as batches:
        time.sleep(0.1)
        list(batches)
        assert batches.wait_s < 0.05
