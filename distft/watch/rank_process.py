"""The operating-system process of a rank, and the rule for when another rank may kill it."""

import contextlib
import os
import signal
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Self


@dataclass(frozen=True, kw_only=True, slots=True)
class RankProcess:
    """The process of one rank."""

    host: str
    pid: int
    parent_pid: int  # of the launcher
    pid_namespace: str  # kernel boot and namespace in which the pids are valid; empty if unknown

    @classmethod
    def current(cls) -> Self:
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            parent_pid=os.getppid(),
            pid_namespace=_pid_namespace(),
        )

    def __str__(self) -> str:
        return f"{self.host}, pid {self.pid}"

    def shares_machine_with(self, other: "RankProcess") -> bool:
        """Whether the pid of `other` is that of a process here; False if unknown."""
        return bool(self.pid_namespace) and self.pid_namespace == other.pid_namespace

    def kill_sibling(self, other: "RankProcess") -> bool:
        """SIGKILL `other` if the same launcher on the same machine started it; returns whether it did.

        Launchers send SIGTERM first, which does not end a stopped process, and then wait for 30 s.
        """
        has_same_launcher = self.shares_machine_with(other) and self.parent_pid == other.parent_pid
        # The pid may belong to a new process by now.
        if not has_same_launcher or other.pid == self.pid or _parent_of(other.pid) != self.parent_pid:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(other.pid, signal.SIGKILL)
        return True


def _pid_namespace() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _parent_of(pid: int) -> int | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[1])  # the command's name in "(...)" may contain any character
