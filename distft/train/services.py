"""The services that the training loop needs from its run: log, evaluate, save, stop."""

from collections.abc import Callable, Mapping
from typing import Literal, Protocol, get_args

from distft.checkpoint.manifest import Progress
from distft.watch.heartbeat import HeartbeatRecorder

Metrics = Mapping[str, float | int]
# Why to save and stop: a user or scheduler requested it, workers can be added, a node is about to leave.
StopReason = Literal["requested", "resize", "drain"]
STOP_REASONS: tuple[StopReason, ...] = get_args(StopReason)
StopRequested = Callable[[], StopReason | None]


def never_stop() -> None:
    """The `StopRequested` of a run that only SIGTERM stops."""


class TrainerServices(Protocol):
    """Services of a run for its `Trainer`, which calls every method on all ranks together."""

    heartbeat: HeartbeatRecorder

    def log(self, metrics: Metrics, step: int) -> None: ...

    def evaluate(self, step: int) -> Metrics:
        """Metrics of the weights after `step` steps on the validation data; records what else it finds."""

    def save(self, progress: Progress) -> None:
        """Start to save a checkpoint; the write may continue in the background."""

    def before_update(self) -> None:
        """Called between the backward and the update of each step: a save may still copy the old state."""

    def wait_for_saves(self) -> None:
        """Return once every save is committed. Raises the error of a save that failed."""

    def has_failed_save(self) -> bool:
        """Whether a save failed whose error has not been raised yet, on this rank."""

    def stop_requested(self) -> StopReason | None:
        """Why this rank should save and stop; None to continue."""
