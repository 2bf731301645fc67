"""Reads the vocabulary and settings of a sentencepiece model file, without generated protobuf classes.

Field numbers are from `sentencepiece_model.proto`, which promises never to change them.
"""

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from distft.errors import DataError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


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
        settings = [getattr(self, name) for name in self.__slots__ if name != "pieces"]
        digest.update(repr((settings, special_ids)).encode())
        for piece in self.pieces:
            text = piece.text.encode("utf-8", "surrogateescape")
            digest.update(struct.pack("<IfB", len(text), piece.score, piece.type) + text)
        return digest.hexdigest()


def parse_model_proto(model: bytes) -> ModelProto:
    """Parse a serialized `ModelProto`. Raises `DataError` if `model` is not one."""
    try:
        fields = list(_fields(model))
        pieces = tuple(_piece(value) for number, value in fields if number == 1 and isinstance(value, bytes))
        trainer_spec = _merged_message(fields, 2)
        normalizer_spec = _merged_message(fields, 3)
        proto = ModelProto(
            pieces=pieces,
            algorithm=Algorithm(_int_or(trainer_spec.get(3), Algorithm.UNIGRAM)),
            byte_fallback=bool(_int_or(trainer_spec.get(35), 0)),
            treat_whitespace_as_suffix=bool(_int_or(trainer_spec.get(24), 0)),
            unk_surface=_bytes_or(trainer_spec.get(44), " \u2047 ".encode()).decode(),
            precompiled_charsmap=_bytes_or(normalizer_spec.get(2), b""),
            add_dummy_prefix=bool(_int_or(normalizer_spec.get(3), 1)),
            remove_extra_whitespaces=bool(_int_or(normalizer_spec.get(4), 1)),
            escape_whitespaces=bool(_int_or(normalizer_spec.get(5), 1)),
        )
    except (IndexError, ValueError, struct.error) as error:
        raise DataError(f"not a sentencepiece model: {error}") from error
    if not pieces:
        raise DataError("not a sentencepiece model: it has no pieces")
    return proto


def _piece(message: bytes) -> Piece:
    end = 2 + message[1] if len(message) > 1 else 0
    if message[:1] == b"\x0a" and message[1] < 0x80 and len(message) == end + 5 and message[end] == 0x15:
        # Nearly all pieces have a short text, a score and no type: this path is three times as fast.
        text = message[2:end].decode("utf-8", "surrogateescape")
        return Piece(text, struct.unpack_from("<f", message, end + 1)[0], PieceType.NORMAL)
    fields = dict(_fields(message))
    score = struct.unpack("<f", _bytes_or(fields.get(2), b"\0\0\0\0"))[0]
    text = _bytes_or(fields.get(1), b"").decode("utf-8", "surrogateescape")
    return Piece(text, score, PieceType(_int_or(fields.get(3), PieceType.NORMAL)))


def _merged_message(fields: list[tuple[int, int | bytes]], number: int) -> dict[int, int | bytes]:
    """The fields of the message in field `number`; of repeated ones the last; empty if it is absent."""
    merged: dict[int, int | bytes] = {}
    for field_number, value in fields:
        if field_number == number and isinstance(value, bytes):
            merged.update(_fields(value))
    return merged


def _int_or(value: int | bytes | None, default: int) -> int:
    return value if isinstance(value, int) else default


def _bytes_or(value: int | bytes | None, default: bytes) -> bytes:
    return value if isinstance(value, bytes) else default


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (field number, value) in order: an int for varints, bytes for all other wire types."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        field_number, wire_type = tag >> 3, tag & 7
        if wire_type == _VARINT:
            value, position = _varint(message, position)
            yield field_number, value
            continue
        if wire_type == _BYTES:
            length, position = _varint(message, position)
        elif wire_type in (_FIXED32, _FIXED64):
            length = 4 if wire_type == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire_type} at byte {position}")
        if position + length > len(message):
            raise ValueError(f"a field at byte {position} runs past the end")
        yield field_number, message[position : position + length]
        position += length


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return value, position
        shift += 7
