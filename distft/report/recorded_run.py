"""A run as its directory shows it: settings, metrics and events, of any version of distft."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from distft.config import load_yaml
from distft.errors import ConfigError
from distft.report.values import is_int, is_number
from distft.run.paths import CONFIG_FILE
from distft.search.metrics import main_metric, sign_of
from distft.tracker import EVALUATIONS_FILE, EVENTS_FILE, METRICS_FILE
from distft.tracker.growing_lines import GrowingLines
from distft.tracker.jsonl import BEGINS, status_of_last_start

_DEFAULT_SILENCE_S = 300.0  # hang_timeout_s, unless the settings have another
_MOST_STEPS = 1e15


class FollowedRun:
    """A run's files, which grow: `RecordedRun.of` reads what is new in them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.metrics = GrowingLines(directory / METRICS_FILE)
        self.events = GrowingLines(directory / EVENTS_FILE)
        self.evaluations = GrowingLines(directory / EVALUATIONS_FILE)

    @property
    def files(self) -> tuple[GrowingLines, ...]:
        return self.metrics, self.events, self.evaluations


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedRun:
    """What a run's files say. Nothing in them is trusted to be there, or to have the right type."""

    directory: Path
    settings: Mapping[str, Any]  # of config.yaml, as it stands there
    metrics: Sequence[Mapping[str, Any]]  # a line for each logged step, and for each evaluation
    events: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]  # what they found besides metrics
    num_unreadable: int  # lines of these files that are no JSON object
    written_at: float  # when the newest of the files was, in seconds since 1970

    @classmethod
    def read(cls, directory: str | Path) -> Self:
        """Raises `ConfigError` if no run has begun there, or its settings cannot be read."""
        return cls.of(FollowedRun(Path(directory)))

    @classmethod
    def of(cls, followed: "FollowedRun") -> Self:
        """The run as its files are now. Raises as `read`."""
        path = followed.directory
        if not is_run(path):
            raise ConfigError(f"{_why_no_run(path)}. Give the run_dir of a run that has begun.")
        config = path / CONFIG_FILE
        metrics, evaluations = (lines.read() for lines in (followed.metrics, followed.evaluations))
        files = [config, *(lines.path for lines in followed.files)]
        return cls(
            directory=path,
            settings=load_yaml(config) if config.exists() else {},
            metrics=[line for line in metrics if is_int(line.get("step"))],
            events=[line for line in followed.events.read() if isinstance(line.get("kind"), str)],
            evaluations=[line for line in evaluations if is_int(line.get("step"))],
            num_unreadable=sum(lines.num_unreadable for lines in followed.files),
            written_at=max(file.stat().st_mtime for file in files if file.exists()),
        )

    @property
    def step(self) -> int:
        """The last one that was logged or saved."""
        steps = [line.get("step") for line in (*self.metrics, *self.events)]
        return max((step for step in steps if is_int(step)), default=0)

    @property
    def max_steps(self) -> int | None:
        """Of the settings, or by the epoch of the last logged step; None: not known yet."""
        train = self.settings.get("train")
        train = train if isinstance(train, Mapping) else {}
        max_steps, num_epochs = train.get("max_steps"), train.get("num_epochs")
        if is_int(max_steps):
            return max_steps
        step, epoch = next(iter(reversed(self.values("epoch"))), (0, 0.0))
        if not is_number(num_epochs) or epoch <= 0 or not 0 < step * num_epochs / epoch < _MOST_STEPS:
            return None
        return max(math.ceil(step * num_epochs / epoch - 1e-6), 1)  # less what a division has rounded up

    @property
    def num_starts(self) -> int:
        return sum(event["kind"] in BEGINS for event in self.events)

    def state(self, now_s: float | None = None) -> str:
        """What `finish` said of the last start: `completed`, `preempted` or `failed`.

        Without a word since then it is `running`, or `silent` if nothing was written for `hang_timeout_s`.
        """
        if (status := status_of_last_start(self.events)) is not None:
            return status
        silence_s = self.settings.get("hang_timeout_s", _DEFAULT_SILENCE_S)
        elapsed_s = (time.time() if now_s is None else now_s) - self.written_at
        return "running" if isinstance(silence_s, int | float) and elapsed_s < silence_s else "silent"

    def metric_names(self) -> list[str]:
        """Of all numbers that were logged, in the order of their first line."""
        names = {name: None for line in self.metrics for name, value in line.items() if is_number(value)}
        return [name for name in names if name not in {"step", "time"}]

    def values(self, metric: str) -> list[tuple[int, float]]:
        """Steps and values, of the lines in which it is a number."""
        return [(line["step"], line[metric]) for line in self.metrics if is_number(line.get(metric))]

    def best(self, metric: str) -> tuple[int, float] | None:
        """The step with the lowest loss, error or perplexity, or the highest of another metric."""
        found = self.values(metric)
        if not found:
            return None
        sign = sign_of(metric)
        return max(found, key=lambda pair: (sign * pair[1], -pair[0]))

    @property
    def main_metric(self) -> str:
        """That of early stopping; else the validation's accuracy or its like, of language models the loss."""
        train = self.settings.get("train")
        stopping = train.get("early_stopping") if isinstance(train, Mapping) else None
        return main_metric(self.metric_names(), stopping)


def is_run(path: Path) -> bool:
    """Whether a run has begun in this directory."""
    return (path / EVENTS_FILE).is_file()


def _why_no_run(path: Path) -> str:
    if not path.is_dir():
        return f"{path} is no directory, so no run"
    if (path / EVENTS_FILE).exists():
        return f"{path} is no run: its {EVENTS_FILE} is no file"
    return f"{path} is no run: it has no {EVENTS_FILE}"


def find_runs(directory: Path, *, depth: int = 4) -> Iterator[Path]:
    """The run directories at and below `directory`, down to `depth` folders; links are not followed.

    Raises `ConfigError` if it is no directory.
    """
    if not directory.is_dir():
        raise ConfigError(f"{directory} is no directory. Give one that has runs in it.")
    if is_run(directory):
        yield directory
    if depth == 0:
        return
    try:
        children = sorted(child for child in directory.iterdir() if child.is_dir() and not child.is_symlink())
    except PermissionError:
        return
    for child in children:
        if child.name != "checkpoints":
            yield from find_runs(child, depth=depth - 1)
