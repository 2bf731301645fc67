"""The `Tracker` interface: a destination for the metrics and events of a run."""

import math
import operator
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from distft.errors import ConfigError

Metrics = Mapping[str, float | int]
HANG_EVENT = "hang"  # the kind of event that names a rank that hangs
LEDGER_EVENT = "ledger"  # the kind of event that lists the sequences covered by a checkpoint


class Tracker(Protocol):
    """Receives every metric of a run once, in the order of steps, from one process.

    `start` is called first, `finish` last.
    """

    def start(
        self, run_id: str, config: Mapping[str, Any], run_dir: Path, *, resume_step: int | None = None
    ) -> None:
        """Begin a run, or continue after optimizer step `resume_step`, discarding the metrics of later steps.

        `config` is plain data without secrets. `resume_step` is None for a run without a checkpoint.
        """

    def log(self, metrics: Metrics, *, step: int) -> None:
        """Record metrics after `step` optimizer steps."""

    def show(self, record: Mapping[str, Any], *, step: int) -> None:
        """Record what an evaluation found besides metrics, of which `records` makes tables and pictures."""

    def event(self, kind: str, **fields: Any) -> None:
        """Record an event: a resume, a save, a failure."""

    def finish(self, status: str) -> None:
        """End with status `completed`, `preempted` or `failed`; flushes everything logged so far."""


def require_package(package: str, install: str) -> None:
    """Raise `ConfigError` if the package of a service, whose `type` has its name, is not installed."""
    if find_spec(package) is None:
        raise ConfigError(
            f"tracker type {package!r} needs the package {package}: run pip install {install}, or remove the "
            "tracker."
        )


def plain_number(value: Any) -> float | int:
    """A Python, NumPy or torch scalar as a Python number."""
    if isinstance(value, float):
        return float(value)
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):  # not an integer; torch raises either
        return float(value)


def finite_or_none(value: Any) -> Any:
    """None for NaN and infinities, which JSON cannot represent; any other value unchanged."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
