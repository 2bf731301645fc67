"""Splits rows in memory into those that train and those that validate, by label; equal inputs stay together.

Shape letters: N rows of the data, G groups of rows with equal inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from xxhash import xxh3_64, xxh3_64_hexdigest

from distft.data.feed import AnyFeed, Feed
from distft.data.labelled_rows import RowTargets
from distft.data.sampler import Indices
from distft.data.targets import LABEL, LABELS, NUMBER
from distft.errors import ConfigError, DataError
from distft.keyed_random import row_keys

if TYPE_CHECKING:
    from distft.data.batch import Batch
    from distft.data.dataset import ClassNames, SequenceDataset
    from distft.data.split import SplitConfig

_CHUNK_ROWS = 1024  # read at a time
_MAX_SHOWN = 10  # labels in a message


class RowSubset:
    """Some rows of a dataset, in its order."""

    def __init__(self, rows: SequenceDataset, kept: Indices, summary: str) -> None:
        self._rows = rows
        self._kept = kept
        self.num_sequences = len(kept)
        self.summary = summary
        digest = xxh3_64_hexdigest(kept.tobytes())
        self.fingerprint = None if rows.fingerprint is None else f"{rows.fingerprint}-{digest}"

    def batch(self, indices: Indices) -> Batch:
        return self._rows.batch(self._kept[indices] if len(indices) else indices)


@dataclass(frozen=True, slots=True)
class _Table:
    """What a split needs to know of each row."""

    groups: Indices  # the first row whose inputs are equal to this row's
    strata: Indices  # a class; of several, the row's rarest; 0 for rows without classes
    targets: RowTargets | None  # classes or numbers


def split_feed(feed: AnyFeed, split: SplitConfig) -> tuple[Feed, Feed]:
    """See `SplitConfig.split`."""
    if not isinstance(feed, Feed) or len(feed.dataset_sizes) != 1:
        raise ConfigError(
            "validation.type=split takes rows off one file of data, and here are several: name validation "
            "data, or one file."
        )
    (rows,) = feed.datasets
    table = _read(rows)
    if split.num_folds is not None:
        is_held = fold_of_rows(table.groups, table.strata, split.num_folds, split.split_seed) == split.fold
    else:
        assert split.share is not None
        is_held = held_out_rows(table.groups, table.strata, split.share, split.split_seed)
    if not is_held.any() or is_held.all():
        num_groups = len(np.unique(table.groups))
        raise DataError(
            f"validation.type=split ({split.description}): nothing can be held out of {len(is_held):,} rows "
            f"with {num_groups:,} different inputs. Take more rows, or name validation data."
        )
    trains, validates = np.flatnonzero(~is_held), np.flatnonzero(is_held)
    notes = "".join(f"\n{note}" for note in _notes(table, is_held, feed.label_names))
    by_label = ", by label" if table.targets is not None and table.targets.kind == LABEL else ""
    line = f"{{}} of {len(is_held):,} rows {{}} ({split.description}{by_label})"
    train = _over(
        feed,
        RowSubset(rows, trains, f"{rows.summary}\n{line.format(f'{len(trains):,}', 'train')}{notes}"),
        table.targets,
        trains,
    )
    held = RowSubset(rows, validates, line.format(f"{len(validates):,}", "of the training data validate"))
    return train, _over(feed, held, table.targets, validates).once_in_order()


def _over(feed: Feed, rows: RowSubset, targets: RowTargets | None, kept: Indices) -> Feed:
    own = None if targets is None else RowTargets(targets.kind, targets.ids[kept])
    return feed.with_rows(
        rows,
        numbers=None if own is None else own.numbers,
        label_counts=None if own is None else own.label_counts,
    )


def fold_of_rows(groups: Indices, strata: Indices, num_folds: int, seed: int) -> Indices:
    """The fold of each row; within a stratum the folds have as many groups each, to one."""
    first_G, stratum_G, _ = _groups(groups, strata)
    order_G = _order(first_G, stratum_G, seed)
    folds = np.empty(len(groups), np.int64)
    folds[first_G[order_G]] = np.arange(len(order_G)) % num_folds
    return folds[groups]


def held_out_rows(groups: Indices, strata: Indices, share: float, seed: int) -> NDArray[np.bool_]:
    """Whether each row is held out: of each stratum `share` of its rows, to one, or to one group.

    A stratum of two groups or more has at least one on each side; that of one group is not held out.
    """
    first_G, stratum_G, size_G = _groups(groups, strata)
    order_G = _order(first_G, stratum_G, seed)
    bounds = np.flatnonzero(np.diff(stratum_G[order_G])) + 1
    is_held = np.zeros(len(groups), np.bool_)
    num_before = 0  # rows of earlier strata: roundings add up to that of all rows
    for own in np.split(order_G, bounds):
        sizes = size_G[own].tolist()
        num_rows = num_before + sum(sizes)
        chosen = _choose(sizes, round(share * num_rows) - round(share * num_before))
        is_held[first_G[own[chosen]]] = True
        num_before = num_rows
    return is_held[groups]


def _choose(sizes: Sequence[int], most: int) -> list[int]:
    """Groups of up to `most` rows, but one at least and all but one at most; none of a single group."""
    chosen, left = [], most
    for index, size in enumerate(sizes[:-1]):
        if size <= left:
            chosen.append(index)
            left -= size
    if not chosen and len(sizes) > 1:
        return [min(range(len(sizes)), key=sizes.__getitem__)]
    return chosen


def _groups(groups: Indices, strata: Indices) -> tuple[Indices, Indices, Indices]:
    """Of each group its first row, that row's stratum, and its number of rows."""
    first_G, size_G = np.unique(groups, return_counts=True)
    return first_G, strata[first_G], size_G


def _order(first_G: Indices, stratum_G: Indices, seed: int) -> Indices:
    """The groups stratum by stratum, in each by a random number of the seed and the group's first row."""
    keys_G = row_keys(seed, torch.from_numpy(first_G)).numpy()
    return np.lexsort((keys_G, stratum_G))


def _read(rows: SequenceDataset) -> _Table:
    hashes: list[int] = []
    ids: list[Indices] = []
    kinds: set[str] = set()
    for start in range(0, rows.num_sequences, _CHUNK_ROWS):
        batch = rows.batch(np.arange(start, min(start + _CHUNK_ROWS, rows.num_sequences)))
        hashes += _hashes(batch)
        kind = next((kind for kind in (LABEL, LABELS, NUMBER) if kind in batch.targets), "")
        if kind:
            kinds.add(kind)
            ids.append(batch.targets[kind][:: batch.rows_per_sequence].numpy())
    _, first, inverse = np.unique(np.array(hashes, np.uint64), return_index=True, return_inverse=True)
    groups, strata = first[inverse].astype(np.int64), np.zeros(len(hashes), np.int64)
    if not ids:
        return _Table(groups, strata, None)
    (kind,), values = kinds, np.concatenate(ids)
    if kind == LABELS:
        return _Table(groups, _rarest(values), None)
    if kind == NUMBER:
        return _Table(groups, strata, RowTargets(NUMBER, values.view(np.int64)))
    return _Table(groups, values, RowTargets(LABEL, values))


def _rarest(has_label_NK: Indices) -> Indices:
    """Of each row that of its labels which the fewest rows have; -1: it has none."""
    counts_K = has_label_NK.sum(axis=0)
    counts_NK = np.where(has_label_NK > 0, counts_K, np.iinfo(np.int64).max)
    return np.where(has_label_NK.any(axis=1), counts_NK.argmin(axis=1), -1).astype(np.int64)


def _hashes(batch: Batch) -> list[int]:
    """Of the inputs of each sequence: the tokens of its rows, and its image."""
    ids, per_sequence = batch.input_ids.numpy().astype(np.int32), batch.rows_per_sequence
    lengths = [ids.shape[1]] * len(ids) if batch.lengths is None else batch.lengths.tolist()
    found = []
    for first in range(0, len(ids), per_sequence):
        digest = xxh3_64()
        for row in range(first, first + per_sequence):
            digest.update(lengths[row].to_bytes(8, "little") + ids[row, : lengths[row]].tobytes())
        if batch.images is not None:
            digest.update(batch.images[first].numpy().tobytes())
        found.append(digest.intdigest())
    return found


def _notes(table: _Table, is_held: NDArray[np.bool_], label_names: ClassNames | None) -> list[str]:
    """On equal inputs, and on labels that are on one side alone."""
    notes = []
    if num_equal := len(table.groups) - len(np.unique(table.groups)):
        notes.append(f"{num_equal:,} rows equal an earlier one, and are on the side of that one")
    targets = table.targets
    if targets is None or targets.kind != LABEL or label_names is None:
        return notes
    counts = [np.bincount(targets.ids[side], minlength=len(label_names)) for side in (~is_held, is_held)]
    for (own, other), where in zip((counts, counts[::-1]), ("training", "validation"), strict=True):
        alone = [repr(label_names[i]) for i in np.flatnonzero((own > 0) & (other == 0))]
        if alone:
            more = f" and {len(alone) - _MAX_SHOWN:,} more" if len(alone) > _MAX_SHOWN else ""
            notes.append(
                f"in {where} alone, for want of different rows: the label{'s' * (len(alone) > 1)} "
                f"{', '.join(alone[:_MAX_SHOWN])}{more}"
            )
    return notes
