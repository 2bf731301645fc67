"""Ranks that hang or are slow in real runs are found and named, and the run can resume."""

import os
import re
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.fake_gpu import FakeGpu, FakeGpuClock
from support.rank_pool import RanksError, start_ranks
from support.small_runs import events, logged, pretraining, run

from distft.data.feed import Prefetcher
from distft.objective.causal_lm import CausalLM
from distft.topology import Topology
from distft.train.transfers import DeferredRead
from distft.watch.heartbeat_exchange import HeartbeatExchange

HANG_STEP = 7
HANG_CALL = 2 * (HANG_STEP - 1)  # each step has two micro-batches on every rank
HANG_TIMEOUT_S = 1.0  # without the time in which a rank waits for a CPU
LIMIT_S = 300.0  # only for a run that would never end


def _config(data: Path, run_dir: Path, zero_stage: int = 1, **changes: Any) -> dict[str, Any]:
    return pretraining(
        data,
        run_dir,
        engine={"type": "zero", "zero_stage": zero_stage},
        heartbeat_s=0.1,
        hang_timeout_s=HANG_TIMEOUT_S,
        **changes,
    )


def _before_each_call(owner: type, method: str, act: Callable[[int], None]) -> None:
    """From now on, call `act` before each call of `method`, with the number of earlier calls."""
    original = getattr(owner, method)
    calls = {"earlier": 0}

    def call(*arguments: Any) -> Any:
        act(calls["earlier"])
        calls["earlier"] += 1
        return original(*arguments)

    setattr(owner, method, call)


def _hang_here(exchanges: Mapping[str, int], *, stops_process: bool) -> None:
    begun = exchanges["begun"]
    while exchanges["begun"] < begun + 3:  # a heartbeat with this stack has been sent
        time.sleep(0.01)
    if stops_process:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(1000)


def _hang_before(
    owner: type, method: str, topology: Topology, hung_rank: int, *, stops_process: bool
) -> None:
    exchanges = {"begun": 0}

    def act(earlier_calls: int) -> None:
        if topology.rank == hung_rank and earlier_calls == HANG_CALL:
            _hang_here(exchanges, stops_process=stops_process)

    _before_each_call(HeartbeatExchange, "_exchange", lambda earlier: exchanges.update(begun=earlier))
    _before_each_call(owner, method, act)


def stop_in_forward(topology: Topology, raw: dict[str, Any], hung_rank: int) -> None:
    _hang_before(CausalLM, "loss_sums", topology, hung_rank, stops_process=True)
    run(topology, raw)


def sleep_in_forward(topology: Topology, raw: dict[str, Any], hung_rank: int) -> None:
    _hang_before(CausalLM, "loss_sums", topology, hung_rank, stops_process=False)
    run(topology, raw)


def sleep_in_data(topology: Topology, raw: dict[str, Any], hung_rank: int) -> None:
    _hang_before(Prefetcher, "__next__", topology, hung_rank, stops_process=False)
    run(topology, raw)


def hang_on_gpu(topology: Topology, raw: dict[str, Any], hung_rank: int, phase: str) -> None:
    """Each rank has a fake GPU, that of `hung_rank` hangs in `phase`; the other waits for it in NCCL.

    All hosts have enqueued the step, and wait for their own device: no frame of a collective.
    """
    from distft.engine.zero import ZeroEngine

    gpu = FakeGpu()
    is_hung = topology.rank == hung_rank

    def launch(earlier_calls: int) -> None:
        if earlier_calls == HANG_CALL and (is_hung and phase == "forward"):
            gpu.launch(float("inf"))

    def launch_backward(earlier_calls: int) -> None:
        if earlier_calls == HANG_STEP - 1:
            gpu.started_collective = "" if is_hung else "nccl:all_reduce 12"
            gpu.launch(float("inf"))

    def wait_for_device(earlier_calls: int) -> None:
        if earlier_calls == HANG_STEP - 1:
            time.sleep(1000)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("distft.run.train.device_clock", lambda _: FakeGpuClock(gpu))
        _before_each_call(CausalLM, "loss_sums", launch)
        _before_each_call(ZeroEngine, "step", launch_backward)
        _before_each_call(DeferredRead, "get", wait_for_device)
        run(topology, raw)


@pytest.mark.ranks
@pytest.mark.parametrize("phase", ["forward", "backward and update"])
def test_a_hung_gpu_is_named_though_every_host_only_waits_for_its_device(
    data: Path, tmp_path: Path, phase: str
) -> None:
    with start_ranks(hang_on_gpu, 2, _config(data, tmp_path), 1, phase) as ranks:
        with pytest.raises(RanksError) as caught:
            ranks.wait(timeout_s=LIMIT_S, grace_s=LIMIT_S)
        pid = ranks.pids[1]
    failures = caught.value.failures
    assert "was killed by SIGKILL" in failures[1]
    [event] = (event for event in events(tmp_path) if event["kind"] == "hang")
    assert (event["rank"], event["pid"], event["step"], event["phase"], event["device"]) == (
        1,
        pid,
        HANG_STEP,
        phase,
        "its own work",
    )
    assert HANG_TIMEOUT_S <= event["unmoved_s"] < 3 * HANG_TIMEOUT_S


@pytest.mark.ranks
def test_the_hung_gpu_of_a_single_rank_is_named_and_ends_the_run(data: Path, tmp_path: Path) -> None:
    batch = {"global_batch_size": 8, "micro_batch_size": 4, "seq_len": 24}
    with start_ranks(hang_on_gpu, 1, _config(data, tmp_path, batch=batch), 0, "forward") as ranks:
        with pytest.raises(RanksError) as caught:
            ranks.wait(timeout_s=LIMIT_S)
        pid = ranks.pids[0]
    failure = caught.value.failures[0]
    assert "exited with code 1 before it returned" in failure
    assert re.search(
        rf"training error: rank 0 \(.*pid {pid}\) stands still for [12]\.\d s, in step {HANG_STEP}, forward, "
        "its GPU in its own work; its Python stack was:",
        failure,
    ), failure
    [event] = (event for event in events(tmp_path) if event["kind"] == "hang")
    assert (event["rank"], event["reason"], event["phase"]) == (0, "device", "forward")


@dataclass(frozen=True)
class HungRun:
    """A run that a hang ended."""

    raw: dict[str, Any]
    run_dir: Path
    rank: int  # that hung
    pid: int  # of that rank
    failures: dict[int, str]  # of all ranks
    hang_events: list[dict[str, Any]]
    expected_symptom: str
    expected_phase: str


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((stop_in_forward, 1, 2, 1, "has not answered for", "forward"), id="stopped"),
        pytest.param(
            (stop_in_forward, 0, 3, 2, "has not answered for", "forward"), id="stopped-and-serves-the-store"
        ),
        pytest.param(
            (sleep_in_forward, 1, 2, 3, "stands still for", "forward"),
            id="asleep-while-others-wait-in-forward",
        ),
        pytest.param((sleep_in_data, 0, 2, 1, "stands still for", "data"), id="asleep-in-its-data"),
    ],
)
def hung_run(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> HungRun:
    train_and_hang, rank, world_size, zero_stage, symptom, phase = request.param
    run_dir = tmp_path_factory.mktemp("hung")
    raw = _config(data, run_dir, zero_stage)
    with start_ranks(train_and_hang, world_size, raw, rank) as ranks:
        with pytest.raises(RanksError) as caught:
            ranks.wait(timeout_s=LIMIT_S, grace_s=LIMIT_S)
        pid = ranks.pids[rank]
    return HungRun(
        raw=raw,
        run_dir=run_dir,
        rank=rank,
        pid=pid,
        failures=caught.value.failures,
        hang_events=[event for event in events(run_dir) if event["kind"] == "hang"],
        expected_symptom=symptom,
        expected_phase=phase,
    )


@pytest.mark.ranks
def test_a_hung_rank_is_killed(hung_run: HungRun) -> None:
    assert "was killed by SIGKILL" in hung_run.failures[hung_run.rank]


@pytest.mark.ranks
def test_the_error_of_another_rank_names_the_hung_rank_and_shows_its_stack(hung_run: HungRun) -> None:
    failure = hung_run.failures[0 if hung_run.rank else 1]
    who = rf"TrainingError: rank {hung_run.rank} \(.*pid {hung_run.pid}\)"
    assert re.search(rf"{who}.* {hung_run.expected_symptom} [12]\.\d s", failure), failure
    assert "_hang_here" in failure


@pytest.mark.ranks
def test_one_event_has_the_hung_ranks_pid_step_phase_and_stack(hung_run: HungRun) -> None:
    [event] = hung_run.hang_events
    assert (event["rank"], event["pid"], event["step"]) == (hung_run.rank, hung_run.pid, HANG_STEP)
    assert event["phase"] == hung_run.expected_phase
    assert "_hang_here" in event["stack"][-1]


@pytest.mark.ranks
def test_a_hung_run_resumes_from_its_last_checkpoint(hung_run: HungRun, pretrained: Path) -> None:
    run(Topology(), {**hung_run.raw, "engine": {"type": "local"}})
    assert [event["step"] for event in events(hung_run.run_dir) if event["kind"] == "resume"] == [4]
    assert logged(hung_run.run_dir) == pytest.approx(logged(pretrained), abs=1e-5)


@pytest.mark.ranks
def test_a_run_whose_ranks_are_all_suspended_for_a_while_does_not_hang(
    data: Path, pretrained: Path, tmp_path: Path
) -> None:
    with start_ranks(_run_slowly, 2, _config(data, tmp_path)) as ranks:
        while not (tmp_path / "metrics.jsonl").exists() or max(logged(tmp_path), default=0) < 3:
            time.sleep(0.01)
        for number, pause_s in ((signal.SIGSTOP, 2 * HANG_TIMEOUT_S), (signal.SIGCONT, 0)):
            for rank in range(2):
                ranks.kill(rank, number)
            time.sleep(pause_s)
        ranks.wait(timeout_s=LIMIT_S)
    assert "hang" not in {event["kind"] for event in events(tmp_path)}
    assert logged(tmp_path) == pytest.approx(logged(pretrained), abs=1e-5)


def _run_slowly(
    topology: Topology, raw: dict[str, Any], slow_rank: int | None = None, delay_s: float = 0.03
) -> None:
    """Train with a slow forward on `slow_rank`, or on all ranks."""
    delay_s = delay_s if slow_rank in {None, topology.rank} else 0.0
    _before_each_call(CausalLM, "loss_sums", lambda _: time.sleep(delay_s))
    run(topology, raw)


@pytest.mark.ranks
def test_a_slow_rank_is_named_by_its_own_work(data: Path, tmp_path: Path) -> None:
    raw = _config(data, tmp_path, train={"max_steps": 14, "log_every_steps": 1})
    delay_s = 0.15  # far above the time of a step, also on a busy machine
    with start_ranks(_run_slowly, 2, raw, 1, delay_s) as ranks:
        ranks.wait(timeout_s=LIMIT_S)
        pid = ranks.pids[1]
    [straggler] = (event for event in events(tmp_path) if event["kind"] == "straggler")
    assert (straggler["rank"], straggler["pid"]) == (1, pid)
    assert straggler["own_s"] > 2 * delay_s > straggler["others_own_s"]
