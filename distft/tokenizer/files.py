"""The files of a tokenizer in a directory: their names, which of them to load, and reading them.

Imports neither sentencepiece, the tokenizers library nor NumPy.
"""

import json
import re
from typing import Any

from distft import storage
from distft.errors import DataError
from distft.storage import AnyPath

SENTENCEPIECE_FILE = "tokenizer.model"
T5_FILE = "spiece.model"  # the same under T5's name
LIBRARY_FILE = "tokenizer.json"  # of the tokenizers library
CONFIG_FILE, SPECIAL_MAP, ADDED_TOKENS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
CHAT_TEMPLATE_FILE = "chat_template.jinja"  # of transformers; older ones have it in tokenizer_config.json
COMPANION_FILES = (CONFIG_FILE, SPECIAL_MAP, ADDED_TOKENS, CHAT_TEMPLATE_FILE)  # beside either
VOCAB_TXT, VOCAB_JSON, MERGES = "vocab.txt", "vocab.json", "merges.txt"  # of BERT; of GPT-2
# What distft writes into a checkpoint and beside token shards; the main file is one of the first two.
OWN_FILES = (SENTENCEPIECE_FILE, LIBRARY_FILE, *COMPANION_FILES)

MAX_FILE_BYTES = 64 << 20  # of one file but a sentencepiece model; the largest in use has 35 MiB
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\s")
_HEAD_BYTES = 256


def find_tokenizer_file(directory: AnyPath) -> str | None:
    """The name of the file in `directory` that `Tokenizer.load` takes, or None.

    A tokenizer.model of tiktoken, as beside Llama 3, does not count.
    """

    def has(name: str) -> bool:
        path = storage.join(directory, name)
        return storage.exists(path) and not storage.is_directory(path)

    if has(SENTENCEPIECE_FILE) and not _is_tiktoken(storage.join(directory, SENTENCEPIECE_FILE)):
        return SENTENCEPIECE_FILE
    if has(T5_FILE):
        return T5_FILE
    if has(LIBRARY_FILE):
        return LIBRARY_FILE
    if has(VOCAB_TXT):
        return VOCAB_TXT
    return VOCAB_JSON if has(VOCAB_JSON) and has(MERGES) else None


def _is_tiktoken(path: str) -> bool:
    try:
        return bool(_TIKTOKEN_LINE.match(storage.read_range(path, 0, min(storage.size(path), _HEAD_BYTES))))
    except OSError:
        return False  # reading it whole tells why


def read_bounded(path: AnyPath, max_bytes: int = MAX_FILE_BYTES) -> bytes | None:
    """A file's content; None if there is no file. Raises `DataError` if it cannot be or is too large."""
    try:
        return read_limited(path, max_bytes)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from error


def read_limited(path: AnyPath, max_bytes: int, *, subject: str = "") -> bytes:
    """A file's content. Raises `OSError`, and `DataError` if it is too large or a git-LFS pointer.

    `subject` stands before the path in the message on its size.
    """
    size = storage.size(path)
    if size > max_bytes:
        raise DataError(f"{subject}{path} has {size:,} bytes, more than a tokenizer's file can have.")
    data = storage.read_range(path, 0, size)
    storage.check_not_lfs_pointer(path, data)
    return data


def json_object(path: AnyPath, data: bytes) -> dict[str, Any]:
    """The JSON object that `data`, the content of `path`, is. Raises `DataError`."""
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise DataError(f"{path} is not JSON: {reason}.") from None
    if not isinstance(raw, dict):
        raise DataError(f"{path} is JSON, but not an object.")
    return raw
