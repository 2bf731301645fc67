"""Parquet files as corpus chunks, one per row group: the smallest unit that can be read alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from distft import storage
from distft.data.corpus_chunks import CorpusChunk, Document
from distft.data.corpus_files import SourceFile
from distft.errors import DataError

_ROWS_PER_BATCH = 1024


@dataclass(frozen=True, slots=True)
class RowGroupChunk:
    """One row group of a Parquet file."""

    url: str
    row_group: int
    first_row: int
    text_column: str
    source_bytes: int

    def documents(self) -> Iterator[Document]:
        """Rows with text; null and empty ones are skipped."""
        row = self.first_row
        try:
            with storage.open_read(self.url) as opened:
                batches = _parquet_file(opened).iter_batches(
                    _ROWS_PER_BATCH, row_groups=[self.row_group], columns=[self.text_column]
                )
                for batch in batches:
                    for text in batch.column(0).to_pylist():
                        if text:
                            yield Document(text, len(text.encode()), f"{self.url}:{row}")
                        row += 1
        except (OSError, ValueError) as error:
            raise DataError(f"{self.url}, row group {self.row_group}: {error}.") from error


def parquet_chunks(files: list[SourceFile], text_column: str) -> Iterator[CorpusChunk]:
    """The row groups of all files, in order. Raises `DataError` if the column is missing or not text."""
    for file in files:
        try:
            with storage.open_read(file.url) as opened:
                parquet = _parquet_file(opened)
                schema, metadata = parquet.schema_arrow, parquet.metadata
                _check_column(file.url, schema, text_column)
                group_sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        except (OSError, ValueError) as error:
            raise DataError(f"{file.url} is not a Parquet file, or is damaged: {error}.") from error
        first_row = 0
        for index, num_rows in enumerate(group_sizes):
            source_bytes = file.size * num_rows // max(sum(group_sizes), 1)
            yield RowGroupChunk(file.url, index, first_row, text_column, source_bytes)
            first_row += num_rows


def _parquet_file(opened: Any) -> Any:
    import pyarrow.parquet  # 0.3 s, which other corpora save

    return pyarrow.parquet.ParquetFile(opened)


def _check_column(url: str, schema: Any, text_column: str) -> None:
    import pyarrow

    if text_column not in schema.names:
        raise DataError(
            f"{url} has no column {text_column!r}; it has {', '.join(schema.names)}. "
            "Set text_column or --text-column."
        )
    column_type = schema.field(text_column).type
    if not (pyarrow.types.is_string(column_type) or pyarrow.types.is_large_string(column_type)):
        raise DataError(f"{url}: column {text_column!r} is {column_type}, not text.")
