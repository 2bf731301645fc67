"""Marks a prefix of each document, whose tokens attend to one another, for prefix language models."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from distft.data.batch import Batch, count_target_bytes
from distft.data.documents import documents
from distft.data.targets import IGNORE_INDEX, NEXT_TOKEN
from distft.keyed_random import uniform

_SITE = 0x5052_4600  # of the prefixes' lengths


@dataclass(frozen=True, kw_only=True)
class PrefixMarker:
    """A transform of batches: sets `is_prefix`, and keeps the targets behind the prefix alone.

    A prefix of n tokens leaves n - 1 positions without a target: the last one predicts what follows. Its
    share of a document is uniform between the two shares, or it is the prompt: all up to the first target.
    """

    seed: int
    min_share: float
    max_share: float
    is_prompt: bool
    token_bytes: NDArray[np.int64] | None

    def __call__(self, batch: Batch) -> Batch:
        labels = batch.targets[NEXT_TOKEN].numpy().copy()
        is_prefix = np.zeros(labels.shape, np.bool_)
        drawn = uniform(batch.row_keys(self.seed), labels.shape[1], _SITE).numpy()
        shares = self.min_share + (self.max_share - self.min_share) * drawn
        for row, start, stop in documents(batch):
            has_target = np.flatnonzero(labels[row, start:stop] != IGNORE_INDEX)
            if not len(has_target):
                continue
            first, last = int(has_target[0]), int(has_target[-1])
            size = first + 1 if self.is_prompt else int(shares[row, start] * (stop - start))
            size = min(size, last + 1)  # one target is left
            is_prefix[row, start : start + size] = True
            labels[row, start : start + max(size - 1, 0)] = IGNORE_INDEX
        return replace(
            batch,
            is_prefix=torch.from_numpy(is_prefix),
            targets={NEXT_TOKEN: torch.from_numpy(labels)},
            num_targets={NEXT_TOKEN: int(np.count_nonzero(labels != IGNORE_INDEX))},
            num_target_bytes=count_target_bytes(labels, self.token_bytes),
        )
