"""The wire format of protocol buffers: the fields of a message, without a schema."""

import struct
from collections.abc import Iterator

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_VARINT_BYTES = 10  # of 64 bits; a longer one would take quadratic time


def fields_of(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (field number, value) in order: an int for varints, bytes for all other wire types.

    Raises `ValueError` or, at the end of the message, `IndexError`. No value is longer than the message.
    """
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        field_number, wire_type = tag >> 3, tag & 7
        if not field_number:
            raise ValueError(f"field number 0 at byte {position}")
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
    value = 0
    for index in range(_MAX_VARINT_BYTES):
        byte = message[position + index]
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return value, position + index + 1
    raise ValueError(f"a number at byte {position} has more than {_MAX_VARINT_BYTES} bytes")


def encode_field(number: int, value: int | bytes | float) -> bytes:
    """A number as a varint, a float in 4 bytes, bytes as a message or text."""
    if isinstance(value, float):
        return _encode_varint(number << 3 | _FIXED32) + struct.pack("<f", value)
    if isinstance(value, int):
        return _encode_varint(number << 3 | _VARINT) + _encode_varint(value)
    return _encode_varint(number << 3 | _BYTES) + _encode_varint(len(value)) + value


def _encode_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
