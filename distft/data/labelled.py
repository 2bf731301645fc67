"""Settings of labelled texts, for classification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from distft.config import PathText, Settings
from distft.data.dataset import DataContext, check_vocabulary
from distft.errors import DataError

if TYPE_CHECKING:
    from distft.data.batch import RaggedArray
    from distft.data.encoded_once import EncodedTable
    from distft.data.feed import Feed
    from distft.data.labelled_rows import LabelledRows, LabelNames
    from distft.data.records import Record, RowErrors


class LabelledConfig(Settings):
    """A JSONL or CSV file with a text column and a label column."""

    type: Literal["labelled"] = "labelled"
    path: PathText  # .jsonl, .csv or .tsv; may be compressed
    text: str = "text"  # column
    text_pair: str | None = None  # column of a second text, appended to the first
    label: str = "label"  # column
    max_rows: int | None = Field(None, ge=1)
    shuffle: bool = True
    data_seed: int = Field(0, ge=0)

    def build(self, context: DataContext) -> Feed:
        """Infinite epochs for training. Labels get their ids here unless `context` has label names."""
        from distft.data.feed import Feed

        rows, names = self.open(context)
        return Feed.for_training(rows, seed=self.data_seed, shuffle=self.shuffle, label_names=names.names)

    def build_for_evaluation(self, context: DataContext) -> Feed:
        """Every row once, in file order."""
        from distft.data.feed import Feed

        rows, names = self.open(context)
        return Feed.for_evaluation(rows, label_names=names.names)

    def open(self, context: DataContext) -> tuple[LabelledRows, LabelNames]:
        """Read and encode the file. Raises `DataError` with file and line of every problem."""
        from distft.data.encoded_once import encoded_once
        from distft.data.labelled_rows import LABEL_IDS, LabelledRows, LabelNames

        settings = {
            **self.model_dump(exclude={"shuffle", "data_seed"}),
            "seq_len": context.seq_len,
            "vocab_size": context.vocab_size,
            "tokenizer": context.tokenizer_fingerprint,
            "eos_id": context.eos_id,
            "label_names": context.label_names,
        }
        table = encoded_once(context.cache_dir, self.path, settings, lambda: self._encode(context))
        rows = LabelledRows(
            table.rows,
            table.columns[LABEL_IDS],
            pad_id=context.pad_id or 0,
            summary=table.facts["summary"],
        )
        return rows, LabelNames(tuple(table.facts["label_names"]))

    def _encode(self, context: DataContext) -> EncodedTable:
        from distft.data.encoded_once import EncodedTable
        from distft.data.labelled_rows import LABEL_IDS, LabelNames, describe
        from distft.data.records import RowErrors, read_records

        texts = [self.text] if self.text_pair is None else [self.text, self.text_pair]
        records = read_records(self.path, texts=texts, labels=[self.label], max_rows=self.max_rows)
        if context.label_names is None:
            names = LabelNames.from_labels(record.values[self.label] for record in records)
        else:
            assert isinstance(context.label_names, tuple)  # of this stream
            names = LabelNames(context.label_names)
        if len(names.names) < 2:
            raise DataError(
                f"{self.path}: column {self.label!r} has only one label, {names.names[0]!r}, "
                f"in {len(records):,} rows: a classification needs two or more."
            )
        errors = RowErrors(self.path)
        label_ids = names.ids(records, self.label, errors)
        rows, text_lengths, max_tokens = self._encode_records(records, context, errors)
        errors.raise_if_any()
        check_vocabulary(self.path, rows.max_value, context)
        summary = describe(
            self.path, names, label_ids, text_lengths, max_tokens=max_tokens, seq_len=context.seq_len
        )
        facts = {"label_names": names.names, "summary": summary}
        return EncodedTable(rows=rows, columns={LABEL_IDS: label_ids}, facts=facts)

    def _encode_records(
        self, records: Sequence[Record], context: DataContext, errors: RowErrors
    ) -> tuple[RaggedArray, list[int], int]:
        """Token rows of at most `seq_len`, the tokens of each row's texts, and how many of them fit."""
        from distft.data.batch import RaggedArray
        from distft.data.labelled_rows import truncate_pair

        separator: list[int] = []
        if self.text_pair is not None:
            separator = [context.eos_id] if context.eos_id is not None else context.encode("\n")
            separator = separator[: max(context.seq_len - 2, 0)]
        max_tokens = context.seq_len - len(separator)
        rows, lengths = [], []
        for record in records:
            first = context.encode(record.values[self.text])
            second = context.encode(record.values[self.text_pair]) if self.text_pair is not None else []
            for column, ids in ((self.text, first), (self.text_pair, second)):
                if column is not None and not ids:
                    errors.add(record.line, f"{column!r} encodes to no tokens.")
            lengths.append(len(first) + len(second))
            first, second = truncate_pair(first, second, max_tokens)
            rows.append(first + separator + second)
        return RaggedArray(rows), lengths, max_tokens
