"""Settings of texts that belong together, for contrastive learning: pairs, hard negatives, or texts alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from distft.config import PathText, Settings
from distft.data.dataset import DataContext, TextTemplate, check_vocabulary
from distft.errors import DataError

if TYPE_CHECKING:
    from distft.data.batch import RaggedArray
    from distft.data.encoded_once import EncodedTable
    from distft.data.feed import Feed
    from distft.data.pairs_rows import PairRows
    from distft.data.records import Record, RowErrors


class PairsConfig(Settings):
    """A JSONL or CSV file with a text, a second one that belongs to it, and others that do not."""

    type: Literal["pairs"] = "pairs"
    path: PathText  # .jsonl, .csv or .tsv, which may be compressed, or .parquet
    text: str = "text"  # column
    positive: str | None = "positive"  # column of the text that belongs to it; null: the file has texts alone
    negatives: tuple[str, ...] = ()  # columns of texts that do not belong to it, though they seem to
    score: str | None = None  # column of a number: how similar the two texts are
    min_score: float | None = None  # pairs of a lower score are left out
    max_rows: int | None = Field(None, ge=1)
    shuffle: bool = True
    data_seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _check_columns(self) -> Self:
        problems = []
        if self.positive is None and (self.negatives or self.score is not None):
            problems.append("negatives and score need pairs: name the column of the second text in positive")
        if twice := sorted({name for name in self.columns if self.columns.count(name) > 1}):
            problems.append(f"the column {', '.join(twice)} is named more than once")
        if self.min_score is not None and self.score is None:
            problems.append("min_score needs the column of the scores: set score")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def columns(self) -> list[str]:
        """The columns of a sequence's texts, in the order of its rows."""
        return [self.text, *([] if self.positive is None else [self.positive]), *self.negatives]

    def build(self, context: DataContext) -> Feed:
        """Infinite epochs for training. Raises `DataError` if no text has another's as a negative."""
        from distft.data.feed import Feed
        from distft.data.pairs_rows import without_negatives

        rows = self.open(context)
        if problem := without_negatives(rows.num_distinct, self.columns, rows.num_sequences):
            raise DataError(f"{self.path}: {problem}")
        return Feed.for_training(
            rows,
            seed=self.data_seed,
            shuffle=self.shuffle,
            document_start=None if context.template is None else context.template.before,
        )

    def build_for_evaluation(self, context: DataContext) -> Feed:
        """Every pair once, in file order."""
        from distft.data.feed import Feed

        return Feed.for_evaluation(self.open(context))

    def open(self, context: DataContext) -> PairRows:
        """Read and encode the file. Raises `DataError` with file and line of every problem."""
        import numpy as np

        from distft.data.encoded_once import encoded_once
        from distft.data.pairs_rows import SCORES, PairRows

        settings = {
            **self.model_dump(exclude={"shuffle", "data_seed"}),
            "seq_len": context.seq_len,
            "vocab_size": context.vocab_size,
            "tokenizer": context.tokenizer_fingerprint,
            "template": None if context.template is None else asdict(context.template),
        }
        table = encoded_once(context.cache_dir, self.path, settings, lambda: self._encode(context))
        scores = table.columns[SCORES].view(np.float64) if self.score is not None else None
        return PairRows(
            table.rows,
            len(self.columns),
            scores=scores,
            pad_id=context.pad_id or 0,
            num_distinct=table.facts["num_distinct"],
            summary=table.facts["summary"],
        )

    def _encode(self, context: DataContext) -> EncodedTable:
        import numpy as np

        from distft.data.encoded_once import EncodedTable
        from distft.data.pairs_rows import SCORES, describe, num_distinct_texts
        from distft.data.records import RowErrors, read_records

        scores = [] if self.score is None else [self.score]
        errors = RowErrors(self.path)
        records = read_records(
            self.path, texts=self.columns, numbers=scores, max_rows=self.max_rows, errors=errors
        )
        kept = [record for record in records if self._is_similar(record)]
        if not kept:
            errors.raise_if_any()
            raise DataError(
                f"{self.path}: none of its {len(records):,} rows has a {self.score!r} of {self.min_score:g} "
                "or more: lower min_score."
            )
        rows, lengths = self._encode_records(kept, context, errors)
        errors.raise_if_any()
        check_vocabulary(self.path, rows.max_value, context)
        columns = {}
        if self.score is not None:
            of_rows = [float(record.values[self.score]) for record in kept for _ in self.columns]
            columns[SCORES] = np.array(of_rows, np.float64).view(np.int64)
        num_distinct = num_distinct_texts(rows, len(self.columns))
        summary = describe(
            self.path,
            self.columns,
            lengths,
            num_distinct=num_distinct,
            num_left_out=len(records) - len(kept),
            seq_len=context.seq_len,
        )
        return EncodedTable(
            rows=rows, columns=columns, facts={"summary": summary, "num_distinct": num_distinct}
        )

    def _is_similar(self, record: Record) -> bool:
        if self.score is None or self.min_score is None:
            return True
        return float(record.values[self.score]) >= self.min_score

    def _encode_records(
        self, records: Sequence[Record], context: DataContext, errors: RowErrors
    ) -> tuple[RaggedArray, list[int]]:
        """A row of at most `seq_len` tokens for each text, and the tokens that each text has."""
        from distft.data.batch import RaggedArray

        template = context.template or TextTemplate()
        rows, lengths = [], []
        for record in records:
            for column in self.columns:
                ids = context.encode(record.values[column])
                if not ids:
                    errors.add(record.line, f"{column!r} encodes to no tokens.")
                lengths.append(len(ids))
                rows.append(template.row(ids, context.seq_len))
        return RaggedArray(rows), lengths
