"""Reads a file of JSON lines as it grows, without reading what it has read again."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distft.errors import ConfigError
from distft.tracker.jsonl import parse_line

_MOST_LINE_BYTES = 1 << 24  # a longer one is no line of distft


class GrowingLines:
    """The objects in a file's lines. A line that is still being written is not read yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_unreadable = 0  # lines that are no JSON object
        self._records: list[dict[str, Any]] = []
        self._num_taken = 0  # by `read_new`
        self._position = 0
        self._identity: tuple[int, int] | None = None

    def read(self) -> Sequence[dict[str, Any]]:
        """All of them, of the file as it is now; none without a file.

        A resume replaces the file by a shorter one, and is then read from its beginning. Raises `ConfigError`
        if it is no file, or may not be read.
        """
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            self._restart(None)
            return self._records
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be read: {error.strerror}.") from None
        with file:
            found = os.fstat(file.fileno())
            identity = (found.st_dev, found.st_ino)
            if identity != self._identity or found.st_size < self._position:
                self._restart(identity)
            file.seek(self._position)
            while (line := file.readline(_MOST_LINE_BYTES)).endswith(b"\n") or len(line) == _MOST_LINE_BYTES:
                self._position += len(line)
                self._add(line)
        return self._records

    def read_new(self) -> Sequence[dict[str, Any]]:
        """Those since the last call; all of them again after the file was replaced."""
        records = self.read()
        new = records[self._num_taken :]
        self._num_taken = len(records)
        return new

    def _restart(self, identity: tuple[int, int] | None) -> None:
        self._records, self._num_taken, self._position, self.num_unreadable = [], 0, 0, 0
        self._identity = identity

    def _add(self, line: bytes) -> None:
        record = parse_line(line)
        if record is not None:
            self._records.append(record)
        elif line.strip():
            self.num_unreadable += 1
