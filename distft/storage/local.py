"""Files on this machine, through plain system calls: no fsspec in between."""

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

from distft.storage.disk import full_disk_explained

DRAFT_MARK = ".draft-"  # in the names of files that are not committed; list_names leaves them out
_BUFFER_BYTES = 1 << 20


class LocalWriter:
    """A draft beside the file it is to become. Every fault of the disk names the file."""

    def __init__(self, path: Path, *, durable: bool) -> None:
        self.path = path
        self.num_bytes = 0
        self._durable = durable
        self._draft = path.with_name(f"{path.name}{DRAFT_MARK}{secrets.token_hex(4)}")
        make_directories(path.parent, durable=durable)
        with full_disk_explained(path):
            self._file = self._draft.open("wb", buffering=_BUFFER_BYTES)

    def write(self, data: bytes | bytearray | memoryview, /) -> int:
        """Write all of `data`."""
        with full_disk_explained(self.path, memoryview(data).nbytes):
            count = self._file.write(data)
        self.num_bytes += count
        return count

    def commit(self) -> None:
        """Make the draft the file: whoever opens it sees the old content or the new one."""
        with full_disk_explained(self.path, self.num_bytes), self._file:
            self._file.flush()
            if self._durable:
                os.fsync(self._file.fileno())
        with full_disk_explained(self.path):
            self._draft.replace(self.path)
            if self._durable:
                sync_directory(self.path.parent)

    def discard(self) -> None:
        """Leave the file as it was."""
        with suppress(OSError):  # a full disk refuses the buffered rest, too
            self._file.close()
        self._draft.unlink(missing_ok=True)

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
    """Make `directory` and those above it, where they are missing."""
    missing = []
    while not directory.is_dir() and directory != directory.parent:
        missing.append(directory)
        directory = directory.parent
    for one in reversed(missing):
        with full_disk_explained(one):
            one.mkdir(exist_ok=True)
            if durable:
                sync_directory(one.parent)


def sync_directory(directory: Path) -> None:
    """Let names that were made, moved or removed in `directory` outlast a loss of power."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:  # some network file systems cannot
            raise
    finally:
        os.close(descriptor)


class LocalStorage:
    """The `Storage` of local paths."""

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
            return sorted(name for name in os.listdir(path) if DRAFT_MARK not in name)  # noqa: PTH208
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
            # Another process may be removing the same tree: what counts is that it is gone.
            if Path(path).exists():
                shutil.rmtree(path, ignore_errors=True)

    def make_directory(self, path: str) -> None:
        make_directories(Path(path), durable=True)
