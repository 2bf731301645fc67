"""What can be done with files, wherever they lie: by path here, by URL elsewhere."""

import os
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import BinaryIO, Protocol

from distft.errors import StorageError
from distft.storage.local import DRAFT_MARK, LocalStorage
from distft.storage.paths import AnyPath, join, local_path
from distft.storage.remote import RemoteStorage

_COPY_BYTES = 4 << 20


class Writer(Protocol):
    """A file in the making."""

    def write(self, data: bytes | bytearray | memoryview, /) -> int:
        """Write all of `data`."""


class Storage(Protocol):
    """One kind of place for files. The functions below pick it by path and say what each method does."""

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


def _find(path: AnyPath) -> tuple[Storage, str]:
    here = local_path(path)
    if here is not None:
        return LocalStorage(), str(here)
    url = os.fspath(path)
    return RemoteStorage.of(url), url


def open_read(path: AnyPath) -> BinaryIO:
    """The file, open for reading bytes. Raises `FileNotFoundError`."""
    storage, name = _find(path)
    return storage.open_read(name)


def open_write(path: AnyPath, *, durable: bool = True) -> AbstractContextManager[Writer]:
    """`with open_write(path) as file:` replaces the file as a whole when the block ends without an exception.

    Until then, and after an exception, readers find what was there before. Directories are made. `durable`
    waits until the disk has it. Raises `StorageError` when the disk is full.
    """
    storage, name = _find(path)
    return storage.open_write(name, durable=durable)


def commit_bytes(path: AnyPath, data: bytes, *, durable: bool = True) -> None:
    """Replace the content of a file by `data`, at once: a crash leaves the old content or the new one."""
    with open_write(path, durable=durable) as file:
        file.write(data)


def read_bytes(path: AnyPath) -> bytes:
    """All of a file. Raises `FileNotFoundError`."""
    with open_read(path) as file:
        return file.read()


def read_into(path: AnyPath, start: int, out: memoryview) -> None:
    """Fill `out`, writable bytes, from byte `start` of a file on.

    Raises `StorageError` where the file is shorter, and `FileNotFoundError`.
    """
    storage, name = _find(path)
    if storage.read_into(name, start, out) != len(out):
        raise StorageError(
            f"{path} is cut short: bytes {start:,} to {start + len(out):,} are wanted, it has {size(path):,}."
        )


def read_range(path: AnyPath, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a file. Raises as `read_into` does."""
    out = bytearray(max(stop - start, 0))
    read_into(path, start, memoryview(out))
    return bytes(out)


def read_view(path: AnyPath) -> memoryview:
    """A file's bytes: mapped into memory where it is local, downloaded as a whole elsewhere."""
    storage, name = _find(path)
    return storage.read_view(name)


def list_names(path: AnyPath) -> list[str]:
    """The sorted names directly below a directory, without drafts; empty where there is no such directory."""
    storage, name = _find(path)
    return storage.list_names(name)


def exists(path: AnyPath) -> bool:
    """Whether there is a file or a directory."""
    storage, name = _find(path)
    return storage.exists(name)


def is_directory(path: AnyPath) -> bool:
    """Whether there is a directory; on object stores, whether anything lies below `path`."""
    storage, name = _find(path)
    return storage.is_directory(name)


def size(path: AnyPath) -> int:
    """A file's size in bytes. Raises `FileNotFoundError`."""
    storage, name = _find(path)
    return storage.size(name)


def remove(path: AnyPath) -> None:
    """Remove a file, if it is there."""
    storage, name = _find(path)
    storage.remove(name)


def remove_tree(path: AnyPath, *, first: Sequence[str] = ()) -> None:
    """Remove a directory and all below it, if it is there.

    The names in `first` go before the rest: with its manifest among them, a directory is never half removed
    and yet committed.
    """
    storage, name = _find(path)
    for child in first:
        storage.remove(join(name, child))
    storage.remove_tree(name)


def remove_drafts(path: AnyPath) -> None:
    """Remove what killed writers left in a local directory. Only where nobody writes there now."""
    here = local_path(path)
    if here is not None and here.is_dir():
        for draft in here.glob(f"*{DRAFT_MARK}*"):
            draft.unlink(missing_ok=True)


def make_directory(path: AnyPath) -> None:
    """Make a directory and those above it; nothing happens where it exists, or needs none."""
    storage, name = _find(path)
    storage.make_directory(name)


def copy(source: AnyPath, target: AnyPath, *, durable: bool = True) -> None:
    """Copy one file, between any two places; `target` is committed as a whole."""
    with open_read(source) as file, open_write(target, durable=durable) as writer:
        shutil.copyfileobj(file, writer, _COPY_BYTES)
