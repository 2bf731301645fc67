"""What a rank says of itself, and how it is carried."""

import os
import threading
import time
from pathlib import Path

import pytest

from distft.collectives import SingleProcess
from distft.watch.exchange import Exchange, Told
from distft.watch.member import Member
from distft.watch.pulse import Beat, Pulse
from distft.watch.watch import Watch


class _Store:
    """A store in this process."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: str, /) -> None:
        self._values[key] = value.encode()

    def multi_get(self, keys: list[str], /) -> list[bytes]:
        return [self._values[key] for key in keys]


def test_a_beat_comes_out_as_it_went_in() -> None:
    pulse = Pulse()
    pulse.enter("data", 7)
    with pulse.own_work(48):
        pulse.enter("forward")
    pulse.finish_step()
    beat = pulse.beat(3)
    assert Beat.from_text(beat.to_text()) == beat
    assert (beat.number, beat.position, beat.step, beat.phase) == (3, 3, 7, "after the step")
    assert (beat.work.num_steps, beat.work.num_tokens) == (1, 48)


def test_work_counts_by_whole_steps() -> None:
    pulse = Pulse()
    with pulse.own_work(10):
        time.sleep(0.01)
    assert pulse.beat(1).work.seconds == 0
    pulse.finish_step()
    assert 0.01 <= pulse.beat(2).work.seconds < 1


def test_the_stack_is_that_of_the_thread_that_trains() -> None:
    pulse = Pulse()
    beats = []

    def read() -> None:
        time.sleep(0.05)
        beats.append(pulse.beat(1))

    reader = threading.Thread(target=read)
    reader.start()
    _wait_for(reader)
    assert any(frame.endswith(" _wait_for") for frame in beats[0].frames)
    assert not beats[0].is_waiting


def _wait_for(thread: threading.Thread) -> None:
    thread.join()


def test_ranks_see_each_other_hear_what_one_tells_and_rank_0_ends_last() -> None:
    store = _Store()
    pulses = [Pulse(), Pulse()]
    both = [
        Exchange(store, pulse, rank=rank, watched=range(2), heartbeat_s=0.01)
        for rank, pulse in enumerate(pulses)
    ]
    for exchange in both:
        exchange.post()
    for exchange in both:
        exchange.start()
    both[1].tell(Told((5,), "rank 5 hangs"), timeout_s=5)
    while both[0].told is None or set(both[0].later(0.0)) != {0, 1}:
        time.sleep(0.01)
    assert both[0].told == Told((5,), "rank 5 hangs")
    pulses[0].enter("end")
    both[0].end(timeout_s=0.1)
    assert both[0].is_running
    pulses[1].enter("end")
    both[1].end(timeout_s=5)
    both[0].end(timeout_s=5)
    assert [exchange.is_running for exchange in both] == [False, False]


def test_one_rank_alone_watches_nobody(tmp_path: Path) -> None:
    before = threading.active_count()
    with Watch(SingleProcess(), tmp_path, heartbeat_s=0.01, hang_timeout_s=1, interval_steps=1) as watch:
        assert threading.active_count() == before
        assert watch.collect() == []


def test_a_rank_kills_brothers_only() -> None:
    """What is no child of this launcher, or carries a pid of another machine, is left alone."""
    me = Member.here()
    launcher = Member(host=me.host, pid=me.parent_pid, parent_pid=me.parent_pid, space=me.space)
    elsewhere = Member(host="elsewhere", pid=1, parent_pid=me.parent_pid, space="another kernel")
    unknown = Member(host=me.host, pid=me.parent_pid, parent_pid=me.parent_pid, space="")
    assert not any(me.kill_brother(other) for other in (me, launcher, elsewhere, unknown))
    os.kill(me.parent_pid, 0)


@pytest.mark.parametrize("space", ["", "another"])
def test_where_pids_mean_nothing_nobody_is_killed(space: str) -> None:
    me = Member(host="a", pid=os.getpid(), parent_pid=os.getppid(), space=space)
    assert not me.kill_brother(Member(host="a", pid=1, parent_pid=os.getppid(), space=space))
