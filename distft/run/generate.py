"""Continues prompts with a trained language model."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath

import torch

from distft import storage
from distft.data.records import RowErrors, read_records
from distft.data.rows import text_problem
from distft.errors import ConfigError, DataError, ErrorCollector
from distft.model.generation import generate
from distft.model.with_heads import ModelWithHeads
from distft.objective.prefix_lm import PrefixLM
from distft.run.chat_prompts import ChatPrompt, require_questions
from distft.run.data_context import chat_of, tokenizer_notes
from distft.run.engines import choose_device
from distft.run.pretrained import TrainedModel, load_model, open_model
from distft.run.text_stream import Stops, TextStream, start_of_nothing
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
    trained = open_generator(path, options, trust=trust, on_note=on_note)
    encoded = encode_prompts(trained, prompts, on_note=on_note)
    found = _new_texts(trained, encoded, options, on_note=on_note, on_text=on_text)
    return [shown + new for shown, new in zip(encoded.shown, found, strict=True)]


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
    trained = open_generator(path, options, trust=trust, on_note=on_note)
    encoded = encode_chats(trained, chats, template=template, on_note=on_note)
    return _new_texts(trained, encoded, options, on_note=on_note, on_text=on_text)


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedPrompts:
    """Prompts as the model reads them."""

    rows: Sequence[list[int]]
    before: Sequence[list[int]]  # of each, the tokens whose text the new one goes on
    shown: Sequence[str]  # of each, the text that comes before the new one
    is_empty: Sequence[bool]
    ends: Collection[int]  # tokens that end a text
    num_kept: int  # first tokens of each row that stay when it grows beyond the model's window

    def __getitem__(self, index: slice) -> "EncodedPrompts":
        return replace(
            self,
            rows=self.rows[index],
            before=self.before[index],
            shown=self.shown[index],
            is_empty=self.is_empty[index],
        )


def encode_prompts(
    trained: TrainedModel, prompts: Sequence[str], *, on_note: Callable[[str], None]
) -> EncodedPrompts:
    """Raises `ConfigError` for a model that cannot generate, or a prompt that is no text."""
    if any(map(text_problem, prompts)):
        raise ConfigError("a prompt has a lone surrogate, half a character: correct it.")
    is_source = _reads_sources(trained)
    start, nothing = document_start(trained), start_of_nothing(trained.tokenizer)
    end = source_end(trained) if is_source else []
    if not start and "" in prompts:
        on_note(
            "a prompt is empty, and the model has not learned how a document begins: its text goes on behind "
            f"token {nothing[0]}."
        )
    encoded = [trained.tokenizer.encode(prompt) for prompt in prompts]
    starts = [start if start or ids else nothing for ids in encoded]
    eos = trained.tokenizer.eos_id
    return EncodedPrompts(
        rows=[[*begin, *ids, *end] for begin, ids in zip(starts, encoded, strict=True)],
        before=[[] for _ in prompts] if is_source else encoded,
        shown=["" for _ in prompts] if is_source else prompts,
        is_empty=[not prompt for prompt in prompts],
        ends=() if eos is None else (eos,),
        num_kept=len(start),
    )


def encode_chats(
    trained: TrainedModel,
    chats: Sequence[ChatPrompt],
    *,
    template: str | None = None,
    errors: RowErrors | None = None,
    on_note: Callable[[str], None],
) -> EncodedPrompts:
    """Raises `ConfigError` for a model that cannot answer, and `DataError` for what the template refuses.

    `errors` has those of the chats' file, which are told together with these.
    """
    if _reads_sources(trained):
        raise ConfigError(f"{trained.source.path} has an encoder, which reads sources, and no conversations.")
    tokenizer = trained.tokenizer
    if template is not None:
        tokenizer = tokenizer.with_chat_template(read_template(template))
    elif not tokenizer.chat_templates:
        on_note("the model has no chat template, so that it reads messages as a plain text. Name one.")
    chat = chat_of(tokenizer, trained.config.chat)
    collected, rows = ErrorCollector(), []
    for prompt in chats:
        with collected.collect():
            try:
                rows.append(chat.prompt(prompt.messages, prompt.tools))
            except DataError as error:
                if errors is None:
                    raise DataError(f"{prompt.where} {error}") from None
                errors.add(prompt.line, str(error))
    collected.raise_if_any()
    if errors is not None:
        errors.raise_if_any()
    return EncodedPrompts(
        rows=rows,
        before=rows,
        shown=["" for _ in rows],
        is_empty=[False for _ in rows],
        ends=chat.turn_ends,
        num_kept=int(all(row[:1] == [tokenizer.bos_id] for row in rows)),
    )


def open_generator(
    path: str,
    options: GenerationOptions,
    *,
    overrides: Sequence[str] = (),
    trust: bool = False,
    on_note: Callable[[str], None],
) -> TrainedModel:
    """The model at `path`. Raises `ConfigError` for a stop text that is none."""
    if "" in options.stop:
        raise ConfigError("a stop text is empty: leave it out.")
    trained = open_model(path, overrides, trust=trust)
    for note in (*trained.tokenizer.notes, *tokenizer_notes(trained.tokenizer, trained.source)):
        on_note(note)
    return trained


def load_generator(trained: TrainedModel, device: torch.device) -> ModelWithHeads:
    """Its module on `device`. Raises `ConfigError` for one that generates nothing."""
    module = load_model(trained, device)
    if "lm_head" not in module.heads:
        raise ConfigError(f"{trained.source.path} is a classifier, which cannot generate text.")
    return module


def _new_texts(
    trained: TrainedModel,
    prompts: EncodedPrompts,
    options: GenerationOptions,
    *,
    on_note: Callable[[str], None],
    on_text: TextListener | None,
) -> list[str]:
    device = choose_device(trained.config, Topology())
    module = load_generator(trained, device)
    generator = torch.Generator(device).manual_seed(options.seed)
    return continue_prompts(trained, module, prompts, options, generator, on_note=on_note, on_text=on_text)


def continue_prompts(
    trained: TrainedModel,
    module: ModelWithHeads,
    prompts: EncodedPrompts,
    options: GenerationOptions,
    generator: torch.Generator,
    *,
    on_note: Callable[[str], None],
    on_text: TextListener | None = None,
) -> list[str]:
    """The new text of each prompt, up to a token or a text that ends it."""
    texts: list[str] = []
    longest = 0
    for first in range(0, len(prompts.rows), _BATCH_SIZE):
        batch = prompts[first : first + _BATCH_SIZE]
        stops = Stops(trained.tokenizer, batch.before, options.stop, prompts.ends)
        live = None
        if on_text is not None:
            stream = TextStream(trained.tokenizer, batch.before[0], options.stop)
            live = _Live(stops, stream, on_text, first)
            live.show(batch.shown[0])
        continuations = generate(
            module,
            batch.rows,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            eos_id=trained.tokenizer.eos_id,
            is_finished=stops.is_finished if live is None else live.is_finished,
            num_kept=prompts.num_kept,
            not_empty=[number for number, is_empty in enumerate(batch.is_empty) if is_empty],
            generator=generator,
        )
        # The last new token is not read again.
        longest = max(
            longest, *(len(row) + len(new) - 1 for row, new in zip(batch.rows, continuations, strict=True))
        )
        found = [stops.cut(i, new) for i, new in enumerate(continuations)]
        texts += found
        if live is not None:
            live.finish([shown + new for shown, new in zip(batch.shown, found, strict=True)])
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
