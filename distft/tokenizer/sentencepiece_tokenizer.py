"""Encodes and decodes with a sentencepiece model."""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distft import storage
from distft.errors import ConfigError, DataError
from distft.storage import AnyPath
from distft.tokenizer.added_tokens import with_added_tokens
from distft.tokenizer.companions import read_companions
from distft.tokenizer.files import SENTENCEPIECE_FILE
from distft.tokenizer.huggingface_export import huggingface_files
from distft.tokenizer.interface import Tokenizer, check_text
from distft.tokenizer.model_proto import (
    SPECIAL_NAMES,
    Piece,
    PieceType,
    parse_model_proto,
    without_dummy_prefix,
)
from distft.tokenizer.pretokenization import META_SPACE, CachedWordEncoder, pretokenization_pattern
from distft.tokenizer.template_files import files_of_templates, templates_of_files


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model. One that `train_tokenizer` made with byte fallback is lossless."""

    file_name = SENTENCEPIECE_FILE

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
    def with_companions(cls, path: AnyPath, model: bytes) -> "SentencePieceTokenizer":
        """The model read from `path`, with what the files beside it add to it.

        Those are transformers' `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json` and
        `added_tokens.json`. Raises `DataError` if they or the model are bad, or of another vocabulary.
        """
        try:
            tokenizer = cls(model)
            companions = read_companions(storage.parent(path))
            templates = templates_of_files(companions.template_files)
            if not companions.names:
                tokenizer.chat_templates = templates
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
        tokenizer.chat_templates = templates
        tokenizer.notes = tuple(notes)
        tokenizer.adds_bos = bool(companions.adds_bos) and tokenizer.bos_id is not None
        return tokenizer

    @cached_property
    def fingerprint(self) -> str:
        special_ids = (self.bos_id, self.eos_id, self.pad_id, self.unk_id)
        return self.model_proto.fingerprint(tuple(-1 if i is None else i for i in special_ids))

    def to_bytes(self) -> bytes:
        """The serialized `ModelProto`."""
        return self._model

    def files(self) -> dict[str, bytes]:
        return {SENTENCEPIECE_FILE: self._model, **files_of_templates(self.chat_templates)}

    def save(self, path: str | Path) -> None:
        """Write the model atomically, as one file, and a chat template beside it.

        Raises `ConfigError` if another template is there.
        """
        templates = files_of_templates(self.chat_templates)
        beside = {storage.join(storage.parent(path), name): data for name, data in templates.items()}
        try:
            for where, data in beside.items():
                if storage.exists(where) and storage.read_bytes(where) != data:
                    raise ConfigError(
                        f"{where} has another chat template than the tokenizer: choose another directory."
                    )
                storage.commit_bytes(where, data)
            storage.commit_bytes(path, self._model)
        except OSError as error:
            raise DataError(f"tokenizer cannot be written to {path}: {error}.") from error

    def encode_array(self, text: str) -> NDArray[np.int32]:
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
        if num_threads == 1:
            return [self.encode(text) for text in texts]
        plain = [i for i, s in enumerate(texts) if META_SPACE not in s and not s.startswith(self._symbols)]
        arrays = self._encode_with_sentencepiece([texts[index] for index in plain], num_threads)
        encoded = dict(zip(plain, arrays, strict=True))
        return [encoded[i].tolist() if i in encoded else self.encode(text) for i, text in enumerate(texts)]

    def encode_with_offsets(self, text: str) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        ids, offsets = [], []
        for start, part in self._split_at_control_pieces(text):
            if part in self._control_ids:
                ids.append(np.array([self._control_ids[part]], np.int32))
                offsets.append(np.array([[start, start + len(part)]], np.int64))
            elif part:
                ids.append(self.encode_array(part))
                offsets.append(start + self._offsets(part, ids[-1]))
        if not ids:
            return _NO_IDS, np.empty((0, 2), np.int64)
        return np.concatenate(ids), np.concatenate(offsets)

    @property
    def special_texts(self) -> Mapping[str, str]:
        ids = {"bos": self.bos_id, "eos": self.eos_id, "unk": self.unk_id, "pad": self.pad_id}
        pieces = self.model_proto.pieces
        return {f"{name}_token": pieces[index].text for name, index in ids.items() if index is not None}

    def _decode(self, ids: list[int]) -> str:
        if not self.model_proto.has_identity_normalization:
            text: str = self._processor.decode(ids)
            return text
        return b"".join([self._surfaces[i] for i in ids]).decode("utf-8", "replace")

    def token_bytes(self) -> NDArray[np.int64]:
        without_text = (PieceType.CONTROL, PieceType.UNKNOWN)
        lengths = [
            0 if piece.type in without_text else len(surface)
            for piece, surface in zip(self.model_proto.pieces, self._surfaces, strict=True)
        ]
        return np.array(lengths, dtype=np.int64)

    def piece_id(self, piece: str) -> int | None:
        return self._ids_of_pieces.get(piece.replace(" ", META_SPACE))

    def starts_word(self) -> NDArray[np.bool_]:
        inner = (PieceType.NORMAL, PieceType.BYTE)
        pieces = self.model_proto.pieces
        return np.array(
            [p.type not in inner or p.text.startswith(META_SPACE) for p in pieces], dtype=np.bool_
        )

    @cached_property
    def piece_texts(self) -> Sequence[str]:
        return [piece.text for piece in self.model_proto.pieces]

    def padding_id(self) -> int | None:
        if self.pad_id is not None:
            return self.pad_id
        pieces = self.model_proto.pieces
        candidates = [i for i in (self.eos_id, self.bos_id) if i is not None]
        candidates += [i for i, piece in enumerate(pieces) if piece.type is PieceType.CONTROL]
        return next((i for i in candidates if pieces[i].type is PieceType.CONTROL), None)

    def huggingface_files(
        self,
        *,
        max_seq_len: int,
        pad_id: int | None = None,
        begins_with_bos: bool = False,
        ends_with_eos: bool = False,
    ) -> tuple[Mapping[str, bytes], list[str]]:
        return huggingface_files(
            self,
            max_seq_len=max_seq_len,
            pad_id=pad_id,
            begins_with_bos=begins_with_bos,
            ends_with_eos=ends_with_eos,
        )

    @cached_property
    def _ids_of_pieces(self) -> dict[str, int]:
        return {piece.text: index for index, piece in enumerate(self.model_proto.pieces)}

    @cached_property
    def _control_ids(self) -> dict[str, int]:
        pieces = enumerate(self.model_proto.pieces)
        return {piece.text: index for index, piece in pieces if piece.type in _SPECIAL}

    @cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self._control_ids, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else _NOTHING

    def _split_at_control_pieces(self, text: str) -> Iterator[tuple[int, str]]:
        """Each part with its place in the text; some are empty."""
        start = 0
        for part in self._control_pattern.split(text):
            yield start, part
            start += len(part)

    def _offsets(self, text: str, ids: NDArray[np.int32]) -> NDArray[np.int64]:
        """[start, stop) of the characters of each id of a text without control pieces."""
        surfaces = [self._surfaces[index] for index in ids.tolist()]
        data, joined = text.encode(), b"".join(surfaces)
        num_added = len(joined) - len(data)
        if num_added not in {0, 1} or not joined.endswith(data):  # 1: of a dummy prefix
            return self._offsets_of_library(text, ids)
        stops = np.cumsum([len(surface) for surface in surfaces]) - num_added
        starts = np.concatenate([[0], stops[:-1]])
        # The character of each byte, and of its end: a byte of which is no first one continues a character.
        is_first = (np.frombuffer(data, np.uint8) & 0xC0) != 0x80
        character = np.concatenate([np.cumsum(is_first) - 1, [len(text)]])
        last = np.maximum(stops - 1, starts)
        return np.stack([character[starts], np.minimum(character[last] + 1, len(text))], axis=1)

    def _offsets_of_library(self, text: str, ids: NDArray[np.int32]) -> NDArray[np.int64]:
        """As `_offsets`, of a model that changes the text, or has no bytes for some characters of it."""
        found = self._processor.encode(text, out_type="offset_mapping")
        if found["ids"] != ids.tolist():
            raise DataError(
                f"the tokenizer cannot tell which characters of {text[:40]!r} its tokens are: remove U+2581 "
                "from the text, or use another tokenizer."
            )
        return np.array(found["offsets"], np.int64).reshape(-1, 2)

    @cached_property
    def _symbols(self) -> tuple[str, ...]:
        """Added tokens, before which transformers puts no dummy prefix; empty without such a prefix."""
        if not (self.model_proto.has_added_tokens and self.model_proto.add_dummy_prefix):
            return ()
        symbols = [piece.text for piece in self.model_proto.pieces if piece.type is PieceType.USER_DEFINED]
        return tuple(symbol.replace(META_SPACE, " ") for symbol in symbols)

    @cached_property
    def _without_dummy_prefix(self) -> "SentencePieceTokenizer":
        return SentencePieceTokenizer(without_dummy_prefix(self._model))

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
_SPECIAL = (PieceType.CONTROL, PieceType.UNKNOWN)
_NOTHING = re.compile(r"(?!)")
_NO_IDS = np.empty(0, dtype=np.int32)


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
