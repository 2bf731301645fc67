"""Files elsewhere, through fsspec: object stores above all."""

import functools
import io
import math
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

from distft.errors import ConfigError, StorageError, UnreachableError
from distft.storage.disk import full_disk_explained
from distft.storage.faults import bucket_missing, error_code, faults_explained, remedy
from distft.storage.local import DRAFT_MARK
from distft.storage.paths import parent_and_name

_S3 = frozenset(["s3", "s3a"])
_OBJECT_STORES = _S3 | {"gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci", "hf"}  # without directories
# Where one put makes a whole object visible at once. Elsewhere a file is put under another name, then moved.
_ATOMIC_PUT = _OBJECT_STORES | {"memory"}
_IN_MEMORY_BYTES = 64 << 20  # a larger file goes from the local disk in parts
_PART_BYTES = 16 << 20
_PARTS_AT_ONCE = 4  # so many parts of a file are in memory
_MAX_PARTS = 10_000  # of one upload; S3 allows no more


class RemoteWriter:
    """Keeps what is written in an unnamed file on this machine until it is whole."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.num_bytes = 0
        with full_disk_explained(tempfile.gettempdir()):
            self._file = tempfile.TemporaryFile(buffering=1 << 20)  # noqa: SIM115 - closed by open_write

    def write(self, data: bytes | bytearray | memoryview, /) -> int:
        """Write all of `data`."""
        with full_disk_explained(tempfile.gettempdir(), memoryview(data).nbytes):
            count = self._file.write(data)
        self.num_bytes += count
        return count

    def finish(self) -> None:
        """Nothing more comes; the content can be taken from its beginning on."""
        with full_disk_explained(tempfile.gettempdir(), self.num_bytes):
            self._file.seek(0)

    @property
    def local_name(self) -> str:
        """Where the content is found while the file is open: nothing of it outlives a SIGKILL."""
        return f"/dev/fd/{self._file.fileno()}"

    def content(self) -> bytes:
        """All of it."""
        return cast("bytes", self._file.read())

    def close(self) -> None:
        with full_disk_explained(tempfile.gettempdir()):
            self._file.close()


class RemoteReader(io.RawIOBase):
    """An open file of a store, of which every fault is told as ours."""

    def __init__(self, file: Any, url: str) -> None:
        self._file = file
        self._url = url

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        with faults_explained(self._url, "reading"):
            data = self._file.read(len(view))
        view[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        with faults_explained(self._url, "reading"):
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
    """The `Storage` of one fsspec file system; paths are whole URLs.

    Raises `UnreachableError` for whatever the store's library raises in the end, `FileNotFoundError` aside.
    """

    def __init__(self, filesystem: Any) -> None:
        self._filesystem = filesystem
        protocols = filesystem.protocol
        self._protocols = {protocols} if isinstance(protocols, str) else set(protocols)

    @classmethod
    def of(cls, url: str) -> "RemoteStorage":
        """The file system that `url` names. Raises `ConfigError` where it is unknown or not installed."""
        import fsspec

        try:
            options = s3_options() if url.partition(":")[0] in _S3 else {}
            # Other ranks write what this one lists, so a listing is never kept.
            filesystem, _ = fsspec.core.url_to_fs(url, use_listings_cache=False, **options)
        except ImportError as error:
            raise ConfigError(
                f"{url}: {error}. Install the package that reaches this storage (s3fs, gcsfs, adlfs ...)."
            ) from None
        except ValueError as error:
            raise ConfigError(f"{url}: {error}. Give a local path, or a URL that fsspec knows.") from None
        return cls(filesystem)

    def open_read(self, path: str) -> BinaryIO:
        size = self._ask(path, self._filesystem.size)
        with faults_explained(path, "opening"):
            if size is not None and size <= _PART_BYTES:  # one request, where seeking would make several
                options = {"max_concurrency": 1} if self._protocols & _S3 else {}  # it asks for no size again
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
                with faults_explained(path, "writing"):
                    self._put(writer)
            except FileNotFoundError as error:
                raise bucket_missing(path) from error
        finally:
            writer.close()

    def _put(self, writer: RemoteWriter) -> None:
        if not self._protocols & _ATOMIC_PUT:
            parent, name = parent_and_name(writer.path)
            draft = f"{parent}/{name}{DRAFT_MARK}{secrets.token_hex(4)}"
            self._filesystem.makedirs(parent, exist_ok=True)
            self._filesystem.put_file(writer.local_name, draft)
            self._filesystem.mv(draft, writer.path)
        elif writer.num_bytes <= _IN_MEMORY_BYTES:
            self._filesystem.pipe_file(writer.path, writer.content())
        else:
            parts = {}
            if self._protocols & _S3:
                parts["chunksize"] = max(_PART_BYTES, math.ceil(writer.num_bytes / _MAX_PARTS))
            self._filesystem.put_file(writer.local_name, writer.path, **parts)

    def read_into(self, path: str, start: int, out: memoryview) -> int:
        if not len(out):
            return 0
        try:
            with faults_explained(path, "reading"):
                data = self._filesystem.cat_file(path, start=start, end=start + len(out))
        except UnreachableError as error:
            if error_code(error) != "InvalidRange":
                raise
            return 0  # it begins beyond the end
        out[: len(data)] = data
        return len(data)

    def read_view(self, path: str) -> memoryview:
        with faults_explained(path, "reading"):
            return memoryview(self._filesystem.cat_file(path))

    def list_names(self, path: str) -> list[str]:
        own = self._filesystem._strip_protocol(path).rstrip("/")
        try:
            with faults_explained(path, "listing"):
                self._filesystem.invalidate_cache(path)
                found = self._filesystem.ls(path, detail=False)
        except FileNotFoundError as error:
            if error_code(error) == "NoSuchBucket":
                raise bucket_missing(path) from error
            return []
        # Some stores list the "directory" itself as an empty object.
        names = {
            str(entry).rstrip("/").rpartition("/")[2] for entry in found if str(entry).rstrip("/") != own
        }
        return sorted(name for name in names if DRAFT_MARK not in name)

    def exists(self, path: str) -> bool:
        return bool(self._ask(path, self._filesystem.exists))

    def is_directory(self, path: str) -> bool:
        return bool(self._ask(path, self._filesystem.isdir))

    def size(self, path: str) -> int:
        size = self._ask(path, self._filesystem.size)
        if size is None:
            raise StorageError(f"{path}: this storage does not tell sizes; copy the file to a local path.")
        return int(size)

    def _ask(self, path: str, question: Callable[[str], Any]) -> Any:
        with faults_explained(path, "looking for it"):
            self._filesystem.invalidate_cache(path)
            return question(path)

    def remove(self, path: str) -> None:
        if self.exists(path):
            with faults_explained(path, "removing"):
                self._filesystem.rm_file(path)

    def remove_tree(self, path: str) -> None:
        if not self.exists(path):
            return
        try:
            with faults_explained(path, "removing"):
                self._filesystem.rm(path, recursive=True)
        except FileNotFoundError:
            pass  # another process removes the same tree: what counts is that it is gone
        # S3 names what it refuses to delete in an answer that s3fs does not read.
        if self.exists(path):
            raise UnreachableError(
                f"{path}: removing failed: some of it is still there. {remedy(PermissionError())}"
            )

    def make_directory(self, path: str) -> None:
        # A bucket is the user's to make: a misspelt name must not become a new one.
        if not self._protocols & _OBJECT_STORES:
            with faults_explained(path, "making the directory"):
                self._filesystem.makedirs(path, exist_ok=True)


@functools.cache
def s3_options() -> dict[str, Any]:
    """How s3fs is to work, as far as neither fsspec's configuration nor botocore's says otherwise.

    botocore repeats a request after a time-out, a lost connection, a throttle or a 5xx, up to 7 times in
    about 40 s (5 s, 3 times at the most, by its own defaults); s3fs does that 5 times over for a time-out.
    """
    import botocore.session
    import fsspec

    chosen = {**fsspec.config.conf.get("s3a", {}), **fsspec.config.conf.get("s3", {})}
    session = botocore.session.Session()  # reads AWS_MAX_ATTEMPTS, AWS_RETRY_MODE and the AWS profile
    config: dict[str, Any] = {"connect_timeout": 10, "read_timeout": 30}
    if session.get_config_variable("max_attempts") is None:
        config["retries"] = {"mode": "standard", "total_max_attempts": 8}
    ours = {"default_block_size": _PART_BYTES, "max_concurrency": _PARTS_AT_ONCE}
    return {
        **{name: value for name, value in ours.items() if name not in chosen},
        "config_kwargs": {**config, **chosen.get("config_kwargs", {})},
    }
