"""Where text comes from: files, JSONL, Parquet, the standard library, or a weighted mixture of these.

`config.parts()` yields units of work in a fixed order; each can be sent to another process and read there.
"""

import json
import sysconfig
from collections.abc import Iterator
from hashlib import blake2b
from math import ceil
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from distft.config import Part, Settings
from distft.data.corpus_files import DocumentUnit, SourceFile, find_files, read_compressed
from distft.data.corpus_parquet import parquet_parts
from distft.data.corpus_parts import (
    BlockFormat,
    BlockPart,
    CorpusPart,
    Document,
    Errors,
    JsonlFormat,
    RangePart,
    SampledPart,
    TextFormat,
    grouped,
)
from distft.errors import DataError

PART_BYTES = 1 << 20  # of source that one part accounts for at least; 0.05 to 0.3 s of tokenizing


def _as_tuple(value: Any) -> Any:
    """One path may stand for a list of one."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


Paths = Annotated[tuple[str, ...], BeforeValidator(_as_tuple), Field(min_length=1)]


class TextCorpus(Settings):
    """Plain text files (`.gz` and `.zst` too)."""

    type: Literal["text"] = "text"
    paths: Paths  # files, directories, globs; local or URLs
    documents: DocumentUnit = "file"  # what one document is: a file, a line, or what blank lines part
    suffixes: tuple[str, ...] = (".txt", ".text", ".md", ".rst")  # taken from directories
    errors: Errors = "strict"  # "replace": bytes that are not UTF-8 become U+FFFD
    span: tuple[float, float] = (0.0, 1.0)  # the share of each file that is read, as (from, to)
    max_document_bytes: int = Field(
        8 << 20, ge=1
    )  # a longer file is one document, tokenized in pieces of this

    @model_validator(mode="after")
    def _span_is_ordered(self) -> Self:
        if not 0 <= self.span[0] < self.span[1] <= 1:
            raise ValueError(f"span={list(self.span)} must be two rising numbers between 0 and 1")
        return self

    def files(self) -> list[SourceFile]:
        files = find_files(self.paths, self.suffixes)
        squeezed = [file.url for file in files if file.is_compressed]
        if squeezed and self.span != (0.0, 1.0):
            raise DataError(
                f"span needs uncompressed files, to know their length; {squeezed[0]} is compressed."
            )
        return files

    def parts(self, part_bytes: int = PART_BYTES) -> Iterator[CorpusPart]:
        range_bytes = self.max_document_bytes if self.documents == "file" else part_bytes
        text_format = TextFormat(self.documents, self.errors)
        ranges = _file_parts(self.files(), text_format, range_bytes, self.span)
        return grouped(ranges, part_bytes)


class JsonlCorpus(Settings):
    """JSON objects, one a line (`.gz` and `.zst` too)."""

    type: Literal["jsonl"] = "jsonl"
    paths: Paths
    text_column: str = "text"
    suffixes: tuple[str, ...] = (".jsonl", ".ndjson", ".json")

    def files(self) -> list[SourceFile]:
        return find_files(self.paths, self.suffixes)

    def parts(self, part_bytes: int = PART_BYTES) -> Iterator[CorpusPart]:
        return grouped(_file_parts(self.files(), JsonlFormat(self.text_column), part_bytes), part_bytes)


class ParquetCorpus(Settings):
    """Parquet files, a row a document."""

    type: Literal["parquet"] = "parquet"
    paths: Paths
    text_column: str = "text"
    suffixes: tuple[str, ...] = (".parquet",)

    def files(self) -> list[SourceFile]:
        return find_files(self.paths, self.suffixes)

    def parts(self, part_bytes: int = PART_BYTES) -> Iterator[CorpusPart]:
        return grouped(parquet_parts(self.files(), self.text_column), part_bytes)


class StdlibCorpus(Settings):
    """The source files of the running Python's standard library without its tests: about 12 MB."""

    type: Literal["stdlib"] = "stdlib"

    def files(self) -> list[SourceFile]:
        root = Path(sysconfig.get_paths()["stdlib"])
        paths = (path for path in root.rglob("*.py") if not _NOT_LIBRARY & set(path.relative_to(root).parts))
        sized = [(str(path), path.stat().st_size) for path in sorted(paths)]
        files = [SourceFile(path, size, "") for path, size in sized if size]
        if not files:
            raise DataError(f"corpus type stdlib: this Python has no library sources under {root}.")
        return files

    def parts(self, part_bytes: int = PART_BYTES) -> Iterator[CorpusPart]:
        text_format = TextFormat("file", errors="replace")  # a few sources are in other encodings
        return grouped(_file_parts(self.files(), text_format, 1 << 30), part_bytes)


_NOT_LIBRARY = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})

SingleCorpusConfig = Annotated[TextCorpus | JsonlCorpus | ParquetCorpus | StdlibCorpus, Part()]


class WeightedCorpus(Settings):
    """One source of a mixture."""

    corpus: SingleCorpusConfig
    weight: float = Field(1.0, gt=0, le=1000, allow_inf_nan=False)  # how many times each document comes


class MixtureCorpus(Settings):
    """Several sources, one after the other.

    A weight is how often a source's documents come: 2 is twice each, 0.25 a quarter of them, 2.25 twice each
    and a quarter a third time. Which ones is a fixed draw by their text.
    """

    type: Literal["mixture"] = "mixture"
    sources: tuple[WeightedCorpus, ...] = Field(min_length=1)

    def files(self) -> list[SourceFile]:
        faults, files = [], []
        for source in self.sources:
            try:
                files += source.corpus.files()
            except DataError as error:
                faults.append(str(error))
        if faults:
            raise DataError("\n".join(faults))
        return files

    def parts(self, part_bytes: int = PART_BYTES) -> Iterator[CorpusPart]:
        for index, source in enumerate(self.sources):
            for turn in range(ceil(source.weight)):
                share = min(source.weight - turn, 1.0)
                for part in source.corpus.parts(part_bytes):
                    yield part if share == 1 else SampledPart(part, share, f"sample {index}")


CorpusConfig = Annotated[
    TextCorpus | JsonlCorpus | ParquetCorpus | StdlibCorpus | MixtureCorpus,
    Part(),
]


def documents(corpus: CorpusConfig) -> Iterator[Document]:
    """Every document of `corpus` in order, read in this process."""
    for part in corpus.parts():
        yield from part.documents()


def source_bytes(corpus: CorpusConfig) -> int:
    """Bytes on disk that a full reading goes through, for a progress bar. Opens no file."""
    if isinstance(corpus, MixtureCorpus):
        return sum(source_bytes(source.corpus) * ceil(source.weight) for source in corpus.sources)
    share = corpus.span[1] - corpus.span[0] if isinstance(corpus, TextCorpus) else 1.0
    return round(sum(file.size for file in corpus.files()) * share)


def corpus_fingerprint(corpus: CorpusConfig) -> str:
    """Hex digest of the settings and of the files' names, sizes and times; opens no file."""
    files = [(file.url, file.size, file.version) for file in corpus.files()]
    description = json.dumps([corpus.model_dump(mode="json"), files], sort_keys=True)
    return blake2b(description.encode(), digest_size=16).hexdigest()


def _file_parts(
    files: list[SourceFile],
    block_format: BlockFormat,
    part_bytes: int,
    span: tuple[float, float] = (0.0, 1.0),
) -> Iterator[CorpusPart]:
    for file in files:
        if file.is_compressed:
            for block, taken in read_compressed(file, part_bytes, block_format.unit):
                yield BlockPart(block, taken, block_format)
            continue
        limits = (round(file.size * span[0]), round(file.size * span[1]))
        for start in range(*limits, part_bytes):
            stop = min(start + part_bytes, limits[1])
            yield RangePart(file, start, stop, limits, block_format)
