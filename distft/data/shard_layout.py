"""Names, dtype and layout of a directory of token shards. Imports no pydantic: tokenizing processes use it.

A directory contains
- `shard_00000-NAME.bin`, `shard_00001-NAME.bin`, ...: flat little-endian token ids, `shard_tokens` per shard,
  fewer in the last;
- `document_starts-NAME.bin`: little-endian uint64, the position of each document's first token in the
  concatenation of all shards; the first is 0;
- `manifest.json`, written last: shards without it are not committed.

NAME is a digest of the work that wrote them: shards of other work are never overwritten, and a file with the
name is known to be of this work. Directories of format version 1 have names without it.
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from distft.errors import ConfigError

MANIFEST = "manifest.json"
_STARTS = "document_starts"
_WORK_NAME = re.compile(r"-[0-9a-f]+(?=\.bin$)")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Little-endian dtype of a shard's ids: uint16 if the vocabulary fits, else uint32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def shard_name(index: int, work: str = "") -> str:
    """File name of a shard that the work named `work` wrote."""
    return f"shard_{index:05d}{work and f'-{work}'}.bin"


def starts_name(work: str = "") -> str:
    """File name of the positions of documents."""
    return f"{_STARTS}{work and f'-{work}'}.bin"


def name_without_work(name: str) -> str:
    """The file name as in format version 1, equal for equal content."""
    return _WORK_NAME.sub("", name)


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
