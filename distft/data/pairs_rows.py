"""Texts that belong together in memory, encoded: the rows that `PairsConfig` builds."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from xxhash import xxh3_64_hexdigest, xxh3_64_intdigest

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
        num_distinct: Sequence[int] = (),
        summary: str = "pairs",
    ) -> None:
        self._rows = rows
        self._rows_per_sequence = rows_per_sequence
        self._scores = scores
        self._pad_id = pad_id
        self.num_distinct = num_distinct  # as `num_distinct_texts`
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


def num_distinct_texts(rows: RaggedArray, num_columns: int) -> list[int]:
    """How many of each column's texts differ, as they are encoded and cut; last, of all but the first.

    `rows` are the texts of sequences, one sequence after another. With one column both numbers are its own.
    """
    values, offsets = rows.arrays()["values"], rows.arrays()["offsets"]
    bounds = zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    hashes = [xxh3_64_intdigest(values[start:stop].data) for start, stop in bounds]
    by_column = np.array(hashes, np.uint64).reshape(-1, num_columns)
    candidates = by_column[:, min(1, num_columns - 1) :]
    return [len(np.unique(of_texts)) for of_texts in (*by_column.T, candidates)]


def without_negatives(num_distinct: Sequence[int], columns: Sequence[str], num_sequences: int) -> str | None:
    """Why no text of contrastive training data has another's as a negative; None if that is not so.

    A text's negatives are other sequences' texts after the first, and its own hard ones. Equal texts are
    none of each other's, and neither are the positives of equal texts. Of one row nothing is said.
    """
    if num_sequences < 2:
        return None
    equal = [name for name, number in zip(columns[:2], num_distinct, strict=False) if number < 2]
    if not equal or (len(columns) > 2 and num_distinct[-1] > 1):
        return None
    return (
        f"all {num_sequences:,} texts of {equal[0]!r} are equal as far as they are read, so no text is "
        "another's negative and nothing can be learnt: take texts that differ."
    )


def describe(
    path: str,
    columns: Sequence[str],
    lengths: Sequence[int],
    *,
    num_distinct: Sequence[int],
    num_left_out: int,
    seq_len: int,
) -> str:
    """A line about the texts of each column before training; `lengths` are in tokens, row by row."""
    by_column = np.asarray(lengths).reshape(-1, len(columns))
    left_out = f", {num_left_out:,} of a low score left out" if num_left_out else ""
    lines = [f"{len(by_column):,} rows of {len(columns)} texts each{left_out}"]
    for column, of_column, num_own in zip(columns, by_column.T, num_distinct, strict=False):
        median, most = np.quantile(of_column, [0.5, 0.95], method="higher")
        equal = (
            f"; {1 - num_own / len(by_column):.0%} equal an earlier one" if num_own < len(by_column) else ""
        )
        num_cut = int(np.count_nonzero(of_column > seq_len))
        lines.append(
            f"tokens of {column!r}: median {median:,}, 95 % at most {most:,}, longest {of_column.max():,}; "
            f"{num_cut:,} cut to seq_len={seq_len}{equal}"
        )
    return "\n".join(f"{path}: {line}" for line in lines)
