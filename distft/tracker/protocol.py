"""What a tracker is: a place where the numbers of a run go."""

import math
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

Metrics = Mapping[str, float | int]
LEDGER = "ledger"  # the event that tells which sequences a commit covers


class Tracker(Protocol):
    """Gets every number of a run once, in the order of steps, from one process.

    `start` comes first and `finish` last; nothing follows it.
    """

    def start(
        self, run_id: str, config: Mapping[str, Any], run_dir: Path, *, resume_step: int | None = None
    ) -> None:
        """Begin, or go on after optimizer step `resume_step`: what was logged for later steps is superseded.

        `config` is plain data without secrets. None for `resume_step` starts afresh.
        """

    def log(self, metrics: Metrics, *, step: int) -> None:
        """Record numbers, as they stand after `step` optimizer steps."""

    def event(self, kind: str, **fields: Any) -> None:
        """Record that something happened: a resume, a save, a fault."""

    def finish(self, status: str) -> None:
        """End, as `completed`, `preempted` or `failed`; everything logged so far is safe afterwards."""


def plain_number(value: Any) -> float | int:
    """A Python number for a Python, NumPy or Torch scalar."""
    if isinstance(value, float):
        return float(value)
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):  # no integer; Torch raises either
        return float(value)


def finite_or_none(value: Any) -> Any:
    """None for NaN and infinities, which JSON cannot hold; anything else as it is."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
