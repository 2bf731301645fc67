"""The pool of rank processes that other tests use, and its error messages."""

import os
import signal
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from support.rank_pool import Ranks, RanksError, run_ranks, start_ranks

from distft.topology import Topology

pytestmark = pytest.mark.ranks


@dataclass(frozen=True)
class Report:
    """Defined here to see that a rank can unpickle and return classes of a test module."""

    rank: int
    total: float


def sum_of_ranks(topology: Topology, offset: float) -> Report:
    torch.distributed.init_process_group("gloo")
    value = torch.tensor(topology.rank + offset)
    torch.distributed.all_reduce(value)
    return Report(topology.rank, value.item())


def environment(topology: Topology) -> tuple[Topology, dict[str, str], int, bool]:
    return topology, dict(os.environ), torch.get_num_threads(), torch.distributed.is_initialized()


def fail_on(topology: Topology, rank: int) -> None:
    torch.distributed.init_process_group("gloo")
    if topology.rank == rank:
        raise ArithmeticError(f"no sum on rank {rank}")
    torch.distributed.all_reduce(torch.ones(()))


def sleep_on(topology: Topology, rank: int, directory: Path) -> None:
    torch.distributed.init_process_group("gloo")
    if topology.rank == rank:
        sleep_ten_minutes(directory)
    torch.distributed.all_reduce(torch.ones(()))


def sleep_ten_minutes(directory: Path) -> None:
    (directory / "sleeping").touch()
    time.sleep(600)


def all_reduce_forever(topology: Topology, directory: Path) -> None:
    torch.distributed.init_process_group("gloo")
    (directory / f"ready_{topology.rank}").touch()
    while True:
        torch.distributed.all_reduce(torch.ones(()))


def print_and_exit(topology: Topology, code: int) -> None:
    print(f"last output of rank {topology.rank}", flush=True)
    os._exit(code)


def tensor_of(topology: Topology, *shape: int) -> torch.Tensor:
    return torch.full(shape, float(topology.rank))


def train_with_deepspeed(topology: Topology, zero_stage: int, num_steps: int) -> list[float]:
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    model = make_model()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.05),
        config={
            "train_micro_batch_size_per_gpu": 4,
            "zero_optimization": {"stage": zero_stage},
            "steps_per_print": 10**9,
        },
    )
    losses = []
    for inputs, targets in batches(num_steps):
        rows = slice(topology.rank * 4, (topology.rank + 1) * 4)
        loss = torch.nn.functional.mse_loss(engine(inputs[rows]), targets[rows])
        engine.backward(loss)
        engine.step()
        mean = loss.detach() / topology.world_size
        torch.distributed.all_reduce(mean)
        losses.append(mean.item())
    return losses


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))


def batches(num_steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    source = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 5, generator=source), torch.randn(8, 3, generator=source)) for _ in range(num_steps)
    ]


@cache
def losses_of_plain_torch(num_steps: int) -> list[float]:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    losses = []
    for inputs, targets in batches(num_steps):
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def wait_for(directory: Path, pattern: str, count: int, ranks: Ranks) -> None:
    deadline = time.monotonic() + 60
    while len(list(directory.glob(pattern))) < count:
        assert time.monotonic() < deadline, [ranks.output(rank) for rank in range(ranks.world_size)]
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_all_reduce_over_gloo_and_results_come_in_rank_order(world_size: int) -> None:
    total = sum(range(world_size)) + 0.5 * world_size
    assert run_ranks(sum_of_ranks, world_size, 0.5) == [Report(rank, total) for rank in range(world_size)]


def test_a_rank_has_the_environment_that_torchrun_sets() -> None:
    results = run_ranks(environment, 2, env={"EXTRA": "given", "OMP_NUM_THREADS": "2"})
    for rank, (topology, env, num_threads, has_process_group) in enumerate(results):
        assert topology == Topology(rank=rank, local_rank=rank, world_size=2, is_distributed=True)
        assert env["MASTER_ADDR"] == "127.0.0.1"
        assert env["LOCAL_WORLD_SIZE"] == "2"
        assert env["DS_ACCELERATOR"] == "cpu"
        assert (env["EXTRA"], env["OMP_NUM_THREADS"]) == ("given", "2")
        assert num_threads == 1
        assert not has_process_group
    assert len({env["MASTER_PORT"] for _, env, _, _ in results}) == 1
    assert "MASTER_PORT" not in os.environ


def test_tensors_are_returned_unchanged() -> None:
    first, second = run_ranks(tensor_of, 2, 300, 500)
    assert torch.equal(first, torch.zeros(300, 500))
    assert torch.equal(second, torch.ones(300, 500))


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_deepspeed_on_two_ranks_has_the_losses_of_plain_torch(zero_stage: int) -> None:
    first, second = run_ranks(train_with_deepspeed, 2, zero_stage, 4)
    assert first == second == pytest.approx(losses_of_plain_torch(4), abs=1e-6)


def test_an_exception_in_a_rank_is_raised_in_the_test_with_its_traceback() -> None:
    with pytest.raises(RanksError, match=r"ArithmeticError: no sum on rank 1") as caught:
        run_ranks(fail_on, 3, 1)
    assert next(iter(caught.value.failures)) == 1
    assert "in fail_on" in caught.value.failures[1]


def test_a_killed_rank_is_listed_first_and_its_peers_fail(tmp_path: Path) -> None:
    with start_ranks(all_reduce_forever, 3, tmp_path) as ranks:
        wait_for(tmp_path, "ready_*", ranks.world_size, ranks)
        ranks.kill(2)
        with pytest.raises(RanksError, match=r"rank 2 was killed by SIGKILL") as caught:
            ranks.wait(timeout_s=30, grace_s=10)
    assert list(caught.value.failures)[0] == 2  # noqa: RUF015
    assert sorted(caught.value.failures) == [0, 1, 2]
    assert "closed by peer" in caught.value.failures[0] or "reset by peer" in caught.value.failures[0]


def test_a_hanging_rank_is_reported_with_its_stack(tmp_path: Path) -> None:
    with start_ranks(sleep_on, 2, 1, tmp_path) as ranks:
        wait_for(tmp_path, "sleeping", 1, ranks)
        with pytest.raises(RanksError, match=r"rank 1 was still running after 0\.3 s") as caught:
            ranks.wait(timeout_s=0.3)
    assert "in sleep_ten_minutes" in caught.value.failures[1]
    assert "rank 0 was still running" in str(caught.value)


def test_a_rank_that_exits_is_reported_with_its_exit_code_and_output() -> None:
    with pytest.raises(RanksError, match=r"rank 0 exited with code 7") as caught:
        run_ranks(print_and_exit, 1, 7)
    assert "last output of rank 0" in caught.value.failures[0]


def test_no_rank_outlives_the_with_block(tmp_path: Path) -> None:
    with start_ranks(all_reduce_forever, 2, tmp_path) as ranks:
        pids = ranks.pids
        wait_for(tmp_path, "ready_*", ranks.world_size, ranks)
        assert all(is_running(pid) for pid in pids)
    assert not any(is_running(pid) for pid in pids)


def test_a_signal_reaches_one_rank_only(tmp_path: Path) -> None:
    with start_ranks(all_reduce_forever, 2, tmp_path) as ranks:
        wait_for(tmp_path, "ready_*", ranks.world_size, ranks)
        ranks.kill(0, signal.SIGTERM)
        with pytest.raises(RanksError, match=r"rank 0 was killed by SIGTERM") as caught:
            ranks.wait(timeout_s=30)
    assert "SIGTERM" not in caught.value.failures[1]


def test_a_function_that_a_rank_cannot_import_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="top level"):
        run_ranks(lambda topology: topology.rank, 2)
