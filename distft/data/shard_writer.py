"""Writes token shards in bounded memory; resumable, and committed by the manifest."""

import json
import os
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from distft.data.shards import (
    DOCUMENT_STARTS,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    ShardLayout,
    file_crc32,
    shard_name,
    token_dtype,
)
from distft.errors import DataError


@dataclass(kw_only=True)
class WriterProgress:
    """How much a writer has written; enough to truncate its files to this point and resume."""

    num_tokens: int = 0
    num_documents: int = 0
    num_bytes: int = 0  # UTF-8 bytes of the tokenized text
    max_token_id: int = -1
    shard_crc32: list[int] = field(default_factory=list)  # the last one is of the open shard
    starts_crc32: int = 0


class ShardWriter:
    """Appends tokens to shards, which count only once `commit` has written the manifest.

    A writer that died resumes from the `WriterProgress` that its last `flush` returned. A failed write (a
    full disk) raises `DataError` and leaves everything up to that progress intact.
    """

    def __init__(
        self, directory: str | Path, layout: ShardLayout, progress: WriterProgress | None = None
    ) -> None:
        """Start anew, or resume from `progress`: anything in the files beyond it is removed.

        Raises `DataError` if the directory is committed already, or its files do not match `progress`.
        """
        self._directory = Path(directory)
        self._layout = layout
        self._dtype = token_dtype(layout.vocab_size)
        self._progress = progress or WriterProgress()
        if (self._directory / MANIFEST).exists():
            raise DataError(
                f"{self._directory} already has committed token shards: choose another directory."
            )
        self._directory.mkdir(parents=True, exist_ok=True)
        if progress is None:
            self._remove_files()
        else:
            self._truncate_to_progress()
        self._starts = (self._directory / DOCUMENT_STARTS).open("ab")
        self._shard: BinaryIO | None = None

    @property
    def progress(self) -> WriterProgress:
        return self._progress

    def append(self, tokens: NDArray[Any], document_starts: NDArray[Any], num_bytes: int) -> None:
        """Append `tokens` of `num_bytes` UTF-8 bytes; documents begin at positions `document_starts`.

        Tokens before the first start continue the last document. Raises `DataError` for ids outside the
        vocabulary.
        """
        progress = self._progress
        if tokens.size:
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self._layout.vocab_size:
                raise DataError(
                    f"token id {high if low >= 0 else low} is outside the vocabulary "
                    f"of {self._layout.vocab_size}."
                )
            if progress.num_tokens == 0 and (not document_starts.size or document_starts[0] != 0):
                raise ValueError("the first token must begin a document")
            progress.max_token_id = max(progress.max_token_id, high)
        starts = (document_starts.astype(np.int64) + progress.num_tokens).astype("<u8").tobytes()
        try:
            self._starts.write(starts)
            self._write_tokens(tokens.astype(self._dtype, copy=False))
        except OSError as error:
            raise _write_error(self._directory, error) from error
        progress.starts_crc32 = zlib.crc32(starts, progress.starts_crc32)
        progress.num_documents += len(document_starts)
        progress.num_bytes += num_bytes

    def flush(self) -> WriterProgress:
        """Flush the files to the operating system; return the progress to resume from."""
        try:
            self._starts.flush()
            if self._shard:
                self._shard.flush()
        except OSError as error:
            raise _write_error(self._directory, error) from error
        return self._progress

    def commit(self, extra: dict[str, Any] | None = None) -> None:
        """Sync the files to disk, then write the manifest, which stores `extra` for the caller."""
        if self._progress.num_tokens == 0:
            raise DataError(f"{self._directory}: no tokens were written, so there is nothing to commit.")
        self.flush()
        try:
            os.fsync(self._starts.fileno())
            self.close()
            _write_json(self._directory / MANIFEST, self._manifest(extra or {}))
        except OSError as error:
            raise _write_error(self._directory, error) from error

    def close(self) -> None:
        self._starts.close()
        if self._shard:
            os.fsync(self._shard.fileno())
            self._shard.close()
            self._shard = None

    def abort(self) -> None:
        """Close the files without sync, ignoring errors. Does nothing after `commit`."""
        for file in (self._starts, self._shard):
            if file:
                try:
                    file.close()
                except OSError:
                    # The lost buffer lies beyond the last progress, where resuming truncates the file anyway.
                    continue

    def _write_tokens(self, tokens: NDArray[Any]) -> None:
        progress, num_written = self._progress, 0
        while num_written < len(tokens):
            shard_size = progress.num_tokens % self._layout.shard_tokens
            if shard_size == 0:
                self._start_next_shard()
            elif self._shard is None:
                self._shard = self._shard_path(len(progress.shard_crc32) - 1).open("ab")
            ids = tokens[num_written : num_written + self._layout.shard_tokens - shard_size]
            data = ids.tobytes()
            assert self._shard is not None
            self._shard.write(data)
            progress.shard_crc32[-1] = zlib.crc32(data, progress.shard_crc32[-1])
            progress.num_tokens += len(ids)
            num_written += len(ids)

    def _start_next_shard(self) -> None:
        if self._shard:
            self._shard.flush()
            os.fsync(self._shard.fileno())
            self._shard.close()
        self._shard = self._shard_path(len(self._progress.shard_crc32)).open("wb")
        self._progress.shard_crc32.append(0)

    def _shard_path(self, index: int) -> Path:
        return self._directory / shard_name(index)

    def _files(self) -> list[tuple[str, int, int]]:
        """(name, bytes, crc32) that the progress implies for every file."""
        progress, shard_tokens = self._progress, self._layout.shard_tokens
        shards = [
            (
                shard_name(i),
                min(shard_tokens, progress.num_tokens - i * shard_tokens) * self._dtype.itemsize,
                crc32,
            )
            for i, crc32 in enumerate(progress.shard_crc32)
        ]
        return [*shards, (DOCUMENT_STARTS, progress.num_documents * 8, progress.starts_crc32)]

    def _remove_files(self) -> None:
        for path in [*self._directory.glob("shard_*.bin"), self._directory / DOCUMENT_STARTS]:
            path.unlink(missing_ok=True)

    def _truncate_to_progress(self) -> None:
        files = self._files()
        for name, size_bytes, _ in files:
            path = self._directory / name
            found = path.stat().st_size if path.exists() else 0
            if found < size_bytes:
                raise DataError(
                    f"{path} has {found} bytes where {size_bytes} were recorded, so the interrupted work "
                    f"cannot be resumed: remove {self._directory} (or overwrite it) and start again."
                )
            if path.exists():
                os.truncate(path, size_bytes)
        for path in self._directory.glob("shard_*.bin"):
            if path.name not in {name for name, _, _ in files}:
                path.unlink()
        for name, size_bytes, crc32 in files[-2:]:  # earlier shards were synced when they were closed
            if size_bytes and file_crc32(self._directory / name) != crc32:
                raise DataError(
                    f"{self._directory / name} is damaged: its checksum differs from the recorded one, so "
                    f"the interrupted work cannot be resumed: remove {self._directory} (or overwrite it) "
                    "and start again."
                )

    def _manifest(self, extra: dict[str, Any]) -> dict[str, Any]:
        progress = self._progress
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "dtype": self._dtype.name,
            **asdict(self._layout),
            "num_tokens": progress.num_tokens,
            "num_documents": progress.num_documents,
            "num_bytes": progress.num_bytes,
            "max_token_id": progress.max_token_id,
            "files": [
                {"name": name, "size_bytes": size_bytes, "crc32": f"{crc32:08x}"}
                for name, size_bytes, crc32 in self._files()
            ],
            "extra": extra,
        }


def _write_error(directory: Path, error: OSError) -> DataError:
    return DataError(
        f"cannot write token shards to {directory}: {error.strerror or error}. Work recorded so far is "
        "intact: free disk space and run the same command again to resume."
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
