"""Local files through system calls, without fsspec; writes go to a temporary file that is then renamed."""

import errno
import mmap
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from distft.storage.errors import full_disk_as_storage_error

TEMPORARY_MARK = ".draft-"  # in names of temporary files; list_names omits them
_BUFFER_BYTES = 1 << 20


class LocalWriter:
    """Writes to a temporary file in the same directory; `commit` renames it to `path`.

    Raises `StorageError` about `path` when the disk is full.
    """

    def __init__(self, path: Path, *, durable: bool) -> None:
        self.path = path
        self.num_bytes = 0
        self._durable = durable
        self._temporary = path.with_name(f"{path.name}{TEMPORARY_MARK}{secrets.token_hex(4)}")
        make_directories(path.parent, durable=durable)
        with full_disk_as_storage_error(path):
            self._file = self._temporary.open("wb", buffering=_BUFFER_BYTES)

    def write(self, data: bytes | bytearray | memoryview, /) -> int:
        """Write all of `data`."""
        with full_disk_as_storage_error(self.path, memoryview(data).nbytes):
            count = self._file.write(data)
        self.num_bytes += count
        return count

    def commit(self) -> None:
        """Rename the temporary file to `path`, atomically: readers see the old content or the new one."""
        with full_disk_as_storage_error(self.path, self.num_bytes), self._file:
            self._file.flush()
            if self._durable:
                os.fsync(self._file.fileno())
        with full_disk_as_storage_error(self.path):
            self._temporary.replace(self.path)
            if self._durable:
                sync_directory(self.path.parent)

    def discard(self) -> None:
        """Remove the temporary file; `path` keeps its old content."""
        with suppress(OSError):  # on a full disk, flushing the buffer fails too
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> "LocalWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            try:
                self.commit()
            except BaseException:
                self.discard()
                raise
        else:
            self.discard()


def make_directories(directory: Path, *, durable: bool) -> None:
    """Create `directory` and its missing parents."""
    missing = []
    while not directory.is_dir() and directory != directory.parent:
        missing.append(directory)
        directory = directory.parent
    for path in reversed(missing):
        with full_disk_as_storage_error(path):
            path.mkdir(exist_ok=True)
            if durable:
                sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Fsync `directory`: names created, renamed or removed in it survive a power failure."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:  # unsupported on some network file systems
            raise
    finally:
        os.close(descriptor)


class LocalStorage:
    """`Storage` for local paths."""

    def open_read(self, path: str) -> BinaryIO:
        return Path(path).open("rb")

    @contextmanager
    def open_write(self, path: str, *, durable: bool) -> Iterator[LocalWriter]:
        with LocalWriter(Path(path), durable=durable) as writer:
            yield writer

    def read_into(self, path: str, start: int, out: memoryview) -> int:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            num_read = 0
            while num_read < len(out):
                count = os.preadv(descriptor, [out[num_read:]], start + num_read)
                if not count:
                    break
                num_read += count
            return num_read
        finally:
            os.close(descriptor)

    def read_view(self, path: str) -> memoryview:
        with Path(path).open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:  # mmap refuses an empty file
                return memoryview(b"")
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def list_names(self, path: str) -> list[str]:
        try:
            return sorted(name for name in os.listdir(path) if TEMPORARY_MARK not in name)  # noqa: PTH208
        except FileNotFoundError:
            return []

    def exists(self, path: str) -> bool:
        return Path(path).exists()

    def is_directory(self, path: str) -> bool:
        return Path(path).is_dir()

    def size(self, path: str) -> int:
        return Path(path).stat().st_size

    def remove(self, path: str) -> None:
        Path(path).unlink(missing_ok=True)

    def remove_tree(self, path: str) -> None:
        try:
            shutil.rmtree(path)
        except FileNotFoundError:
            # Another process may be removing the same tree.
            if Path(path).exists():
                shutil.rmtree(path, ignore_errors=True)

    def make_directory(self, path: str) -> None:
        make_directories(Path(path), durable=True)
