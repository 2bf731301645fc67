"""Checksums against accidental damage, taken while a file is written.

CRC-32: 3.6 GB/s on one core (EPYC, zlib 1.2.13), where BLAKE2b reaches 0.8, SHA-1 1.6 and SHA-256 1.6. It
misses one damaged file in four thousand million; it is no defence against somebody who means harm.
"""

import zlib
from typing import Protocol

from distft.errors import StorageError
from distft.storage.files import open_read, size
from distft.storage.paths import AnyPath

_CHUNK_BYTES = 4 << 20
_ALGORITHM = "crc32"


class Writable(Protocol):
    """Anything that takes bytes."""

    def write(self, data: bytes | bytearray | memoryview, /) -> int: ...


class ChecksumWriter:
    """Passes bytes on to `file`, and knows the checksum and number of those that went through."""

    def __init__(self, file: Writable) -> None:
        self._file = file
        self._crc = 0
        self.num_bytes = 0

    def write(self, data: bytes | bytearray | memoryview, /) -> int:
        """Write all of `data`."""
        count = self._file.write(data)
        self._crc = zlib.crc32(data, self._crc)
        self.num_bytes += count
        return count

    @property
    def checksum(self) -> str:
        """Of everything written so far, as `crc32:01234567`."""
        return _text(self._crc)


def checksum_of_bytes(data: bytes | bytearray | memoryview) -> str:
    """The checksum that `ChecksumWriter` finds for `data`."""
    return _text(zlib.crc32(data))


def checksum_of(path: AnyPath) -> str:
    """The checksum of a file's content, read in pieces of a few MiB."""
    crc = 0
    buffer = bytearray(_CHUNK_BYTES)
    view = memoryview(buffer)
    with open_read(path) as file:
        while count := file.readinto(buffer):  # type: ignore[attr-defined]  # every binary file has it
            crc = zlib.crc32(view[:count], crc)
    return _text(crc)


def verify(path: AnyPath, *, checksum: str, num_bytes: int | None = None) -> None:
    """Raise `StorageError` unless the file is there, has `num_bytes` bytes, and this checksum."""
    try:
        found_bytes = size(path)
        if num_bytes is not None and found_bytes != num_bytes:
            raise StorageError(f"{path} has {found_bytes:,} bytes, but was written with {num_bytes:,}.")
        if not checksum.startswith(f"{_ALGORITHM}:"):
            raise StorageError(f"{path}: checksum {checksum!r} is not of the kind {_ALGORITHM}:01234567.")
        found = checksum_of(path)
    except FileNotFoundError:
        raise StorageError(f"{path} is missing.") from None
    if found != checksum:
        raise StorageError(f"{path} is damaged: its checksum is {found}, but it was written with {checksum}.")


def _text(crc: int) -> str:
    return f"{_ALGORITHM}:{crc:08x}"
