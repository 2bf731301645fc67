"""File operations on local paths and URLs: read, write atomically, list, remove, copy."""

import os
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import BinaryIO, Protocol

from distft.errors import StorageError
from distft.storage.local import TEMPORARY_MARK, LocalStorage
from distft.storage.paths import AnyPath, join, local_path
from distft.storage.remote import RemoteStorage

_COPY_BYTES = 4 << 20


class Writer(Protocol):
    """A file open for writing; it appears under its name only when committed."""

    def write(self, data: bytes | bytearray | memoryview, /) -> int:
        """Write all of `data`."""


class Storage(Protocol):
    """One file system. The functions below select one by path, and describe its methods."""

    def open_read(self, path: str) -> BinaryIO: ...
    def open_write(self, path: str, *, durable: bool) -> AbstractContextManager[Writer]: ...
    def read_into(self, path: str, start: int, out: memoryview) -> int: ...
    def read_view(self, path: str) -> memoryview: ...
    def list_names(self, path: str) -> list[str]: ...
    def exists(self, path: str) -> bool: ...
    def is_directory(self, path: str) -> bool: ...
    def size(self, path: str) -> int: ...
    def remove(self, path: str) -> None: ...
    def remove_tree(self, path: str) -> None: ...
    def make_directory(self, path: str) -> None: ...


def _storage_of(path: AnyPath) -> tuple[Storage, str]:
    local = local_path(path)
    if local is not None:
        return LocalStorage(), str(local)
    url = os.fspath(path)
    return RemoteStorage.of(url), url


def open_read(path: AnyPath) -> BinaryIO:
    """Open a file for reading bytes. Raises `FileNotFoundError`."""
    storage, name = _storage_of(path)
    return storage.open_read(name)


def open_write(path: AnyPath, *, durable: bool = True) -> AbstractContextManager[Writer]:
    """`with open_write(path) as file:` replaces the whole file when the block ends without an exception.

    Until then, and after an exception, readers see the old content. Missing directories are created. With
    `durable`, a local file is fsynced before it is renamed. Raises `StorageError` when the disk is full.
    """
    storage, name = _storage_of(path)
    return storage.open_write(name, durable=durable)


def commit_bytes(path: AnyPath, data: bytes, *, durable: bool = True) -> None:
    """Replace a file's content by `data`, atomically: a crash leaves the old content or the new one."""
    with open_write(path, durable=durable) as file:
        file.write(data)


def read_bytes(path: AnyPath) -> bytes:
    """A file's whole content. Raises `FileNotFoundError`."""
    with open_read(path) as file:
        return file.read()


def read_into(path: AnyPath, start: int, out: memoryview) -> None:
    """Fill `out` with a file's bytes from `start` on.

    Raises `StorageError` if the file is too short, and `FileNotFoundError`.
    """
    storage, name = _storage_of(path)
    if storage.read_into(name, start, out) != len(out):
        raise StorageError(
            f"{path} is cut short: bytes {start:,} to {start + len(out):,} are needed, it has {size(path):,}."
        )


def read_range(path: AnyPath, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a file. Raises the same errors as `read_into`."""
    out = bytearray(max(stop - start, 0))
    read_into(path, start, memoryview(out))
    return bytes(out)


def read_view(path: AnyPath) -> memoryview:
    """A file's bytes: memory-mapped for a local path, downloaded for a URL."""
    storage, name = _storage_of(path)
    return storage.read_view(name)


def list_names(path: AnyPath) -> list[str]:
    """The sorted names in a directory, without temporary files; empty if the directory does not exist."""
    storage, name = _storage_of(path)
    return storage.list_names(name)


def exists(path: AnyPath) -> bool:
    """Whether `path` is a file or a directory."""
    storage, name = _storage_of(path)
    return storage.exists(name)


def is_directory(path: AnyPath) -> bool:
    """Whether `path` is a directory; on object stores, whether any object is below `path`."""
    storage, name = _storage_of(path)
    return storage.is_directory(name)


def size(path: AnyPath) -> int:
    """A file's size in bytes. Raises `FileNotFoundError`."""
    storage, name = _storage_of(path)
    return storage.size(name)


def remove(path: AnyPath) -> None:
    """Remove a file, if it exists."""
    storage, name = _storage_of(path)
    storage.remove(name)


def remove_tree(path: AnyPath, *, first: Sequence[str] = ()) -> None:
    """Remove a directory and everything below it, if it exists.

    The names in `first` are removed before the rest: a checkpoint's manifest goes first, so that a checkpoint
    removed halfway does not count as committed.
    """
    storage, name = _storage_of(path)
    for child in first:
        storage.remove(join(name, child))
    storage.remove_tree(name)


def remove_temporary_files(path: AnyPath) -> None:
    """Remove temporary files that killed writers left in a local directory. Nobody may be writing there."""
    directory = local_path(path)
    if directory is not None and directory.is_dir():
        for temporary in directory.glob(f"*{TEMPORARY_MARK}*"):
            temporary.unlink(missing_ok=True)


def make_directory(path: AnyPath) -> None:
    """Create a directory and its parents, if missing; does nothing on object stores."""
    storage, name = _storage_of(path)
    storage.make_directory(name)


def copy(source: AnyPath, target: AnyPath, *, durable: bool = True) -> None:
    """Copy one file between local paths or URLs; `target` is replaced atomically."""
    with open_read(source) as file, open_write(target, durable=durable) as writer:
        shutil.copyfileobj(file, writer, _COPY_BYTES)
