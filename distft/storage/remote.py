"""Files elsewhere, through fsspec: object stores above all."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from distft.errors import ConfigError, StorageError
from distft.storage.disk import full_disk_explained
from distft.storage.local import DRAFT_MARK
from distft.storage.paths import parent_and_name

# Where one put makes a whole object visible at once. Elsewhere a file is put under another name, then moved.
_ATOMIC_PUT = frozenset(
    ["memory", "s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci", "hf"]
)
_IN_MEMORY_BYTES = 64 << 20  # a larger file waits on the local disk until it is put


class RemoteWriter:
    """Keeps what is written on this machine until it is whole."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.num_bytes = 0
        self._file = tempfile.NamedTemporaryFile(prefix="distft-")  # noqa: SIM115 - closed by open_write

    @property
    def name(self) -> str:
        return self._file.name

    def write(self, data: bytes | bytearray | memoryview, /) -> int:
        """Write all of `data`."""
        with full_disk_explained(self._file.name, memoryview(data).nbytes):
            count = self._file.write(data)
        self.num_bytes += count
        return count

    def flush(self) -> None:
        with full_disk_explained(self._file.name):
            self._file.flush()

    def close(self) -> None:
        self._file.close()


class RemoteStorage:
    """The `Storage` of one fsspec file system; paths are whole URLs."""

    def __init__(self, filesystem: Any) -> None:
        self._filesystem = filesystem

    @classmethod
    def of(cls, url: str) -> "RemoteStorage":
        """The file system that `url` names. Raises `ConfigError` where it is unknown or not installed."""
        import fsspec

        try:
            # Other ranks write what this one lists, so a listing is never kept.
            filesystem, _ = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except ImportError as error:
            raise ConfigError(
                f"{url}: {error}. Install the package that reaches this storage (s3fs, gcsfs, adlfs ...)."
            ) from None
        except ValueError as error:
            raise ConfigError(f"{url}: {error}. Give a local path, or a URL that fsspec knows.") from None
        return cls(filesystem)

    def open_read(self, path: str) -> BinaryIO:
        return cast("BinaryIO", self._filesystem.open(path, "rb"))

    @contextmanager
    def open_write(self, path: str, *, durable: bool) -> Iterator[RemoteWriter]:  # noqa: ARG002
        writer = RemoteWriter(path)
        try:
            yield writer
            writer.flush()
            self._put(writer)
        finally:
            writer.close()

    def _put(self, writer: RemoteWriter) -> None:
        parent, name = parent_and_name(writer.path)
        protocols = self._filesystem.protocol
        protocols = {protocols} if isinstance(protocols, str) else set(protocols)
        if not protocols & _ATOMIC_PUT:
            draft = f"{parent}/{name}{DRAFT_MARK}{Path(writer.name).name}"
            self._filesystem.makedirs(parent, exist_ok=True)
            self._filesystem.put_file(writer.name, draft)
            self._filesystem.mv(draft, writer.path)
        elif writer.num_bytes <= _IN_MEMORY_BYTES:
            self._filesystem.pipe_file(writer.path, Path(writer.name).read_bytes())
        else:
            self._filesystem.put_file(writer.name, writer.path)

    def read_into(self, path: str, start: int, out: memoryview) -> int:
        if not len(out):
            return 0
        data = self._filesystem.cat_file(path, start=start, end=start + len(out))
        out[: len(data)] = data
        return len(data)

    def read_view(self, path: str) -> memoryview:
        return memoryview(self._filesystem.cat_file(path))

    def list_names(self, path: str) -> list[str]:
        self._filesystem.invalidate_cache(path)
        own = self._filesystem._strip_protocol(path).rstrip("/")
        try:
            found = self._filesystem.ls(path, detail=False)
        except FileNotFoundError:
            return []
        # Some stores list the "directory" itself as an empty object.
        names = {
            str(entry).rstrip("/").rpartition("/")[2] for entry in found if str(entry).rstrip("/") != own
        }
        return sorted(name for name in names if DRAFT_MARK not in name)

    def exists(self, path: str) -> bool:
        self._filesystem.invalidate_cache(path)
        return bool(self._filesystem.exists(path))

    def is_directory(self, path: str) -> bool:
        self._filesystem.invalidate_cache(path)
        return bool(self._filesystem.isdir(path))

    def size(self, path: str) -> int:
        size = self._filesystem.size(path)
        if size is None:
            raise StorageError(f"{path}: this storage does not tell sizes; copy the file to a local path.")
        return int(size)

    def remove(self, path: str) -> None:
        if self.exists(path):
            self._filesystem.rm_file(path)

    def remove_tree(self, path: str) -> None:
        if self.exists(path):
            self._filesystem.rm(path, recursive=True)

    def make_directory(self, path: str) -> None:
        self._filesystem.makedirs(path, exist_ok=True)
