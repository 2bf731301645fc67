"""Settings of conversations: only what the assistant writes has a loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from distft.config import PathText, Settings
from distft.data.dataset import DataContext, Turns, check_vocabulary
from distft.errors import ConfigError, DataError, DistftError

if TYPE_CHECKING:
    from distft.data.conversation_rows import ConversationRows
    from distft.data.encoded_once import EncodedTable
    from distft.data.feed import Feed

Role = Literal["system", "developer", "user", "assistant", "tool"]


class ConversationsConfig(Settings):
    """A file with a column of messages, each with a role and content, and perhaps one of tools.

    The tokenizer's chat template, or that of `chat.template`, turns them into text.
    """

    type: Literal["conversations"] = "conversations"
    path: PathText  # .jsonl or .parquet; .csv or .tsv with messages as JSON; may be compressed
    messages: str = "messages"  # column: an array of messages, or one in JSON
    tools: str | None = "tools"  # column of the tools' JSON schemas; a row may lack it; null: none
    role: str = "role"  # key of a message, such as from
    content: str = "content"  # key of a message, such as value
    # The file's names of roles, where they differ, such as {gpt: assistant}.
    roles: Mapping[str, Role] = Field(default_factory=dict)
    turns: Turns = "all"  # of the assistant: those that have a loss
    too_long: Literal["cut", "refuse"] = "cut"  # what has more than batch.seq_len tokens is cut at the end
    packing: bool = False  # several conversations in a row, which do not see each other
    max_rows: int | None = Field(None, ge=1)
    shuffle: bool = True
    data_seed: int = Field(0, ge=0)

    reads_chats: ClassVar[bool] = True  # the run needs a chat template

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        if self.role == self.content:
            raise ValueError(f"role and content are both {self.role!r}: name two keys of a message")
        if self.tools == self.messages:
            raise ValueError(f"messages and tools are both {self.tools!r}: name two columns")
        return self

    def build(self, context: DataContext) -> Feed:
        """Infinite epochs for training."""
        from distft.data.feed import Feed

        return Feed.for_training(
            self.open(context), seed=self.data_seed, shuffle=self.shuffle, document_start=()
        )

    def build_for_evaluation(self, context: DataContext) -> Feed:
        """Every conversation once, in file order unless they are packed."""
        from distft.data.feed import Feed

        return Feed.for_evaluation(self.open(context))

    def open(self, context: DataContext) -> ConversationRows:
        """Read and encode the file. Raises `DataError` with file and line of every problem."""
        from distft.data.conversation_rows import ConversationRows
        from distft.data.encoded_once import encoded_once

        if context.ends_sources:
            raise ConfigError(
                "data.type=conversations with model.type=encoder_decoder: its rows have no source for the "
                "encoder. Set model.type=transformer, or data.type=completion."
            )
        settings = {
            **self.model_dump(exclude={"shuffle", "data_seed", "packing"}),
            "seq_len": context.seq_len,
            "vocab_size": context.vocab_size,
            "tokenizer": context.tokenizer_fingerprint,
            "chat": context.chat().fingerprint,
        }
        table = encoded_once(context.cache_dir, self.path, settings, lambda: self._encode(context))
        return ConversationRows(
            table.rows,
            capacity=context.seq_len if self.packing else None,
            pad_id=context.pad_id or 0,
            token_bytes=context.token_bytes,
            summary=table.facts["summary"],
        )

    def _encode(self, context: DataContext) -> EncodedTable:
        from distft.data.conversation_files import read_conversations
        from distft.data.conversation_rows import Encoder
        from distft.data.records import RowErrors

        errors = RowErrors(self.path)
        chat = context.chat()
        encoder = Encoder(self.path, context.seq_len, refuses=self.too_long == "refuse")
        for found in read_conversations(self, errors):
            try:
                ids, is_assistant = chat.conversation(found.messages, found.tools, turns=self.turns)
            except DistftError as error:
                errors.add(found.line, str(error))
                continue
            if problem := encoder.add(ids, is_assistant):
                errors.add(found.line, problem)
        errors.raise_if_any()
        if not encoder.num_read:
            raise DataError(f"{self.path} has no rows.")
        table = encoder.table()
        check_vocabulary(self.path, encoder.max_id, context)
        return table
