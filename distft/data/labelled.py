"""Labelled texts for classification."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from xxhash import xxh3_64_hexdigest

from distft.config import Settings
from distft.data.batch import IGNORE_INDEX, LABEL, Batch, RaggedArray
from distft.data.dataset import DataContext, check_vocabulary
from distft.data.feed import Feed
from distft.data.records import Record, RowErrors, read_records
from distft.data.sampler import Indices
from distft.errors import DataError


@dataclass(frozen=True, slots=True)
class LabelNames:
    """Class names by id. Checkpoints store them."""

    names: tuple[str, ...]

    @classmethod
    def from_labels(cls, labels: Iterable[str]) -> "LabelNames":
        """The distinct labels, sorted as integers if all are integers, else as text."""
        unique = set(labels)
        if all(label.removeprefix("-").isdecimal() for label in unique):
            return cls(tuple(sorted(unique, key=lambda label: (int(label), label))))
        return cls(tuple(sorted(unique)))

    def ids(self, records: Sequence[Record], column: str, errors: RowErrors) -> Indices:
        """The class id of each record; adds one error for each unknown label, at its first line."""
        known = {name: i for i, name in enumerate(self.names)}
        for record in records:
            label = record.values[column]
            if label not in known:
                known[label] = IGNORE_INDEX
                errors.add(record.line, self._unknown_label_message(label))
        return np.array([known[record.values[column]] for record in records], np.int64)

    def _unknown_label_message(self, label: str) -> str:
        similar = difflib.get_close_matches(label, self.names, n=1)
        shown = ", ".join(map(repr, self.names[:10])) + (", ..." if len(self.names) > 10 else "")
        hint = f" Did you mean {similar[0]!r}?" if similar else ""
        return (
            f"label {label!r} is not one of the {len(self.names)} that the model was trained on: "
            f"{shown}.{hint}"
        )


class LabelledRows:
    """One text and one label per row, encoded once and kept in memory.

    Batches are padded on the right to their longest row; every row has one target, `label`.
    """

    def __init__(
        self, rows: RaggedArray, label_ids: Indices, *, pad_id: int = 0, summary: str = "labelled rows"
    ) -> None:
        self._rows = rows
        self._label_ids = label_ids
        self._pad_id = pad_id
        self.num_sequences = len(rows)
        self.summary = summary
        self.fingerprint = f"{rows.fingerprint}-{xxh3_64_hexdigest(label_ids.tobytes())}"

    def batch(self, indices: Indices) -> Batch:
        """Rows `indices`; for empty `indices`, row 0 without targets."""
        rows = indices if len(indices) else np.zeros(1, np.int64)
        labels = self._label_ids[rows] if len(indices) else np.full(1, IGNORE_INDEX, np.int64)
        return Batch(
            input_ids=torch.from_numpy(self._rows.padded(rows, self._pad_id)),
            targets={LABEL: torch.from_numpy(labels)},
            num_targets={LABEL: len(indices)},
            lengths=torch.from_numpy(self._rows.lengths(rows)),
        )


class LabelledConfig(Settings):
    """A JSONL or CSV file with a text column and a label column."""

    type: Literal["labelled"] = "labelled"
    path: str  # .jsonl, .csv or .tsv; may be compressed
    text: str = "text"  # column
    text_pair: str | None = None  # column of a second text, appended to the first
    label: str = "label"  # column
    max_rows: int | None = Field(None, ge=1)
    shuffle: bool = True
    data_seed: int = Field(0, ge=0)

    def build(self, context: DataContext) -> Feed:
        """Infinite epochs for training. Labels get their ids here unless `context` has label names."""
        rows, names = self.open(context)
        return Feed.for_training(rows, seed=self.data_seed, shuffle=self.shuffle, label_names=names.names)

    def build_for_evaluation(self, context: DataContext) -> Feed:
        """Every row once, in file order."""
        rows, names = self.open(context)
        return Feed.for_evaluation(rows, label_names=names.names)

    def open(self, context: DataContext) -> tuple[LabelledRows, LabelNames]:
        """Read and encode the file. Raises `DataError` with file and line of every problem."""
        texts = [self.text] if self.text_pair is None else [self.text, self.text_pair]
        records = read_records(self.path, texts=texts, labels=[self.label], max_rows=self.max_rows)
        if context.label_names is None:
            names = LabelNames.from_labels(record.values[self.label] for record in records)
        else:
            names = LabelNames(context.label_names)
        if len(names.names) < 2:
            raise DataError(
                f"{self.path}: column {self.label!r} has only one label, {names.names[0]!r}, "
                f"in {len(records):,} rows: a classification needs two or more."
            )
        errors = RowErrors(self.path)
        label_ids = names.ids(records, self.label, errors)
        rows, num_truncated = self._encode_records(records, context, errors)
        errors.raise_if_any()
        check_vocabulary(self.path, rows.max_value, context)
        summary = (
            f"{self.path}: {len(records):,} rows, {len(names.names)} labels, "
            f"{num_truncated:,} cut to seq_len={context.seq_len}"
        )
        return LabelledRows(rows, label_ids, pad_id=context.pad_id or 0, summary=summary), names

    def _encode_records(
        self, records: Sequence[Record], context: DataContext, errors: RowErrors
    ) -> tuple[RaggedArray, int]:
        """Token rows of at most `seq_len`, and how many of them were truncated."""
        separator: list[int] = []
        if self.text_pair is not None:
            separator = [context.eos_id] if context.eos_id is not None else context.encode("\n")
            separator = separator[: max(context.seq_len - 2, 0)]
        max_tokens = context.seq_len - len(separator)
        rows = []
        num_truncated = 0
        for record in records:
            first = context.encode(record.values[self.text])
            second = context.encode(record.values[self.text_pair]) if self.text_pair is not None else []
            for column, ids in ((self.text, first), (self.text_pair, second)):
                if column is not None and not ids:
                    errors.add(record.line, f"{column!r} encodes to no tokens.")
            num_truncated += len(first) + len(second) > max_tokens
            first, second = truncate_pair(first, second, max_tokens)
            rows.append(first + separator + second)
        return RaggedArray(rows), num_truncated


def truncate_pair(first: list[int], second: list[int], max_tokens: int) -> tuple[list[int], list[int]]:
    """Truncate two token lists at the end to `max_tokens` in total, the longer one first."""
    half = max_tokens // 2
    keep_second = min(len(second), max(half, max_tokens - len(first)))
    return first[: max_tokens - keep_second], second[:keep_second]
