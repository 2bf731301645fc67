"""Chat templates: the Jinja text that turns messages into the text that a model reads, as in transformers."""

from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

import jinja2

from distft.errors import ConfigError, DataError
from distft.tokenizer.template_files import MAX_TEMPLATE_BYTES
from distft.tokenizer.template_sandbox import Renderer, Spans

Message = Mapping[str, Any]
Tool = Mapping[str, Any]


class ChatTemplate:
    """A template with the values that it reads besides messages."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        *,
        today: date | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        """`special_tokens`: texts by names such as `bos_token`. Raises `ConfigError` for no Jinja."""
        if len(source) > MAX_TEMPLATE_BYTES:
            raise ConfigError(
                f"the chat template has {len(source):,} characters: at most {MAX_TEMPLATE_BYTES:,}."
            )
        self.source = source
        self._variables = {**special_tokens, **(variables or {})}
        try:
            self._renderer = Renderer(source, today)
        except (jinja2.TemplateError, RecursionError, SyntaxError, MemoryError) as error:
            raise ConfigError(f"the chat template is not Jinja: {_reason(error)}.") from None

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """The text of `messages`, as `apply_chat_template(tokenize=False)` of transformers.

        With `add_generation_prompt` it ends where the assistant would begin to write. Raises `DataError` if
        the template refuses the messages, or fails.
        """
        return self.render_with_spans(messages, tools, add_generation_prompt=add_generation_prompt)[0]

    def render_with_spans(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> tuple[str, Spans]:
        """As `render`, with the [start, stop) that the template marks by `{% generation %}`."""
        given = [{key: value for key, value in message.items() if value is not None} for message in messages]
        variables = {
            **self._variables,
            "messages": [_with_reasoning(message) for message in given],
            "tools": None if tools is None else list(tools),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            text, spans = self._renderer.render(variables)
        except (DataError, KeyboardInterrupt, SystemExit):
            raise
        except jinja2.UndefinedError as error:
            hint = ": give it a date with chat.date" if "strftime_now" in str(error) else ""
            raise DataError(f"the chat template fails: {_reason(error)}{hint}.") from None
        except jinja2.TemplateError as error:
            raise DataError(f"the chat template refuses it: {_reason(error)}.") from None
        except Exception as error:  # a template makes Python raise anything
            raise DataError(f"the chat template fails: {type(error).__name__}: {_reason(error)}.") from None
        for number, message in enumerate(given, start=1):
            content = message.get("content")
            if isinstance(content, list) and str(content) in text:
                raise DataError(
                    f"the chat template knows no arrays of texts, and writes that of message {number} with "
                    "its brackets: make it one text."
                )
        return text, spans


_REASONING = ("reasoning_content", "thinking", "reasoning")


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its reasoning under each name that templates read, as in transformers."""
    reasoning = next((message[key] for key in _REASONING if key in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _reason(error: BaseException) -> str:
    text = str(error).strip().rstrip(".")[:300] or type(error).__name__
    line = getattr(error, "lineno", None)
    return f"{text} (line {line})" if line else text
