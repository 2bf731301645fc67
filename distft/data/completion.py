"""Settings of prompt and completion pairs: only the tokens of the completion have a loss."""

from __future__ import annotations

from collections.abc import Sequence
from string import Formatter
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from distft.config import PathText, Settings
from distft.data.dataset import DataContext, check_vocabulary, prompt_start

if TYPE_CHECKING:
    from distft.data.completion_rows import CompletionRows
    from distft.data.encoded_once import EncodedTable
    from distft.data.feed import Feed
    from distft.data.records import Record, RowErrors


class CompletionConfig(Settings):
    """A JSONL or CSV file with a prompt column and a completion column."""

    type: Literal["completion"] = "completion"
    path: PathText  # .jsonl, .csv or .tsv, which may be compressed, or .parquet
    prompt: str = "prompt"  # column
    completion: str = "completion"  # column
    template: str | None = None  # of the prompt, such as "Q: {prompt}\nA:"; braces enclose column names
    prepend_bos: bool = False  # before each prompt, for a model whose documents began with it
    max_rows: int | None = Field(None, ge=1)
    shuffle: bool = True
    data_seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _check_template(self) -> Self:
        if self.template is None:
            return self
        columns = self._prompt_columns()
        invalid = [column for column in columns if not column or set(column) & set(".[!:")]
        if invalid:
            raise ValueError(
                f"template has braces around {', '.join(map(repr, invalid))}: only a column name may "
                f"stand there; write {{{{ or }}}} for a literal brace."
            )
        if self.prompt not in columns:
            raise ValueError(
                f"template must contain {{{self.prompt}}}, the column that prompt={self.prompt!r} names."
            )
        return self

    def _prompt_columns(self) -> list[str]:
        if self.template is None:
            return [self.prompt]
        columns = []
        for _, name, specification, conversion in Formatter().parse(self.template):
            if name is not None:
                columns.append(
                    "".join(
                        [name, f"!{conversion}" * bool(conversion), f":{specification}" * bool(specification)]
                    )
                )
        return list(dict.fromkeys(columns))

    def build(self, context: DataContext) -> Feed:
        """Infinite epochs for training."""
        from distft.data.feed import Feed

        return Feed.for_training(
            self.open(context),
            seed=self.data_seed,
            shuffle=self.shuffle,
            document_start=prompt_start(context, prepend_bos=self.prepend_bos),
        )

    def build_for_evaluation(self, context: DataContext) -> Feed:
        """Every row once, in file order."""
        from distft.data.feed import Feed

        return Feed.for_evaluation(self.open(context))

    def open(self, context: DataContext) -> CompletionRows:
        """Read and encode the file. Raises `DataError` with file and line of every problem."""
        from distft.data.completion_rows import PROMPT_LENGTHS, CompletionRows
        from distft.data.encoded_once import encoded_once

        settings = {
            **self.model_dump(exclude={"shuffle", "data_seed"}),
            "seq_len": context.seq_len,
            "vocab_size": context.vocab_size,
            "tokenizer": context.tokenizer_fingerprint,
            "eos_id": context.eos_id,
            "start": prompt_start(context, prepend_bos=self.prepend_bos),
            "ends_sources": context.ends_sources,
        }
        table = encoded_once(context.cache_dir, self.path, settings, lambda: self._encode(context))
        return CompletionRows(
            table.rows,
            table.columns[PROMPT_LENGTHS],
            pad_id=context.pad_id or 0,
            token_bytes=context.token_bytes,
            summary=table.facts["summary"],
        )

    def _encode(self, context: DataContext) -> EncodedTable:
        from distft.data.records import RowErrors, read_records

        texts = list(dict.fromkeys([*self._prompt_columns(), self.completion]))
        errors = RowErrors(self.path)
        records = read_records(self.path, texts=texts, max_rows=self.max_rows, errors=errors)
        table = self._encode_records(records, context, errors)
        errors.raise_if_any()
        check_vocabulary(self.path, table.rows.max_value, context)
        return table

    def _encode_records(
        self, records: Sequence[Record], context: DataContext, errors: RowErrors
    ) -> EncodedTable:
        """Truncate completions at the end to `seq_len`, then prompts at the front to the rest of the row."""
        import numpy as np

        from distft.data.batch import RaggedArray
        from distft.data.completion_rows import PROMPT_LENGTHS
        from distft.data.encoded_once import EncodedTable

        start = list(prompt_start(context, prepend_bos=self.prepend_bos))
        eos = [] if context.eos_id is None else [context.eos_id]
        prompt_end = eos if context.ends_sources else []
        rows, prompt_lengths = [], []
        num_prompts_cut = num_completions_cut = 0
        for record in records:
            prompt = context.encode(self._prompt_text(record))
            completion = context.encode(record.values[self.completion])
            for column, ids in ((self.prompt, prompt), (self.completion, completion)):
                if not ids:
                    errors.add(record.line, f"{column!r} encodes to no tokens.")
            prompt, completion = prompt + prompt_end, completion + eos
            kept_completion = completion[: context.seq_len]
            room = context.seq_len + 1 - len(kept_completion)
            kept_prompt = (start + prompt[-(room - len(start)) :]) if room > len(start) else prompt[-1:]
            num_prompts_cut += len(kept_prompt) < len(start) + len(prompt)
            num_completions_cut += len(kept_completion) < len(completion)
            rows.append(kept_prompt + kept_completion)
            prompt_lengths.append(len(kept_prompt))
        summary = (
            f"{self.path}: {len(rows):,} rows; to fit seq_len={context.seq_len}, "
            f"{num_prompts_cut:,} prompts were cut at the front, "
            f"{num_completions_cut:,} completions at the end"
        )
        return EncodedTable(
            rows=RaggedArray(rows),
            columns={PROMPT_LENGTHS: np.array(prompt_lengths, np.int64)},
            facts={"summary": summary},
        )

    def read_prompts(self) -> list[tuple[Record, str]]:
        """Each row's columns of the prompt, and its text. Raises `DataError` as `open` does."""
        from distft.data.records import read_records

        texts = list(dict.fromkeys(self._prompt_columns()))
        records = read_records(self.path, texts=texts, max_rows=self.max_rows)
        return [(record, self._prompt_text(record)) for record in records]

    def _prompt_text(self, record: Record) -> str:
        if self.template is None:
            return record.values[self.prompt]
        return self.template.format_map(record.values)
