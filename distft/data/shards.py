"""Token shards on disk: file layout and memory-mapped reading (`shard_writer` writes them).

A directory contains
- `shard_00000.bin`, `shard_00001.bin`, ...: flat little-endian token ids, `shard_tokens` per shard, fewer in
  the last;
- `document_starts.bin`: little-endian uint64, the position of each document's first token in the
  concatenation of all shards; the first is 0;
- `manifest.json`, written last: shards without it are not committed.
"""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_hexdigest

from distft.errors import ConfigError, DataError

FORMAT = "distft-token-shards"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
DOCUMENT_STARTS = "document_starts.bin"
_READ_BYTES = 1 << 22


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Little-endian dtype of a shard's ids: uint16 if the vocabulary fits, else uint32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def shard_name(index: int) -> str:
    return f"shard_{index:05d}.bin"


@dataclass(frozen=True, kw_only=True)
class ShardLayout:
    """Parameters of a set of shards, fixed before the first token is written."""

    vocab_size: int
    tokenizer_fingerprint: str
    shard_tokens: int  # per shard, except the last
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None

    def __post_init__(self) -> None:
        if self.shard_tokens < 1 or self.vocab_size < 1:
            raise ConfigError(
                f"shard_tokens={self.shard_tokens} and vocab_size={self.vocab_size} must both be at least 1."
            )


class TokenShards:
    """Committed token shards, read through memory maps.

    Opening checks file sizes; `verify` checks the checksums, which takes a full read.
    """

    def __init__(self, directory: Path, manifest: dict[str, Any]) -> None:
        self.directory = directory
        self.vocab_size: int = manifest["vocab_size"]
        self.tokenizer_fingerprint: str = manifest["tokenizer_fingerprint"]
        self.bos_id: int | None = manifest["bos_id"]
        self.eos_id: int | None = manifest["eos_id"]
        self.pad_id: int | None = manifest["pad_id"]
        self.num_tokens: int = manifest["num_tokens"]
        self.num_documents: int = manifest["num_documents"]
        self.num_bytes: int = manifest["num_bytes"]  # UTF-8 bytes of the tokenized text
        self.max_token_id: int = manifest["max_token_id"]
        self.extra: dict[str, Any] = manifest["extra"]
        self.dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        self._shard_tokens: int = manifest["shard_tokens"]
        self._files: list[dict[str, Any]] = manifest["files"]
        self._check_sizes()
        self._shards = [
            np.memmap(directory / file["name"], dtype=self.dtype, mode="r")
            for file in self._files
            if file["name"] != DOCUMENT_STARTS
        ]
        # uint64 on disk, read as int64: no position reaches 2**63.
        self.document_starts: NDArray[np.int64] = np.memmap(
            directory / DOCUMENT_STARTS, dtype="<i8", mode="r"
        )

    @property
    def fingerprint(self) -> str:
        """A digest of the checksums of all files, so equal for a copy of the directory."""
        checksums = json.dumps([[file["name"], file["crc32"]] for file in self._files])
        return xxh3_64_hexdigest(checksums.encode())

    @classmethod
    def open(cls, path: str | Path) -> "TokenShards":
        """Open the shards in the local directory `path`.

        Raises `DataError` if they are not committed, a file is missing or has the wrong size, or the format
        version is unknown.
        """
        directory = Path(path)
        try:
            manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(_not_committed_message(directory)) from None
        except (OSError, ValueError) as error:
            raise DataError(f"{directory / MANIFEST} cannot be read: {error}.") from error
        version = manifest.get("format_version") if isinstance(manifest, dict) else None
        if version != FORMAT_VERSION or manifest.get("format") != FORMAT:
            raise DataError(
                f"{directory / MANIFEST} is not a token shard manifest of version {FORMAT_VERSION} "
                f"(it says {version!r}): make the shards again with this version of distft."
            )
        return cls(directory, manifest)

    def tokens(self, start: int, stop: int) -> NDArray[Any]:
        """Ids [start, stop) of the concatenation of all shards, in their dtype on disk.

        A view into the file if the range lies in one shard.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of {self.num_tokens} in {self.directory}")
        slices = []
        while start < stop:
            shard, offset = divmod(start, self._shard_tokens)
            ids = self._shards[shard][offset : offset + stop - start]
            slices.append(ids)
            start += len(ids)
        if len(slices) == 1:
            return slices[0].view(np.ndarray)
        return np.concatenate(slices) if slices else np.empty(0, self.dtype)

    def document_ids(self, start: int, stop: int) -> NDArray[np.int64]:
        """Document number of each of the tokens [start, stop)."""
        first = int(np.searchsorted(self.document_starts, start, side="right")) - 1
        last = int(np.searchsorted(self.document_starts, stop, side="left"))
        ids = np.zeros(stop - start, dtype=np.int64)
        np.add.at(ids, self.document_starts[first + 1 : last] - start, 1)
        return np.cumsum(ids) + first

    def verify(self) -> None:
        """Read all files; raise `DataError` with every file whose checksum differs from the manifest."""
        damaged = [
            str(self.directory / file["name"])
            for file in self._files
            if file_crc32(self.directory / file["name"]) != int(file["crc32"], 16)
        ]
        if damaged:
            raise DataError(
                f"damaged (checksum differs from the manifest): {', '.join(damaged)}. "
                "Restore these files from a copy, or tokenize again."
            )

    def _check_sizes(self) -> None:
        problems = []
        for file in self._files:
            path = self.directory / file["name"]
            found = path.stat().st_size if path.exists() else None
            if found is None:
                problems.append(f"{path} is missing")
            elif found != file["size_bytes"]:
                problems.append(f"{path} has {found} bytes, its manifest says {file['size_bytes']}")
        if problems:
            raise DataError("\n".join(problems) + "\nRestore from a copy, or tokenize again.")


def _not_committed_message(directory: Path) -> str:
    if not directory.exists():
        return f"{directory} does not exist: make token shards with `distft tokenize`."
    below = sorted(path.parent.name for path in directory.glob(f"*/{MANIFEST}"))
    if below:
        return f"{directory} has no {MANIFEST}; name a subdirectory that has one: {', '.join(below)}."
    return (
        f"{directory} has no {MANIFEST}: its token shards were never finished. "
        "Run the same `distft tokenize` again: it resumes where it stopped."
    )


def file_crc32(path: Path) -> int:
    crc32 = 0
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            crc32 = zlib.crc32(data, crc32)
    return crc32
