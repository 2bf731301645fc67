"""Corpora of text: files, JSONL, CSV, Parquet, Python's standard library, or a weighted mixture of these.

`config.chunks()` yields the units of reading in a fixed order; any process can read any of them. Which files
a path names is the rule of `corpus_listing`; what a row and a text are is that of `rows`.
"""

import json
import sysconfig
from collections.abc import Iterable, Iterator
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
from distft.errors import DataError, ErrorCollector

CHUNK_BYTES = 1 << 20  # minimum size on disk of a chunk: 0.05 to 0.3 s of tokenization


def _as_tuple(value: Any) -> Any:
    """A single path means a list of one."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


Paths = Annotated[tuple[PathText, ...], BeforeValidator(_as_tuple), Field(min_length=1)]


class _FileCorpus(Settings):
    """What all corpora of files have in common."""

    def listing(self) -> Listing:
        """The files to read. Opens none, except for a look at small ones."""
        raise NotImplementedError

    def files(self) -> list[SourceFile]:
        return list(self.listing().files.values())

    def chunks(
        self, chunk_bytes: int = CHUNK_BYTES, *, files: Iterable[SourceFile] | None = None
    ) -> Iterator[CorpusChunk]:
        """The units of reading; `files` are those of the listing, if the caller has it."""
        files = self.files() if files is None else files
        return group_chunks(self._chunks_of(files, chunk_bytes), chunk_bytes)

    def _chunks_of(self, files: Iterable[SourceFile], chunk_bytes: int) -> Iterator[CorpusChunk]:
        raise NotImplementedError


class TextCorpus(_FileCorpus):
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
        listing = list_files(self.paths, self.suffixes)
        compressed = [file.url for file in listing.files.values() if file.is_compressed]
        if compressed and self.span != (0.0, 1.0):
            raise DataError(
                f"span needs uncompressed files, whose length is known; {compressed[0]} is compressed."
            )
        return listing

    def _chunks_of(self, files: Iterable[SourceFile], chunk_bytes: int) -> Iterator[CorpusChunk]:
        range_bytes = self.max_document_bytes if self.documents == "file" else chunk_bytes
        return _file_chunks(files, TextFormat(self.documents, self.errors), range_bytes, self.span)


class JsonlCorpus(_FileCorpus):
    """JSON objects, one per line (also `.gz` and `.zst`)."""

    type: Literal["jsonl"] = "jsonl"
    paths: Paths
    text_column: str = "text"
    suffixes: tuple[str, ...] = SUFFIXES["jsonl"]

    def listing(self) -> Listing:
        return list_files(self.paths, self.suffixes)

    def _chunks_of(self, files: Iterable[SourceFile], chunk_bytes: int) -> Iterator[CorpusChunk]:
        return _file_chunks(files, JsonlFormat(self.text_column), chunk_bytes)


class CsvCorpus(_FileCorpus):
    """CSV or TSV files with a header, one document per row (also `.gz` and `.zst`).

    One process reads a file. Convert large ones to JSONL or Parquet, whose parts are read in parallel.
    """

    type: Literal["csv"] = "csv"
    paths: Paths
    text_column: str = "text"
    suffixes: tuple[str, ...] = SUFFIXES["csv"]

    def listing(self) -> Listing:
        return list_files(self.paths, self.suffixes)

    def _chunks_of(self, files: Iterable[SourceFile], chunk_bytes: int) -> Iterator[CorpusChunk]:
        return (CsvFileChunk(file, chunk_bytes, self.text_column) for file in files)


class ParquetCorpus(_FileCorpus):
    """Parquet files, one document per row."""

    type: Literal["parquet"] = "parquet"
    paths: Paths
    text_column: str = "text"
    suffixes: tuple[str, ...] = SUFFIXES["parquet"]

    def listing(self) -> Listing:
        return list_files(self.paths, self.suffixes)

    def _chunks_of(self, files: Iterable[SourceFile], chunk_bytes: int) -> Iterator[CorpusChunk]:
        return parquet_chunks(files, self.text_column, chunk_bytes)


class StdlibCorpus(_FileCorpus):
    """Source files of the running Python's standard library, without its tests: about 12 MB."""

    type: Literal["stdlib"] = "stdlib"

    def listing(self) -> Listing:
        root = Path(sysconfig.get_paths()["stdlib"])
        paths = (path for path in root.rglob("*.py") if not _NOT_STDLIB & set(path.relative_to(root).parts))
        sized = [(str(path), path.stat().st_size) for path in sorted(paths)]
        files = {path: SourceFile(path, size, "") for path, size in sized if size}
        if not files:
            raise DataError(f"corpus type stdlib: this Python has no library sources under {root}.")
        return Listing(files)

    def _chunks_of(self, files: Iterable[SourceFile], chunk_bytes: int) -> Iterator[CorpusChunk]:  # noqa: ARG002
        text_format = TextFormat("file", errors="replace")  # a few sources are not UTF-8
        return _file_chunks(files, text_format, 1 << 30)


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
        return ListedCorpus(self).files

    def chunks(self, chunk_bytes: int = CHUNK_BYTES) -> Iterator[CorpusChunk]:
        return ListedCorpus(self).chunks(chunk_bytes)


CorpusConfig = Annotated[
    TextCorpus | JsonlCorpus | CsvCorpus | ParquetCorpus | StdlibCorpus | MixtureCorpus,
    Component(),
]


class ListedCorpus:
    """A corpus and its files, listed once for all that is asked about them. Only `chunks` opens files."""

    def __init__(self, config: CorpusConfig) -> None:
        """List the files. Raises `DataError` with the problems of all sources."""
        self.config = config
        weighted: list[tuple[SingleCorpusConfig, float]]
        if isinstance(config, MixtureCorpus):
            weighted = [(source.corpus, source.weight) for source in config.sources]
        else:
            weighted = [(config, 1.0)]
        self._sources: list[tuple[SingleCorpusConfig, float, Listing]] = []
        errors = ErrorCollector()
        for corpus, weight in weighted:
            with errors.collect():
                self._sources.append((corpus, weight, corpus.listing()))
        errors.raise_if_any()

    @property
    def files(self) -> list[SourceFile]:
        return [file for _, _, listing in self._sources for file in listing.files.values()]

    def chunks(self, chunk_bytes: int | None = None) -> Iterator[CorpusChunk]:
        """The units of reading of all sources, as often as their weights say."""
        sizes = () if chunk_bytes is None else (chunk_bytes,)
        for index, (corpus, weight, listing) in enumerate(self._sources):
            for repetition in range(ceil(weight)):
                fraction = min(weight - repetition, 1.0)
                for chunk in corpus.chunks(*sizes, files=listing.files.values()):
                    yield chunk if fraction == 1 else SampledChunk(chunk, fraction, f"sample {index}")

    def describe(self) -> list[str]:
        """Lines for a person: what is read, and what is passed over, by ending."""
        if isinstance(self.config, StdlibCorpus):
            return []
        described = [listing.describe() for _, _, listing in self._sources]
        if not isinstance(self.config, MixtureCorpus):
            return described[0]
        return [f"Source {n}: {line}" for n, lines in enumerate(described, start=1) for line in lines]

    @property
    def source_bytes(self) -> int:
        """Bytes on disk that reading the corpus once takes, for a progress bar."""
        total = 0
        for corpus, weight, listing in self._sources:
            fraction = corpus.span[1] - corpus.span[0] if isinstance(corpus, TextCorpus) else 1.0
            total += round(sum(file.size for file in listing.files.values()) * fraction) * ceil(weight)
        return total

    @property
    def num_files_with_one_reader(self) -> int:
        """Number of files that cannot be read in parts."""
        return sum(
            file.is_compressed or isinstance(corpus, CsvCorpus)
            for corpus, _, listing in self._sources
            for file in listing.files.values()
        )

    @property
    def fingerprint(self) -> str:
        """Hex digest of the settings and of the files' names, sizes and versions."""
        files = [(file.url, file.size, file.version) for file in self.files]
        description = json.dumps([self.config.model_dump(mode="json"), files], sort_keys=True)
        return blake2b(description.encode(), digest_size=16).hexdigest()


def read_documents(corpus: CorpusConfig | ListedCorpus) -> Iterator[Document]:
    """Every document of `corpus` in order, read in this process."""
    for chunk in corpus.chunks():
        yield from chunk.documents()


def _file_chunks(
    files: Iterable[SourceFile],
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
