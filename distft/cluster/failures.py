"""Which of several failed ranks is the cause, and one clear message for it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.exceptions import OutOfMemoryError, RayActorError, RayError
from ray.train import UserCallback
from ray.train.v2._internal.exceptions import WorkerHealthCheckTimeoutError
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from distft.checkpoint.committed import committed_steps
from distft.errors import DistftError, LaunchError, Preempted, Resized, StorageError, TrainingError
from distft.tracker import EVENTS_FILE, METRICS_FILE, EventLog, read_lines
from distft.watch.verdict import HANG, STACK_FOLLOWS, explain_event

_LOST_PEER = re.compile(
    r"connection (reset|closed|refused)|broken pipe|peer|timed out waiting", re.IGNORECASE
)
_ACCUSES = re.compile(r"rank \d+ \(")
_PID = re.compile(r"\bpid: (\d+)")
_NODE = re.compile(r"\bip: (\S+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class RankFailure:
    """What became of one rank."""

    rank: int
    error: BaseException

    @property
    def helps_if_tried_again(self) -> bool:
        """False for the user's mistakes, and where the run was asked to stop."""
        if isinstance(self.error, Preempted):
            return isinstance(self.error, Resized)
        return getattr(self.error, "exit_code", 1) != 2

    @property
    def distance(self) -> int:
        """From the cause: to lose a peer, for instance, is a consequence."""
        if not self.helps_if_tried_again or isinstance(self.error, Resized):
            return 0
        first_line = str(self.error).partition("\n")[0]
        if _ACCUSES.match(first_line):
            return 1  # a rank that saw another one hang, which was killed for that
        if isinstance(self.error, RayError):
            return 2
        return 4 if _LOST_PEER.search(first_line) else 3

    def as_distft_error(self) -> DistftError:
        """The same for the user: with the rank, unless every rank would say the same."""
        if isinstance(self.error, DistftError):
            text = str(self.error)
            is_told = not self.helps_if_tried_again or text.startswith("rank ")
            return type(self.error)(text if is_told else f"rank {self.rank}: {text}")
        if isinstance(self.error, RayError):
            return LaunchError(f"rank {self.rank} {_obituary(self.error)}")
        if isinstance(self.error, WorkerHealthCheckTimeoutError):
            return LaunchError(
                f"rank {self.rank} does not answer Ray: its process is stopped, or hangs in C."
            )
        return TrainingError(f"rank {self.rank}: {type(self.error).__name__}: {self.error}")


def _obituary(error: RayError) -> str:
    text = str(error)
    about = [
        f"{name} {found[1]}"
        for name, found in (("node", _NODE.search(text)), ("pid", _PID.search(text)))
        if found
    ]
    died = f"died ({', '.join(about)})" if about else "died"
    if isinstance(error, OutOfMemoryError):
        return f"{died}: its node ran out of memory. Lower batch.micro_batch_size."
    if isinstance(error, RayActorError):
        return f"{died} without a word: killed by a signal or for want of memory, or its node is gone."
    return f"{died}: {text.splitlines()[0] if text else type(error).__name__}"


def root_cause(errors: Mapping[int, BaseException]) -> RankFailure:
    """Of the ranks that failed together, the one that the others failed for."""
    failures = [
        RankFailure(rank=rank, error=getattr(error, "health_check_failure", error))
        for rank, error in sorted(errors.items())
    ]
    return min(failures, key=lambda failure: failure.distance)


def explain(error: TrainingFailedError, wanted: str) -> DistftError:
    """Ray Train's verdict on a run as our own error. `wanted`: the workers that were asked for."""
    if isinstance(error, WorkerGroupError):
        return root_cause(error.worker_failures).as_distft_error()
    cause: BaseException = error
    while isinstance(cause, ControllerError):
        cause = cause.controller_failure
    if isinstance(cause, DistftError):
        return cause
    if type(cause).__name__ == "WorkerGroupStartupTimeoutError":
        return LaunchError(
            f"The cluster had no room for {wanted} within cluster.start_timeout_s: ask for less, add nodes, "
            "or wait longer."
        )
    # Ray's message holds another process's stack; what went wrong stands at its end.
    lines = str(cause).strip().splitlines() or [""]
    return LaunchError(f"Ray could not run {wanted}: {type(cause).__name__}: {lines[-1].strip()}")


class FailureWatch(UserCallback):  # type: ignore[misc]  # Ray has no types
    """Stands beside Ray Train's controller: tells of restarts, and prevents those that cannot help.

    `max_failures` in a row, with no new commit in `checkpoints` between them, end the run.
    """

    def __init__(self, mailbox: Any, *, max_failures: int, run_dir: str, checkpoints: str) -> None:
        self._mailbox = mailbox
        self._max_failures = max_failures
        self._run_dir = run_dir
        self._checkpoints = checkpoints
        self._num_failures = 0
        self._last_step = -1

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
        """Raising is how a callback ends the run: the controller does not retry its own errors."""
        self._mailbox.ended.remote()
        cause = root_cause(worker_exceptions)
        error = cause.as_distft_error()
        if not cause.helps_if_tried_again:
            raise error
        if isinstance(cause.error, Resized):
            self._tell("restart", step=self._last_told_step(), reason=str(error))
            self._mailbox.write.remote("stderr", f"{error}\n")
            return
        rank = cause.rank
        if hangs := self._hangs():  # Ray saw the rank that told of it end, or the one that was killed for it
            rank, error = hangs[0]["rank"], TrainingError("\n".join(map(_explain_hang, hangs)))
        step = self._newest_step()
        self._num_failures = 1 if step > self._last_step else self._num_failures + 1
        self._last_step = step
        self._tell(
            "fault",
            step=self._last_told_step(),
            rank=rank,
            reason=str(error).partition("\n")[0].removesuffix(STACK_FOLLOWS),
            attempt=self._num_failures,
        )
        if self._num_failures > self._max_failures:
            raise error
        again = f"Starting the workers again ({self._num_failures} of {self._max_failures})."
        self._mailbox.write.remote("stderr", f"{error}\n{again}\n")

    def _hangs(self) -> list[Mapping[str, Any]]:
        """What the ranks told of one of them in their last life."""
        try:
            events = read_lines(Path(self._run_dir) / EVENTS_FILE)
        except (StorageError, OSError):
            return []
        began = max((n for n, event in enumerate(events) if event["kind"] in {"start", "resume"}), default=0)
        return [event for event in events[began:] if event["kind"] == HANG]

    def _newest_step(self) -> int:
        try:
            return max(committed_steps(self._checkpoints), default=-1)
        except (StorageError, OSError):  # not reachable now: as if nothing had been committed
            return self._last_step

    def _last_told_step(self) -> int:
        lines = read_lines(Path(self._run_dir) / METRICS_FILE)
        return int(lines[-1].get("step", 0)) if lines else 0

    def _tell(self, kind: str, **fields: Any) -> None:
        try:
            log = EventLog(Path(self._run_dir))
            log.write(kind, **fields)
            log.close()
        except (StorageError, OSError) as error:
            self._mailbox.write.remote("stderr", f"{error}\n")


def _explain_hang(event: Mapping[str, Any]) -> str:
    return explain_event(event, f"{event['host']}, pid {event['pid']}")
