"""Files of embeddings: each rank writes a part, and the parts become one file that appears when complete."""

import io
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from distft import storage
from distft.errors import ConfigError, UnreachableError

_COPY_BYTES = 4 << 20


class EmbeddingFile(ABC):
    """A part of the embeddings, open for writing."""

    has_origins: ClassVar[bool]  # rows tell which document they are of; else their number alone does

    @classmethod
    @abstractmethod
    def open_part(cls, path: str) -> Any:
        """A context in which a part is written."""

    @abstractmethod
    def write(self, vectors: NDArray[np.float32], origins: Sequence[str]) -> None:
        """Append rows [N, C], and where each of the N documents begins."""

    @staticmethod
    @abstractmethod
    def join(parts: Sequence[str], output: str, num_rows: int, num_elements: int) -> None:
        """Write `output` of the parts, one after another."""


class NpyFile(EmbeddingFile):
    """NumPy's format: float32 [N, C], without origins. A part is the bytes of its rows."""

    has_origins = False

    def __init__(self, writer: storage.Writer) -> None:
        self._writer = writer

    @classmethod
    @contextmanager
    def open_part(cls, path: str) -> Iterator["NpyFile"]:
        with storage.open_write(path, durable=False) as writer:
            yield cls(writer)

    def write(self, vectors: NDArray[np.float32], origins: Sequence[str]) -> None:  # noqa: ARG002
        self._writer.write(vectors.astype("<f4").tobytes())

    @staticmethod
    def join(parts: Sequence[str], output: str, num_rows: int, num_elements: int) -> None:
        header = io.BytesIO()
        shape = {"descr": "<f4", "fortran_order": False, "shape": (num_rows, num_elements)}
        np.lib.format.write_array_header_1_0(header, shape)
        with storage.open_write(output) as writer:
            writer.write(header.getvalue())
            for part in parts:
                with storage.open_read(part) as file:
                    while data := file.read(_COPY_BYTES):
                        writer.write(data)


class ParquetFile(EmbeddingFile):
    """Columns `embedding`, a list of C float32, and `origin`: file and position of the document."""

    has_origins = True

    def __init__(self, path: str, writer: storage.Writer) -> None:
        self._sink = ParquetSink(writer)
        self._writer: Any = None  # made with the first rows, which have the number of elements
        self.path = path

    @classmethod
    @contextmanager
    def open_part(cls, path: str) -> Iterator["ParquetFile"]:
        with storage.open_write(path, durable=False) as writer:
            file = cls(path, writer)
            try:
                yield file
            finally:
                file.close()

    def write(self, vectors: NDArray[np.float32], origins: Sequence[str]) -> None:
        elements = pa.array(vectors.reshape(-1))
        embeddings = pa.FixedSizeListArray.from_arrays(elements, vectors.shape[1])
        table = pa.table({"embedding": embeddings, "origin": pa.array(origins, pa.string())})
        self.write_table(table)

    def close(self) -> None:
        """Write what ends the file; after a failure too, or pyarrow tries it when it frees the writer."""
        if self._writer is not None:
            self._writer.close()

    def write_table(self, table: Any) -> None:
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._sink, table.schema)
        self._writer.write_table(table)

    @staticmethod
    def join(parts: Sequence[str], output: str, num_rows: int, num_elements: int) -> None:  # noqa: ARG004
        with storage.open_write(output) as writer:
            file = ParquetFile(output, writer)
            try:
                for part in parts:
                    with storage.open_read(part) as opened:
                        reader = pq.ParquetFile(opened)
                        for group in range(reader.num_row_groups):
                            file.write_table(reader.read_row_group(group))
            finally:
                file.close()


class ParquetSink(io.RawIOBase):
    """What pyarrow writes to, in front of a `Writer`."""

    def __init__(self, writer: storage.Writer) -> None:
        self._to = writer
        self._num_bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        count = self._to.write(memoryview(data))
        self._num_bytes += count
        return count

    def tell(self) -> int:
        return self._num_bytes


FILE_TYPES: dict[str, type[EmbeddingFile]] = {".npy": NpyFile, ".parquet": ParquetFile}


def file_type(output: str) -> type[EmbeddingFile]:
    """What is written to `output`. Raises `ConfigError` for another kind, and for a file that exists."""
    suffix = PurePosixPath(output).suffix.lower()
    if suffix not in FILE_TYPES:
        raise ConfigError(
            f"--output {output} must end in {' or '.join(FILE_TYPES)}, which says what is written."
        )
    if storage.exists(output):
        raise ConfigError(
            f"--output {output} exists and is not overwritten: remove it, or choose another output."
        )
    return FILE_TYPES[suffix]


def check_writable(output: str, part: str) -> None:
    """Find out before hours of work whether `output` can be written.

    Raises `ConfigError` for a local directory in which no file can be made, and `UnreachableError` for a URL
    to which `part` cannot be written; there `part` is left, empty.
    """
    local = storage.local_path(output)
    if local is None:
        try:
            storage.commit_bytes(part, b"")
        except UnreachableError as error:
            raise UnreachableError(f"--output {output} cannot be written: {error}") from error
        return
    directory = local.absolute().parent
    if not directory.exists():
        raise ConfigError(f"--output {output}: there is no directory {directory}. Create it.")
    if not directory.is_dir():
        raise ConfigError(
            f"--output {output}: {directory} is a file, not a directory. Choose another output."
        )
    try:
        with tempfile.TemporaryFile(dir=directory):  # also where /proc claims to be writable
            pass
    except OSError as error:
        raise ConfigError(
            f"--output {output}: no file can be made in {directory}: {error.strerror}. Choose another output."
        ) from None
