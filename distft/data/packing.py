"""Rows of equal length cut from a stream of tokens."""

from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from distft.data.batch import IGNORE_INDEX, Batch
from distft.data.dataset import counted_bytes
from distft.data.order import Indices
from distft.errors import DataError

Documents = Literal["separate", "joined"]


class TokenStream(Protocol):
    """Documents of tokens, one behind the other, as in a set of token shards."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def document_starts(self) -> NDArray[np.int64]:
        """Ascending positions at which documents begin."""

    def tokens(self, start: int, stop: int) -> NDArray[np.generic]:
        """Ids [start, stop), in whatever integer type they are kept."""


class PackedRows:
    """Row `j` reads tokens [j*T, j*T + T] of a stream: T inputs, and for each the token after it.

    "separate" keeps documents apart: attention stays within one (`document_ids` count 0, 1, 2 ... in a row),
    positions restart with each, and no token has to predict the first of the next document. "joined" is the
    plain stream.
    """

    def __init__(
        self,
        stream: TokenStream,
        seq_len: int,
        *,
        documents: Documents = "separate",
        token_bytes: NDArray[np.int64] | None = None,
        name: str = "tokens",
    ) -> None:
        """Raises `DataError` where the stream does not fill one row."""
        self._stream = stream
        self._starts = np.asarray(stream.document_starts)  # a memory map is slow to index as such
        self._seq_len = seq_len
        self._documents = documents
        self._token_bytes = token_bytes
        self._name = name
        self.num_sequences = (stream.num_tokens - 1) // seq_len
        if self.num_sequences < 1:
            raise DataError(
                f"{name} holds {stream.num_tokens:,} tokens, and one row takes {seq_len + 1:,} "
                f"(seq_len={seq_len} and the token after it): add text, or lower seq_len."
            )

    @property
    def summary(self) -> str:
        left = self._stream.num_tokens - self.num_sequences * self._seq_len - 1
        return (
            f"{self._name}: {self._stream.num_tokens:,} tokens in {self.num_sequences:,} rows of "
            f"{self._seq_len}, {left:,} left over at the end"
        )

    def batch(self, indices: Indices) -> Batch:
        """Rows `indices`; without any, row 0 with nothing that counts."""
        rows = indices if len(indices) else np.zeros(1, np.int64)
        begins = rows * self._seq_len
        tokens = np.empty((len(rows), self._seq_len + 1), np.int64)
        for row, begin in zip(tokens, begins.tolist(), strict=True):
            row[:] = self._stream.tokens(begin, begin + self._seq_len + 1)
        inputs, labels = tokens[:, :-1].copy(), tokens[:, 1:].copy()
        position_ids = document_ids = None
        if self._documents == "separate":
            is_start = self._document_starts(begins)
            labels[is_start[:, 1:]] = IGNORE_INDEX
            position_ids, document_ids = restarts(is_start[:, :-1])
        if not len(indices):
            labels[:] = IGNORE_INDEX
        return Batch(
            input_ids=torch.from_numpy(inputs),
            labels=torch.from_numpy(labels),
            num_target_tokens=int(np.count_nonzero(labels != IGNORE_INDEX)),
            position_ids=None if position_ids is None else torch.from_numpy(position_ids),
            document_ids=None if document_ids is None else torch.from_numpy(document_ids),
            num_target_bytes=counted_bytes(labels, self._token_bytes),
        )

    def _document_starts(self, begins: Indices) -> NDArray[np.bool_]:
        """[B, T + 1]: whether a document begins at each token that the rows from `begins` read."""
        is_start = np.zeros((len(begins), self._seq_len + 1), np.bool_)
        lower = np.searchsorted(self._starts, begins, side="left")
        upper = np.searchsorted(self._starts, begins + self._seq_len, side="right")
        for row, begin, first, last in zip(is_start, begins, lower, upper, strict=True):
            row[self._starts[first:last] - begin] = True
        return is_start


def restarts(is_start: NDArray[np.bool_]) -> tuple[Indices, Indices]:
    """Position in its document and number of its document for each token of rows [B, T].

    A row begins at position 0 of document 0, whether or not a document begins there.
    """
    columns = np.arange(is_start.shape[1], dtype=np.int64)
    latest = np.maximum.accumulate(np.where(is_start, columns, 0), axis=1)
    later = is_start.copy()
    later[:, 0] = False
    return columns - latest, np.cumsum(later, axis=1, dtype=np.int64)
