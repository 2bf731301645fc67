"""Sentences in memory, encoded, with labels of their words: the rows that `TokenLabelsConfig` builds."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from distft.data.batch import Batch, RaggedArray
from distft.data.dataset import ClassNames
from distft.data.sampler import Indices
from distft.data.sentences import Sentence
from distft.data.targets import IGNORE_INDEX, TOKEN_LABEL

_MAX_SHOWN = 20  # labels in a description


class TokenLabelRows:
    """One sentence per row. Batches are padded on the right to their longest row.

    A word's class is the target at its first token; the word's other tokens have none.
    """

    def __init__(self, rows: RaggedArray, *, pad_id: int = 0, summary: str = "token labels") -> None:
        """Each of `rows` has the tokens of a sentence, and behind them as many targets."""
        values, offsets = rows.arrays()["values"], rows.arrays()["offsets"]
        halves = np.repeat(np.tile([True, False], len(rows)), np.repeat(np.diff(offsets) // 2, 2))
        self._tokens = RaggedArray.of_arrays(values[halves], offsets // 2)
        self._labels = RaggedArray.of_arrays(values[~halves], offsets // 2)
        self._pad_id = pad_id
        self.num_sequences = len(rows)
        self.summary = summary
        self.fingerprint = rows.fingerprint

    def batch(self, indices: Indices) -> Batch:
        """Rows `indices`; for empty `indices`, row 0 without targets."""
        if not len(indices):
            return self.batch(np.zeros(1, np.int64)).without_targets()
        labels = torch.from_numpy(self._labels.padded(indices, IGNORE_INDEX))
        return Batch(
            input_ids=torch.from_numpy(self._tokens.padded(indices, self._pad_id)),
            targets={TOKEN_LABEL: labels},
            num_targets={TOKEN_LABEL: int((labels != IGNORE_INDEX).sum())},
            lengths=torch.from_numpy(self._tokens.lengths(indices)),
        )


def describe(
    path: str, sentences: Sequence[Sentence], names: ClassNames | None, *, num_cut: int, seq_len: int
) -> str:
    """Lines about sentences before training: how many words and labels, and how many words do not fit."""
    num_words = sum(len(sentence.words) for sentence in sentences)
    what = "unlabelled" if names is None else f"{len(names):,} labels"
    lines = [
        f"{len(sentences):,} sentences, {num_words:,} words, {what}, {num_cut:,} cut to seq_len={seq_len}"
    ]
    if names is not None:
        counts = Counter(label for sentence in sentences for label in sentence.labels)
        shown = ", ".join(f"{name!r} {count:,}" for name, count in counts.most_common(_MAX_SHOWN))
        more = f", and {len(counts) - _MAX_SHOWN:,} more" if len(counts) > _MAX_SHOWN else ""
        lines.append(f"labels of words: {shown}{more}")
    return "\n".join(f"{path}: {line}" for line in lines)
