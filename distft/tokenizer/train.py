"""Trains sentencepiece vocabularies that are lossless: decoding reproduces every text."""

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from distft.config import Settings
from distft.errors import ConfigError
from distft.tokenizer.pretokenization import META_SPACE
from distft.tokenizer.sample import sample_sentences
from distft.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer

_RESERVED = re.compile(f"[{META_SPACE}\u2585\0]+")  # by sentencepiece, which drops text with U+2585
_TOO_HIGH = re.compile(r"Vocabulary size too high .*<= (\d+)")
_TOO_LOW = re.compile(r"smaller than required_chars\. \d+ vs (\d+)")
_DEFAULT_VOCAB_SIZE = 8192
_ALL_CHARACTERS = 0x110000 + 1000  # code points of Unicode, special and user-defined symbols
_BYTE_SYMBOL = re.compile(r"<0x[0-9A-F]{2}>")


class TokenizerTrainConfig(Settings):
    """Settings of the vocabulary."""

    algorithm: Literal["bpe", "unigram", "char"] = "bpe"
    vocab_size: int | None = Field(
        None, ge=1
    )  # total number of ids; None: 8192, for char all characters of the text
    byte_fallback: bool | None = None  # encode unknown characters as bytes; None: yes, except for char
    user_defined_symbols: tuple[str, ...] = ()  # each is always one id, wherever it occurs in a text
    character_coverage: float | None = Field(None, gt=0, le=1)  # None: 1 without byte fallback, else 0.9995
    unk_id: int | None = Field(0, ge=0)  # None is possible only with byte fallback
    bos_id: int | None = Field(1, ge=0)
    eos_id: int | None = Field(2, ge=0)
    pad_id: int | None = Field(None, ge=0)
    sample_bytes: int = Field(32 << 20, ge=1)  # most text to train on, a uniform sample of the corpus
    seed: int = Field(0, ge=0)
    num_threads: int = Field(16, ge=1)  # may affect the vocabulary, so it does not follow the machine's cores

    @model_validator(mode="after")
    def _check_ids_and_symbols(self) -> Self:
        problems = []
        if self.unk_id is None and not self.has_byte_fallback:
            problems.append("unk_id is missing: without byte_fallback, unknown characters need an id")
        ids = [i for i in (self.unk_id, self.bos_id, self.eos_id, self.pad_id) if i is not None]
        if len(set(ids)) < len(ids):
            problems.append("unk_id, bos_id, eos_id and pad_id must differ from one another")
        if max(ids, default=0) >= self.max_vocab_size:
            problems.append(
                f"unk_id, bos_id, eos_id and pad_id must be below vocab_size={self.max_vocab_size}"
            )
        problems += _symbol_problems(self.user_defined_symbols)
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def has_byte_fallback(self) -> bool:
        return self.algorithm != "char" if self.byte_fallback is None else self.byte_fallback

    @property
    def max_vocab_size(self) -> int:
        """The requested size; the vocabulary of char may be smaller."""
        return self.vocab_size or (_ALL_CHARACTERS if self.algorithm == "char" else _DEFAULT_VOCAB_SIZE)


def train_tokenizer(
    texts: Iterable[str], config: TokenizerTrainConfig, output_path: str | Path
) -> SentencePieceTokenizer:
    """Train on a sample of `texts`, write the model to `output_path`, return it.

    The same texts and settings give the same model. Raises `ConfigError` if there is no text, or too little
    for the vocabulary size; the message gives the possible sizes.
    """
    import sentencepiece  # settings are checked without it

    sample = sample_sentences(texts, config.sample_bytes, config.seed)
    sentences = list(_trainable_sentences(sample))
    if not sentences:
        raise ConfigError(
            "there is no text to train a tokenizer on: the corpus is empty or has only white space."
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=model, **_options(config)
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(_training_error_message(str(error), config, sample)) from error
    tokenizer = SentencePieceTokenizer(model.getvalue())
    tokenizer.save(output_path)
    return tokenizer


def _options(config: TokenizerTrainConfig) -> dict[str, Any]:
    """sentencepiece's options: no normalization, no dropped sentences, no output."""
    coverage = config.character_coverage or (0.9995 if config.has_byte_fallback else 1.0)
    special = {name: getattr(config, name) for name in ("unk_id", "bos_id", "eos_id", "pad_id")}
    return {
        "model_type": config.algorithm,
        "vocab_size": config.max_vocab_size,
        "hard_vocab_limit": config.algorithm != "char",
        "byte_fallback": config.has_byte_fallback,
        "character_coverage": coverage,
        "user_defined_symbols": [symbol.replace(" ", META_SPACE) for symbol in config.user_defined_symbols],
        **{name: -1 if value is None else value for name, value in special.items()},
        "unk_surface": "\ufffd",
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,  # indentation as one piece
        "max_sentence_length": 1 << 20,  # sampled sentences are far shorter
        "num_threads": config.num_threads,
        "minloglevel": 2,
    }


def _trainable_sentences(sample: list[str]) -> Iterator[str]:
    """Split the sample at characters that sentencepiece cannot learn.

    Trailing newlines, which sentencepiece would drop, move to the front, so that they are counted.
    """
    for text in sample:
        for sentence in _RESERVED.split(text):
            body = sentence.rstrip("\r\n")
            if body:
                yield sentence[len(body) :] + body


def _symbol_problems(symbols: tuple[str, ...]) -> list[str]:
    problems = []
    if len(set(symbols)) < len(symbols):
        problems.append("user_defined_symbols has a symbol twice")
    for symbol in symbols:
        if not symbol or _RESERVED.search(symbol) or _BYTE_SYMBOL.fullmatch(symbol):
            problems.append(f"user_defined_symbols: {symbol!r} cannot be a symbol, sentencepiece reserves it")
    return problems


def _training_error_message(message: str, config: TokenizerTrainConfig, sample: list[str]) -> str:
    num_bytes = sum(len(sentence.encode()) for sentence in sample)
    requested = f"vocab_size={config.max_vocab_size}"
    if found := _TOO_HIGH.search(message):
        return (
            f"{requested} is more than {num_bytes} bytes of text allow: at most {found[1]} are possible. "
            "Lower it, or train on more text."
        )
    if found := _TOO_LOW.search(message):
        return (
            f"{requested} is too small for the characters, bytes and special symbols alone: at least "
            f"{found[1]} are needed. Raise it, or lower character_coverage."
        )
    return f"sentencepiece cannot train this tokenizer: {message.strip()}"
