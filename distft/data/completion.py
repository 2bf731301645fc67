"""Settings of prompt and completion pairs: only the tokens of the completion have a loss."""

from __future__ import annotations

from collections.abc import Sequence
from string import Formatter
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from distft.config import Settings
from distft.data.dataset import DataContext, check_vocabulary

if TYPE_CHECKING:
    from distft.data.completion_rows import CompletionRows
    from distft.data.feed import Feed
    from distft.data.records import Record


class CompletionConfig(Settings):
    """A JSONL or CSV file with a prompt column and a completion column."""

    type: Literal["completion"] = "completion"
    path: str  # .jsonl, .csv or .tsv; may be compressed
    prompt: str = "prompt"  # column
    completion: str = "completion"  # column
    template: str | None = None  # of the prompt, such as "Q: {prompt}\nA:"; braces enclose column names
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

        return Feed.for_training(self.open(context), seed=self.data_seed, shuffle=self.shuffle)

    def build_for_evaluation(self, context: DataContext) -> Feed:
        """Every row once, in file order."""
        from distft.data.feed import Feed

        return Feed.for_evaluation(self.open(context))

    def open(self, context: DataContext) -> CompletionRows:
        """Read and encode the file. Raises `DataError` with file and line of every problem."""
        from distft.data.records import read_records

        columns = self._prompt_columns()
        texts = list(dict.fromkeys([*columns, self.completion]))
        records = read_records(self.path, texts=texts, max_rows=self.max_rows)
        return self._encode_records(records, context)

    def _encode_records(self, records: Sequence[Record], context: DataContext) -> CompletionRows:
        """Truncate completions at the end to `seq_len`, then prompts at the front to the rest of the row."""
        import numpy as np

        from distft.data.batch import RaggedArray
        from distft.data.completion_rows import CompletionRows
        from distft.data.records import RowErrors

        eos = [] if context.eos_id is None else [context.eos_id]
        errors = RowErrors(self.path)
        rows, prompt_lengths = [], []
        num_prompts_cut = num_completions_cut = 0
        for record in records:
            prompt = context.encode(self._prompt_text(record))
            completion = context.encode(record.values[self.completion])
            for column, ids in ((self.prompt, prompt), (self.completion, completion)):
                if not ids:
                    errors.add(record.line, f"{column!r} encodes to no tokens.")
            completion = completion + eos
            kept_completion = completion[: context.seq_len]
            kept_prompt = prompt[-(context.seq_len + 1 - len(kept_completion)) :]
            num_prompts_cut += len(kept_prompt) < len(prompt)
            num_completions_cut += len(kept_completion) < len(completion)
            rows.append(kept_prompt + kept_completion)
            prompt_lengths.append(len(kept_prompt))
        errors.raise_if_any()
        encoded = RaggedArray(rows)
        check_vocabulary(self.path, encoded.max_value, context)
        summary = (
            f"{self.path}: {len(rows):,} rows; to fit seq_len={context.seq_len}, "
            f"{num_prompts_cut:,} prompts were cut at the front, "
            f"{num_completions_cut:,} completions at the end"
        )
        return CompletionRows(
            encoded,
            np.array(prompt_lengths, np.int64),
            pad_id=context.pad_id or 0,
            token_bytes=context.token_bytes,
            summary=summary,
        )

    def _prompt_text(self, record: Record) -> str:
        if self.template is None:
            return record.values[self.prompt]
        return self.template.format_map(record.values)
