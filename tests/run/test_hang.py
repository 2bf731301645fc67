"""Ranks that stop, stand still or are slow, in real runs: they are found and named, and the run can go on."""

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distributed import RanksError, start_ranks
from small_runs import events, logged, pretraining, run

from distft.topology import Topology

HANG_STEP = 7
HANG_TIMEOUT_S = 1.0


def _config(data: Path, run_dir: Path, stage: int = 1, **changes: Any) -> dict[str, Any]:
    return pretraining(
        data,
        run_dir,
        engine={"type": "zero", "zero_stage": stage},
        heartbeat_s=0.1,
        hang_timeout_s=HANG_TIMEOUT_S,
        **changes,
    )


def _at_each_forward(act: Callable[[int], None]) -> None:
    """From here on `act` is called at the start of each forward, with the number of calls before."""
    from distft.objective.causal_lm import CausalLM

    ours = CausalLM.__call__
    seen = {"calls": 0}

    def call(objective: Any, *arguments: Any) -> Any:
        seen["calls"] += 1
        act(seen["calls"] - 1)
        return ours(objective, *arguments)

    CausalLM.__call__ = call  # type: ignore[method-assign]


def _hang(topology: Topology, raw: dict[str, Any], rank: int, how: str) -> None:
    """`rank` stops its process, or stands still, in the forward of step 7 or in its data."""
    from distft.data.feed import Prefetcher

    take = Prefetcher.__next__
    seen = {"batches": 0}

    def stand_still(num_calls_before: int) -> None:
        if topology.rank == rank and num_calls_before == 2 * (HANG_STEP - 1):  # two micro-batches a step
            time.sleep(0.3)  # for some beats out of it
            if how == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(1000)

    def take_slowly(batches: Prefetcher) -> Any:
        seen["batches"] += 1
        stand_still(seen["batches"] - 1)
        return take(batches)

    if how == "in its data":
        Prefetcher.__next__ = take_slowly  # type: ignore[method-assign]
    else:
        _at_each_forward(stand_still)
    run(topology, raw)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("how", "rank", "world_size", "stage"),
    [
        ("stopped", 1, 2, 1),
        ("stopped", 0, 3, 2),  # which serves the store
        ("in its forward", 1, 2, 3),  # where the others wait in the forward, too
        ("in its data", 0, 2, 1),
    ],
)
def test_a_rank_that_hangs_is_named_with_its_stack_and_the_run_can_go_on(
    data: Path, pretrained: Path, tmp_path: Path, how: str, rank: int, world_size: int, stage: int
) -> None:
    raw = _config(data, tmp_path, stage)
    with start_ranks(_hang, world_size, raw, rank, how) as ranks:
        with pytest.raises(RanksError) as caught:
            ranks.wait(timeout_s=60, last_words_s=10)
        pid = ranks.pids[rank]
    assert "was killed by SIGKILL" in caught.value.faults[rank]
    told = caught.value.faults[0 if rank else 1]
    what = r"has not answered for" if how == "stopped" else r"stands still for"
    assert re.search(rf"TrainingError: rank {rank} \(.*pid {pid}\).* {what} [12]\.\d s", told), told
    assert "stand_still" in told
    (hang,) = (event for event in events(tmp_path) if event["kind"] == "hang")
    assert (hang["rank"], hang["pid"], hang["step"]) == (rank, pid, HANG_STEP)
    assert hang["phase"] == ("data" if how == "in its data" else "forward")
    assert "stand_still" in hang["stack"][-1]
    run(Topology(), {**raw, "engine": {"type": "local"}})
    assert [event["step"] for event in events(tmp_path) if event["kind"] == "resume"] == [4]
    assert logged(tmp_path) == pytest.approx(logged(pretrained), abs=1e-5)


@pytest.mark.ranks
def test_a_run_that_is_suspended_as_a_whole_goes_on(data: Path, pretrained: Path, tmp_path: Path) -> None:
    with start_ranks(_run_slowly, 2, _config(data, tmp_path)) as ranks:
        while not (tmp_path / "metrics.jsonl").exists() or max(logged(tmp_path), default=0) < 3:
            time.sleep(0.01)
        for number, pause_s in ((signal.SIGSTOP, 2 * HANG_TIMEOUT_S), (signal.SIGCONT, 0)):
            for rank in range(2):
                ranks.kill(rank, number)
            time.sleep(pause_s)
        ranks.wait(timeout_s=60)
    assert "hang" not in {event["kind"] for event in events(tmp_path)}
    assert logged(tmp_path) == pytest.approx(logged(pretrained), abs=1e-5)


def _run_slowly(topology: Topology, raw: dict[str, Any], slow_rank: int | None = None) -> None:
    _at_each_forward(lambda _: time.sleep(0.03 if slow_rank in {None, topology.rank} else 0.0))
    run(topology, raw)


@pytest.mark.ranks
def test_a_slow_rank_is_named_by_its_own_work(data: Path, tmp_path: Path) -> None:
    raw = _config(data, tmp_path, train={"max_steps": 30, "log_every_steps": 1})
    with start_ranks(_run_slowly, 2, raw, 1) as ranks:
        ranks.wait(timeout_s=60)
        pid = ranks.pids[1]
    (slow,) = (event for event in events(tmp_path) if event["kind"] == "straggler")
    assert (slow["rank"], slow["pid"]) == (1, pid)
    assert slow["own_s"] > 0.06 > slow["others_own_s"]
