"""Samplers that choose settings by the results so far: Optuna's and HyperOpt's, through Ray Tune."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from itertools import count
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from distft.cluster.tune.actor import VALUE, trial_config
from distft.search.settings import OptunaConfig, SearchConfig
from distft.search.space import (
    ChoiceConfig,
    Distribution,
    IntUniformConfig,
    LogUniformConfig,
    Values,
)


class RecordedSampler(Searcher):  # type: ignore[misc]  # Ray has no types
    """Gives each trial its number and settings: of an earlier start as they were, else from the library.

    The library's own state follows from the journal: all that it had suggested and been told is repeated in
    the same order when a search goes on.
    """

    def __init__(
        self,
        search: SearchConfig,
        *,
        unfinished: Iterable[int],
        known: Mapping[int, Values],
        events: Iterable[tuple[str, int, float | None]],
        on_suggestion: Callable[[int, Values], None],
        seen_step_of: Callable[[int], int],
    ) -> None:
        """`known` are the settings of all trials so far, and `unfinished` those that go on.

        `events` are "suggest" and "end" with a number and the value, in the order in which they happened.
        """
        super().__init__(metric=VALUE, mode="max")
        self._space, self._num_trials = search.space, search.num_points
        self._inner = _library(search)
        self._waiting, self._known = list(unfinished), dict(known)
        self._on_suggestion, self._seen_step_of = on_suggestion, seen_step_of
        self._numbers: dict[str, int] = {}  # of Ray Tune's trials, by its ids
        for kind, number, value in events:
            if kind == "suggest":
                self._inner.suggest(str(number))
            else:
                self._tell(number, value)

    def suggest(self, trial_id: str) -> Any:
        if self._waiting:
            number = self._waiting.pop(0)
        elif len(self._known) >= self._num_trials:
            return Searcher.FINISHED
        else:
            number = next(one for one in count() if one not in self._known)  # a damaged line leaves a gap
            drawn = self._inner.suggest(str(number))
            self._known[number] = {key: _value(one, drawn[key]) for key, one in self._space.items()}
            self._on_suggestion(number, self._known[number])
        self._numbers[trial_id] = number
        return trial_config(number, self._known[number], self._seen_step_of(number))

    def on_trial_complete(
        self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False
    ) -> None:
        del error
        number = self._numbers[trial_id]
        if result is not None and not is_interrupted(result):
            self._tell(number, None if is_failed(result) else result.get(VALUE))

    def _tell(self, number: int, value: float | None) -> None:
        """`value`: more is better; None of a trial that failed."""
        result = None if value is None or value == -float("inf") else {VALUE: value, "training_iteration": 1}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._inner.on_trial_complete(str(number), result, error=result is None)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the journal has it."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, as `save`."""


def is_interrupted(result: Mapping[str, Any]) -> bool:
    """Whether a flat result of Ray Tune says that the trial goes on when the search does."""
    return bool(result.get("report/state") == "interrupted")


def is_failed(result: Mapping[str, Any]) -> bool:
    """Whether a flat result of Ray Tune says that the trial has failed."""
    return bool(result.get("report/state") == "failed")


def _library(search: SearchConfig) -> Any:
    space = {key: _domain(one) for key, one in search.space.items()}
    sampler = search.sampler
    if isinstance(sampler, OptunaConfig):
        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        chosen = optuna.samplers.TPESampler(seed=sampler.seed, n_startup_trials=sampler.num_random)
        found = OptunaSearch.convert_search_space(space)
        return OptunaSearch(found, metric=VALUE, mode="max", sampler=chosen)
    from ray.tune.search.hyperopt import HyperOptSearch

    assert sampler.type == "hyperopt"
    return HyperOptSearch(
        space,
        metric=VALUE,
        mode="max",
        n_initial_points=sampler.num_random,
        random_state_seed=sampler.seed,
    )


def _domain(one: Distribution) -> Any:
    """Ray Tune's; of a list the indices, since the libraries take plain values only."""
    if isinstance(one, ChoiceConfig):
        return tune.choice(list(range(len(one.values))))
    if isinstance(one, LogUniformConfig):
        return tune.loguniform(one.low, one.high)
    if isinstance(one, IntUniformConfig):
        return tune.randint(0, one.num_values)
    return tune.uniform(one.low, one.high) if one.step is None else tune.quniform(one.low, one.high, one.step)


def _value(one: Distribution, drawn: Any) -> Any:
    """What a library has drawn from `_domain`, as a value of the setting."""
    if isinstance(one, ChoiceConfig):
        return one.values[int(drawn)]
    if isinstance(one, IntUniformConfig):
        return one.low + one.step * int(drawn)
    return min(max(float(drawn), one.low), one.high)
