"""Batches of random tokens for the training benchmark: plain rows, and rows packed with documents."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from distft.data.batch import Batch
from distft.data.packing import PackedRows
from distft.data.targets import NEXT_TOKEN
from distft.model.transformer_config import TransformerConfig


def make_batches(model: TransformerConfig, rows: int, seq_len: int, device: torch.device) -> list[Batch]:
    """Batches of random tokens; several, so that no implementation can cache one between steps."""
    assert model.vocab_size is not None
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(4):
        ids = torch.randint(0, model.vocab_size, (rows, seq_len + 1), generator=generator)
        batch = Batch(
            input_ids=ids[:, :-1],
            targets={NEXT_TOKEN: ids[:, 1:]},
            num_targets={NEXT_TOKEN: rows * seq_len},
        )
        batches.append(batch.to(device))
    return batches


@dataclass(frozen=True)
class RandomDocuments:
    """A `TokenStream` of random tokens in documents of 1 to twice `mean_length` tokens."""

    num_tokens: int
    vocab_size: int
    mean_length: int
    fingerprint: str | None = None

    @cached_property
    def document_starts(self) -> NDArray[np.int64]:
        lengths = np.random.default_rng(0).integers(1, 2 * self.mean_length, self.num_tokens)
        starts = np.cumsum(lengths) - lengths
        return starts[starts < self.num_tokens]

    def read_rows(self, starts: NDArray[np.int64], out: NDArray[np.int64]) -> None:
        for row, start in zip(out, starts.tolist(), strict=True):
            row[:] = np.random.default_rng(start).integers(0, self.vocab_size, len(row))


def make_packed_batches(
    model: TransformerConfig, rows: int, seq_len: int, device: torch.device
) -> list[Batch]:
    """Batches as a run gets them: rows packed with documents that do not see each other."""
    assert model.vocab_size is not None
    documents = RandomDocuments(4 * rows * seq_len + 1, model.vocab_size, mean_length=seq_len)
    packed = PackedRows(documents, seq_len)
    return [packed.batch(np.arange(rows) + start).to(device) for start in range(0, 4 * rows, rows)]
