import dataclasses
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distft.data.batch import Batch, RaggedArray, merge_batches
from distft.data.feed import Feed, Prefetcher
from distft.data.labelled_rows import LabelledRows
from distft.data.sampler import Indices
from distft.data.targets import IGNORE_INDEX, LABEL, NEXT_TOKEN
from distft.topology import BatchPlan, MicroBatch


class Numbers:
    """Row `i` repeats the number `first + i`."""

    summary = "numbers"

    def __init__(self, num_sequences: int, first: int = 0) -> None:
        self.num_sequences = num_sequences
        self._first = first

    def batch(self, indices: Indices) -> Batch:
        rows = indices if len(indices) else np.zeros(1, np.int64)
        ids = torch.from_numpy(rows + self._first)[:, None].repeat(1, 3)
        labels = ids if len(indices) else torch.full_like(ids, IGNORE_INDEX)
        return Batch(
            input_ids=ids,
            targets={NEXT_TOKEN: labels},
            num_targets={NEXT_TOKEN: 3 * len(indices)},
            num_target_bytes=5,
        )


def numbers_of(batch: Batch) -> list[int]:
    return batch.input_ids[:, 0].tolist() if batch.num_targets[NEXT_TOKEN] else []


@given(
    step=st.integers(0, 1000),
    global_batch_size=st.integers(4, 24),
    micro_batch_size=st.integers(1, 4),
    dp_world_size=st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_the_global_batch_does_not_depend_on_the_number_of_ranks(
    step: int, global_batch_size: int, micro_batch_size: int, dp_world_size: int
) -> None:
    feed = Feed.for_training(Numbers(13), Numbers(2000, 100), weights=[0.25, 0.75], seed=3, shuffle=True)
    plan = BatchPlan(
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        seq_len=3,
        dp_world_size=dp_world_size,
    )
    seen = [
        number
        for dp_rank in range(dp_world_size)
        for micro_batch in plan.micro_batches(step, dp_rank)
        for number in numbers_of(feed.batch(micro_batch.start, micro_batch.stop))
    ]
    begin = step * global_batch_size
    assert seen == numbers_of(feed.batch(begin, begin + global_batch_size))


def test_a_resumed_run_reads_exactly_the_remaining_sequences() -> None:
    def feed() -> Feed:
        return Feed.for_training(Numbers(50), seed=9, shuffle=True)

    straight = [numbers_of(feed().batch(i, i + 7)) for i in range(0, 210, 7)]
    for stopped_at in (1, 13, 29):
        resumed = [numbers_of(feed().batch(i, i + 7)) for i in range(7 * stopped_at, 210, 7)]
        assert straight[stopped_at:] == resumed


def test_an_empty_range_gives_a_batch_without_targets() -> None:
    batch = Feed.for_evaluation(Numbers(4), Numbers(3)).batch(5, 5)
    assert batch.num_targets[NEXT_TOKEN] == 0
    assert (batch.targets[NEXT_TOKEN] == IGNORE_INDEX).all()


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_merging_batches_of_different_widths_keeps_the_rows_and_pads_them(data: st.DataObject) -> None:
    row_lists = [
        data.draw(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=8), min_size=1, max_size=4))
        for _ in range(2)
    ]
    datasets = [LabelledRows(RaggedArray(rows), np.arange(len(rows))) for rows in row_lists]
    num_rows = sum(map(len, row_lists))
    order = np.array(data.draw(st.permutations(range(num_rows))))
    row_positions = [order[: len(row_lists[0])], order[len(row_lists[0]) :]]
    batches = [dataset.batch(np.arange(dataset.num_sequences)) for dataset in datasets]
    merged = merge_batches(batches, row_positions)
    for rows, positions in zip(row_lists, row_positions, strict=True):
        for label, (row, position) in enumerate(zip(rows, positions.tolist(), strict=True)):
            length = int(merged.lengths[position])
            assert merged.input_ids[position, :length].tolist() == row
            assert merged.targets[LABEL][position] == label
    assert merged.num_targets[LABEL] == num_rows


def test_merging_keeps_a_field_that_one_batch_lacks() -> None:
    tokens = Batch(
        input_ids=torch.tensor([[1, 2, 3]]),
        targets={NEXT_TOKEN: torch.tensor([[2, 3, 4]])},
        num_targets={NEXT_TOKEN: 3},
        position_ids=torch.tensor([[0, 1, 0]]),
        document_ids=torch.tensor([[0, 0, 1]]),
    )
    labelled = Batch(
        input_ids=torch.tensor([[7, 8]]),
        targets={LABEL: torch.tensor([5])},
        num_targets={LABEL: 1},
    )
    merged = merge_batches([tokens, labelled], [np.array([1]), np.array([0])])
    assert merged.input_ids.tolist() == [[7, 8, 0], [1, 2, 3]]
    assert merged.targets[NEXT_TOKEN].tolist() == [[IGNORE_INDEX] * 3, [2, 3, 4]]
    assert merged.targets[LABEL].tolist() == [5, IGNORE_INDEX]
    assert merged.num_targets == {NEXT_TOKEN: 3, LABEL: 1}
    assert merged.lengths is not None
    assert merged.lengths.tolist() == [2, 3]
    assert merged.position_ids is not None
    assert merged.position_ids[:, :2].tolist() == [[0, 1], [0, 1]]
    assert merged.document_ids is not None
    assert merged.document_ids.tolist() == [[0, 0, 0], [0, 0, 1]]


BATCH = Batch(
    input_ids=torch.tensor([[1, 2]]),
    targets={LABEL: torch.tensor([5])},
    num_targets={LABEL: 1},
    sequence_numbers=torch.tensor([0]),
)
# For each field a value of one batch, and what it is for the row after merging; ValueError: it is refused.
FIELDS: dict[str, tuple[Any, Any]] = {
    "input_ids": (torch.tensor([[7, 8]]), [7, 8]),
    "targets": ({LABEL: torch.tensor([6])}, None),  # as in the tests above, with `num_targets`
    "num_targets": ({LABEL: 3}, {LABEL: 4}),
    "rows_per_sequence": (2, ValueError),
    "sequence_numbers": (torch.tensor([9]), 9),
    "position_ids": (torch.tensor([[0, 0]]), [0, 0]),
    "document_ids": (torch.tensor([[0, 1]]), [0, 1]),
    "is_prefix": (torch.tensor([[True, False]]), [True, False]),
    "segment_ids": (torch.tensor([[0, 1]]), [0, 1]),
    "lengths": (torch.tensor([1]), 1),
    "images": (torch.full((1, 1, 1, 1), 9, dtype=torch.uint8), [[[9]]]),
    "is_captioned": (True, ValueError),
    "num_target_bytes": (4, 4),
    "dropout_keys": (torch.tensor([3]), ValueError),
    "counted_pairs": (3, ValueError),
    "counted_local_pairs": (3, ValueError),
    "counted_tokens": (3, ValueError),
}


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Batch)])
def test_merging_keeps_each_field_or_refuses_it(name: str) -> None:
    value, expected = FIELDS[name]
    positions = [np.array([1]), np.array([0])]
    like = {"images": torch.zeros_like(value)} if name == "images" else {}
    batches = [replace(BATCH, **like), replace(BATCH, **{name: value})]
    if expected is ValueError:
        with pytest.raises(ValueError, match="merged"):
            merge_batches(batches, positions)
        return
    found = getattr(merge_batches(batches, positions), name)
    if name == "targets":
        assert found[LABEL].tolist() == [6, 5]
    else:
        assert (found[0].tolist() if isinstance(found, torch.Tensor) else found) == expected


def test_rows_of_images_are_merged_with_such_rows_alone() -> None:
    images = replace(BATCH, images=torch.zeros(1, 3, 2, 2, dtype=torch.uint8), is_captioned=True)
    positions = [np.array([0]), np.array([1])]
    merged = merge_batches([images, images], positions)
    assert merged.images is not None
    assert (merged.images.shape, merged.is_captioned) == ((2, 3, 2, 2), True)
    for other in (BATCH, replace(images, is_captioned=False)):
        with pytest.raises(ValueError, match="images"):
            merge_batches([images, other], positions)


def test_a_transform_draws_anew_in_each_epoch_and_the_same_in_every_cut() -> None:
    def mark(batch: Batch) -> Batch:
        assert batch.sequence_numbers is not None
        return replace(batch, input_ids=batch.input_ids + 1000 * batch.sequence_numbers[:, None])

    feed = Feed.for_training(
        Numbers(10), Numbers(6, 100), weights=(1.0, 2.0), seed=1, shuffle=True
    ).with_transforms(mark)
    whole = feed.batch(0, 64).input_ids[:, 0]
    assert (whole // 1000).tolist() == list(range(64))
    cut = torch.cat([feed.batch(start, min(start + 7, 64)).input_ids[:, 0] for start in range(0, 64, 7)])
    assert torch.equal(cut, whole)


def micro_batches(count: int) -> Iterator[MicroBatch]:
    return (MicroBatch(i, i + 1) for i in range(count))


@pytest.mark.parametrize("depth", [1, 3, 100])
def test_the_prefetcher_returns_the_batches_of_the_feed_in_order(depth: int) -> None:
    feed = Feed.for_evaluation(Numbers(40))
    with Prefetcher(feed, micro_batches(40), depth=depth) as batches:
        assert [numbers_of(batch) for batch in batches] == [[i] for i in range(40)]
    with pytest.raises(StopIteration):
        next(batches)


class Counting(Numbers):
    """Counts its batches; raises at row `broken`."""

    num_batches = 0
    broken = -1

    def batch(self, indices: Indices) -> Batch:
        self.num_batches += 1
        if self.broken in indices:
            raise OSError("the disk is gone")
        return super().batch(indices)


def wait_until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_at_most_depth_plus_one_batches_are_made_ahead() -> None:
    rows = Counting(1000)
    with Prefetcher(Feed.for_evaluation(rows), micro_batches(1000), depth=3) as batches:
        wait_until(lambda: rows.num_batches == 4)
        time.sleep(0.02)
        assert rows.num_batches == 4
        next(batches)
        wait_until(lambda: rows.num_batches == 5)


def test_an_error_in_the_thread_is_raised_in_place_of_its_batch() -> None:
    rows = Counting(10)
    rows.broken = 2
    with Prefetcher(Feed.for_evaluation(rows), micro_batches(10)) as batches:
        assert numbers_of(next(batches)) == [0]
        assert numbers_of(next(batches)) == [1]
        with pytest.raises(OSError, match="the disk is gone"):
            next(batches)


def test_leaving_the_context_ends_the_thread_with_a_full_queue() -> None:
    before = threading.active_count()
    for_training = (MicroBatch(i % 10, i % 10 + 1) for i in iter(int, 1))
    with Prefetcher(Feed.for_evaluation(Numbers(10)), for_training, depth=2) as batches:
        next(batches)
    assert threading.active_count() == before
    batches.close()
    assert list(batches) == []


def test_wait_s_is_the_time_that_next_waits_for_data() -> None:
    class Slow(Numbers):
        def batch(self, indices: Indices) -> Batch:
            time.sleep(0.03)
            return super().batch(indices)

    with Prefetcher(Feed.for_evaluation(Slow(3)), micro_batches(3)) as batches:
        assert len(list(batches)) == 3
        assert 0.06 < batches.wait_s < 5
    with Prefetcher(Feed.for_evaluation(Numbers(3)), micro_batches(3)) as batches:
        time.sleep(0.1)
        list(batches)
        assert batches.wait_s < 0.05


class RecordingCopier:
    """Copies by adding 1000, and records which thread did what."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, int]] = []

    def start(self, batch: Batch) -> tuple[Batch, int]:
        number = int(batch.input_ids[0, 0])
        self.calls.append(("start", threading.current_thread().name, number))
        return replace(batch, input_ids=batch.input_ids + 1000), number

    def receive(self, batch: Batch, copied: int) -> None:
        assert int(batch.input_ids[0, 0]) == 1000 + copied
        self.calls.append(("receive", threading.current_thread().name, copied))


def test_batches_are_prepared_and_copied_by_the_thread_and_received_before_they_are_used() -> None:
    copier = RecordingCopier()
    feed = Feed.for_evaluation(Numbers(5))
    prepare = lambda batch: replace(batch, counted_pairs=batch.num_attention_pairs)  # noqa: E731
    with Prefetcher(feed, micro_batches(5), prepare=prepare, copier=copier) as batches:
        for number, batch in enumerate(batches):
            assert numbers_of(batch) == [1000 + number]
            assert batch.counted_pairs == 9
            assert copier.calls.count(("receive", "MainThread", number)) == 1
    assert [call for call in copier.calls if call[0] == "start"] == [
        ("start", "distft-prefetch", number) for number in range(5)
    ]


def test_counted_pairs_survive_a_copy_to_the_device_so_that_nothing_reads_it() -> None:
    batch = Numbers(4).batch(np.arange(2))
    documents = replace(batch, position_ids=torch.tensor([[0, 1, 0]] * 2), document_ids=batch.input_ids)
    assert documents.num_attention_pairs == 2 * (4 + 1)
    counted = replace(documents, counted_pairs=documents.num_attention_pairs)
    assert counted.to(torch.device("meta")).num_attention_pairs == 10
    assert len(counted.tensors()) == 4
