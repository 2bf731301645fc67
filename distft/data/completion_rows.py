"""Prompt and completion pairs in memory, encoded: the rows that `CompletionConfig` builds."""

import numpy as np
import torch
from numpy.typing import NDArray
from xxhash import xxh3_64_hexdigest

from distft.data.batch import Batch, RaggedArray, count_target_bytes
from distft.data.sampler import Indices
from distft.data.targets import IGNORE_INDEX, NEXT_TOKEN

PROMPT_LENGTHS = "prompt_lengths"  # a column of encoded rows


class CompletionRows:
    """One prompt and its completion per row, encoded once and kept in memory.

    Batches are padded on the right to their longest row. The label of a position is the next token if that
    belongs to the completion, else `IGNORE_INDEX`.
    """

    def __init__(
        self,
        rows: RaggedArray,
        prompt_lengths: Indices,
        *,
        pad_id: int = 0,
        token_bytes: NDArray[np.int64] | None = None,
        summary: str = "completions",
    ) -> None:
        """`rows`: prompt followed by completion, at least one token of each."""
        self._rows = rows
        self._prompt_lengths = prompt_lengths
        self._pad_id = pad_id
        self._token_bytes = token_bytes
        self.num_sequences = len(rows)
        self.summary = summary
        self.fingerprint = f"{rows.fingerprint}-{xxh3_64_hexdigest(prompt_lengths.tobytes())}"

    def batch(self, indices: Indices) -> Batch:
        """Rows `indices`; for empty `indices`, row 0 without targets."""
        rows = indices if len(indices) else np.zeros(1, np.int64)
        tokens = self._rows.padded(rows, self._pad_id)
        inputs, labels = tokens[:, :-1].copy(), tokens[:, 1:].copy()
        lengths = self._rows.lengths(rows) - 1  # without the last token, which is a label only
        columns = np.arange(labels.shape[1])
        is_target = (columns >= self._prompt_lengths[rows][:, None] - 1) & (columns < lengths[:, None])
        labels[~is_target | (not len(indices))] = IGNORE_INDEX
        inputs[columns >= lengths[:, None]] = self._pad_id  # removes the last token of shorter rows
        return Batch(
            input_ids=torch.from_numpy(inputs),
            targets={NEXT_TOKEN: torch.from_numpy(labels)},
            num_targets={NEXT_TOKEN: int(np.count_nonzero(labels != IGNORE_INDEX))},
            lengths=torch.from_numpy(lengths),
            num_target_bytes=count_target_bytes(labels, self._token_bytes),
        )
