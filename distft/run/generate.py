"""Continues prompts with a trained language model."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import PurePath

import torch

from distft import storage
from distft.data.records import read_records
from distft.data.rows import text_problem
from distft.errors import ConfigError, DataError, ErrorCollector
from distft.model.generation import generate
from distft.objective.prefix_lm import PrefixLM
from distft.run.chat_prompts import ChatPrompt, require_questions
from distft.run.data_context import chat_of, tokenizer_notes
from distft.run.engines import choose_device
from distft.run.pretrained import TrainedModel, load_model, open_model
from distft.run.text_stream import Stops, TextStream
from distft.tokenizer import Tokenizer
from distft.tokenizer.template_files import read_template
from distft.topology import Topology

_BATCH_SIZE = 16  # prompts that the model continues at a time

TextListener = Callable[[int, str], None]  # gets the number of a prompt, and the next piece of its text


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationOptions:
    """How to continue a prompt."""

    max_new_tokens: int
    temperature: float
    top_k: int | None = None
    top_p: float | None = None
    stop: tuple[str, ...] = ()  # a continuation ends before the first of these texts
    seed: int = 0


def generate_text(
    path: str,
    prompts: Sequence[str],
    options: GenerationOptions,
    *,
    trust: bool = False,
    on_note: Callable[[str], None],
    on_text: TextListener | None = None,
) -> list[str]:
    """Each prompt with its continuation; of an encoder with a decoder the target alone.

    `on_note` gets what the model did not see or was not trained for, `on_text` the texts as they come.
    Raises `ConfigError` for a model that cannot generate, or a prompt or a stop text that is none.
    """
    if any(map(text_problem, prompts)):
        raise ConfigError("a prompt has a lone surrogate, half a character: correct it.")
    trained = _opened(path, options, trust=trust, on_note=on_note)
    is_source = _reads_sources(trained)
    start, start_of_nothing = document_start(trained), _start_of_nothing(trained.tokenizer)
    end = source_end(trained) if is_source else []
    if not start and "" in prompts:
        on_note(
            "a prompt is empty, and the model has not learned how a document begins: its text goes on behind "
            f"token {start_of_nothing[0]}."
        )
    encoded = [trained.tokenizer.encode(prompt) for prompt in prompts]
    starts = [start if start or ids else start_of_nothing for ids in encoded]
    asked = [
        _Asked(
            row=[*begin, *ids, *end],
            before=[] if is_source else ids,
            shown="" if is_source else prompt,
            is_empty=not prompt,
        )
        for begin, ids, prompt in zip(starts, encoded, prompts, strict=True)
    ]
    eos = trained.tokenizer.eos_id
    ends = () if eos is None else (eos,)
    return _generated(
        trained, asked, options, ends=ends, num_kept=len(start), on_note=on_note, on_text=on_text
    )


def generate_answers(
    path: str,
    chats: Sequence[ChatPrompt],
    options: GenerationOptions,
    *,
    template: str | None = None,
    trust: bool = False,
    on_note: Callable[[str], None],
    on_text: TextListener | None = None,
) -> list[str]:
    """The assistant's answer to each conversation, by the tokenizer's chat template or the file `template`.

    An answer ends where the template would end the turn. Raises as `generate_text`, and `DataError` for
    conversations that the template refuses.
    """
    require_questions(chats)
    trained = _opened(path, options, trust=trust, on_note=on_note)
    if _reads_sources(trained):
        raise ConfigError(f"{trained.source.path} has an encoder, which reads sources, and no conversations.")
    tokenizer = trained.tokenizer
    if template is not None:
        tokenizer = tokenizer.with_chat_template(read_template(template))
    elif not tokenizer.chat_templates:
        on_note("the model has no chat template, so that it reads messages as a plain text. Name one.")
    chat = chat_of(tokenizer, trained.config.chat)
    errors, asked = ErrorCollector(), []
    for prompt in chats:
        with errors.collect():
            try:
                ids = chat.prompt(prompt.messages, prompt.tools)
            except DataError as error:
                raise DataError(f"{prompt.where} {error}") from None
            asked.append(_Asked(row=ids, before=ids))
    errors.raise_if_any()
    num_kept = int(all(chat.row[:1] == [tokenizer.bos_id] for chat in asked))
    return _generated(
        trained, asked, options, ends=chat.turn_ends, num_kept=num_kept, on_note=on_note, on_text=on_text
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Asked:
    """A prompt as the model reads it."""

    row: list[int]
    before: list[int]  # tokens whose text the new one goes on
    shown: str = ""  # comes before the new text in the result
    is_empty: bool = False


def _opened(
    path: str, options: GenerationOptions, *, trust: bool, on_note: Callable[[str], None]
) -> TrainedModel:
    if "" in options.stop:
        raise ConfigError("a stop text is empty: leave it out.")
    trained = open_model(path, trust=trust)
    for note in (*trained.tokenizer.notes, *tokenizer_notes(trained.tokenizer, trained.source)):
        on_note(note)
    return trained


def _generated(
    trained: TrainedModel,
    prompts: Sequence[_Asked],
    options: GenerationOptions,
    *,
    ends: Collection[int],
    num_kept: int,
    on_note: Callable[[str], None],
    on_text: TextListener | None,
) -> list[str]:
    """The text of each prompt, up to one of the tokens `ends` or a stop text."""
    device = choose_device(trained.config, Topology())
    module = load_model(trained, device)
    if "lm_head" not in module.heads:
        raise ConfigError(f"{trained.source.path} is a classifier, which cannot generate text.")
    generator = torch.Generator(device).manual_seed(options.seed)
    texts: list[str] = []
    longest = 0
    for first in range(0, len(prompts), _BATCH_SIZE):
        batch = prompts[first : first + _BATCH_SIZE]
        stops = Stops(trained.tokenizer, [prompt.before for prompt in batch], options.stop, ends)
        live = None
        if on_text is not None:
            stream = TextStream(trained.tokenizer, batch[0].before, options.stop)
            live = _Live(stops, stream, on_text, first)
            live.show(batch[0].shown)
        continuations = generate(
            module,
            [prompt.row for prompt in batch],
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            eos_id=trained.tokenizer.eos_id,
            is_finished=stops.is_finished if live is None else live.is_finished,
            num_kept=num_kept,
            not_empty=[number for number, prompt in enumerate(batch) if prompt.is_empty],
            generator=generator,
        )
        # The last new token is not read again.
        longest = max(
            longest, *(len(p.row) + len(new) - 1 for p, new in zip(batch, continuations, strict=True))
        )
        found = [prompt.shown + stops.cut(i, continuations[i]) for i, prompt in enumerate(batch)]
        texts += found
        if live is not None:
            live.finish(found)
    if longest > module.config.longest_row:
        on_note(_window_note(module.config.longest_row))
    return texts


class _Live:
    """Passes on the first text of a batch as it comes, and the others when all are complete."""

    def __init__(self, stops: Stops, stream: TextStream, on_text: TextListener, first: int) -> None:
        self._stops = stops
        self._stream = stream
        self._on_text = on_text
        self._first = first
        self._shown = ""

    def show(self, piece: str) -> None:
        if piece:
            self._shown += piece
            self._on_text(self._first, piece)

    def is_finished(self, number: int, new: list[int]) -> bool:
        is_finished = self._stops.is_finished(number, new)
        if number == 0 and not is_finished:
            self.show(self._stream.push(new[-1]))
        return is_finished

    def finish(self, texts: Sequence[str]) -> None:
        """The rest of the first text, and the others."""
        whole = texts[0]
        self.show(whole[len(self._shown) :] if whole.startswith(self._shown) else self._stream.finish())
        for number, text in enumerate(texts[1:], start=self._first + 1):
            self._on_text(number, text)


def _reads_sources(trained: TrainedModel) -> bool:
    """Whether an encoder reads the prompts. Raises `ConfigError` for a model that cannot generate."""
    model = trained.config.model
    if model is None or model.is_causal or model.is_encoder_decoder:
        return model is not None and model.is_encoder_decoder
    raise ConfigError(
        f"{trained.source.path} is a bidirectional model, which fills in hidden tokens, and continues no "
        "text."
    )


def _window_note(max_seq_len: int) -> str:
    return (
        f"a text grew beyond model.max_seq_len={max_seq_len} tokens: from there on the model saw only its "
        f"last {max_seq_len // 2} to {max_seq_len} tokens."
    )


def read_prompts(path: str) -> list[str]:
    """The column `prompt` of a JSONL or CSV file, or the lines of another. Raises `DataError`."""
    if PurePath(path).suffix.lower() in {".jsonl", ".csv", ".tsv", ".json", ".ndjson"}:
        return [record.values["prompt"] for record in read_records(path, texts=["prompt"])]
    try:
        lines = storage.read_bytes(path).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as prompts: {error}.") from None
    if not lines:
        raise DataError(f"{path} has no prompts: write one in each line.")
    return lines


def document_start(trained: TrainedModel) -> list[int]:
    """The ids with which a document began in training, as its checkpoint says or transformers would begin."""
    record = trained.source.manifest.tokenizer
    if record is not None and record.document_start is not None:
        return list(record.document_start)
    # Older checkpoints do not say. Most documents end with eos, so that the end of one came before a text.
    tokenizer = trained.tokenizer
    start = tokenizer.eos_id if tokenizer.eos_id is not None else tokenizer.bos_id
    return [] if start is None else [start]


def source_end(trained: TrainedModel) -> list[int]:
    """The ids with which a source ended in training: eos, unless sources were parts of texts."""
    objective, eos_id = trained.config.objective, trained.tokenizer.eos_id
    is_part = isinstance(objective, PrefixLM) and objective.prefix == "random"
    return [] if is_part or eos_id is None else [eos_id]


def _start_of_nothing(tokenizer: Tokenizer) -> list[int]:
    """A token to continue where there is no text: the end of another document, if the tokenizer has one."""
    for token in (tokenizer.eos_id, tokenizer.bos_id):
        if token is not None:
            return [token]
    return tokenizer.encode("\n")[-1:] or [0]
