"""Micro-batches of token rows: the type that model and objective take, padding and merging."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from distft.data.sampler import Indices

IGNORE_INDEX = -100  # label of a position or row without a loss


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """B rows of T tokens with their labels.

    `labels` is [B, T] (the next token at each position) or [B] (the class of each row). Labels equal to
    `IGNORE_INDEX` have no loss; `num_target_tokens` counts the others.
    """

    input_ids: Tensor  # int64 [B, T]
    labels: Tensor  # int64 [B, T] or [B]
    num_target_tokens: int
    position_ids: Tensor | None = None  # int64 [B, T]; None: 0, 1, 2, ... in each row
    document_ids: Tensor | None = None  # int64 [B, T]; attention stays within one id; None: one id per row
    lengths: Tensor | None = None  # int64 [B]: tokens before the right padding; None: no padding
    num_target_bytes: int = 0  # UTF-8 bytes of the target tokens; 0 if unknown

    def to(self, device: torch.device) -> "Batch":
        """Return the batch with every tensor on `device`."""
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)


class RaggedArray:
    """Rows of int32 of different lengths in one flat array: 4 bytes per value and 8 per row."""

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        lengths = np.fromiter((len(row) for row in rows), np.int64, count=len(rows))
        self._offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        self._values = np.empty(self._offsets[-1], np.int32)
        for row, offset in zip(rows, self._offsets, strict=False):
            self._values[offset : offset + len(row)] = row

    @property
    def max_value(self) -> int:
        """The largest value in any row; 0 if there are no values."""
        return int(self._values.max(initial=0))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def lengths(self, indices: Indices) -> Indices:
        """Lengths of rows `indices`."""
        lengths: Indices = self._offsets[indices + 1] - self._offsets[indices]
        return lengths

    def padded(self, indices: Indices, pad_id: int) -> NDArray[np.int64]:
        """Rows `indices` [B, T], padded on the right to the longest of them."""
        lengths = self.lengths(indices)
        columns = np.arange(lengths.max(), dtype=np.int64)
        is_real = columns < lengths[:, None]
        padded = np.full(is_real.shape, pad_id, np.int64)
        positions = (self._offsets[indices][:, None] + columns)[is_real]
        padded[is_real] = self._values[positions]
        return padded


def count_target_bytes(labels: NDArray[np.int64], token_bytes: NDArray[np.int64] | None) -> int:
    """UTF-8 bytes of the target tokens in `labels`; 0 if `token_bytes` is None."""
    if token_bytes is None:
        return 0
    return int(token_bytes[labels[labels != IGNORE_INDEX]].sum())


def merge_batches(batches: Sequence[Batch], row_positions: Sequence[Indices]) -> Batch:
    """Merge batches into one: row `i` of batch `b` becomes row `row_positions[b][i]`.

    Shorter rows are padded on the right; `lengths` excludes the padding. A field that any batch lacks is
    None in the result.
    """
    if len(batches) == 1:
        return batches[0]
    order = torch.from_numpy(np.argsort(np.concatenate(row_positions), kind="stable"))
    width = max(batch.input_ids.shape[1] for batch in batches)

    def concatenate(tensors: Sequence[Tensor], fill: int) -> Tensor:
        rows = [t if t.ndim == 1 else pad(t, (0, width - t.shape[1]), value=fill) for t in tensors]
        return torch.cat(rows)[order]

    def concatenate_optional(tensors: Sequence[Tensor | None]) -> Tensor | None:
        present = [tensor for tensor in tensors if tensor is not None]
        return concatenate(present, 0) if len(present) == len(tensors) else None

    return Batch(
        input_ids=concatenate([batch.input_ids for batch in batches], 0),
        labels=concatenate([batch.labels for batch in batches], IGNORE_INDEX),
        num_target_tokens=sum(batch.num_target_tokens for batch in batches),
        position_ids=concatenate_optional([batch.position_ids for batch in batches]),
        document_ids=concatenate_optional([batch.document_ids for batch in batches]),
        lengths=concatenate_optional([batch.lengths for batch in batches]),
        num_target_bytes=sum(batch.num_target_bytes for batch in batches),
    )
