"""One run of a trial as a process: `distft train`, under torch's launcher where it has several ranks."""

import contextlib
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from distft.errors import LaunchError, Preempted
from distft.search.lock import took_lock

LOG_FILE = "output.log"  # of a run, beside its other files: what its processes printed
_LOCK_FILE = ".running"  # in a trial's folder; locked as long as a process of the trial lives
_LAUNCH_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_ERROR = re.compile(r"^(?:rank \d+: )?[a-z ]*error: (.+)|^(\w*(?:Error|Exception)\b.*)")
_MOST_LOG_BYTES = 1 << 16  # of the end of a log, in which the reason of a failure is looked for
_POLL_S = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """How a run's processes start, besides its configuration."""

    ranks: int
    threads: int  # of each rank
    working_dir: Path  # where relative paths of its settings start
    environment: Mapping[str, str]  # added to this process's
    stop_timeout_s: float  # for a save after SIGTERM


class RunProcess:
    """A run that trains. It saves and ends if `stop` is called, and if this process dies."""

    def __init__(self, config_path: Path, run_dir: Path, lock_dir: Path, launch: Launch) -> None:
        """Raises `LaunchError` if another process of the trial does not end."""
        self._launch = launch
        run_dir.mkdir(parents=True, exist_ok=True)
        self._log = run_dir / LOG_FILE
        lock = _locked(lock_dir, launch.stop_timeout_s)
        try:
            with self._log.open("ab") as log:
                self._log_start = log.tell()
                self._process = subprocess.Popen(
                    _command(config_path, launch.ranks),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=launch.working_dir,
                    env=_environment(launch),
                    start_new_session=True,  # a Ctrl-C in the driver's terminal is for the driver
                    pass_fds=(lock,),
                )
        finally:
            os.close(lock)  # the run's process keeps it

    def exit_code(self) -> int | None:
        """None as long as it runs."""
        return self._process.poll()

    def stop(self) -> None:
        """Let the run save, and wait until it has ended. Does nothing if it has."""
        if self._process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)  # a launcher passes it on to its ranks
        try:
            self._process.wait(self._launch.stop_timeout_s)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    @property
    def was_interrupted(self) -> bool:
        """Whether it has ended on request, or by a signal, so that the same command goes on."""
        code = self._process.poll()
        return code is not None and code in {Preempted.exit_code, -signal.SIGTERM}

    def reason(self) -> str:
        """The last error that it printed, in one line."""
        with self._log.open("rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, end - _MOST_LOG_BYTES))
            text = log.read().decode("utf-8", "replace")
        return failure_reason(text) or f"exit code {self._process.poll()}, without a word: see {self._log}"


def failure_reason(log: str) -> str:
    """The last line of a run's output that tells of an error; else its last line. Empty without any."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for line in reversed(lines):
        if (found := _ERROR.match(line)) is not None:
            return found[1] or found[2]
    return lines[-1] if lines else ""


def wait_for_trials(directories: list[Path], timeout_s: float, is_over: Callable[[], bool]) -> None:
    """Wait until no process of these trials lives, on any node that shares their directories."""
    give_up_s = time.monotonic() + timeout_s
    for directory in directories:
        while time.monotonic() < give_up_s and not is_over():
            descriptor = _try_lock(directory)
            if descriptor is not None:
                os.close(descriptor)
                break
            time.sleep(_POLL_S)


def _locked(directory: Path, timeout_s: float) -> int:
    """A descriptor of the trial's lock, after the processes of an earlier start have ended."""
    directory.mkdir(parents=True, exist_ok=True)
    give_up_s = time.monotonic() + timeout_s
    while True:
        descriptor = _try_lock(directory)
        if descriptor is not None:
            return descriptor
        if time.monotonic() > give_up_s:
            raise LaunchError(
                f"A process of an earlier search still trains in {directory}: end it, then start again."
            )
        time.sleep(_POLL_S)


def _try_lock(directory: Path) -> int | None:
    descriptor = os.open(directory / _LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    if took_lock(descriptor, fcntl.LOCK_EX):
        return descriptor
    os.close(descriptor)
    return None


def _command(config_path: Path, ranks: int) -> list[str]:
    keeper = [sys.executable, "-m", "distft.cluster.tune.end_with_parent", str(os.getpid())]
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    )
    return [*keeper, *launcher, "-m", "distft", "train", str(config_path)]


def _environment(launch: Launch) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in _LAUNCH_VARIABLES}
    own = {"OMP_NUM_THREADS": str(launch.threads), "PYTHONUNBUFFERED": "1"}
    return {**kept, **own, **launch.environment}
