"""Span corruption as T5 does it, as a text to continue: the corrupted document, then the removed spans."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from distft.data.batch import Batch
from distft.data.documents import BoolArray, documents
from distft.data.targets import IGNORE_INDEX, NEXT_TOKEN
from distft.keyed_random import uniform

_NOISE, _TEXT = 0x5350_4300, 0x5350_4301  # sites of the lengths of spans, and of the text between them

_Ids = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class SpanCorrupter:
    """A transform of batches: each document becomes its corrupted text, which is a prefix, and its spans.

    `a b [c d] e [f]` becomes `a b S0 e S1 eos S0 c d S1 f eos`, with S0, S1 ... of `sentinel_ids`, and
    targets from the first eos on. A document is cut at its end so that all this takes no more tokens than it
    had; one too short for a span is left out. Rows are padded.
    """

    seed: int
    noise_density: float
    mean_span_length: float
    sentinel_ids: tuple[int, ...]  # of a span each; one id: of all spans
    eos_id: int | None
    pad_id: int

    def __call__(self, batch: Batch) -> Batch:
        keys, (num_rows, width) = batch.row_keys(self.seed), batch.input_ids.shape
        ids = batch.input_ids.numpy()
        draws = [uniform(keys, width, site).numpy() for site in (_NOISE, _TEXT)]
        rows = _Rows(num_rows, width, self.pad_id)
        for row, start, stop in documents(batch):
            text = ids[row, start:stop]
            if self.eos_id is not None and text[-1] == self.eos_id:
                text = text[:-1]
            length = self.source_length(stop - start, len(text))
            if length:
                is_noise = self._is_noise(length, *(drawn[row, start:] for drawn in draws))
                rows.add(row, *self._corrupted(text[:length], is_noise))
        labels = rows.labels
        return replace(
            batch,
            input_ids=torch.from_numpy(rows.ids),
            targets={NEXT_TOKEN: torch.from_numpy(labels)},
            num_targets={NEXT_TOKEN: int(np.count_nonzero(labels != IGNORE_INDEX))},
            position_ids=torch.from_numpy(rows.position_ids),
            document_ids=torch.from_numpy(rows.document_ids),
            is_prefix=torch.from_numpy(rows.is_prefix),
            segment_ids=None,
            lengths=torch.from_numpy(rows.lengths),
            num_target_bytes=0,
        )

    def num_noise_and_spans(self, length: int) -> tuple[int, int]:
        """How many of `length` tokens are removed, and in how many spans; `random_spans_noise_mask` of T5."""
        num_noise = min(max(round(length * self.noise_density), 1), length - 1)
        num_spans = max(round(num_noise / self.mean_span_length), 1)
        return num_noise, min(num_spans, num_noise, length - num_noise)

    def source_length(self, room: int, length: int) -> int:
        """How many of a document's `length` tokens give no more than `room` input tokens; 0 if none do."""
        num_eos = 0 if self.eos_id is None else 2
        for size in range(length, 1, -1):
            # The last token of all is a target only.
            if size + 2 * self.num_noise_and_spans(size)[1] + num_eos - 1 <= room:
                return size
        return 0

    def _is_noise(
        self, length: int, for_noise: NDArray[np.float64], for_text: NDArray[np.float64]
    ) -> BoolArray:
        """[length]: text and spans in turn, beginning with text."""
        num_noise, num_spans = self.num_noise_and_spans(length)
        noise = _random_lengths(num_noise, num_spans, for_noise)
        text = _random_lengths(length - num_noise, num_spans, for_text)
        return np.repeat(np.arange(2 * num_spans) % 2 == 1, np.stack([text, noise], axis=1).ravel())

    def _corrupted(self, text: _Ids, is_noise: BoolArray) -> tuple[_Ids, int]:
        """The document with its spans behind it, and the length of the prefix."""
        bounds = np.flatnonzero(np.diff(is_noise)) + 1
        parts = np.split(text, bounds)
        num_spans = len(parts) // 2
        numbers = np.minimum(np.arange(num_spans), len(self.sentinel_ids) - 1)
        sentinels = [np.array([self.sentinel_ids[i]]) for i in numbers]
        eos = np.array([] if self.eos_id is None else [self.eos_id], np.int64)
        prefix = [array for pair in zip(parts[::2], sentinels, strict=True) for array in pair]
        spans = [array for pair in zip(sentinels, parts[1::2], strict=True) for array in pair]
        return np.concatenate([*prefix, eos, *spans, eos]), sum(map(len, prefix)) + len(eos)


def _random_lengths(num_tokens: int, num_parts: int, drawn: NDArray[np.float64]) -> _Ids:
    """`num_tokens` cut into parts of at least 1, all cuts equally likely; uses `num_tokens` - 1 numbers."""
    cuts = np.sort(np.argsort(drawn[: num_tokens - 1], kind="stable")[: num_parts - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [num_tokens]])).astype(np.int64)


class _Rows:
    """Rows of fixed width that are filled with documents from the left."""

    def __init__(self, num_rows: int, width: int, pad_id: int) -> None:
        shape = (num_rows, width)
        self.ids = np.full(shape, pad_id, np.int64)
        self.labels = np.full(shape, IGNORE_INDEX, np.int64)
        self.is_prefix = np.zeros(shape, np.bool_)
        self.position_ids = np.tile(np.arange(width, dtype=np.int64), (num_rows, 1))
        self.document_ids = np.zeros(shape, np.int64)
        self.lengths = np.zeros(num_rows, np.int64)

    def add(self, row: int, tokens: _Ids, prefix_length: int) -> None:
        """Append a document of which all but the last token are inputs."""
        start = int(self.lengths[row])
        stop = start + len(tokens) - 1
        self.ids[row, start:stop] = tokens[:-1]
        self.labels[row, start + prefix_length - 1 : stop] = tokens[prefix_length:]
        self.is_prefix[row, start : start + prefix_length] = True
        # What follows is another document, or padding.
        self.position_ids[row, start:stop] = np.arange(stop - start)
        self.position_ids[row, stop:] = np.arange(self.ids.shape[1] - stop)
        self.document_ids[row, stop:] += 1
        self.lengths[row] = stop
