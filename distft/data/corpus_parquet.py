"""Parquet files as corpus chunks of row groups, which are the smallest unit that can be read alone."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from distft.data.compressed import read_error
from distft.data.corpus_chunks import CorpusChunk, Document, RowProblem, Skipped, text_of_row, utf8_size
from distft.data.corpus_files import check_unchanged
from distft.data.corpus_listing import SourceFile
from distft.data.range_file import open_ranges
from distft.data.rows import missing_column
from distft.errors import DataError
from distft.storage.lfs import check_not_lfs_pointer

_ROWS_PER_BATCH = 64  # in memory; more of them at a time is slower as well


@dataclass(frozen=True, slots=True)
class RowGroupChunk:
    """Row groups of a Parquet file, one after the other."""

    file: SourceFile
    row_groups: tuple[int, ...]
    first_row: int
    text_column: str
    source_bytes: int

    def documents(self, skipped: Skipped | None = None) -> Iterator[Document]:
        skipped = Skipped() if skipped is None else skipped
        row = self.first_row
        for values in self._batches():
            for value in values:
                text = text_of_row({self.text_column: value}, self.text_column, skipped)
                if isinstance(text, RowProblem):
                    raise DataError(f"{self.file.url}:{row}: {text.message}")
                if text is not None:
                    yield Document(text, utf8_size(text), f"{self.file.url}:{row}")
                row += 1
        check_unchanged(self.file)

    def parts(self) -> Iterator[CorpusChunk]:
        yield self

    def _batches(self) -> Iterator[list[Any]]:
        row, num_rows = self.first_row, 0
        try:
            with open_ranges(self.file) as opened:
                batches = _parquet_file(opened).iter_batches(
                    _ROWS_PER_BATCH, row_groups=list(self.row_groups), columns=[self.text_column]
                )
                for batch in batches:
                    num_rows = len(batch)
                    yield batch.column(0).to_pylist()
                    row += num_rows
        except UnicodeDecodeError as error:
            rows = f"rows {row:,} to {row + num_rows - 1:,}"
            raise DataError(f"{self.file.url}, {rows}: a text is not UTF-8 ({error}).") from error
        except (OSError, ValueError, NotImplementedError) as error:
            raise _unreadable(self.file, error) from error


def parquet_chunks(files: Iterable[SourceFile], text_column: str, min_bytes: int) -> Iterator[CorpusChunk]:
    """The row groups of all files, in order, those of a file grouped until they have `min_bytes`.

    Raises `DataError` if the column is missing or not text.
    """
    for file in files:
        try:
            with open_ranges(file) as opened:
                parquet = _parquet_file(opened)
                schema, metadata = parquet.schema_arrow, parquet.metadata
                _check_column(file.url, schema, text_column)
                group_sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        except (OSError, ValueError, NotImplementedError) as error:
            raise _unreadable(file, error) from error
        check_unchanged(file)
        yield from _grouped(file, group_sizes, text_column, min_bytes)


def _grouped(
    file: SourceFile, group_sizes: list[int], text_column: str, min_bytes: int
) -> Iterator[CorpusChunk]:
    """Chunks of at least `min_bytes`: each reads the file's footer again."""
    first_row, first_index, num_bytes = 0, 0, 0
    for index, num_rows in enumerate(group_sizes):
        num_bytes += file.size * num_rows // max(sum(group_sizes), 1)
        if num_bytes >= min_bytes or index == len(group_sizes) - 1:
            groups = tuple(range(first_index, index + 1))
            yield RowGroupChunk(file, groups, first_row, text_column, num_bytes)
            first_row += sum(group_sizes[first_index : index + 1])
            first_index, num_bytes = index + 1, 0


def _parquet_file(opened: Any) -> Any:
    import pyarrow.parquet  # 0.3 s, which other corpora save

    # Checksums of pages are verified where a file has them.
    return pyarrow.parquet.ParquetFile(opened, page_checksum_verification=True)


def _unreadable(file: SourceFile, error: Exception) -> Exception:
    """The error for a file that pyarrow cannot read. It raises `OSError` without a number for bad bytes."""
    if isinstance(error, OSError) and error.errno is not None:
        return read_error(file.url, error)
    check_unchanged(file)
    check_not_lfs_pointer(file.url)
    return DataError(f"{file.url} is damaged, or no Parquet file that can be read: {error}.")


def _check_column(url: str, schema: Any, text_column: str) -> None:
    import pyarrow

    types = pyarrow.types
    if text_column not in schema.names:
        missing = missing_column(text_column, schema.names)
        raise DataError(f"{url} {missing} Set text_column or --text-column.")
    if schema.names.count(text_column) > 1:
        raise DataError(f"{url} has the column {text_column!r} twice: rename one.")
    column_type = schema.field(text_column).type
    kind = column_type.value_type if types.is_dictionary(column_type) else column_type
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        nested = " Nested columns are not read: write the text to a column of its own."
        raise DataError(
            f"{url}: column {text_column!r} is {column_type}, not text."
            + (nested if types.is_nested(kind) else "")
        )
