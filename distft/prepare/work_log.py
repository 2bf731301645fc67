"""The record of unfinished tokenization: an append-only file that also is the lock of its output directory.

The first line says who holds the lock, the second which work it is; then follow a line for every part of the
corpus that is written, and one for shards that became full. A crash leaves at most a last line without its
end, which does not count.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError

from distft import storage
from distft.config import Settings
from distft.data.shard_manifest import ShardFileName, require_regular_file
from distft.data.shard_writer import WriterProgress
from distft.errors import DataError, StorageError

LOG = "unfinished.work"
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL})
_MAX_COUNT = 1 << 62
_HOLDER_BYTES = 256  # of the first line, which each process that gets the lock overwrites


_SplitName = Annotated[str, Field(pattern="^(train|validation)$")]


class WorkHeader(Settings):
    """What the work is: enough to know its files, and those that it replaces when it is complete."""

    format: Literal["distft-unfinished-shards"] = "distft-unfinished-shards"
    version: Literal[2] = 2
    identity: dict[str, Any]  # everything that determines the bytes of the shards
    work: str = Field(pattern=r"^[0-9a-f]{16}$")  # in the names of its files
    claim: str = ""  # content of the claim of an output at a URL
    # The committed shards that it replaces when it is complete: by split, name and size of each file.
    replaces: dict[_SplitName, dict[ShardFileName, int]] = Field({})


class _Counts(Settings):
    model_config = ConfigDict(strict=True)

    num_tokens: int = Field(ge=0, lt=_MAX_COUNT)
    num_documents: int = Field(ge=0, lt=_MAX_COUNT)
    num_bytes: int = Field(ge=0, lt=_MAX_COUNT)
    max_token_id: int = Field(ge=-1)
    starts_crc32: int = Field(ge=0, lt=1 << 32)
    num_shards: int = Field(ge=0, lt=1 << 32)
    open_crc32: int = Field(ge=0, lt=1 << 32)  # of the last shard


class _Record(Settings):
    model_config = ConfigDict(strict=True)

    chunks: int = Field(ge=0, lt=_MAX_COUNT)
    parts: int = Field(ge=0, lt=_MAX_COUNT)
    source_bytes: int = Field(ge=0)
    skipped: dict[str, int] = Field({})
    synced: bool
    writers: dict[str, _Counts]


class _FullShards(Settings):
    full: dict[str, dict[int, int]]  # CRC-32 by split and number of the shard


@dataclass(kw_only=True)
class WorkProgress:
    """How much of the work is written."""

    num_chunks: int = 0  # of the corpus
    num_parts: int = 0  # of the next chunk
    source_bytes: int = 0
    skipped: Counter[str] = field(default_factory=Counter)  # rows without text, by reason
    writers: dict[str, WriterProgress] = field(default_factory=dict)  # by split


class WorkLog:
    """The log in one directory, held by one process at a time; made by `open_log`."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self._num_full: dict[str, int] = {}  # shards by split whose checksum is in the log

    def load(self) -> tuple[WorkHeader, list[WorkProgress]] | None:
        """The work and its last progress, then the last one that a power failure cannot have undone.

        None if the log is empty. Raises `DataError` if it is not one; it is left as it is.
        """
        if not self._is_log():
            raise DataError(
                f"{self.path} is not a record of unfinished shards: choose another output, or remove it."
            )
        header, found, full, end = None, {}, _FullShards(full={}), _HOLDER_BYTES
        try:
            with os.fdopen(os.dup(self._descriptor), "rb") as file:
                file.seek(_HOLDER_BYTES)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    if header is None:
                        header = WorkHeader.model_validate_json(line)
                    elif line.startswith(b'{"full"'):
                        _merge(full, _FullShards.model_validate_json(line))
                    elif line.startswith(b'{"chunks"'):
                        found["last"] = line
                        if b'"synced": true' in line:
                            found["synced"] = line
                    end += len(line)
            if header is None:
                return None
            records = [_Record.model_validate_json(line) for line in dict.fromkeys(found.values())]
            loaded = [_progress(record, full) for record in records]
        except (ValidationError, KeyError) as error:
            reason = (
                error.errors()[0]["msg"] if isinstance(error, ValidationError) else f"it lacks shard {error}"
            )
            raise DataError(
                f"{self.path} is not a record of unfinished shards that this distft can read: {reason}. "
                "Choose another output, or remove the file to start again."
            ) from None
        os.ftruncate(self._descriptor, end)
        self.write_holder()
        return header, loaded

    def begin(self, header: WorkHeader) -> None:
        """Start a log of `header` on the disk, in place of what is there."""
        with _write_errors(self.path):
            os.ftruncate(self._descriptor, 0)
            self.write_holder()
            self._append(header.model_dump_json().encode() + b"\n")
            os.fsync(self._descriptor)
        storage.sync_names(self.path.parent)
        self._num_full = {}

    def record(self, progress: WorkProgress, *, synced: bool) -> None:
        """Append `progress`; with `synced` it reaches the disk, as the shards up to it have done before.

        Raises `DataError` on a full disk.
        """
        full, counts = {}, {}
        for split, writer in progress.writers.items():
            num_full, crc32 = self._num_full.get(split, 0), writer.shard_crc32
            if len(crc32) - 1 > num_full:
                full[split] = dict(enumerate(crc32[num_full:-1], num_full))
                self._num_full[split] = len(crc32) - 1
            counts[split] = {
                "num_tokens": writer.num_tokens,
                "num_documents": writer.num_documents,
                "num_bytes": writer.num_bytes,
                "max_token_id": writer.max_token_id,
                "starts_crc32": writer.starts_crc32,
                "num_shards": len(crc32),
                "open_crc32": crc32[-1] if crc32 else 0,
            }
        lines: list[dict[str, Any]] = [{"full": full}] if full else []
        lines.append(
            {
                "chunks": progress.num_chunks,
                "parts": progress.num_parts,
                "source_bytes": progress.source_bytes,
                "skipped": dict(progress.skipped),
                "synced": synced,
                "writers": counts,
            }
        )
        with _write_errors(self.path):
            self._append("".join(json.dumps(line) + "\n" for line in lines).encode())
            if synced:
                os.fsync(self._descriptor)

    def remove(self) -> None:
        """Remove the file, which ends the work; the lock is kept until `open_log` ends."""
        self.path.unlink(missing_ok=True)

    def _is_log(self) -> bool:
        """Whether the file begins as this class begins one."""
        first = os.pread(self._descriptor, _HOLDER_BYTES, 0)
        try:
            holder = json.loads(first)
        except ValueError:
            return False
        return len(first) == _HOLDER_BYTES and first.endswith(b"\n") and holder.keys() == {"pid", "host"}

    def write_holder(self) -> None:
        """Say in the first line, for the message of others, that this process has the lock."""
        holder = json.dumps({"pid": os.getpid(), "host": socket.gethostname()[: _HOLDER_BYTES // 2]})
        os.pwrite(self._descriptor, holder.encode().ljust(_HOLDER_BYTES - 1) + b"\n", 0)

    def _append(self, data: bytes) -> None:
        os.lseek(self._descriptor, 0, os.SEEK_END)
        while data:
            data = data[os.write(self._descriptor, data) :]


@contextlib.contextmanager
def open_log(directory: Path) -> Iterator[WorkLog]:
    """Lock `directory`, which is created if it is missing, and open its log.

    The operating system drops the lock of a process that dies. Raises `StorageError` if another process has
    it, on this or another machine that shares the file system, or if the file system has no locks.
    """
    path = directory / LOG
    storage.make_directory(directory)
    with contextlib.suppress(FileNotFoundError):
        require_regular_file(path)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _lock(descriptor, path)
            # The process that had the lock may have removed the file.
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                log = WorkLog(path, descriptor)
                if os.fstat(descriptor).st_size == 0:
                    log.write_holder()
                yield log
                if path.exists() and os.fstat(descriptor).st_size == _HOLDER_BYTES:
                    path.unlink()
                return
        finally:
            os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StorageError(
            f"output={path.parent} is being written by another process{_holder(descriptor)}: wait for it, "
            "stop it, or choose another output."
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise StorageError(
            f"output={path.parent} is on a file system without file locks ({error.strerror}): choose an "
            "output on another one, and copy it."
        ) from None


def _holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, _HOLDER_BYTES, 0))
        return f" (pid {int(holder['pid'])} on {holder['host']!s:.60})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _merge(full: _FullShards, more: _FullShards) -> None:
    for split, checksums in more.full.items():
        full.full.setdefault(split, {}).update(checksums)


def _progress(record: _Record, full: _FullShards) -> WorkProgress:
    """The progress of `record`. Raises `KeyError` if the checksum of a full shard is missing."""
    writers = {}
    for split, counts in record.writers.items():
        checksums = [full.full[split][index] for index in range(counts.num_shards - 1)]
        writers[split] = WriterProgress(
            num_tokens=counts.num_tokens,
            num_documents=counts.num_documents,
            num_bytes=counts.num_bytes,
            max_token_id=counts.max_token_id,
            shard_crc32=[*checksums, counts.open_crc32][: counts.num_shards],
            starts_crc32=counts.starts_crc32,
        )
    return WorkProgress(
        num_chunks=record.chunks,
        num_parts=record.parts,
        source_bytes=record.source_bytes,
        skipped=Counter(record.skipped),
        writers=writers,
    )


@contextlib.contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot write {path}: {error.strerror or error}. Work recorded so far is intact: free disk "
            "space and run the same command again to resume."
        ) from error
