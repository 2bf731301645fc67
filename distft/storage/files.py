"""File operations on local paths and URLs: read, write atomically, list, remove, copy."""

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import BinaryIO, Protocol

from distft.errors import StorageError, UnreachableError
from distft.storage.local import TEMPORARY_MARK, LocalStorage, sync_directory
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
    def commit_unless_changed(
        self, path: str, data: bytes, expected: str | None, confirm: Callable[[], None]
    ) -> bool: ...
    def version(self, path: str) -> str | None: ...
    def read_into(self, path: str, start: int, out: memoryview) -> int: ...
    def read_view(self, path: str) -> memoryview: ...
    def list_names(self, path: str) -> list[str]: ...
    def list_sizes(self, path: str) -> dict[str, int]: ...
    def exists(self, path: str) -> bool: ...
    def is_directory(self, path: str) -> bool: ...
    def size(self, path: str) -> int: ...
    def remove(self, path: str) -> None: ...
    def remove_files(self, path: str, names: list[str]) -> None: ...
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


def version(path: AnyPath) -> str | None:
    """A text that changes whenever the file at `path` is replaced; None if there is no file."""
    storage, name = _storage_of(path)
    return storage.version(name)


def commit_unless_changed(
    path: AnyPath, data: bytes, *, expected: str | None, confirm: Callable[[], None]
) -> bool:
    """Replace a file's content if its `version` is still `expected`; returns whether it was.

    `confirm` is called as late as possible before, and prevents the write by raising. Two writers that begin
    with the same version never both succeed on S3, which compares by itself. On a local disk they do not if
    the later one first makes the `confirm` of the earlier one raise, then removes the
    `list_temporary_files`, and takes its `version` last. On other stores, the moment between look and write
    is unguarded.
    """
    storage, name = _storage_of(path)
    return storage.commit_unless_changed(name, data, expected, confirm)


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
        stop, num_bytes = start + len(out), size(path)
        if num_bytes >= stop:
            raise UnreachableError(f"{path}: reading bytes {start:,} to {stop:,} failed: start again.")
        raise StorageError(
            f"{path} is cut short: bytes {start:,} to {stop:,} are needed, it has {num_bytes:,}."
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


def list_sizes(path: AnyPath) -> dict[str, int]:
    """Size in bytes of each file directly in a directory; on object stores one request per 1000 files.

    Temporary files are left out, as by `list_names`.
    """
    storage, name = _storage_of(path)
    return storage.list_sizes(name)


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


def remove_files(path: AnyPath, names: Sequence[str]) -> None:
    """Remove the files `names` from a directory, those that exist, and then the directory if it is empty."""
    storage, name = _storage_of(path)
    storage.remove_files(name, list(names))


def remove_tree(path: AnyPath) -> None:
    """Remove a directory and everything below it, if it exists; of a symbolic link only the link itself."""
    storage, name = _storage_of(path)
    storage.remove_tree(name)


def list_temporary_files(path: AnyPath) -> list[str]:
    """The names of files in a local directory that are being written, or that killed writers left."""
    directory = local_path(path)
    return [] if directory is None else [found.name for found in directory.glob(f"*{TEMPORARY_MARK}*")]


def remove_temporary_files(path: AnyPath) -> None:
    """Remove temporary files that killed writers left in a local directory. Nobody may be writing there."""
    for name in list_temporary_files(path):
        remove(join(path, name))


def is_link(path: AnyPath) -> bool:
    """Whether `path` is a symbolic link on this machine."""
    local = local_path(path)
    return local is not None and local.is_symlink()


def sync_names(directory: AnyPath) -> None:
    """Have the disk store the names in a local directory: those of files written without this module.

    Files that this module writes durably need no call.
    """
    local = local_path(directory)
    if local is not None:
        sync_directory(local)


def make_directory(path: AnyPath) -> None:
    """Create a directory and its parents, if missing; does nothing on object stores."""
    storage, name = _storage_of(path)
    storage.make_directory(name)


def copy(source: AnyPath, target: AnyPath, *, durable: bool = True) -> None:
    """Copy one file between local paths or URLs; `target` is replaced atomically."""
    with open_read(source) as file, open_write(target, durable=durable) as writer:
        shutil.copyfileobj(file, writer, _COPY_BYTES)
