"""Rows with one more target, such as what a reference model finds of each."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from distft.data.batch import Batch
from distft.data.sampler import Indices

if TYPE_CHECKING:
    from distft.data.dataset import SequenceDataset


class RowsWithTarget:
    """The rows of a dataset, whose batches have a further target [B] that does not count."""

    def __init__(self, rows: SequenceDataset, name: str, values: NDArray[np.float32]) -> None:
        """`values` [sequences, rows of each]."""
        self._rows = rows
        self._name = name
        self._values = values
        self.num_sequences = rows.num_sequences
        self.summary = rows.summary
        self.fingerprint = rows.fingerprint

    def batch(self, indices: Indices) -> Batch:
        batch = self._rows.batch(indices)
        values = self._values[indices if len(indices) else np.zeros(1, np.int64)]
        target = torch.from_numpy(values.reshape(-1))
        batch = replace(batch, targets={**batch.targets, self._name: target})
        return batch if len(indices) else batch.without_targets()
