"""Feeds of random token rows, packed or padded, with a made-up tokenizer of 40 ids, for tests of objectives.

Ids: 0 unknown, 1 bos, 2 eos, 3 pad, 4 the mask token; all from 5 on are text, the even ones begin words.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distft.data.batch import RaggedArray
from distft.data.completion_rows import CompletionRows
from distft.data.dataset import DataContext, DocumentMode, SequenceDataset, TransformContext
from distft.data.feed import Feed
from distft.data.labelled_rows import LabelledRows
from distft.data.packing import PackedRows
from distft.data.pairs_rows import PairRows

VOCAB_SIZE, FIRST_TEXT_ID = 40, 5
UNK, BOS, EOS, PAD, MASK = range(5)


def data_context(seq_len: int, **changes: Any) -> DataContext:
    pieces = changes.pop("pieces", {"<mask>": MASK})
    ids = np.arange(VOCAB_SIZE)
    settings = {
        "seq_len": seq_len,
        "global_batch_size": 8,
        "vocab_size": VOCAB_SIZE,
        "encode": lambda _: [],
        "tokenizer_fingerprint": "",
        "bos_id": BOS,
        "eos_id": EOS,
        "pad_id": PAD,
        "unk_id": UNK,
        "piece_id": pieces.get,
        "token_bytes": np.where(ids < MASK, 0, 3),
        "starts_word": (ids < FIRST_TEXT_ID) | (ids % 2 == 0),
        **changes,
    }
    return DataContext(**settings)


def documents(
    lengths: Sequence[int], seed: int = 0, *, bos: bool = False, eos: bool = True
) -> list[list[int]]:
    """Documents of so many random text ids, with a bos before and an eos behind."""
    random = np.random.default_rng(seed)
    return [
        [BOS] * bos + random.integers(FIRST_TEXT_ID, VOCAB_SIZE, length).tolist() + [EOS] * eos
        for length in lengths
    ]


def packed(texts: Sequence[list[int]], seq_len: int, mode: DocumentMode = "separate") -> PackedRows:
    return PackedRows(_Stream(texts), seq_len, documents=mode, token_bytes=data_context(seq_len).token_bytes)


def padded(texts: Sequence[list[int]]) -> LabelledRows:
    return LabelledRows(RaggedArray(texts), np.zeros(len(texts), np.int64), pad_id=PAD)


def completions(texts: Sequence[list[int]], prompt_length: int) -> CompletionRows:
    return CompletionRows(RaggedArray(texts), np.full(len(texts), prompt_length), pad_id=PAD)


def text_pairs(texts: Sequence[list[int]]) -> PairRows:
    return PairRows(RaggedArray(texts), rows_per_sequence=2, pad_id=PAD)


def feed(rows: SequenceDataset) -> Feed:
    return Feed.for_training(rows, seed=3, shuffle=True)


def transform_context(feed: Feed, context: DataContext, seed: int = 7) -> TransformContext:
    return TransformContext(data=context, seed=seed, num_sequences=feed.num_sequences, rows=feed.rows)


class _Stream:
    """A `TokenStream` in memory: documents, one after another."""

    fingerprint = None

    def __init__(self, documents: Sequence[Sequence[int]]) -> None:
        self._tokens = np.concatenate([np.array(document, np.int64) for document in documents])
        self.num_tokens = len(self._tokens)
        self.document_starts = np.cumsum([0, *map(len, documents[:-1])])

    def read_rows(self, starts: NDArray[np.int64], out: NDArray[np.int64]) -> None:
        for row, start in zip(out, starts.tolist(), strict=True):
            row[:] = self._tokens[start : start + len(row)]
