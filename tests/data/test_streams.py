"""Several data streams: which sequence is of which stream is a function of its number alone."""

from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.mixtures import TokenRows, labelled_rows

from distft.config import parse
from distft.data.batch import Batch, MixedBatch
from distft.data.dataset import DataContext
from distft.data.feed import Feed, StreamFeed
from distft.data.mixture import Interleaving, SequentialSampler
from distft.data.streams import StreamsConfig
from distft.data.targets import IGNORE_INDEX
from distft.errors import ConfigError, DataError
from distft.topology import BatchPlan

WEIGHTS = st.lists(st.integers(1, 300).map(lambda n: n / 100), min_size=1, max_size=5)
NAMES = ("text", "topic")


def feed_of(weights: tuple[float, float] = (2.0, 1.0), steps_of: int | None = None) -> StreamFeed:
    text = Feed.for_training(TokenRows(), TokenRows(5), weights=(3, 1), seed=5, shuffle=True)
    topic = Feed.for_training(labelled_rows(), seed=6, shuffle=True, label_names=("a", "b", "c"))
    order = Interleaving(weights, block_size=steps_of or 1)
    return StreamFeed({"text": text, "topic": topic}, order, steps_of=steps_of)


@given(WEIGHTS, st.integers(0, 10**9), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_at_any_point_each_source_has_its_share_to_one_block(
    weights: list[float], blocks: int, block_size: int
) -> None:
    order = Interleaving(weights, block_size=block_size)
    exact = [Fraction(str(weight)) for weight in weights]
    counts = order.counts(blocks * block_size)
    assert sum(counts) == blocks * block_size
    for count, weight in zip(counts, exact, strict=True):
        assert abs(Fraction(count, block_size) - blocks * weight / sum(exact)) < 1


@given(
    WEIGHTS, st.integers(0, 10**9), st.integers(1, 9), st.lists(st.integers(0, 40), min_size=1, max_size=5)
)
@settings(max_examples=60, deadline=None)
def test_any_cut_finds_what_one_pass_finds(
    weights: list[float], start: int, block_size: int, lengths: list[int]
) -> None:
    """And the numbers within a source are consecutive, from 0 on."""
    order = Interleaving(weights, block_size=block_size)
    bounds = np.cumsum([start, *lengths]).tolist()
    parts = [order.lookup(a, b) for a, b in pairwise(bounds)]
    sources, numbers = order.lookup(bounds[0], bounds[-1])
    assert np.array_equal(np.concatenate([part[0] for part in parts]), sources)
    assert np.array_equal(np.concatenate([part[1] for part in parts]), numbers)
    for source, first in enumerate(order.counts(start)):
        own = numbers[sources == source]
        assert np.array_equal(own, np.arange(first, first + len(own)))
    for block in range(-(-start // block_size), bounds[-1] // block_size):
        inside = sources[max(block * block_size - start, 0) : (block + 1) * block_size - start]
        assert len(set(inside.tolist())) <= 1


def rows_of(batch: MixedBatch) -> dict[str, list[tuple[int, ...]]]:
    """The rows with a target, by stream: sequence number, tokens and targets, without padding."""
    found: dict[str, list[tuple[int, ...]]] = {}
    for name, stream in batch.streams.items():
        assert stream.sequence_numbers is not None
        (targets,) = stream.targets.values()
        if not sum(stream.num_targets.values()):
            assert (targets == IGNORE_INDEX).all()
            continue
        lengths = [stream.input_ids.shape[1]] * len(targets) if stream.lengths is None else stream.lengths
        for row, length in enumerate(map(int, lengths)):
            content = stream.input_ids[row, :length].tolist() + targets[row].flatten().tolist()
            found.setdefault(name, []).append((int(stream.sequence_numbers[row]), *content))
    return found


@given(
    step=st.integers(0, 500),
    global_batch_size=st.integers(4, 20),
    micro_batch_size=st.integers(1, 4),
    dp_world_size=st.integers(1, 4),
    alternate=st.booleans(),
)
@settings(max_examples=50, deadline=None)
def test_the_rows_of_a_step_do_not_depend_on_ranks_and_cuts(
    step: int, global_batch_size: int, micro_batch_size: int, dp_world_size: int, alternate: bool
) -> None:
    feed = feed_of(steps_of=global_batch_size if alternate else None)
    plan = BatchPlan(
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        seq_len=12,
        dp_world_size=dp_world_size,
    )
    begin = step * global_batch_size
    seen: dict[str, list[tuple[int, ...]]] = {}
    streams = set()
    for dp_rank in range(dp_world_size):
        for micro in plan.micro_batches(step, dp_rank):
            batch = feed.batch(micro.start, micro.stop)
            streams.add(tuple(batch.streams))  # every rank makes the same forwards, also of empty ranges
            for name, rows in rows_of(batch).items():
                seen.setdefault(name, []).extend(rows)
    whole = feed.batch(begin, begin + global_batch_size)
    assert seen == rows_of(whole)
    assert streams == {tuple(whole.streams)}
    assert len(whole.streams) == (1 if alternate else 2)


@given(st.integers(0, 2000), st.integers(0, 40), st.booleans())
@settings(max_examples=50, deadline=None)
def test_lookup_names_the_rows_that_batches_hold(start: int, length: int, alternate: bool) -> None:
    feed = feed_of(steps_of=5 if alternate else None)
    datasets, rows = feed.lookup(start, start + length)
    sources: list[Any] = [TokenRows(), TokenRows(5), labelled_rows()]
    assert feed.dataset_sizes == [source.num_sequences for source in sources] == [23, 5, 11]
    expected: dict[str, list[list[int]]] = {name: [] for name in NAMES}
    for dataset, row in zip(datasets.tolist(), rows.tolist(), strict=True):
        ids = sources[dataset].batch(np.array([row])).input_ids[0].tolist()
        expected[NAMES[dataset // 2]].append(ids)
    for begin in range(start, start + length, 5):
        batch = feed.batch(begin, min(begin + 5, start + length))
        for name, found in rows_of(batch).items():
            for row_found in found:
                ids = expected[name].pop(0)
                assert list(row_found[1 : 1 + len(ids)]) == ids
    assert expected == {name: [] for name in NAMES}


def test_a_feed_of_streams_describes_all_of_them() -> None:
    feed = feed_of()
    assert feed.num_sequences == 39
    assert feed.label_names == {"topic": ("a", "b", "c")}
    assert feed.summary.splitlines()[0] == "text: tokens"
    assert feed.fingerprint is not None
    other = StreamFeed(dict(reversed(feed.streams.items())), Interleaving((1, 1)))
    assert other.fingerprint != feed.fingerprint


def test_an_evaluation_takes_every_row_of_every_stream_once_or_the_first_of_each() -> None:
    streams = {"text": Feed.for_evaluation(TokenRows()), "topic": Feed.for_evaluation(labelled_rows())}
    feed = StreamFeed(streams, SequentialSampler([23, 11]))
    whole = rows_of(feed.batch(0, feed.num_sequences))
    assert [row[0] for row in whole["text"]] == list(range(23))
    assert [row[0] for row in whole["topic"]] == list(range(11))
    first = feed.first(4)
    assert first.num_sequences == 8
    parts = rows_of(first.batch(0, 8))
    assert {name: [row[0] for row in rows] for name, rows in parts.items()} == {
        name: [0, 1, 2, 3] for name in NAMES
    }
    assert feed.first(20).num_sequences == 31


def test_dropout_draws_other_numbers_in_each_stream_whichever_streams_a_step_has() -> None:
    ids = torch.zeros(3, 2, dtype=torch.int64)
    numbers = torch.arange(3)
    rows = Batch(input_ids=ids, targets={}, num_targets={}, sequence_numbers=numbers)
    both = MixedBatch({"text": rows, "topic": rows}).for_step(7)
    keys = {name: batch.dropout_keys for name, batch in both.streams.items()}
    alone = MixedBatch({"topic": rows}).for_step(7).streams["topic"].dropout_keys
    assert keys["topic"] is not None
    assert alone is not None
    assert torch.equal(keys["topic"], alone)
    assert not torch.equal(keys["text"], keys["topic"])


def streams_config(**changes: Any) -> dict[str, Any]:
    tokens = {"type": "tokens", "sources": [{"path": "nothing"}]}
    return {"streams": {"a": {"data": tokens}, "b": {"data": tokens, "share": 2.0}}, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"streams": {}}, "must have 1 item or more"),
        ({"streams": {"A b": {"data": {"type": "tokens", "sources": [{"path": "x"}]}}}}, "pattern"),
        ({"streams": {"a": {"data": {"type": "streams", "streams": {}}}}}, "streams"),
    ],
)
def test_bad_streams_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(StreamsConfig, streams_config(**changes))


@pytest.mark.parametrize("share", [0.0, -1.0, float("nan"), float("inf")])
def test_a_share_is_a_number_above_0(share: float) -> None:
    raw = streams_config()
    raw["streams"]["b"]["share"] = share
    with pytest.raises(ConfigError, match="share"):
        parse(StreamsConfig, raw)


def test_shares_with_a_huge_period_are_refused_with_a_remedy() -> None:
    raw = streams_config()
    raw["streams"]["b"]["share"] = 0.123456789
    with pytest.raises(ConfigError, match="round"):
        parse(StreamsConfig, raw)


def test_the_problems_of_all_streams_are_told_at_once(tmp_path: Path) -> None:
    labelled = {"type": "labelled", "path": str(tmp_path / "none.jsonl")}
    tokens = {"type": "tokens", "sources": [{"path": "nothing"}, {"path": "nowhere"}]}
    raw = {"streams": {"a": {"data": tokens}, "c": {"data": labelled}}}
    config: StreamsConfig = parse(StreamsConfig, raw)
    context = DataContext(seq_len=4, vocab_size=9, encode=lambda _: [1], tokenizer_fingerprint="x")
    with pytest.raises(DataError) as raised:
        config.build(context)
    assert all(name in str(raised.value) for name in ("nothing", "nowhere", "none.jsonl"))


def test_labels_of_a_stream_get_the_ids_that_its_classifier_was_trained_with(tmp_path: Path) -> None:
    """As in a resume and an evaluation: `context.label_names` has those of each stream."""
    for name, labels in (("one", "ba"), ("two", "yx")):
        lines = [f'{{"text": "t", "label": "{label}"}}' for label in labels]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    raw = {
        "streams": {
            name: {"data": {"type": "labelled", "path": str(tmp_path / f"{name}.jsonl"), "shuffle": False}}
            for name in ("one", "two")
        }
    }
    config: StreamsConfig = parse(StreamsConfig, raw)
    context = DataContext(
        seq_len=4,
        vocab_size=9,
        encode=lambda _: [1],
        tokenizer_fingerprint="x",
        label_names={"one": ("c", "b", "a"), "two": ("x", "y")},
    )
    for feed in (config.build_for_evaluation(context), config.build(context)):
        assert feed.label_names == {"one": ("c", "b", "a"), "two": ("x", "y")}
    batch = config.build_for_evaluation(context).batch(0, 4)
    found = {name: stream.targets["label"].tolist() for name, stream in batch.streams.items()}
    assert found == {"one": [1, 2], "two": [1, 0]}
