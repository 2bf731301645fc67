"""Chunks of a corpus: picklable units of work that read and yield documents in order."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal, Protocol

from distft.data.corpus_files import BLANK_LINES, Block, DocumentUnit, read_compressed, read_range
from distft.data.corpus_listing import SourceFile
from distft.data.rows import (
    BYTE_ORDER_MARK,
    Row,
    encoding_problem,
    missing_column,
    parse_json_row,
    text_problem,
)
from distft.errors import DataError
from distft.storage.lfs import POINTER_HEAD_BYTES, check_not_lfs_pointer

DecodeErrors = Literal["strict", "replace"]
Skipped = Counter[str]  # rows that are no documents, by reason: `NULL` or `EMPTY`
NULL, EMPTY = "null", "empty"

_LEADING_BLANK_LINES = re.compile(rb"(?:[ \t\r]*\n)+")
_HASHED_CHARS = 4096


@dataclass(frozen=True, slots=True)
class Document:
    """A text, or one section of a text that is too long for one chunk."""

    text: str  # not empty
    num_bytes: int  # of `text` in UTF-8
    origin: str  # file and position at which the whole document begins
    continues_previous: bool = False  # continues the document that ended the previous chunk
    continues_in_next: bool = False  # the next chunk continues this document

    def sampling_hash(self, salt: str) -> float:
        """A hash in [0, 1): equal for equal texts, and for all sections of one document."""
        is_whole = not (self.continues_previous or self.continues_in_next)
        # Length and first 4096 characters distinguish texts well enough, and are cheap for long ones.
        key = f"{len(self.text)} {self.text[:_HASHED_CHARS]}" if is_whole else self.origin
        digest = blake2b(key.encode(), digest_size=8, key=salt.encode())
        return int.from_bytes(digest.digest(), "little") / 2**64


class CorpusChunk(Protocol):
    """The unit that one worker reads at a time."""

    @property
    def source_bytes(self) -> int:
        """Size on disk."""
        ...

    def documents(self, skipped: Skipped | None = None) -> Iterator[Document]:
        """Read the documents, and count the rows without text in `skipped`, by reason.

        Raises `DataError` with file and line if one cannot be read.
        """
        ...

    def parts(self) -> Iterator["CorpusChunk"]:
        """Chunks that have the documents in the same order and fit into memory; often only the chunk itself.

        Other than the chunk itself they have been read from the file when they are returned.
        """
        ...


class DocumentFormat(Protocol):
    """Parser from the bytes of a file to documents."""

    @property
    def unit(self) -> DocumentUnit: ...

    def parse(self, block: Block, skipped: Skipped) -> Iterator[Document]: ...


@dataclass(frozen=True, slots=True)
class TextFormat:
    """Plain text: a document is a file, a line, or a paragraph between blank lines.

    CRLF becomes LF, and a byte-order mark at the start of a file is left out.
    """

    unit: DocumentUnit
    errors: DecodeErrors = "strict"  # for bytes that are not UTF-8

    def parse(self, block: Block, skipped: Skipped) -> Iterator[Document]:
        first = _first_position(block)
        if self.unit == "file":
            text = self._decode(block.data[first:], block, first)
            is_whole = not block.offset and block.is_end
            if text and not (is_whole and text.isspace()):
                yield Document(text, utf8_size(text), f"{block.url}:0", not block.is_start, not block.is_end)
            elif is_whole:
                skipped[EMPTY] += 1
            return
        pieces = _lines(block.data, first) if self.unit == "line" else _paragraphs(block.data, first)
        for start, data in pieces:
            text = self._decode(data, block, start)
            if text and not text.isspace():
                yield Document(text, utf8_size(text), f"{block.url}:{block.offset + start}")
            elif self.unit == "line" and start < len(block.data):  # what follows the last line is none
                skipped[EMPTY] += 1

    def _decode(self, data: bytes, block: Block, start: int) -> str:
        try:
            return data.decode("utf-8", self.errors).replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            position = start + error.start
            raise DataError(
                f"{block.url}:{block.line_number(position)}: byte {block.offset + position} of the file is "
                "not UTF-8. Convert the file, or set errors: replace."
            ) from None


@dataclass(frozen=True, slots=True)
class JsonlFormat:
    """One JSON object per line."""

    text_column: str
    unit: DocumentUnit = "line"

    def parse(self, block: Block, skipped: Skipped) -> Iterator[Document]:
        columns = (self.text_column,)
        for start, data in _lines(block.data, _first_position(block)):
            row = parse_json_row(data, columns)
            if row is None:
                continue
            text = text_of_row(row, self.text_column, skipped)
            if isinstance(text, RowProblem):
                raise DataError(f"{block.url}:{block.line_number(start)}: {text.message}")
            if text is not None:
                yield Document(text, utf8_size(text), f"{block.url}:{block.offset + start}")


@dataclass(frozen=True, slots=True)
class RowProblem:
    """What is wrong with a row."""

    message: str


def text_of_row(row: Row | str, column: str, skipped: Skipped) -> str | RowProblem | None:
    """The text of a row that was parsed; None, and a count in `skipped`, if it is null or empty."""
    if isinstance(row, str):
        return RowProblem(row)
    if column not in row:
        return RowProblem(missing_column(column, row) + " Set text_column or --text-column.")
    text = row[column]
    if text is None:
        skipped[NULL] += 1
        return None
    if problem := text_problem(text):
        return RowProblem(f"{column!r} {problem}")
    if not text or text.isspace():
        skipped[EMPTY] += 1
        return None
    return str(text)


@dataclass(frozen=True, slots=True)
class ByteRangeChunk:
    """Nominal bytes [start, stop) of an uncompressed file; reading aligns them to document boundaries."""

    file: SourceFile
    start: int
    stop: int
    span: tuple[int, int]  # nominal range of the file that all chunks together read
    format: DocumentFormat

    @property
    def source_bytes(self) -> int:
        return self.stop - self.start

    def documents(self, skipped: Skipped | None = None) -> Iterator[Document]:
        block = read_range(self.file, self.start, self.stop, self.format.unit, self.span)
        yield from self.format.parse(block, Counter() if skipped is None else skipped)

    def parts(self) -> Iterator[CorpusChunk]:
        yield self


@dataclass(frozen=True, slots=True)
class WholeFileChunk:
    """A file of any size that can only be read by one reader, from its start."""

    file: SourceFile
    block_bytes: int  # of text in memory at a time

    @property
    def source_bytes(self) -> int:
        return self.file.size

    def documents(self, skipped: Skipped | None = None) -> Iterator[Document]:
        for part in self.parts():
            yield from part.documents(skipped)

    def parts(self) -> Iterator[CorpusChunk]:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class CompressedFileChunk(WholeFileChunk):
    """A compressed file."""

    format: DocumentFormat

    def parts(self) -> Iterator[CorpusChunk]:
        for block, num_bytes in read_compressed(self.file, self.block_bytes, self.format.unit):
            yield BufferedChunk(block, num_bytes, self.format)


@dataclass(frozen=True, slots=True)
class BufferedChunk:
    """Decompressed bytes in memory: a part of a compressed file."""

    block: Block
    source_bytes: int
    format: DocumentFormat

    def documents(self, skipped: Skipped | None = None) -> Iterator[Document]:
        yield from self.format.parse(self.block, Counter() if skipped is None else skipped)

    def parts(self) -> Iterator[CorpusChunk]:
        yield self


@dataclass(frozen=True, slots=True)
class ChunkGroup:
    """Several small chunks as one."""

    chunks: tuple[CorpusChunk, ...]

    @property
    def source_bytes(self) -> int:
        return sum(chunk.source_bytes for chunk in self.chunks)

    def documents(self, skipped: Skipped | None = None) -> Iterator[Document]:
        for chunk in self.chunks:
            yield from chunk.documents(skipped)

    def parts(self) -> Iterator[CorpusChunk]:
        yield self


@dataclass(frozen=True, slots=True)
class SampledChunk:
    """A fraction of a chunk's documents, selected by their hash; all sections of a document or none."""

    chunk: CorpusChunk
    fraction: float
    salt: str

    @property
    def source_bytes(self) -> int:
        return self.chunk.source_bytes

    def documents(self, skipped: Skipped | None = None) -> Iterator[Document]:
        for document in self.chunk.documents(skipped):
            if document.sampling_hash(self.salt) < self.fraction:
                yield document

    def parts(self) -> Iterator[CorpusChunk]:
        for part in self.chunk.parts():
            yield SampledChunk(part, self.fraction, self.salt)


def group_chunks(chunks: Iterable[CorpusChunk], min_bytes: int) -> Iterator[CorpusChunk]:
    """Yield `chunks` in order, with small ones grouped until a group has `min_bytes`."""
    group: list[CorpusChunk] = []
    num_bytes = 0
    for chunk in chunks:
        if group and chunk.source_bytes >= min_bytes:  # a group is read as a whole: a large chunk stays alone
            yield ChunkGroup(tuple(group)) if len(group) > 1 else group[0]
            group, num_bytes = [], 0
        group.append(chunk)
        num_bytes += chunk.source_bytes
        if num_bytes >= min_bytes:
            yield ChunkGroup(tuple(group)) if len(group) > 1 else chunk
            group, num_bytes = [], 0
    if group:
        yield ChunkGroup(tuple(group))


def _first_position(block: Block) -> int:
    """Where the text in a block begins: after a byte-order mark, at the start of a file."""
    if block.offset:
        return 0
    check_not_lfs_pointer(block.url, block.data[:POINTER_HEAD_BYTES])
    if problem := encoding_problem(block.data):
        raise DataError(f"{block.url}:1: {problem}")
    return len(BYTE_ORDER_MARK) if block.data.startswith(BYTE_ORDER_MARK) else 0


def _lines(data: bytes, start: int) -> Iterator[tuple[int, bytes]]:
    """Yield (position, line without its `\\n` or `\\r\\n`)."""
    for line in data[start:].split(b"\n"):
        yield start, line.removesuffix(b"\r")
        start += len(line) + 1


def _paragraphs(data: bytes, start: int) -> Iterator[tuple[int, bytes]]:
    """Yield (position, paragraph without the blank lines around it)."""
    leading = _LEADING_BLANK_LINES.match(data, start)
    start = leading.end() if leading else start
    for match in BLANK_LINES.finditer(data, start):
        yield start, data[start : match.start()].removesuffix(b"\r")
        start = match.end()
    yield start, data[start:].rstrip(b"\r\n")


def utf8_size(text: str) -> int:
    """The bytes of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())
