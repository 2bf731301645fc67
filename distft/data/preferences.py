"""Settings of preferences: prompts with two answers each, of which one is better."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from distft.config import PathText, Settings
from distft.data.dataset import DataContext, check_vocabulary, prompt_start

if TYPE_CHECKING:
    from distft.data.encoded_once import EncodedTable
    from distft.data.feed import Feed
    from distft.data.preferences_rows import PreferenceRows


class PreferencesConfig(Settings):
    """A file with a column of prompts, and the columns of a better and a worse answer."""

    type: Literal["preferences"] = "preferences"
    path: PathText  # .jsonl, .csv or .tsv, may be compressed; with messages also .parquet, and no .csv
    # Texts, or arrays of messages with role and content, which the chat template turns into text.
    format: Literal["text", "messages"] = "text"
    prompt: str | None = "prompt"  # column; null: of messages, those with which both conversations begin
    chosen: str = "chosen"  # column of the better answer
    rejected: str = "rejected"  # column of the worse one
    prepend_bos: bool = False  # of texts: before each prompt, for a model whose documents began with it
    max_rows: int | None = Field(None, ge=1)
    shuffle: bool = True
    data_seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _check_columns(self) -> Self:
        problems = []
        if twice := sorted({name for name in self.columns if self.columns.count(name) > 1}):
            problems.append(f"the column {', '.join(twice)} is named more than once")
        if self.format == "text" and self.prompt is None:
            problems.append("prompt=null is of format=messages: name the column of the prompts")
        if self.format == "messages" and self.prepend_bos:
            problems.append("prepend_bos is of format=text: a chat template writes bos itself")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def columns(self) -> list[str]:
        """Those that are read."""
        return [*([] if self.prompt is None else [self.prompt]), self.chosen, self.rejected]

    @property
    def reads_chats(self) -> bool:
        """Whether the run needs a chat template."""
        return self.format == "messages"

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
        """Every pair once, in file order."""
        from distft.data.feed import Feed

        return Feed.for_evaluation(self.open(context))

    def open(self, context: DataContext) -> PreferenceRows:
        """Read and encode the file. Raises `DataError` with file and line of every problem."""
        from distft.data.encoded_once import encoded_once
        from distft.data.preferences_rows import PROMPT_LENGTHS, PreferenceRows

        settings = {
            **self.model_dump(exclude={"shuffle", "data_seed"}),
            "seq_len": context.seq_len,
            "vocab_size": context.vocab_size,
            "tokenizer": context.tokenizer_fingerprint,
            "eos_id": context.eos_id,
            "start": prompt_start(context, prepend_bos=self.prepend_bos),
            "chat": context.chat().fingerprint if self.reads_chats else None,
        }
        table = encoded_once(context.cache_dir, self.path, settings, lambda: self._encode(context))
        return PreferenceRows(
            table.rows,
            table.columns[PROMPT_LENGTHS],
            pad_id=context.pad_id or 0,
            summary=table.facts["summary"],
        )

    def _encode(self, context: DataContext) -> EncodedTable:
        from distft.data.preferences_encoding import encode_preferences

        table = encode_preferences(self, context, prompt_start(context, prepend_bos=self.prepend_bos))
        check_vocabulary(self.path, table.rows.max_value, context)
        return table
