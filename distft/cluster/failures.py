"""Which of several failed ranks is the cause, and one clear message for it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray.exceptions import OutOfMemoryError, RayActorError, RayError
from ray.train import UserCallback
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from distft.errors import DistftError, LaunchError, Preempted, TrainingError

_LOST_PEER = re.compile(
    r"connection (reset|closed|refused)|broken pipe|peer|timed out waiting", re.IGNORECASE
)
_PID = re.compile(r"\bpid: (\d+)")
_NODE = re.compile(r"\bip: (\S+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class RankFailure:
    """What became of one rank."""

    rank: int
    error: BaseException
    traceback: str = ""

    @classmethod
    def of(cls, rank: int, error: BaseException) -> "RankFailure":
        """Take the error out of Ray's wrappers."""
        inner = getattr(error, "_base_exc", None)  # of UserExceptionWithTraceback: raised in training
        if inner is not None:
            return cls(rank=rank, error=inner, traceback=str(error))
        return cls(rank=rank, error=getattr(error, "health_check_failure", error))

    @property
    def helps_if_tried_again(self) -> bool:
        """False for the user's mistakes, and where the run was asked to stop."""
        return not isinstance(self.error, Preempted) and getattr(self.error, "exit_code", 1) != 2

    @property
    def blame(self) -> int:
        """Lower is nearer to the cause: a rank that lost its peer is a consequence, for instance."""
        if isinstance(self.error, DistftError) and not self.helps_if_tried_again:
            return 0
        if isinstance(self.error, RayError):
            return 1  # the process is gone; nobody can see that too early
        return 3 if _LOST_PEER.search(str(self.error)) else 2

    def as_distft_error(self) -> DistftError:
        """The same for the user: foreseen errors as they are, with the rank where that tells something."""
        if isinstance(self.error, DistftError):
            where = f"rank {self.rank}: " if self.helps_if_tried_again else ""
            return type(self.error)(f"{where}{self.error}")
        if isinstance(self.error, RayError):
            return LaunchError(f"rank {self.rank} {_obituary(self.error)}")
        message = f"rank {self.rank} failed: {type(self.error).__name__}: {self.error}"
        return TrainingError("\n\n".join(filter(None, [message, self.traceback.rstrip()])))


def _obituary(error: RayError) -> str:
    text = str(error)
    about = [
        f"{name} {found[1]}"
        for name, found in (("node", _NODE.search(text)), ("pid", _PID.search(text)))
        if found
    ]
    died = f"died ({', '.join(about)})" if about else "died"
    if isinstance(error, OutOfMemoryError):
        return f"{died}: its node ran out of memory. Lower batch.micro_batch_size, or start fewer workers a node."
    if isinstance(error, RayActorError):
        return f"{died} without a word: killed by a signal or for want of memory, or its node is gone."
    return f"{died}: {text.splitlines()[0] if text else type(error).__name__}"


def root_cause(errors: Mapping[int, BaseException]) -> RankFailure:
    """Of the ranks that failed together, the one that the others failed for."""
    failures = [RankFailure.of(rank, error) for rank, error in sorted(errors.items())]
    return min(failures, key=lambda failure: failure.blame)


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
    return LaunchError(f"Ray could not run {wanted}: {type(cause).__name__}: {cause}")


class FailureWatch(UserCallback):  # type: ignore[misc]  # Ray has no types
    """Stands beside Ray Train's controller: tells of restarts, and prevents those that cannot help."""

    def __init__(self, mailbox: Any, max_failures: int) -> None:
        self._mailbox = mailbox
        self._max_failures = max_failures
        self._num_failures = 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
        """Raising is how a callback ends the run: the controller does not retry its own errors."""
        cause = root_cause(worker_exceptions)
        if not cause.helps_if_tried_again:
            raise cause.as_distft_error()
        self._num_failures += 1
        if self._num_failures <= self._max_failures:
            text = f"{cause.as_distft_error()}\nStarting the workers again ({self._num_failures} of {self._max_failures}).\n"
            self._mailbox.write.remote("stderr", text)
