"""Images in memory as rows, with classes or texts, and their random augmentation.

Shape letters: B rows, E channels, Y and X height and width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import pad
from xxhash import xxh3_64_hexdigest

from distft.data.batch import Batch, RaggedArray
from distft.data.labelled_rows import LabelNames, RowTargets, describe_labels
from distft.data.sampler import Indices
from distft.keyed_random import uniform

if TYPE_CHECKING:
    from distft.data.image_sources import ImageTable

_SITE = 0x696D6167  # of the augmentation's random numbers


class ImageRows:
    """An image a row, with its target and, from `texts`, its text; as many rows as it has views.

    Without texts, a row has one token, which no model reads: it is what the row counts as.
    """

    def __init__(
        self,
        images: NDArray[np.uint8],
        targets: RowTargets,
        *,
        texts: RaggedArray | None = None,
        views: int = 1,
        pad_id: int = 0,
        summary: str = "images",
    ) -> None:
        self._images = images
        self._targets = targets
        self._texts = texts
        self._views = views
        self._pad_id = pad_id
        self.num_sequences = len(images)
        self.summary = summary
        self.label_counts = targets.label_counts
        of_texts = "" if texts is None else f"-{texts.fingerprint}"
        self.fingerprint = f"{xxh3_64_hexdigest(images.data)}-{views}{targets.fingerprint}{of_texts}"

    @property
    def num_distinct_texts(self) -> int:
        """How many of the texts differ, as they are encoded and cut."""
        if self._texts is None:
            return 0
        values, offsets = self._texts.arrays()["values"], self._texts.arrays()["offsets"].tolist()
        return len({values[start:stop].tobytes() for start, stop in pairwise(offsets)})

    def batch(self, indices: Indices) -> Batch:
        """Rows of the images `indices`; for empty `indices`, those of image 0 without targets."""
        if not len(indices):
            return self.batch(np.zeros(1, np.int64)).without_targets()
        rows = np.repeat(indices, self._views)
        targets = self._targets.batch(rows)
        input_ids, lengths = torch.zeros(len(rows), 1, dtype=torch.int64), None
        if self._texts is not None:
            input_ids = torch.from_numpy(self._texts.padded(rows, self._pad_id))
            lengths = torch.from_numpy(self._texts.lengths(rows))
        return Batch(
            input_ids=input_ids,
            images=torch.from_numpy(self._images[rows]),
            is_captioned=self._texts is not None,
            targets=targets,
            num_targets=dict.fromkeys(targets, len(rows)),
            rows_per_sequence=self._views,
            lengths=lengths,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Augmentation:
    """A transform of batches: shifts and mirrors each image at random, as its row and sequence number say."""

    shift: int  # pixels at most, up, down, left and right; zeros come in
    flips: bool
    seed: int

    def __call__(self, batch: Batch) -> Batch:
        images = batch.images
        assert images is not None
        num_rows, num_channels, height, width = images.shape
        draws = uniform(batch.row_keys(self.seed), 3, _SITE)
        shifts = (draws[:, :2] * (2 * self.shift + 1)).long()  # 0 to twice the shift, within the padded image
        rows_BY = torch.arange(height) + shifts[:, :1]
        columns_BX = torch.arange(width) + shifts[:, 1:]
        if self.flips:
            is_flipped_B1 = draws[:, 2:] < 0.5
            columns_BX = torch.where(is_flipped_B1, columns_BX.flip(1), columns_BX)
        padded = pad(images, (self.shift,) * 4)
        changed = padded[
            torch.arange(num_rows)[:, None, None, None],
            torch.arange(num_channels)[:, None, None],
            rows_BY[:, None, :, None],
            columns_BX[:, None, None, :],
        ]
        return replace(batch, images=changed)


def describe(name: str, table: ImageTable, label_names: Sequence[str] | None) -> str:
    """Lines about images before training."""
    num_images, channels, height, width = table.images.shape
    kind = "grey" if channels == 1 else "RGB"
    lines = [
        f"{num_images:,} {kind} images of {width} x {height} pixels, {table.images.nbytes:,} bytes in memory"
    ]
    if label_names is None:
        lines.append("unlabelled")
    else:
        found = Counter(table.labels)
        counts = np.array([found[label] for label in label_names], np.int64)
        lines += describe_labels(LabelNames(tuple(label_names)), counts)
    if table.texts:
        lines.append(f"{len(set(table.texts)):,} different texts")
    lines += table.notes
    return "\n".join(f"{name}: {line}" for line in lines)
