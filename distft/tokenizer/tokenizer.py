"""Text to token ids and back, by a sentencepiece model."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from distft import storage
from distft.errors import DataError
from distft.tokenizer.proto import ModelDescription, PieceType, describe
from distft.tokenizer.words import SPACE, WordEncoder, word_pattern


class Tokenizer:
    """A sentencepiece model.

    Models that are `is_exact` (what `train_tokenizer` makes with byte fallback) give every text back:
    `decode(encode(s)) == s` for any string that UTF-8 can hold. An imported model encodes and decodes as
    sentencepiece itself does, normalization and all.

    Special ids are None where the model has none; nothing may be assumed about their values.
    """

    def __init__(self, model: bytes) -> None:
        """Take a serialized sentencepiece `ModelProto`; raise `DataError` where it is none."""
        self._model = model
        self._description = describe(model)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError) as error:
            raise DataError(f"sentencepiece refuses the model: {error}") from error
        self.vocab_size: int = self._processor.get_piece_size()
        self.bos_id = _id_or_none(self._processor.bos_id())
        self.eos_id = _id_or_none(self._processor.eos_id())
        self.pad_id = _id_or_none(self._processor.pad_id())
        self.unk_id = _id_or_none(self._processor.unk_id())
        self._byte_ids = self._description.byte_ids()
        self.is_exact = self._description.keeps_text and len(self._byte_ids) == 256
        words = word_pattern(self._description)
        self._words = words and WordEncoder(
            self._encode_natively, words, dummy_prefix=self._description.add_dummy_prefix
        )

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a `.model` file: a path, or a URL that fsspec knows. Raises `DataError` naming it."""
        try:
            model = storage.read_bytes(path)
        except OSError as error:
            raise DataError(
                f"tokenizer {path} cannot be read: {error}. Train one with `distft tokenizer train`, or "
                "bring a sentencepiece .model in with `distft tokenizer import`."
            ) from error
        try:
            return cls(model)
        except DataError as error:
            raise DataError(f"tokenizer {path}: {error}") from error

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of all that decides the ids, so equal for two files that encode alike."""
        special_ids = (self.bos_id, self.eos_id, self.pad_id, self.unk_id)
        return self._description.fingerprint(tuple(-1 if i is None else i for i in special_ids))

    @property
    def description(self) -> ModelDescription:
        """Pieces and settings of the model."""
        return self._description

    def to_bytes(self) -> bytes:
        """The model as `Tokenizer(...)` takes it."""
        return self._model

    def save(self, path: str | Path) -> None:
        """Write the model to a path or URL, whole or not at all. Raises `DataError` where that fails."""
        try:
            storage.commit_bytes(path, self._model)
        except OSError as error:
            raise DataError(f"tokenizer cannot be written to {path}: {error}.") from error

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without bos or eos. Raises `DataError` for lone surrogates, which are not text."""
        ids: list[int] = self.encode_array(text).tolist()
        return ids

    def encode_array(self, text: str) -> NDArray[np.int32]:
        """As `encode`; long texts come faster this way."""
        try:
            if SPACE in text:
                return self._encode_with_space_sign(text)
            if self._words:
                return self._words.encode(text)
            return self._encode_natively([text])[0]
        except DataError:
            check_text(text)  # to name the place in this text, not in a word of it
            raise

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[list[int]]:
        """`encode` of each text, in their order; the ids do not depend on `num_threads`."""
        if num_threads == 1:
            return [self.encode(text) for text in texts]
        plain = [index for index, text in enumerate(texts) if SPACE not in text]
        arrays = self._encode_natively([texts[index] for index in plain], num_threads)
        found = dict(zip(plain, arrays, strict=True))
        return [found[i].tolist() if i in found else self.encode(text) for i, text in enumerate(texts)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text that `ids` stand for; control ids stand for none.

        Bytes that are no UTF-8 (ids cut in mid-character, say) become U+FFFD. Raises `DataError` for an id
        outside the vocabulary.
        """
        outside = [int(i) for i in ids if not 0 <= i < self.vocab_size]
        if outside:
            raise DataError(f"token id {outside[0]} is outside the vocabulary of {self.vocab_size}.")
        if not self._description.keeps_text:
            text: str = self._processor.decode([int(i) for i in ids])
            return text
        return b"".join([self._surfaces[i] for i in ids]).decode("utf-8", "replace")

    def token_bytes(self) -> NDArray[np.int64]:
        """UTF-8 bytes that each id stands for [vocab_size]: 1 for byte pieces, 0 for control and unknown."""
        silent = (PieceType.CONTROL, PieceType.UNKNOWN)
        lengths = [
            0 if piece.type in silent else len(surface)
            for piece, surface in zip(self._description.pieces, self._surfaces, strict=True)
        ]
        return np.array(lengths, dtype=np.int64)

    @cached_property
    def _surfaces(self) -> list[bytes]:
        return [_surface(p.text, p.type, self._description.unk_surface) for p in self._description.pieces]

    @cached_property
    def _space_sign_ids(self) -> list[int]:
        if self._byte_ids:
            return [self._byte_ids[byte] for byte in SPACE.encode()]
        return [] if self.unk_id is None else [self.unk_id]

    def _encode_with_space_sign(self, text: str) -> NDArray[np.int32]:
        """U+2581 in a text: sentencepiece takes it for a space, and so do imported models that alter text.

        Where text is kept it is spelled in bytes, or is unknown if the model has none; the rest around it is
        encoded by itself.
        """
        if not self._description.keeps_text:
            return self._encode_natively([text])[0]
        first, *others = [self.encode_array(part) if part else _NO_IDS for part in text.split(SPACE)]
        sign = np.array(self._space_sign_ids, dtype=np.int32)
        return np.concatenate([first, *(ids for other in others for ids in (sign, other))])

    def _encode_natively(self, texts: list[str], num_threads: int = 1) -> list[NDArray[np.int32]]:
        try:
            if num_threads == 1 and len(texts) < _WORTH_A_BATCH:
                return [self._processor.encode_as_numpy(text) for text in texts]
            ids: list[NDArray[np.int32]] = self._processor.encode_as_numpy(texts, num_threads=num_threads)
        except (TypeError, RuntimeError) as error:
            for text in texts:
                check_text(text)
            raise DataError(f"sentencepiece cannot encode a text: {error}") from error
        return ids


_WORTH_A_BATCH = 64  # sentencepiece starts a thread for each batch, 0.2 ms; a single word costs 6 us more
_NO_IDS = np.empty(0, dtype=np.int32)


def check_text(text: str) -> None:
    """Raise `DataError` for lone surrogates: UTF-8 has no bytes for them, so they are not text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"character {error.start} of a text is the lone surrogate U+{ord(text[error.start]):04X}, "
            "which is half a character and has no UTF-8: mend the text, or read it with errors replaced."
        ) from None


def import_tokenizer(path: str | Path, output: str | Path) -> Tokenizer:
    """Bring an existing sentencepiece model in: check that it loads and encodes, and copy it to `output`."""
    tokenizer = Tokenizer.load(path)
    tokenizer.encode("a trial")
    tokenizer.save(output)
    return tokenizer


def _id_or_none(value: int) -> int | None:
    return None if value < 0 else value


def _surface(text: str, kind: PieceType, unk_surface: str) -> bytes:
    if kind is PieceType.CONTROL:
        return b""
    if kind is PieceType.UNKNOWN:
        return unk_surface.encode()
    if kind is PieceType.BYTE:
        return bytes([int(text[1:-1], 16)])
    return text.replace(SPACE, " ").encode("utf-8", "surrogateescape")
