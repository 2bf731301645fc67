"""What the rest of distft knows of a tokenizer, whichever library encodes."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from types import MappingProxyType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from distft.errors import DataError
from distft.storage import AnyPath


class Tokenizer(ABC):
    """Encodes text to token ids and decodes them.

    One that `is_lossless` reproduces every text without control tokens: `decode(encode(s)) == s` for any
    string that has a UTF-8 encoding. Others encode and decode exactly as their library does.

    A special id is None if the tokenizer does not define it; callers must not assume values.
    """

    file_name: str  # of the main file of `files`
    vocab_size: int  # one more than the greatest id
    bos_id: int | None  # where a text begins: [CLS] of BERT
    eos_id: int | None  # where it ends: [SEP] of BERT
    pad_id: int | None
    unk_id: int | None
    is_lossless: bool
    adds_bos: bool = False  # whether transformers puts bos before a text, as the files say
    notes: tuple[str, ...] = ()  # on what the files say and is not applied
    chat_templates: Mapping[str, str] = MappingProxyType({})  # Jinja by name, from the files; empty: none

    @staticmethod
    def load(path: AnyPath) -> "Tokenizer":
        """Read a tokenizer from a path or fsspec URL: a file, or a directory of transformers.

        A file is a sentencepiece `.model`, a `tokenizer.json`, BERT's `vocab.txt`, or GPT-2's `vocab.json`
        beside `merges.txt`. What transformers' other files beside it add to it counts too. Raises
        `DataError` if it cannot be read, is of no supported kind, or the files beside it are of another one.
        """
        from distft.tokenizer.loading import load_tokenizer

        return load_tokenizer(path)

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hex digest of vocabulary, settings and special ids: equal fingerprints mean equal encodings."""

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """The files that `load` reads, by name: together in a directory they are this tokenizer."""

    @abstractmethod
    def save(self, path: str | Path) -> None:
        """Write the tokenizer to a path or URL. Raises `DataError` if that fails."""

    @abstractmethod
    def encode_array(self, text: str) -> NDArray[np.int32]:
        """Ids of `text`, without bos or eos. Raises `DataError` for lone surrogates."""

    @abstractmethod
    def encode_with_offsets(self, text: str) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Ids of `text` and, for each, [start, stop) of its characters in `text`: [N] and [N, 2].

        The text of a special token, such as `</s>`, is that token, as always in transformers. Tokens that
        share a character all have it. Raises `DataError` as `encode_array`, and if the tokenizer changes
        texts so that places in them are lost.
        """

    def with_chat_template(self, source: str) -> Self:
        """The same tokenizer with this chat template, which `files` and exports have too."""
        tokenizer = copy(self)
        tokenizer.chat_templates = {"default": source}
        return tokenizer

    @property
    @abstractmethod
    def special_texts(self) -> Mapping[str, str]:
        """The texts of the special tokens by the names that transformers gives to a template: `bos_token`."""

    def encode(self, text: str) -> list[int]:
        """`encode_array` as a list."""
        ids: list[int] = self.encode_array(text).tolist()
        return ids

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[list[int]]:  # noqa: ARG002
        """`encode` of each text, in order; the ids do not depend on `num_threads`."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; control ids such as bos, eos and pad have none.

        Invalid UTF-8, as from a sequence cut within a character, becomes U+FFFD. Raises `DataError` for an
        id outside the vocabulary.
        """
        outside = [int(i) for i in ids if not 0 <= i < self.vocab_size]
        if outside:
            raise DataError(f"token id {outside[0]} is outside the vocabulary of {self.vocab_size}.")
        return self._decode([int(i) for i in ids])

    @abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """`decode` of ids within the vocabulary."""

    @abstractmethod
    def token_bytes(self) -> NDArray[np.int64]:
        """[vocab_size] UTF-8 bytes of each id: 1 for byte pieces, 0 for control and unknown ones.

        WordPiece has no ids for white space, so its bytes count nowhere.
        """

    @abstractmethod
    def starts_word(self) -> NDArray[np.bool_]:
        """[vocab_size] whether a word begins with each id: at a space, or with a piece that is no text."""

    @abstractmethod
    def piece_id(self, piece: str) -> int | None:
        """The id of the piece with this text, such as `<mask>`; None if there is none."""

    @property
    @abstractmethod
    def piece_texts(self) -> Sequence[str]:
        """The text of each id as its library writes it; "" for an id without a token."""

    @abstractmethod
    def padding_id(self) -> int | None:
        """An id to pad with that is not taken for text: pad, else eos, bos or a like one."""

    @abstractmethod
    def huggingface_files(
        self,
        *,
        max_seq_len: int,
        pad_id: int | None = None,
        begins_with_bos: bool = False,
        ends_with_eos: bool = False,
    ) -> tuple[Mapping[str, bytes], list[str]]:
        """The files that transformers' `AutoTokenizer` loads, by name, and notes on what they lack.

        `pad_id` is for a tokenizer without pad. With `begins_with_bos` transformers should put bos before
        each text, and without it should not; with `ends_with_eos` it should put eos behind each.
        """


def check_text(text: str) -> None:
    """Raise `DataError` for lone surrogates, which have no UTF-8 encoding."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"character {error.start} of a text is the lone surrogate U+{ord(text[error.start]):04X}, "
            "half a character without a UTF-8 encoding: correct the text, or read it with errors replaced."
        ) from None
