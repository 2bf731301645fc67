"""Finds which of several failed ranks caused the failure, describes it, and limits the number of restarts."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.exceptions import OutOfMemoryError, RayActorError, RayError
from ray.train import ControllerError, TrainingFailedError, UserCallback, WorkerGroupError

from distft.checkpoint.steps import committed_steps
from distft.cluster.ray_internals import (
    health_check_cause,
    is_health_check_timeout,
    is_start_timeout,
    process_of,
)
from distft.errors import DistftError, LaunchError, Preempted, Resized, StorageError, TrainingError
from distft.tracker import EVENTS_FILE, HANG_EVENT, EventLog, last_logged_step, read_lines
from distft.watch.hang_detection import HUNG_RANK, STACK_FOLLOWS, describe_hang_event

_LOST_PEER = re.compile(
    r"connection (reset|closed|refused)|broken pipe|peer|timed out waiting", re.IGNORECASE
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RankFailure:
    """The error with which one rank ended."""

    rank: int
    error: BaseException

    @property
    def is_retryable(self) -> bool:
        """Whether new workers may succeed: not after a user's mistake, a divergence or a request to stop."""
        if isinstance(self.error, Preempted):
            return isinstance(self.error, Resized)
        return getattr(self.error, "exit_code", 1) != 2

    @property
    def distance_to_cause(self) -> int:
        """0 for a cause; the larger, the more likely it follows from another rank's failure."""
        if not self.is_retryable or isinstance(self.error, Resized):
            return 0
        first_line = str(self.error).partition("\n")[0]
        if HUNG_RANK.match(first_line):
            return 1  # the report of a rank that saw another one hang and killed it
        if isinstance(self.error, RayError):
            return 2
        return 4 if _LOST_PEER.search(first_line) else 3

    def as_distft_error(self) -> DistftError:
        """An error for the user that names the rank, unless every rank would raise the same."""
        if isinstance(self.error, DistftError):
            text = str(self.error)
            needs_no_rank = not self.is_retryable or text.startswith("rank ")
            return type(self.error)(text if needs_no_rank else f"rank {self.rank}: {text}")
        if isinstance(self.error, RayError):
            return LaunchError(f"rank {self.rank} {_describe_death(self.error)}")
        if is_health_check_timeout(self.error):
            return LaunchError(
                f"rank {self.rank} does not answer Ray: its process is stopped, or hangs in native code."
            )
        return TrainingError(f"rank {self.rank}: {type(self.error).__name__}: {self.error}")


def _describe_death(error: RayError) -> str:
    process = process_of(error)
    died = f"died ({process})" if process else "died"
    if isinstance(error, OutOfMemoryError):
        return f"{died}: its node ran out of memory. Lower batch.micro_batch_size."
    if isinstance(error, RayActorError):
        return (
            f"{died} without an error message: killed by a signal or for lack of memory, or its node is gone."
        )
    text = str(error)
    return f"{died}: {text.splitlines()[0] if text else type(error).__name__}"


def root_cause(errors: Mapping[int, BaseException]) -> RankFailure:
    """The failure that made the other ranks fail, of those that failed together."""
    failures = [
        RankFailure(rank=rank, error=health_check_cause(error)) for rank, error in sorted(errors.items())
    ]
    return min(failures, key=lambda failure: failure.distance_to_cause)


def explain(error: TrainingFailedError, request: str) -> DistftError:
    """The `DistftError` for the error with which Ray Train ended a run. `request`: the workers, in words."""
    if isinstance(error, WorkerGroupError):
        return root_cause(error.worker_failures).as_distft_error()
    cause: BaseException = error
    while isinstance(cause, ControllerError):
        cause = cause.controller_failure
    if isinstance(cause, DistftError):
        return cause
    if is_start_timeout(cause):
        return LaunchError(
            f"The cluster had no free resources for {request} within cluster.start_timeout_s: request less, "
            "add nodes, or raise it."
        )
    # Ray's message contains the stack of another process, and ends with the error.
    lines = str(cause).strip().splitlines() or [""]
    return LaunchError(f"Ray could not run {request}: {type(cause).__name__}: {lines[-1].strip()}")


class FailureCallback(UserCallback):  # type: ignore[misc]  # Ray has no types
    """Runs in Ray Train's controller: logs restarts, and ends a run that another restart would not help.

    It ends the run after an error that is not retryable, or after more than `max_failures` failures without a
    new checkpoint in `checkpoints` between them.
    """

    def __init__(self, mailbox: Any, *, max_failures: int, run_dir: str, checkpoints: str) -> None:
        self._mailbox = mailbox
        self._max_failures = max_failures
        self._run_dir = run_dir
        self._checkpoints = checkpoints
        self._num_failures = 0
        self._last_step = -1

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
        """Handle failed workers. Raising ends the run: Ray's controller does not retry its own errors."""
        self._mailbox.workers_ended.remote()
        cause = root_cause(worker_exceptions)
        error = cause.as_distft_error()
        if not cause.is_retryable:
            raise error
        if isinstance(cause.error, Resized):
            self._log_event("restart", step=last_logged_step(Path(self._run_dir)), reason=str(error))
            self._mailbox.write.remote("stderr", f"{error}\n")
            return
        rank = cause.rank
        # Ray saw only the end of the rank that reported the hang, or of the one that was killed for it.
        if hangs := self._hang_events():
            rank, error = hangs[0]["rank"], TrainingError("\n".join(map(_describe_hang, hangs)))
        step = self._last_committed_step()
        self._num_failures = 1 if step > self._last_step else self._num_failures + 1
        self._last_step = step
        self._log_event(
            "fault",
            step=last_logged_step(Path(self._run_dir)),
            rank=rank,
            reason=str(error).partition("\n")[0].removesuffix(STACK_FOLLOWS),
            attempt=self._num_failures,
        )
        if self._num_failures > self._max_failures:
            raise error
        restart = f"Starting the workers again ({self._num_failures} of {self._max_failures})."
        self._mailbox.write.remote("stderr", f"{error}\n{restart}\n")

    def _hang_events(self) -> list[Mapping[str, Any]]:
        """Hangs that ranks logged since the workers last started."""
        try:
            events = read_lines(Path(self._run_dir) / EVENTS_FILE)
        except (StorageError, OSError):
            return []
        start = max((n for n, event in enumerate(events) if event["kind"] in {"start", "resume"}), default=0)
        return [event for event in events[start:] if event["kind"] == HANG_EVENT]

    def _last_committed_step(self) -> int:
        try:
            return max(committed_steps(self._checkpoints), default=-1)
        except (StorageError, OSError):  # unreachable now: count as if nothing new had been committed
            return self._last_step

    def _log_event(self, kind: str, **fields: Any) -> None:
        try:
            log = EventLog(Path(self._run_dir))
            log.write(kind, **fields)
            log.close()
        except (StorageError, OSError) as error:
            self._mailbox.write.remote("stderr", f"{error}\n")


def _describe_hang(event: Mapping[str, Any]) -> str:
    return describe_hang_event(event, f"{event['host']}, pid {event['pid']}")
