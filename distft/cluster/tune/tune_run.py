"""Runs the trials of a search through Ray Tune, and writes what happens into the search's journal."""

import contextlib
import logging
import math
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from ray import tune
from ray.tune import Callback, PlacementGroupFactory
from ray.tune.stopper import Stopper

from distft.cluster.connection import ray_connection
from distft.cluster.driver.resources import (
    describe_capacity,
    node_resources,
    num_workers_that_fit,
    resources_per_worker,
)
from distft.cluster.tune.actor import REPORT, STEP, VALUE, TrialActor, read_trial_config, trial_config
from distft.cluster.tune.run_process import wait_for_trials
from distft.cluster.tune.samplers import RecordedSampler
from distft.cluster.tune.schedulers import build_scheduler
from distft.cluster.tune.scratch import EXPERIMENT, scratch_directory
from distft.cluster.tune.trial import STOP_FILE, SearchTask
from distft.errors import ConfigError, LaunchError, Preempted
from distft.run.cluster_config import ClusterConfig
from distft.search.journal import Journal, TrialRecord
from distft.search.metrics import is_number, sign_of
from distft.search.search_file import ranks_of
from distft.search.space import Values
from distft.search.trial_runs import trial_dir

_MOST_LOST_ACTORS = 3  # of a trial, as by lost nodes: it goes on elsewhere from its run's checkpoint
_START_S, _HEALTH_S = 60.0, 60.0


@dataclass(slots=True)
class Stop:
    """Whether the search ends before its trials, and why."""

    directory: Path
    is_requested: bool = False
    fault: str = ""  # of the search's settings, which a trial has found

    def request(self) -> None:
        """Have all trials save and end, on all nodes."""
        self.is_requested = True
        (self.directory / STOP_FILE).touch()

    @property
    def is_due(self) -> bool:
        return self.is_requested or bool(self.fault)


@dataclass(slots=True)
class TuneRun:
    """One use of Ray Tune: some trials of a search, under its sampler and scheduler."""

    task: SearchTask
    journal: Journal
    show: Callable[[str], None]
    on_change: Callable[[], None]  # after each event of the journal that a table shows
    stop: Stop
    points: Mapping[int, Values] | None  # of all trials to run; None: the sampler finds them
    _metric: str | None = field(default=None)

    def run(self) -> None:
        """Run the trials that have not ended. Raises `ConfigError` for a fault that all would have."""
        search, directory = self.task.search, self.task.directory
        for logger in ("ray.tune", "ray.train", "ray"):
            logging.getLogger(logger).setLevel(logging.CRITICAL)
        with scratch_directory(directory) as scratch:
            tuner = tune.Tuner(
                tune.with_resources(
                    tune.with_parameters(TrialActor, task=self.task), self._resources_of_config
                ),
                param_space=self._param_space(),
                tune_config=tune.TuneConfig(
                    search_alg=None if self.points is not None else self._sampler(),
                    scheduler=self._scheduler(),
                    num_samples=1 if self.points is not None else search.num_points,
                    max_concurrent_trials=search.max_concurrent,
                    trial_name_creator=lambda trial: trial.trial_id,
                    trial_dirname_creator=lambda trial: trial.trial_id,
                ),
                run_config=tune.RunConfig(
                    name=EXPERIMENT,
                    storage_path=scratch,
                    stop=_Stopper(self.stop),
                    verbose=0,
                    # A run saves when it is stopped; Ray Tune would wait for a checkpoint of its own first.
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                    failure_config=tune.FailureConfig(max_failures=_MOST_LOST_ACTORS),
                    callbacks=[_Events(self)],
                ),
            )
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # advice of Ray Tune that users cannot follow
                    tuner.fit()
            finally:
                self._wait_for_processes()
        if self.stop.fault:
            raise ConfigError(self.stop.fault)

    def _wait_for_processes(self) -> None:
        folders = [trial_dir(self.task.directory, number) for number in self.journal.trials]
        wait_for_trials(
            [path for path in folders if path.is_dir()], self.task.config.hang_timeout_s, lambda: False
        )

    def _param_space(self) -> dict[str, Any]:
        if self.points is None:
            return {}
        configs = [
            trial_config(number, values, self._seen_step(number))["trial"]
            for number, values in self.points.items()
            if not self.journal.trials[number].has_ended
        ]
        return {"trial": tune.grid_search(configs)}

    def _seen_step(self, number: int) -> int:
        """Values up to here are known; of Hyperband, which starts anew, none are."""
        if self.task.search.scheduler.type == "hyperband" or len(self.task.members) > 1:
            return -1
        trial = self.journal.trials.get(number)
        steps = [step for step, _ in trial.history()] if trial is not None else []
        return max(steps, default=-1)

    def _scheduler(self) -> Any:
        trials = self.journal.trials
        past: dict[int, list[dict[str, float]]] = {}
        for line in self.journal.lines:
            if line.get("kind") == "result" and isinstance(line.get("step"), int):
                value = self._signed(line.get("metric"), line.get("value"))
                past.setdefault(line["number"], []).append({STEP: line["step"], VALUE: value})
        ended = [number for number, trial in trials.items() if trial.has_ended]
        return build_scheduler(
            self.task.search,
            self.task.config.train.max_steps,
            every_steps=self.task.config.evaluation.every_steps or 1,
            past=past,
            ended=ended,
            resources_of=self._resources_of_config,
            on_fork=self._note_fork,
        )

    def _signed(self, metric: Any, value: Any) -> float:
        """More is better."""
        if not is_number(value) or not isinstance(metric, str):
            return -math.inf
        return sign_of(metric, self.task.search.mode) * value

    def _sampler(self) -> RecordedSampler:
        trials = self.journal.trials
        events: list[tuple[str, int, float | None]] = []
        for line in self.journal.lines:
            if line.get("kind") == "trial" and line.get("repeat_of") is None:
                events.append(("suggest", line["number"], None))
            elif line.get("kind") == "end" and trials[line["number"]].repeat_of is None:
                is_failed = line["state"] == "failed"
                value = None if is_failed else self._signed(line.get("metric"), line.get("value"))
                events.append(("end", line["number"], value))
        own = {number: trial for number, trial in trials.items() if trial.repeat_of is None}
        return RecordedSampler(
            self.task.search,
            unfinished=[number for number, trial in own.items() if not trial.has_ended],
            known={number: trial.values for number, trial in own.items()},
            events=events,
            on_suggestion=self._note_suggestion,
            seen_step_of=self._seen_step,
        )

    def _note_suggestion(self, number: int, values: Values) -> None:
        ranks = ranks_of(self.task.search, values)
        self.journal.append("trial", number=number, values=values, ranks=ranks)

    def _note_fork(self, number: int, parent: int, values: Mapping[str, Any]) -> None:
        ranks = ranks_of(self.task.search, dict(values))
        step = self.journal.trials[parent].step
        self.journal.append(
            "fork", number=number, parent=parent, values=values, ranks=ranks, time=time.time()
        )
        self.show(f"trial {number}: goes on from trial {parent} at about step {step:,}")

    def _resources_of_config(self, config: Mapping[str, Any]) -> PlacementGroupFactory:
        _, values, _ = read_trial_config(config)
        return PlacementGroupFactory(
            [resources_of(self.task.config.cluster, ranks_of(self.task.search, values))]
        )


def resources_of(cluster: ClusterConfig, ranks: int) -> dict[str, float]:
    """Of a trial: those of its ranks together, so that they are on one node."""
    each = resources_per_worker(cluster)
    return {name: ranks * amount for name, amount in each.items() if amount > 0}


class _Stopper(Stopper):  # type: ignore[misc]  # Ray has no types
    def __init__(self, stop: Stop) -> None:
        self._stop = stop

    def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:  # noqa: ARG002
        return False

    def stop_all(self) -> bool:
        return self._stop.is_due


class _Events(Callback):  # type: ignore[misc]  # Ray has no types
    """Ray Tune's events become lines of the journal."""

    def __init__(self, run: TuneRun) -> None:
        self._run = run
        self._last: dict[int, dict[str, Any]] = {}  # report by trial

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        number = _number(trial)
        self._last.pop(number, None)
        self._run.journal.append("start", number=number, time=round(time.time(), 3))
        self._run.on_change()

    def on_trial_result(
        self,
        iteration: int,  # noqa: ARG002
        trials: list[Any],  # noqa: ARG002
        trial: Any,
        result: dict[str, Any],
        **info: Any,  # noqa: ARG002
    ) -> None:
        number, report = _number(trial), dict(result[REPORT])
        self._last[number] = report
        names = ("run", "run_dir", "step", "value", "metric", "metrics", "violations", "is_complete")
        fields = {name: report[name] for name in (*names, "total_step", "seconds")}
        self._run.journal.append("result", number=number, **fields)
        self._run.on_change()
        if report["is_fault_of_search"]:
            self._run.stop.fault = report["reason"]
            self._run.stop.request()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        """It has ended by itself, or the scheduler has stopped it, or the search stops."""
        number = _number(trial)
        report = self._last.get(number)
        if report is None or report["state"] == "interrupted" or report["is_fault_of_search"]:
            return
        state = report["state"]
        if state == "running":
            if self._run.stop.is_due:
                return
            state = "stopped"
        self._end(number, state, report["reason"])

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        if not self._run.stop.is_due:
            error = trial.get_pickled_error()
            text = str(error).strip().splitlines() or [type(error).__name__]
            self._end(_number(trial), "failed", f"its process on the node was lost: {text[-1]}")

    def _end(self, number: int, state: str, reason: str) -> None:
        report = self._last.get(number, {})
        final = report.get("value") if report.get("final") is None else report["final"]
        if final is None:
            final = self._last_value(self._run.journal.trials[number])
        self._run.journal.append(
            "end",
            number=number,
            state=state,
            reason=reason,
            metric=report.get("metric"),
            value=final,
            time=round(time.time(), 3),
        )
        self._run.on_change()
        self._run.show(describe_end(self._run.journal.trials[number], report.get("metric"), final))

    def _last_value(self, trial: TrialRecord) -> float | None:
        history = trial.history()
        return history[-1][1] if history else None


def describe_end(trial: TrialRecord, metric: str | None, value: float | None) -> str:
    """A line about a trial that has ended."""
    shown = "" if value is None or metric is None else f", {metric} {value:.6g}"
    if trial.state == "failed":
        return f"trial {trial.number}: failed: {trial.reason}"
    return f"trial {trial.number}: {trial.state} at step {trial.step:,}{shown}"


def _number(trial: Any) -> int:
    return read_trial_config(trial.config)[0]


@contextlib.contextmanager
def stop_on_signals(stop: Stop, show: Callable[[str], None]) -> Iterator[None]:
    """Within the block, SIGINT and SIGTERM have the trials save and end; a second SIGINT ends it at once."""

    def handle(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        if stop.is_requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.request()
        show("Stopping: the trials save. A second Ctrl-C ends them at once.")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def run_on_ray_tune(
    runs: Sequence[Callable[[], TuneRun | None]],
    task: SearchTask,
    stop: Stop,
    show: Callable[[str], None],
    environ: MutableMapping[str, str],
    *,
    most_ranks: int,
) -> None:
    """Run one after the other. Raises `Preempted` after a signal, once all trials have saved."""
    environ.setdefault("RAY_worker_niceness", "0")  # a run trains as fast as one of `distft train`
    environ.update(
        TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1",  # a trial's files are those of its runs
        RAY_AIR_NEW_OUTPUT="0",  # it prints a table of its own, whatever the verbosity
        TUNE_DISABLE_SIGINT_HANDLER="1",
        TUNE_DISABLE_STRICT_METRIC_CHECKING="1",
        TUNE_GLOBAL_CHECKPOINT_S="100000",  # a search goes on by its journal
    )
    cluster = task.config.cluster
    num_cpus = math.ceil(cluster.cpus_per_worker * most_ranks)
    with (
        ray_connection(
            environ,
            num_cpus=num_cpus,
            start_attempt_s=_START_S,
            health_check_timeout_s=_HEALTH_S,
            what="search",
        ),
        stop_on_signals(stop, show),  # Ray has set a handler of SIGTERM that exits
    ):
        _check_capacity(cluster, most_ranks, is_local="RAY_ADDRESS" not in environ)
        for build in runs:
            run = build()
            if run is not None and not stop.is_due:
                run.run()
    if stop.is_requested:
        raise Preempted("The search has stopped, and its trials have saved: the same command goes on.")


def _check_capacity(cluster: ClusterConfig, ranks: int, *, is_local: bool) -> None:
    total, free = node_resources()
    needed = resources_of(cluster, ranks)
    if num_workers_that_fit(needed, total):
        return
    each = " and ".join(f"{amount:g} {name}" for name, amount in needed.items())
    text = f"Ray has {describe_capacity(total, free)}; no node has the {each} of a trial with {ranks} ranks"
    if is_local:
        raise LaunchError(f"{text}: request less, or set RAY_ADDRESS to a larger cluster.")
    print(f"{text}: waiting for one.", flush=True)
