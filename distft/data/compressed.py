"""Reads gzip and zstandard files as streams, in memory that does not depend on what the file claims.

A file may be several gzip members or zstandard frames, one after another. One that ends in the middle is an
error: neither the gzip module nor zstandard's stream reader can be relied on for that, and both are slower.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO

import zstandard

from distft.errors import DataError, DistftError, StorageError
from distft.storage.lfs import check_not_lfs_pointer

READ_BYTES = 1 << 16
MAX_ROW_BYTES = 256 << 20  # of a line, row or paragraph; a longer one is an error
_SLICE_BYTES = 1 << 10  # decompressed at a time: becomes at most 1 MiB (gzip) or 32 MiB (zstandard)
_MAX_WINDOW_BYTES = 128 << 20  # of a zstandard frame; the default of `zstd -d` as well
_GZIP_WBITS = 16 + zlib.MAX_WBITS  # zlib expects a gzip header and verifies the gzip checksum


def _gzip_frame() -> Any:
    return zlib.decompressobj(wbits=_GZIP_WBITS)


def _zstandard_frame() -> Any:
    return zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES).decompressobj()


_FRAMES: dict[str, Callable[[], Any]] = {".gz": _gzip_frame, ".zst": _zstandard_frame}


def compression_of(name: str) -> str:
    """The ending that names the compression of a file: ".gz", ".zst" or ""."""
    lower = name.lower()
    return next((ending for ending in _FRAMES if lower.endswith(ending)), "")


def without_compression(name: str) -> str:
    """`name` without the ending of its compression."""
    return name[: len(name) - len(compression_of(name))]


def decompressed(opened: BinaryIO, name: str) -> Iterator[tuple[bytes, int]]:
    """Yield (data, bytes of the file read so far); a file without compression is passed on as it is.

    Raises `DataError` if the file is damaged, and `StorageError` if it cannot be read now.
    """
    new_frame = _FRAMES.get(compression_of(name))
    num_read = 0
    frame = None
    try:
        while block := opened.read(READ_BYTES):
            if not num_read:
                check_not_lfs_pointer(name, block)
            if new_frame is None:
                num_read += len(block)
                yield block, num_read
                continue
            for start in range(0, len(block), _SLICE_BYTES):
                data = block[start : start + _SLICE_BYTES]
                num_read += len(data)
                while data:
                    frame = frame or new_frame()
                    yield frame.decompress(data), num_read
                    # gzip allows zero bytes between members, as padding of tape blocks.
                    data = frame.unused_data.lstrip(b"\0") if frame.eof else b""
                    frame = None if frame.eof else frame
        if frame:
            raise EOFError("it ends in the middle of compressed data")
    except (EOFError, zlib.error, zstandard.ZstdError, OSError) as error:
        raise read_error(name, error) from error


def lines(blocks: Iterable[bytes], name: str) -> Iterator[bytes]:
    """Lines with their ends, as of an open file. Raises `DataError` for one of over `MAX_ROW_BYTES`."""
    rest: list[bytes] = []  # of a line that began in an earlier block
    num_rest, number = 0, 1
    for block in blocks:
        first, *others = block.split(b"\n")
        rest.append(first)
        num_rest += len(first)
        if others and num_rest <= MAX_ROW_BYTES:
            yield b"".join(rest) + b"\n"
            for line in others[:-1]:
                yield line + b"\n"
            rest, num_rest, number = [others[-1]], len(others[-1]), number + len(others)
        if num_rest > MAX_ROW_BYTES:
            raise too_long(f"{name}:{number}", "line")
    if num_rest:
        yield b"".join(rest)


def too_long(where: str, what: str) -> DataError:
    """The error for a document that does not fit into memory as a whole."""
    return DataError(
        f"{where}: a {what} of more than {MAX_ROW_BYTES >> 20} MiB: split it, or remove it. "
        "(Text files may be longer as one document: documents: file.)"
    )


def read_error(name: str, error: Exception) -> DistftError:
    """The error for a file that is damaged, missing, or that the storage does not give now."""
    if isinstance(error, FileNotFoundError):
        return DataError(f"{name} does not exist any more: do not change a corpus while it is read.")
    if isinstance(error, PermissionError | IsADirectoryError | NotADirectoryError):
        return DataError(f"{name} cannot be read: {error.strerror}.")
    if isinstance(error, OSError):
        return StorageError(f"{name} cannot be read: {error.strerror or error}. It may work again.")
    if "too much memory" in str(error):
        return DataError(
            f"{name} needs more than {_MAX_WINDOW_BYTES >> 20} MiB of memory to decompress (zstd --long): "
            f"compress it anew: zstd -d --long=31 --stdout {name} | zstd -o NEW.zst"
        )
    return DataError(f"{name} is damaged: {error}. Restore it from a copy.")
