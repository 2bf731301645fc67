"""Heartbeats of a rank whose GPU is behind the host: they show the device's progress, not the host's."""

import json
import os

import pytest
import torch
import torch.distributed as dist
from support.fake_gpu import FakeGpu, FakeGpuClock
from torch._C import _distributed_c10d as c10d

from distft.run.environment import configure_environment
from distft.watch.device_clock import find_started_collective
from distft.watch.hang_detection import Hang, LastSeen, describe_hang, find_hang
from distft.watch.heartbeat import HeartbeatRecorder

TIMEOUT_S = 10.0


class GpuRank:
    """The training thread of a rank with a GPU, and its heartbeats."""

    def __init__(self) -> None:
        self.gpu = FakeGpu()
        self.recorder = HeartbeatRecorder(FakeGpuClock(self.gpu))
        self.step(1)
        self.gpu.run(100)

    def step(self, number: int, *, data_s: float = 0, forward_s: float = 0, backward_s: float = 0) -> None:
        """Enqueue a step; during `data_s` of virtual time the host waits for data."""
        recorder = self.recorder
        with recorder.phase("data", step=number), recorder.own_work():
            self.gpu.run(data_s)
        with recorder.phase("backward and update"):
            with recorder.phase("forward"), recorder.own_work(64):
                self.gpu.launch(forward_s)
            self.gpu.launch(backward_s)
        recorder.finish_step()

    def seen(self, unmoved_s: float = TIMEOUT_S) -> LastSeen:
        self.recorder.heartbeat(1)  # only from the second heartbeat at one place on it asks for collectives
        return LastSeen(heartbeat=self.recorder.heartbeat(2), unmoved_s=unmoved_s)


def test_a_heartbeat_shows_the_phase_that_the_device_has_reached() -> None:
    rank = GpuRank()
    rank.step(2, forward_s=5, backward_s=7)
    phases = []
    for _ in range(4):
        heartbeat = rank.recorder.heartbeat(0)
        phases.append((heartbeat.step, heartbeat.phase, heartbeat.work.num_steps, heartbeat.device != ""))
        rank.gpu.run(4)
    assert phases == [
        (2, "forward", 1, True),
        (2, "forward", 1, True),
        (2, "backward and update", 1, True),
        (2, "after the step", 2, False),
    ]


def test_own_work_is_the_devices_time_and_waits_for_data_count_only_while_the_device_idles() -> None:
    rank = GpuRank()
    before_s = rank.recorder.heartbeat(0).work.seconds
    rank.step(2, data_s=3, forward_s=5, backward_s=50)  # the device idles for 3 s
    rank.step(3, data_s=4, forward_s=5)  # while the device is busy
    rank.gpu.run(1000)
    work = rank.recorder.heartbeat(0).work
    assert work.seconds - before_s == pytest.approx(3 + 5 + 0 + 5)
    assert (work.num_steps, work.num_tokens) == (3, 3 * 64)


def test_an_unfinished_step_adds_no_own_work() -> None:
    rank = GpuRank()
    before = rank.recorder.heartbeat(0).work
    rank.step(2, forward_s=5, backward_s=5)
    rank.gpu.run(9)
    assert rank.recorder.heartbeat(0).work == before


def _hang_of(*ranks: GpuRank) -> tuple[Hang | None, str]:
    last_seen = {number: rank.seen() for number, rank in enumerate(ranks)}
    hang = find_hang(last_seen, observer=0, hang_timeout_s=TIMEOUT_S, sees_all=True)
    processes = {number: f"node, pid {number}" for number in last_seen}
    return hang, "" if hang is None else describe_hang(hang, last_seen, processes).splitlines()[0]


def _hung_pair(*, forward_s: float, backward_s: float) -> tuple[GpuRank, GpuRank]:
    """Rank 0's device waits in a collective for that of rank 1; both hosts wait for their devices."""
    waits, hangs = GpuRank(), GpuRank()
    waits.gpu.started_collective = "nccl:all_reduce 12"
    waits.step(2, backward_s=float("inf"))
    hangs.step(2, forward_s=forward_s, backward_s=backward_s)
    for rank in (waits, hangs):
        rank.gpu.run(1000)
    return waits, hangs


def test_a_device_that_hangs_in_its_forward_is_named_while_the_others_wait_in_a_collective() -> None:
    hang, message = _hang_of(*_hung_pair(forward_s=float("inf"), backward_s=0))
    assert hang == Hang(reason="behind", ranks=(1,))
    assert "in step 2, forward, its GPU in its own work; its Python stack was:" in message


def test_a_device_that_hangs_in_its_backward_is_told_from_one_that_waits_there_by_its_collectives() -> None:
    hang, message = _hang_of(*_hung_pair(forward_s=0, backward_s=float("inf")))
    assert hang == Hang(reason="behind", ranks=(1,))
    assert "in step 2, backward and update, its GPU in its own work" in message


def test_a_host_that_hangs_is_named_though_its_device_has_nothing_to_do() -> None:
    waits, hangs = GpuRank(), GpuRank()
    waits.gpu.started_collective = "nccl:all_reduce 12"
    waits.step(2, backward_s=float("inf"))
    waits.gpu.run(1000)
    data = hangs.recorder.phase("data", step=2)
    data.__enter__()
    hang, message = _hang_of(waits, hangs)
    assert hang == Hang(reason="behind", ranks=(1,))
    assert "in step 2, data; its Python stack was:" in message


def test_devices_that_all_wait_in_a_collective_accuse_nobody() -> None:
    waits, also_waits = _hung_pair(forward_s=0, backward_s=float("inf"))
    also_waits.gpu.started_collective = "nccl:all_reduce 12"
    assert _hang_of(waits, also_waits) == (None, "")
    heartbeat = waits.seen().heartbeat
    assert (heartbeat.is_waiting, heartbeat.device) == (True, "nccl:all_reduce number 12")


def test_without_the_recorders_knowledge_a_device_is_taken_to_wait_only_outside_of_its_own_work() -> None:
    forward, backward = GpuRank(), GpuRank()
    for rank in (forward, backward):
        rank.recorder._clock.collective_in_progress = lambda: None  # type: ignore[method-assign]
    forward.step(2, forward_s=float("inf"))
    backward.step(2, backward_s=float("inf"))
    backward.gpu.run(1000)
    assert [rank.seen().heartbeat.is_waiting for rank in (forward, backward)] == [False, True]


def test_a_rank_that_ends_does_not_wait_for_its_device() -> None:
    rank = GpuRank()
    rank.step(2, forward_s=float("inf"))
    rank.recorder.end()
    assert rank.recorder.heartbeat(0).phase == "end"


def test_a_failed_device_is_left_to_the_training_thread() -> None:
    rank = GpuRank()

    def fail() -> bool:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    rank.step(2, forward_s=1)
    mark, _ = rank.recorder._pending[0]
    mark._event.query = fail  # type: ignore[attr-defined]
    rank.gpu.run(10)
    assert rank.recorder.heartbeat(0).phase == "forward"


def test_torchs_own_record_of_collectives_is_understood() -> None:
    """gloo's recorder has the format of NCCL's, but does not tell when a collective starts."""
    dist.init_process_group("gloo", store=c10d.HashStore(), rank=0, world_size=1)
    try:
        dist.all_reduce(torch.ones(2))
        record = json.loads(c10d._dump_fr_trace_json())  # type: ignore[attr-defined]
    finally:
        dist.destroy_process_group()
    assert find_started_collective(record) is None
    entry = record["entries"][-1]
    assert find_started_collective({**record, "entries": [{**entry, "state": "started"}]}) == (
        f"gloo:all_reduce number {entry['collective_seq_id']}"
    )
    (status,) = record["pg_status"].values()
    timed = {**record, "pg_status": {"0": {**status, "last_started_collective": "1"}}}
    assert find_started_collective(timed) == ""
    assert find_started_collective({}) is None


@pytest.mark.parametrize(("device", "is_recorded"), [("cuda", True), ("cpu", False)])
def test_torch_is_told_to_record_when_collectives_start_unless_the_run_uses_the_cpu(
    monkeypatch: pytest.MonkeyPatch, device: str, is_recorded: bool
) -> None:
    for name in ("TORCH_NCCL_ENABLE_TIMING", "TORCH_FR_BUFFER_SIZE", "DS_ACCELERATOR", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")  # so that its old value comes back after the test
        monkeypatch.delenv(name)
    configure_environment(device)
    assert os.environ.get("TORCH_NCCL_ENABLE_TIMING") == ("1" if is_recorded else None)
