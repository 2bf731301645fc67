"""The documents of a batch's rows, for models that pass through them position by position.

Shape letters: B rows, T positions, N = B * T, D documents.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distft.model.layout import RowLayout


@dataclass(frozen=True, slots=True)
class Documents:
    """Runs of positions that depend on nothing outside; the padding of a row is one, too."""

    numbers: Tensor  # int64 [N], of each position's document: 0, 1, 2, ... over all rows
    offsets: Tensor  # int64 [N], of each position in its document
    lengths: Tensor  # int64 [D]

    @property
    def num_documents(self) -> int:
        return len(self.lengths)


def document_begins(layout: RowLayout) -> Tensor:
    """bool [B, T]: whether a document begins at a position, or the row's padding does."""
    num_rows, num_positions = layout.shape
    device = layout.position_ids.device
    begins_BT = torch.zeros(num_rows, num_positions, dtype=torch.bool, device=device)
    begins_BT[:, 0] = True
    if layout.document_ids is not None:
        begins_BT[:, 1:] |= layout.document_ids[:, 1:] != layout.document_ids[:, :-1]
    if layout.lengths is not None:
        begins_BT |= torch.arange(num_positions, device=device) == layout.lengths[:, None]
    return begins_BT


def documents_of(layout: RowLayout) -> Documents:
    """The documents of rows. A new one begins with each row, at a change of id, and at the padding.

    On a GPU this waits for the device once, since the number of documents is a shape.
    """
    num_rows, num_positions = layout.shape
    device = layout.position_ids.device
    begins_N = document_begins(layout).flatten()
    numbers_N = begins_N.cumsum(0) - 1
    positions_N = torch.arange(num_rows * num_positions, device=device)
    starts_N = torch.where(begins_N, positions_N, 0).cummax(0).values
    return Documents(numbers_N, positions_N - starts_N, torch.bincount(numbers_N))
