"""Corpora of text: files, JSONL, CSV, Parquet, Python's standard library, or a weighted mixture of these.

`config.chunks()` yields the units of reading in a fixed order; any process can read any of them. Which files
a path names is the rule of `corpus_listing`; what a row and a text are is that of `rows`.
"""

import json
import sysconfig
from collections.abc import Iterator
from hashlib import blake2b
from math import ceil
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from distft.config import Component, PathText, Settings
from distft.data.corpus_chunks import (
    ByteRangeChunk,
    CompressedFileChunk,
    CorpusChunk,
    DecodeErrors,
    Document,
    DocumentFormat,
    JsonlFormat,
    SampledChunk,
    TextFormat,
    group_chunks,
)
from distft.data.corpus_csv import CsvFileChunk
from distft.data.corpus_files import DocumentUnit
from distft.data.corpus_kinds import SUFFIXES
from distft.data.corpus_listing import Listing, SourceFile, list_files
from distft.data.corpus_parquet import parquet_chunks
from distft.errors import DataError

CHUNK_BYTES = 1 << 20  # minimum size on disk of a chunk: 0.05 to 0.3 s of tokenization


def _as_tuple(value: Any) -> Any:
    """A single path means a list of one."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


Paths = Annotated[tuple[PathText, ...], BeforeValidator(_as_tuple), Field(min_length=1)]


class TextCorpus(Settings):
    """Plain text files (also `.gz` and `.zst`)."""

    type: Literal["text"] = "text"
    paths: Paths  # files, directories, globs; local or URLs
    documents: DocumentUnit = "file"  # one document is a file, a line, or a paragraph between blank lines
    suffixes: tuple[str, ...] = SUFFIXES["text"]  # of the files to take from directories, in any case
    errors: DecodeErrors = "strict"  # "replace": bytes that are not UTF-8 become U+FFFD
    span: tuple[float, float] = (0.0, 1.0)  # fraction of each file to read, as (from, to)
    max_document_bytes: int = Field(
        8 << 20, ge=1
    )  # bytes of one document tokenized at a time, if a document is a file

    @model_validator(mode="after")
    def _check_span(self) -> Self:
        if not 0 <= self.span[0] < self.span[1] <= 1:
            raise ValueError(f"span={list(self.span)} must be two ascending numbers between 0 and 1")
        return self

    def listing(self) -> Listing:
        return list_files(self.paths, self.suffixes)

    def files(self) -> list[SourceFile]:
        files = list(self.listing().files.values())
        compressed = [file.url for file in files if file.is_compressed]
        if compressed and self.span != (0.0, 1.0):
            raise DataError(
                f"span needs uncompressed files, whose length is known; {compressed[0]} is compressed."
            )
        return files

    def chunks(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[CorpusChunk]:
        range_bytes = self.max_document_bytes if self.documents == "file" else chunk_bytes
        text_format = TextFormat(self.documents, self.errors)
        ranges = _file_chunks(self.files(), text_format, range_bytes, self.span)
        return group_chunks(ranges, chunk_bytes)


class JsonlCorpus(Settings):
    """JSON objects, one per line (also `.gz` and `.zst`)."""

    type: Literal["jsonl"] = "jsonl"
    paths: Paths
    text_column: str = "text"
    suffixes: tuple[str, ...] = SUFFIXES["jsonl"]

    def listing(self) -> Listing:
        return list_files(self.paths, self.suffixes)

    def files(self) -> list[SourceFile]:
        return list(self.listing().files.values())

    def chunks(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[CorpusChunk]:
        ranges = _file_chunks(self.files(), JsonlFormat(self.text_column), chunk_bytes)
        return group_chunks(ranges, chunk_bytes)


class CsvCorpus(Settings):
    """CSV or TSV files with a header, one document per row (also `.gz` and `.zst`).

    One process reads a file. Convert large ones to JSONL or Parquet, whose parts are read in parallel.
    """

    type: Literal["csv"] = "csv"
    paths: Paths
    text_column: str = "text"
    suffixes: tuple[str, ...] = SUFFIXES["csv"]

    def listing(self) -> Listing:
        return list_files(self.paths, self.suffixes)

    def files(self) -> list[SourceFile]:
        return list(self.listing().files.values())

    def chunks(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[CorpusChunk]:
        chunks = (CsvFileChunk(file, chunk_bytes, self.text_column) for file in self.files())
        return group_chunks(chunks, chunk_bytes)


class ParquetCorpus(Settings):
    """Parquet files, one document per row."""

    type: Literal["parquet"] = "parquet"
    paths: Paths
    text_column: str = "text"
    suffixes: tuple[str, ...] = SUFFIXES["parquet"]

    def listing(self) -> Listing:
        return list_files(self.paths, self.suffixes)

    def files(self) -> list[SourceFile]:
        return list(self.listing().files.values())

    def chunks(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[CorpusChunk]:
        return group_chunks(parquet_chunks(self.files(), self.text_column, chunk_bytes), chunk_bytes)


class StdlibCorpus(Settings):
    """Source files of the running Python's standard library, without its tests: about 12 MB."""

    type: Literal["stdlib"] = "stdlib"

    def files(self) -> list[SourceFile]:
        root = Path(sysconfig.get_paths()["stdlib"])
        paths = (path for path in root.rglob("*.py") if not _NOT_STDLIB & set(path.relative_to(root).parts))
        sized = [(str(path), path.stat().st_size) for path in sorted(paths)]
        files = [SourceFile(path, size, "") for path, size in sized if size]
        if not files:
            raise DataError(f"corpus type stdlib: this Python has no library sources under {root}.")
        return files

    def chunks(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[CorpusChunk]:
        text_format = TextFormat("file", errors="replace")  # a few sources are not UTF-8
        return group_chunks(_file_chunks(self.files(), text_format, 1 << 30), chunk_bytes)


_NOT_STDLIB = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})

SingleCorpusConfig = Annotated[
    TextCorpus | JsonlCorpus | CsvCorpus | ParquetCorpus | StdlibCorpus, Component()
]


class WeightedCorpus(Settings):
    """One source of a mixture."""

    corpus: SingleCorpusConfig
    weight: float = Field(1.0, gt=0, le=1000, allow_inf_nan=False)  # how often each document is used


class MixtureCorpus(Settings):
    """Several sources, one after the other.

    The weight of a source is how often its documents are used: 2 uses each of them twice, 0.25 a quarter of
    them, 2.25 each of them twice and a quarter a third time, selected by a hash of the text.
    """

    type: Literal["mixture"] = "mixture"
    sources: tuple[WeightedCorpus, ...] = Field(min_length=1)

    def files(self) -> list[SourceFile]:
        problems, files = [], []
        for source in self.sources:
            try:
                files += source.corpus.files()
            except DataError as error:
                problems.append(str(error))
        if problems:
            raise DataError("\n".join(problems))
        return files

    def chunks(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[CorpusChunk]:
        for index, source in enumerate(self.sources):
            for repetition in range(ceil(source.weight)):
                fraction = min(source.weight - repetition, 1.0)
                for chunk in source.corpus.chunks(chunk_bytes):
                    yield chunk if fraction == 1 else SampledChunk(chunk, fraction, f"sample {index}")


CorpusConfig = Annotated[
    TextCorpus | JsonlCorpus | CsvCorpus | ParquetCorpus | StdlibCorpus | MixtureCorpus,
    Component(),
]


def read_documents(corpus: CorpusConfig) -> Iterator[Document]:
    """Every document of `corpus` in order, read in this process."""
    for chunk in corpus.chunks():
        yield from chunk.documents()


def describe_files(corpus: CorpusConfig) -> list[str]:
    """Lines for a person about the files of `corpus`: what is read, and what is passed over, by ending."""
    if isinstance(corpus, StdlibCorpus):
        return []
    if isinstance(corpus, MixtureCorpus):
        return [
            f"Source {number}: {line}"
            for number, source in enumerate(corpus.sources, start=1)
            for line in describe_files(source.corpus)
        ]
    return corpus.listing().describe()


def source_bytes(corpus: CorpusConfig) -> int:
    """Bytes on disk that reading `corpus` once takes, for a progress bar. Opens no file."""
    if isinstance(corpus, MixtureCorpus):
        return sum(source_bytes(source.corpus) * ceil(source.weight) for source in corpus.sources)
    fraction = corpus.span[1] - corpus.span[0] if isinstance(corpus, TextCorpus) else 1.0
    return round(sum(file.size for file in corpus.files()) * fraction)


def corpus_fingerprint(corpus: CorpusConfig) -> str:
    """Hex digest of the settings and of the files' names, sizes and versions. Opens no file."""
    files = [(file.url, file.size, file.version) for file in corpus.files()]
    description = json.dumps([corpus.model_dump(mode="json"), files], sort_keys=True)
    return blake2b(description.encode(), digest_size=16).hexdigest()


def _file_chunks(
    files: list[SourceFile],
    document_format: DocumentFormat,
    chunk_bytes: int,
    span: tuple[float, float] = (0.0, 1.0),
) -> Iterator[CorpusChunk]:
    for file in files:
        if file.is_compressed:
            yield CompressedFileChunk(file, chunk_bytes, document_format)
            continue
        begin, end = round(file.size * span[0]), round(file.size * span[1])
        for start in range(begin, end, chunk_bytes):
            stop = min(start + chunk_bytes, end)
            yield ByteRangeChunk(file, start, stop, (begin, end), document_format)
