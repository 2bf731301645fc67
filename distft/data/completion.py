"""Prompts and completions: a causal language model that is trained on the completions alone."""

from collections.abc import Sequence
from string import Formatter
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator

from distft.config import Settings
from distft.data.batch import IGNORE_INDEX, Batch
from distft.data.dataset import DataContext, check_vocabulary, counted_bytes
from distft.data.feed import Feed
from distft.data.order import Indices
from distft.data.ragged import RaggedRows
from distft.data.records import Faults, Record, read_records


class CompletionRows:
    """One prompt with its completion a row, encoded once and kept in memory.

    Batches are padded on the right to their longest row. A label is the next token where that belongs to
    the completion, and `IGNORE_INDEX` in the prompt and the padding.
    """

    def __init__(
        self,
        rows: RaggedRows,
        prompt_lengths: Indices,
        *,
        pad_id: int = 0,
        token_bytes: NDArray[np.int64] | None = None,
        summary: str = "completions",
    ) -> None:
        """`rows`: prompt and completion behind each other; at least one token of each."""
        self._rows = rows
        self._prompt_lengths = prompt_lengths
        self._pad_id = pad_id
        self._token_bytes = token_bytes
        self.num_sequences = len(rows)
        self.summary = summary

    def batch(self, indices: Indices) -> Batch:
        """Rows `indices`; without any, row 0 with nothing that counts."""
        rows = indices if len(indices) else np.zeros(1, np.int64)
        tokens = self._rows.padded(rows, self._pad_id)
        inputs, labels = tokens[:, :-1].copy(), tokens[:, 1:].copy()
        lengths = self._rows.lengths(rows) - 1  # the last token is only ever predicted
        columns = np.arange(labels.shape[1])
        is_target = (columns >= self._prompt_lengths[rows][:, None] - 1) & (columns < lengths[:, None])
        labels[~is_target | (not len(indices))] = IGNORE_INDEX
        # What is left there of a row shorter than the others is its last token, which only a label may be.
        inputs[columns >= lengths[:, None]] = self._pad_id
        return Batch(
            input_ids=torch.from_numpy(inputs),
            labels=torch.from_numpy(labels),
            num_target_tokens=int(np.count_nonzero(labels != IGNORE_INDEX)),
            lengths=torch.from_numpy(lengths),
            num_target_bytes=counted_bytes(labels, self._token_bytes),
        )


class CompletionConfig(Settings):
    """A JSONL or CSV file with a column of prompts and one of completions."""

    type: Literal["completion"] = "completion"
    path: str  # .jsonl, .csv or .tsv; may be compressed
    prompt: str = "prompt"  # column
    completion: str = "completion"  # column
    template: str | None = None  # of the prompt, such as "Q: {prompt}\nA:"; braces hold the names of columns
    max_rows: int | None = Field(None, ge=1)
    shuffle: bool = True
    data_seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _template_uses_the_prompt(self) -> Self:
        if self.template is None:
            return self
        columns = self._prompt_columns()
        odd = [column for column in columns if not column or set(column) & set(".[!:")]
        if odd:
            raise ValueError(
                f"template has braces around {', '.join(map(repr, odd))}: only the name of a column may "
                f"stand there; a brace that is meant is written twice."
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
        """Endless epochs for training."""
        return Feed.endless(self.open(context), seed=self.data_seed, shuffle=self.shuffle)

    def build_in_order(self, context: DataContext) -> Feed:
        """Every row once, in file order, for an evaluation."""
        return Feed.in_order(self.open(context))

    def open(self, context: DataContext) -> CompletionRows:
        """Read and encode the file. Raises `DataError` with file and line for all that is wrong in it."""
        columns = self._prompt_columns()
        texts = list(dict.fromkeys([*columns, self.completion]))
        records = read_records(self.path, texts=texts, max_rows=self.max_rows)
        return self._encoded(records, context)

    def _encoded(self, records: Sequence[Record], context: DataContext) -> CompletionRows:
        ending = [] if context.eos_id is None else [context.eos_id]
        faults = Faults(self.path)
        rows, prompt_lengths = [], []
        num_prompts_cut = num_completions_cut = 0
        for record in records:
            prompt = context.encode(self._prompt_text(record))
            completion = context.encode(record.values[self.completion])
            for column, ids in ((self.prompt, prompt), (self.completion, completion)):
                if not ids:
                    faults.add(record.line, f"{column!r} is empty once it is encoded.")
            completion = completion + ending
            kept_completion = completion[: context.seq_len]
            room = context.seq_len + 1 - len(kept_completion)
            kept_prompt = prompt[-room:]
            num_prompts_cut += len(kept_prompt) < len(prompt)
            num_completions_cut += len(kept_completion) < len(completion)
            rows.append(kept_prompt + kept_completion)
            prompt_lengths.append(len(kept_prompt))
        faults.raise_if_any()
        ragged = RaggedRows(rows)
        check_vocabulary(self.path, ragged.largest, context)
        summary = (
            f"{self.path}: {len(rows):,} rows; to fit seq_len={context.seq_len}, "
            f"{num_prompts_cut:,} prompts were cut in front, {num_completions_cut:,} completions at the end"
        )
        return CompletionRows(
            ragged,
            np.array(prompt_lengths, np.int64),
            pad_id=context.pad_id or 0,
            token_bytes=context.token_bytes,
            summary=summary,
        )

    def _prompt_text(self, record: Record) -> str:
        if self.template is None:
            return record.values[self.prompt]
        return self.template.format_map(record.values)
