"""A mixture's loss, gradient and updates: those of a plain loop over its parts, on every engine."""

from typing import Any

import pytest
from support.mixtures import (
    MixtureCase,
    Outcome,
    largest_difference,
    train_alone,
    train_by_engine,
    train_plainly,
)
from support.rank_pool import run_ranks

from distft.config.step_function import value_at

NUM_STEPS = 6
# From step 4 on the second part counts nothing; its head's moments decay, and its last updates fade.
FADING: Any = (1.0, [[1, 0.5], [4, 0.0]])
WEIGHTS = [(1.0, value_at(((1, 0.5), (4, 0.0)), step)) for step in range(NUM_STEPS)]
CASES: list[dict[str, Any]] = [
    {"alternate": False},
    {"alternate": True},
    {"alternate": True, "shares": (1.0, 2.0)},
]


def require_equal(found: Outcome, plain: Outcome) -> None:
    assert found.losses == pytest.approx(plain.losses, abs=2e-6)
    assert largest_difference(found.gradient, plain.gradient) < 1e-6
    assert largest_difference(found.weights, plain.weights) < 2e-6


@pytest.mark.parametrize("changes", CASES)
def test_a_mixture_is_the_weighted_sum_of_its_parts(changes: dict[str, Any]) -> None:
    case = MixtureCase(weights=FADING, **changes)
    plain = train_plainly(case, WEIGHTS)
    found = train_alone(case, NUM_STEPS)
    require_equal(found, plain)
    for step, terms in enumerate(found.terms):  # each part's own mean, whatever its weight
        for term, expected, weight in zip(terms, plain.terms[step], WEIGHTS[step], strict=True):
            assert term == pytest.approx(expected if weight else 0.0, abs=2e-6)


@pytest.mark.ranks
@pytest.mark.parametrize(("world_size", "stages"), [(2, (0, 1, 2)), (4, (3,))])
def test_ranks_and_engines_compute_the_same_mixture(world_size: int, stages: tuple[int, ...]) -> None:
    """Above all at stage 3, where DeepSpeed would apply a head's last gradient again in later steps."""
    expected = [train_plainly(MixtureCase(weights=FADING, **changes), WEIGHTS) for changes in CASES]
    cases = [MixtureCase(weights=FADING, stage=stage, **changes) for stage in stages for changes in CASES]
    for outcomes in run_ranks(train_by_engine, world_size, cases, NUM_STEPS, timeout_s=240):
        for index, found in enumerate(outcomes):
            require_equal(found, expected[index % len(CASES)])


@pytest.mark.ranks
def test_gradients_in_host_memory_are_not_applied_twice_either() -> None:
    changes: dict[str, Any] = {"alternate": True, "weights": FADING}
    plain = train_plainly(MixtureCase(**changes), WEIGHTS)
    cases = [MixtureCase(stage=stage, offload=True, **changes) for stage in (1, 2, 3)]
    for outcomes in run_ranks(train_by_engine, 2, cases, NUM_STEPS, timeout_s=240):
        for found in outcomes:
            require_equal(found, plain)


def test_dropout_and_cuts_do_not_change_a_mixture() -> None:
    cases = [MixtureCase(dropout=0.3, micro_batch_size=size) for size in (1, 3, 7)]
    first, *others = [train_alone(case, 3) for case in cases]
    for other in others:
        require_equal(other, first)
