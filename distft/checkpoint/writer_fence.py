"""Fencing: of several starts of one run, only the latest writes its checkpoints.

A rank that was cut off from its cluster may keep running, and two drivers may be started for one run by
mistake. Each start writes its name beside the commits; an earlier one sees that before it writes.
"""

import json
import os
import secrets
import socket
import time

from distft import storage
from distft.errors import SupersededError

WRITER_FILE = "writer.json"


class WriterFence:
    """Guards writes below `root`. Until `acquire` is called, `check` always passes."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._path = storage.join(root, WRITER_FILE)
        self._name: str | None = None

    def acquire(self) -> None:
        """Become the only writer; the `check` of any earlier one fails from now on."""
        self._name = secrets.token_hex(8)
        writer = {"name": self._name, "host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}
        storage.commit_bytes(self._path, json.dumps(writer).encode())

    def check(self) -> None:
        """Raise `SupersededError` if another start has become the writer since `acquire`."""
        if self._name is None:
            return
        try:
            writer = json.loads(storage.read_bytes(self._path))
        except FileNotFoundError:  # removed by hand
            return
        if writer["name"] != self._name:
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(writer["since"]))
            raise SupersededError(
                f"Another start of this run (host {writer['host']}, pid {writer['pid']}, {since}) writes to "
                f"{self._root}, so this one ends. If both are intended, give each its own run_dir."
            )
