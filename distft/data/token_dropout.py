"""Views of texts, in which some tokens or words are removed or replaced, by seed and sequence number.

Shape letters: B rows, T positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distft.data.batch import Batch
from distft.data.targets import IGNORE_INDEX, ROW
from distft.keyed_random import uniform

_HIT, _REPLACEMENT = 0x544F_4B00, 0x544F_4B01  # uses of random numbers, a site each


@dataclass(frozen=True, kw_only=True)
class TokenDropout:
    """Each token, or each word, is hit with probability `rate`; special ids are not.

    A row keeps at least one token.
    """

    rate: float
    is_special: NDArray[np.bool_]  # [V]
    starts_word: NDArray[np.bool_] | None  # [V]; None: tokens are hit one by one, not as words
    replacements: NDArray[np.int64] | None  # a hit token becomes one of these; None: it is removed

    def __call__(
        self, ids_BT: Tensor, lengths_B: Tensor, keys_B: Tensor, segment_ids_BT: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The changed ids, lengths and segment ids; `keys_B` determine what is drawn."""
        if not self.rate:
            return ids_BT, lengths_B, segment_ids_BT
        width = ids_BT.shape[1]
        is_real_BT = torch.arange(width) < lengths_B[:, None]
        draws_BT = uniform(keys_B, width, _HIT)
        if self.starts_word is not None:
            starts = torch.from_numpy(self.starts_word)
            words_BT = starts[ids_BT.clamp_max(len(starts) - 1)].long().cumsum(1)
            draws_BT = draws_BT.gather(1, words_BT - words_BT[:, :1])
        is_hit_BT = is_real_BT & (draws_BT < self.rate) & ~torch.from_numpy(self.is_special)[ids_BT]
        if self.replacements is None:
            order_BT, lengths_B = _order_without(is_hit_BT, is_real_BT, draws_BT)
            is_padding_BT = torch.arange(width) >= lengths_B[:, None]
            kept = [ids.gather(1, order_BT).masked_fill(is_padding_BT, 0) for ids in (ids_BT, segment_ids_BT)]
            return kept[0], lengths_B, kept[1]
        chosen_BT = (uniform(keys_B, width, _REPLACEMENT) * len(self.replacements)).long()
        ids_BT = torch.where(is_hit_BT, torch.from_numpy(self.replacements)[chosen_BT], ids_BT)
        return ids_BT, lengths_B, segment_ids_BT


def _order_without(is_hit_BT: Tensor, is_real_BT: Tensor, draws_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The positions of each row, those that stay first, and how many stay."""
    keeps_BT = is_real_BT & ~is_hit_BT
    # The token with the largest draw would be the last to go, whatever the rate.
    last_B1 = draws_BT.masked_fill(~is_real_BT, -1.0).argmax(dim=1, keepdim=True)
    keeps_BT = keeps_BT.scatter(1, last_B1, keeps_BT.gather(1, last_B1) | ~keeps_BT.any(dim=1, keepdim=True))
    return (~keeps_BT).byte().argsort(dim=1, stable=True), keeps_BT.sum(dim=1)


@dataclass(frozen=True, kw_only=True)
class TextViews:
    """A transform of unlabelled rows: each sequence becomes a row for each of `dropouts`.

    The target `row` is 0 in the first row of each sequence that counts.
    """

    dropouts: Sequence[TokenDropout]
    seed: int

    def __call__(self, batch: Batch) -> Batch:
        num_views = len(self.dropouts)
        assert batch.sequence_numbers is not None
        assert batch.lengths is not None
        row = torch.full((len(batch.input_ids) * num_views,), IGNORE_INDEX)
        row[::num_views] = batch.targets[ROW]
        views = replace(
            batch,
            input_ids=batch.input_ids.repeat_interleave(num_views, dim=0),
            lengths=batch.lengths.repeat_interleave(num_views),
            segment_ids=_segment_ids(batch).repeat_interleave(num_views, dim=0),
            sequence_numbers=batch.sequence_numbers.repeat_interleave(num_views),
            targets={ROW: row},
            num_targets={ROW: batch.num_targets[ROW]},
            rows_per_sequence=num_views,
        )
        keys = views.row_keys(self.seed)
        assert views.lengths is not None
        assert views.segment_ids is not None
        for view, dropout in enumerate(self.dropouts):
            rows = slice(view, None, num_views)
            views.input_ids[rows], views.lengths[rows], views.segment_ids[rows] = dropout(
                views.input_ids[rows], views.lengths[rows], keys[rows], views.segment_ids[rows]
            )
        width = int(views.lengths.max())
        return replace(
            views,
            input_ids=views.input_ids[:, :width],
            segment_ids=None if batch.segment_ids is None else views.segment_ids[:, :width],
        )


def _segment_ids(batch: Batch) -> Tensor:
    return torch.zeros_like(batch.input_ids) if batch.segment_ids is None else batch.segment_ids


def rows_of_view(batch: Batch, view: int) -> Batch:
    """Row `view` of each sequence, without targets, for a forward pass."""
    rows = slice(view, None, batch.rows_per_sequence)
    return Batch(
        input_ids=batch.input_ids[rows],
        targets={},
        num_targets={},
        segment_ids=None if batch.segment_ids is None else batch.segment_ids[rows],
        lengths=None if batch.lengths is None else batch.lengths[rows],
        dropout_keys=None if batch.dropout_keys is None else batch.dropout_keys[rows],
    )
