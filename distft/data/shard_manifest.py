"""The manifest of token shards: validated as it is parsed, so that nothing in it is trusted."""

import json
import os
import stat
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, ValidationError, model_validator

from distft import storage
from distft.config import Settings
from distft.data.shard_layout import (
    MANIFEST,
    name_without_work,
    shard_name,
    starts_name,
    token_dtype,
)
from distft.errors import DataError
from distft.storage import AnyPath, join

_MAX_BYTES = 1 << 28  # of a manifest: 2 million shards
_MAX_COUNT = 1 << 62
_MAX_PROBLEMS = 5  # told of one manifest

ShardFileName = Annotated[str, Field(pattern=r"^(shard_[0-9]{5,12}|document_starts)(-[0-9a-f]{1,64})?\.bin$")]


class ShardFile(Settings):
    """A shard or the positions of documents: its name in the directory, and how to verify it."""

    model_config = ConfigDict(strict=True)

    name: ShardFileName
    size_bytes: int = Field(ge=0, lt=_MAX_COUNT)
    crc32: str = Field(pattern=r"^[0-9a-f]{8}$")


class ShardManifest(Settings):
    """What a directory of token shards contains."""

    model_config = ConfigDict(strict=True)

    format: Literal["distft-token-shards"]
    format_version: Literal[1, 2]
    dtype: Literal["uint16", "uint32"]
    vocab_size: int = Field(ge=1, le=1 << 32)
    tokenizer_fingerprint: str
    shard_tokens: int = Field(ge=1, lt=_MAX_COUNT)
    bos_id: int | None = Field(ge=0)
    eos_id: int | None = Field(ge=0)
    pad_id: int | None = Field(ge=0)
    num_tokens: int = Field(ge=1, lt=_MAX_COUNT)
    num_documents: int = Field(ge=1, lt=_MAX_COUNT >> 3)
    num_bytes: int = Field(ge=0)  # of the tokenized text in UTF-8
    max_token_id: int = Field(ge=0)
    files: list[ShardFile]  # the shards in order, then the positions of documents
    extra: dict[str, Any]

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        if self.dtype != token_dtype(self.vocab_size).name:
            raise ValueError(f"dtype {self.dtype} is not that of a vocabulary of {self.vocab_size}")
        if self.max_token_id >= self.vocab_size:
            raise ValueError(f"max_token_id {self.max_token_id} is outside vocab_size {self.vocab_size}")
        names = [file.name for file in self.files]
        num_shards = -(-self.num_tokens // self.shard_tokens)
        if len(names) != num_shards + 1:
            raise ValueError(f"{num_shards} shards and document_starts are needed, not {len(names)} files")
        expected = [*map(shard_name, range(num_shards)), starts_name()]
        if [name_without_work(name) for name in names] != expected:
            raise ValueError("files must be the shards in order, and then document_starts")
        for file, size_bytes in zip(self.files, self._sizes(num_shards), strict=True):
            if file.size_bytes != size_bytes:
                raise ValueError(
                    f"{file.name} must have {size_bytes} bytes for num_tokens, not {file.size_bytes}"
                )
        return self

    def _sizes(self, num_shards: int) -> list[int]:
        itemsize = token_dtype(self.vocab_size).itemsize
        last = self.num_tokens - (num_shards - 1) * self.shard_tokens
        return [*[self.shard_tokens * itemsize] * (num_shards - 1), last * itemsize, self.num_documents * 8]

    @property
    def shards(self) -> list[ShardFile]:
        return self.files[:-1]

    @property
    def document_starts(self) -> ShardFile:
        return self.files[-1]

    def to_bytes(self) -> bytes:
        """JSON, which `from_bytes` reads: it is parsed again before it is returned."""
        data = (
            json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True, allow_nan=False).encode()
            + b"\n"
        )
        self.from_bytes(data, MANIFEST)
        return data

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "ShardManifest":
        """Parse the content of the file `where`. Raises `DataError` with what is wrong in it."""
        again = "Restore it from a copy, or make the shards again with this version of distft."
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            shown = [_problem(dict(found)) for found in error.errors()[:_MAX_PROBLEMS]]
            raise DataError(f"{where} is not a token shard manifest: {'; '.join(shown)}. {again}") from None


def _problem(found: dict[str, Any]) -> str:
    place = ".".join(map(str, found["loc"]))
    value = "" if isinstance(found["input"], dict | list | bytes) else f" (it has {found['input']!r:.60})"
    return f"{place}: {found['msg']}{value}" if place else str(found["msg"])


def read_manifest(directory: AnyPath) -> ShardManifest | None:
    """The manifest in `directory`, or None if there is none. Raises `DataError` if it is not one."""
    path = join(directory, MANIFEST)
    local = storage.local_path(path)
    try:
        if local is not None:
            require_regular_file(local)
        num_bytes = storage.size(path)
        if num_bytes > _MAX_BYTES:
            raise DataError(f"{path} has {num_bytes:,} bytes: a manifest has at most {_MAX_BYTES:,}.")
        data = storage.read_bytes(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    return ShardManifest.from_bytes(data, path)


def require_regular_file(path: Path) -> os.stat_result:
    """The status of a file. Raises `DataError` for what is no file (a directory, FIFO, device or socket)."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        kind = "a directory" if stat.S_ISDIR(found.st_mode) else "a FIFO, device or socket"
        raise DataError(f"{path} is {kind}, where a file of token shards is expected.")
    return found
