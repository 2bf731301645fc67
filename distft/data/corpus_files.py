"""Reads byte ranges of a corpus's files, aligned to document boundaries.

A range is planned by nominal byte positions without opening the file. The reader moves each end to the first
document boundary at or after it. The readers of adjacent ranges find the same boundary, so every byte belongs
to exactly one range. A range reads itself and what is left of the document that it ends in: a line that is
longer than many ranges is read by the one in which it begins.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from distft import storage
from distft.data import compressed
from distft.data.corpus_listing import SourceFile
from distft.errors import DataError, StorageError

DocumentUnit = Literal["file", "line", "blank_line"]

READ_BYTES = 1 << 16
BLANK_LINES = re.compile(rb"\n(?:[ \t\r]*\n)+")
_BLANKS = re.compile(rb"[ \t\r]*")
_BEFORE_SPACES = re.compile(rb"[^ ](?= )")
_NAMES: dict[DocumentUnit, str] = {"file": "section", "line": "line", "blank_line": "paragraph"}
_CHARACTER_BYTES = 4  # at most, in UTF-8


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
        return _line_number(self.url, self.offset) + newlines_before


def _line_number(url: str, offset: int) -> int:
    """The line, from 1, of a byte of an uncompressed file."""
    line = 1
    with storage.open_read(url) as opened:
        while offset > 0 and (data := opened.read(min(offset, 1 << 20))):
            offset -= len(data)
            line += data.count(b"\n")
    return line


def find_boundary(data: bytes | bytearray, start: int, unit: DocumentUnit) -> int:
    """The first position >= `start` >= 1 in `data` at which a range may end; -1 if there is none.

    For lines it follows a newline, for blank-line documents blank lines. A file that is one document is cut
    before a run of spaces, where most vocabularies give the same ids as for the whole text; if the next
    64 KiB have none, after a newline, else between two characters. A cut never separates `\\r\\n`.
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
    for position in range(start, min(start + _CHARACTER_BYTES, len(data))):
        if data[position] & 0xC0 != 0x80:
            return position
    return start if start + _CHARACTER_BYTES <= len(data) else -1  # not UTF-8: its reader will say so


class _Window:
    """Bytes of a file from `start` on, read as far as they are needed."""

    def __init__(self, file: SourceFile, start: int) -> None:
        self.file = file
        self.start = max(start, 0)
        self.data = bytearray()

    def read_to(self, stop: int) -> None:
        """Have the bytes up to position `stop` of the file, or to its end."""
        missing = min(stop, self.file.size) - self.start - len(self.data)
        if missing > 0:
            at = self.start + len(self.data)
            try:
                self.data += storage.read_range(self.file.url, at, at + missing)
            except StorageError:
                check_unchanged(self.file)  # it was cut short meanwhile
                raise

    @property
    def has_all(self) -> bool:
        return self.start + len(self.data) >= self.file.size

    def boundary(self, nominal: int, unit: DocumentUnit, limit: int | None = None) -> int | None:
        """The first boundary at or after `nominal`, a function of the file's content alone.

        None if that is also the first boundary at or after `limit`, which nobody needs to look for then.
        """
        if nominal <= 0 or nominal >= self.file.size:
            return min(max(nominal, 0), self.file.size)
        first = nominal - self.start
        self.read_to(nominal + READ_BYTES)
        while True:
            found = find_boundary(self.data, first, unit)
            if limit is not None and not self._may_begin_before(first, limit - self.start, unit):
                return None
            if 0 <= found < len(self.data):
                return self.start + found
            if self.has_all:
                return self.file.size
            if len(self.data) - first > compressed.MAX_ROW_BYTES:
                line = _line_number(self.file.url, nominal)
                raise compressed.too_long(f"{self.file.url}:{line}", _NAMES[unit])
            self.read_to(self.start + 2 * len(self.data))  # doubling keeps the search of a long line linear

    def _may_begin_before(self, first: int, limit: int, unit: DocumentUnit) -> bool:
        """Whether what marks a boundary begins in [first - 1, limit - 1), or may begin there."""
        if unit == "line":
            return self.data.find(b"\n", first - 1, limit - 1) >= 0
        if unit == "blank_line":
            found = BLANK_LINES.search(self.data, first - 1)
            if found:
                return found.start() < limit - 1
            newline = self.data.rfind(b"\n", first - 1, limit - 1)
            blanks = _BLANKS.match(self.data, newline + 1)
            return newline >= 0 and blanks is not None and blanks.end() == len(self.data)
        return True


def read_range(file: SourceFile, start: int, stop: int, unit: DocumentUnit, span: tuple[int, int]) -> Block:
    """Read the nominal byte range [start, stop), aligned to boundaries, of an uncompressed file.

    `span` is the nominal range of the file that all readers together read. Raises `DataError` if the file
    changed since it was listed, or if a document is longer than `MAX_ROW_BYTES`.
    """
    try:
        window = _Window(file, start - 1)
        window.read_to(stop + READ_BYTES)  # in one request; few documents end later
        begin = window.boundary(start, unit, limit=stop)
        end = None if begin is None else window.boundary(stop, unit)
        check_unchanged(file)
        if begin is None or end is None:
            return Block(file.url, stop, b"", is_start=False, is_end=False)
        is_start, is_end = begin == 0, end == file.size
        if span != (0, file.size):
            is_start = begin == _Window(file, span[0] - 1).boundary(span[0], unit)
            is_end = end == _Window(file, span[1] - 1).boundary(span[1], unit)
    except OSError as error:
        raise compressed.read_error(file.url, error) from error
    data = bytes(window.data[begin - window.start : end - window.start])
    return Block(file.url, begin, data, is_start, is_end)


def check_unchanged(file: SourceFile) -> None:
    """Raise `DataError` if a local file has another size or time than when it was listed."""
    path = storage.local_path(file.url)
    if path is None or not file.version:
        return
    status = os.stat(path)  # noqa: PTH116 - a call for each range
    if (status.st_size, str(status.st_mtime)) != (file.size, file.version):
        raise DataError(f"{file.url} changed while it was read: leave it as it is, and start again.")


def read_compressed(file: SourceFile, block_bytes: int, unit: DocumentUnit) -> Iterator[tuple[Block, int]]:
    """Yield blocks of at least `block_bytes` of a compressed file, and the compressed bytes read for each."""
    buffer = bytearray()
    offset, line, num_reported, min_buffer = 0, 1, 0, 0
    num_read = 0
    for data, num_read in read_decompressed(file):
        buffer += data
        # A boundary is only accepted with READ_BYTES after it: see `find_boundary`.
        while len(buffer) >= max(block_bytes, min_buffer) + READ_BYTES:
            boundary = find_boundary(buffer, block_bytes, unit)
            if not 0 < boundary < len(buffer):
                if len(buffer) - block_bytes > compressed.MAX_ROW_BYTES:
                    number = line + buffer.count(b"\n", 0, block_bytes)
                    raise compressed.too_long(f"{file.url}:{number}", _NAMES[unit])
                min_buffer = 2 * len(buffer)  # doubling keeps the search of a very long document linear
                break
            block = Block(file.url, offset, bytes(buffer[:boundary]), offset == 0, False, line)
            yield block, num_read - num_reported
            offset, line = offset + boundary, line + block.data.count(b"\n")
            num_reported, min_buffer = num_read, 0
            del buffer[:boundary]
    if buffer:
        yield Block(file.url, offset, bytes(buffer), offset == 0, True, line), num_read - num_reported
    check_unchanged(file)


def read_decompressed(file: SourceFile) -> Iterator[tuple[bytes, int]]:
    """Yield (data, bytes on disk read so far) of a file, compressed or not."""
    try:
        opened = storage.open_read(file.url)
    except OSError as error:
        raise compressed.read_error(file.url, error) from error
    with opened:
        try:
            yield from compressed.decompressed(opened, file.url)
        except DataError:
            check_unchanged(file)  # a better reason for a damaged file
            raise
