"""Conversations as tokens: what a chat template makes of messages, and which of it the assistant wrote."""

import json
from collections.abc import Mapping, Sequence
from datetime import date
from functools import cached_property
from hashlib import blake2b
from typing import Any, Literal

import numpy as np

from distft.errors import ConfigError, DataError
from distft.tokenizer.chat_template import ChatTemplate, Message, Tool
from distft.tokenizer.interface import Tokenizer
from distft.tokenizer.template_files import DEFAULT, PLAIN_ROLES, PLAIN_TEMPLATE, TOOL_USE
from distft.tokenizer.template_sandbox import Spans

ASSISTANT = "assistant"
Turns = Literal["all", "last"]  # of the assistant


class Chat:
    """A tokenizer with its chat template, or `PLAIN_TEMPLATE` if it has none."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        today: date | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        """`today`: what a template that asks for the date gets; `variables`: what else it reads.

        Raises `ConfigError` for a template that is none, or a tokenizer that cannot end a turn without one.
        """
        templates = tokenizer.chat_templates or {DEFAULT: PLAIN_TEMPLATE}
        if DEFAULT not in templates:
            raise ConfigError(
                f"the tokenizer has the chat templates {', '.join(map(repr, templates))}, but none named "
                f"{DEFAULT!r}: set chat.template."
            )
        if not tokenizer.chat_templates and tokenizer.eos_id is None:
            raise ConfigError(
                "the tokenizer has neither a chat template nor an eos with which a turn could end: set "
                "chat.template."
            )
        self._tokenizer = tokenizer
        special = tokenizer.special_texts
        self._templates = {
            name: ChatTemplate(source, special, today=today, variables=variables)
            for name, source in templates.items()
            if name in {DEFAULT, TOOL_USE}
        }
        settings = {name: template.source for name, template in self._templates.items()}
        text = json.dumps([settings, dict(special), str(today), dict(variables or {})], sort_keys=True)
        self.fingerprint = blake2b(text.encode(), digest_size=16).hexdigest()  # equal ones give equal texts

    @property
    def source(self) -> str:
        """The template that is used without tools."""
        return self._templates[DEFAULT].source

    def prompt(self, messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> list[int]:
        """The ids of the messages, up to where the assistant begins to write. Raises `DataError`."""
        self._require_plain(messages, tools)
        text = self._template(tools).render(messages, tools, add_generation_prompt=True)
        ids: list[int] = self._tokenizer.encode_with_offsets(text)[0].tolist()
        return ids

    def conversation(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None = None, *, turns: Turns = "all"
    ) -> tuple[list[int], list[bool]]:
        """The ids of the messages, and which of them the assistant writes: in all its turns, or the last.

        Those are what the template surrounds by `{% generation %}`. In a template without it, they are what
        a turn's rendering adds to that of the messages before it with the generation prompt. Raises
        `DataError` if the template fails, or changes what was there before when a conversation goes on.
        """
        self._require_plain(messages, tools)
        text, spans = self._template(tools).render_with_spans(messages, tools)
        last = max((i for i, m in enumerate(messages) if m["role"] == ASSISTANT), default=None)
        if last is None:
            spans = []
        elif not spans:
            first = last if turns == "last" else 0
            wanted = [i for i in range(first, last + 1) if messages[i]["role"] == ASSISTANT]
            spans = [self._span(messages, tools, index, text) for index in wanted]
        elif turns == "last":
            earlier = self._template(tools).render_with_spans(messages[:last], tools)[1]
            spans = spans[len(earlier) :]  # a turn may have several
        return self._masked(text, spans)

    def completion(
        self,
        prompt: Sequence[Message],
        completion: Sequence[Message],
        tools: Sequence[Tool] | None = None,
    ) -> tuple[list[int], list[int]]:
        """The ids of `prompt` with the generation prompt, and those that `completion` adds to them.

        Raises `DataError` as `conversation`.
        """
        self._require_plain([*prompt, *completion], tools)
        template = self._template(tools)
        text = template.render([*prompt, *completion], tools)
        before = template.render(prompt, tools, add_generation_prompt=True)
        if not text.startswith(before):
            raise DataError(_changed(len(prompt) + 1))
        ids, mask = self._masked(text, [(len(before), len(text))])
        start = mask.index(True) if True in mask else len(ids)
        return ids[:start], ids[start:]

    @cached_property
    def turn_ends(self) -> tuple[int, ...]:
        """The ids that end a turn of the assistant: eos, and what the template writes behind an answer."""
        eos = self._tokenizer.eos_id
        ends = [] if eos is None else [eos]
        mark, question = "answer", {"role": "user", "content": "question"}
        try:
            text = self._templates[DEFAULT].render([question, {"role": ASSISTANT, "content": mark}])
        except DataError:
            return tuple(ends)
        _, _, behind = text.rpartition(mark)
        ids, offsets = self._tokenizer.encode_with_offsets(behind)
        if len(ids) and behind[slice(*offsets[0].tolist())].strip():
            ends.append(int(ids[0]))
        return tuple(dict.fromkeys(ends))

    def _require_plain(self, messages: Sequence[Message], tools: Sequence[Tool] | None) -> None:
        """Raise `DataError` for what `PLAIN_TEMPLATE` would leave out without a word, or cannot write."""
        if self._tokenizer.chat_templates:
            return
        problems = ["has tools"] if tools else []
        for number, message in enumerate(messages, start=1):
            if message.get("tool_calls"):
                problems.append(f"message {number} has tool_calls")
            if message["role"] not in PLAIN_ROLES:
                problems.append(f"message {number} has role {message['role']}")
            elif not isinstance(message["content"], str) and not message.get("tool_calls"):
                problems.append(f"message {number} has an array of texts, which must be one text here")
        if problems:
            raise DataError(
                f"{'; '.join(problems)}: the plain template has the roles {', '.join(PLAIN_ROLES)}, and no "
                "tools. Set chat.template."
            )

    def _template(self, tools: Sequence[Tool] | None) -> ChatTemplate:
        return self._templates[TOOL_USE if tools and TOOL_USE in self._templates else DEFAULT]

    def _span(
        self, messages: Sequence[Message], tools: Sequence[Tool] | None, index: int, text: str
    ) -> tuple[int, int]:
        """Where the turn `index` is in the text of all."""
        template = self._template(tools)
        before = template.render(messages[:index], tools, add_generation_prompt=True)
        until = text if index + 1 == len(messages) else template.render(messages[: index + 1], tools)
        if not (text.startswith(before) and text.startswith(until) and len(before) < len(until)):
            raise DataError(_changed(index + 1))
        return len(before), len(until)

    def _masked(self, text: str, spans: Spans) -> tuple[list[int], list[bool]]:
        """The ids of the text, and which of them have a character in one of the spans."""
        ids, offsets = self._tokenizer.encode_with_offsets(text)
        starts, stops = offsets[:, 0], offsets[:, 1]
        mask = np.zeros(len(ids), np.bool_)
        for start, stop in spans:
            mask |= (starts < stop) & (stops > start)
        return ids.tolist(), mask.tolist()


def _changed(number: int) -> str:
    return (
        f"the chat template does not say which text is the assistant's: it has no {{% generation %}}, and "
        f"the rendering of the messages before message {number} is not the beginning of the whole. Mark the "
        "assistant's text by {% generation %} ... {% endgeneration %} in a copy of the template "
        "(chat.template), or learn the last turn alone (turns: last)."
    )
