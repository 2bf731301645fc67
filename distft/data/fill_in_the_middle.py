"""Fill in the middle: documents whose middle part is moved behind what follows it."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from distft.data.batch import Batch, count_target_bytes
from distft.data.documents import documents
from distft.data.targets import IGNORE_INDEX, NEXT_TOKEN
from distft.keyed_random import uniform

_RATE, _ORDER, _FIRST_CUT, _SECOND_CUT = range(0x4649_4D00, 0x4649_4D04)  # uses of random numbers
_NUM_MARKS = 3

_Ids = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class MiddleMover:
    """A transform of batches of next-token targets (Bavarian et al. 2022, arXiv:2207.14255).

    A share `rate` of the documents, cut at two places into prefix, middle and suffix, become `<prefix> prefix
    <suffix> suffix <middle> middle`, a share `spm_rate` of these `<prefix> <suffix> suffix <middle> prefix
    middle`. They lose their last three tokens, for the marks; a bos before and an eos behind stay. What a row
    has of a document counts as one.
    """

    seed: int
    rate: float
    spm_rate: float
    marks: tuple[int, int, int]  # ids of <prefix>, <suffix>, <middle>
    bos_id: int | None
    eos_id: int | None
    token_bytes: NDArray[np.int64] | None

    def __call__(self, batch: Batch) -> Batch:
        labels = batch.targets[NEXT_TOKEN].numpy()
        # All tokens of a row: its inputs, and the target of the last one if that is of the same document.
        tokens = np.concatenate([batch.input_ids.numpy(), np.maximum(labels[:, -1:], 0)], axis=1)
        keys, width = batch.row_keys(self.seed), tokens.shape[1]
        sites = (_RATE, _ORDER, _FIRST_CUT, _SECOND_CUT)
        drawn = np.stack([uniform(keys, width, site).numpy() for site in sites], axis=2)
        for row, start, stop in documents(batch):
            last = stop + (stop == width - 1 and labels[row, -1] != IGNORE_INDEX)
            for begin, end in self._texts(tokens[row], start, last):
                if end - begin > _NUM_MARKS and drawn[row, begin, 0] < self.rate:
                    text = tokens[row, begin : end - _NUM_MARKS]
                    tokens[row, begin:end] = self._moved(text, *drawn[row, begin, 1:].tolist())
        labels = np.where(labels == IGNORE_INDEX, IGNORE_INDEX, tokens[:, 1:])
        return replace(
            batch,
            input_ids=torch.from_numpy(tokens[:, :-1].copy()),
            targets={NEXT_TOKEN: torch.from_numpy(labels)},
            num_target_bytes=count_target_bytes(labels, self._bytes_of_text()),
        )

    def _texts(self, tokens: _Ids, start: int, stop: int) -> list[tuple[int, int]]:
        """Start and stop of each text in [start, stop), without bos and eos: several if they are joined."""
        is_eos = tokens[start:stop] == self.eos_id  # no token is None
        texts = []
        for end in [*(np.flatnonzero(is_eos) + start).tolist(), stop]:
            begin = start + int(start < end and tokens[start] == self.bos_id)
            if begin < end:
                texts.append((begin, end))
            start = end + 1
        return texts

    def _moved(self, text: _Ids, order: float, first_cut: float, second_cut: float) -> _Ids:
        low, high = sorted(int(cut * (len(text) + 1)) for cut in (first_cut, second_cut))
        prefix, middle, suffix = text[:low], text[low:high], text[high:]
        prefix_mark, suffix_mark, middle_mark = ([mark] for mark in self.marks)
        if order < self.spm_rate:
            return np.concatenate([prefix_mark, suffix_mark, suffix, middle_mark, prefix, middle])
        return np.concatenate([prefix_mark, prefix, suffix_mark, suffix, middle_mark, middle])

    def _bytes_of_text(self) -> NDArray[np.int64] | None:
        """Marks are no text, so they do not count in bits per byte."""
        if self.token_bytes is None:
            return None
        token_bytes = self.token_bytes.copy()
        token_bytes[list(self.marks)] = 0
        return token_bytes
