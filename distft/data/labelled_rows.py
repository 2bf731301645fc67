"""Labelled texts in memory, encoded: the rows that `LabelledConfig` builds."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from xxhash import xxh3_64_hexdigest

from distft.data.batch import Batch, RaggedArray
from distft.data.records import Record, RowErrors
from distft.data.sampler import Indices
from distft.data.targets import IGNORE_INDEX, LABEL

LABEL_IDS = "label_ids"  # a column of encoded rows
_MAX_SHOWN = 20  # labels in a description


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


def describe(
    path: str,
    names: LabelNames,
    label_ids: Indices,
    text_lengths: Sequence[int],
    *,
    max_tokens: int,
    seq_len: int,
) -> str:
    """Lines about labelled texts before training: labels with their counts, and lengths in tokens.

    `text_lengths` has the tokens of each row's texts, of which `max_tokens` fit into `seq_len`.
    """
    counts = np.bincount(label_ids, minlength=len(names.names))
    most_first = np.argsort(-counts, kind="stable")
    shown = ", ".join(f"{names.names[i]!r} {counts[i]:,}" for i in most_first[:_MAX_SHOWN])
    if len(counts) > _MAX_SHOWN:
        rest = counts[most_first[_MAX_SHOWN:]]
        shown += f", and {len(rest):,} more with {rest.min():,} to {rest.max():,}"
    median, most = np.quantile(text_lengths, [0.5, 0.95], method="higher")
    num_cut = int(np.count_nonzero(np.asarray(text_lengths) > max_tokens))
    lines = [
        f"{len(label_ids):,} rows, {len(counts):,} labels, {num_cut:,} cut to seq_len={seq_len}",
        f"labels: {shown}",
        f"tokens of a text: median {median:,}, 95 % at most {most:,}, longest {max(text_lengths):,}",
    ]
    rare = [repr(names.names[i]) for i in np.flatnonzero(counts == 1)]
    if rare:
        more = f" and {len(rare) - _MAX_SHOWN:,} more" if len(rare) > _MAX_SHOWN else ""
        lines.append(f"once only: the label{'s' * (len(rare) > 1)} {', '.join(rare[:_MAX_SHOWN])}{more}")
    return "\n".join(f"{path}: {line}" for line in lines)


def truncate_pair(first: list[int], second: list[int], max_tokens: int) -> tuple[list[int], list[int]]:
    """Truncate two token lists at the end to `max_tokens` in total, the longer one first."""
    half = max_tokens // 2
    keep_second = min(len(second), max(half, max_tokens - len(first)))
    return first[: max_tokens - keep_second], second[:keep_second]
