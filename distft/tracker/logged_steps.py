"""What earlier starts of a run have sent to a service that keeps every point."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from distft import storage

T = TypeVar("T")


class LoggedSteps:
    """The last step of each name that a service was sent, in a small file of the run's directory.

    A start that resumes does steps again, which the service would show as points that go back. By name, since
    an evaluation's metrics follow the training's of the same step, and a start may end between them. The file
    counts for one run of the service only, and a damaged one for none.
    """

    def __init__(self, path: Path, service_run_id: str) -> None:
        self._path, self._service_run_id = path, service_run_id
        self._before = _read(path, service_run_id)
        self._all = dict(self._before)

    def new_of(self, values: Mapping[str, T], step: int) -> dict[str, T]:
        """Those that no earlier start has sent for this step or a later one; noted before they are sent.

        A process that is killed between the two leaves a point out rather than send it twice.
        """
        new = unsent(values, step, self._before)
        if new:
            self._all |= dict.fromkeys(new, step)
            record = {"run": self._service_run_id, "steps": self._all}
            storage.commit_bytes(self._path, json.dumps(record).encode(), durable=False)
        return new


def unsent(values: Mapping[str, T], step: int, last_steps: Mapping[str, int]) -> dict[str, T]:
    """The values at `step` of names whose last step is before it."""
    return {name: value for name, value in values.items() if step > last_steps.get(name, -1)}


def _read(path: Path, service_run_id: str) -> dict[str, int]:
    try:
        record = json.loads(path.read_bytes())
        if record["run"] == service_run_id:
            return {str(name): int(step) for name, step in record["steps"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        pass
    return {}
