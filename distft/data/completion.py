"""Prompt and completion pairs: only the tokens of the completion have a loss."""

from collections.abc import Sequence
from string import Formatter
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from xxhash import xxh3_64_hexdigest

from distft.config import Settings
from distft.data.batch import IGNORE_INDEX, NEXT_TOKEN, Batch, RaggedArray, count_target_bytes
from distft.data.dataset import DataContext, check_vocabulary
from distft.data.feed import Feed
from distft.data.records import Record, RowErrors, read_records
from distft.data.sampler import Indices


class CompletionRows:
    """One prompt and its completion per row, encoded once and kept in memory.

    Batches are padded on the right to their longest row. The label of a position is the next token if that
    belongs to the completion, else `IGNORE_INDEX`.
    """

    def __init__(
        self,
        rows: RaggedArray,
        prompt_lengths: Indices,
        *,
        pad_id: int = 0,
        token_bytes: NDArray[np.int64] | None = None,
        summary: str = "completions",
    ) -> None:
        """`rows`: prompt followed by completion, at least one token of each."""
        self._rows = rows
        self._prompt_lengths = prompt_lengths
        self._pad_id = pad_id
        self._token_bytes = token_bytes
        self.num_sequences = len(rows)
        self.summary = summary
        self.fingerprint = f"{rows.fingerprint}-{xxh3_64_hexdigest(prompt_lengths.tobytes())}"

    def batch(self, indices: Indices) -> Batch:
        """Rows `indices`; for empty `indices`, row 0 without targets."""
        rows = indices if len(indices) else np.zeros(1, np.int64)
        tokens = self._rows.padded(rows, self._pad_id)
        inputs, labels = tokens[:, :-1].copy(), tokens[:, 1:].copy()
        lengths = self._rows.lengths(rows) - 1  # without the last token, which is a label only
        columns = np.arange(labels.shape[1])
        is_target = (columns >= self._prompt_lengths[rows][:, None] - 1) & (columns < lengths[:, None])
        labels[~is_target | (not len(indices))] = IGNORE_INDEX
        inputs[columns >= lengths[:, None]] = self._pad_id  # removes the last token of shorter rows
        return Batch(
            input_ids=torch.from_numpy(inputs),
            targets={NEXT_TOKEN: torch.from_numpy(labels)},
            num_targets={NEXT_TOKEN: int(np.count_nonzero(labels != IGNORE_INDEX))},
            lengths=torch.from_numpy(lengths),
            num_target_bytes=count_target_bytes(labels, self._token_bytes),
        )


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
        return Feed.for_training(self.open(context), seed=self.data_seed, shuffle=self.shuffle)

    def build_for_evaluation(self, context: DataContext) -> Feed:
        """Every row once, in file order."""
        return Feed.for_evaluation(self.open(context))

    def open(self, context: DataContext) -> CompletionRows:
        """Read and encode the file. Raises `DataError` with file and line of every problem."""
        columns = self._prompt_columns()
        texts = list(dict.fromkeys([*columns, self.completion]))
        records = read_records(self.path, texts=texts, max_rows=self.max_rows)
        return self._encode_records(records, context)

    def _encode_records(self, records: Sequence[Record], context: DataContext) -> CompletionRows:
        """Truncate completions at the end to `seq_len`, then prompts at the front to the rest of the row."""
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
