"""The class that Ray Tune creates for each trial, in an actor on the trial's node."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.tune import Trainable

from distft.cluster.tune.trial import Report, SearchTask, Trial
from distft.search.metrics import sign_of
from distft.search.space import Values

_TRIAL = "trial"  # the key of Ray Tune's configuration
STEP, VALUE, REPORT = "step", "value", "report"  # of a result; more of the value is always better
_COMMIT_FILE = "commit.json"  # in a checkpoint of Ray Tune: where the run's own one is


def trial_config(number: int, values: Values, seen_step: int) -> dict[str, str]:
    """Ray Tune's configuration of a trial. As text, so that Ray Tune reads nothing into it."""
    return {_TRIAL: json.dumps({"number": number, "values": values, "seen_step": seen_step})}


def read_trial_config(config: Mapping[str, str]) -> tuple[int, Values, int]:
    """The arguments of `trial_config`."""
    content = json.loads(config[_TRIAL])
    return content["number"], content["values"], content["seen_step"]


class TrialActor(Trainable):  # type: ignore[misc]  # Ray has no types
    """Reports a value of the metric at a time, which lets Ray Tune stop, pause or fork the trial there."""

    def setup(self, config: dict[str, Any], task: SearchTask | None = None) -> None:
        assert task is not None
        self._task = task
        self._number, self._values, seen_step = read_trial_config(config)
        self._trial = Trial(task, self._number, self._values, seen_step=seen_step)
        self._last = {STEP: 0, VALUE: -math.inf}

    def step(self) -> dict[str, Any]:
        report = self._trial.next_report()
        value = report.value if report.final is None else report.final
        if value is not None and report.metric is not None:
            sign = sign_of(report.metric, self._task.search.mode)
            self._last[VALUE] = sign * value if math.isfinite(value) else -math.inf
        self._last[STEP] = max(report.step or 0, self._last[STEP])
        has_ended = report.state != "running"
        return {**self._last, REPORT: _plain(report), "done": has_ended}

    def save_checkpoint(self, checkpoint_dir: str) -> str:
        """Note where the run's commit of the last reported step is, for this trial or one that forks."""
        found = self._trial.commit_since(self._trial.last_step)
        checkpoints, step = found or ("", 0)
        content = {
            "number": self._number,
            "seen_step": self._trial.last_step,
            "checkpoints": checkpoints,
            "step": step,
        }
        (Path(checkpoint_dir) / _COMMIT_FILE).write_text(json.dumps(content))
        return checkpoint_dir

    def load_checkpoint(self, checkpoint_dir: str) -> None:
        """Go on after a pause; or begin a new run with another trial's commit."""
        content = json.loads((Path(checkpoint_dir) / _COMMIT_FILE).read_text())
        is_own = content["number"] == self._number
        seen_step = content["seen_step"] if is_own else content["step"]
        self._trial = Trial(self._task, self._number, self._values, seen_step=seen_step)
        if not is_own and content["checkpoints"]:
            self._trial.fork(content["checkpoints"], content["step"])

    def cleanup(self) -> None:
        """Called when Ray Tune stops or pauses the trial: the run saves first."""
        self._trial.stop()


def _plain(report: Report) -> dict[str, Any]:
    return {name: getattr(report, name) for name in Report.__dataclass_fields__}
