"""The files of a corpus, whole or in ranges that begin and end between documents.

A range is told by nominal bytes and set right where it is read: both readers of a border look for the first
place to cut at or after it, so every byte falls to exactly one range, and planning reads nothing.
"""

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import zstandard

from distft import storage
from distft.errors import DataError

DocumentUnit = Literal["file", "line", "blank_line"]

_GZIP_WBITS = 16 + zlib.MAX_WBITS  # a gzip header is wanted, and its checksum verified
_COMPRESSED = (".gz", ".zst")
READ_BYTES = 1 << 16
BLANK_LINES = re.compile(rb"\n(?:[ \t\r]*\n)+")
_BEFORE_SPACES = re.compile(rb"[^ ](?= )")


@dataclass(frozen=True, slots=True)
class SourceFile:
    url: str  # a local path, or a URL that fsspec knows
    size: int  # bytes on disk
    version: str  # changes when the file is written again, where the storage tells

    @property
    def is_compressed(self) -> bool:
        return self.url.endswith(_COMPRESSED)


@dataclass(frozen=True, slots=True)
class Block:
    """Bytes of one file that lie between places to cut."""

    url: str
    offset: int  # of the first byte, in the file after decompression
    data: bytes
    is_start: bool  # whether the file (or what is read of it) begins here
    is_end: bool  # whether it ends here
    first_line: int | None = None  # number of the block's first line from 1; None: count when it is needed


def find_files(patterns: tuple[str, ...], suffixes: tuple[str, ...]) -> list[SourceFile]:
    """Files named by `patterns`: a file, a glob, or a directory (every file below with a fitting suffix).

    Suffixes are compared without `.gz` and `.zst`; hidden files and folders are passed over. Each file comes
    once, in the order of the patterns, sorted within one. Raises `DataError` with every pattern that finds
    nothing or only empty files.
    """
    found: dict[str, SourceFile] = {}
    faults = []
    for pattern in patterns:
        try:
            matches = _match(pattern, suffixes)
        except (OSError, ValueError, ImportError) as error:
            faults.append(f"corpus path {pattern} cannot be listed: {error}.")
            continue
        filled = [file for file in matches if file.size]
        if not matches:
            faults.append(
                f"corpus path {pattern} does not exist, or is a directory or glob with no file that ends in "
                f"{', '.join(suffixes)} (or these with .gz or .zst)."
            )
        elif not filled:
            faults.append(f"corpus path {pattern} has nothing to read: {len(matches)} empty file(s).")
        found |= {file.url: file for file in filled if file.url not in found}
    if faults:
        raise DataError("\n".join(faults))
    return list(found.values())


def _match(pattern: str, suffixes: tuple[str, ...]) -> list[SourceFile]:
    from fsspec.core import url_to_fs  # 0.1 s that a process which only reads does without
    from fsspec.implementations.local import LocalFileSystem

    filesystem, path = url_to_fs(pattern)
    if filesystem.isfile(path):
        matches = {path: filesystem.info(path)}
    elif filesystem.isdir(path):
        below = filesystem.find(path, detail=True)
        matches = {
            name: info
            for name, info in below.items()
            if _plain_name(name).endswith(suffixes) and "/." not in name[len(path.rstrip("/")) :]
        }
    else:
        matches = filesystem.glob(path, detail=True)
    is_local = isinstance(filesystem, LocalFileSystem)
    return [
        SourceFile(name if is_local else filesystem.unstrip_protocol(name), info["size"], _version(info))
        for name, info in sorted(matches.items())
        if info["type"] == "file"
    ]


def _plain_name(name: str) -> str:
    for ending in _COMPRESSED:
        name = name.removesuffix(ending)
    return name


def _version(info: dict[str, Any]) -> str:
    return str(
        next((info[key] for key in ("ETag", "etag", "mtime", "LastModified", "updated") if key in info), "")
    )


def place_to_cut(data: bytes | bytearray, start: int, unit: DocumentUnit) -> int:
    """The first position >= `start` >= 1 in `data` where a range may end; -1 if `data` shows none.

    Lines end behind a line end, blank-line documents behind blank lines. A document as long as a file is cut
    before spaces, where most vocabularies give the ids of the whole text; without any in the next 64 KiB,
    behind a line end, or else between two characters.
    """
    if unit == "line":
        return data.find(b"\n", start - 1) + 1 or -1
    if unit == "blank_line":
        found = BLANK_LINES.search(data, start - 1)
        return found.end() if found else -1
    window = data[start - 1 : start + READ_BYTES]
    found = _BEFORE_SPACES.search(window)
    if found:
        return start - 1 + found.end()
    behind_line = window.find(b"\n") + 1
    if behind_line:
        return start - 1 + behind_line
    return next((i for i in range(start, len(data)) if data[i] & 0xC0 != 0x80), -1)


def read_range(file: SourceFile, start: int, stop: int, unit: DocumentUnit, span: tuple[int, int]) -> Block:
    """The bytes of nominal range [start, stop) of an uncompressed file, of which `span` is read in all."""
    try:
        with storage.open_read(file.url) as opened:
            begin, end, first, last = (
                _settle(opened, nominal, file.size, unit) for nominal in (start, stop, *span)
            )
            opened.seek(begin)
            data = opened.read(max(end - begin, 0))
    except OSError as error:
        raise DataError(f"{file.url} cannot be read: {error}.") from error
    if len(data) < end - begin:
        raise DataError(f"{file.url} became shorter while it was read: let it be, and start again.")
    return Block(file.url, begin, data, begin == first, end == last)


def _settle(opened: Any, nominal: int, size: int, unit: DocumentUnit) -> int:
    """Where the border that was planned at `nominal` lies. Depends on the file and `nominal` only."""
    if nominal <= 0 or nominal >= size:
        return min(max(nominal, 0), size)
    opened.seek(nominal - 1)
    seen = b""
    wanted = READ_BYTES + 1
    while data := opened.read(wanted):
        seen += data
        found = place_to_cut(seen, 1, unit)
        if 0 <= found < len(seen):
            return nominal - 1 + found
        wanted = len(seen)
    return size


def read_compressed(file: SourceFile, block_bytes: int, unit: DocumentUnit) -> Iterator[tuple[Block, int]]:
    """Blocks of at least `block_bytes` of a compressed file, each with the compressed bytes that it took."""
    buffer = bytearray()
    offset, line, reported, searched = 0, 1, 0, 0
    consumed = 0
    for data, consumed in _decompressed(file):
        buffer += data
        if len(buffer) < max(block_bytes, searched) + READ_BYTES:
            continue
        cut = place_to_cut(buffer, block_bytes, unit)
        if not 0 < cut < len(buffer):
            searched = 2 * len(buffer)  # so that a very long document is not searched again and again
            continue
        block = Block(file.url, offset, bytes(buffer[:cut]), offset == 0, False, line)
        yield block, consumed - reported
        offset, line, reported, searched = offset + cut, line + block.data.count(b"\n"), consumed, 0
        del buffer[:cut]
    if buffer:
        yield Block(file.url, offset, bytes(buffer), offset == 0, True, line), consumed - reported


def _decompressed(file: SourceFile) -> Iterator[tuple[bytes, int]]:
    """(data, compressed bytes read so far). Raises `DataError` for damage and for a file that is cut off."""
    try:
        with storage.open_read(file.url) as opened:
            # One frame after the other by hand: twice as quick as the gzip module, and the stream reader of
            # zstandard takes a file that is cut off for a whole one.
            frame = None
            while data := opened.read(READ_BYTES):
                while data:
                    frame = frame or _new_frame(file.url)
                    yield frame.decompress(data), opened.tell()
                    # Between two frames of gzip there may be zero bytes, to fill up a block of a tape.
                    data = frame.unused_data.lstrip(b"\0") if frame.eof else b""
                    frame = None if frame.eof else frame
            if frame:
                raise EOFError("it ends in the middle of compressed data")
    except (EOFError, zlib.error, zstandard.ZstdError, OSError) as error:
        raise DataError(
            f"{file.url} is damaged or cannot be read: {error}. Restore it from a copy."
        ) from error


def _new_frame(url: str) -> Any:
    if url.endswith(".gz"):
        return zlib.decompressobj(wbits=_GZIP_WBITS)
    return zstandard.ZstdDecompressor().decompressobj()
