"""A directory that a tool writes into: taken only if it is free, and marked until the tool is done."""

from collections.abc import Iterator
from contextlib import contextmanager

from distft import storage
from distft.checkpoint.manifest import MANIFEST
from distft.errors import ConfigError

UNFINISHED = "UNFINISHED.txt"


@contextmanager
def new_directory(path: str, source: str) -> Iterator[None]:
    """Make `path` for what is made of `source`.

    A directory that an interrupted run of a tool left is emptied and used again. Raises `ConfigError` for
    one that holds anything else, or is the source: what is there is never written over.
    """
    mark = storage.join(path, UNFINISHED)
    check_outside(path, _all_commits(source))
    names = storage.list_names(path)
    if names and UNFINISHED not in names:
        raise ConfigError(f"{path} is not empty: choose another target, or remove it.")
    # The manifest goes first and the mark last: a death on the way leaves what nobody loads or keeps.
    for name in sorted(set(names) - {UNFINISHED}, key=lambda name: name != MANIFEST):
        _remove(storage.join(path, name))
    storage.remove_drafts(path)
    storage.make_directory(path)
    storage.commit_bytes(
        mark, f"Being made of {source}. While this file is here, the rest is not whole.\n".encode()
    )
    try:
        yield
    except BaseException:
        if storage.list_names(path) == [UNFINISHED]:  # refused before anything was written
            storage.remove_tree(path)
        raise
    storage.remove(mark)


def check_outside(path: str, source: str) -> None:
    """Refuse a target within the directory of a source, which stays as it is: raises `ConfigError`."""
    if _is_within(path, source):
        raise ConfigError(f"{path} lies in the source {source}, which stays as it is: choose another target.")


def _all_commits(source: str) -> str:
    """The `checkpoints` of the run that a commit lies in; else the source itself."""
    above = storage.parent(source)
    return above if above.rpartition("/")[2] == "checkpoints" else source


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
