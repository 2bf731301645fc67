from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distft.data.packing import PackedRows
from distft.data.shard_layout import ShardLayout
from distft.data.shard_writer import ShardWriter
from distft.data.shards import TokenShards
from distft.data.targets import IGNORE_INDEX, NEXT_TOKEN
from distft.errors import DataError

VOCAB_SIZE = 300


class Stream:
    """An in-memory `TokenStream`."""

    def __init__(self, document_lengths: list[int]) -> None:
        self.num_tokens = sum(document_lengths)
        self.document_starts = np.cumsum([0, *document_lengths[:-1]])
        self._tokens = np.random.default_rng(self.num_tokens).integers(0, VOCAB_SIZE, self.num_tokens)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        assert 0 <= start < stop <= self.num_tokens
        return self._tokens[start:stop].astype(np.uint16)

    def read_rows(self, starts: np.ndarray, out: np.ndarray) -> None:
        for row, start in zip(out, starts.tolist(), strict=True):
            row[:] = self.tokens(start, start + len(row))


def expected_row(stream: Stream, row: int, seq_len: int) -> list[tuple[int, int, int, int]]:
    """(input, label, position, document) of each token of a row, computed token by token."""
    begin = row * seq_len
    tokens = stream.tokens(0, stream.num_tokens).tolist()
    starts = set(np.asarray(stream.document_starts).tolist())
    found, position, document = [], 0, 0
    for place in range(begin, begin + seq_len):
        if place in starts and place > begin:
            position, document = 0, document + 1
        label = IGNORE_INDEX if place + 1 in starts else tokens[place + 1]
        found.append((tokens[place], label, position, document))
        position += 1
    return found


@given(
    document_lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    seq_len=st.integers(1, 30),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_separate_documents_match_a_token_by_token_reference(
    document_lengths: list[int], seq_len: int, data: st.DataObject
) -> None:
    num_sequences = (sum(document_lengths) - 1) // seq_len
    if num_sequences < 1:
        return
    stream = Stream(document_lengths)
    rows = PackedRows(stream, seq_len)
    assert rows.num_sequences == num_sequences
    indices = np.array(data.draw(st.lists(st.integers(0, num_sequences - 1), min_size=1, max_size=6)))
    batch = rows.batch(indices)
    for i, row in enumerate(indices.tolist()):
        columns = (
            batch.input_ids[i],
            batch.targets[NEXT_TOKEN][i],
            batch.position_ids[i],
            batch.document_ids[i],
        )
        found = list(zip(*(column.tolist() for column in columns), strict=True))
        assert found == expected_row(stream, row, seq_len)
    assert batch.num_targets[NEXT_TOKEN] == int((batch.targets[NEXT_TOKEN] != IGNORE_INDEX).sum())


def test_joined_documents_are_rows_of_the_plain_stream() -> None:
    stream = Stream([10, 20, 71])
    batch = PackedRows(stream, 20, documents="joined").batch(np.array([3, 0]))
    assert batch.position_ids is None
    assert batch.document_ids is None
    for i, begin in enumerate((60, 0)):
        assert batch.input_ids[i].tolist() == stream.tokens(begin, begin + 20).tolist()
        assert batch.targets[NEXT_TOKEN][i].tolist() == stream.tokens(begin + 1, begin + 21).tolist()
    assert batch.num_targets[NEXT_TOKEN] == 40
    assert batch.input_ids.dtype == batch.targets[NEXT_TOKEN].dtype == torch.int64


def test_with_joined_documents_every_token_but_the_first_is_a_target_once() -> None:
    stream = Stream([50, 51])
    rows = PackedRows(stream, 10, documents="joined")
    labels = rows.batch(np.arange(rows.num_sequences)).targets[NEXT_TOKEN]
    assert labels.flatten().tolist() == stream.tokens(1, 101).tolist()


@pytest.mark.parametrize("documents", ["separate", "joined"])
def test_a_batch_without_rows_is_one_row_without_targets(documents) -> None:
    stream = Stream([10, 20])
    rows = PackedRows(stream, 8, documents=documents, token_bytes=np.ones(VOCAB_SIZE, np.int64))
    full, empty = rows.batch(np.array([0])), rows.batch(np.array([], np.int64))
    assert empty.input_ids.shape == (1, 8)
    assert (empty.targets[NEXT_TOKEN] == IGNORE_INDEX).all()
    assert empty.num_targets[NEXT_TOKEN] == empty.num_target_bytes == 0
    for name in ("position_ids", "document_ids"):
        assert (getattr(empty, name) is None) == (getattr(full, name) is None)


@given(document_lengths=st.lists(st.integers(1, 30), min_size=2, max_size=6))
@settings(max_examples=20, deadline=None)
def test_num_target_bytes_is_the_sum_over_target_tokens(document_lengths: list[int]) -> None:
    if sum(document_lengths) < 6:
        return
    token_bytes = np.random.default_rng(1).integers(0, 9, VOCAB_SIZE)
    rows = PackedRows(Stream(document_lengths), 5, token_bytes=token_bytes)
    batch = rows.batch(np.arange(rows.num_sequences))
    targets = [label for label in batch.targets[NEXT_TOKEN].flatten().tolist() if label != IGNORE_INDEX]
    assert batch.num_target_bytes == sum(int(token_bytes[label]) for label in targets)


def test_too_few_tokens_for_one_row_is_an_error() -> None:
    with pytest.raises(DataError, match=r"corpus has 12 tokens.*takes 13 .*seq_len=12"):
        PackedRows(Stream([5, 7]), 12, name="corpus")


def test_shards_on_disk_and_tokens_in_memory_give_the_same_rows(tmp_path: Path) -> None:
    stream = Stream([5, 1, 30, 64])
    layout = ShardLayout(vocab_size=VOCAB_SIZE, tokenizer_fingerprint="a", shard_tokens=37)
    writer = ShardWriter(tmp_path, layout)
    writer.append(stream.tokens(0, 100), stream.document_starts, 100)
    writer.commit()
    indices = np.array([8, 0, 3, 4, 5])
    on_disk, in_memory = (PackedRows(s, 11).batch(indices) for s in (TokenShards.open(tmp_path), stream))
    assert torch.equal(on_disk.targets[NEXT_TOKEN], in_memory.targets[NEXT_TOKEN])
    for name in ("input_ids", "position_ids", "document_ids"):
        assert torch.equal(getattr(on_disk, name), getattr(in_memory, name))
