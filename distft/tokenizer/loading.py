"""Loads and imports tokenizers: finds out of which kind a file or directory is."""

from pathlib import Path

from distft import storage
from distft.errors import ConfigError, DataError
from distft.storage import AnyPath
from distft.tokenizer.files import (
    LIBRARY_FILE,
    MAX_FILE_BYTES,
    MERGES,
    OWN_FILES,
    SENTENCEPIECE_FILE,
    T5_FILE,
    VOCAB_JSON,
    VOCAB_TXT,
    find_tokenizer_file,
    read_limited,
)
from distft.tokenizer.interface import Tokenizer
from distft.tokenizer.model_proto import MAX_MODEL_BYTES
from distft.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer

_OF_LIBRARY = {LIBRARY_FILE, VOCAB_TXT, VOCAB_JSON, MERGES}


def load_tokenizer(path: AnyPath) -> Tokenizer:
    """See `Tokenizer.load`."""
    path = _file_at(path)
    name = str(path).rpartition("/")[2]
    data = _read(path, name)
    if name not in _OF_LIBRARY and not name.endswith(".json") and data[:1] != b"{":
        return SentencePieceTokenizer.with_companions(path, data)
    from distft.tokenizer.library_files import read_library_files
    from distft.tokenizer.library_tokenizer import LibraryTokenizer

    files = read_library_files(path, data)
    try:
        return LibraryTokenizer(files)
    except DataError as error:
        reason = str(error).removeprefix(f"{LIBRARY_FILE}: ").removeprefix(f"{LIBRARY_FILE} ")
        raise type(error)(f"tokenizer {path}: {reason}") from error


def _file_at(path: AnyPath) -> AnyPath:
    if not (storage.exists(path) and storage.is_directory(path)):
        return path
    name = find_tokenizer_file(path)
    if name is None:
        raise DataError(
            f"tokenizer {path} is a directory without a tokenizer: it has neither {SENTENCEPIECE_FILE} nor "
            f"{T5_FILE}, {LIBRARY_FILE}, {VOCAB_TXT}, or {VOCAB_JSON} with {MERGES}. Name a file of another "
            "name itself."
        )
    return storage.join(path, name)


def _read(path: AnyPath, name: str) -> bytes:
    """The bytes of a tokenizer's file. Raises `DataError`, with what can be done about it."""
    max_bytes = MAX_FILE_BYTES if name in _OF_LIBRARY else MAX_MODEL_BYTES
    try:
        return read_limited(path, max_bytes, subject="tokenizer ")
    except OSError as error:
        there = find_tokenizer_file(storage.parent(path))
        hint = "" if there is None else f" {storage.parent(path)} has a {there}: name that."
        raise DataError(
            f"tokenizer {path} cannot be read: {error}. Train one with `distft tokenizer train`, or "
            f"name that of a model: its tokenizer.model, {LIBRARY_FILE} or directory.{hint}"
        ) from error


def require_tokenizer_target(path: str | Path) -> None:
    """Raise `ConfigError` if a file there, or in the directory, is no tokenizer: it would be replaced."""
    local = storage.local_path(path)
    if local is not None and local.name == LIBRARY_FILE:
        local = local.parent  # other files are written beside it
    if local is None or not local.exists() or (local.is_file() and local.stat().st_size == 0):
        return
    if local.is_dir() and not any((local / name).exists() for name in OWN_FILES):
        return
    try:
        Tokenizer.load(local)
    except DataError:
        raise ConfigError(
            f"{path} exists and is no tokenizer, so it is not overwritten: choose another output."
        ) from None


def import_tokenizer(path: str | Path, output: str | Path) -> Tokenizer:
    """Copy a tokenizer to `output`: a sentencepiece model to a file, another to a directory.

    The file has what the files beside the model add to it. Checks that it loads and encodes; raises
    `DataError` otherwise, and `ConfigError` if something else than a tokenizer is at `output`.
    """
    tokenizer = Tokenizer.load(path)
    require_tokenizer_target(output)
    tokenizer.encode("trial text")
    tokenizer.save(output)
    return tokenizer
