"""Units of reading: each is small, can be sent to another process, and yields its documents in order."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal, Protocol

from distft import storage
from distft.data.corpus_files import BLANK_LINES, Block, DocumentUnit, SourceFile, read_range
from distft.errors import DataError

_BLANK_HEAD = re.compile(rb"(?:[ \t\r]*\n)+")

_DRAW_CHARS = 4096

Errors = Literal["strict", "replace"]


@dataclass(frozen=True, slots=True)
class Document:
    """A text, or a piece of one that is too long for one part."""

    text: str  # not empty
    num_bytes: int  # of `text` in UTF-8
    origin: str  # file and position where the document begins: the same for all its pieces
    continues: bool = False  # goes on with the document that the part before ended with
    is_continued: bool = False  # the next part goes on with this document

    def draw(self, salt: str) -> float:
        """A fixed number in [0, 1) for this document: the same for equal texts, and for all pieces of one."""
        is_whole = not (self.continues or self.is_continued)
        # The head and the length tell texts apart as well as all of it would, and cost nothing.
        key = f"{len(self.text)} {self.text[:_DRAW_CHARS]}" if is_whole else self.origin
        digest = blake2b(key.encode(), digest_size=8, key=salt.encode())
        return int.from_bytes(digest.digest(), "little") / 2**64


class CorpusPart(Protocol):
    """What one worker reads at a time."""

    @property
    def source_bytes(self) -> int:
        """Bytes on disk that this part accounts for."""
        ...

    def documents(self) -> Iterator[Document]:
        """Raises `DataError` with file and line of what cannot be read."""
        ...


class BlockFormat(Protocol):
    """How documents lie in bytes of a file."""

    @property
    def unit(self) -> DocumentUnit: ...

    def parse(self, block: Block) -> Iterator[Document]: ...


@dataclass(frozen=True, slots=True)
class TextFormat:
    """Plain text: documents are files, lines, or what blank lines part."""

    unit: DocumentUnit
    errors: Errors = "strict"  # for bytes that are not UTF-8

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
            line = _line_number(block, start + error.start)
            raise DataError(
                f"{block.url}:{line}: byte {block.offset + start + error.start} of the file is not UTF-8. "
                "Convert the file, or set errors: replace."
            ) from None


@dataclass(frozen=True, slots=True)
class JsonlFormat:
    """One JSON object a line."""

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
                fault = (
                    f"no column {self.text_column!r}; there are: {known}. Set text_column or --text-column."
                )
            except UnicodeEncodeError:
                fault = f"{self.text_column!r} holds a lone surrogate (half a character), which is not text."
            except UnicodeDecodeError as error:
                fault = f"not UTF-8 ({error.reason} at byte {error.start} of the line)."
            except (ValueError, RecursionError) as error:
                fault = f"not JSON ({error})."
            except TypeError:
                kind = type(row[self.text_column]).__name__ if isinstance(row, dict) else type(row).__name__
                fault = f"a JSON object with text in {self.text_column!r} is wanted, here is {kind}."
            else:
                if text:
                    yield Document(text, num_bytes, f"{block.url}:{block.offset + start}")
                continue
            raise DataError(f"{block.url}:{_line_number(block, start)}: {fault}")


@dataclass(frozen=True, slots=True)
class RangePart:
    """Bytes [start, stop) of an uncompressed file, set right to places between documents."""

    file: SourceFile
    start: int
    stop: int
    span: tuple[int, int]  # the part of the file that is read at all, by this part and others
    format: BlockFormat

    @property
    def source_bytes(self) -> int:
        return self.stop - self.start

    def documents(self) -> Iterator[Document]:
        block = read_range(self.file, self.start, self.stop, self.format.unit, self.span)
        yield from self.format.parse(block)


@dataclass(frozen=True, slots=True)
class BlockPart:
    """Bytes already read: a compressed file can only be read from its start, by one reader."""

    block: Block
    source_bytes: int
    format: BlockFormat

    def documents(self) -> Iterator[Document]:
        yield from self.format.parse(self.block)


@dataclass(frozen=True, slots=True)
class GroupPart:
    """Small parts taken together."""

    parts: tuple[CorpusPart, ...]

    @property
    def source_bytes(self) -> int:
        return sum(part.source_bytes for part in self.parts)

    def documents(self) -> Iterator[Document]:
        for part in self.parts:
            yield from part.documents()


@dataclass(frozen=True, slots=True)
class SampledPart:
    """Those documents of a part that a fixed draw picks; pieces of one document share their fate."""

    part: CorpusPart
    share: float
    salt: str

    @property
    def source_bytes(self) -> int:
        return self.part.source_bytes

    def documents(self) -> Iterator[Document]:
        for document in self.part.documents():
            if document.draw(self.salt) < self.share:
                yield document


def grouped(parts: Iterable[CorpusPart], min_bytes: int) -> Iterator[CorpusPart]:
    """`parts` in their order, small ones joined until they account for `min_bytes`."""
    waiting: list[CorpusPart] = []
    num_bytes = 0
    for part in parts:
        waiting.append(part)
        num_bytes += part.source_bytes
        if num_bytes >= min_bytes:
            yield GroupPart(tuple(waiting)) if len(waiting) > 1 else part
            waiting, num_bytes = [], 0
    if waiting:
        yield GroupPart(tuple(waiting))


def _lines(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(position, line without its end), for `\\n` and `\\r\\n`."""
    start = 0
    for line in data.split(b"\n"):
        yield start, line.removesuffix(b"\r")
        start += len(line) + 1


def _paragraphs(data: bytes) -> Iterator[tuple[int, bytes]]:
    head = _BLANK_HEAD.match(data)
    start = head.end() if head else 0
    for match in BLANK_LINES.finditer(data, start):
        yield start, data[start : match.start()]
        start = match.end()
    yield start, data[start:].rstrip(b"\r\n")


def _num_bytes(text: object) -> int:
    """Raises `TypeError` where `text` is none, `UnicodeEncodeError` where it cannot be UTF-8."""
    if not isinstance(text, str):
        raise TypeError
    return len(text) if text.isascii() else len(text.encode())


def _line_number(block: Block, position: int) -> int:
    within = block.data.count(b"\n", 0, position)
    if block.first_line is not None:
        return block.first_line + within
    with storage.open_read(block.url) as opened:
        left, count = block.offset, 1
        while left > 0 and (data := opened.read(min(left, 1 << 20))):
            left -= len(data)
            count += data.count(b"\n")
    return count + within
