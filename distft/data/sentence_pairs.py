"""Pairs of neighbouring texts from rows of documents: in order, exchanged, or with another row's text."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from distft.data.batch import Batch, RaggedArray
from distft.data.documents import BoolArray, documents
from distft.data.labelled_rows import segment_ids
from distft.data.sampler import Indices
from distft.data.targets import IGNORE_INDEX
from distft.keyed_random import uniform

_DRAWS = 0x5041_4952  # site of the numbers below
_CUT, _CHANGE, _OTHER, _OTHER_CUT = range(4)

_Ids = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class PairMaker:
    """A transform of batches: a row's longest document becomes two texts, with the target 0 or 1 if changed.

    It is cut in two between a quarter and three quarters of its length, where a word begins. In half of the
    rows the texts are exchanged, or with `rows` the second one is of another row: what follows the cut there,
    no longer than what it replaces. Rows become `[first_id] text [separator_id] text [separator_id]`.
    """

    target: str
    seed: int
    seq_len: int
    first_id: int | None
    separator_id: int
    pad_id: int
    has_segments: bool  # the batch gets segment ids: 0 up to the first separator, then 1
    is_special: BoolArray  # [V]: not part of a text
    starts_word: BoolArray | None  # [V]
    num_sequences: int
    rows: Callable[[Indices], Batch] | None  # of any sequences; None: texts are exchanged

    def __call__(self, batch: Batch) -> Batch:
        draws = uniform(batch.row_keys(self.seed), 4, _DRAWS).numpy()
        is_changed = draws[:, _CHANGE] < 0.5
        texts = [text[: self.seq_len - self.num_marks] for text in self.texts(batch)]
        pairs = [self._cut(text, draw) for text, draw in zip(texts, draws[:, _CUT].tolist(), strict=True)]
        changed = np.flatnonzero(is_changed)
        if self.rows is None:
            for row in changed.tolist():
                pairs[row] = pairs[row][::-1]
        elif len(changed):
            assert batch.sequence_numbers is not None
            others = self._others(batch.sequence_numbers.numpy()[changed], draws[changed], texts, changed)
            for row, other, cut in zip(
                changed.tolist(), others, draws[changed, _OTHER_CUT].tolist(), strict=True
            ):
                first, second = pairs[row]
                pairs[row] = (first, self._cut(other, cut)[1][: len(second)])
        labels = [
            int(change) if min(map(len, pair)) else IGNORE_INDEX
            for pair, change in zip(pairs, is_changed.tolist(), strict=True)
        ]
        return self._batch(batch, pairs, labels)

    @property
    def num_marks(self) -> int:
        """Tokens of a row besides the texts."""
        return 2 + (self.first_id is not None)

    def texts(self, batch: Batch) -> list[_Ids]:
        """The longest document of each row, without special ids."""
        ids = batch.input_ids.numpy()
        longest = [np.empty(0, np.int64)] * len(ids)
        for row, start, stop in documents(batch):
            text = ids[row, start:stop]
            text = text[~self.is_special[text]]
            if len(text) > len(longest[row]):
                longest[row] = text
        return longest

    def _others(
        self, numbers: Indices, draws: NDArray[np.float64], texts: list[_Ids], of: Indices
    ) -> list[_Ids]:
        """A text for each of the sequences `numbers`: of another sequence, whose text is not the same."""
        assert self.rows is not None
        steps = 1 + (draws[:, _OTHER] * (self.num_sequences - 1)).astype(np.int64)
        found = self.texts(self.rows((numbers + steps) % self.num_sequences))
        for index, row in enumerate(of.tolist()):
            # Another epoch has the same rows under other numbers.
            if np.array_equal(found[index][: len(texts[row])], texts[row]):
                next_number = (numbers[index : index + 1] + steps[index] + 1) % self.num_sequences
                (found[index],) = self.texts(self.rows(next_number))
        return found

    def _cut(self, text: _Ids, draw: float) -> tuple[_Ids, _Ids]:
        """The text in two; the first part is empty if there is only one token."""
        place = round(len(text) * (0.25 + draw / 2))
        if self.starts_word is not None and len(text) > 1:
            starts = np.flatnonzero(self.starts_word[text[1:]]) + 1
            if len(starts):
                place = int(starts[np.argmin(np.abs(starts - place))])
        place = min(max(place, 1), len(text) - 1) if len(text) > 1 else 0
        return text[:place], text[place:]

    def _batch(self, batch: Batch, pairs: list[tuple[_Ids, _Ids]], labels: list[int]) -> Batch:
        marks = [] if self.first_id is None else [self.first_id]
        end = [self.separator_id]
        rows = RaggedArray([[*marks, *first, *end, *second, *end] for first, second in pairs])
        every = np.arange(len(pairs))
        starts = np.array([len(marks) + len(first) + len(end) for first, _ in pairs])
        lengths = rows.lengths(every)
        return Batch(
            input_ids=torch.from_numpy(rows.padded(every, self.pad_id)),
            targets={self.target: torch.tensor(labels)},
            num_targets={self.target: sum(label != IGNORE_INDEX for label in labels)},
            sequence_numbers=batch.sequence_numbers,
            segment_ids=segment_ids(starts, lengths) if self.has_segments else None,
            lengths=torch.from_numpy(lengths),
        )
