"""A trial on its node: starts its runs one after the other, follows their metrics, and reports each value."""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from distft.checkpoint.steps import committed_steps
from distft.cluster.tune.run_process import Launch, RunProcess
from distft.config.yaml_text import to_yaml
from distft.errors import ConfigError, DistftError, LaunchError
from distft.run.config import RunConfig
from distft.search.metrics import VALIDATION, MetricSeries, final_value, sign_of
from distft.search.search_file import ranks_of
from distft.search.settings import SearchConfig
from distft.search.space import Values
from distft.search.trial_runs import (
    Member,
    checkpoints_of,
    run_dir_of,
    run_settings,
    trial_dir,
    write_private,
)
from distft.tracker.growing_lines import GrowingLines
from distft.tracker.jsonl import EVENTS_FILE, METRICS_FILE, EventLog, read_lines, status_of_last_start

STOP_FILE = ".stop"  # in the search's directory: all trials save and end
CONFIG_NAME = "trial.yaml"  # of a run of a trial: what it is started with
FORK = "fork_"  # begins the names of runs that begin with another trial's commit
_HEADER = "# Written by distft tune for one run of a trial.\n"
_POLL_S = 0.1
_COMMIT_S = 60.0  # for a save in progress


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchTask:
    """What the driver sends to each trial."""

    base: Mapping[str, Any]
    config: RunConfig
    search: SearchConfig
    directory: Path  # of the search; all nodes share it
    working_dir: Path | None  # None: Ray has started the actor in its copy of the job's upload
    environment: Mapping[str, str]
    members: Sequence[Member]  # the runs of the trial
    counts_best: bool  # the best value of a run, in place of its last one


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """A new value of a trial's metric, or the end of a run or of the trial."""

    run: str  # its name
    run_dir: str
    step: int | None = None  # of the value; None: there is no new one
    value: float | None = None  # NaN: not finite
    metric: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)  # the others
    violations: tuple[str, ...] = ()
    final: float | None = None  # what the trial counts for: the mean over its complete runs; None: nothing
    is_complete: bool = False  # the run
    state: str = "running"  # of the trial: running, completed, failed, interrupted
    reason: str = ""
    is_fault_of_search: bool = False  # it would be the same in every trial
    total_step: int = 0
    seconds: float = 0.0


class Trial:
    """The runs of one trial."""

    def __init__(self, task: SearchTask, number: int, values: Values, *, seen_step: int = -1) -> None:
        """Values up to `seen_step` are not reported again."""
        if not task.directory.is_dir():
            raise LaunchError(
                f"{task.directory} is not there on this node: set run_dir to one that all nodes share."
            )
        self._task, self._number, self.values = task, number, values
        self._folder = trial_dir(task.directory, number)
        self._seen_step = seen_step
        self._process: RunProcess | None = None
        self._began_s = time.monotonic()
        self._reports: Iterator[Report] | None = None
        self._steps_before = 0  # of the runs that are complete
        self._finals: list[float] = []  # of these runs
        self._run_dir, self._checkpoints = Path(), ""
        self.last_step = 0  # of which a value was reported

    def next_report(self) -> Report:
        """Wait for the next value or end. After an end it is the same one again."""
        if self._reports is None:
            self._reports = self._all_reports()
            self._last: Report | None = None
        report = next(self._reports, self._last)
        assert report is not None
        self._last = report
        self.last_step = report.step or self.last_step
        return report

    def stop(self) -> None:
        """Let the run that trains save and end."""
        if self._process is not None:
            self._process.stop()

    def commit_since(self, step: int) -> tuple[str, int] | None:
        """The checkpoints of the newest run, and the first commit from `step` on; None if there is none.

        Of a population, whose runs commit what they report, it waits for that commit.
        """
        give_up_s = time.monotonic() + _COMMIT_S
        while self._checkpoints:
            found = [one for one in committed_steps(self._checkpoints) if one >= step]
            if found:
                return self._checkpoints, found[0]
            if self._task.search.scheduler.type != "population":
                break
            if time.monotonic() > give_up_s or self._process is None or self._process.exit_code() is not None:
                break
            time.sleep(_POLL_S)
        return None

    def fork(self, checkpoints: str, step: int) -> None:
        """Begin a new run with a commit of another trial; call it before the first report."""
        from distft.checkpoint.fork import fork_commit  # imports torch

        run_dir = self._folder / f"{FORK}{len(self._forks()) + 1:04d}"
        settings = self._settings(Member(), run_dir)
        path = fork_commit(checkpoints, step, checkpoints_of(settings))
        with contextlib.closing(EventLog(run_dir)) as events:
            events.write("fork", step=step, origin=checkpoints, path=path)

    def _forks(self) -> list[Path]:
        """Those that have a commit, in order."""
        return sorted(
            path
            for path in self._folder.glob(f"{FORK}*")
            if committed_steps(checkpoints_of(self._settings(Member(), path)))
        )

    def _settings(self, member: Member, run_dir: Path) -> dict[str, Any]:
        task = self._task
        return run_settings(
            task.base, task.config, task.search, values=self.values, member=member, run_dir=run_dir
        )

    def _all_reports(self) -> Iterator[Report]:
        try:
            forks = self._forks()
            if forks:
                yield from self._reports_of(Member(), forks[-1].name, forks[-1], is_last=True)
                return
            for index, member in enumerate(self._task.members):
                run_dir = run_dir_of(self._task.directory, self._number, member.name)
                is_last = index + 1 == len(self._task.members)
                report = None
                for report in self._reports_of(member, member.name, run_dir, is_last=is_last):
                    yield report
                if report is None or report.state != "running":
                    return
        except DistftError as error:
            yield self._report("run", self._folder, MetricSeries(None), state="failed", reason=str(error))

    def _reports_of(self, member: Member, name: str, run_dir: Path, *, is_last: bool) -> Iterator[Report]:
        """The values of one run and its end."""
        task, search = self._task, self._task.search
        settings = self._settings(member, run_dir)
        self._run_dir, self._checkpoints = run_dir, checkpoints_of(settings)
        stopping = (settings.get("train") or {}).get("early_stopping")
        series = MetricSeries(search.metric, stopping, search.metrics, search.constraints)
        lines = GrowingLines(run_dir / METRICS_FILE)
        is_checked = False
        if not has_completed(run_dir):
            self._start(settings, run_dir)
        while True:
            has_ended = self._process is None or self._process.exit_code() is not None
            is_stopped = (task.directory / STOP_FILE).exists()
            if is_stopped and not has_ended:
                self.stop()
                continue
            for line in lines.read_new():
                is_new = series.add(line)
                if not is_checked and _knows_names(series, settings):
                    is_checked = True
                    try:
                        series.require_known()
                    except ConfigError as error:
                        self.stop()
                        report = self._report(name, run_dir, series, state="failed", reason=str(error))
                        yield replace(report, is_fault_of_search=True)
                        return
                if is_new and series.history[-1][0] > self._seen_step:
                    yield self._report(name, run_dir, series, has_value=True)
            if has_ended:
                break
            time.sleep(_POLL_S)
        yield self._end_of(name, run_dir, series, is_last=is_last)

    def _end_of(self, name: str, run_dir: Path, series: MetricSeries, *, is_last: bool) -> Report:
        if has_completed(run_dir):
            self._process = None
            if not series.history:
                reason = f"the run ended without a value of {series.metric or 'any validation metric'}"
                return self._report(name, run_dir, series, state="failed", reason=reason)
            state = "completed" if is_last else "running"
            self._finals.append(self._final_of(series))
            report = self._report(name, run_dir, series, is_complete=True, state=state)
            self._steps_before += series.step
            return report
        assert self._process is not None
        if self._process.was_interrupted or (self._task.directory / STOP_FILE).exists():
            return self._report(name, run_dir, series, state="interrupted")
        return self._report(name, run_dir, series, state="failed", reason=self._process.reason())

    def _final_of(self, series: MetricSeries) -> float:
        sign = sign_of(series.metric or "", self._task.search.mode)
        values = [value for _, value in series.history]
        found = final_value(values, sign, best=self._task.counts_best)
        return math.nan if found is None else found

    def _report(
        self, name: str, run_dir: Path, series: MetricSeries, *, has_value: bool = False, **fields: Any
    ) -> Report:
        step, value = series.history[-1] if has_value else (None, None)
        return Report(
            run=name,
            run_dir=str(run_dir),
            step=step,
            value=value,
            metric=series.metric,
            metrics={name: value for name, value in series.shown.items() if math.isfinite(value)},
            violations=tuple(series.violations),
            final=fmean(self._finals) if self._finals else None,
            total_step=self._steps_before + series.step,
            seconds=round(time.monotonic() - self._began_s, 2),
            **fields,
        )

    def _start(self, settings: Mapping[str, Any], run_dir: Path) -> None:
        config, ranks = self._task.config, ranks_of(self._task.search, self.values)
        path = run_dir / CONFIG_NAME
        write_private(path, _HEADER + to_yaml(dict(settings)))
        launch = Launch(
            ranks=ranks,
            threads=settings.get("num_threads") or max(1, int(config.cluster.cpus_per_worker)),
            working_dir=self._task.working_dir or Path.cwd(),
            environment=self._task.environment,
            stop_timeout_s=config.hang_timeout_s,
        )
        self._process = RunProcess(path.absolute(), run_dir, self._folder, launch)


def has_completed(run_dir: Path) -> bool:
    """Whether the last start of a run has trained to its end."""
    return status_of_last_start(read_lines(run_dir / EVENTS_FILE)) == "completed"


def _knows_names(series: MetricSeries, settings: Mapping[str, Any]) -> bool:
    """Whether the run has logged a line of training and, where it evaluates, one of validation."""
    is_evaluated = any(name.startswith(VALIDATION) for name in series.latest)
    return "loss" in series.latest and (is_evaluated or settings.get("validation") is None)
