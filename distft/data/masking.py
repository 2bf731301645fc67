"""Masks tokens of batches: what a row hides depends on the seed and the row's sequence number alone.

Shape letters: B rows, T positions, U units: tokens, words or spans that are masked as a whole.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from distft.data.batch import Batch
from distft.data.dataset import DataContext
from distft.data.documents import BoolArray, document_starts, is_real
from distft.data.targets import IGNORE_INDEX, MASKED_TOKEN
from distft.keyed_random import uniform

# Uses of random numbers, a site each.
_PRIORITY, _ROUNDING, _SPAN_END, _REPLACEMENT, _TOKEN = range(0x4D41_5300, 0x4D41_5305)


def special_ids(context: DataContext, *pieces: str) -> BoolArray:
    """[V]: ids that are no text: control pieces, bos, eos, pad, unknown, padding, and these pieces."""
    special = np.zeros(context.vocab_size, np.bool_)
    if context.token_bytes is not None:
        special[: len(context.token_bytes)] = context.token_bytes == 0
        special[len(context.token_bytes) :] = True
    ids = [context.bos_id, context.eos_id, context.pad_id, context.unk_id, *map(context.piece_id, pieces)]
    special[[i for i in ids if i is not None]] = True
    return special


@dataclass(frozen=True, kw_only=True)
class Masker:
    """A transform of batches: replaces tokens in `input_ids`, and makes them the targets `masked_token`.

    It draws units in random order until they have `mask_rate` of the row's tokens, special ids not counted.
    The last unit is drawn with the probability that gives this share on average over rows.
    """

    seed: int
    mask_id: int | None  # None: nothing becomes the mask token
    is_special: BoolArray  # [V]
    starts_word: BoolArray | None  # [V]; None: units are not words
    mask_rate: float
    mean_span_length: float | None  # None: units are not spans
    mask_token_share: float
    random_token_share: float

    def __call__(self, batch: Batch) -> Batch:
        """Raises `AssertionError` for rows without sequence numbers."""
        keys, width = batch.row_keys(self.seed), batch.input_ids.shape[1]
        ids = batch.input_ids.numpy()
        is_maskable = self._is_maskable(batch)
        unit_starts = self._unit_starts(batch, is_maskable, keys)
        chosen = draw_units(
            unit_starts,
            is_maskable,
            self.mask_rate,
            priorities=uniform(keys, width, _PRIORITY).numpy(),
            rounding=uniform(keys, 1, _ROUNDING).numpy()[:, 0],
        )
        replacement = uniform(keys, width, _REPLACEMENT).numpy()
        if self.mean_span_length is not None:  # all tokens of a span are replaced alike, as in SpanBERT
            replacement = replacement.ravel()[_first_of_unit(unit_starts)].reshape(ids.shape)
        labels = np.where(chosen, ids, IGNORE_INDEX)
        inputs = ids.copy()
        if self.mask_id is not None:
            inputs[chosen & (replacement < self.mask_token_share)] = self.mask_id
        is_random = chosen & (replacement >= self.mask_token_share)
        is_random &= replacement < self.mask_token_share + self.random_token_share
        if is_random.any():
            drawn = (uniform(keys, width, _TOKEN).numpy()[is_random] * len(self._text_ids)).astype(np.int64)
            inputs[is_random] = self._text_ids[drawn]
        return replace(
            batch,
            input_ids=torch.from_numpy(inputs),
            targets={MASKED_TOKEN: torch.from_numpy(labels)},
            num_targets={MASKED_TOKEN: int(np.count_nonzero(chosen))},
            num_target_bytes=0,
        )

    def num_maskable(self, batch: Batch) -> int:
        """Tokens of the batch that may be masked."""
        return int(np.count_nonzero(self._is_maskable(batch)))

    @cached_property
    def _text_ids(self) -> NDArray[np.int64]:
        return np.flatnonzero(~self.is_special)

    def _is_maskable(self, batch: Batch) -> BoolArray:
        maskable: BoolArray = is_real(batch) & ~self.is_special[batch.input_ids.numpy()]
        return maskable

    def _unit_starts(self, batch: Batch, is_maskable: BoolArray, keys: torch.Tensor) -> BoolArray:
        """[B, T]: a unit ends at special ids and with its document."""
        starts = document_starts(batch) | ~is_maskable
        starts[:, 1:] |= ~is_maskable[:, :-1]
        if self.starts_word is not None:
            starts |= self.starts_word[np.minimum(batch.input_ids.numpy(), len(self.starts_word) - 1)]
        elif self.mean_span_length is not None:
            # Ending at each position with the same probability makes lengths geometric.
            starts |= uniform(keys, starts.shape[1], _SPAN_END).numpy() < 1 / self.mean_span_length
        else:
            starts[:] = True
        return starts


def draw_units(
    unit_starts: BoolArray,
    counts: BoolArray,
    rate: float,
    *,
    priorities: NDArray[np.float64],
    rounding: NDArray[np.float64],
) -> BoolArray:
    """[B, T]: which of the positions that `counts` marks are in a drawn unit.

    Units of a row are taken in order of their first position's priority. Of a row with n positions that
    count, the unit that holds the (rate * n)-th is taken with a probability that makes the expected number of
    positions rate * n: `rounding` [B] is uniform in [0, 1).
    """
    num_rows, width = unit_starts.shape
    unit_of = (np.cumsum(unit_starts.ravel()) - 1).astype(np.int64)
    first = np.flatnonzero(unit_starts.ravel())
    row_of_unit = first // width
    sizes = np.bincount(unit_of, weights=counts.ravel()).astype(np.int64)
    order = np.lexsort((priorities.ravel()[first], row_of_unit))
    ends = np.cumsum(sizes[order])
    num_of_row = counts.sum(axis=1)
    ends -= (np.cumsum(num_of_row) - num_of_row)[row_of_unit[order]]
    is_taken = ends - sizes[order] * rounding[row_of_unit[order]] <= rate * num_of_row[row_of_unit[order]]
    drawn = np.empty(len(first), np.bool_)
    drawn[order] = is_taken
    chosen: BoolArray = drawn[unit_of].reshape(num_rows, width) & counts
    return chosen


def _first_of_unit(unit_starts: BoolArray) -> NDArray[np.int64]:
    """[B * T]: the first position of each position's unit."""
    flat = unit_starts.ravel()
    first: NDArray[np.int64] = np.flatnonzero(flat)[np.cumsum(flat) - 1]
    return first
