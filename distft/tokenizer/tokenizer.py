"""Encodes text to token ids and decodes them, with a sentencepiece model."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distft import storage
from distft.errors import DataError
from distft.tokenizer.model_proto import Piece, PieceType, parse_model_proto
from distft.tokenizer.pretokenization import META_SPACE, CachedWordEncoder, pretokenization_pattern


class Tokenizer:
    """A sentencepiece model.

    A model that `is_lossless` (one that `train_tokenizer` made with byte fallback) reproduces every text:
    `decode(encode(s)) == s` for any string that has a UTF-8 encoding. Other models encode and decode
    exactly as sentencepiece does, including its normalization.

    A special id is None if the model does not define it; callers must not assume values.
    """

    def __init__(self, model: bytes) -> None:
        """`model`: a serialized sentencepiece `ModelProto`. Raises `DataError` if it is not one."""
        import sentencepiece  # settings of tokenizers are checked without it

        self._model = model
        self.model_proto = parse_model_proto(model)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError) as error:
            raise DataError(f"sentencepiece rejects the model: {error}") from error
        self.vocab_size: int = self._processor.get_piece_size()
        self.bos_id = _id_or_none(self._processor.bos_id())
        self.eos_id = _id_or_none(self._processor.eos_id())
        self.pad_id = _id_or_none(self._processor.pad_id())
        self.unk_id = _id_or_none(self._processor.unk_id())
        self._byte_ids = self.model_proto.byte_ids()
        self.is_lossless = self.model_proto.has_identity_normalization and len(self._byte_ids) == 256
        pattern = pretokenization_pattern(self.model_proto)
        self._word_encoder = pattern and CachedWordEncoder(
            self._encode_with_sentencepiece, pattern, dummy_prefix=self.model_proto.add_dummy_prefix
        )

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a `.model` file from a path or fsspec URL. Raises `DataError` if it cannot be read."""
        try:
            model = storage.read_bytes(path)
        except OSError as error:
            raise DataError(
                f"tokenizer {path} cannot be read: {error}. Train one with `distft tokenizer train`, or "
                "import a sentencepiece .model with `distft tokenizer import`."
            ) from error
        try:
            return cls(model)
        except DataError as error:
            raise DataError(f"tokenizer {path}: {error}") from error

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of vocabulary, settings and special ids: equal fingerprints mean equal encodings."""
        special_ids = (self.bos_id, self.eos_id, self.pad_id, self.unk_id)
        return self.model_proto.fingerprint(tuple(-1 if i is None else i for i in special_ids))

    def to_bytes(self) -> bytes:
        """The serialized `ModelProto`."""
        return self._model

    def save(self, path: str | Path) -> None:
        """Write the model atomically to a path or URL. Raises `DataError` if that fails."""
        try:
            storage.commit_bytes(path, self._model)
        except OSError as error:
            raise DataError(f"tokenizer cannot be written to {path}: {error}.") from error

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without bos or eos. Raises `DataError` for lone surrogates."""
        ids: list[int] = self.encode_array(text).tolist()
        return ids

    def encode_array(self, text: str) -> NDArray[np.int32]:
        """`encode` as an array, faster for long texts."""
        try:
            if META_SPACE in text:
                return self._encode_with_meta_space(text)
            if self._word_encoder:
                return self._word_encoder.encode(text)
            return self._encode_with_sentencepiece([text])[0]
        except DataError:
            check_text(text)  # its message gives the position in `text`, not in a word of it
            raise

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[list[int]]:
        """`encode` of each text, in order; the ids do not depend on `num_threads`."""
        if num_threads == 1:
            return [self.encode(text) for text in texts]
        plain = [index for index, text in enumerate(texts) if META_SPACE not in text]
        arrays = self._encode_with_sentencepiece([texts[index] for index in plain], num_threads)
        encoded = dict(zip(plain, arrays, strict=True))
        return [encoded[i].tolist() if i in encoded else self.encode(text) for i, text in enumerate(texts)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; control ids have none.

        Invalid UTF-8, as from a sequence cut within a character, becomes U+FFFD. Raises `DataError` for an
        id outside the vocabulary.
        """
        outside = [int(i) for i in ids if not 0 <= i < self.vocab_size]
        if outside:
            raise DataError(f"token id {outside[0]} is outside the vocabulary of {self.vocab_size}.")
        if not self.model_proto.has_identity_normalization:
            text: str = self._processor.decode([int(i) for i in ids])
            return text
        return b"".join([self._surfaces[i] for i in ids]).decode("utf-8", "replace")

    def token_bytes(self) -> NDArray[np.int64]:
        """[vocab_size] UTF-8 bytes of each id: 1 for byte pieces, 0 for control and unknown ones."""
        without_text = (PieceType.CONTROL, PieceType.UNKNOWN)
        lengths = [
            0 if piece.type in without_text else len(surface)
            for piece, surface in zip(self.model_proto.pieces, self._surfaces, strict=True)
        ]
        return np.array(lengths, dtype=np.int64)

    @cached_property
    def _surfaces(self) -> list[bytes]:
        return [_surface(piece, self.model_proto.unk_surface) for piece in self.model_proto.pieces]

    @cached_property
    def _meta_space_ids(self) -> list[int]:
        if self._byte_ids:
            return [self._byte_ids[byte] for byte in META_SPACE.encode()]
        return [] if self.unk_id is None else [self.unk_id]

    def _encode_with_meta_space(self, text: str) -> NDArray[np.int32]:
        """Encode a text that contains U+2581, which sentencepiece would take for a space.

        A model that normalizes text keeps that behaviour. Otherwise U+2581 becomes its bytes, or unknown
        without byte fallback, and the text around it is encoded separately.
        """
        if not self.model_proto.has_identity_normalization:
            return self._encode_with_sentencepiece([text])[0]
        first, *others = [self.encode_array(s) if s else _NO_IDS for s in text.split(META_SPACE)]
        meta_space = np.array(self._meta_space_ids, dtype=np.int32)
        return np.concatenate([first, *(ids for other in others for ids in (meta_space, other))])

    def _encode_with_sentencepiece(self, texts: list[str], num_threads: int = 1) -> list[NDArray[np.int32]]:
        try:
            if num_threads == 1 and len(texts) < _MIN_BATCH_TEXTS:
                return [self._processor.encode_as_numpy(text) for text in texts]
            ids: list[NDArray[np.int32]] = self._processor.encode_as_numpy(texts, num_threads=num_threads)
        except (TypeError, RuntimeError) as error:
            for text in texts:
                check_text(text)
            raise DataError(f"sentencepiece cannot encode a text: {error}") from error
        return ids


_MIN_BATCH_TEXTS = (
    64  # sentencepiece starts a thread per batch, 0.2 ms; a text outside a batch costs 6 us more
)
_NO_IDS = np.empty(0, dtype=np.int32)


def check_text(text: str) -> None:
    """Raise `DataError` for lone surrogates, which have no UTF-8 encoding."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"character {error.start} of a text is the lone surrogate U+{ord(text[error.start]):04X}, "
            "half a character without a UTF-8 encoding: correct the text, or read it with errors replaced."
        ) from None


def import_tokenizer(path: str | Path, output: str | Path) -> Tokenizer:
    """Copy an existing sentencepiece model to `output` after checking that it loads and encodes."""
    tokenizer = Tokenizer.load(path)
    tokenizer.encode("trial text")
    tokenizer.save(output)
    return tokenizer


def _id_or_none(value: int) -> int | None:
    return None if value < 0 else value


def _surface(piece: Piece, unk_surface: str) -> bytes:
    if piece.type is PieceType.CONTROL:
        return b""
    if piece.type is PieceType.UNKNOWN:
        return unk_surface.encode()
    if piece.type is PieceType.BYTE:
        return bytes([int(piece.text[1:-1], 16)])
    return piece.text.replace(META_SPACE, " ").encode("utf-8", "surrogateescape")
