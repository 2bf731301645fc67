"""Local files through system calls, without fsspec; writes go to a temporary file that is then renamed."""

import errno
import io
import mmap
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypeVar, cast

from distft.errors import DataError
from distft.storage.errors import full_disk_as_storage_error, retried

T = TypeVar("T")
TEMPORARY_MARK = ".draft-"  # in names of temporary files; list_names omits them
_BUFFER_BYTES = 1 << 20


class LocalWriter:
    """Writes to a temporary file in the same directory; `publish` renames it to `path`.

    Raises `StorageError` about `path` when the disk is full.
    """

    def __init__(self, path: Path, *, durable: bool) -> None:
        self.path = path
        self.num_bytes = 0
        self._durable = durable
        self._temporary = path.with_name(f"{path.name}{TEMPORARY_MARK}{secrets.token_hex(4)}")
        self._file = self._open()

    def _open(self) -> BinaryIO:
        while True:
            make_directories(self.path.parent, durable=self._durable)
            try:
                with full_disk_as_storage_error(self.path):
                    return self._temporary.open("wb", buffering=_BUFFER_BYTES)
            except FileNotFoundError:
                if self.path.parent.is_dir():
                    raise
                # Another process has removed the directory, which was empty.

    def write(self, data: bytes | bytearray | memoryview, /) -> int:
        """Write all of `data`."""
        with full_disk_as_storage_error(self.path, memoryview(data).nbytes):
            count = self._file.write(data)
        self.num_bytes += count
        return count

    def complete(self) -> None:
        """End writing; a durable file is on the disk from here on, under its temporary name."""
        with full_disk_as_storage_error(self.path, self.num_bytes), self._file:
            self._file.flush()
            if self._durable:
                os.fsync(self._file.fileno())

    def publish(self) -> None:
        """Rename the temporary file to `path`, atomically: readers see the old content or the new one.

        Raises `FileNotFoundError` if another process has removed the temporary file.
        """
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
                self.complete()
                self.publish()
            except BaseException:
                self.discard()
                raise
        else:
            self.discard()


class LocalReader(io.RawIOBase):
    """An open file; after an error that may pass, it is opened anew and read from the same place."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: io.FileIO = retried(path, "opening", lambda: _open_for_reading(path))
        self.name = str(path)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def fileno(self) -> int:
        return self._file.fileno()

    def readinto(self, buffer: Any, /) -> int | None:
        return self._again_from_here(lambda: self._file.readinto(buffer))

    def readall(self) -> bytes:
        return self._again_from_here(lambda: self._file.readall())  # noqa: PLW0108 - `_file` may change

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

    def _again_from_here(self, read: Callable[[], T]) -> T:
        position = self._file.tell() if self._file.seekable() else None
        is_first = True

        def attempt() -> T:
            nonlocal is_first
            if not is_first and position is not None:
                fresh = _open_for_reading(self._path)
                self._file.close()
                self._file = fresh
                fresh.seek(position)
            is_first = False
            return read()

        return retried(self._path, "reading", attempt)


def _open_for_reading(path: Path) -> io.FileIO:
    return io.FileIO(_open_regular(path), "rb")


def _open_regular(path: str | Path) -> int:
    """A descriptor of a file. Raises `DataError` for a pipe, which would wait, or a device without an end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise DataError(f"{path} is a pipe, a socket or a device, not a file: write its content to a file first.")


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
    """`Storage` for local paths. A read is tried again after an error that may pass."""

    def open_read(self, path: str) -> BinaryIO:
        return cast("BinaryIO", io.BufferedReader(LocalReader(Path(path)), _BUFFER_BYTES))

    @contextmanager
    def open_write(self, path: str, *, durable: bool) -> Iterator[LocalWriter]:
        with LocalWriter(Path(path), durable=durable) as writer:
            yield writer

    def commit_unless_changed(
        self, path: str, data: bytes, expected: str | None, confirm: Callable[[], None]
    ) -> bool:
        writer = LocalWriter(Path(path), durable=True)
        try:
            writer.write(data)
            writer.complete()
            # `confirm` comes after the temporary file: whoever takes over removes that file, and from then on
            # this writer cannot publish any more, however long it was suspended here.
            confirm()
            if self.version(path) != expected:
                writer.discard()
                return False
            writer.publish()
        except FileNotFoundError:  # the temporary file was removed
            writer.discard()
            return False
        except BaseException:
            writer.discard()
            raise
        return True

    def version(self, path: str) -> str | None:
        try:
            found = retried(path, "looking it up", Path(path).stat)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return f"{found.st_ino}-{found.st_size}-{found.st_mtime_ns}"

    def read_into(self, path: str, start: int, out: memoryview) -> int:
        def attempt() -> int:
            descriptor = _open_regular(path)
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

        return retried(path, "reading", attempt)

    def read_view(self, path: str) -> memoryview:
        with retried(path, "opening", lambda: _open_for_reading(Path(path))) as file:
            if os.fstat(file.fileno()).st_size == 0:  # mmap refuses an empty file
                return memoryview(b"")
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def list_names(self, path: str) -> list[str]:
        try:
            names = retried(path, "listing", lambda: os.listdir(path))  # noqa: PTH208
        except FileNotFoundError:
            return []
        return sorted(name for name in names if TEMPORARY_MARK not in name)

    def list_sizes(self, path: str) -> dict[str, int]:
        def attempt() -> dict[str, int]:
            with os.scandir(path) as entries:
                return {
                    entry.name: entry.stat().st_size
                    for entry in entries
                    if TEMPORARY_MARK not in entry.name and entry.is_file()
                }

        try:
            return retried(path, "listing", attempt)
        except FileNotFoundError:
            if self.exists(path):  # a file in it was removed in between
                raise
            return {}

    def exists(self, path: str) -> bool:
        return retried(path, "looking it up", Path(path).exists)

    def is_directory(self, path: str) -> bool:
        return retried(path, "looking it up", Path(path).is_dir)

    def size(self, path: str) -> int:
        return retried(path, "looking it up", lambda: Path(path).stat().st_size)

    def remove(self, path: str) -> None:
        Path(path).unlink(missing_ok=True)

    def remove_files(self, path: str, names: list[str]) -> None:
        for name in names:
            Path(path, name).unlink(missing_ok=True)
        with suppress(OSError):  # others' files are in it
            Path(path).rmdir()

    def remove_tree(self, path: str) -> None:
        if Path(path).is_symlink():  # what it leads to belongs to others
            Path(path).unlink(missing_ok=True)
            return
        try:
            shutil.rmtree(path)
        except FileNotFoundError:
            # Another process may be removing the same tree.
            if Path(path).exists():
                shutil.rmtree(path, ignore_errors=True)

    def make_directory(self, path: str) -> None:
        make_directories(Path(path), durable=True)
