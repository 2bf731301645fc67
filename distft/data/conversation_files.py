"""Reads conversations from JSONL, Parquet or CSV files, and checks every message."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from distft.data.compressed import read_error
from distft.data.conversations import Role
from distft.data.parquet_rows import parquet_rows
from distft.data.records import RowErrors, missing_file, parse_rows
from distft.data.rows import Row, missing_column, text_problem
from distft.errors import DataError

if TYPE_CHECKING:
    from distft.data.conversations import ConversationsConfig

ROLES = get_args(Role)
_MOST_DEPTH = 64  # of objects and arrays in a message or a tool


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row of a file."""

    line: int  # from 1; of Parquet the row
    messages: list[dict[str, Any]]  # with role and content
    tools: list[dict[str, Any]] | None


def read_conversations(
    config: ConversationsConfig, errors: RowErrors, *, needs_answer: bool = True
) -> Iterator[Conversation]:
    """Yield the conversations of a file; the problems of others go to `errors`.

    With `needs_answer` one without a message of the assistant has a problem. Raises `DataError` for a file
    that cannot be read.
    """
    for number, (line, row) in enumerate(_rows(config)):
        if config.max_rows is not None and number >= config.max_rows:
            return
        try:
            if isinstance(row, str):
                raise DataError(row)
            messages = _messages(config, row, needs_answer)
            tools = None if config.tools is None else checked_tools(row.get(config.tools), config.tools)
        except DataError as problem:
            errors.add(line, str(problem))
        else:
            yield Conversation(line, messages, tools)


def _rows(config: ConversationsConfig) -> Iterator[tuple[int, Row | str]]:
    optional = [] if config.tools is None else [config.tools]
    try:
        if config.path.lower().endswith(".parquet"):
            yield from enumerate(parquet_rows(config.path, [config.messages], optional), start=1)
        else:
            yield from parse_rows(config.path, [config.messages])
    except FileNotFoundError:
        raise missing_file(config.path) from None
    except OSError as error:
        raise read_error(config.path, error) from error


def _messages(config: ConversationsConfig, row: Row, needs_answer: bool) -> list[dict[str, Any]]:
    if config.messages not in row:
        raise DataError(missing_column(config.messages, row))
    messages = _parsed(row[config.messages])
    if not messages or not isinstance(messages, list):
        raise DataError(
            f"{config.messages!r} must be an array of messages, objects with {config.role} and "
            f"{config.content}."
        )
    checked = []
    for number, message in enumerate(messages, start=1):
        try:
            checked.append(checked_message(message, config.role, config.content, config.roles))
        except DataError as error:
            raise DataError(f"message {number} {error}") from None
    if needs_answer and all(message["role"] != "assistant" for message in checked):
        raise DataError(
            "has no message of the assistant: there is no answer to learn. Add one, or remove the row."
        )
    return checked


def checked_tools(value: Any, name: str) -> list[dict[str, Any]] | None:
    """The tools of a row; None if there are none. Raises `DataError`, whose message begins with `name`."""
    tools = _parsed(value)
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{name!r} must be an array of objects, the JSON schemas of tools.")
    if problem := _plain_problem(tools):
        raise DataError(f"{name!r} {problem}")
    return tools


def _parsed(value: Any) -> Any:
    """What a text says in JSON, or another value as it is."""
    if not isinstance(value, str) or not value.strip():
        return value or None
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def checked_message(
    message: Any, role: str = "role", content: str = "content", roles: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The message with `role` and `content`, whose keys may be others. Raises `DataError` for a bad one.

    `roles` are other names of roles. The message of the error goes on behind the message's number.
    """
    if not isinstance(message, dict):
        raise DataError(f"is {_kind(message)}, but must be an object with {role} and {content}.")
    if role not in message:
        raise DataError(missing_column(role, message).replace("column", "key"))
    name = message[role]
    known = (roles or {}).get(name, name) if isinstance(name, str) else None
    if known not in ROLES:
        advice = (
            "correct it."
            if roles is None
            else "correct it, or say which it is in roles, such as {bot: assistant}."
        )
        raise DataError(f"has {role} {_shown(name)}, which is none of {', '.join(ROLES)}: {advice}")
    rest = {key: value for key, value in message.items() if key not in {role, content}}
    if problem := _plain_problem(rest):
        raise DataError(problem)
    text = message.get(content)
    calls_tools = bool(rest.get("tool_calls"))
    if not (text is None and calls_tools):
        if problem := _content_problem(text):
            raise DataError(f"has {content} that {problem}")
        if known == "assistant" and not calls_tools and not _has_text(text):
            raise DataError("is an answer without text: write it, or remove the row.")
    return {"role": known, "content": text, **rest}


def _content_problem(content: Any) -> str | None:
    if not isinstance(content, list):
        return text_problem(content, "a string, or an array of texts")
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            return "has a part without text: conversations with images and the like are not read."
    return _plain_problem(content)


def _has_text(content: Any) -> bool:
    texts = [part["text"] for part in content] if isinstance(content, list) else [content]
    return any(text.strip() for text in texts)


def _plain_problem(value: Any, depth: int = 0) -> str | None:
    """Why a value is no JSON whose texts are Unicode; None if it is."""
    if value is None or isinstance(value, bool | int | float):
        return None
    if isinstance(value, str):
        return text_problem(value)
    if depth == _MOST_DEPTH:
        return "is nested too deeply."
    if isinstance(value, Mapping):
        children = [*value.keys(), *value.values()]
    elif isinstance(value, list):
        children = value
    else:
        return f"has a value of type {type(value).__name__}, which JSON does not have."
    return next((problem for child in children if (problem := _plain_problem(child, depth + 1))), None)


def _kind(value: Any) -> str:
    names = {str: "a string", list: "an array", type(None): "null"}
    return names.get(type(value), _shown(value))


def _shown(value: Any) -> str:
    try:
        return json.dumps(value)[:60]
    except (TypeError, ValueError):
        return type(value).__name__
