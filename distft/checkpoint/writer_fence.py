"""Fencing: of several starts of one run, only the latest writes its checkpoints.

A rank that was cut off from its cluster may keep running, and two drivers may be started for one run by
mistake. Each start writes its claim beside the commits. Before it makes a name count or removes one, it looks
whether the claim is still its own; `storage.commit_unless_changed` guards the moment after that look.
"""

import os
import secrets
import socket
import time

from pydantic import ValidationError

from distft import storage
from distft.config import Settings
from distft.errors import SupersededError

WRITER_FILE = "writer.json"
_MOST_BYTES = 1 << 16  # of the claim's file
_MOST_LAUNCHES = 50  # that a claim remembers


class _Claim(Settings):
    """Content of the claim's file."""

    name: str
    host: str
    pid: int
    since: float  # seconds since 1970
    launch: str | None = None  # of the launcher that starts ranks again by itself; None: there is none
    superseded_launches: tuple[str, ...] = ()  # those that lost the claim, which must not take it back


class WriterFence:
    """Guards writes below `root`. Until `acquire` is called, `check` always passes."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._path = storage.join(root, WRITER_FILE)
        self._own: _Claim | None = None

    @property
    def name(self) -> str:
        """Distinguishes the files of this start from those of others; empty until `acquire` is called."""
        return "" if self._own is None else self._own.name

    def acquire(self, launch: str | None = None) -> None:
        """Become the only writer; the `check` of any earlier one fails from now on.

        `launch` names the launcher if it starts failed ranks again by itself. Raises `SupersededError` if
        another start has taken over from an earlier start of the same launch: two launchers would take over
        from each other for ever.
        """
        found = self._read()
        superseded = () if found is None else found.superseded_launches
        if found is not None and launch is not None and launch in superseded:
            raise self._superseded_by(found)
        if found is not None and found.launch is not None and found.launch != launch:
            superseded = (*superseded, found.launch)[-_MOST_LAUNCHES:]
        self._own = _Claim(
            name=secrets.token_hex(4),
            host=socket.gethostname(),
            pid=os.getpid(),
            since=time.time(),
            launch=launch,
            superseded_launches=superseded,
        )
        self._write()

    def check(self) -> None:
        """Raise `SupersededError` if another start has become the writer since `acquire`."""
        if self._own is None:
            return
        found = self._read()
        if found is None:  # removed by hand, or broken: nobody else has a claim
            self._write()
        elif found.name != self._own.name:
            raise self._superseded_by(found)

    def _read(self) -> _Claim | None:
        """The claim; None if there is none or it cannot be read, as on a disk that was full once."""
        try:
            if storage.size(self._path) > _MOST_BYTES:
                return None
            return _Claim.model_validate_json(storage.read_bytes(self._path))
        except (FileNotFoundError, ValidationError):
            return None

    def _write(self) -> None:
        assert self._own is not None
        storage.commit_bytes(self._path, self._own.model_dump_json().encode())

    def _superseded_by(self, other: _Claim) -> SupersededError:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(other.since))
        return SupersededError(
            f"Another start of this run (host {other.host}, pid {other.pid}, {since}) writes to "
            f"{self._root}, so this one ends. If both are intended, give each its own run_dir."
        )
