"""Chunks of a corpus: picklable units of work that read and yield documents in order."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal, Protocol

from distft.data.corpus_files import BLANK_LINES, Block, DocumentUnit, SourceFile, read_range
from distft.errors import DataError

DecodeErrors = Literal["strict", "replace"]

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

    def documents(self) -> Iterator[Document]:
        """Read the documents. Raises `DataError` with file and line if one cannot be read."""
        ...


class DocumentFormat(Protocol):
    """Parser from the bytes of a file to documents."""

    @property
    def unit(self) -> DocumentUnit: ...

    def parse(self, block: Block) -> Iterator[Document]: ...


@dataclass(frozen=True, slots=True)
class TextFormat:
    """Plain text: a document is a file, a line, or a paragraph between blank lines."""

    unit: DocumentUnit
    errors: DecodeErrors = "strict"  # for bytes that are not UTF-8

    def parse(self, block: Block) -> Iterator[Document]:
        if self.unit == "file":
            text = self._decode(block.data, block, 0)
            if text:
                yield Document(
                    text, len(text.encode()), f"{block.url}:0", not block.is_start, not block.is_end
                )
            return
        for start, data in _lines(block.data) if self.unit == "line" else _paragraphs(block.data):
            text = self._decode(data, block, start)
            if text.strip():
                yield Document(text, len(text.encode()), f"{block.url}:{block.offset + start}")

    def _decode(self, data: bytes, block: Block, start: int) -> str:
        try:
            return data.decode("utf-8", self.errors)
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

    def parse(self, block: Block) -> Iterator[Document]:
        for start, data in _lines(block.data):
            if not data.strip():
                continue
            try:
                row = json.loads(data)
                text = row[self.text_column] if isinstance(row, dict) else None
                num_bytes = _num_bytes(text)
            except KeyError:
                known = ", ".join(sorted(row)[:10]) or "none"
                problem = (
                    f"no column {self.text_column!r}; it has: {known}. Set text_column or --text-column."
                )
            except UnicodeEncodeError:
                problem = f"{self.text_column!r} contains a lone surrogate (half a character), not text."
            except UnicodeDecodeError as error:
                problem = f"not UTF-8 ({error.reason} at byte {error.start} of the line)."
            except (ValueError, RecursionError) as error:
                problem = f"not JSON ({error})."
            except TypeError:
                kind = type(row[self.text_column]).__name__ if isinstance(row, dict) else type(row).__name__
                problem = f"expected a JSON object with text in {self.text_column!r}, got {kind}."
            else:
                if text:
                    yield Document(text, num_bytes, f"{block.url}:{block.offset + start}")
                continue
            raise DataError(f"{block.url}:{block.line_number(start)}: {problem}")


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

    def documents(self) -> Iterator[Document]:
        block = read_range(self.file, self.start, self.stop, self.format.unit, self.span)
        yield from self.format.parse(block)


@dataclass(frozen=True, slots=True)
class BufferedChunk:
    """Decompressed bytes in memory: a compressed file can only be read by one reader, from its start."""

    block: Block
    source_bytes: int
    format: DocumentFormat

    def documents(self) -> Iterator[Document]:
        yield from self.format.parse(self.block)


@dataclass(frozen=True, slots=True)
class ChunkGroup:
    """Several small chunks as one."""

    chunks: tuple[CorpusChunk, ...]

    @property
    def source_bytes(self) -> int:
        return sum(chunk.source_bytes for chunk in self.chunks)

    def documents(self) -> Iterator[Document]:
        for chunk in self.chunks:
            yield from chunk.documents()


@dataclass(frozen=True, slots=True)
class SampledChunk:
    """A fraction of a chunk's documents, selected by their hash; all sections of a document or none."""

    chunk: CorpusChunk
    fraction: float
    salt: str

    @property
    def source_bytes(self) -> int:
        return self.chunk.source_bytes

    def documents(self) -> Iterator[Document]:
        for document in self.chunk.documents():
            if document.sampling_hash(self.salt) < self.fraction:
                yield document


def group_chunks(chunks: Iterable[CorpusChunk], min_bytes: int) -> Iterator[CorpusChunk]:
    """Yield `chunks` in order, with small ones grouped until a group has `min_bytes`."""
    group: list[CorpusChunk] = []
    num_bytes = 0
    for chunk in chunks:
        group.append(chunk)
        num_bytes += chunk.source_bytes
        if num_bytes >= min_bytes:
            yield ChunkGroup(tuple(group)) if len(group) > 1 else chunk
            group, num_bytes = [], 0
    if group:
        yield ChunkGroup(tuple(group))


def _lines(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (position, line without its `\\n` or `\\r\\n`)."""
    start = 0
    for line in data.split(b"\n"):
        yield start, line.removesuffix(b"\r")
        start += len(line) + 1


def _paragraphs(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (position, paragraph without the blank lines around it)."""
    leading = _LEADING_BLANK_LINES.match(data)
    start = leading.end() if leading else 0
    for match in BLANK_LINES.finditer(data, start):
        yield start, data[start : match.start()]
        start = match.end()
    yield start, data[start:].rstrip(b"\r\n")


def _num_bytes(text: object) -> int:
    """UTF-8 size. Raises `TypeError` if `text` is not a str, `UnicodeEncodeError` for lone surrogates."""
    if not isinstance(text, str):
        raise TypeError
    return len(text) if text.isascii() else len(text.encode())
