"""Loading: one rank of a node reads what its ranks need whole; partitioned state is read by its owner."""

import socket
from pathlib import Path
from typing import Any

import pytest
from support.engine_scenarios import Scenario, Training, collectives_for, run_alone
from support.rank_pool import run_ranks
from torch import Tensor

from distft.checkpoint.committed import Checkpoint
from distft.checkpoint.fragments import EMA, WEIGHT
from distft.errors import CheckpointError
from distft.topology import Topology

SAVE_STEP = 3


class _CountingCheckpoint(Checkpoint):
    """Counts the elements that are read, by state."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.num_read: dict[str, int] = {}

    def read(self, parameter: str, state: str, start: int, stop: int) -> Tensor:
        self.num_read[state] = self.num_read.get(state, 0) + stop - start
        return super().read(parameter, state, start, stop)


class _UnreadableCheckpoint(Checkpoint):
    """Cannot read one parameter."""

    def read(self, parameter: str, state: str, start: int, stop: int) -> Tensor:
        if parameter == "blocks.1.attn.q.weight":
            raise CheckpointError("rank_00000.safetensors is damaged.")
        return super().read(parameter, state, start, stop)


def _load(
    topology: Topology, path: str, scenarios: list[Scenario], ranks_per_node: int
) -> list[tuple[dict[str, int], list[float]]]:
    socket.gethostname = lambda: f"node{topology.rank // ranks_per_node}"
    found = []
    for scenario in scenarios:
        checkpoint = _CountingCheckpoint.open(path)
        training = Training(scenario, topology, collectives_for(scenario, topology), checkpoint)
        found.append((checkpoint.num_read, training.run(SAVE_STEP + 2)))
        training.engine.close()
    return found


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("world_size", "ranks_per_node"), [(2, 2), (2, 1), (4, 4), (4, 2), pytest.param(4, 3, id="uneven")]
)
def test_one_rank_of_a_node_reads_what_all_its_ranks_need(
    tmp_path: Path, world_size: int, ranks_per_node: int
) -> None:
    alone = run_alone(Scenario(), SAVE_STEP)
    path = alone.save(str(tmp_path))
    numel = sum(param.numel() for param in alone.engine.module.parameters())
    expected_losses = alone.run(SAVE_STEP + 2)
    scenarios = [Scenario(stage=stage) for stage in (0, 1, 2, 3)]
    by_rank = run_ranks(_load, world_size, path, scenarios, ranks_per_node, timeout_s=240)
    share = numel / world_size
    for rank, results in enumerate(by_rank):
        for stage, (num_read, losses) in enumerate(results):
            assert losses == pytest.approx(expected_losses, abs=2e-6)
            is_reader = rank % ranks_per_node == 0
            if stage == 0:
                whole = dict.fromkeys([WEIGHT, "exp_avg", "exp_avg_sq", EMA], numel)
                assert num_read == (whole if is_reader else {})
                continue
            # The weights in use: whole at stages 1 and 2. At stage 3 a slice, and all of small parameters.
            in_use = (numel if is_reader else 0) if stage < 3 else num_read[WEIGHT] - num_read["exp_avg"]
            assert num_read[WEIGHT] == in_use + num_read["exp_avg"]
            assert num_read["exp_avg"] == num_read["exp_avg_sq"] == num_read[EMA]
            assert num_read["exp_avg"] <= share * 1.1 + 200  # partitions are aligned
            if stage == 3:  # of what every rank needs whole it reads a share, too
                assert num_read[WEIGHT] <= 3 * (share * 1.1 + 200)


def _error_of_load(topology: Topology, path: str, stage: int) -> str:
    scenario = Scenario(stage=stage)
    checkpoint = _UnreadableCheckpoint.open(path) if topology.rank == 0 else Checkpoint.open(path)
    try:
        Training(scenario, topology, collectives_for(scenario, topology), checkpoint)
    except CheckpointError as error:
        return str(error)
    return "no error"


@pytest.mark.ranks
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_every_rank_hears_of_an_error_of_the_rank_that_reads(tmp_path: Path, stage: int) -> None:
    path = run_alone(Scenario(), SAVE_STEP).save(str(tmp_path))
    reader, other = run_ranks(_error_of_load, 2, path, stage)
    assert reader == "rank_00000.safetensors is damaged."
    assert other == "rank 0: rank_00000.safetensors is damaged."
