"""Rows of sources and targets as an encoder's and a decoder's inputs, and their hidden states as rows again.

Shape letters: B rows, T positions, S positions of the most source tokens in a row, D of the most that the
decoder has, C width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distft.model.documents import document_begins
from distft.model.layout import RowLayout

_NO_SOURCE, _NO_TARGET = -1, -2  # documents of padding


@dataclass(frozen=True, slots=True)
class _Compact:
    """Some positions of each row, moved to its left."""

    is_taken: Tensor  # bool [B, T]: the positions
    indices: Tensor  # int64 [B, S or D], of a row's positions; behind the taken ones any others
    documents: Tensor  # int64 [B, S or D], with a negative number for what is behind the taken ones

    @classmethod
    def of(cls, is_taken_BT: Tensor, documents_BT: Tensor, width: int, no_document: int) -> "_Compact":
        indices = (~is_taken_BT).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
        is_taken = is_taken_BT.gather(1, indices)
        return cls(is_taken_BT, indices, documents_BT.gather(1, indices).where(is_taken, no_document))

    def take(self, x_BTC: Tensor) -> Tensor:
        """The taken positions of rows, [B, S or D, C]."""
        return x_BTC.gather(1, self.indices[..., None].expand(-1, -1, x_BTC.shape[2]))

    def put(self, compact: Tensor) -> Tensor:
        """[B, T, C] with the taken positions of `compact` [B, S or D, C] at their places."""
        ranks_BT = (self.is_taken.cumsum(1) - 1).clamp_min(0)
        return compact.gather(1, ranks_BT[..., None].expand(-1, -1, compact.shape[2]))


@dataclass(frozen=True, slots=True)
class SourceSplit:
    """Where the encoder's and the decoder's positions are in rows.

    A document's source is what `is_prefix` marks of its beginning, and at least its first token; without
    marks, all of it. The decoder has the rest, and before that the place of the source's last token, where it
    begins: there it predicts the first token of the target.
    """

    source: _Compact
    target: _Compact
    is_start: Tensor  # bool [B, D]: whether a decoder's position is a document's first

    @classmethod
    def of(cls, layout: RowLayout) -> "SourceSplit":
        """Of rows of this layout. On a GPU this waits for the device once, since the lengths are shapes."""
        begins_BT = document_begins(layout)
        is_real_BT = torch.ones_like(begins_BT)
        if layout.lengths is not None:
            columns_T = torch.arange(layout.shape[1], device=begins_BT.device)
            is_real_BT = columns_T < layout.lengths[:, None]
        is_source_BT = is_real_BT
        if layout.is_prefix is not None:
            is_source_BT = (layout.is_prefix | begins_BT) & is_real_BT
        continues_BT = torch.zeros_like(begins_BT)  # whether the next position is of the same source
        continues_BT[:, :-1] = is_source_BT[:, 1:] & ~begins_BT[:, 1:]
        is_start_BT = is_source_BT & ~continues_BT
        is_target_BT = is_real_BT & (is_start_BT | ~is_source_BT)
        counts = torch.stack([is_source_BT.sum(1).max(), is_target_BT.sum(1).max()])
        num_source, num_target = (max(count, 1) for count in counts.tolist())
        documents_BT = begins_BT.cumsum(1)
        target = _Compact.of(is_target_BT, documents_BT, num_target, _NO_TARGET)
        return cls(
            _Compact.of(is_source_BT, documents_BT, num_source, _NO_SOURCE),
            target,
            is_start_BT.gather(1, target.indices),
        )

    def source_mask(self) -> Tensor:
        """Which source tokens see each other, bool [B, 1, S, S]; padding sees padding."""
        return _same(self.source.documents, self.source.documents)

    def target_mask(self) -> Tensor:
        """Which of the decoder's positions each of them sees, bool [B, 1, D, D]."""
        return _same(self.target.documents, self.target.documents).tril()

    def cross_mask(self) -> Tensor:
        """Which source tokens each of the decoder's positions sees, bool [B, 1, D, S].

        Padding sees all: a softmax over no keys would give NaN.
        """
        is_padding = self.target.documents == _NO_TARGET
        return _same(self.target.documents, self.source.documents) | is_padding[:, None, :, None]

    def rows(self, source: Tensor, target: Tensor) -> Tensor:
        """Hidden states at the positions of the rows, [B, T, C]: the decoder's, where it has one."""
        return torch.where(self.target.is_taken[..., None], self.target.put(target), self.source.put(source))


def _same(queries: Tensor, keys: Tensor) -> Tensor:
    return queries[:, None, :, None] == keys[:, None, None, :]
