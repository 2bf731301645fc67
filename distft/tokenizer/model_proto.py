"""Reads the vocabulary and settings of a sentencepiece model file, without generated protobuf classes.

Field numbers are from `sentencepiece_model.proto`, which promises never to change them. The file is not
trusted: its pieces are checked before sentencepiece's own parser, which is native code, gets them.
"""

import hashlib
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from math import isfinite
from typing import TypeVar

from distft.errors import DataError
from distft.tokenizer.protobuf import encode_field, fields_of

MAX_MODEL_BYTES = 256 << 20  # of a file; the largest vocabularies in use take 5 MiB
_MAX_PIECES = 1 << 22  # 16 times the largest vocabularies in use
_MAX_PIECE_BYTES = 1 << 16
_BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")


PIECES, TRAINER_SPEC, NORMALIZER_SPEC = 1, 2, 3  # fields of a ModelProto
# distft's own: the ids of bos, eos and pad (its fields 1, 2, 3) where they are not sentencepiece's, and
# whether tokens were added (4). The schema keeps the numbers from 200 on for such extensions, and
# sentencepiece skips them.
ADDED = 1001
_HAS_ADDED_TOKENS = 4
SPECIAL_NAMES = ("bos", "eos", "pad")
_Enum = TypeVar("_Enum", bound=IntEnum)


class PieceType(IntEnum):
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Algorithm(IntEnum):
    UNIGRAM = 1
    BPE = 2
    WORD = 3
    CHAR = 4


@dataclass(frozen=True, slots=True)
class Piece:
    text: str  # with U+2581 for a space
    score: float
    type: PieceType


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelProto:
    """The fields of a sentencepiece `ModelProto` that determine encoding and decoding."""

    pieces: tuple[Piece, ...]
    algorithm: Algorithm
    byte_fallback: bool
    treat_whitespace_as_suffix: bool
    unk_surface: str
    precompiled_charsmap: bytes  # normalization rules; empty: none
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool
    special_ids: Mapping[str, int]  # of bos, eos and pad where they are not sentencepiece's
    has_added_tokens: bool  # as transformers adds them: no dummy prefix comes before one

    @property
    def has_identity_normalization(self) -> bool:
        """Whether sentencepiece encodes the text unchanged, including white space."""
        return (
            not self.precompiled_charsmap
            and not self.add_dummy_prefix
            and not self.remove_extra_whitespaces
            and self.escape_whitespaces
        )

    def byte_ids(self) -> dict[int, int]:
        """Id of the fallback piece of each byte value; empty without byte fallback."""
        if not self.byte_fallback:
            return {}
        return {int(p.text[1:-1], 16): i for i, p in enumerate(self.pieces) if p.type is PieceType.BYTE}

    def fingerprint(self, special_ids: tuple[int, ...]) -> str:
        """Hex digest of all fields above and the special ids, not of paths or training settings.

        Shards and checkpoints store it: field order, and the name `Algorithm` in its repr, must not change.
        """
        digest = hashlib.blake2b(digest_size=16)
        later = {"pieces", "special_ids", "has_added_tokens"}
        settings = [getattr(self, name) for name in self.__slots__ if name not in later]
        digest.update(repr((settings, special_ids)).encode())
        if self.has_added_tokens:
            digest.update(b"added tokens")
        for piece in self.pieces:
            text = piece.text.encode("utf-8", "surrogateescape")
            digest.update(struct.pack("<IfB", len(text), piece.score, piece.type) + text)
        return digest.hexdigest()


def parse_model_proto(model: bytes) -> ModelProto:
    """Parse a serialized `ModelProto`. Raises `DataError` if `model` is not one."""
    pieces: list[Piece] = []
    trainer_spec: dict[int, int | bytes] = {}
    normalizer_spec: dict[int, int | bytes] = {}
    added: dict[int, int | bytes] = {}
    try:
        for number, value in fields_of(model):
            if number == PIECES:
                if len(pieces) == _MAX_PIECES:
                    raise ValueError(f"it has more than {_MAX_PIECES:,} pieces")
                pieces.append(_piece(_message(value, "pieces"), len(pieces)))
            elif number == TRAINER_SPEC:  # of a repeated field the last value counts
                trainer_spec.update(fields_of(_message(value, "trainer_spec")))
            elif number == NORMALIZER_SPEC:
                normalizer_spec.update(fields_of(_message(value, "normalizer_spec")))
            elif number == ADDED:
                added = dict(fields_of(_message(value, "the field of added tokens")))
        _check_pieces(pieces)
        return ModelProto(
            pieces=tuple(pieces),
            algorithm=_enum(Algorithm, trainer_spec.get(3), Algorithm.UNIGRAM, "model_type"),
            byte_fallback=bool(_int_or(trainer_spec.get(35), 0)),
            treat_whitespace_as_suffix=bool(_int_or(trainer_spec.get(24), 0)),
            unk_surface=_bytes_or(trainer_spec.get(44), " \u2047 ".encode()).decode(),
            precompiled_charsmap=_bytes_or(normalizer_spec.get(2), b""),
            add_dummy_prefix=bool(_int_or(normalizer_spec.get(3), 1)),
            remove_extra_whitespaces=bool(_int_or(normalizer_spec.get(4), 1)),
            escape_whitespaces=bool(_int_or(normalizer_spec.get(5), 1)),
            special_ids=_special_ids(added, len(pieces)),
            has_added_tokens=bool(_int_or(added.get(_HAS_ADDED_TOKENS), 0)),
        )
    except (IndexError, ValueError, struct.error) as error:
        reason = "it ends within a field" if isinstance(error, IndexError) else error
        raise DataError(f"not a sentencepiece model: {reason}") from error


def _check_pieces(pieces: Sequence[Piece]) -> None:
    """Raise `ValueError` for pieces that no model can have."""
    if not pieces:
        raise ValueError("it has no pieces")
    seen: set[str] = set()
    for index, piece in enumerate(pieces):
        if piece.text in seen:
            raise ValueError(f"pieces {index} and an earlier one are both {piece.text[:40]!r}")
        seen.add(piece.text)
        if piece.type is PieceType.BYTE and not _BYTE_PIECE.fullmatch(piece.text):
            raise ValueError(
                f"piece {index} is of type BYTE, but its text is {piece.text[:40]!r}, not <0x00> to <0xFF>"
            )


def _piece(message: bytes, index: int) -> Piece:
    end = 2 + message[1] if len(message) > 1 else 0
    if message[:1] == b"\x0a" and 0 < message[1] < 0x80 and len(message) == end + 5 and message[end] == 0x15:
        # Nearly all pieces have a short text, a score and no type: this path is three times as fast.
        score = struct.unpack_from("<f", message, end + 1)[0]
        if isfinite(score):
            return Piece(message[2:end].decode("utf-8", "surrogateescape"), score, PieceType.NORMAL)
    fields = dict(fields_of(message))
    text = _bytes_or(fields.get(1), b"")
    if not 0 < len(text) <= _MAX_PIECE_BYTES:
        raise ValueError(
            f"piece {index} has {len(text):,} bytes of text: 1 to {_MAX_PIECE_BYTES:,} are possible"
        )
    score = struct.unpack("<f", _bytes_or(fields.get(2), b"\0\0\0\0"))[0]
    if not isfinite(score):
        raise ValueError(f"piece {index} has the score {score}")
    kind = _enum(PieceType, fields.get(3), PieceType.NORMAL, f"the type of piece {index}")
    return Piece(text.decode("utf-8", "surrogateescape"), score, kind)


def _special_ids(fields: Mapping[int, int | bytes], num_pieces: int) -> dict[str, int]:
    found = {}
    for number, name in enumerate(SPECIAL_NAMES, start=1):
        value = fields.get(number)
        if value is None:
            continue
        if isinstance(value, bytes) or value >= num_pieces:
            raise ValueError(f"the id of {name} is not that of a piece")
        found[name] = value
    return found


def _message(value: int | bytes, name: str) -> bytes:
    if isinstance(value, int):
        raise ValueError(f"{name} is the number {value}, not a message")
    return value


def _enum(kind: type[_Enum], value: int | bytes | None, default: _Enum, name: str) -> _Enum:
    if value is None:
        return default
    if isinstance(value, bytes) or value not in set(kind):
        shown = value if isinstance(value, int) else f"{len(value)} bytes"
        raise ValueError(f"{name} is {shown}: it must be {min(kind)} to {max(kind)}")
    return kind(value)


def _int_or(value: int | bytes | None, default: int) -> int:
    return value if isinstance(value, int) else default


def _bytes_or(value: int | bytes | None, default: bytes) -> bytes:
    return value if isinstance(value, bytes) else default


def encode_added(special_ids: Mapping[str, int | None]) -> bytes:
    """The content of the field `ADDED`, for a model with added tokens."""
    ids = [(number, special_ids[name]) for number, name in enumerate(SPECIAL_NAMES, start=1)]
    return b"".join(encode_field(n, i) for n, i in [*ids, (_HAS_ADDED_TOKENS, 1)] if i is not None)


def without_dummy_prefix(model: bytes) -> bytes:
    """`model` without the space that it puts before each text."""
    return model + encode_field(NORMALIZER_SPEC, encode_field(3, 0))  # repeated messages are merged


def encode_piece(text: str, kind: PieceType) -> bytes:
    """A serialized piece with the score 0."""
    score = encode_field(2, 0.0)
    return encode_field(1, text.encode("utf-8", "surrogateescape")) + score + encode_field(3, kind)
