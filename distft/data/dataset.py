"""What every source of training rows offers, and what it has to know of the run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from distft.data.batch import IGNORE_INDEX, Batch
from distft.data.order import Indices
from distft.errors import DataError

Encode = Callable[[str], list[int]]


@dataclass(frozen=True, kw_only=True, slots=True)
class DataContext:
    """What data has to know of the rest of a run. Handed down; data asks nobody."""

    seq_len: int
    vocab_size: int  # ids that the model has a row for: its padded vocabulary
    encode: Encode
    tokenizer_fingerprint: str
    eos_id: int | None = None
    pad_id: int | None = None
    token_bytes: NDArray[np.int64] | None = None  # UTF-8 bytes that each id stands for, for bits per byte
    label_names: tuple[str, ...] | None = None  # None: the data's own labels, as in a first training run


class SequenceDataset(Protocol):
    """Rows that can be read in any order, as often as wanted."""

    @property
    def num_sequences(self) -> int:
        """How many rows there are: at least one."""

    @property
    def summary(self) -> str:
        """One line for the log: what was read, and what had to be cut."""

    def batch(self, indices: Indices) -> Batch:
        """The rows of `indices`, in that order.

        Without any, one row of valid tokens in which nothing counts: a rank that has no sequence left
        runs it, so as to take part in what all ranks do together.
        """


def check_vocabulary(name: str, largest_id: int, context: DataContext) -> None:
    """Raise `DataError` where a token of `name` has no row in the model's vocabulary."""
    if largest_id >= context.vocab_size:
        raise DataError(
            f"{name} contains token id {largest_id}, and the model's vocabulary has the ids 0 to "
            f"{context.vocab_size - 1}: give the model vocab_size={largest_id + 1} or more, or encode the "
            f"text with the tokenizer that the model was made for."
        )


def counted_bytes(labels: NDArray[np.int64], token_bytes: NDArray[np.int64] | None) -> int:
    """UTF-8 bytes of the labels that count; 0 where the table is not known."""
    if token_bytes is None:
        return 0
    return int(token_bytes[labels[labels != IGNORE_INDEX]].sum())


def merge(parts: Sequence[Batch], places: Sequence[Indices]) -> Batch:
    """One batch of the rows of several: row `i` of part `p` becomes row `places[p][i]`.

    Rows of different length are padded on the right, which their `lengths` tell from text.
    """
    if len(parts) == 1:
        return parts[0]
    order = torch.from_numpy(np.argsort(np.concatenate(places), kind="stable"))
    width = max(part.input_ids.shape[1] for part in parts)

    def joined(tensors: Sequence[Tensor | None], fill: int) -> Tensor | None:
        present = [tensor for tensor in tensors if tensor is not None]
        if len(present) < len(tensors):
            return None
        rows = [t if t.ndim == 1 else pad(t, (0, width - t.shape[1]), value=fill) for t in present]
        return torch.cat(rows)[order]

    input_ids = joined([part.input_ids for part in parts], 0)
    labels = joined([part.labels for part in parts], IGNORE_INDEX)
    if input_ids is None or labels is None:
        raise AssertionError("Every batch has input_ids and labels.")
    return Batch(
        input_ids=input_ids,
        labels=labels,
        num_target_tokens=sum(part.num_target_tokens for part in parts),
        position_ids=joined([part.position_ids for part in parts], 0),
        document_ids=joined([part.document_ids for part in parts], 0),
        lengths=joined([part.lengths for part in parts], 0),
        num_target_bytes=sum(part.num_target_bytes for part in parts),
    )
