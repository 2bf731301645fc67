"""Where the documents of packed or padded rows begin and end.

Shape letters: B rows, T positions.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from distft.data.batch import Batch

BoolArray = NDArray[np.bool_]


def is_real(batch: Batch) -> BoolArray:
    """[B, T]: whether each position is before the row's padding."""
    shape = batch.input_ids.shape
    if batch.lengths is None:
        return np.ones(shape, np.bool_)
    real: BoolArray = np.arange(shape[1]) < batch.lengths.numpy()[:, None]
    return real


def document_starts(batch: Batch) -> BoolArray:
    """[B, T]: whether a document, or what the row has of it, begins at each position, or the padding does."""
    starts = np.zeros(batch.input_ids.shape, np.bool_)
    starts[:, :1] = True
    if batch.document_ids is not None:
        document_ids = batch.document_ids.numpy()
        starts[:, 1:] |= document_ids[:, 1:] != document_ids[:, :-1]
    if batch.lengths is not None:
        starts |= np.arange(starts.shape[1]) == batch.lengths.numpy()[:, None]
    return starts


def documents(batch: Batch) -> Iterator[tuple[int, int, int]]:
    """Row, start and stop of each document in the batch, row by row; padding is none."""
    starts = document_starts(batch)
    width = starts.shape[1]
    stops = np.full(len(starts), width) if batch.lengths is None else batch.lengths.numpy()
    for row, (row_starts, row_stop) in enumerate(zip(starts, stops.tolist(), strict=True)):
        bounds = [*np.flatnonzero(row_starts[:row_stop]).tolist(), row_stop]
        for start, stop in pairwise(bounds):
            yield row, start, stop
