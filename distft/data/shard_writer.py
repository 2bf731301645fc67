"""Token shards written in bounded memory, resumed after a crash, committed by a manifest."""

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
class WriterState:
    """How far a writer has come; enough to cut its files back to this point and go on from there."""

    num_tokens: int = 0
    num_documents: int = 0
    num_bytes: int = 0  # of UTF-8 text that the tokens stand for
    max_token_id: int = -1
    shard_crc32: list[int] = field(default_factory=list)  # the last one is of the open shard
    starts_crc32: int = 0


class ShardWriter:
    """Appends tokens to shards. Nothing counts until `commit`; `state` and `resume` survive a crash.

    A failed write (a full disk) raises `DataError` and harms nothing up to the last recorded state.
    """

    def __init__(self, directory: str | Path, layout: ShardLayout, state: WriterState | None = None) -> None:
        """Start anew, or go on from `state`: what the files hold beyond it is cut off.

        Raises `DataError` where the directory is committed, or its files do not hold what `state` says.
        """
        self._directory = Path(directory)
        self._layout = layout
        self._dtype = token_dtype(layout.vocab_size)
        self._state = state or WriterState()
        if (self._directory / MANIFEST).exists():
            raise DataError(f"{self._directory} already holds committed token shards: write somewhere else.")
        self._directory.mkdir(parents=True, exist_ok=True)
        if state is None:
            self._remove_files()
        else:
            self._cut_back()
        self._starts = (self._directory / DOCUMENT_STARTS).open("ab")
        self._shard: BinaryIO | None = None

    @property
    def state(self) -> WriterState:
        return self._state

    def append(self, tokens: NDArray[Any], document_starts: NDArray[Any], num_bytes: int) -> None:
        """Add `tokens`, the text of `num_bytes` UTF-8 bytes; documents begin at `document_starts` in them.

        A first token that begins no document goes on with the last one. Ids outside the vocabulary raise
        `DataError`.
        """
        state = self._state
        if tokens.size:
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self._layout.vocab_size:
                raise DataError(
                    f"token id {high if low >= 0 else low} is outside the vocabulary "
                    f"of {self._layout.vocab_size}."
                )
            if state.num_tokens == 0 and (not document_starts.size or document_starts[0] != 0):
                raise ValueError("the first token must begin a document")
            state.max_token_id = max(state.max_token_id, high)
        starts = (document_starts.astype(np.int64) + state.num_tokens).astype("<u8").tobytes()
        try:
            self._starts.write(starts)
            self._write_tokens(tokens.astype(self._dtype, copy=False))
        except OSError as error:
            raise _write_fault(self._directory, error) from error
        state.starts_crc32 = zlib.crc32(starts, state.starts_crc32)
        state.num_documents += len(document_starts)
        state.num_bytes += num_bytes

    def flush(self) -> WriterState:
        """Hand everything to the operating system; return the state that `resume` can start from."""
        try:
            self._starts.flush()
            if self._shard:
                self._shard.flush()
        except OSError as error:
            raise _write_fault(self._directory, error) from error
        return self._state

    def commit(self, extra: dict[str, Any] | None = None) -> None:
        """Sync the data, then publish it by writing the manifest. `extra` is kept in it for the caller."""
        state = self._state
        if state.num_tokens == 0:
            raise DataError(f"{self._directory}: no tokens were written, so there is nothing to commit.")
        self.flush()
        try:
            os.fsync(self._starts.fileno())
            self.close()
            _write_json(self._directory / MANIFEST, self._manifest(extra or {}))
        except OSError as error:
            raise _write_fault(self._directory, error) from error

    def close(self) -> None:
        self._starts.close()
        if self._shard:
            os.fsync(self._shard.fileno())
            self._shard.close()
            self._shard = None

    def abandon(self) -> None:
        """Close the files after a failure, whatever they then say."""
        for file in (self._starts, self._shard):
            if file:
                try:
                    file.close()
                except OSError:
                    # What was buffered lies beyond the last recorded state: `resume` cuts it off anyway.
                    continue

    def _write_tokens(self, tokens: NDArray[Any]) -> None:
        state, written = self._state, 0
        while written < len(tokens):
            filled = state.num_tokens % self._layout.shard_tokens
            if filled == 0:
                self._next_shard()
            elif self._shard is None:
                self._shard = self._shard_path(len(state.shard_crc32) - 1).open("ab")
            taken = tokens[written : written + self._layout.shard_tokens - filled]
            data = taken.tobytes()
            assert self._shard is not None
            self._shard.write(data)
            state.shard_crc32[-1] = zlib.crc32(data, state.shard_crc32[-1])
            state.num_tokens += len(taken)
            written += len(taken)

    def _next_shard(self) -> None:
        if self._shard:
            self._shard.flush()
            os.fsync(self._shard.fileno())
            self._shard.close()
        self._shard = self._shard_path(len(self._state.shard_crc32)).open("wb")
        self._state.shard_crc32.append(0)

    def _shard_path(self, index: int) -> Path:
        return self._directory / shard_name(index)

    def _files(self) -> list[tuple[str, int, int]]:
        """(name, bytes, crc32) of every file as the state has it."""
        state, size = self._state, self._layout.shard_tokens
        shards = [
            (shard_name(i), min(size, state.num_tokens - i * size) * self._dtype.itemsize, crc32)
            for i, crc32 in enumerate(state.shard_crc32)
        ]
        return [*shards, (DOCUMENT_STARTS, state.num_documents * 8, state.starts_crc32)]

    def _remove_files(self) -> None:
        for path in [*self._directory.glob("shard_*.bin"), self._directory / DOCUMENT_STARTS]:
            path.unlink(missing_ok=True)

    def _cut_back(self) -> None:
        files = self._files()
        for name, size_bytes, _ in files:
            path = self._directory / name
            found = path.stat().st_size if path.exists() else 0
            if found < size_bytes:
                raise DataError(
                    f"{path} has {found} bytes where {size_bytes} were recorded, so this interrupted work "
                    f"cannot go on: remove {self._directory} (or overwrite it) and start again."
                )
            if path.exists():
                os.truncate(path, size_bytes)
        for path in self._directory.glob("shard_*.bin"):
            if path.name not in {name for name, _, _ in files}:
                path.unlink()
        for name, size_bytes, crc32 in files[-2:]:  # closed shards were synced before the next one began
            if size_bytes and file_crc32(self._directory / name) != crc32:
                raise DataError(
                    f"{self._directory / name} is damaged: its checksum is not the recorded one, so this "
                    f"interrupted work cannot go on: remove {self._directory} (or overwrite it), start again."
                )

    def _manifest(self, extra: dict[str, Any]) -> dict[str, Any]:
        state = self._state
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "dtype": self._dtype.name,
            **asdict(self._layout),
            "num_tokens": state.num_tokens,
            "num_documents": state.num_documents,
            "num_bytes": state.num_bytes,
            "max_token_id": state.max_token_id,
            "files": [
                {"name": name, "size_bytes": size_bytes, "crc32": f"{crc32:08x}"}
                for name, size_bytes, crc32 in self._files()
            ],
            "extra": extra,
        }


def _write_fault(directory: Path, error: OSError) -> DataError:
    return DataError(
        f"cannot write token shards to {directory}: {error.strerror or error}. What was recorded before is "
        "unharmed: make room and run the same command again, and it goes on from there."
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    draft = path.with_name(f"{path.name}.tmp")
    with draft.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
