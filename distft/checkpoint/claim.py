"""Which start of a run writes its checkpoints: the last one.

A rank that was cut off from its cluster may go on, and two drivers may be started for one run by mistake.
Whoever starts later leaves its name beside the commits; the other one sees it before it writes.
"""

import json
import os
import secrets
import socket
import time

from distft import storage
from distft.errors import SupersededError

CLAIM = "writer.json"


class Claim:
    """The right to write below `root`. Until `take` is called, whoever asks has it."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._path = storage.join(root, CLAIM)
        self._name: str | None = None

    def take(self) -> None:
        """From now on others may not write."""
        self._name = secrets.token_hex(8)
        mine = {"name": self._name, "host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}
        storage.commit_bytes(self._path, json.dumps(mine).encode())

    def check(self) -> None:
        """Raise `SupersededError` if somebody has taken it since."""
        if self._name is None:
            return
        try:
            holder = json.loads(storage.read_bytes(self._path))
        except FileNotFoundError:  # removed by hand
            return
        if holder["name"] != self._name:
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["since"]))
            raise SupersededError(
                f"Another start of this run (host {holder['host']}, pid {holder['pid']}, {since}) writes to "
                f"{self._root}, so this one ends. If both were meant, give each a run_dir."
            )
