"""Reads columns of a Parquet file, row by row; any type of column."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from distft import storage
from distft.data.rows import missing_column
from distft.errors import DataError

_ROWS_AT_A_TIME = 64  # in memory


def parquet_rows(path: str, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Yield the `columns` of each row, and those of `optional` that the file has.

    Raises `DataError` for a damaged file or a missing column, and `OSError`.
    """
    with _opened(path) as file:
        names = file.schema_arrow.names
        for column in columns:
            if column not in names:
                raise DataError(f"{path} {missing_column(column, names)}")
        present = [*columns, *(name for name in optional if name in names)]
        for batch in file.iter_batches(_ROWS_AT_A_TIME, columns=present):
            yield from batch.to_pylist()


def parquet_columns(path: str) -> Sequence[str]:
    """Names of the file's columns. Raises `DataError` and `OSError` as the rows do."""
    with _opened(path) as file:
        names: list[str] = file.schema_arrow.names
        return names


def parquet_metadata(path: str) -> Mapping[bytes, bytes]:
    """What its writer has noted about the file's columns. Raises `DataError` and `OSError` as the rows do."""
    with _opened(path) as file:
        return file.schema_arrow.metadata or {}


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    """A `pyarrow.parquet.ParquetFile`, whose errors are those of `parquet_rows`."""
    import pyarrow.parquet  # 0.3 s, which other data save

    try:
        with storage.open_read(path) as opened:
            yield pyarrow.parquet.ParquetFile(opened, page_checksum_verification=True)
    except (ValueError, NotImplementedError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged, or no Parquet file that can be read: {error}.") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise DataError(f"{path} is damaged, or no Parquet file that can be read: {error}.") from error
