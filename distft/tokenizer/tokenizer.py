"""Encodes text to token ids and decodes them, with a sentencepiece model."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distft import storage
from distft.errors import ConfigError, DataError
from distft.storage import AnyPath
from distft.tokenizer.added_tokens import with_added_tokens
from distft.tokenizer.companions import TOKENIZER_JSON, read_companions
from distft.tokenizer.model_proto import (
    MAX_MODEL_BYTES,
    SPECIAL_NAMES,
    Piece,
    PieceType,
    parse_model_proto,
    without_dummy_prefix,
)
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
        self.adds_bos = (
            False  # whether transformers puts bos before a text, as the files beside the model say
        )
        self.notes: tuple[str, ...] = ()  # on what the files beside the model say and it cannot represent
        special_ids = self.model_proto.special_ids
        self.bos_id = special_ids.get("bos", _id_or_none(self._processor.bos_id()))
        self.eos_id = special_ids.get("eos", _id_or_none(self._processor.eos_id()))
        self.pad_id = special_ids.get("pad", _id_or_none(self._processor.pad_id()))
        self.unk_id = _id_or_none(self._processor.unk_id())
        self._byte_ids = self.model_proto.byte_ids()
        self.is_lossless = self.model_proto.has_identity_normalization and len(self._byte_ids) == 256
        pattern = pretokenization_pattern(self.model_proto)
        self._word_encoder = pattern and CachedWordEncoder(
            self._encode_with_sentencepiece, pattern, dummy_prefix=self.model_proto.add_dummy_prefix
        )

    @classmethod
    def load(cls, path: AnyPath) -> "Tokenizer":
        """Read a `.model` file from a path or fsspec URL, and what the files beside it add to it.

        Those are transformers' `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json` and
        `added_tokens.json`. Raises `DataError` if the model cannot be read, or they are of another one.
        """
        model = _read_model(path)
        try:
            tokenizer = cls(model)
            companions = read_companions(storage.parent(path))
            if not companions.names:
                return tokenizer
            special_ids = {name: getattr(tokenizer, f"{name}_id") for name in SPECIAL_NAMES}
            merged, notes = with_added_tokens(
                model,
                tokenizer.model_proto,
                special_ids,
                companions,
                is_export=companions.fingerprint == tokenizer.fingerprint,
            )
            if merged != model:
                tokenizer = cls(merged)
        except DataError as error:
            raise DataError(f"tokenizer {path}: {error}") from error
        tokenizer.notes = tuple(notes)
        tokenizer.adds_bos = bool(companions.adds_bos) and tokenizer.bos_id is not None
        return tokenizer

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
            if self._symbols and text.startswith(self._symbols):
                return self._without_dummy_prefix.encode_array(text)
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
        plain = [i for i, s in enumerate(texts) if META_SPACE not in s and not s.startswith(self._symbols)]
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

    def piece_id(self, piece: str) -> int | None:
        """The id of the piece with this text, such as `<mask>`; None if there is none."""
        return self._ids_of_pieces.get(piece.replace(" ", META_SPACE))

    def starts_word(self) -> NDArray[np.bool_]:
        """[vocab_size] whether a word begins with each id: at a space, or with a piece that is no text."""
        inner = (PieceType.NORMAL, PieceType.BYTE)
        pieces = self.model_proto.pieces
        return np.array(
            [p.type not in inner or p.text.startswith(META_SPACE) for p in pieces], dtype=np.bool_
        )

    @cached_property
    def _ids_of_pieces(self) -> dict[str, int]:
        return {piece.text: index for index, piece in enumerate(self.model_proto.pieces)}

    @cached_property
    def _symbols(self) -> tuple[str, ...]:
        """Added tokens, before which transformers puts no dummy prefix; empty without such a prefix."""
        if not (self.model_proto.has_added_tokens and self.model_proto.add_dummy_prefix):
            return ()
        symbols = [piece.text for piece in self.model_proto.pieces if piece.type is PieceType.USER_DEFINED]
        return tuple(symbol.replace(META_SPACE, " ") for symbol in symbols)

    @cached_property
    def _without_dummy_prefix(self) -> "Tokenizer":
        return Tokenizer(without_dummy_prefix(self._model))

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


def _read_model(path: AnyPath) -> bytes:
    """The bytes of a `.model` file. Raises `DataError` for another file, with what can be done about it."""
    try:
        if storage.exists(path) and storage.is_directory(path):
            raise DataError(f"tokenizer {path} is a directory: name the .model file in it.{_json_hint(path)}")
        size = storage.size(path)
        if size > MAX_MODEL_BYTES:
            raise DataError(f"tokenizer {path} has {size:,} bytes, more than a sentencepiece model can have.")
        model = storage.read_range(path, 0, size)
    except OSError as error:
        raise DataError(
            f"tokenizer {path} cannot be read: {error}. Train one with `distft tokenizer train`, or "
            f"import a sentencepiece .model with `distft tokenizer import`.{_json_hint(storage.parent(path))}"
        ) from error
    storage.check_not_lfs_pointer(path, model)
    if str(path).endswith(".json") or model[:1] == b"{":
        raise DataError(f"tokenizer {path} is not a sentencepiece model, but JSON.{_JSON_REMEDY}")
    return model


def _json_hint(directory: AnyPath) -> str:
    """What to do about a directory that has a tokenizer.json, but no sentencepiece model."""
    if not storage.exists(storage.join(directory, TOKENIZER_JSON)):
        return ""
    return f" {directory} has a {TOKENIZER_JSON} only.{_JSON_REMEDY}"


_JSON_REMEDY = (
    f" A {TOKENIZER_JSON} of the tokenizers library is not read by itself, as its ids need not be those of "
    "any sentencepiece model. For a model of the Llama 2 or Mistral kind, get the tokenizer.model that was "
    "published with it and name that: the tokens that the .json adds are then used too. A vocabulary of "
    "byte-level BPE (GPT-2, Llama 3, Qwen) has no sentencepiece form: train a tokenizer with `distft "
    "tokenizer train`, and a model from the beginning."
)


def check_text(text: str) -> None:
    """Raise `DataError` for lone surrogates, which have no UTF-8 encoding."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"character {error.start} of a text is the lone surrogate U+{ord(text[error.start]):04X}, "
            "half a character without a UTF-8 encoding: correct the text, or read it with errors replaced."
        ) from None


def require_tokenizer_target(path: str | Path) -> None:
    """Raise `ConfigError` if a file is at `path` that is no tokenizer: it would be overwritten."""
    local = storage.local_path(path)
    if local is None or not local.exists() or (local.is_file() and local.stat().st_size == 0):
        return
    try:
        Tokenizer.load(local)
    except DataError:
        raise ConfigError(
            f"{path} exists and is no sentencepiece model, so it is not overwritten: choose another output."
        ) from None


def import_tokenizer(path: str | Path, output: str | Path) -> Tokenizer:
    """Copy a sentencepiece model to `output`, with what the files beside it add to it.

    Checks that it loads and encodes; raises `DataError` otherwise, and `ConfigError` if something else than
    a tokenizer is at `output`.
    """
    tokenizer = Tokenizer.load(path)
    require_tokenizer_target(output)
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
