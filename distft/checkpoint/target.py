"""A tool's target directory: used only if it is free, and marked as unfinished until the tool is done."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from distft import storage
from distft.checkpoint.manifest import MANIFEST
from distft.errors import ConfigError

UNFINISHED_MARKER = "UNFINISHED.txt"
_MARKER_TEXT = "Being written from"  # begins the marker
_MOST_MARKER_BYTES = 1 << 16
# What the tools write into a target. Of anything else in it, nobody can say whose it is.
_OWN_NAME = re.compile(
    r"manifest\.json|[\w.-]+\.safetensors(\.index\.json)?|(latest|global_step\d+)(_universal)?|classifier\.md"
    r"|(config|adapter_config|generation_config|tokenizer\w*|special_tokens_map|added_tokens|vocab)\.json"
    r"|tokenizer\.model"
    r"|merges\.txt|chat_template\.\w+"
)


@contextmanager
def target_directory(path: str, source: str) -> Iterator[None]:
    """Create `path`, marked as unfinished, for the block to write into; remove the marker if it succeeds.

    Empties and reuses a directory that an interrupted tool left, which was empty when the marker was put
    there. Raises `ConfigError` if the directory contains anything else, or lies in `source`: existing files
    are never overwritten.
    """
    marker = storage.join(path, UNFINISHED_MARKER)
    require_outside(path, _all_commits(source))
    if _is_within(source, path):
        raise ConfigError(f"the source {source} lies in {path}, which is the target: choose another target.")
    names = storage.list_names(path)
    if names and not (UNFINISHED_MARKER in names and _is_own_marker(marker)):
        raise ConfigError(f"{path} is not empty: choose another target, or remove it.")
    foreign = [name for name in names if name != UNFINISHED_MARKER and not _OWN_NAME.fullmatch(name)]
    if foreign:
        raise ConfigError(
            f"{path} has what an interrupted tool left, but also {', '.join(foreign[:5])}, which distft did "
            "not write: choose another target, or move that elsewhere."
        )
    # The manifest goes first and the marker last, so that an interrupted removal never leaves a directory
    # that could be loaded, or one that could not be reused.
    for name in sorted(set(names) - {UNFINISHED_MARKER}, key=lambda name: name != MANIFEST):
        _remove(storage.join(path, name))
    storage.remove_temporary_files(path)
    storage.make_directory(path)
    storage.commit_bytes(
        marker, f"{_MARKER_TEXT} {source}. While this file is here, the rest is incomplete.\n".encode()
    )
    try:
        yield
    except BaseException:
        if storage.list_names(path) == [UNFINISHED_MARKER]:  # the block failed before it wrote anything
            storage.remove_tree(path)
        raise
    storage.remove(marker)


def _is_own_marker(marker: str) -> bool:
    return storage.size(marker) <= _MOST_MARKER_BYTES and storage.read_bytes(marker).startswith(
        _MARKER_TEXT.encode()
    )


def require_outside(path: str, source: str) -> None:
    """Raise `ConfigError` if the target `path` lies in the directory of a source, which must not change."""
    if _is_within(path, source):
        raise ConfigError(f"{path} lies in the source {source}, which must not change: choose another one.")


def _all_commits(source: str) -> str:
    """The `checkpoints` directory that a commit lies in; otherwise the source itself."""
    local = storage.local_path(source)
    real = source if local is None else str(local.resolve())  # a link to a commit is that commit
    parent = storage.parent(real)
    return parent if parent.rpartition("/")[2] == "checkpoints" else source


def _remove(path: str) -> None:
    if storage.is_directory(path):
        storage.remove_tree(path)
    else:
        storage.remove(path)


def _is_within(path: str, other: str) -> bool:
    here, there = storage.local_path(path), storage.local_path(other)
    if here is None or there is None:
        return f"{path.rstrip('/')}/".startswith(f"{other.rstrip('/')}/")
    return here.resolve().is_relative_to(there.resolve())
