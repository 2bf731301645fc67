"""Who is taken for a rank that hangs, and who never is."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distft.watch.pulse import Beat, Work
from distft.watch.verdict import Hang, Sighting, explain, find_hang

TIMEOUT_S = 10.0
WORKED = Work(num_steps=3, num_tokens=300, seconds=1.0)


def _beat(**changes: Any) -> Beat:
    beat = Beat(
        number=5,
        position=40,
        step=7,
        phase="forward",
        work=WORKED,
        is_waiting=False,
        frames=("a.py:1 run", "b.py:2 wait_for_ever"),
    )
    return replace(beat, **changes)


def _seen(*, silent_s: float = 0.0, unmoved_s: float = 0.0, **changes: Any) -> Sighting:
    return Sighting(beat=_beat(**changes), silent_s=silent_s, unmoved_s=unmoved_s)


def _find(*sightings: Sighting, observer: int = 0, sees_all: bool = True) -> Hang | None:
    return find_hang(
        dict(enumerate(sightings)), observer=observer, hang_timeout_s=TIMEOUT_S, sees_all=sees_all
    )


def _waiting(**changes: Any) -> Sighting:
    return _seen(unmoved_s=11.0, is_waiting=True, **changes)


def test_ranks_whose_beats_stop_are_silent_and_named_together() -> None:
    gone = _seen(silent_s=10.0, unmoved_s=10.0)
    assert _find(_waiting(), gone, _waiting(), gone) == Hang(reason="silent", ranks=(1, 3))


def test_if_not_even_the_own_beats_come_back_rank_0_cannot_be_reached() -> None:
    lost = _seen(silent_s=10.0, unmoved_s=10.0)
    assert _find(lost, lost, lost, observer=1) == Hang(reason="unreachable", ranks=(0,))


def test_rank_0_does_not_accuse_anybody_while_it_cannot_reach_the_store_itself() -> None:
    lost = _seen(silent_s=10.0)
    assert _find(lost, lost, observer=0) is None


@pytest.mark.parametrize("phase", ["data", "forward", "backward and update", "after the step"])
def test_a_rank_that_does_not_come_to_where_the_others_are_is_behind(phase: Any) -> None:
    late = _seen(unmoved_s=10.0, phase=phase, position=39)
    assert _find(_waiting(), late, _waiting()) == Hang(reason="behind", ranks=(1,))


def test_of_ranks_in_the_same_place_the_one_that_waits_for_nobody_is_behind() -> None:
    assert _find(_waiting(), _waiting(), _seen(unmoved_s=10.0)) == Hang(reason="behind", ranks=(2,))


@pytest.mark.parametrize(
    "late",
    [
        _seen(unmoved_s=9.9, position=39),  # not for long enough
        _seen(unmoved_s=99.0, position=39, work=Work()),  # a first step compiles
        _seen(unmoved_s=99.0, position=39, phase="start", work=Work()),  # reads its weights
        _seen(unmoved_s=99.0, position=39, phase="save"),  # one rank writes for all
        _seen(unmoved_s=99.0, position=39, phase="evaluation"),
        _seen(unmoved_s=99.0, silent_s=99.0, position=39, phase="end"),  # is done
        _seen(unmoved_s=99.0, position=39, is_waiting=True),  # the cause lies elsewhere
        _seen(unmoved_s=99.0, silent_s=5.0, position=39),  # is it silent, rather? that will show
    ],
)
def test_a_rank_that_is_rightly_or_not_yet_surely_behind_is_not_accused(late: Sighting) -> None:
    assert _find(_waiting(), late) is None


def test_a_rank_that_sees_some_ranks_only_does_not_say_who_is_behind() -> None:
    late = _seen(unmoved_s=10.0, position=39)
    assert _find(_waiting(), late, _waiting(), observer=2, sees_all=False) is None


def test_a_rank_does_not_accuse_itself() -> None:
    assert _find(_waiting(), _seen(unmoved_s=10.0, position=39), observer=1) is None


@given(st.lists(st.tuples(st.integers(30, 50), st.booleans(), st.floats(0, 9.9)), min_size=2, max_size=6))
def test_ranks_that_beat_and_move_are_left_in_peace(ranks: list[tuple[int, bool, float]]) -> None:
    seen = [
        _seen(silent_s=age_s, unmoved_s=age_s, position=position, is_waiting=waits)
        for position, waits, age_s in ranks
    ]
    assert all(_find(*seen, observer=observer) is None for observer in range(len(seen)))


def test_a_sighting_ages_until_another_beat_comes_and_a_place_until_another_is_entered() -> None:
    seen = Sighting(beat=_beat()).later(2.0)
    again = seen.updated(_beat())
    assert (again.silent_s, again.unmoved_s) == (2.0, 2.0)
    beating = seen.updated(_beat(number=6))
    assert (beating.silent_s, beating.unmoved_s) == (0.0, 2.0)
    moving = seen.updated(_beat(number=6, position=41))
    assert (moving.silent_s, moving.unmoved_s) == (0.0, 0.0)


def test_the_message_names_rank_place_time_step_and_stack() -> None:
    sightings = {1: _seen(silent_s=12.0, phase="forward")}
    text = explain(Hang(reason="silent", ranks=(1,)), sightings, {1: "node4, pid 123"})
    assert text.splitlines() == [
        "rank 1 (node4, pid 123) has not answered for 12.0 s, in step 7, forward; its Python stack was:",
        "  a.py:1 run",
        "  b.py:2 wait_for_ever",
    ]
