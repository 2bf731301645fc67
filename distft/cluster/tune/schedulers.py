"""Ray Tune's schedulers, with what a search needs of them besides: a memory over restarts, and forks."""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from random import Random
from typing import Any

from ray.tune import PlacementGroupFactory
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    HyperBandScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from distft.cluster.tune.actor import STEP, VALUE, read_trial_config, trial_config
from distft.search.settings import (
    AshaConfig,
    HyperbandConfig,
    MedianConfig,
    PopulationConfig,
    SearchConfig,
)
from distft.search.space import explored

_NUM_EVALUATIONS = "num_evaluations"  # of a result
_NO_LAST_STEP = 1 << 40  # a run ends by itself, and a scheduler stops none at its end
Results = Sequence[Mapping[str, Any]]  # STEP and VALUE, in order
ResourcesOf = Callable[[Mapping[str, Any]], PlacementGroupFactory]


def build_scheduler(
    search: SearchConfig,
    max_steps: int | None,
    *,
    every_steps: int = 1,
    past: Mapping[int, Results],
    ended: Iterable[int],
    resources_of: ResourcesOf,
    on_fork: Callable[[int, int, Mapping[str, Any]], None],
) -> Any:
    """The scheduler of a search that has `past` results by trial; those of `ended` trials do not come again.

    `max_steps` of a run; None: its length is given in epochs. Every `every_steps` steps there is a result.
    `on_fork` gets the number of a trial of a population, that of its new parent, and its new settings.
    """
    config = search.scheduler
    options = {"time_attr": STEP, "metric": VALUE, "mode": "max"}
    if isinstance(config, AshaConfig):
        scheduler = _Asha(
            max_t=_NO_LAST_STEP,
            grace_period=config.grace_steps,
            reduction_factor=config.reduction_factor,
            **options,
        )
    elif isinstance(config, MedianConfig):
        scheduler = _Median(
            grace_period=config.grace_steps, min_samples_required=config.min_trials, **options
        )
    elif isinstance(config, HyperbandConfig):
        return _Hyperband(max_steps or _NO_LAST_STEP, every_steps, config.reduction_factor)
    elif isinstance(config, PopulationConfig):
        return _Population(
            search,
            config,
            max_steps=max_steps or _NO_LAST_STEP,
            resources_of=resources_of,
            on_fork=on_fork,
            **options,
        )
    else:
        return FIFOScheduler()
    scheduler.remember(past, ended)
    return scheduler


class _EndedTrial:
    """Stands for a trial of Ray Tune that ended in an earlier start."""

    def __init__(self, number: int) -> None:
        self.config = trial_config(number, {}, 0)
        self.trial_id = f"ended_{number}"


class _Remembering:
    """Mixed into a scheduler that decides by results of all trials: those of an earlier start count too."""

    def remember(self, past: Mapping[int, Results], ended: Iterable[int]) -> None:
        self._past = past
        for number in ended:
            self.on_trial_add(None, _EndedTrial(number))

    def on_trial_add(self, controller: Any, trial: Any) -> None:
        """Before its first new result, a trial that goes on has all that it had reported."""
        super().on_trial_add(controller, trial)  # type: ignore[misc]
        for result in self._past.get(read_trial_config(trial.config)[0], ()):
            self.take(trial, dict(result))

    def take(self, trial: Any, result: dict[str, Any]) -> None:
        """Take note of a result of which an earlier start has decided."""
        raise NotImplementedError


class _Asha(_Remembering, ASHAScheduler):  # type: ignore[misc]  # Ray has no types
    def take(self, trial: Any, result: dict[str, Any]) -> None:
        ASHAScheduler.on_trial_result(self, None, trial, result)


class _Hyperband(HyperBandScheduler):  # type: ignore[misc]
    """Its unit of time is an evaluation.

    Its first bracket, whose trials all train to their end, has log(time of a trial) of them, and the second
    one more: in steps, small searches would fill no other.
    """

    def __init__(self, max_steps: int, every_steps: int, reduction_factor: float) -> None:
        super().__init__(
            time_attr=_NUM_EVALUATIONS,
            max_t=max(1, max_steps // every_steps),
            reduction_factor=reduction_factor,
            stop_last_trials=False,  # those that are left train to their end
            metric=VALUE,
            mode="max",
        )
        self._every_steps = every_steps

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        timed = {**result, _NUM_EVALUATIONS: result[STEP] / self._every_steps}
        return str(super().on_trial_result(controller, trial, timed))


class _Median(_Remembering, MedianStoppingRule):  # type: ignore[misc]
    def take(self, trial: Any, result: dict[str, Any]) -> None:
        self._results[trial].append(result)

    def _on_insufficient_samples(self, controller: Any, trial: Any, time: float) -> str:  # noqa: ARG002
        """Ray Tune would pause the trial for those that wait, and each pause costs a start."""
        return str(TrialScheduler.CONTINUE)


class _Population(PopulationBasedTraining):  # type: ignore[misc]
    """Ray Tune chooses who forks from whom; the settings are drawn from the search's own space."""

    def __init__(
        self,
        search: SearchConfig,
        config: PopulationConfig,
        *,
        max_steps: int,
        resources_of: ResourcesOf,
        on_fork: Callable[[int, int, Mapping[str, Any]], None],
        **options: Any,
    ) -> None:
        super().__init__(
            perturbation_interval=config.interval_steps,
            quantile_fraction=config.quantile,
            resample_probability=config.resample_probability,
            synch=config.synchronous,
            custom_explore_fn=dict,  # Ray Tune asks for one; `_get_new_config` does its work
            log_config=False,
            **options,
        )
        self._search, self._population, self._max_steps = search, config, max_steps
        random.seed(config.seed)  # Ray Tune chooses a parent by it
        self._resources_of, self._on_fork = resources_of, on_fork
        self._num_forks = 0

    def on_trial_result(self, controller: Any, trial: Any, result: Mapping[str, Any]) -> str:
        """At its last step a trial has nothing left to fork for."""
        if result[STEP] >= self._max_steps:
            return str(TrialScheduler.CONTINUE)
        return str(super().on_trial_result(controller, trial, result))

    def _get_new_config(self, trial: Any, trial_to_clone: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        self._num_forks += 1
        number, _, seen_step = read_trial_config(trial.config)
        parent, values, _ = read_trial_config(trial_to_clone.config)
        draws = Random(f"{self._population.seed} {number} {self._num_forks}")
        values = explored(values, self._search.space, self._population.resample_probability, draws)
        self._on_fork(number, parent, values)
        return trial_config(number, values, seen_step), {}

    def _exploit(self, controller: Any, trial: Any, trial_to_clone: Any) -> None:
        super()._exploit(controller, trial, trial_to_clone)
        trial.update_resources(self._resources_of(trial.config))  # of another number of ranks
