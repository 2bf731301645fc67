"""Texts that belong together in memory, encoded: the rows that `PairsConfig` builds."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from xxhash import xxh3_64_hexdigest

from distft.data.batch import Batch, RaggedArray
from distft.data.sampler import Indices
from distft.data.targets import IGNORE_INDEX, PAIR, SCORE

SCORES = "scores"  # a column of encoded rows: float64, seen as int64


class PairRows:
    """Sequences of `rows_per_sequence` texts, encoded once and kept in memory.

    A sequence's rows are its text, the positive and the negatives, one after another. Batches are padded on
    the right to their longest row. The targets are `pair` [B], 0 at the first row of each sequence, and with
    scores `score` [B], float64, at each of its rows.
    """

    def __init__(
        self,
        rows: RaggedArray,
        rows_per_sequence: int,
        *,
        scores: NDArray[np.float64] | None = None,
        pad_id: int = 0,
        summary: str = "pairs",
    ) -> None:
        self._rows = rows
        self._rows_per_sequence = rows_per_sequence
        self._scores = scores
        self._pad_id = pad_id
        self.num_sequences = len(rows) // rows_per_sequence
        self.summary = summary
        of_scores = "" if scores is None else f"-{xxh3_64_hexdigest(scores.tobytes())}"
        self.fingerprint = f"{rows.fingerprint}-{rows_per_sequence}{of_scores}"

    def batch(self, indices: Indices) -> Batch:
        """The rows of the sequences `indices`; for empty `indices`, those of sequence 0 without targets."""
        sequences = indices if len(indices) else np.zeros(1, np.int64)
        per_sequence = self._rows_per_sequence
        rows = (sequences[:, None] * per_sequence + np.arange(per_sequence)).reshape(-1)
        pair = np.full(len(rows), IGNORE_INDEX, np.int64)
        pair[::per_sequence] = 0
        targets = {PAIR: torch.from_numpy(pair)}
        if self._scores is not None:
            targets[SCORE] = torch.from_numpy(self._scores[rows])
        batch = Batch(
            input_ids=torch.from_numpy(self._rows.padded(rows, self._pad_id)),
            targets=targets,
            num_targets={PAIR: len(sequences)},
            rows_per_sequence=per_sequence,
            lengths=torch.from_numpy(self._rows.lengths(rows)),
        )
        return batch if len(indices) else batch.without_targets()


def describe(
    path: str, columns: Sequence[str], lengths: Sequence[int], *, num_left_out: int, seq_len: int
) -> str:
    """A line about the texts of each column before training; `lengths` are in tokens, row by row."""
    by_column = np.asarray(lengths).reshape(-1, len(columns))
    left_out = f", {num_left_out:,} of a low score left out" if num_left_out else ""
    lines = [f"{len(by_column):,} rows of {len(columns)} texts each{left_out}"]
    for column, of_column in zip(columns, by_column.T, strict=True):
        median, most = np.quantile(of_column, [0.5, 0.95], method="higher")
        num_cut = int(np.count_nonzero(of_column > seq_len))
        lines.append(
            f"tokens of {column!r}: median {median:,}, 95 % at most {most:,}, longest {of_column.max():,}; "
            f"{num_cut:,} cut to seq_len={seq_len}"
        )
    return "\n".join(f"{path}: {line}" for line in lines)
