"""How long processes of this machine wait for a CPU: on a busy machine a healthy rank answers late."""

from pathlib import Path

# At least this share of the time counts, however busy the machine is, so that a hang is found in the end.
_MIN_COUNTED_SHARE = 0.1


class CpuWaits:
    """The time that processes waited for a CPU, by Linux's account of each thread; 0 where it keeps none.

    A process that is stopped, or sleeps, does not wait.
    """

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._seen: dict[int, dict[str, int]] = {}  # by pid and thread: nanoseconds so far

    def since_last(self, pid: int) -> float:
        """Seconds that the threads of `pid` waited since the last call, added up; 0 at the first call."""
        now = self._read(pid)
        before = self._seen.get(pid)
        self._seen[pid] = now
        if before is None:
            return 0.0
        return sum(waited - before.get(thread, 0) for thread, waited in now.items()) / 1e9

    def _read(self, pid: int) -> dict[str, int]:
        waits: dict[str, int] = {}
        try:
            for thread in (self._proc / str(pid) / "task").iterdir():
                _, waited, _ = (thread / "schedstat").read_text(encoding="ascii").split()
                waits[thread.name] = int(waited)
        except (OSError, ValueError):  # a thread or the process has ended, or this kernel keeps no account
            return waits
        return waits


def counted_s(elapsed_s: float, waited_s: float) -> float:
    """The part of `elapsed_s` in which the processes that waited for a CPU for `waited_s` could work."""
    return max(elapsed_s - waited_s, _MIN_COUNTED_SHARE * elapsed_s)
