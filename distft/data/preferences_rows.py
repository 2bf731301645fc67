"""Preferences in memory, encoded: the rows that `PreferencesConfig` builds."""

from dataclasses import replace

import numpy as np
import torch

from distft.data.batch import Batch, RaggedArray
from distft.data.completion_rows import PROMPT_LENGTHS, CompletionRows
from distft.data.sampler import Indices
from distft.data.targets import ANSWER, IGNORE_INDEX, NEXT_TOKEN, PREFERENCE

__all__ = ["PROMPT_LENGTHS", "PreferenceRows"]


class PreferenceRows:
    """Pairs of a prompt's answers, encoded once and kept in memory: two rows each, the better one first.

    Batches are padded on the right to their longest row. The targets are `answer` [2B, T], the answers'
    tokens, and `preference` [2B], 0 at the first row of each pair. There are no `next_token`: a worse answer
    is nothing to learn.
    """

    def __init__(
        self, rows: RaggedArray, prompt_lengths: Indices, *, pad_id: int = 0, summary: str = "preferences"
    ) -> None:
        """`rows`: a prompt followed by an answer, at least one token of each."""
        self._answers = CompletionRows(rows, prompt_lengths, pad_id=pad_id)
        self.num_sequences = len(rows) // 2
        self.summary = summary
        self.fingerprint = f"{self._answers.fingerprint}-2"

    def batch(self, indices: Indices) -> Batch:
        """The rows of the pairs `indices`; for empty `indices`, those of pair 0 without targets."""
        pairs = indices if len(indices) else np.zeros(1, np.int64)
        batch = self._answers.batch((pairs[:, None] * 2 + np.arange(2)).reshape(-1))
        preference = np.full(2 * len(pairs), IGNORE_INDEX, np.int64)
        preference[::2] = 0
        batch = replace(
            batch,
            targets={ANSWER: batch.targets[NEXT_TOKEN], PREFERENCE: torch.from_numpy(preference)},
            num_targets={ANSWER: batch.num_targets[NEXT_TOKEN], PREFERENCE: len(pairs)},
            rows_per_sequence=2,
        )
        return batch if len(indices) else batch.without_targets()
