"""Packs a token stream into rows of equal length, within or across document boundaries."""

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from distft.data.batch import Batch, count_target_bytes
from distft.data.dataset import DocumentMode
from distft.data.sampler import Indices
from distft.data.targets import IGNORE_INDEX, NEXT_TOKEN
from distft.errors import DataError


class TokenStream(Protocol):
    """Tokenized documents, concatenated, as in a directory of token shards."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def fingerprint(self) -> str | None: ...

    @property
    def document_starts(self) -> NDArray[np.int64]:
        """Ascending positions of the first token of each document."""

    def read_rows(self, starts: Indices, out: NDArray[np.int64]) -> None:
        """Fill row i of `out` with the ids from position `starts[i]` on."""


class PackedRows:
    """Row `j` reads tokens [j*T, j*T + T] of a stream: T inputs and, for each, the next token as label.

    "separate": attention stays within a document (`document_ids` count 0, 1, 2 ... in each row), positions
    restart with each document, and the first token of a document is never a label. "joined": no document
    boundaries.
    """

    def __init__(
        self,
        stream: TokenStream,
        seq_len: int,
        *,
        documents: DocumentMode = "separate",
        token_bytes: NDArray[np.int64] | None = None,
        name: str = "tokens",
    ) -> None:
        """Raises `DataError` if the stream is shorter than one row."""
        self._stream = stream
        self._seq_len = seq_len
        self._document_mode = documents
        self._token_bytes = token_bytes
        self._name = name
        self.num_sequences = (stream.num_tokens - 1) // seq_len
        if self.num_sequences < 1:
            raise DataError(
                f"{name} has {stream.num_tokens:,} tokens, but one row takes {seq_len + 1:,} "
                f"(seq_len={seq_len} and the next token): add text, or lower seq_len."
            )

    @property
    def fingerprint(self) -> str | None:
        return self._stream.fingerprint

    def document_start(self, bos_id: int | None, eos_id: int | None) -> tuple[int, ...]:
        """The ids before the text of a document, as the model sees it: bos, the eos of another, or none."""
        ends = np.empty(
            (2, 1), np.int64
        )  # of the stream, whose first document begins and last one ends there
        self._stream.read_rows(np.array([0, self._stream.num_tokens - 1]), ends)
        first, last = ends[:, 0].tolist()
        if bos_id is not None and first == bos_id:
            return (bos_id,)
        if self._document_mode == "joined" and eos_id is not None and last == eos_id:
            return (eos_id,)
        return ()

    @property
    def summary(self) -> str:
        num_unused = self._stream.num_tokens - self.num_sequences * self._seq_len - 1
        return (
            f"{self._name}: {self._stream.num_tokens:,} tokens in {self.num_sequences:,} rows of "
            f"{self._seq_len}, {num_unused:,} left over at the end"
        )

    def batch(self, indices: Indices) -> Batch:
        """Rows `indices`; for empty `indices`, row 0 without targets."""
        rows = indices if len(indices) else np.zeros(1, np.int64)
        starts = rows * self._seq_len
        tokens = np.empty((len(rows), self._seq_len + 1), np.int64)
        self._stream.read_rows(starts, tokens)
        inputs, labels = tokens[:, :-1].copy(), tokens[:, 1:].copy()
        position_ids = document_ids = None
        if self._document_mode == "separate":
            is_start = self._is_document_start(starts)
            labels[is_start[:, 1:]] = IGNORE_INDEX
            position_ids, document_ids = position_and_document_ids(is_start[:, :-1])
        if not len(indices):
            labels[:] = IGNORE_INDEX
        return Batch(
            input_ids=torch.from_numpy(inputs),
            targets={NEXT_TOKEN: torch.from_numpy(labels)},
            num_targets={NEXT_TOKEN: int(np.count_nonzero(labels != IGNORE_INDEX))},
            position_ids=None if position_ids is None else torch.from_numpy(position_ids),
            document_ids=None if document_ids is None else torch.from_numpy(document_ids),
            num_target_bytes=count_target_bytes(labels, self._token_bytes),
        )

    def _is_document_start(self, row_starts: Indices) -> NDArray[np.bool_]:
        """[B, T + 1]: whether each token of the rows that begin at `row_starts` begins a document."""
        is_start = np.zeros((len(row_starts), self._seq_len + 1), np.bool_)
        document_starts = self._stream.document_starts
        lower = np.searchsorted(document_starts, row_starts, side="left")
        upper = np.searchsorted(document_starts, row_starts + self._seq_len, side="right")
        for row, row_start, first, last in zip(is_start, row_starts, lower, upper, strict=True):
            row[document_starts[first:last] - row_start] = True
        return is_start


def position_and_document_ids(is_start: NDArray[np.bool_]) -> tuple[Indices, Indices]:
    """Position within its document, and document id within its row, of each token of rows [B, T].

    A row begins at position 0 of document 0 even in the middle of a document.
    """
    columns = np.arange(is_start.shape[1], dtype=np.int64)
    latest_start = np.maximum.accumulate(np.where(is_start, columns, 0), axis=1)
    is_later_start = is_start.copy()
    is_later_start[:, 0] = False
    return columns - latest_start, np.cumsum(is_later_start, axis=1, dtype=np.int64)
