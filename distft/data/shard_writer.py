"""Writes token shards in bounded memory; resumable, and committed by the manifest."""

import os
import zlib
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from distft import storage
from distft.data.shard_layout import MANIFEST, ShardLayout, shard_name, starts_name, token_dtype
from distft.data.shard_manifest import ShardFile, ShardManifest
from distft.data.shards import file_crc32
from distft.errors import DataError
from distft.storage import join


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

    The files get the name `work` in theirs; no other file is overwritten or removed. A writer that died
    resumes from the `WriterProgress` that its last `flush` returned. A failed write (a full disk) raises
    `DataError` and leaves everything up to that progress intact.

    Shards for a URL `target` are written to the local `directory` one at a time, and sent when they are full.
    """

    def __init__(
        self,
        directory: str | Path,
        layout: ShardLayout,
        progress: WriterProgress | None = None,
        *,
        work: str = "",
        target: str | None = None,
        replace: bool = False,
    ) -> None:
        """Start anew, or resume from `progress`: what the writer's own files have beyond it is cut off.

        Raises `DataError` if there is a manifest, unless `commit` is to `replace` it, or if the files do not
        match `progress`.
        """
        self._directory = Path(directory)
        self._target = target
        self._layout = layout
        self._work = work
        self._dtype = token_dtype(layout.vocab_size)
        self._progress = progress or WriterProgress()
        # Without a name of its own work, a file that is there already may be anyone's.
        self._create_mode = "xb" if progress is None and not work else "wb"
        if not replace and storage.exists(join(self.destination, MANIFEST)):
            raise DataError(
                f"{self.destination} already has committed token shards: choose another directory."
            )
        storage.make_directory(self._directory)
        if progress is not None:
            self._cut_to_progress()
        starts = self._directory / starts_name(work)
        self._starts = self._open(starts, "ab" if progress else self._create_mode)
        self._shard: BinaryIO | None = None
        self._sent: list[Path] = []  # local copies that may go once the progress beyond them is recorded

    @property
    def destination(self) -> str:
        """The directory or URL of the committed shards."""
        return str(self._directory) if self._target is None else self._target

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
            low = 0 if tokens.dtype.kind == "u" else int(tokens.min())
            high = int(tokens.max())
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

    def flush(self, *, sync: bool = False) -> WriterProgress:
        """Flush the files to the operating system; return the progress to resume from.

        With `sync` they and their directory are on the disk, and survive a power failure.
        """
        try:
            for file in (self._starts, self._shard):
                if file is not None:
                    file.flush()
                    if sync:
                        os.fsync(file.fileno())
            if sync:
                storage.sync_names(self._directory)
        except OSError as error:
            raise _write_error(self._directory, error) from error
        return self._progress

    def remove_sent(self) -> None:
        """Remove the local copies of sent shards. Call it when the progress beyond them is recorded."""
        while self._sent:
            self._sent.pop().unlink(missing_ok=True)

    def commit(self, extra: dict[str, Any] | None = None) -> ShardManifest:
        """Sync the files to disk and send them, then write the manifest, which stores `extra`."""
        if self._progress.num_tokens == 0:
            raise DataError(f"{self._directory}: no tokens were written, so there is nothing to commit.")
        self.flush(sync=True)
        manifest = self._manifest(extra or {})
        try:
            self._end_shard()
            self._starts.close()
            if self._target is not None:
                self._send(manifest.document_starts)
            storage.commit_bytes(join(self.destination, MANIFEST), manifest.to_bytes())
        except OSError as error:
            raise _write_error(self._directory, error) from error
        return manifest

    def abort(self) -> None:
        """Close the files without sync, ignoring errors. Does nothing after `commit`."""
        # A lost buffer lies beyond the last progress, where resuming cuts the file anyway.
        with suppress(OSError), ExitStack() as files:
            for file in (self._starts, self._shard):
                if file:
                    files.callback(file.close)

    def _write_tokens(self, tokens: NDArray[Any]) -> None:
        progress, num_written = self._progress, 0
        while num_written < len(tokens):
            shard_size = progress.num_tokens % self._layout.shard_tokens
            if shard_size == 0:
                self._start_next_shard()
            elif self._shard is None:
                self._shard = self._open(self._shard_path(len(progress.shard_crc32) - 1), "ab")
            ids = tokens[num_written : num_written + self._layout.shard_tokens - shard_size]
            data = np.ascontiguousarray(ids).view(np.uint8).data
            assert self._shard is not None
            self._shard.write(data)
            progress.shard_crc32[-1] = zlib.crc32(data, progress.shard_crc32[-1])
            progress.num_tokens += len(ids)
            num_written += len(ids)

    def _start_next_shard(self) -> None:
        self._end_shard()
        self._shard = self._open(self._shard_path(len(self._progress.shard_crc32)), self._create_mode)
        self._progress.shard_crc32.append(0)

    def _end_shard(self) -> None:
        """Sync the last shard to disk, and send it to the target; a resumed writer may not have opened it."""
        if self._shard is not None:
            self._shard.flush()
            os.fsync(self._shard.fileno())
            self._shard.close()
            self._shard = None
        if self._target is not None and self._progress.shard_crc32:
            self._send(self._shard_file(len(self._progress.shard_crc32) - 1))

    def _send(self, file: ShardFile) -> None:
        storage.copy(self._directory / file.name, join(self.destination, file.name))
        self._sent.append(self._directory / file.name)

    def _shard_path(self, index: int) -> Path:
        return self._directory / shard_name(index, self._work)

    def _open(self, path: Path, mode: str) -> BinaryIO:
        try:
            return cast("BinaryIO", path.open(mode))
        except FileExistsError:
            raise DataError(
                f"{path} exists, and no manifest or record says who wrote it: choose another directory."
            ) from None

    def _files(self) -> list[ShardFile]:
        """Name, size and checksum that the progress implies for every file."""
        progress = self._progress
        starts = ShardFile(
            name=starts_name(self._work),
            size_bytes=progress.num_documents * 8,
            crc32=f"{progress.starts_crc32:08x}",
        )
        return [*map(self._shard_file, range(len(progress.shard_crc32))), starts]

    def _shard_file(self, index: int) -> ShardFile:
        progress, shard_tokens = self._progress, self._layout.shard_tokens
        num_tokens = min(shard_tokens, progress.num_tokens - index * shard_tokens)
        return ShardFile(
            name=shard_name(index, self._work),
            size_bytes=num_tokens * self._dtype.itemsize,
            crc32=f"{progress.shard_crc32[index]:08x}",
        )

    def _cut_to_progress(self) -> None:
        files = self._files()
        closed, recent = files[:-2], files[-2:]  # the open shard, and the positions of documents
        found = storage.list_sizes(self.destination) if closed else {}
        for file in closed:  # they were synced, and sent to the target, when they were closed
            if found.get(file.name) != file.size_bytes:
                num_bytes = found.get(file.name, 0)
                raise self._cannot_resume(file, f"has {num_bytes} bytes where {file.size_bytes}")
        for file in recent:
            path = self._directory / file.name
            num_bytes = path.stat().st_size if path.exists() else 0
            if num_bytes < file.size_bytes:
                raise self._cannot_resume(file, f"has {num_bytes} bytes where {file.size_bytes}")
            if not path.exists():
                continue
            with path.open("r+b") as opened:
                opened.truncate(file.size_bytes)
                os.fsync(opened.fileno())
            if file_crc32(path) != int(file.crc32, 16):
                raise self._cannot_resume(file, "is damaged: other checksums than its own")

    def _cannot_resume(self, file: ShardFile, problem: str) -> DataError:
        return DataError(
            f"{join(self.destination, file.name)} {problem} were recorded, so the interrupted work cannot be "
            "resumed: overwrite it to start again."
        )

    def _manifest(self, extra: dict[str, Any]) -> ShardManifest:
        progress = self._progress
        return ShardManifest(
            format="distft-token-shards",
            format_version=2,
            dtype=self._dtype.name,  # type: ignore[arg-type]  # validated
            **asdict(self._layout),
            num_tokens=progress.num_tokens,
            num_documents=progress.num_documents,
            num_bytes=progress.num_bytes,
            max_token_id=progress.max_token_id,
            files=self._files(),
            extra=extra,
        )


def _write_error(directory: Path, error: OSError) -> DataError:
    return DataError(
        f"cannot write token shards to {directory}: {error.strerror or error}. Work recorded so far is "
        "intact: free disk space and run the same command again to resume."
    )
