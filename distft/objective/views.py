"""Two views of each row for contrastive learning, as functions of the row, a seed and its sequence number."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from xxhash import xxh3_64_intdigest

from distft.data.batch import Batch
from distft.data.targets import SCORE
from distft.keyed_random import uniform

TEXT_HASH = "text_hash"  # name of the targets [B], int64: equal for equal texts
CONTRASTIVE = "contrastive"  # name of the loss term; its targets are sequences
_CROP_SITE = 0x63726F70


def as_columns(batch: Batch) -> Batch:
    """The rows of each sequence are its views."""
    return _with_targets(batch, _row_hashes(batch))


def repeated(batch: Batch) -> Batch:
    """Each row twice: dropout draws something else in each (Gao et al. 2021, SimCSE, arXiv:2104.08821)."""
    hashes = _row_hashes(batch).repeat_interleave(2)
    return _with_targets(twice(batch), hashes)


def twice(batch: Batch) -> Batch:
    """Each row twice, with its targets, which count once."""
    fields = (
        "input_ids",
        "sequence_numbers",
        "position_ids",
        "document_ids",
        "is_prefix",
        "segment_ids",
        "lengths",
        "images",
    )
    doubled = {
        name: value.repeat_interleave(2, dim=0)
        for name in fields
        if (value := getattr(batch, name)) is not None
    }
    targets = {name: value.repeat_interleave(2, dim=0) for name, value in batch.targets.items()}
    rows_per_sequence = 2 * batch.rows_per_sequence
    return replace(batch, **doubled, targets=targets, rows_per_sequence=rows_per_sequence)


def crops(seed: int, shares: tuple[float, float]) -> Callable[[Batch], Batch]:
    """A transform to two random spans of the longest document in each row (Izacard et al. 2021, Contriever).

    A span has a share of the document's tokens that is uniform in `shares`. arXiv:2112.09118.
    """

    def crop(batch: Batch) -> Batch:
        assert batch.sequence_numbers is not None
        documents = [_longest_document(batch, row) for row in range(len(batch.input_ids))]
        numbers = batch.sequence_numbers.repeat_interleave(2)
        keys = replace(batch, sequence_numbers=numbers, rows_per_sequence=2).row_keys(seed)
        draws = uniform(keys, 2, _CROP_SITE).tolist()
        spans = [
            _span(documents[view // 2], share, place, shares) for view, (share, place) in enumerate(draws)
        ]
        views = Batch(
            input_ids=_padded(spans),
            targets={},
            num_targets=batch.num_targets,
            rows_per_sequence=2,
            sequence_numbers=numbers,
            lengths=torch.tensor([len(span) for span in spans]),
        )
        return _with_targets(views, _hashes(documents).repeat_interleave(2))

    return crop


def crop_length(num_tokens: int, share: float) -> int:
    """The tokens of a crop that has this share of a document."""
    return max(round(num_tokens * share), 1)


def _span(
    document: NDArray[np.int64], share: float, place: float, shares: tuple[float, float]
) -> NDArray[np.int64]:
    length = crop_length(len(document), shares[0] + share * (shares[1] - shares[0]))
    start = int(place * (len(document) - length + 1))
    return document[start : start + length]


def _longest_document(batch: Batch, row: int) -> NDArray[np.int64]:
    """The tokens of a row's longest document, the first of equal ones."""
    ids = batch.input_ids[row, : None if batch.lengths is None else int(batch.lengths[row])].numpy()
    if batch.document_ids is None:
        return ids
    documents = batch.document_ids[row, : len(ids)].numpy()
    bounds = np.flatnonzero(np.diff(documents)) + 1
    starts, stops = np.append(0, bounds), np.append(bounds, len(ids))
    longest = int(np.argmax(stops - starts))
    return ids[starts[longest] : stops[longest]]


def _padded(rows: Sequence[NDArray[np.int64]]) -> Tensor:
    padded = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for target, row in zip(padded, rows, strict=True):
        target[: len(row)] = row
    return torch.from_numpy(padded)


def _row_hashes(batch: Batch) -> Tensor:
    """Of each row's text or image; of a captioned image, before that of its text."""
    if batch.images is not None:
        of_images = _hashes([*batch.images.flatten(1).numpy()])
        if not batch.is_captioned:
            return of_images
        return torch.stack([of_images, _text_hashes(batch)], dim=1).flatten()
    return _text_hashes(batch)


def _text_hashes(batch: Batch) -> Tensor:
    ids = batch.input_ids.numpy()
    lengths = [ids.shape[1]] * len(ids) if batch.lengths is None else batch.lengths.tolist()
    return _hashes([row[:length] for row, length in zip(ids, lengths, strict=True)])


def _hashes(rows: Sequence[NDArray[Any]]) -> Tensor:
    digests = [xxh3_64_intdigest(np.ascontiguousarray(row).data) for row in rows]
    return torch.from_numpy(np.array(digests, np.uint64).view(np.int64))


def _with_targets(batch: Batch, hashes: Tensor) -> Batch:
    """`batch` with the targets of a contrastive loss: none if the data's own batch has none."""
    has_targets = any(batch.num_targets.values())
    num_sequences = len(batch.input_ids) // batch.rows_per_sequence if has_targets else 0
    scores = {SCORE: batch.targets[SCORE]} if SCORE in batch.targets else {}
    return replace(
        batch,
        targets={TEXT_HASH: hashes, **scores},
        num_targets={CONTRASTIVE: num_sequences},
        num_target_bytes=0,
    )
