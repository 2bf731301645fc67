"""Training a vocabulary with sentencepiece, so that every text comes back as it was."""

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, Self

import sentencepiece
from pydantic import Field, model_validator

from distft.config import Settings
from distft.errors import ConfigError
from distft.tokenizer.sample import sample_text
from distft.tokenizer.tokenizer import Tokenizer
from distft.tokenizer.words import SPACE

_RESERVED = re.compile(
    f"[{SPACE}\u2585\0]+"
)  # sentencepiece keeps these for itself, and drops text with U+2585
_TOO_HIGH = re.compile(r"Vocabulary size too high .*<= (\d+)")
_TOO_LOW = re.compile(r"smaller than required_chars\. \d+ vs (\d+)")
_DEFAULT_VOCAB_SIZE = 8192
_EVERY_CHARACTER = 0x110000 + 1000
_BYTE_SYMBOL = re.compile(r"<0x[0-9A-F]{2}>")


class TokenizerTrainConfig(Settings):
    """How a vocabulary is made."""

    algorithm: Literal["bpe", "unigram", "char"] = "bpe"
    vocab_size: int | None = Field(
        None, ge=1
    )  # ids in all; None: 8192, and for char every character there is
    byte_fallback: bool | None = None  # spell unknown characters in bytes; None: yes, but not for char
    user_defined_symbols: tuple[str, ...] = ()  # each becomes one id wherever it stands in a text
    character_coverage: float | None = Field(None, gt=0, le=1)  # None: 1 without byte fallback, else 0.9995
    unk_id: int | None = Field(0, ge=0)  # None is possible with byte fallback only
    bos_id: int | None = Field(1, ge=0)
    eos_id: int | None = Field(2, ge=0)
    pad_id: int | None = Field(None, ge=0)
    sample_bytes: int = Field(32 << 20, ge=1)  # of text to train on at most, drawn evenly from all there is
    seed: int = Field(0, ge=0)
    num_threads: int = Field(16, ge=1)  # the vocabulary may depend on it; the machine's cores do not matter

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        faults = []
        if self.unk_id is None and not self.has_byte_fallback:
            faults.append("unk_id is missing: without byte_fallback, unknown characters need an id")
        ids = [i for i in (self.unk_id, self.bos_id, self.eos_id, self.pad_id) if i is not None]
        if len(set(ids)) < len(ids):
            faults.append("unk_id, bos_id, eos_id and pad_id must differ from one another")
        if max(ids, default=0) >= self.max_vocab_size:
            faults.append(f"unk_id, bos_id, eos_id and pad_id must be below vocab_size={self.max_vocab_size}")
        faults += _symbol_faults(self.user_defined_symbols)
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def has_byte_fallback(self) -> bool:
        return self.algorithm != "char" if self.byte_fallback is None else self.byte_fallback

    @property
    def max_vocab_size(self) -> int:
        """The size asked for; char may come to fewer."""
        return self.vocab_size or (_EVERY_CHARACTER if self.algorithm == "char" else _DEFAULT_VOCAB_SIZE)


def train_tokenizer(texts: Iterable[str], config: TokenizerTrainConfig, output_path: str | Path) -> Tokenizer:
    """Train on a sample of `texts`, write the model to `output_path`, return it.

    The same texts and settings give the same model. Raises `ConfigError` where there is no text, or too
    little for the vocabulary asked for, with the sizes that are possible.
    """
    sample = sample_text(texts, config.sample_bytes, config.seed)
    sentences = list(_sentences(sample))
    if not sentences:
        raise ConfigError(
            "there is no text to train a tokenizer on: the corpus is empty, or white space only."
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=model, **_options(config)
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(_explain(str(error), config, sample)) from error
    tokenizer = Tokenizer(model.getvalue())
    tokenizer.save(output_path)
    return tokenizer


def _options(config: TokenizerTrainConfig) -> dict[str, Any]:
    """sentencepiece's options: nothing may alter the text, nothing may be dropped, nothing be printed."""
    coverage = config.character_coverage or (0.9995 if config.has_byte_fallback else 1.0)
    special = {name: getattr(config, name) for name in ("unk_id", "bos_id", "eos_id", "pad_id")}
    return {
        "model_type": config.algorithm,
        "vocab_size": config.max_vocab_size,
        "hard_vocab_limit": config.algorithm != "char",
        "byte_fallback": config.has_byte_fallback,
        "character_coverage": coverage,
        "user_defined_symbols": [symbol.replace(" ", SPACE) for symbol in config.user_defined_symbols],
        **{name: -1 if value is None else value for name, value in special.items()},
        "unk_surface": "\ufffd",
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,  # indentation in one piece
        "max_sentence_length": 1 << 20,  # pieces of the sample are far shorter
        "num_threads": config.num_threads,
        "minloglevel": 2,
    }


def _sentences(sample: list[str]) -> Iterator[str]:
    """The sample without the characters that sentencepiece cannot learn.

    Line ends at a sentence's tail, which it would drop, come to the head: they are to be counted too.
    """
    for text in sample:
        for part in _RESERVED.split(text):
            body = part.rstrip("\r\n")
            if body:
                yield part[len(body) :] + body


def _symbol_faults(symbols: tuple[str, ...]) -> list[str]:
    faults = []
    if len(set(symbols)) < len(symbols):
        faults.append("user_defined_symbols has one twice")
    for symbol in symbols:
        if not symbol or _RESERVED.search(symbol) or _BYTE_SYMBOL.fullmatch(symbol):
            faults.append(
                f"user_defined_symbols: {symbol!r} cannot be a symbol, sentencepiece needs it itself"
            )
    return faults


def _explain(message: str, config: TokenizerTrainConfig, sample: list[str]) -> str:
    num_bytes = sum(len(piece.encode()) for piece in sample)
    asked = f"vocab_size={config.max_vocab_size}"
    if found := _TOO_HIGH.search(message):
        return (
            f"{asked} is more than {num_bytes} bytes of text give: at most {found[1]} are possible. "
            "Lower it, or train on more text."
        )
    if found := _TOO_LOW.search(message):
        return (
            f"{asked} is too small for the characters, bytes and special symbols alone: at least {found[1]} "
            "are needed. Raise it, or lower character_coverage."
        )
    return f"sentencepiece cannot train this tokenizer: {message.strip()}"
