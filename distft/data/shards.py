"""Reads committed token shards (`shard_layout` describes the files, `shard_writer` writes them).

Shards in a local directory are memory-mapped. Of shards at a URL only the ranges that are asked for are
fetched, several at a time, and nothing is kept: memory and disk do not grow with the data.
"""

import json
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_hexdigest

from distft import storage
from distft.data.shard_layout import MANIFEST, name_without_work
from distft.data.shard_manifest import ShardFile, ShardManifest, read_manifest, require_regular_file
from distft.errors import DataError
from distft.storage import AnyPath, join

MAX_MAPS = 256  # shards mapped at a time, each with a file descriptor; processes have 1024 by default
_READ_BYTES = 1 << 22
_REQUESTS_AT_ONCE = 16  # for the rows of a batch from shards at a URL


class TokenShards:
    """Committed token shards in a local directory or at a URL.

    Opening checks that the files are there with their sizes; `verify` checks the checksums, which takes a
    full read.
    """

    def __init__(self, directory: AnyPath, manifest: ShardManifest, *, max_maps: int = MAX_MAPS) -> None:
        self.directory = str(directory)
        self._local = storage.local_path(directory)
        self._manifest = manifest
        self.vocab_size = manifest.vocab_size
        self.tokenizer_fingerprint = manifest.tokenizer_fingerprint
        self.bos_id, self.eos_id, self.pad_id = manifest.bos_id, manifest.eos_id, manifest.pad_id
        self.num_tokens, self.num_documents = manifest.num_tokens, manifest.num_documents
        self.num_bytes = manifest.num_bytes  # UTF-8 bytes of the tokenized text
        self.max_token_id = manifest.max_token_id
        self.extra = manifest.extra
        self.dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self._max_maps = max_maps
        self._maps: dict[int, NDArray[Any]] = {}  # by shard; the first ones that were read
        self._check_files()

    @classmethod
    def open(cls, path: AnyPath, *, max_maps: int = MAX_MAPS) -> "TokenShards":
        """Open the shards in the directory or at the URL `path`.

        Raises `DataError` if they are not committed, a file is missing or has the wrong size, or the manifest
        is not one.
        """
        manifest = read_manifest(path)
        if manifest is None:
            raise DataError(_not_committed_message(path))
        return cls(path, manifest, max_maps=max_maps)

    @property
    def fingerprint(self) -> str:
        """A digest of the checksums of all files, so equal for a copy of the directory."""
        checksums = json.dumps([[name_without_work(file.name), file.crc32] for file in self._manifest.files])
        return xxh3_64_hexdigest(checksums.encode())

    @cached_property
    def document_starts(self) -> NDArray[np.int64]:
        """Ascending positions of the first token of each document; of shards at a URL a temporary copy.

        Raises `DataError` if they cannot be those of these shards.
        """
        path = join(self.directory, self._manifest.document_starts.name)
        # uint64 on disk, read as int64: no position reaches 2**63.
        if self._local is not None:
            starts = np.memmap(path, dtype="<i8", mode="r").view(np.ndarray)
        else:
            with tempfile.TemporaryFile() as copy, storage.full_disk_as_storage_error(tempfile.gettempdir()):
                with storage.open_read(path) as file:
                    while data := file.read(_READ_BYTES):
                        copy.write(data)
                copy.flush()
                starts = np.memmap(copy, dtype="<i8", mode="r").view(np.ndarray)  # outlives the file's name
        if len(starts) != self.num_documents or starts[0] != 0 or not 0 <= starts[-1] <= self.num_tokens:
            raise DataError(f"{path} has other positions than its manifest says. {_RESTORE}")
        return starts

    def tokens(self, start: int, stop: int) -> NDArray[Any]:
        """Ids [start, stop) of the concatenation of all shards, in their dtype on disk.

        A view into the file if the range lies in one shard of a local directory. Raises `DataError` if a file
        can no longer be read.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of {self.num_tokens} in {self.directory}")
        slices = []
        while start < stop:
            shard, offset = divmod(start, self._manifest.shard_tokens)
            count = min(stop - start, self._manifest.shard_tokens - offset)
            slices.append(self._read(shard, offset, count))
            start += count
        if len(slices) == 1:
            return slices[0]
        return np.concatenate(slices) if slices else np.empty(0, self.dtype)

    def read_rows(self, starts: NDArray[np.int64], out: NDArray[np.int64]) -> None:
        """Fill row i of `out` with the ids from `starts[i]` on; those of a URL several at a time."""
        length = out.shape[1]
        if self._local is None and len(starts) > 1:
            found = self._requests.map(lambda start: self.tokens(start, start + length), starts.tolist())
            for row, ids in zip(out, found, strict=True):
                row[:] = ids
            return
        for row, start in zip(out, starts.tolist(), strict=True):
            row[:] = self.tokens(start, start + length)

    def document_ids(self, start: int, stop: int) -> NDArray[np.int64]:
        """Document number of each of the tokens [start, stop)."""
        first = int(np.searchsorted(self.document_starts, start, side="right")) - 1
        last = int(np.searchsorted(self.document_starts, stop, side="left"))
        ids = np.zeros(stop - start, dtype=np.int64)
        np.add.at(ids, self.document_starts[first + 1 : last] - start, 1)
        return np.cumsum(ids) + first

    def verify(self) -> None:
        """Read all files; raise `DataError` with every file whose checksum differs from the manifest."""
        paths = [(join(self.directory, file.name), file.crc32) for file in self._manifest.files]
        damaged = [path for path, crc32 in paths if file_crc32(path) != int(crc32, 16)]
        if damaged:
            raise DataError(
                f"damaged (checksum differs from the manifest): {', '.join(damaged)}. "
                "Restore these files from a copy, or tokenize again."
            )

    @cached_property
    def _requests(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(_REQUESTS_AT_ONCE, thread_name_prefix="token-shards")

    def _read(self, shard: int, offset: int, count: int) -> NDArray[Any]:
        """Ids of one shard. A view of its map; beyond the first `max_maps` shards, and at URLs, a copy.

        A read of 8 KiB without a map takes a few microseconds, less than mapping another shard in place of a
        mapped one.
        """
        ids = self._maps.get(shard)
        if ids is not None:
            return ids[offset : offset + count]
        path = join(self.directory, self._manifest.shards[shard].name)
        try:
            if self._local is not None and len(self._maps) < self._max_maps:
                ids = np.memmap(path, dtype=self.dtype, mode="r").view(np.ndarray)
                self._maps[shard] = ids
                return ids[offset : offset + count]
            copied = np.empty(count, self.dtype)
            storage.read_into(path, offset * self.dtype.itemsize, copied.view(np.uint8).data)
        except OSError as error:
            raise DataError(f"{path} can no longer be read: {error}. {_RESTORE}") from error
        return copied

    def _check_files(self) -> None:
        files = self._manifest.files
        if self._local is not None:
            problems = [problem for file in files if (problem := _local_problem(self._local, file))]
        else:
            found = storage.list_sizes(self.directory)
            problems = [
                f"{join(self.directory, file.name)} {problem}"
                for file in files
                if (problem := _size_problem(file, found.get(file.name)))
            ]
        if problems:
            raise DataError("\n".join(problems) + f"\n{_RESTORE}")


_RESTORE = "Restore from a copy, or tokenize again."


def _local_problem(directory: Path, file: ShardFile) -> str:
    path = directory / file.name
    try:
        problem = _size_problem(file, require_regular_file(path).st_size)
    except FileNotFoundError:
        problem = _size_problem(file, None)
    except DataError as error:
        return str(error)
    return problem and f"{path} {problem}"


def _size_problem(file: ShardFile, found: int | None) -> str:
    if found is None:
        return "is missing"
    return "" if found == file.size_bytes else f"has {found} bytes, its manifest says {file.size_bytes}"


def _not_committed_message(directory: AnyPath) -> str:
    if not storage.exists(directory):
        return f"{directory} does not exist: make token shards with `distft tokenize`."
    if not storage.is_directory(directory):
        return f"{directory} is a file: name a directory of token shards."
    names = storage.list_names(directory)
    below = [name for name in names if storage.exists(join(directory, name, MANIFEST))]
    if below:
        return f"{directory} has no {MANIFEST}; name a subdirectory that has one: {', '.join(below)}."
    return (
        f"{directory} has no {MANIFEST}: its token shards were never finished. "
        "Run the same `distft tokenize` again: it resumes where it stopped."
    )


def file_crc32(path: AnyPath) -> int:
    """The CRC-32 of a file."""
    crc32 = 0
    with storage.open_read(path) as file:
        while data := file.read(_READ_BYTES):
            crc32 = zlib.crc32(data, crc32)
    return crc32
