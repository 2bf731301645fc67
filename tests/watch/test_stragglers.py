"""Which ranks are called slow, by work that they do alone."""

import pytest

from distft.watch.pulse import Work
from distft.watch.stragglers import Straggler, StragglerWatch, find_stragglers

NOTHING = Work()


def _after(*ranks: tuple[float, int]) -> list[Straggler]:
    """Ten steps, each rank with its seconds and tokens of a step."""
    works = {
        rank: Work(num_steps=10, num_tokens=10 * tokens, seconds=10 * own_s)
        for rank, (own_s, tokens) in enumerate(ranks)
    }
    return find_stragglers(dict.fromkeys(works, NOTHING), works)


def test_a_rank_that_takes_over_half_as_long_again_as_the_others_is_slow() -> None:
    (slow,) = _after((0.10, 64), (0.16, 64), (0.10, 64), (0.11, 64))
    assert (slow.rank, slow.own_s, slow.others_own_s) == (1, pytest.approx(0.16), pytest.approx(0.10))


def test_of_two_ranks_the_slower_is_slow() -> None:
    assert [slow.rank for slow in _after((0.3, 64), (0.1, 64))] == [0]


@pytest.mark.parametrize(
    "ranks",
    [
        [(0.10, 64), (0.149, 64), (0.10, 64)],
        [(0.2, 128), (0.1, 64)],  # its share of the batch is twice the other's
        [(0.1, 64), (0.1, 128)],  # what a step costs at least weighs more than the share
        [(0.004, 64), (0.002, 64)],  # milliseconds
        [(0.1, 64)],
    ],
)
def test_a_rank_that_is_not_slow_is_not_named(ranks: list[tuple[float, int]]) -> None:
    assert _after(*ranks) == []


def test_a_slow_rank_is_told_of_once_in_a_while_and_the_first_step_does_not_count() -> None:
    watch = StragglerWatch(interval_steps=10, quiet_s=300.0)

    def works(num_steps: int) -> dict[int, Work]:
        first_s = 60.0  # rank 0 compiles
        return {
            0: Work(num_steps=num_steps, num_tokens=num_steps, seconds=first_s + 0.1 * num_steps),
            1: Work(num_steps=num_steps, num_tokens=num_steps, seconds=0.2 * num_steps),
        }

    told = [
        (now_s, slow.rank)
        for num_steps, now_s in ((0, 0), (1, 60), (6, 62), (11, 64), (21, 70), (100, 365), (111, 366))
        for slow in watch.look(works(num_steps), now_s)
    ]
    assert told == [(64, 1), (365, 1)]
