"""CSV and TSV files as corpus chunks, one per file: a line of it may be the middle of a quoted text."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from distft.data.compressed import lines, without_compression
from distft.data.corpus_chunks import (
    CorpusChunk,
    Document,
    RowProblem,
    Skipped,
    WholeFileChunk,
    text_of_row,
    utf8_size,
)
from distft.data.corpus_files import check_unchanged, read_decompressed
from distft.data.rows import csv_rows
from distft.errors import DataError


@dataclass(frozen=True, slots=True)
class CsvFileChunk(WholeFileChunk):
    """A file with a header, compressed or not."""

    text_column: str

    def parts(self) -> Iterator[CorpusChunk]:
        num_read = 0

        def blocks() -> Iterator[bytes]:
            nonlocal num_read
            for data, num_read in read_decompressed(self.file):  # noqa: B007 - num_read is used below
                yield data

        delimiter = "\t" if without_compression(self.file.url).lower().endswith(".tsv") else ","
        columns = (self.text_column,)
        documents: list[Document] = []
        skipped: Skipped = Counter()
        num_bytes = num_reported = 0
        for line, row in csv_rows(lines(blocks(), self.file.url), delimiter, columns):
            text = text_of_row(row, self.text_column, skipped)
            if isinstance(text, RowProblem):
                raise DataError(f"{self.file.url}:{line}: {text.message}")
            if text is not None:
                documents.append(Document(text, utf8_size(text), f"{self.file.url}:{line}"))
                num_bytes += documents[-1].num_bytes
            if num_bytes >= self.block_bytes:
                yield RowsChunk(tuple(documents), dict(skipped), num_read - num_reported)
                documents, skipped, num_bytes, num_reported = [], Counter(), 0, num_read
        check_unchanged(self.file)
        yield RowsChunk(tuple(documents), dict(skipped), num_read - num_reported)


@dataclass(frozen=True, slots=True)
class RowsChunk:
    """Rows in memory: a part of a CSV file."""

    rows: tuple[Document, ...]
    skipped: dict[str, int]  # by reason
    source_bytes: int

    def documents(self, skipped: Skipped | None = None) -> Iterator[Document]:
        if skipped is not None:
            skipped.update(self.skipped)
        yield from self.rows

    def parts(self) -> Iterator[CorpusChunk]:
        yield self
