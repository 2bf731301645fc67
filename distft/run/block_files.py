"""Blocks of rows with what a model gives them, in files that survive an interruption."""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from distft import storage
from distft.errors import ConfigError
from distft.storage import checksum_of_bytes

_IDENTITY = "predictions.json"


class BlockFiles:
    """The predictions of blocks of rows, in `output`.parts: each file is complete or not there."""

    def __init__(self, output: str, identity: Mapping[str, Any]) -> None:
        """`identity` is what the predictions depend on."""
        self._directory = f"{output}.parts"
        self._identity = json.dumps(identity, indent=1, sort_keys=True).encode()

    @property
    def directory(self) -> str:
        """Where the blocks are."""
        return self._directory

    def stored_identity(self) -> dict[str, Any] | None:
        """That of the blocks that are there; None if there are none, {} if it cannot be read."""
        path = storage.join(self._directory, _IDENTITY)
        if not storage.exists(path):
            return None
        try:
            stored = json.loads(storage.read_bytes(path))
        except ValueError:
            return {}
        return stored if isinstance(stored, dict) else {}

    def open(self) -> None:
        """Begin, or go on. Raises `ConfigError` if the directory has the blocks of other predictions."""
        path = storage.join(self._directory, _IDENTITY)
        if storage.exists(self._directory) and not storage.is_directory(self._directory):
            raise ConfigError(
                f"{self._directory} is a file, and a directory is needed: choose another output."
            )
        if storage.exists(path):
            if storage.read_bytes(path) == self._identity:
                return
            raise ConfigError(
                f"{self._directory} has predictions of another model, other data or other settings, which an "
                "interrupted command left: repeat that command, remove it, or choose another output."
            )
        if storage.list_names(self._directory):
            raise ConfigError(f"{self._directory} is no directory of distft: choose another output.")
        storage.make_directory(self._directory)
        storage.commit_bytes(path, self._identity)

    def _path(self, start: int) -> str:
        return storage.join(self._directory, f"rows_{start:012d}.jsonl")

    def has(self, start: int, num_rows: int) -> bool:
        """Whether the block is there, whole and unchanged; one that is damaged is to be written again."""
        path = self._path(start)
        if storage.is_directory(path):
            raise ConfigError(f"{path} is a directory: remove it.")
        if not storage.exists(path):
            return False
        content, checksum = self._parts(path)
        return checksum_of_bytes(content).encode() == checksum and content.count(b"\n") == num_rows

    def _parts(self, path: str) -> tuple[bytes, bytes]:
        """A line of JSON for each row, and the last line: the checksum of these."""
        content, newline, checksum = storage.read_bytes(path).removesuffix(b"\n").rpartition(b"\n")
        return content + newline, checksum

    def write(self, start: int, predictions: Iterable[Mapping[str, Any]]) -> None:
        content = b"".join(json_line(prediction) for prediction in predictions)
        storage.commit_bytes(self._path(start), content + checksum_of_bytes(content).encode() + b"\n")

    def read(self, start: int) -> Iterator[dict[str, Any]]:
        """The predictions of a block that `has` finds whole."""
        content, _ = self._parts(self._path(start))
        for line in content.decode().split("\n")[:-1]:
            yield json.loads(line)

    def remove(self, starts: Iterable[int]) -> None:
        """Remove these blocks, and the directory if nothing else is in it."""
        names = [*(self._path(start).rpartition("/")[2] for start in starts), _IDENTITY]
        storage.remove_files(self._directory, names)


def json_line(prediction: Mapping[str, Any]) -> bytes:
    """A line of JSON."""
    return (json.dumps(prediction, ensure_ascii=False) + "\n").encode()
