"""Steps do not read values from the device: on a GPU each read leaves the device idle."""

from typing import Any

import pytest
import torch
from support.engine_scenarios import Scenario, Training, collectives_for
from support.rank_pool import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from distft.topology import Topology

READS = {
    "aten._local_scalar_dense.default",
    "aten.is_nonzero.default",
    "aten.nonzero.default",
    "aten.item.default",
}


class CountReads(TorchDispatchMode):
    """Counts operations that hand a tensor's value to Python."""

    def __init__(self) -> None:
        super().__init__()
        self.num_reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_reads += str(func) in READS
        return func(*args, **(kwargs or {}))


def _reads_of_steps(topology: Topology, scenarios: list[Scenario]) -> list[int]:
    """Reads in two steps after the first; the losses are not read."""
    found = []
    for scenario in scenarios:
        training = Training(scenario, topology, collectives_for(scenario, topology))
        training.run(1)
        num_reads = 0
        for _ in range(2):
            batches = training.batches()
            with CountReads() as counter:
                training.run_step(batches)
            num_reads += counter.num_reads
        found.append(num_reads)
        training.engine.close()
    return found


def test_the_counter_sees_a_read() -> None:
    with CountReads() as counter:
        float(torch.ones(()) + 1)
    assert counter.num_reads == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_of_the_local_engine_reads_nothing(precision: str) -> None:
    assert _reads_of_steps(Topology(), [Scenario(precision=precision)]) == [0]


@pytest.mark.ranks
def test_steps_under_zero_read_only_norm_and_overflow() -> None:
    """Clipping and overflow are decided on the host: 5 reads a step at stages 1 and 2, 1 at 0 and 3.

    Its throughput timer, which is off, would add some for each micro-batch.
    """
    scenarios = [Scenario(stage=stage) for stage in (0, 1, 2, 3)]
    limits = [2 * 1, 2 * 5, 2 * 5, 2 * 1]
    for found in run_ranks(_reads_of_steps, 2, scenarios, timeout_s=240):
        within = [num_reads <= limit for num_reads, limit in zip(found, limits, strict=True)]
        assert all(within), found
