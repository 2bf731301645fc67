"""Finds the files of a corpus and reads byte ranges of them, aligned to document boundaries.

A range is planned by nominal byte positions without opening the file. The reader moves each end to the first
document boundary at or after it. The readers of adjacent ranges find the same boundary, so every byte belongs
to exactly one range.
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

_GZIP_WBITS = 16 + zlib.MAX_WBITS  # zlib expects a gzip header and verifies the gzip checksum
_COMPRESSED = (".gz", ".zst")
READ_BYTES = 1 << 16
BLANK_LINES = re.compile(rb"\n(?:[ \t\r]*\n)+")
_BEFORE_SPACES = re.compile(rb"[^ ](?= )")


@dataclass(frozen=True, slots=True)
class SourceFile:
    url: str  # a local path, or a URL that fsspec opens
    size: int  # bytes on disk
    version: str  # ETag or modification time, "" if the storage has neither

    @property
    def is_compressed(self) -> bool:
        return self.url.endswith(_COMPRESSED)


@dataclass(frozen=True, slots=True)
class Block:
    """Bytes of one file between two document boundaries."""

    url: str
    offset: int  # of the first byte, in the decompressed file
    data: bytes
    is_start: bool  # first block of the file, or of the span that is read
    is_end: bool  # last block of it
    first_line: int | None = None  # line number of the first byte, from 1; None: unknown, see `line_number`

    def line_number(self, position: int) -> int:
        """Line in the file, from 1, of `position` in `data`; reads the file if `first_line` is unknown."""
        newlines_before = self.data.count(b"\n", 0, position)
        if self.first_line is not None:
            return self.first_line + newlines_before
        with storage.open_read(self.url) as opened:
            num_left, line = self.offset, 1
            while num_left > 0 and (data := opened.read(min(num_left, 1 << 20))):
                num_left -= len(data)
                line += data.count(b"\n")
        return line + newlines_before


def find_files(patterns: tuple[str, ...], suffixes: tuple[str, ...]) -> list[SourceFile]:
    """Non-empty files that `patterns` name: a file, a glob, or a directory (searched recursively).

    In a directory only files with one of `suffixes` (plus optional `.gz` or `.zst`) are taken, and hidden
    files and folders are skipped. Each file is returned once, in the order of the patterns, sorted within
    each. Raises `DataError` with every pattern that matches nothing or only empty files.
    """
    found: dict[str, SourceFile] = {}
    problems = []
    for pattern in patterns:
        try:
            matches = _match(pattern, suffixes)
        except (OSError, ValueError, ImportError) as error:
            problems.append(f"corpus path {pattern} cannot be listed: {error}.")
            continue
        nonempty = [file for file in matches if file.size]
        if not matches:
            problems.append(
                f"corpus path {pattern} does not exist, or is a directory or glob without a file that ends "
                f"in {', '.join(suffixes)} (or one of these with .gz or .zst)."
            )
        elif not nonempty:
            problems.append(f"corpus path {pattern} has nothing to read: {len(matches)} empty file(s).")
        found |= {file.url: file for file in nonempty if file.url not in found}
    if problems:
        raise DataError("\n".join(problems))
    return list(found.values())


def _match(pattern: str, suffixes: tuple[str, ...]) -> list[SourceFile]:
    from fsspec.core import url_to_fs  # 0.1 s, which processes that only read files save
    from fsspec.implementations.local import LocalFileSystem

    filesystem, path = url_to_fs(pattern)
    if filesystem.isfile(path):
        matches = {path: filesystem.info(path)}
    elif filesystem.isdir(path):
        matches = {
            name: info
            for name, info in filesystem.find(path, detail=True).items()
            if _without_compression_suffix(name).endswith(suffixes)
            and "/." not in name[len(path.rstrip("/")) :]
        }
    else:
        matches = filesystem.glob(path, detail=True)
    is_local = isinstance(filesystem, LocalFileSystem)
    return [
        SourceFile(name if is_local else filesystem.unstrip_protocol(name), info["size"], _version(info))
        for name, info in sorted(matches.items())
        if info["type"] == "file"
    ]


def _without_compression_suffix(name: str) -> str:
    for suffix in _COMPRESSED:
        name = name.removesuffix(suffix)
    return name


def _version(info: dict[str, Any]) -> str:
    return str(
        next((info[key] for key in ("ETag", "etag", "mtime", "LastModified", "updated") if key in info), "")
    )


def find_boundary(data: bytes | bytearray, start: int, unit: DocumentUnit) -> int:
    """The first position >= `start` >= 1 in `data` at which a range may end; -1 if there is none.

    For lines it follows a newline, for blank-line documents blank lines. A file that is one document is cut
    before a run of spaces, where most vocabularies give the same ids as for the whole text; if the next
    64 KiB have none, after a newline, else between two characters.
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
    after_newline = window.find(b"\n") + 1
    if after_newline:
        return start - 1 + after_newline
    return next((i for i in range(start, len(data)) if data[i] & 0xC0 != 0x80), -1)


def read_range(file: SourceFile, start: int, stop: int, unit: DocumentUnit, span: tuple[int, int]) -> Block:
    """Read the nominal byte range [start, stop), aligned to boundaries, of an uncompressed file.

    `span` is the nominal range of the file that all readers together read.
    """
    try:
        with storage.open_read(file.url) as opened:
            begin, end, span_begin, span_end = (
                _aligned(opened, nominal, file.size, unit) for nominal in (start, stop, *span)
            )
            opened.seek(begin)
            data = opened.read(max(end - begin, 0))
    except OSError as error:
        raise DataError(f"{file.url} cannot be read: {error}.") from error
    if len(data) < end - begin:
        raise DataError(f"{file.url} was truncated while it was read: do not change it, and start again.")
    return Block(file.url, begin, data, begin == span_begin, end == span_end)


def _aligned(opened: Any, nominal: int, size: int, unit: DocumentUnit) -> int:
    """The first document boundary at or after `nominal`, a function of the file's content alone."""
    if nominal <= 0 or nominal >= size:
        return min(max(nominal, 0), size)
    opened.seek(nominal - 1)
    buffer = b""
    num_to_read = READ_BYTES + 1
    while data := opened.read(num_to_read):
        buffer += data
        boundary = find_boundary(buffer, 1, unit)
        if 0 <= boundary < len(buffer):
            return nominal - 1 + boundary
        num_to_read = len(buffer)
    return size


def read_compressed(file: SourceFile, block_bytes: int, unit: DocumentUnit) -> Iterator[tuple[Block, int]]:
    """Yield blocks of at least `block_bytes` of a compressed file, and the compressed bytes read for each."""
    buffer = bytearray()
    offset, line, num_reported, min_buffer = 0, 1, 0, 0
    num_read = 0
    for data, num_read in _decompress(file):
        buffer += data
        if len(buffer) < max(block_bytes, min_buffer) + READ_BYTES:
            continue
        boundary = find_boundary(buffer, block_bytes, unit)
        if not 0 < boundary < len(buffer):
            min_buffer = 2 * len(buffer)  # doubling keeps the search of a very long document linear
            continue
        block = Block(file.url, offset, bytes(buffer[:boundary]), offset == 0, False, line)
        yield block, num_read - num_reported
        offset, line = offset + boundary, line + block.data.count(b"\n")
        num_reported, min_buffer = num_read, 0
        del buffer[:boundary]
    if buffer:
        yield Block(file.url, offset, bytes(buffer), offset == 0, True, line), num_read - num_reported


def _decompress(file: SourceFile) -> Iterator[tuple[bytes, int]]:
    """Yield (data, compressed bytes read so far). Raises `DataError` for a damaged or truncated file."""
    try:
        with storage.open_read(file.url) as opened:
            # Frame by frame: twice as fast as the gzip module, and zstandard's stream reader does not detect
            # a truncated file.
            frame = None
            while data := opened.read(READ_BYTES):
                while data:
                    frame = frame or _new_frame(file.url)
                    yield frame.decompress(data), opened.tell()
                    # gzip allows zero bytes between frames, as padding of tape blocks.
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
