"""Where a rank's process runs, and how a brother of it may end it."""

import contextlib
import os
import signal
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Self


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """The process of one rank."""

    host: str
    pid: int
    parent_pid: int  # the launcher's
    space: str  # processes of equal spaces see each other's pids; empty where that is not known

    @classmethod
    def here(cls) -> Self:
        return cls(host=socket.gethostname(), pid=os.getpid(), parent_pid=os.getppid(), space=_pid_space())

    def __str__(self) -> str:
        return f"{self.host}, pid {self.pid}"

    def kill_brother(self, other: "Member") -> bool:
        """SIGKILL `other` if the same launcher on the same machine started it; whether that was done.

        Launchers ask with SIGTERM first, which a stopped process does not hear, and then wait for 30 s.
        """
        is_near = bool(self.space) and (self.space, self.parent_pid) == (other.space, other.parent_pid)
        if not is_near or other.pid == self.pid or _parent_of(other.pid) != self.parent_pid:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(other.pid, signal.SIGKILL)
        return True


def _pid_space() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _parent_of(pid: int) -> int | None:
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return int(status.rpartition(")")[2].split()[1])  # the name before it may hold anything
