"""Reads conversations from JSONL, Parquet or CSV files, and checks every message."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, get_args

from distft.data.compressed import read_error, without_compression
from distft.data.conversations import Role
from distft.data.parquet_rows import parquet_columns, parquet_rows
from distft.data.records import RowErrors, missing_file, parse_rows
from distft.data.rows import Row, missing_column, text_problem
from distft.errors import DataError

if TYPE_CHECKING:
    from distft.data.conversations import ConversationsConfig

ROLES = get_args(Role)
# Rows of ShareGPT are read without settings: conversations of from and value.
_COLUMN, _SHARE_GPT_COLUMN = "messages", "conversations"
_SHARE_GPT_ROLES = {"human": "user", "gpt": "assistant"}
_MOST_DEPTH = 64  # of objects and arrays in a message or a tool


@dataclass(frozen=True, slots=True)
class Conversation:
    """One row of a file."""

    line: int  # from 1; of Parquet the row
    messages: list[dict[str, Any]]  # with role and content
    tools: list[dict[str, Any]] | None


@dataclass(frozen=True, slots=True)
class MessageNames:
    """The keys of a message in a file, and its names of roles where these differ; None: there are none."""

    role: str = "role"
    content: str = "content"
    roles: Mapping[str, str] | None = None


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
        if isinstance(row, str):
            errors.add(line, row)
            continue
        tools = None
        messages, problems = _messages(config, row, needs_answer)
        try:
            tools = None if config.tools is None else checked_tools(row.get(config.tools), config.tools)
        except DataError as error:
            problems.append(str(error))
        for problem in problems:
            errors.add(line, problem)
        if not problems:
            yield Conversation(line, messages, tools)


def _rows(config: ConversationsConfig) -> Iterator[tuple[int, Row | str]]:
    optional = [] if config.tools is None else [config.tools]
    path, kind = config.path, PurePosixPath(without_compression(config.path)).suffix.lower()
    try:
        if kind == ".parquet":
            is_share_gpt = _is_share_gpt(config, parquet_columns(path))
            column = _SHARE_GPT_COLUMN if is_share_gpt else config.messages
            yield from enumerate(parquet_rows(path, [column], optional), start=1)
        else:
            others = [] if kind in {".csv", ".tsv"} else [_SHARE_GPT_COLUMN]
            yield from parse_rows(path, [config.messages, *others])
    except FileNotFoundError:
        raise missing_file(path) from None
    except OSError as error:
        raise read_error(path, error) from error


def _is_share_gpt(config: ConversationsConfig, columns: Collection[str]) -> bool:
    """Whether a row with these columns is as in the files of ShareGPT, and the settings say nothing else."""
    return config.messages == _COLUMN and _COLUMN not in columns and _SHARE_GPT_COLUMN in columns


def _messages(
    config: ConversationsConfig, row: Row, needs_answer: bool
) -> tuple[list[dict[str, Any]], list[str]]:
    """The messages of a row, and what is wrong with them."""
    column, names = config.messages, MessageNames(config.role, config.content, config.roles)
    if _is_share_gpt(config, row):
        column = _SHARE_GPT_COLUMN
    if column not in row:
        return [], [missing_column(column, row)]
    messages = _parsed(row[column])
    if not messages or not isinstance(messages, list):
        return [], [
            f"{column!r} must be an array of messages, objects with {names.role} and {names.content}."
        ]
    first = messages[0]
    if column != config.messages and isinstance(first, dict) and "from" in first and names.role not in first:
        names = MessageNames("from", "value", {**_SHARE_GPT_ROLES, **config.roles})
    checked, problems = checked_messages(messages, names)
    if needs_answer and not problems and all(message["role"] != "assistant" for message in checked):
        problems = [
            "has no message of the assistant: there is no answer to learn. Add one, or remove the row."
        ]
    return checked, problems


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


def checked_messages(
    messages: Sequence[Any], names: MessageNames = MessageNames(), *, of: str = ""
) -> tuple[list[dict[str, Any]], list[str]]:
    """The good messages, with `role` and `content`, and what is wrong with others.

    A problem begins with the message's number, and `of` behind that.
    """
    checked, problems = [], []
    for number, message in enumerate(messages, start=1):
        own = list(_message_problems(message, names))
        problems += [f"message {number}{of} {problem}" for problem in own]
        if not own:
            rest = {key: value for key, value in message.items() if key not in {names.role, names.content}}
            known = (names.roles or {}).get(message[names.role], message[names.role])
            checked.append({"role": known, "content": message.get(names.content), **rest})
    return checked, problems


def _message_problems(message: Any, names: MessageNames) -> Iterator[str]:
    if not isinstance(message, dict):
        yield f"is {_kind(message)}, but must be an object with {names.role} and {names.content}."
        return
    known = None
    if names.role not in message:
        yield missing_column(names.role, message).replace("column", "key")
    else:
        name = message[names.role]
        known = (names.roles or {}).get(name, name) if isinstance(name, str) else None
        if known not in ROLES:
            advice = (
                "correct it."
                if names.roles is None
                else "correct it, or say which it is in roles, such as {bot: assistant}."
            )
            yield f"has {names.role} {_shown(name)}, which is none of {', '.join(ROLES)}: {advice}"
    rest = {key: value for key, value in message.items() if key not in {names.role, names.content}}
    if problem := _plain_problem(rest):
        yield problem
    text = message.get(names.content)
    calls = rest.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        yield f"has tool_calls {_shown(calls)}, but they must be an array of objects."
    calls_tools = bool(calls)
    if text is None and calls_tools:
        return
    if problem := _content_problem(text):
        yield f"has {names.content} that {problem}"
    elif known == "assistant" and not calls_tools and not _has_text(text):
        yield "is an answer without text: write it, or remove the row."


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
