"""The section `search` of a configuration: what a search varies, how it chooses, and what it compares."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from distft.config import Settings
from distft.search.space import ChoiceConfig, Distribution, DistributionConfig, IntUniformConfig

RANKS = "ranks"  # in the space: the number of ranks of a trial, which no setting of a run has
_MOST_TRIALS = 100_000
# Whose runs a setting makes, or what the search itself decides; by dotted key.
_NOT_SEARCHED = ("run_dir", "checkpoint.directory", "checkpoint.resume", "trackers", "cluster", "search")


class GridConfig(Settings):
    """Every combination of the values."""

    type: Literal["grid"] = "grid"


class RandomConfig(Settings):
    """Independent draws; trial i is a function of the seed and i."""

    type: Literal["random"] = "random"
    seed: int = Field(0, ge=0, lt=2**31)


class OptunaConfig(Settings):
    """Optuna's tree-structured Parzen estimator, from the results so far. Needs optuna."""

    type: Literal["optuna"] = "optuna"
    seed: int = Field(0, ge=0, lt=2**31)
    num_random: int = Field(8, ge=1)  # trials drawn at random before it models anything


class HyperOptConfig(Settings):
    """HyperOpt's tree-structured Parzen estimator, from the results so far. Needs hyperopt."""

    type: Literal["hyperopt"] = "hyperopt"
    seed: int = Field(0, ge=0, lt=2**31)
    num_random: int = Field(8, ge=1)  # trials drawn at random before it models anything


SamplerConfig = Annotated[
    GridConfig | RandomConfig | OptunaConfig | HyperOptConfig, Field(discriminator="type")
]


class NoSchedulerConfig(Settings):
    """Every trial trains to its end."""

    type: Literal["none"] = "none"


class AshaConfig(Settings):
    """Asynchronous successive halving: at each rung only the best share of the trials so far goes on."""

    type: Literal["asha"] = "asha"
    grace_steps: int = Field(ge=1)  # the first rung; the others are at multiples by powers of the factor
    reduction_factor: float = Field(3.0, gt=1, le=100)  # 1 of so many goes on


class MedianConfig(Settings):
    """A trial stops if its best value is worse than the median of the others' means up to that step."""

    type: Literal["median"] = "median"
    grace_steps: int = Field(ge=1)
    min_trials: int = Field(3, ge=1)  # that have come as far


class HyperbandConfig(Settings):
    """Hyperband: brackets of trials that are halved together, up to train.max_steps."""

    type: Literal["hyperband"] = "hyperband"
    reduction_factor: float = Field(3.0, gt=1, le=100)


class PopulationConfig(Settings):
    """Population-based training: the worst trials go on from the best ones' checkpoints, changed."""

    type: Literal["population"] = "population"
    interval_steps: int = Field(ge=1)  # between decisions; a multiple of evaluation.every_steps
    quantile: float = Field(0.25, gt=0, le=0.5)  # the share that is replaced, and that which replaces it
    resample_probability: float = Field(0.25, ge=0, le=1)  # of a new draw in place of a change by 0.8 or 1.25
    seed: int = Field(0, ge=0, lt=2**31)  # of the changes
    synchronous: bool = False  # all trials wait for each other at the interval: slower, and repeatable


SchedulerConfig = Annotated[
    NoSchedulerConfig | AshaConfig | MedianConfig | HyperbandConfig | PopulationConfig,
    Field(discriminator="type"),
]


class ConstraintConfig(Settings):
    """A bound on a metric: trials beyond it rank below all others."""

    metric: str  # as in metrics.jsonl, such as peak_memory_bytes
    max: float | None = Field(None, allow_inf_nan=False)
    min: float | None = Field(None, allow_inf_nan=False)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max is None and self.min is None:
            raise ValueError("set max, min or both")
        if self.max is not None and self.min is not None and self.min > self.max:
            raise ValueError(f"min={self.min:g} is more than max={self.max:g}")
        return self


class RepeatConfig(Settings):
    """Further runs of the best settings, once the search is over."""

    count: int = Field(ge=1)  # of the best trials
    seeds: tuple[int, ...] = Field(min_length=1)


def _choice_of_list(given: Any) -> Any:
    return {"type": "choice", "values": given} if isinstance(given, list) else given


_Varied = Annotated[
    DistributionConfig,
    BeforeValidator(_choice_of_list, json_schema_input_type=DistributionConfig | list[Any]),
]


class SearchConfig(Settings):
    """What `distft tune` does with the rest of the configuration."""

    space: dict[str, _Varied]  # dotted key of a setting, or `ranks`: a list, or a distribution
    sampler: SamplerConfig = RandomConfig()
    scheduler: SchedulerConfig = NoSchedulerConfig()
    metric: str | None = None  # as in metrics.jsonl; null: of early stopping, else accuracy, else loss
    mode: Literal["auto", "min", "max"] = "auto"  # auto: min for losses, errors and perplexities
    value: Literal["auto", "last", "best"] = "auto"  # of a run; auto: best with early stopping, else last
    metrics: tuple[str, ...] = ()  # shown beside it
    constraints: tuple[ConstraintConfig, ...] = ()
    num_trials: int | None = Field(None, ge=1, le=_MOST_TRIALS)  # null: all of a grid
    max_concurrent: int | None = Field(None, ge=1)  # trials at a time; null: as many as the cluster fits
    ranks: int = Field(1, ge=1, le=4096)  # of each run, on one node, with the resources of `cluster`
    seeds: tuple[int, ...] = ()  # a trial is a run for each of them, and its value the mean
    folds: int | None = Field(None, ge=2, le=1000)  # a trial is a run for each fold, and its value the mean
    repeat_best: RepeatConfig | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        problems = [*self._space_problems(), *self._trial_problems(), *self._scheduler_problems()]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _space_problems(self) -> Iterator[str]:
        if not self.space:
            yield "space is empty: name a setting and its values, such as optim.peak_lr: [1.0e-3, 3.0e-3]"
        for key in self.space:
            if (owner := next((k for k in _NOT_SEARCHED if is_below(key, k)), None)) is not None:
                reason = "is of the search itself" if owner == "search" else "the search sets for each trial"
                yield f"space: {key} {reason if owner == 'search' else f'is what {reason}'}"
            above = next((k for k in self.space if k != key and is_below(key, k)), None)
            if above is not None:
                yield f"space: {key} is a part of {above}, which is there too"
        ranks = self.space.get(RANKS)
        if isinstance(ranks, ChoiceConfig):
            wrong = [r for r in ranks.values if not isinstance(r, int) or isinstance(r, bool) or r < 1]
            if wrong:
                yield f"space: ranks={wrong[0]!r} is not a number of ranks"
        elif ranks is not None:
            yield "space: ranks needs a list of numbers"

    def _trial_problems(self) -> Iterator[str]:
        if isinstance(self.sampler, GridConfig):
            for key, distribution in self.space.items():
                if not isinstance(distribution, ChoiceConfig | IntUniformConfig):
                    yield f"space: {key} has a distribution, and a grid needs a list of its values"
            if self.num_trials is not None and self.space and self.num_trials != self.grid_size:
                yield (
                    f"num_trials={self.num_trials}, and the grid has {self.grid_size:,} combinations: leave "
                    "it out, or set sampler={type: random}"
                )
            if self.grid_size > _MOST_TRIALS:
                yield f"the grid has {self.grid_size:,} combinations, more than {_MOST_TRIALS:,}"
        elif self.num_trials is None:
            yield "num_trials is missing: only a grid has a size of its own"
        for name, seeds in (("seeds", self.seeds), ("repeat_best.seeds", self._repeated_seeds)):
            if len(set(seeds)) < len(seeds):
                yield f"{name} has a seed twice"
        if "seed" in self.space and (self.seeds or self.repeat_best is not None):
            yield "space: seed varies with seeds and repeat_best too: choose one of them"
        if self.folds is not None and any(is_below(key, "validation") for key in self.space):
            yield "space: folds decide what validates, so validation cannot vary"

    def _scheduler_problems(self) -> Iterator[str]:
        kind = self.scheduler.type
        if kind != "none" and self.num_runs > 1:
            yield (
                f"scheduler.type={kind} compares runs at the same step, and a trial has {self.num_runs} "
                "runs, one after the other: leave out seeds and folds (repeat_best has seeds), or "
                "the scheduler"
            )
        if kind in {"hyperband", "population"}:
            if self.sampler.type in {"optuna", "hyperopt"}:
                yield (
                    f"scheduler.type={kind} needs all its trials at the start, and sampler.type="
                    f"{self.sampler.type} finds them one by one: set sampler={{type: random}}"
                )
            if self.max_concurrent is not None:
                yield f"scheduler.type={kind} pauses trials by itself, so max_concurrent must be null"
        if isinstance(self.scheduler, PopulationConfig) and self.num_points == 1:
            yield "scheduler.type=population needs two trials or more"
        if self.scheduler.type != "population" and RANKS in self.space and len(self.space) == 1:
            yield "space: ranks alone changes no result"

    @property
    def _repeated_seeds(self) -> tuple[int, ...]:
        return () if self.repeat_best is None else self.repeat_best.seeds

    @property
    def grid(self) -> dict[str, list[Any]]:
        """The values of each key of a grid."""
        return {key: grid_values(one) for key, one in self.space.items()}

    @property
    def grid_size(self) -> int:
        size = 1
        for one in self.space.values():
            size *= one.num_values if isinstance(one, IntUniformConfig) else len(grid_values(one) or [0])
        return size

    @property
    def num_points(self) -> int:
        """How many trials there are, without those of `repeat_best`."""
        return self.num_trials or self.grid_size

    def counts_best(self, *, stops_early: bool) -> bool:
        """Whether the best value of a run counts, in place of its last one."""
        return stops_early if self.value == "auto" else self.value == "best"

    @property
    def num_runs(self) -> int:
        """Of a trial."""
        return max(len(self.seeds), 1) * (self.folds or 1)


def grid_values(distribution: Distribution) -> list[Any]:
    """The values of a grid's key; none of a distribution without a list of them."""
    if isinstance(distribution, ChoiceConfig):
        return distribution.values
    if isinstance(distribution, IntUniformConfig):
        return list(range(distribution.low, distribution.high + 1, distribution.step))
    return []


def is_below(key: str, above: str) -> bool:
    """Whether the dotted key is `above`, or one of a setting in it."""
    return key == above or key.startswith(f"{above}.")
