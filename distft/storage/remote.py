"""Files at URLs, through fsspec: mainly object stores."""

import functools
import io
import math
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, cast

from distft.errors import ConfigError, StorageError, UnreachableError
from distft.storage.errors import (
    bucket_missing,
    errors_as_unreachable,
    full_disk_as_storage_error,
    remedy,
    s3_error_code,
)
from distft.storage.local import TEMPORARY_MARK
from distft.storage.paths import join, parent_and_name

_S3 = frozenset(["s3", "s3a"])
_OBJECT_STORES = _S3 | {"gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci", "hf"}  # have no directories
# One put makes the whole object visible at once. Elsewhere, upload under a temporary name, then rename.
_ATOMIC_PUT = _OBJECT_STORES | {"memory"}
_IN_MEMORY_BYTES = 64 << 20  # larger files are uploaded from the local disk in parts
_PART_BYTES = 16 << 20
_PARTS_AT_ONCE = 4  # parts of one file in memory
_LARGEST_PUT = 5 << 30  # S3's limit for a file in one request
_CONDITION_FAILED = frozenset({"PreconditionFailed", "ConditionalRequestConflict", "412", "409"})
_MAX_PARTS = 10_000  # per upload; S3's limit


class RemoteWriter:
    """Buffers a file in an unnamed temporary file on this machine until it is complete."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.num_bytes = 0
        with full_disk_as_storage_error(tempfile.gettempdir()):
            self._file = tempfile.TemporaryFile(buffering=1 << 20)  # noqa: SIM115 - closed by open_write

    def write(self, data: bytes | bytearray | memoryview, /) -> int:
        """Write all of `data`."""
        with full_disk_as_storage_error(tempfile.gettempdir(), memoryview(data).nbytes):
            count = self._file.write(data)
        self.num_bytes += count
        return count

    def finish(self) -> None:
        """End writing, and rewind for the upload."""
        with full_disk_as_storage_error(tempfile.gettempdir(), self.num_bytes):
            self._file.seek(0)

    @property
    def local_name(self) -> str:
        """A path to the content while the file is open. Unnamed files leave nothing after a SIGKILL."""
        return f"/dev/fd/{self._file.fileno()}"

    def content(self) -> bytes:
        """The whole content, as bytes."""
        return cast("bytes", self._file.read())

    def close(self) -> None:
        with full_disk_as_storage_error(tempfile.gettempdir()):
            self._file.close()


class RemoteReader(io.RawIOBase):
    """An open file of a store; its read errors are raised as `UnreachableError`."""

    def __init__(self, file: Any, url: str) -> None:
        self._file = file
        self._url = url

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        with errors_as_unreachable(self._url, "reading"):
            data = self._file.read(len(view))
        view[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        with errors_as_unreachable(self._url, "reading"):
            return cast("bytes", self._file.read())

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


class RemoteStorage:
    """`Storage` for one fsspec file system; paths are whole URLs.

    Every exception of the store's library is raised as `UnreachableError`, except `FileNotFoundError`.
    """

    def __init__(self, filesystem: Any) -> None:
        self._filesystem = filesystem
        protocols = filesystem.protocol
        self._protocols = {protocols} if isinstance(protocols, str) else set(protocols)

    @classmethod
    def of(cls, url: str) -> "RemoteStorage":
        """The file system of `url`. Raises `ConfigError` if the protocol is unknown or not installed."""
        import fsspec

        try:
            options = s3_options() if url.partition(":")[0] in _S3 else {}
            # Other ranks write files that this one lists: never cache listings.
            filesystem, _ = fsspec.core.url_to_fs(url, use_listings_cache=False, **options)
        except ImportError as error:
            raise ConfigError(
                f"{url}: {error}. Install the fsspec package for this storage (s3fs, gcsfs, adlfs ...)."
            ) from None
        except ValueError as error:
            raise ConfigError(f"{url}: {error}. Use a local path or a URL that fsspec supports.") from None
        return cls(filesystem)

    def open_read(self, path: str) -> BinaryIO:
        size = self._look_up(path, self._filesystem.size)
        with errors_as_unreachable(path, "opening"):
            if size is not None and size <= _PART_BYTES:  # one request; seeking takes several
                options = {"max_concurrency": 1} if self._protocols & _S3 else {}  # no second size request
                return io.BytesIO(self._filesystem.cat_file(path, **options))
            file = self._filesystem.open(path, "rb")
        return cast("BinaryIO", io.BufferedReader(RemoteReader(file, path)))

    @contextmanager
    def open_write(self, path: str, *, durable: bool) -> Iterator[RemoteWriter]:  # noqa: ARG002
        writer = RemoteWriter(path)
        try:
            yield writer
            writer.finish()
            try:
                with errors_as_unreachable(path, "writing"):
                    self._put(writer)
            except FileNotFoundError as error:
                raise bucket_missing(path) from error
        finally:
            writer.close()

    def _put(self, writer: RemoteWriter) -> None:
        if not self._protocols & _ATOMIC_PUT:
            parent, name = parent_and_name(writer.path)
            temporary = f"{parent}/{name}{TEMPORARY_MARK}{secrets.token_hex(4)}"
            self._filesystem.makedirs(parent, exist_ok=True)
            self._filesystem.put_file(writer.local_name, temporary)
            self._filesystem.mv(temporary, writer.path)
        elif writer.num_bytes <= _IN_MEMORY_BYTES:
            self._filesystem.pipe_file(writer.path, writer.content())
        else:
            options = {}
            if self._protocols & _S3:
                options["chunksize"] = max(_PART_BYTES, math.ceil(writer.num_bytes / _MAX_PARTS))
            self._filesystem.put_file(writer.local_name, writer.path, **options)

    def commit_unless_changed(
        self, path: str, data: bytes, expected: str | None, confirm: Callable[[], None]
    ) -> bool:
        confirm()
        options: dict[str, Any] = {}
        if self._protocols & _S3:
            condition = {"IfNoneMatch": "*"} if expected is None else {"IfMatch": expected}
            options = {**condition, "chunksize": _LARGEST_PUT}  # in one request: parts take no condition
        elif self.version(path) != expected:
            return False
        try:
            with errors_as_unreachable(path, "writing"):
                self._filesystem.pipe_file(path, data, **options)
        except FileNotFoundError as error:
            if s3_error_code(error) == "NoSuchBucket":
                raise bucket_missing(path) from error
            return False  # the file that was to be replaced is gone
        except UnreachableError as error:
            if s3_error_code(error) not in _CONDITION_FAILED:
                raise
            # A repeated request, whose first answer was lost, finds its own file.
            return self.version(path) is not None and bytes(self.read_view(path)) == data
        return True

    def version(self, path: str) -> str | None:
        try:
            found = self._look_up(path, self._filesystem.info)
        except FileNotFoundError:
            return None
        if found["type"] != "file":
            return None
        return str(found["ETag"] if self._protocols & _S3 else self._filesystem.ukey(path))

    def read_into(self, path: str, start: int, out: memoryview) -> int:
        if not len(out):
            return 0
        try:
            with errors_as_unreachable(path, "reading"):
                data = self._filesystem.cat_file(path, start=start, end=start + len(out))
        except UnreachableError as error:
            if s3_error_code(error) != "InvalidRange":
                raise
            return 0  # `start` is beyond the end of the file
        out[: len(data)] = data
        return len(data)

    def read_view(self, path: str) -> memoryview:
        with errors_as_unreachable(path, "reading"):
            return memoryview(self._filesystem.cat_file(path))

    def list_names(self, path: str) -> list[str]:
        return sorted({name for name, _ in self._list(path)})

    def list_sizes(self, path: str) -> dict[str, int]:
        return {name: int(entry["size"]) for name, entry in self._list(path) if entry["type"] == "file"}

    def _list(self, path: str) -> list[tuple[str, dict[str, Any]]]:
        """The names in a directory, and what the store tells of each; none if there is no directory."""
        own = self._filesystem._strip_protocol(path).rstrip("/")
        try:
            with errors_as_unreachable(path, "listing"):
                self._filesystem.invalidate_cache(path)
                found = self._filesystem.ls(path, detail=True)
        except FileNotFoundError as error:
            if s3_error_code(error) == "NoSuchBucket":
                raise bucket_missing(path) from error
            return []
        entries = [(str(entry["name"]).rstrip("/"), entry) for entry in found]
        # Some stores list the "directory" itself, an empty object.
        named = [(path.rpartition("/")[2], entry) for path, entry in entries if path != own]
        return [(name, entry) for name, entry in named if TEMPORARY_MARK not in name]

    def exists(self, path: str) -> bool:
        return bool(self._look_up(path, self._filesystem.exists))

    def is_directory(self, path: str) -> bool:
        return bool(self._look_up(path, self._filesystem.isdir))

    def size(self, path: str) -> int:
        size = self._look_up(path, self._filesystem.size)
        if size is None:
            raise StorageError(f"{path}: this storage reports no file sizes; copy the file to a local path.")
        return int(size)

    def _look_up(self, path: str, query: Callable[[str], Any]) -> Any:
        with errors_as_unreachable(path, "looking it up"):
            self._filesystem.invalidate_cache(path)
            return query(path)

    def remove(self, path: str) -> None:
        if self.exists(path):
            with errors_as_unreachable(path, "removing"):
                self._filesystem.rm_file(path)

    def remove_files(self, path: str, names: list[str]) -> None:
        if not names:
            return
        with errors_as_unreachable(path, "removing"), suppress(FileNotFoundError):
            self._filesystem.rm([join(path, name) for name in names])
        # S3 lists the objects that it refused to delete in a response that s3fs ignores.
        if left := set(names) & set(self.list_names(path)):
            raise _still_there(join(path, min(left)))

    def remove_tree(self, path: str) -> None:
        if not self.exists(path):
            return
        try:
            with errors_as_unreachable(path, "removing"):
                self._filesystem.rm(path, recursive=True)
        except FileNotFoundError:
            pass  # another process is removing the same tree
        # S3 lists the objects that it refused to delete in a response that s3fs ignores.
        if self.exists(path):
            raise _still_there(path)

    def make_directory(self, path: str) -> None:
        # Never create a bucket: a misspelt name would become a new one.
        if not self._protocols & _OBJECT_STORES:
            with errors_as_unreachable(path, "creating the directory"):
                self._filesystem.makedirs(path, exist_ok=True)


def _still_there(path: str) -> UnreachableError:
    return UnreachableError(
        f"{path}: removing failed: some files are still there. {remedy(PermissionError())}"
    )


@functools.cache
def s3_options() -> dict[str, Any]:
    """Defaults for s3fs: block size, concurrency, time-outs, retries. The user's settings take precedence.

    botocore retries a request after a time-out, a lost connection, throttling or a 5xx: with these options up
    to 7 times in about 40 s, by its own defaults at most 3 times in 5 s. After a time-out, s3fs repeats all
    of this 5 times.
    """
    import botocore.session
    import fsspec

    configured = {**fsspec.config.conf.get("s3a", {}), **fsspec.config.conf.get("s3", {})}
    session = botocore.session.Session()  # reads AWS_MAX_ATTEMPTS, AWS_RETRY_MODE and the AWS profile
    config: dict[str, Any] = {"connect_timeout": 10, "read_timeout": 30}
    if session.get_config_variable("max_attempts") is None:
        config["retries"] = {"mode": "standard", "total_max_attempts": 8}
    defaults = {"default_block_size": _PART_BYTES, "max_concurrency": _PARTS_AT_ONCE}
    return {
        **{name: value for name, value in defaults.items() if name not in configured},
        "config_kwargs": {**config, **configured.get("config_kwargs", {})},
    }
