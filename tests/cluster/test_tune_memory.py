"""What a search remembers over a restart: samplers and schedulers decide as if there had been none."""

from typing import Any

import pytest

from distft.cluster.tune.actor import STEP, VALUE, read_trial_config, trial_config
from distft.cluster.tune.samplers import RecordedSampler
from distft.cluster.tune.schedulers import build_scheduler
from distft.search.settings import SearchConfig
from distft.search.space import Values

SPACE = {
    "optim.peak_lr": {"type": "log_uniform", "low": 1e-4, "high": 1e-1},
    "model.num_layers": {"type": "int_uniform", "low": 1, "high": 8, "step": 2},
    "optim.weight_decay": {"type": "choice", "values": [0.0, 0.1, None]},
}


def search(**changes: Any) -> SearchConfig:
    return SearchConfig.model_validate({"space": SPACE, "num_trials": 9, **changes})


class Play:
    """Asks a sampler for trials, and tells it values that depend on their settings alone."""

    def __init__(
        self, config: SearchConfig, past: list[tuple[str, int, float | None]], known: dict[int, Values]
    ):
        self.events = list(past)
        self.known = dict(known)
        ended = {number for kind, number, _ in past if kind == "end"}
        self.sampler = RecordedSampler(
            config,
            unfinished=[number for number in known if number not in ended],
            known=known,
            events=past,
            on_suggestion=self._note,
            seen_step_of=lambda _: -1,
        )

    def _note(self, number: int, values: Values) -> None:
        self.events.append(("suggest", number, None))
        self.known[number] = values

    def ask(self) -> tuple[str, int] | None:
        trial_id = f"id_{len(self.events)}_{id(self)}"
        found = self.sampler.suggest(trial_id)
        return None if found == RecordedSampler.FINISHED else (trial_id, read_trial_config(found)[0])

    def tell(self, trial_id: str, number: int) -> None:
        rate = self.known[number]["optim.peak_lr"]
        value = None if number == 2 else -abs(rate - 0.01)  # the third one fails
        self.sampler.on_trial_complete(
            trial_id, {VALUE: value, "report/state": "failed" if value is None else "completed"}
        )
        self.events.append(("end", number, value))


@pytest.mark.parametrize("library", ["optuna", "hyperopt"])
@pytest.mark.parametrize("num_before", [1, 3, 6])
def test_a_sampler_goes_on_as_if_the_search_had_not_been_killed(library: str, num_before: int) -> None:
    config = search(sampler={"type": library, "num_random": 3})
    whole = Play(config, [], {})
    while (asked := whole.ask()) is not None:
        whole.tell(*asked)
    assert len(whole.known) == 9
    first = Play(config, [], {})
    for _ in range(num_before - 1):
        asked = first.ask()
        assert asked is not None
        first.tell(*asked)
    asked = first.ask()  # killed while this one trains
    assert asked is not None
    second = Play(config, first.events, first.known)
    while (asked := second.ask()) is not None:
        second.tell(*asked)
    assert second.known == whole.known
    for values in second.known.values():
        assert 1e-4 <= values["optim.peak_lr"] <= 1e-1
        assert values["model.num_layers"] in {1, 3, 5, 7}
        assert values["optim.weight_decay"] in {0.0, 0.1, None}


def results(values: list[float]) -> list[dict[str, float]]:
    return [{STEP: 10 * (index + 1), VALUE: value} for index, value in enumerate(values)]


class TuneTrial:
    """What schedulers read of Ray Tune's trials."""

    def __init__(self, number: int) -> None:
        self.config, self.trial_id = trial_config(number, {}, -1), f"new_{number}"


@pytest.mark.parametrize("scheduler", [{"type": "asha", "grace_steps": 10, "reduction_factor": 2}])
def test_asha_judges_a_trial_by_those_that_ended_before_a_restart(scheduler: dict[str, Any]) -> None:
    config = search(scheduler=scheduler)
    past = {0: results([0.9, 0.95]), 1: results([0.8]), 2: results([0.85])}
    options: dict[str, Any] = {"resources_of": None, "on_fork": None}
    again = build_scheduler(config, None, past=past, ended=[0, 1], **options)
    bad, good, going_on = TuneTrial(3), TuneTrial(4), TuneTrial(2)
    for trial in (bad, good, going_on):
        again.on_trial_add(None, trial)
    assert again.on_trial_result(None, bad, results([0.1])[0]) == "STOP"
    assert again.on_trial_result(None, good, results([0.99])[0]) == "CONTINUE"
    # Its result at the first rung is known, so only the next rung decides.
    assert again.on_trial_result(None, going_on, {STEP: 10, VALUE: 0.0}) == "CONTINUE"
    assert again.on_trial_result(None, going_on, {STEP: 20, VALUE: 0.1}) == "STOP"
    alone = build_scheduler(config, None, past={}, ended=[], **options)
    alone.on_trial_add(None, bad)
    assert alone.on_trial_result(None, bad, results([0.1])[0]) == "CONTINUE"


def test_the_median_rule_stops_a_trial_below_those_that_ended_before() -> None:
    config = search(scheduler={"type": "median", "grace_steps": 10, "min_trials": 2})
    past = {0: results([0.8, 0.9]), 1: results([0.7, 0.9]), 4: results([0.1])}
    options: dict[str, Any] = {"resources_of": None, "on_fork": None}
    again = build_scheduler(config, None, past=past, ended=[0, 1], **options)
    bad, good, going_on = TuneTrial(2), TuneTrial(3), TuneTrial(4)
    for trial in (bad, good, going_on):
        again.on_trial_add(None, trial)
    assert again.on_trial_result(None, bad, results([0.1])[0]) == "STOP"
    assert again.on_trial_result(None, good, results([0.9])[0]) == "CONTINUE"
    # An earlier start let it go on.
    assert again.on_trial_result(None, going_on, results([0.1, 0.95])[1]) == "CONTINUE"


def test_a_trial_whose_line_is_lost_is_asked_for_again_and_no_number_twice() -> None:
    values: Values = {"optim.peak_lr": 0.01, "model.num_layers": 1, "optim.weight_decay": 0.0}
    past = [event for number in (0, 2) for event in (("suggest", number, None), ("end", number, -0.1))]
    play = Play(search(num_trials=4, sampler={"type": "optuna"}), past, {0: values, 2: values})
    asked = [play.ask() for _ in range(3)]
    assert [found and found[1] for found in asked] == [1, 3, None]
