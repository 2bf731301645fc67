"""Encoded rows of one file, made by one of the processes that need them and read by the others.

Ranks read their data before they can talk to each other, so they meet in a directory: one takes a file lock,
encodes and writes the rows, and the others, who waited for the lock, map them into memory.
"""

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from distft.data.batch import RaggedArray
from distft.data.sampler import Indices
from distft.errors import DataError

_FACTS = "facts.json"
_VERSION = 3  # of the rows that a configuration gives: raise it with any change of them
_HASHED_BYTES = 1 << 20  # at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedTable:
    """Token rows with numbers for each row, and what else is known about them."""

    rows: RaggedArray
    columns: Mapping[str, Indices]  # a value for each row
    facts: Mapping[str, Any]  # JSON


def encoded_once(
    directory: str | None, path: str, settings: Mapping[str, Any], encode: Callable[[], EncodedTable]
) -> EncodedTable:
    """The result of `encode`, which a process with the same `directory` may have left there.

    `path` is the file that `encode` reads and `settings` all else that its result depends on. Without a
    directory, or where files cannot be locked or written, each process encodes for itself. A `DataError` is
    left for the others too, unless the storage caused it.
    """
    digest = None if directory is None else _digest(path, settings)
    if directory is None or digest is None:
        return encode()
    entry = Path(directory, digest)
    with ExitStack() as stack:
        try:
            stack.enter_context(_locked(entry.with_suffix(".lock")))
        except OSError:  # such as a file system without locks
            return encode()
        return _read(entry) or _encoded(entry, encode)


def _encoded(entry: Path, encode: Callable[[], EncodedTable]) -> EncodedTable:
    """The result of `encode`, left in `entry` if that can be written."""
    try:
        table = encode()
    except DataError as error:
        if error.__cause__ is None:
            with suppress(OSError):
                _write(entry, None, str(error))
        raise
    with suppress(OSError):
        _write(entry, table)
    return table


def _digest(path: str, settings: Mapping[str, Any]) -> str | None:
    """Of the settings and the file's content; None if it cannot be read, which `encode` reports."""
    digest = blake2b(json.dumps([_VERSION, settings], sort_keys=True).encode(), digest_size=16)
    try:
        with fsspec.open(path, "rb") as file:
            while chunk := file.read(_HASHED_BYTES):
                digest.update(chunk)
    except (OSError, ValueError):
        return None
    return digest.hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the file's lock, for which it waits; the system releases the lock of a process that dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(entry: Path, table: EncodedTable | None, problem: str = "") -> None:
    """Write an entry under another name and rename it. Only the holder of the lock calls this."""
    unfinished = entry.with_suffix(".part")
    if unfinished.exists():
        shutil.rmtree(unfinished)  # of a process that died
    unfinished.mkdir()
    facts: dict[str, Any] = {"problem": problem}
    if table is not None:
        facts["table"] = dict(table.facts)
        facts["columns"] = list(table.columns)
        for name, array in (*table.rows.arrays().items(), *table.columns.items()):
            np.save(unfinished / f"{name}.npy", array, allow_pickle=False)
    (unfinished / _FACTS).write_text(json.dumps(facts))
    unfinished.rename(entry)


def _read(entry: Path) -> EncodedTable | None:
    """The table of an entry; None if there is none, or a damaged one. Raises the `DataError` that is left."""
    try:
        facts = json.loads((entry / _FACTS).read_text())
        if facts["problem"]:
            raise DataError(str(facts["problem"]))
        rows = RaggedArray.of_arrays(_array(entry, "values", np.int32), _array(entry, "offsets", np.int64))
        columns = {name: _array(entry, name, np.int64) for name in facts["columns"]}
        if any(len(column) != len(rows) for column in columns.values()):
            raise ValueError
        return EncodedTable(rows=rows, columns=columns, facts=facts["table"])
    except (OSError, ValueError, KeyError, TypeError):
        shutil.rmtree(entry, ignore_errors=True)  # damaged: made again
        return None


def _array(entry: Path, name: str, dtype: type) -> Any:
    """An array of one dimension, mapped into memory: the processes of a machine share it."""
    path = entry / f"{Path(name).name}.npy"
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.ndim != 1 or array.dtype != dtype:
        raise ValueError(path)
    return array
