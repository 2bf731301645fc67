"""Settings of texts with a class, several classes or a number each, or without labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from distft.config import PathText, Settings
from distft.data.dataset import ClassNames, DataContext, TextTemplate, check_vocabulary
from distft.data.targets import LABEL, LABELS, NUMBER, ROW
from distft.errors import ConfigError, DataError

if TYPE_CHECKING:
    from distft.data.batch import RaggedArray
    from distft.data.encoded_once import EncodedTable
    from distft.data.feed import Feed
    from distft.data.labelled_rows import LabelledRows, LabelNames, RowTargets
    from distft.data.records import Record, RowErrors
    from distft.data.sampler import Indices


_MOST_NUMBER = 3.4028234663852886e38  # the largest float32


class LabelledConfig(Settings):
    """A JSONL or CSV file with a text column and a label column; with `label: null`, of unlabelled texts."""

    type: Literal["labelled"] = "labelled"
    path: PathText  # .jsonl, .csv or .tsv, which may be compressed, or .parquet
    text: str = "text"  # column
    text_pair: str | None = None  # column of a second text, appended to the first
    label: str | None = "label"  # column; null: the rows are unlabelled
    labels: Literal["one", "several", "number"] = "one"  # what that column has: classes, or a number
    label_separator: str = Field(
        ",", min_length=1
    )  # labels=several: between the labels of a text; JSONL may have lists
    max_rows: int | None = Field(None, ge=1)
    shuffle: bool = True
    data_seed: int = Field(0, ge=0)

    def build(self, context: DataContext) -> Feed:
        """Infinite epochs for training. Labels get their ids here unless `context` has label names."""
        from distft.data.feed import Feed

        rows, names = self.open(context)
        return Feed.for_training(
            rows,
            seed=self.data_seed,
            shuffle=self.shuffle,
            label_names=names,
            document_start=None if context.template is None else context.template.before,
            numbers=rows.numbers,
            label_counts=rows.label_counts,
        )

    def build_for_evaluation(self, context: DataContext) -> Feed:
        """Every row once, in file order."""
        from distft.data.feed import Feed

        rows, names = self.open(context)
        return Feed.for_evaluation(rows, label_names=names, numbers=rows.numbers)

    def open(self, context: DataContext) -> tuple[LabelledRows, ClassNames | None]:
        """Read and encode the file: the rows, and the names of their classes, if they have classes.

        Raises `DataError` with file and line of every problem.
        """
        from distft.data.encoded_once import encoded_once
        from distft.data.labelled_rows import LABEL_IDS, SECOND_STARTS, LabelledRows

        settings = {
            **self.model_dump(exclude={"shuffle", "data_seed"}),
            "seq_len": context.seq_len,
            "vocab_size": context.vocab_size,
            "tokenizer": context.tokenizer_fingerprint,
            "eos_id": context.eos_id,
            "template": None if context.template is None else asdict(context.template),
            "label_names": context.label_names,
        }
        table = encoded_once(context.cache_dir, self.path, settings, lambda: self._encode(context))
        found = table.facts["label_names"]
        names = None if found is None else tuple(found)
        targets = self._targets(table.columns[LABEL_IDS], table.facts["label_sets"], names)
        summary = table.facts["summary"]
        has_segments = context.has_segments and self.text_pair is not None
        rows = LabelledRows(
            table.rows,
            targets,
            second_starts=table.columns[SECOND_STARTS] if has_segments else None,
            pad_id=context.pad_id or 0,
            summary=summary,
        )
        return rows, names

    def _targets(
        self, ids: Indices, label_sets: Sequence[Sequence[int]], names: ClassNames | None
    ) -> RowTargets:
        from distft.data.labelled_rows import RowTargets

        if self._kind == LABELS:
            assert names is not None
            return RowTargets.of_sets(ids, label_sets, len(names))
        return RowTargets(self._kind, ids)

    @property
    def _kind(self) -> str:
        """The name of the targets."""
        return ROW if self.label is None else {"one": LABEL, "several": LABELS, "number": NUMBER}[self.labels]

    def _encode(self, context: DataContext) -> EncodedTable:
        from distft.data.encoded_once import EncodedTable
        from distft.data.labelled_rows import LABEL_IDS, SECOND_STARTS, describe
        from distft.data.records import RowErrors

        errors = RowErrors(self.path)
        records = self._read(errors)
        label_ids, facts, label_lines = self._encode_labels(records, context, errors)
        rows, second_starts, text_lengths, max_tokens = self._encode_records(records, context, errors)
        errors.raise_if_any()
        self._check_label_names(facts["label_names"], len(records), context)
        check_vocabulary(self.path, rows.max_value, context)
        facts["summary"] = describe(
            self.path, label_lines, text_lengths, max_tokens=max_tokens, seq_len=context.seq_len
        )
        columns = {LABEL_IDS: label_ids, SECOND_STARTS: second_starts}
        return EncodedTable(rows=rows, columns=columns, facts=facts)

    def _read(self, errors: RowErrors) -> list[Record]:
        from distft.data.records import read_records

        labels = [] if self.label is None else [self.label]
        return read_records(
            self.path,
            texts=[self.text] if self.text_pair is None else [self.text, self.text_pair],
            labels=labels if self._kind == LABEL else [],
            label_lists=labels if self._kind == LABELS else [],
            numbers=labels if self._kind == NUMBER else [],
            separator=self.label_separator,
            max_rows=self.max_rows,
            errors=errors,
        )

    def _encode_labels(
        self, records: Sequence[Record], context: DataContext, errors: RowErrors
    ) -> tuple[Indices, dict[str, Any], list[str]]:
        """The `ids` of `RowTargets`, the names and sets of the classes, and lines about them."""
        import numpy as np

        from distft.data.labelled_rows import describe_labels, describe_numbers

        facts: dict[str, Any] = {"label_names": None, "label_sets": []}
        if self.label is None:
            return np.zeros(len(records), np.int64), facts, ["unlabelled"]
        if self._kind == NUMBER:
            numbers = [float(record.values[self.label]) for record in records]
            for record, number in zip(records, numbers, strict=True):
                if abs(number) > _MOST_NUMBER:
                    errors.add(
                        record.line,
                        f"{self.label!r} is {number:g}, which float32 cannot hold: use another unit.",
                    )
            known = [number for number in numbers if abs(number) <= _MOST_NUMBER]
            return np.array(numbers, np.float64).view(np.int64), facts, describe_numbers(known or [0.0])
        names = self._label_names(records, context)
        facts["label_names"] = names.names
        if self._kind == LABEL:
            ids = names.ids(records, self.label, errors)
            counts = np.bincount(ids[ids >= 0], minlength=len(names.names))
        else:
            ids, facts["label_sets"] = names.sets(records, self.label, errors)
            counts = np.zeros(len(names.names), np.int64)
            for classes, count in zip(facts["label_sets"], np.bincount(ids).tolist(), strict=True):
                counts[[c for c in classes if c >= 0]] += count
        return ids, facts, describe_labels(names, counts)

    def _label_names(self, records: Sequence[Record], context: DataContext) -> LabelNames:
        import json

        from distft.data.labelled_rows import LabelNames

        assert self.label is not None
        if context.label_names is not None:
            assert isinstance(context.label_names, tuple)  # of this stream
            return LabelNames(context.label_names)
        if self._kind == LABELS:
            return LabelNames.from_labels(
                label for record in records for label in json.loads(record.values[self.label])
            )
        return LabelNames.from_labels(record.values[self.label] for record in records)

    def _check_label_names(self, names: Sequence[str] | None, num_rows: int, context: DataContext) -> None:
        """Raise `DataError` for too few labels in training data."""
        if names is None or context.label_names is not None:
            return
        if not names:
            raise DataError(f"{self.path}: no row has a label in {self.label!r}: all lists are empty.")
        if self._kind == LABEL and len(names) < 2:
            raise DataError(
                f"{self.path}: column {self.label!r} has only one label, {names[0]!r}, in {num_rows:,} rows: "
                "a classification needs two or more."
            )

    def _encode_records(
        self, records: Sequence[Record], context: DataContext, errors: RowErrors
    ) -> tuple[RaggedArray, Indices, list[int], int]:
        """Token rows of at most `seq_len`, where the second text of each begins (without one, where it ends),
        the tokens of each row's texts, and how many of them fit.
        """
        import numpy as np

        from distft.data.batch import RaggedArray
        from distft.data.labelled_rows import truncate_pair

        template = self._template(context)
        num_marks = template.num_marks + len(template.between)
        max_tokens = context.seq_len - num_marks
        rows, starts, lengths = [], [], []
        for record in records:
            first = context.encode(record.values[self.text])
            second = context.encode(record.values[self.text_pair]) if self.text_pair is not None else []
            for column, ids in ((self.text, first), (self.text_pair, second)):
                if column is not None and not ids:
                    errors.add(record.line, f"{column!r} encodes to no tokens.")
            lengths.append(len(first) + len(second))
            first, second = truncate_pair(first, second, max_tokens)
            row = template.pair(first, second)
            rows.append(row)
            starts.append(len(row) if self.text_pair is None else template.second_start(first))
        return RaggedArray(rows), np.array(starts, np.int64), lengths, max_tokens

    def _template(self, context: DataContext) -> TextTemplate:
        """Raises `ConfigError` if a row has no room for its texts."""
        template = context.template or TextTemplate()
        if self.text_pair is None:
            template = replace(template, between=())
        elif context.template is None:
            between = [context.eos_id] if context.eos_id is not None else context.encode("\n")
            template = TextTemplate(between=tuple(between))
        num_texts = 1 if self.text_pair is None else 2
        least = template.num_marks + len(template.between) + num_texts
        if context.seq_len < least:
            texts = repr(self.text) if num_texts == 1 else f"{self.text!r} and {self.text_pair!r}"
            marks = "with a separator between them" if context.template is None else "and the tokens around"
            raise ConfigError(
                f"batch.seq_len={context.seq_len} has no room for {texts} {marks}: set it to {least} or more."
            )
        return template
