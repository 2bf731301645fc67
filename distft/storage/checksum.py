"""Checksums against accidental damage, taken while a file is written.

XXH3, 64 bits: 14 GB/s on one core (EPYC), where zlib's CRC-32 reaches 2 to 3.6, BLAKE2b 0.8 and SHA-256 1.6.
It is no defence against somebody who means harm.
"""

from typing import Protocol

import xxhash

from distft.errors import StorageError
from distft.storage.files import open_read, size
from distft.storage.paths import AnyPath

_CHUNK_BYTES = 4 << 20
_ALGORITHM = "xxh3"


class Writable(Protocol):
    """Anything that takes bytes."""

    def write(self, data: bytes | bytearray | memoryview, /) -> int: ...


class ChecksumWriter:
    """Passes bytes on to `file`, and knows the checksum and number of those that went through."""

    def __init__(self, file: Writable) -> None:
        self._file = file
        self._hash = xxhash.xxh3_64()
        self.num_bytes = 0

    def write(self, data: bytes | bytearray | memoryview, /) -> int:
        """Write all of `data`."""
        count = self._file.write(data)
        self._hash.update(data)
        self.num_bytes += count
        return count

    @property
    def checksum(self) -> str:
        """Of everything written so far, as `xxh3:0123456789abcdef`."""
        return _text(self._hash)


def checksum_of_bytes(data: bytes | bytearray | memoryview) -> str:
    """The checksum that `ChecksumWriter` finds for `data`."""
    return _text(xxhash.xxh3_64(data))


def checksum_of(path: AnyPath) -> str:
    """The checksum of a file's content, read in pieces of a few MiB."""
    found = xxhash.xxh3_64()
    buffer = bytearray(_CHUNK_BYTES)
    view = memoryview(buffer)
    with open_read(path) as file:
        while count := file.readinto(buffer):  # type: ignore[attr-defined]  # every binary file has it
            found.update(view[:count])
    return _text(found)


def verify(path: AnyPath, *, checksum: str, num_bytes: int | None = None) -> None:
    """Raise `StorageError` unless the file is there, has `num_bytes` bytes, and this checksum."""
    try:
        found_bytes = size(path)
        if num_bytes is not None and found_bytes != num_bytes:
            raise StorageError(f"{path} has {found_bytes:,} bytes, but was written with {num_bytes:,}.")
        if not checksum.startswith(f"{_ALGORITHM}:"):
            raise StorageError(
                f"{path}: checksum {checksum!r} is not of the kind {_ALGORITHM}:0123456789abcdef."
            )
        found = checksum_of(path)
    except FileNotFoundError:
        raise StorageError(f"{path} is missing.") from None
    if found != checksum:
        raise StorageError(f"{path} is damaged: its checksum is {found}, but it was written with {checksum}.")


def _text(found: xxhash.xxh3_64) -> str:
    return f"{_ALGORITHM}:{found.hexdigest()}"
