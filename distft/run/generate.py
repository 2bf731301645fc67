"""Continues prompts with a trained language model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePath

import torch

from distft import storage
from distft.data.records import read_records
from distft.data.rows import text_problem
from distft.errors import ConfigError, DataError
from distft.model.generation import generate
from distft.objective.prefix_lm import PrefixLM
from distft.run.data_context import tokenizer_notes
from distft.run.engines import choose_device
from distft.run.pretrained import TrainedModel, load_model, open_model
from distft.tokenizer import Tokenizer
from distft.topology import Topology

_BATCH_SIZE = 16  # prompts that the model continues at a time


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
) -> list[str]:
    """Each prompt with its continuation; of an encoder with a decoder the target alone.

    `on_note` gets what the model did not see or was not trained for.
    Raises `ConfigError` for a model that cannot generate, or a prompt or a stop text that is none.
    """
    _check_texts(prompts, options)
    trained = open_model(path, trust=trust)
    for note in (*trained.tokenizer.notes, *tokenizer_notes(trained.tokenizer, trained.source)):
        on_note(note)
    is_source = _reads_sources(trained)
    device = choose_device(trained.config, Topology())
    module = load_model(trained, device)
    if "lm_head" not in module.heads:
        raise ConfigError(f"{trained.source.path} is a classifier, which cannot generate text.")
    start, start_of_nothing = document_start(trained), _start_of_nothing(trained.tokenizer)
    end = source_end(trained) if is_source else []
    if not start and "" in prompts:
        on_note(
            "a prompt is empty, and the model has not learned how a document begins: its text goes on behind "
            f"token {start_of_nothing[0]}."
        )
    generator = torch.Generator(device).manual_seed(options.seed)
    texts, longest = [], 0
    for first in range(0, len(prompts), _BATCH_SIZE):
        batch = prompts[first : first + _BATCH_SIZE]
        encoded = [trained.tokenizer.encode(prompt) for prompt in batch]
        starts = [start if start or ids else start_of_nothing for ids in encoded]
        stops = _Stops(trained.tokenizer, [[] for _ in batch] if is_source else encoded, options.stop)
        rows = [[*begin, *ids, *end] for begin, ids in zip(starts, encoded, strict=True)]
        continuations = generate(
            module,
            rows,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            eos_id=trained.tokenizer.eos_id,
            is_finished=stops.is_finished if options.stop else None,
            num_kept=len(start),
            not_empty=[number for number, prompt in enumerate(batch) if not prompt],
            generator=generator,
        )
        # The last new token is not read again.
        longest = max(
            longest, *(len(row) + len(new) - 1 for row, new in zip(rows, continuations, strict=True))
        )
        targets = [stops.cut(i, continuations[i]) for i in range(len(batch))]
        texts += targets if is_source else [p + target for p, target in zip(batch, targets, strict=True)]
    if longest > module.config.longest_row:
        on_note(_window_note(module.config.longest_row))
    return texts


def _reads_sources(trained: TrainedModel) -> bool:
    """Whether an encoder reads the prompts. Raises `ConfigError` for a model that cannot generate."""
    model = trained.config.model
    if model is None or model.is_causal or model.is_encoder_decoder:
        return model is not None and model.is_encoder_decoder
    raise ConfigError(
        f"{trained.source.path} is a bidirectional model, which fills in hidden tokens, and continues no "
        "text."
    )


def _check_texts(prompts: Sequence[str], options: GenerationOptions) -> None:
    if "" in options.stop:
        raise ConfigError("a stop text is empty: leave it out.")
    if any(map(text_problem, prompts)):
        raise ConfigError("a prompt has a lone surrogate, half a character: correct it.")


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


class _Stops:
    """The texts of continuations, up to the first stop text."""

    def __init__(self, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._stop = stop
        # A token has a byte of text or none; those without any are rare.
        self._tail = max((len(text.encode()) for text in stop), default=0) + 16

    def is_finished(self, number: int, new: list[int]) -> bool:
        """Whether the last tokens complete a stop text. Looks at a few tokens, not at all of them."""
        before = [*self._prompts[number], *new[: -self._tail]][-self._tail :]
        text = self._continuation(before, new[-self._tail :])
        return any(stop in text for stop in self._stop)

    def cut(self, number: int, new: list[int]) -> str:
        """The text of the new tokens of a prompt, before the first stop text and without eos."""
        text = self._continuation(self._prompts[number], new[:-1] if new[-1:] == [self._eos] else new)
        return text[: min((at for stop in self._stop if (at := text.find(stop)) >= 0), default=len(text))]

    @property
    def _eos(self) -> int | None:
        return self._tokenizer.eos_id

    def _continuation(self, before: Sequence[int], new: Sequence[int]) -> str:
        """The text that `new` adds: alone it would lose the space that models put before each text."""
        known = [token for token in (*before, *new) if token < self._tokenizer.vocab_size]
        first = [token for token in before if token < self._tokenizer.vocab_size]
        whole, start = self._tokenizer.decode(known), self._tokenizer.decode(first)
        if whole.startswith(start):
            return whole[len(start) :]
        return self._tokenizer.decode(known[len(first) :])
