"""Ranks that are reported as hung, and ranks that are not."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distft.watch.hang_detection import Hang, LastSeen, describe_hang, find_hang
from distft.watch.heartbeat import Heartbeat, OwnWork

TIMEOUT_S = 10.0
WORKED = OwnWork(num_steps=3, num_tokens=300, seconds=1.0)


def _heartbeat(**changes: Any) -> Heartbeat:
    heartbeat = Heartbeat(
        number=5,
        position=40,
        step=7,
        phase="forward",
        work=WORKED,
        is_waiting=False,
        device="",
        frames=("a.py:1 run", "b.py:2 wait_for_ever"),
    )
    return replace(heartbeat, **changes)


def _seen(*, silent_s: float = 0.0, unmoved_s: float = 0.0, **changes: Any) -> LastSeen:
    return LastSeen(heartbeat=_heartbeat(**changes), silent_s=silent_s, unmoved_s=unmoved_s)


def _find(*last_seen: LastSeen, observer: int = 0, sees_all: bool = True) -> Hang | None:
    return find_hang(
        dict(enumerate(last_seen)), observer=observer, hang_timeout_s=TIMEOUT_S, sees_all=sees_all
    )


def _waiting(**changes: Any) -> LastSeen:
    return _seen(unmoved_s=11.0, is_waiting=True, **changes)


def test_ranks_whose_heartbeats_stop_are_silent_and_reported_together() -> None:
    gone = _seen(silent_s=10.0, unmoved_s=10.0)
    assert _find(_waiting(), gone, _waiting(), gone) == Hang(reason="silent", ranks=(1, 3))


def test_if_the_observers_own_heartbeats_do_not_come_back_rank_0_is_unreachable() -> None:
    lost = _seen(silent_s=10.0, unmoved_s=10.0)
    assert _find(lost, lost, lost, observer=1) == Hang(reason="unreachable", ranks=(0,))


def test_rank_0_reports_nobody_while_it_cannot_reach_the_store() -> None:
    lost = _seen(silent_s=10.0)
    assert _find(lost, lost, observer=0) is None


@pytest.mark.parametrize("phase", ["data", "forward", "backward and update", "after the step"])
def test_a_rank_that_does_not_reach_the_position_of_the_others_is_behind(phase: Any) -> None:
    late = _seen(unmoved_s=10.0, phase=phase, position=39)
    assert _find(_waiting(), late, _waiting()) == Hang(reason="behind", ranks=(1,))


def test_of_ranks_at_one_position_the_one_that_does_not_wait_is_behind() -> None:
    assert _find(_waiting(), _waiting(), _seen(unmoved_s=10.0)) == Hang(reason="behind", ranks=(2,))


@pytest.mark.parametrize(
    "late",
    [
        pytest.param(_seen(unmoved_s=9.9, position=39), id="not for long enough"),
        pytest.param(_seen(unmoved_s=99.0, position=39, work=OwnWork()), id="compiles in its first step"),
        pytest.param(
            _seen(unmoved_s=99.0, position=39, phase="start", work=OwnWork()), id="loads its weights"
        ),
        pytest.param(_seen(unmoved_s=99.0, position=39, phase="save"), id="writes for all ranks"),
        pytest.param(_seen(unmoved_s=99.0, position=39, phase="evaluation"), id="evaluates"),
        pytest.param(_seen(unmoved_s=99.0, silent_s=99.0, position=39, phase="end"), id="has ended"),
        pytest.param(_seen(unmoved_s=99.0, position=39, is_waiting=True), id="waits for another rank"),
        pytest.param(_seen(unmoved_s=99.0, silent_s=5.0, position=39), id="may soon count as silent"),
    ],
)
def test_a_rank_that_is_late_for_a_reason_or_not_certainly_behind_is_not_reported(late: LastSeen) -> None:
    assert _find(_waiting(), late) is None


def test_an_observer_that_does_not_see_all_ranks_reports_no_rank_as_behind() -> None:
    late = _seen(unmoved_s=10.0, position=39)
    assert _find(_waiting(), late, _waiting(), observer=2, sees_all=False) is None


def test_a_rank_does_not_report_itself() -> None:
    assert _find(_waiting(), _seen(unmoved_s=10.0, position=39), observer=1) is None


@given(st.lists(st.tuples(st.integers(30, 50), st.booleans(), st.floats(0, 9.9)), min_size=2, max_size=6))
def test_ranks_with_recent_heartbeats_and_progress_are_not_reported(
    ranks: list[tuple[int, bool, float]],
) -> None:
    seen = [
        _seen(silent_s=age_s, unmoved_s=age_s, position=position, is_waiting=is_waiting)
        for position, is_waiting, age_s in ranks
    ]
    assert all(_find(*seen, observer=observer) is None for observer in range(len(seen)))


@pytest.mark.parametrize(
    ("seen", "is_hung"),
    [
        (_seen(unmoved_s=10.0, device="its own work"), True),
        (_seen(unmoved_s=10.0, device="its own work", phase="backward and update"), True),
        (_seen(unmoved_s=9.9, device="its own work"), False),
        (_seen(unmoved_s=999.0, device=""), False),  # the host stands still: in a debugger, or to compile
        (_seen(unmoved_s=999.0, device="its own work", phase="evaluation"), False),
        (_seen(unmoved_s=999.0, device="its own work", work=OwnWork()), False),  # the first step may compile
        (_seen(unmoved_s=999.0, device="its own work", phase="end"), False),
    ],
)
def test_of_a_single_rank_only_a_device_that_stands_still_is_reported(seen: LastSeen, is_hung: bool) -> None:
    assert _find(seen) == (Hang(reason="device", ranks=(0,)) if is_hung else None)


def test_a_new_heartbeat_resets_the_silent_time_and_a_new_position_resets_both_times() -> None:
    seen = LastSeen(heartbeat=_heartbeat()).advanced(2.0)
    same = seen.updated(_heartbeat())
    assert (same.silent_s, same.unmoved_s) == (2.0, 2.0)
    alive = seen.updated(_heartbeat(number=6))
    assert (alive.silent_s, alive.unmoved_s) == (0.0, 2.0)
    moving = seen.updated(_heartbeat(number=6, position=41))
    assert (moving.silent_s, moving.unmoved_s) == (0.0, 0.0)


def test_the_message_has_the_ranks_process_time_step_and_stack() -> None:
    last_seen = {1: _seen(silent_s=12.0, phase="forward")}
    text = describe_hang(Hang(reason="silent", ranks=(1,)), last_seen, {1: "node4, pid 123"})
    assert text.splitlines() == [
        "rank 1 (node4, pid 123) has not answered for 12.0 s, in step 7, forward; its Python stack was:",
        "  a.py:1 run",
        "  b.py:2 wait_for_ever",
    ]
