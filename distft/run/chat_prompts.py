"""Conversations that a model is to answer: from files, or from the command line."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from distft import storage
from distft.data.conversation_files import ROLES, checked_messages, checked_tools, read_conversations
from distft.data.conversations import ConversationsConfig
from distft.data.records import RowErrors, other_lines
from distft.data.rows import text_problem
from distft.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatPrompt:
    """Messages to which the assistant answers."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    line: int = 1  # of its file
    where: str = "-m:"  # for errors


def read_chats(
    path: str, data: ConversationsConfig | None = None, errors: RowErrors | None = None
) -> list[ChatPrompt]:
    """The conversations of a file, whose columns and roles have the names that `data` says.

    A .json file has one, as an array of messages or an object with `messages` and perhaps `tools`; files of
    rows are as those of `data.type=conversations`. Raises `DataError`. With `errors`, those of rows go there
    instead, unless no row is good.
    """
    if PurePath(path).suffix.lower() == ".json":
        return [_of_json(path)]
    found_errors = RowErrors(path) if errors is None else errors
    names = ConversationsConfig(path=path) if data is None else data
    config = names.model_copy(update={"path": path, "max_rows": None})
    found = [
        ChatPrompt(messages=row.messages, tools=row.tools, line=row.line, where=f"{path}:{row.line}:")
        for row in read_conversations(config, found_errors, needs_answer=False)
    ]
    if errors is None or not found:
        found_errors.raise_if_any()
    if not found:
        raise DataError(f"{path} has no conversations.")
    return found


def _of_json(path: str) -> ChatPrompt:
    try:
        raw = json.loads(storage.read_bytes(path))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {str(error) or type(error).__name__}.") from None
    row = {"messages": raw} if isinstance(raw, list) else raw
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{path} must be an array of messages, or an object with such an array in messages.")
    checked, of_messages = checked_messages(messages)
    problems = [f"{path}: {problem}" for problem in of_messages]
    try:
        tools = checked_tools(row.get("tools"), "tools")
    except DataError as error:
        problems.append(f"{path}: {error}")
    if problems:
        raise DataError("\n".join(problems))
    return ChatPrompt(messages=checked, tools=tools, where=f"{path}:")


def chat_of_options(messages: Sequence[str]) -> ChatPrompt:
    """The conversation of texts such as `user:How deep is it?`. Raises `ConfigError`."""
    found = []
    for message in messages:
        role, colon, text = message.partition(":")
        if not colon or role not in ROLES:
            raise ConfigError(
                f"-m {message[:60]!r} must be a role and a text, such as 'user:Hello': the roles are "
                f"{', '.join(ROLES)}."
            )
        if problem := text_problem(text):
            raise ConfigError(f"-m {message[:60]!a}: its text {problem}")
        found.append({"role": role, "content": text})
    return ChatPrompt(messages=found)


def require_questions(chats: Sequence[ChatPrompt], errors: RowErrors | None = None) -> None:
    """Raise `DataError` for each that the assistant has answered already; with `errors` it goes there."""
    problem = "the last message is the assistant's, so that there is nothing to answer: remove it."
    answered = [chat for chat in chats if chat.messages[-1]["role"] == "assistant"]
    if errors is not None:
        for chat in answered:
            errors.add(chat.line, problem)
    elif answered:
        others = other_lines([chat.line for chat in answered])
        raise DataError(f"{answered[0].where} {problem}{others}")
