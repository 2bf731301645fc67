"""Labelled texts: what a classification is trained and measured on."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from distft.config import Settings
from distft.data.batch import IGNORE_INDEX, Batch
from distft.data.dataset import DataContext, check_vocabulary
from distft.data.feed import Feed
from distft.data.order import Indices
from distft.data.ragged import RaggedRows
from distft.data.records import Faults, Record, read_records
from distft.errors import DataError


@dataclass(frozen=True, slots=True)
class LabelNames:
    """The classes of a classification: the id of a name is its place. Kept with the checkpoint."""

    names: tuple[str, ...]

    @classmethod
    def from_labels(cls, labels: Iterable[str]) -> "LabelNames":
        """The different labels in order: as numbers where all are whole numbers, as text otherwise."""
        unique = set(labels)
        if all(label.removeprefix("-").isdecimal() for label in unique):
            return cls(tuple(sorted(unique, key=lambda label: (int(label), label))))
        return cls(tuple(sorted(unique)))

    def ids(self, records: Sequence[Record], column: str, faults: Faults) -> Indices:
        """The class of each record; a label that is none of the names is a fault, told at its first line."""
        known = {name: i for i, name in enumerate(self.names)}
        for record in records:
            label = record.values[column]
            if label not in known:
                known[label] = IGNORE_INDEX
                faults.add(record.line, self._unseen(label))
        return np.array([known[record.values[column]] for record in records], np.int64)

    def _unseen(self, label: str) -> str:
        near = difflib.get_close_matches(label, self.names, n=1)
        shown = ", ".join(map(repr, self.names[:10])) + (", ..." if len(self.names) > 10 else "")
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return (
            f"label {label!r} is none of the {len(self.names)} that the model was trained on: {shown}.{hint}"
        )


class LabelledRows:
    """One text and one label a row, encoded once and kept in memory.

    Batches are padded on the right to their longest row; `labels` is [B] and every row counts as one target.
    """

    def __init__(
        self, rows: RaggedRows, label_ids: Indices, *, pad_id: int = 0, summary: str = "labelled rows"
    ) -> None:
        self._rows = rows
        self._label_ids = label_ids
        self._pad_id = pad_id
        self.num_sequences = len(rows)
        self.summary = summary

    def batch(self, indices: Indices) -> Batch:
        """Rows `indices`; without any, row 0 with nothing that counts."""
        rows = indices if len(indices) else np.zeros(1, np.int64)
        labels = self._label_ids[rows] if len(indices) else np.full(1, IGNORE_INDEX, np.int64)
        return Batch(
            input_ids=torch.from_numpy(self._rows.padded(rows, self._pad_id)),
            labels=torch.from_numpy(labels),
            num_target_tokens=len(indices),
            lengths=torch.from_numpy(self._rows.lengths(rows)),
        )


class LabelledConfig(Settings):
    """A JSONL or CSV file with a column of texts and one of labels."""

    type: Literal["labelled"] = "labelled"
    path: str  # .jsonl, .csv or .tsv; may be compressed
    text: str = "text"  # column
    text_pair: str | None = None  # column of a second text, which follows the first
    label: str = "label"  # column
    max_rows: int | None = Field(None, ge=1)
    shuffle: bool = True
    data_seed: int = Field(0, ge=0)

    def build(self, context: DataContext) -> Feed:
        """Endless epochs for training. Labels get their ids here, unless the context already names them."""
        rows, names = self.open(context)
        return Feed.endless(rows, seed=self.data_seed, shuffle=self.shuffle, label_names=names.names)

    def build_in_order(self, context: DataContext) -> Feed:
        """Every row once, in file order, for an evaluation."""
        rows, names = self.open(context)
        return Feed.in_order(rows, label_names=names.names)

    def open(self, context: DataContext) -> tuple[LabelledRows, LabelNames]:
        """Read and encode the file. Raises `DataError` with file and line for all that is wrong in it."""
        texts = [self.text] if self.text_pair is None else [self.text, self.text_pair]
        records = read_records(self.path, texts=texts, labels=[self.label], max_rows=self.max_rows)
        if context.label_names is None:
            names = LabelNames.from_labels(record.values[self.label] for record in records)
        else:
            names = LabelNames(context.label_names)
        if len(names.names) < 2:
            raise DataError(
                f"{self.path}: column {self.label!r} has the one label {names.names[0]!r} "
                f"in all of {len(records):,} rows; there is nothing to tell apart."
            )
        faults = Faults(self.path)
        label_ids = names.ids(records, self.label, faults)
        rows, num_cut = self._encoded(records, context, faults)
        faults.raise_if_any()
        check_vocabulary(self.path, rows.largest, context)
        summary = (
            f"{self.path}: {len(records):,} rows, {len(names.names)} labels, "
            f"{num_cut:,} cut to seq_len={context.seq_len}"
        )
        return LabelledRows(rows, label_ids, pad_id=context.pad_id or 0, summary=summary), names

    def _encoded(
        self, records: Sequence[Record], context: DataContext, faults: Faults
    ) -> tuple[RaggedRows, int]:
        """Token rows of at most `seq_len`, of which the second number had to be cut."""
        separator: list[int] = []
        if self.text_pair is not None:
            separator = [context.eos_id] if context.eos_id is not None else context.encode("\n")
            separator = separator[: max(context.seq_len - 2, 0)]
        rows = []
        num_cut = 0
        for record in records:
            first = context.encode(record.values[self.text])
            second = context.encode(record.values[self.text_pair]) if self.text_pair is not None else []
            for column, ids in ((self.text, first), (self.text_pair, second)):
                if column is not None and not ids:
                    faults.add(record.line, f"{column!r} is empty once it is encoded.")
            room = context.seq_len - len(separator)
            num_cut += len(first) + len(second) > room
            first, second = heads(first, second, room)
            rows.append(first + separator + second)
        return RaggedRows(rows), num_cut


def heads(first: list[int], second: list[int], room: int) -> tuple[list[int], list[int]]:
    """The beginnings of two texts that fit in `room` together: the longer one gives way first."""
    half = room // 2
    keep_second = min(len(second), max(half, room - len(first)))
    return first[: room - keep_second], second[:keep_second]
