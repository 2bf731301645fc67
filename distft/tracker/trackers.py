"""All trackers of a run as one, of which the optional ones cannot end it."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from distft.config import Part, redact
from distft.errors import DistftError
from distft.tracker.console import ConsoleTracker
from distft.tracker.jsonl import EventLog, JsonlTracker
from distft.tracker.protocol import Metrics, Tracker, plain_number
from distft.tracker.tensorboard_tracker import TensorBoardConfig
from distft.tracker.wandb_tracker import WandbConfig

TrackerConfig = Annotated[WandbConfig | TensorBoardConfig, Part()]

_log = logging.getLogger(__name__)


class Trackers:
    """Passes the same plain numbers to every tracker, and events to `events.jsonl` besides.

    `needed` trackers raise what they raise. An `optional` one that fails is named once in the log and left
    out from then on. Without any tracker (ranks other than 0) nothing happens.
    """

    def __init__(self, needed: Sequence[Tracker] = (), optional: Sequence[Tracker] = ()) -> None:
        self._needed = list(needed)
        self._optional = list(optional)
        self._events: EventLog | None = None

    def start(
        self, run_id: str, config: Mapping[str, Any], run_dir: Path, *, resume_step: int | None = None
    ) -> None:
        """Start all; each gets `config` without secrets. `run_dir` is a local directory."""
        if not (self._needed or self._optional):
            return
        public = redact(config)
        self._events = EventLog(run_dir)
        self._each(lambda tracker: tracker.start(run_id, public, run_dir, resume_step=resume_step))

    def log(self, metrics: Mapping[str, Any], *, step: int) -> None:
        """Record numbers after `step` optimizer steps; NumPy and Torch scalars are taken, too."""
        numbers: Metrics = {name: plain_number(value) for name, value in metrics.items()}
        self._each(lambda tracker: tracker.log(numbers, step=step))

    def event(self, kind: str, **fields: Any) -> None:
        """Record what happened, without secrets."""
        public = redact(fields)
        if self._events is not None:
            self._events.write(kind, **public)
        self._each(lambda tracker: tracker.event(kind, **public))

    def finish(self, status: str) -> None:
        """End all, as `completed`, `preempted` or `failed`."""
        faults: list[DistftError] = []
        endings: list[Callable[[], None]] = [partial(tracker.finish, status) for tracker in self._needed]
        if (events := self._events) is not None:
            self._events = None
            endings = [partial(events.write, "finish", status=status), events.close, *endings]
        for end in endings:
            try:
                end()
            except DistftError as error:  # a full disk: the others still end
                faults.append(error)
        self._each_optional(lambda tracker: tracker.finish(status))
        if faults and status != "failed":  # a failed run has an error of its own to show
            raise faults[0]

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for tracker in self._needed:
            act(tracker)
        self._each_optional(act)

    def _each_optional(self, act: Callable[[Tracker], None]) -> None:
        for tracker in tuple(self._optional):
            try:
                act(tracker)
            except Exception as error:  # whatever a service does, the run goes on
                self._optional.remove(tracker)
                name = type(tracker).__name__
                _log.warning(
                    "%s failed and is left out from here on (%s: %s)", name, type(error).__name__, error
                )


def build_trackers(configs: Sequence[Any], *, max_steps: int, show: bool = True) -> Trackers:
    """`metrics.jsonl` and the console (unless `show` is false), and what `configs` ask for.

    Raises `ConfigError` where a package is missing.
    """
    needed: list[Tracker] = [JsonlTracker()]
    if show:
        needed.append(ConsoleTracker(max_steps))
    return Trackers(needed, [config.build() for config in configs])
