"""Slow ranks are found by the time of their own work."""

import pytest

from distft.watch.heartbeat import OwnWork
from distft.watch.stragglers import Straggler, StragglerDetector, find_stragglers

NO_WORK = OwnWork()


def _stragglers(*ranks: tuple[float, int]) -> list[Straggler]:
    """Stragglers of ten steps, from each rank's seconds and tokens per step."""
    works = {
        rank: OwnWork(num_steps=10, num_tokens=10 * tokens, seconds=10 * own_s)
        for rank, (own_s, tokens) in enumerate(ranks)
    }
    return find_stragglers(dict.fromkeys(works, NO_WORK), works)


def test_a_rank_that_takes_over_one_and_a_half_times_as_long_as_the_others_is_slow() -> None:
    [slow] = _stragglers((0.10, 64), (0.16, 64), (0.10, 64), (0.11, 64))
    assert (slow.rank, slow.own_s, slow.others_own_s) == (1, pytest.approx(0.16), pytest.approx(0.10))


def test_the_slower_of_two_ranks_is_slow() -> None:
    assert [slow.rank for slow in _stragglers((0.3, 64), (0.1, 64))] == [0]


@pytest.mark.parametrize(
    "ranks",
    [
        [(0.10, 64), (0.149, 64), (0.10, 64)],
        [(0.2, 128), (0.1, 64)],  # twice the share of the batch
        [(0.1, 64), (0.1, 128)],  # half the tokens, but a step has a fixed cost
        [(0.004, 64), (0.002, 64)],  # a difference of milliseconds
        [(0.1, 64)],
    ],
)
def test_a_rank_that_is_not_slow_is_not_reported(ranks: list[tuple[float, int]]) -> None:
    assert _stragglers(*ranks) == []


def test_a_slow_rank_is_reported_at_most_once_per_quiet_time_and_the_first_step_does_not_count() -> None:
    detector = StragglerDetector(interval_steps=10, quiet_s=300.0)

    def works(num_steps: int) -> dict[int, OwnWork]:
        first_s = 60.0  # rank 0 compiles
        return {
            0: OwnWork(num_steps=num_steps, num_tokens=num_steps, seconds=first_s + 0.1 * num_steps),
            1: OwnWork(num_steps=num_steps, num_tokens=num_steps, seconds=0.2 * num_steps),
        }

    reported = [
        (now_s, straggler.rank)
        for num_steps, now_s in ((0, 0), (1, 60), (6, 62), (11, 64), (21, 70), (100, 365), (111, 366))
        for straggler in detector.update(works(num_steps), now_s)
    ]
    assert reported == [(64, 1), (365, 1)]
