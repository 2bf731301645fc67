"""Settings of chats: the template that turns messages into text, and what it reads besides them."""

import datetime
from collections.abc import Mapping
from typing import Any

from pydantic import Field, field_validator

from distft.config import PathText, Settings

_RESERVED = {"messages", "tools", "documents", "add_generation_prompt"}


class ChatConfig(Settings):
    """The chat template, which the tokenizer of a checkpoint keeps, and its variables."""

    # A file of Jinja, or a directory of transformers with one; null: that of the tokenizer, else a plain one
    template: PathText | None = None
    date: datetime.date | None = None  # what a template writes that asks for today's
    variables: Mapping[str, Any] = Field(default_factory=dict)  # others that it reads, as enable_thinking

    @field_validator("variables")
    @classmethod
    def _check_variables(cls, variables: Mapping[str, Any]) -> Mapping[str, Any]:
        if taken := sorted(_RESERVED & variables.keys()):
            raise ValueError(f"{', '.join(taken)} is what every template gets: leave it out")
        return variables
