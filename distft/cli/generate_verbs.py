"""`distft generate`."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distft.cli.arguments import expanded, print_note
from distft.cli.model_verbs import CheckpointPath, Trust
from distft.errors import ConfigError

if TYPE_CHECKING:
    from distft.run.generate import GenerationOptions

Prompts = Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt; repeatable.")]
PromptFile = Annotated[
    str | None,
    typer.Option(
        "--prompts",
        help="A file of prompts: the column `prompt` of a .jsonl, .csv or .tsv file, else each line.",
    ),
]
Messages = Annotated[
    list[str] | None,
    typer.Option("--message", "-m", metavar="ROLE:TEXT", help="A message to answer, in order; repeatable."),
]
MessageFile = Annotated[
    str | None,
    typer.Option(
        "--messages",
        help="A conversation to answer, as JSON, or several: the column `messages` of .jsonl or .parquet.",
    ),
]
ChatTemplate = Annotated[
    str | None, typer.Option(help="A file with another chat template than the tokenizer's.")
]
TopP = Annotated[
    float | None,
    typer.Option(min=0.0, max=1.0, help="Sample from the most likely tokens with this total probability."),
]


def generate(
    checkpoint: CheckpointPath,
    prompt: Prompts = None,
    prompts: PromptFile = None,
    message: Messages = None,
    messages: MessageFile = None,
    chat_template: ChatTemplate = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add to each prompt.")] = 128,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="End a text before this one; repeatable.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the most likely token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample from the k most likely tokens.")] = None,
    top_p: TopP = None,
    seed: Annotated[int, typer.Option(help="The same seed generates the same text.")] = 0,
    stream: Annotated[bool, typer.Option("--stream", help="Print the text while it is generated.")] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print one JSON object for each, with prompt or messages, and text."),
    ] = False,
    trust: Trust = False,
) -> None:
    """Continue prompts, or answer messages, with the language model of a run, checkpoint or directory."""
    is_chat = bool(message) or messages is not None
    _check_options(
        is_chat=is_chat,
        has_prompts=bool(prompt) or prompts is not None,
        has_template=chat_template is not None,
        is_json_stream=stream and as_json,
    )
    from distft.run.environment import prepare_for_torch

    prepare_for_torch()
    from distft.run.generate import GenerationOptions

    options = GenerationOptions(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop=tuple(stop or ()),
        seed=seed,
    )
    printer = _Printer(as_json=as_json, stream=stream)
    if is_chat:
        template = None if chat_template is None else expanded(chat_template)
        _answer(checkpoint, message or [], messages, options, printer, template=template, trust=trust)
    else:
        _continue(checkpoint, prompt or [], prompts, options, printer, trust=trust)


def _check_options(*, is_chat: bool, has_prompts: bool, has_template: bool, is_json_stream: bool) -> None:
    """Raise `ConfigError` for options that exclude one another."""
    problems = []
    if has_prompts and is_chat:
        problems.append("prompts are continued and messages answered: give one of the two.")
    if has_template and not is_chat:
        problems.append("--chat-template is for messages: give some with -m or --messages.")
    if is_json_stream:
        problems.append("--stream prints text as it comes, --json whole objects: leave one out.")
    if problems:
        raise ConfigError("\n".join(problems))


class _Printer:
    """Prints the texts of several prompts: whole, as JSON, or piece by piece."""

    def __init__(self, *, as_json: bool, stream: bool) -> None:
        self._as_json = as_json
        self.is_live = stream
        self._number = 0

    def show_piece(self, number: int, piece: str) -> None:
        """The next piece of the text of a prompt, in the order of the prompts."""
        if number != self._number:
            print("\n---")
            self._number = number
        print(piece, end="", flush=True)

    def show(self, texts: Sequence[str], objects: Sequence[dict[str, Any]]) -> None:
        """The texts of all prompts, which `objects` describe."""
        if self.is_live:
            print()  # behind the last piece
            return
        for number, (text, described) in enumerate(zip(texts, objects, strict=True)):
            if self._as_json:
                print(json.dumps({**described, "text": text}))
                continue
            if number:
                print("---")
            print(text)


def _continue(
    checkpoint: str,
    prompts: Sequence[str],
    path: str | None,
    options: "GenerationOptions",
    printer: _Printer,
    *,
    trust: bool,
) -> None:
    """Print the continuations of the prompts, and of those in the file at `path`."""
    from distft.run.generate import generate_text, read_prompts

    texts = [*prompts, *(read_prompts(expanded(path)) if path is not None else [])] or [""]
    on_text = printer.show_piece if printer.is_live else None
    found = generate_text(checkpoint, texts, options, trust=trust, on_note=print_note, on_text=on_text)
    printer.show(found, [{"prompt": text} for text in texts])


def _answer(
    checkpoint: str,
    messages: Sequence[str],
    path: str | None,
    options: "GenerationOptions",
    printer: _Printer,
    *,
    template: str | None,
    trust: bool,
) -> None:
    """Print the answers to the conversation of `messages`, and to those in the file at `path`."""
    from distft.run.chat_prompts import chat_of_options, read_chats
    from distft.run.generate import generate_answers

    chats = [chat_of_options(messages)] if messages else []
    chats += read_chats(expanded(path)) if path is not None else []
    found = generate_answers(
        checkpoint,
        chats,
        options,
        template=template,
        trust=trust,
        on_note=print_note,
        on_text=printer.show_piece if printer.is_live else None,
    )
    printer.show(found, [{"messages": list(chat.messages)} for chat in chats])
