"""Labelled texts in memory, encoded: the rows that `LabelledConfig` builds."""

import difflib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from xxhash import xxh3_64_hexdigest

from distft.data.batch import Batch, RaggedArray
from distft.data.dataset import NumberSpread
from distft.data.records import Record, RowErrors
from distft.data.sampler import Indices
from distft.data.targets import IGNORE_INDEX, LABEL, LABELS, NUMBER, ROW

LABEL_IDS = "label_ids"  # a column of encoded rows: the `ids` of `RowTargets`
SECOND_STARTS = "second_starts"  # a column of encoded rows: where the second text begins, or the row ends
_MAX_SHOWN = 20  # labels in a description
_MOST_DIGITS = 640  # of a label that is sorted as an integer: Python may be set to refuse longer ones


@dataclass(frozen=True, slots=True)
class LabelNames:
    """Class names by id. Checkpoints store them."""

    names: tuple[str, ...]

    @classmethod
    def from_labels(cls, labels: Iterable[str]) -> "LabelNames":
        """The distinct labels, sorted as integers if all are integers of up to 640 digits, else as text."""
        unique = set(labels)
        if all(x.removeprefix("-").isdecimal() and len(x) <= _MOST_DIGITS for x in unique):
            return cls(tuple(sorted(unique, key=lambda label: (int(label), label))))
        return cls(tuple(sorted(unique)))

    def ids(self, records: Sequence[Record], column: str, errors: RowErrors) -> Indices:
        """The class id of each record; adds an error for each record with an unknown label."""
        known = {name: i for i, name in enumerate(self.names)}
        messages: dict[str, str] = {}
        for record in records:
            self._check(record.values[column], record.line, known, messages, errors)
        ids = [known.get(record.values[column], IGNORE_INDEX) for record in records]
        return np.array(ids, np.int64)

    def sets(
        self, records: Sequence[Record], column: str, errors: RowErrors
    ) -> tuple[Indices, list[list[int]]]:
        """Of each record the number of its set of classes, and these sets; errors as `ids` adds them."""
        known = {name: i for i, name in enumerate(self.names)}
        numbers: dict[tuple[int, ...], int] = {}
        messages: dict[str, str] = {}
        of_records = []
        for record in records:
            labels = json.loads(record.values[column])
            for label in labels:
                self._check(label, record.line, known, messages, errors)
            classes = tuple(sorted(known.get(label, IGNORE_INDEX) for label in labels))
            of_records.append(numbers.setdefault(classes, len(numbers)))
        return np.array(of_records, np.int64), [list(classes) for classes in numbers]

    def _check(
        self, label: str, line: int, known: dict[str, int], messages: dict[str, str], errors: RowErrors
    ) -> None:
        if label not in known:
            if label not in messages:  # a search for a similar name in each of many rows takes long
                messages[label] = self.unknown_label_message(label)
            errors.add(line, messages[label])

    def unknown_label_message(self, label: str) -> str:
        """The message for a label that is none of the names."""
        similar = difflib.get_close_matches(label, self.names, n=1)
        shown = ", ".join(map(repr, self.names[:10])) + (", ..." if len(self.names) > 10 else "")
        hint = f" Did you mean {similar[0]!r}?" if similar else ""
        return (
            f"label {label!r} is not one of the {len(self.names)} that the model was trained on: "
            f"{shown}.{hint}"
        )


@dataclass(frozen=True, slots=True)
class RowTargets:
    """What each row has as its target, in one integer a row."""

    kind: str  # LABEL, LABELS, NUMBER, or ROW for rows without labels
    ids: Indices  # of a class, of a set of classes, or the bits of a float64; of no meaning without labels
    label_sets: Tensor | None = None  # int64 [S, K], for LABELS: 1 for each class in a set

    @classmethod
    def of_sets(cls, ids: Indices, label_sets: Sequence[Sequence[int]], num_labels: int) -> "RowTargets":
        """`label_sets` has the classes of each set."""
        table = torch.zeros(len(label_sets), num_labels, dtype=torch.int64)
        for number, classes in enumerate(label_sets):
            table[number, list(classes)] = 1
        return cls(LABELS, ids, table)

    def batch(self, rows: Indices) -> dict[str, Tensor]:
        """Targets of `rows`, by name."""
        ids = torch.from_numpy(self.ids[rows])
        if self.kind == LABEL:
            return {LABEL: ids}
        if self.label_sets is not None:
            return {LABELS: self.label_sets[ids]}
        # Any number may be a target, IGNORE_INDEX too, so that another target says which rows count.
        counts = {ROW: torch.zeros(len(rows), dtype=torch.int64)}
        return counts if self.kind == ROW else {NUMBER: ids.view(torch.float64), **counts}

    @property
    def label_counts(self) -> list[int] | None:
        """Rows of each class up to the last that occurs; None: the targets are not one class a row."""
        return np.bincount(self.ids[self.ids >= 0]).tolist() if self.kind == LABEL else None

    @property
    def numbers(self) -> NumberSpread | None:
        """How the numbers are spread, to the last bit on any machine; None: the targets are no numbers."""
        if self.kind != NUMBER:
            return None
        numbers = self.ids.view(np.float64)
        mean = math.fsum(numbers) / len(numbers)
        variance = math.fsum(np.square(numbers - mean)) / len(numbers)
        least, most = float(numbers.min()), float(numbers.max())
        deviation = math.sqrt(variance) if least < most else 0.0  # the mean of equal numbers may be rounded
        return NumberSpread(least=least, most=most, mean=mean, deviation=deviation)

    @property
    def fingerprint(self) -> str:
        """Of the classes or numbers of all rows; empty without labels."""
        if self.kind == ROW:
            return ""
        sets = b"" if self.label_sets is None else self.label_sets.numpy().tobytes()
        return f"-{xxh3_64_hexdigest(self.ids.tobytes() + sets)}"


class LabelledRows:
    """One text with its target, if it has one, per row, encoded once and kept in memory.

    Batches are padded on the right to their longest row.
    """

    def __init__(
        self,
        rows: RaggedArray,
        targets: RowTargets | Indices,  # ids of classes, or other targets
        *,
        second_starts: Indices | None = None,  # makes segment ids: 1 from there on
        pad_id: int = 0,
        summary: str = "labelled rows",
    ) -> None:
        self._rows = rows
        self._second_starts = second_starts
        self._targets = targets if isinstance(targets, RowTargets) else RowTargets(LABEL, targets)
        self._pad_id = pad_id
        self.num_sequences = len(rows)
        self.summary = summary
        self.fingerprint = rows.fingerprint + self._targets.fingerprint
        self.numbers = self._targets.numbers
        self.label_counts = self._targets.label_counts

    def batch(self, indices: Indices) -> Batch:
        """Rows `indices`; for empty `indices`, row 0 without targets."""
        if not len(indices):
            return self.batch(np.zeros(1, np.int64)).without_targets()
        targets = self._targets.batch(indices)
        return Batch(
            input_ids=torch.from_numpy(self._rows.padded(indices, self._pad_id)),
            targets=targets,
            num_targets=dict.fromkeys(targets, len(indices)),
            segment_ids=self._segment_ids(indices),
            lengths=torch.from_numpy(self._rows.lengths(indices)),
        )

    def _segment_ids(self, indices: Indices) -> Tensor | None:
        if self._second_starts is None:
            return None
        starts, lengths = self._second_starts[indices], self._rows.lengths(indices)
        return segment_ids(starts, lengths)


def segment_ids(second_starts: Indices, lengths: Indices) -> Tensor:
    """int64 [B, T], T the greatest length: 1 for the tokens from `second_starts` to the row's end, else 0."""
    columns = np.arange(lengths.max())
    is_second = (columns >= second_starts[:, None]) & (columns < lengths[:, None])
    return torch.from_numpy(is_second.astype(np.int64))


def describe(
    path: str,
    label_lines: Sequence[str],
    text_lengths: Sequence[int],
    *,
    max_tokens: int,
    seq_len: int,
) -> str:
    """Lines about texts before training: their number and lengths in tokens, and `label_lines`.

    The first of `label_lines` says how many labels there are, the others tell of them. `text_lengths` has the
    tokens of each row's texts, of which `max_tokens` fit into `seq_len`.
    """
    median, most = np.quantile(text_lengths, [0.5, 0.95], method="higher")
    num_cut = int(np.count_nonzero(np.asarray(text_lengths) > max_tokens))
    first, *others = label_lines
    lines = [
        f"{len(text_lengths):,} rows, {first}, {num_cut:,} cut to seq_len={seq_len}",
        *others[:1],
        f"tokens of a text: median {median:,}, 95 % at most {most:,}, longest {max(text_lengths):,}",
        *others[1:],
    ]
    return "\n".join(f"{path}: {line}" for line in lines)


def describe_labels(names: LabelNames, counts: Indices) -> list[str]:
    """`label_lines` for `describe`: `counts` has the number of rows of each label."""
    most_first = np.argsort(-counts, kind="stable")
    shown = ", ".join(f"{names.names[i]!r} {counts[i]:,}" for i in most_first[:_MAX_SHOWN])
    if len(counts) > _MAX_SHOWN:
        rest = counts[most_first[_MAX_SHOWN:]]
        shown += f", and {len(rest):,} more with {rest.min():,} to {rest.max():,}"
    lines = [f"{len(counts):,} labels", f"labels: {shown}"]
    rare = [repr(names.names[i]) for i in np.flatnonzero(counts == 1)]
    if rare:
        more = f" and {len(rare) - _MAX_SHOWN:,} more" if len(rare) > _MAX_SHOWN else ""
        lines.append(f"once only: the label{'s' * (len(rare) > 1)} {', '.join(rare[:_MAX_SHOWN])}{more}")
    return lines


def describe_numbers(numbers: Sequence[float]) -> list[str]:
    """`label_lines` for `describe`."""
    spread = f"{min(numbers):g} to {max(numbers):g}, mean {np.mean(numbers):.4g}, deviation"
    return ["numbers as labels", f"numbers: {spread} {np.std(numbers):.4g}"]


def truncate_pair(first: list[int], second: list[int], max_tokens: int) -> tuple[list[int], list[int]]:
    """Truncate two token lists at the end to `max_tokens` in total, the longer one first."""
    half = max_tokens // 2
    keep_second = min(len(second), max(half, max_tokens - len(first)))
    return first[: max_tokens - keep_second], second[:keep_second]
