"""Steps do not wait for the device: on a GPU each wait leaves the device idle."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.count_waits import CountWaits
from support.engine_scenarios import Scenario, Training, collectives_for
from support.rank_pool import run_ranks
from torch import Tensor

from distft.topology import Topology


def _waits_of_steps(topology: Topology, scenarios: list[Scenario]) -> list[list[str]]:
    """Waits in two steps after the first; the losses are not read."""
    if topology.is_distributed:
        from deepspeed.accelerator import get_accelerator

        get_accelerator().is_fp16_supported = lambda: True  # torch can compute in fp16 on any CPU
    found = []
    for scenario in scenarios:
        training = Training(scenario, topology, collectives_for(scenario, topology))
        training.run(1)
        waits = []
        for _ in range(2):
            batches = training.batches()
            with CountWaits() as counter:
                if scenario.precision == "fp16":  # as the loop does after each step
                    training.engine.set_loss_scale(torch.full((), 1024.0))
                training.run_step(batches)
            waits += counter.found
        found.append(waits)
        training.engine.close()
    return found


@pytest.mark.parametrize(
    ("wait", "name"),
    [
        (lambda x: float(x.sum()), "aten._local_scalar_dense"),
        (lambda x: bool((x > 0).all()), "aten._local_scalar_dense"),
        (lambda x: x.tolist(), "tolist"),
        (lambda x: x.cpu(), "cpu"),
        (lambda x: x[x > 0], "aten.index"),
        (torch.nonzero, "aten.nonzero"),
        (lambda x: x.masked_select(x > 0), "aten.masked_select"),
        (lambda x: torch.tensor(3.0, device=x.device), "tensor"),
        (lambda x: torch.equal(x, x + 1), "aten.equal"),
    ],
)
def test_the_counter_sees_a_wait(wait: Callable[[Tensor], Any], name: str) -> None:
    x = torch.ones(3)
    with CountWaits() as counter:
        wait(x)
    assert name in counter.found


def test_the_counter_sees_no_wait_in_plain_arithmetic() -> None:
    x = torch.ones(3, requires_grad=True)
    with CountWaits() as counter:
        (torch.where(x > 0, x * torch.full((), 2.0), 0.0).masked_fill(x > 5, 0).sum() / 2).backward()
    assert counter.found == []


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_of_the_local_engine_waits_for_nothing(precision: str) -> None:
    assert _waits_of_steps(Topology(), [Scenario(precision=precision)]) == [[]]


@pytest.mark.ranks
def test_steps_under_zero_wait_for_nothing_at_stages_0_to_2_and_read_one_number_at_stage_3() -> None:
    """At stage 3 DeepSpeed decides on the host if gradients are finite, and copies a number to the device."""
    low = [Scenario(stage=stage, precision=precision) for stage in (1, 2) for precision in ("bf16", "fp16")]
    scenarios = [*low, *(Scenario(stage=stage) for stage in (0, 1, 2, 3))]
    for *waits, waits_at_stage3 in run_ranks(_waits_of_steps, 2, scenarios, timeout_s=240):
        assert waits == [[]] * 7
        assert waits_at_stage3 == 2 * ["tensor", "aten._local_scalar_dense"]
