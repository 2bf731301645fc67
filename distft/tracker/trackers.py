"""All trackers of a run as one; a failing optional tracker does not end the run."""

import logging
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from distft.config import Component, redact
from distft.errors import DistftError
from distft.tracker.console import ConsoleTracker
from distft.tracker.interface import Metrics, Tracker, plain_number
from distft.tracker.jsonl import EventLog, JsonlTracker
from distft.tracker.mlflow_tracker import MlflowConfig
from distft.tracker.tensorboard_tracker import TensorBoardConfig
from distft.tracker.trackio_tracker import TrackioConfig
from distft.tracker.wandb_tracker import WandbConfig

TrackerConfig = Annotated[WandbConfig | TensorBoardConfig | MlflowConfig | TrackioConfig, Component()]

_log = logging.getLogger(__name__)


class Trackers:
    """Sends the same plain numbers to every tracker, and events also to `events.jsonl`.

    An exception of a `required` tracker propagates. An `optional` tracker that fails is disabled, with one
    warning in the log. Without trackers (on ranks other than 0), every method does nothing. Any thread may
    call the methods after `start`. In `events.jsonl` all events have a `start_id`: starts may overlap.
    """

    def __init__(self, required: Sequence[Tracker] = (), optional: Sequence[Tracker] = ()) -> None:
        self._required = list(required)
        self._optional = list(optional)
        self._events: EventLog | None = None
        self._start_id = secrets.token_hex(4)
        self._lock = threading.RLock()  # trackers are not made for several threads

    def start(
        self, run_id: str, config: Mapping[str, Any], run_dir: Path, *, resume_step: int | None = None
    ) -> None:
        """Start every tracker with `config` without secrets. `run_dir` is a local directory."""
        if not (self._required or self._optional):
            return
        public = redact(config)
        self._events = EventLog(run_dir)
        self._for_each(lambda tracker: tracker.start(run_id, public, run_dir, resume_step=resume_step))

    def log(self, metrics: Mapping[str, Any], *, step: int) -> None:
        """Record metrics (Python, NumPy or torch scalars) after `step` optimizer steps."""
        numbers: Metrics = {name: plain_number(value) for name, value in metrics.items()}
        with self._lock:
            self._for_each(lambda tracker: tracker.log(numbers, step=step))

    def show(self, record: Mapping[str, Any], *, step: int) -> None:
        """Record what an evaluation after `step` steps found besides metrics, without secrets."""
        public = redact(record)
        with self._lock:
            self._for_each(lambda tracker: tracker.show(public, step=step))

    def event(self, kind: str, **fields: Any) -> None:
        """Record an event, without secrets."""
        public = redact(fields)
        with self._lock:
            if self._events is not None:
                self._events.write(kind, **public, start_id=self._start_id)
            self._for_each(lambda tracker: tracker.event(kind, **public))

    def finish(self, status: str, *, step: int) -> None:
        """End every tracker with status `completed`, `preempted` or `failed`, after `step` steps."""
        errors: list[DistftError] = []
        with self._lock:
            endings: list[Callable[[], None]] = [
                partial(tracker.finish, status) for tracker in self._required
            ]
            if (events := self._events) is not None:
                self._events = None
                end = partial(events.write, "finish", status=status, step=step, start_id=self._start_id)
                endings = [end, events.close, *endings]
            for ending in endings:
                try:
                    ending()
                except DistftError as error:  # such as a full disk: still end the others
                    errors.append(error)
            self._for_each_optional(lambda tracker: tracker.finish(status))
        if errors and status != "failed":  # a failed run raises its own error
            raise errors[0]

    def _for_each(self, act: Callable[[Tracker], None]) -> None:
        for tracker in self._required:
            act(tracker)
        self._for_each_optional(act)

    def _for_each_optional(self, act: Callable[[Tracker], None]) -> None:
        for tracker in tuple(self._optional):
            try:
                act(tracker)
            except Exception as error:  # a failing service must not end the run
                self._optional.remove(tracker)
                name = type(tracker).__name__
                _log.warning(
                    "%s failed and is disabled from here on (%s: %s)",
                    name,
                    type(error).__name__,
                    redact(str(error)),
                )


def build_trackers(configs: Sequence[Any], *, max_steps: int, show: bool = True) -> Trackers:
    """`metrics.jsonl`, the console (if `show`), and the optional trackers in `configs`.

    Raises `ConfigError` if a package is missing.
    """
    required: list[Tracker] = [JsonlTracker()]
    if show:
        required.append(ConsoleTracker(max_steps))
    return Trackers(required, [config.build() for config in configs])
