"""Parquet files as corpus parts: a row group is the smallest unit that can be read by itself."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from distft import storage
from distft.data.corpus_files import SourceFile
from distft.data.corpus_parts import CorpusPart, Document
from distft.errors import DataError

_ROWS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class RowGroupPart:
    """One row group of a Parquet file."""

    url: str
    row_group: int
    first_row: int
    text_column: str
    source_bytes: int

    def documents(self) -> Iterator[Document]:
        """Rows with text; null and empty ones are passed over."""
        row = self.first_row
        try:
            with storage.open_read(self.url) as opened:
                batches = _open(opened).iter_batches(
                    _ROWS_AT_ONCE, row_groups=[self.row_group], columns=[self.text_column]
                )
                for batch in batches:
                    for text in batch.column(0).to_pylist():
                        if text:
                            yield Document(text, len(text.encode()), f"{self.url}:{row}")
                        row += 1
        except (OSError, ValueError) as error:
            raise DataError(f"{self.url}, row group {self.row_group}: {error}.") from error


def parquet_parts(files: list[SourceFile], text_column: str) -> Iterator[CorpusPart]:
    """The row groups of all files in order. Raises `DataError` for a column that is missing or not text."""
    for file in files:
        try:
            with storage.open_read(file.url) as opened:
                parquet = _open(opened)
                schema, groups = parquet.schema_arrow, parquet.metadata
                _check_column(file.url, schema, text_column)
                sizes = [groups.row_group(i).num_rows for i in range(groups.num_row_groups)]
        except (OSError, ValueError) as error:
            raise DataError(f"{file.url} is no Parquet file, or damaged: {error}.") from error
        first_row = 0
        for index, num_rows in enumerate(sizes):
            share = file.size * num_rows // max(sum(sizes), 1)
            yield RowGroupPart(file.url, index, first_row, text_column, share)
            first_row += num_rows


def _open(opened: Any) -> Any:
    import pyarrow.parquet  # 0.3 s: other corpora do without

    return pyarrow.parquet.ParquetFile(opened)


def _check_column(url: str, schema: Any, text_column: str) -> None:
    import pyarrow

    if text_column not in schema.names:
        raise DataError(
            f"{url} has no column {text_column!r}; it has {', '.join(schema.names)}. "
            "Set text_column or --text-column."
        )
    kind = schema.field(text_column).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise DataError(f"{url}: column {text_column!r} is {kind}, not text.")
