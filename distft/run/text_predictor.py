"""Predicts a text for each row of a file with a language model: the completion, the target or the answer."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from distft.collectives import Collectives
from distft.config import parse
from distft.data.completion import CompletionConfig
from distft.data.conversations import ConversationsConfig
from distft.data.preferences import PreferencesConfig
from distft.data.records import RowErrors
from distft.errors import ConfigError, ErrorCollector
from distft.model.heads import LanguageModelHead
from distft.model.with_heads import ModelWithHeads
from distft.objective.mixture import Mixture
from distft.run.chat_prompts import read_chats, require_questions
from distft.run.generate import (
    EncodedPrompts,
    continue_prompts,
    encode_chats,
    encode_prompts,
    load_generator,
)
from distft.run.prediction_files import MESSAGES
from distft.run.prediction_rows import GREEDY, Predicting, PredictOptions, model_identity
from distft.run.pretrained import TrainedModel
from distft.storage import checksum_of_bytes

GENERATED = "generated"  # the column of what is predicted
_BLOCK_ROWS = 64


def generates_texts(trained: TrainedModel, options: PredictOptions) -> bool:
    """Whether the model predicts no labels, but texts."""
    objective = trained.config.objective
    if isinstance(objective, Predicting | Mixture) or options.others:
        return False
    heads = objective.heads(trained.label_names)
    return any(isinstance(head, LanguageModelHead) for head in heads.values())


class TextPredictor:
    """What the model generates behind each row of a file."""

    def __init__(
        self,
        trained: TrainedModel,
        rows_path: str,
        options: PredictOptions,
        *,
        on_note: Callable[[str], None],
    ) -> None:
        """Reads and encodes all rows. Raises `ConfigError` and `DataError` with all that is wrong."""
        _require_no_other_options(options)
        self._trained, self._options = trained, options.generation or GREEDY
        self._on_note = on_note
        self._module: ModelWithHeads | None = None
        self._device = torch.device("cpu")
        self._prompts: EncodedPrompts
        self._given: Sequence[dict[str, Any]]
        data = trained.config.data
        if isinstance(data, ConversationsConfig | PreferencesConfig) and data.reads_chats:
            if options.text is not None:
                raise ConfigError("--text-column: the model answers conversations. Leave it out.")
            errors = RowErrors(rows_path)
            chats = read_chats(rows_path, _chat_columns(data, rows_path), errors)
            require_questions(chats, errors)
            self._given = [{"line": chat.line, MESSAGES: list(chat.messages)} for chat in chats]
            self._prompts = encode_chats(trained, chats, errors=errors, on_note=on_note)
        else:
            self._given, texts = read_texts(data, rows_path, options)
            self._prompts = encode_prompts(trained, texts, on_note=on_note)
        self.num_rows, self.block_rows = len(self._given), _BLOCK_ROWS
        self.summary = f"{rows_path}: {self.num_rows:,} prompts"

    def identity(self, collectives: Collectives, device: torch.device) -> dict[str, Any]:  # noqa: ARG002
        return {
            **model_identity(self._trained),
            "rows": checksum_of_bytes(repr((self._prompts.rows, self._given)).encode()),
            "generation": repr(self._options),
            "ends": sorted(self._prompts.ends),
        }

    def load(self, device: torch.device) -> None:
        self._module, self._device = load_generator(self._trained, device), device

    def predictions(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """What is drawn depends on the seed and the block, not on ranks and interruptions."""
        assert self._module is not None
        generator = torch.Generator(self._device).manual_seed(self._options.seed + start)
        texts = continue_prompts(
            self._trained,
            self._module,
            self._prompts[start:stop],
            self._options,
            generator,
            on_note=self._on_note,
        )
        for given, text in zip(self._given[start:stop], texts, strict=True):
            yield {**given, GENERATED: text}


def _require_no_other_options(options: PredictOptions) -> None:
    errors = ErrorCollector()
    for option, value in (
        ("--text-pair-column", options.text_pair),
        ("--image-column", options.image),
        ("--head", options.head),
    ):
        with errors.collect():
            if value is not None:
                raise ConfigError(f"{option} {value}: the model continues texts. Leave it out.")
    with errors.collect():
        if options.generation is not None and "" in options.generation.stop:
            raise ConfigError("a stop text is empty: leave it out.")
    errors.raise_if_any()


def _chat_columns(data: ConversationsConfig | PreferencesConfig, rows_path: str) -> ConversationsConfig:
    """What the file calls its messages: as the training data does."""
    if isinstance(data, ConversationsConfig):
        return data
    return ConversationsConfig(path=rows_path, messages=data.prompt or "messages")


def read_texts(data: Any, rows_path: str, options: PredictOptions) -> tuple[list[dict[str, Any]], list[str]]:
    """Of each row what identifies it, and the prompt: as `data`, the training data, has it."""
    known = data if isinstance(data, CompletionConfig) else CompletionConfig(path=rows_path)
    if isinstance(data, PreferencesConfig) and data.prompt is not None:
        known = known.model_copy(update={"prompt": data.prompt})
    changes: dict[str, Any] = {"path": rows_path, "max_rows": None}
    if options.text is not None:
        template = known.template
        if template is not None:
            template = template.replace(f"{{{known.prompt}}}", f"{{{options.text}}}")
        changes |= {"prompt": options.text, "template": template}
    config: CompletionConfig = parse(CompletionConfig, {**known.model_dump(mode="json"), **changes})
    prompts = config.read_prompts()
    if any(GENERATED in record.values for record, _ in prompts):
        raise ConfigError(
            f"{rows_path}: a column is called {GENERATED!r}, as that of the predictions: rename it."
        )
    return [{"line": record.line, **record.values} for record, _ in prompts], [text for _, text in prompts]
