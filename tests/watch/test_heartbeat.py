"""Heartbeats show a rank's phase, own work and stack, and reach the other ranks."""

import threading
import time

from distft.watch.heartbeat import Heartbeat, HeartbeatRecorder
from distft.watch.heartbeat_exchange import HangReport, HeartbeatExchange


def test_a_heartbeat_is_the_same_after_a_round_trip_through_text() -> None:
    recorder = HeartbeatRecorder()
    with recorder.phase("data", step=7), recorder.own_work(48):
        pass
    recorder.finish_step()
    heartbeat = recorder.heartbeat(3)
    assert Heartbeat.from_text(heartbeat.to_text()) == heartbeat
    assert (heartbeat.number, heartbeat.position, heartbeat.step) == (3, 3, 7)
    assert heartbeat.phase == "after the step"
    assert (heartbeat.work.num_steps, heartbeat.work.num_tokens) == (1, 48)


def test_after_a_phase_the_outer_phase_is_entered_again_at_a_new_position() -> None:
    recorder = HeartbeatRecorder()
    seen = []

    def record() -> None:
        heartbeat = recorder.heartbeat(0)
        seen.append((heartbeat.position, heartbeat.phase))

    with recorder.phase("backward and update", step=1):
        record()
        with recorder.phase("forward"):
            record()
        record()
    recorder.finish_step()
    record()
    assert seen == [
        (1, "backward and update"),
        (2, "forward"),
        (3, "backward and update"),
        (5, "after the step"),
    ]


def test_a_rank_that_fails_stays_in_the_phase_of_its_failure() -> None:
    recorder = HeartbeatRecorder()
    try:
        with recorder.phase("forward", step=1):
            raise RuntimeError
    except RuntimeError:
        pass
    assert recorder.heartbeat(0).phase == "forward"


def test_own_work_counts_once_its_step_is_complete() -> None:
    recorder = HeartbeatRecorder()
    with recorder.own_work(10):
        time.sleep(0.01)
    assert recorder.heartbeat(1).work.seconds == 0
    recorder.finish_step()
    work = recorder.heartbeat(2).work
    assert (work.num_steps, work.num_tokens) == (1, 10)
    assert 0.01 <= work.seconds < 1


def test_the_stack_is_that_of_the_training_thread() -> None:
    recorder = HeartbeatRecorder()
    heartbeats = []

    def read() -> None:
        time.sleep(0.05)
        heartbeats.append(recorder.heartbeat(1))

    reader = threading.Thread(target=read)
    reader.start()
    _wait_for(reader)
    assert any(frame.endswith(" _wait_for") for frame in heartbeats[0].frames)
    assert not heartbeats[0].is_waiting


def _wait_for(thread: threading.Thread) -> None:
    thread.join()


class _Store:
    """A store in this process."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}

    def set(self, key: str, value: str, /) -> None:
        self._values[key] = value.encode()

    def multi_get(self, keys: list[str], /) -> list[bytes]:
        return [self._values[key] for key in keys]


def _exchanges() -> tuple[list[HeartbeatRecorder], list[HeartbeatExchange]]:
    """Running exchanges of ranks 0 and 1."""
    store = _Store()
    recorders = [HeartbeatRecorder(), HeartbeatRecorder()]
    exchanges = [
        HeartbeatExchange(store, recorder, rank=rank, watched=range(2), heartbeat_s=0.01)
        for rank, recorder in enumerate(recorders)
    ]
    for exchange in exchanges:
        exchange.post()
    for exchange in exchanges:
        exchange.start()
    return recorders, exchanges


def _end(recorder: HeartbeatRecorder, exchange: HeartbeatExchange, timeout_s: float) -> None:
    recorder.end()
    exchange.end(timeout_s)


def test_a_rank_receives_the_heartbeats_and_the_hang_report_of_another() -> None:
    recorders, exchanges = _exchanges()
    exchanges[1].publish(HangReport((5,), "rank 5 hangs"), timeout_s=5)
    while exchanges[0].hang_report is None or set(exchanges[0].last_seen) != {0, 1}:
        time.sleep(0.01)
    assert exchanges[0].hang_report == HangReport((5,), "rank 5 hangs")
    for rank in (1, 0):
        _end(recorders[rank], exchanges[rank], timeout_s=5)


def test_rank_0_ends_last() -> None:
    recorders, exchanges = _exchanges()
    _end(recorders[0], exchanges[0], timeout_s=0.1)
    assert exchanges[0].is_running
    _end(recorders[1], exchanges[1], timeout_s=5)
    exchanges[0].end(timeout_s=5)
    assert [exchange.is_running for exchange in exchanges] == [False, False]
