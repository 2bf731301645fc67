"""Losses over the rows of all ranks: their gradient is that of one process on the whole batch."""

from typing import Any

import pytest
import torch
from support.engine_scenarios import Scenario, Training, collectives_for
from support.rank_pool import run_ranks
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from distft.collectives import Collectives, ProcessGroup, SingleProcess
from distft.data.batch import Batch
from distft.engine.interface import GroupLr
from distft.topology import Topology
from distft.train.step import train_step

NUM_STEPS = 6


def contrastive_loss(model: Any, batch: Batch, collectives: Collectives) -> Tensor:
    """InfoNCE (van den Oord et al. 2018): each row and its reverse, against the rows of all ranks."""
    first = normalize(model(batch.input_ids)["lm_head"].mean(dim=1), dim=1)
    second = normalize(model(batch.input_ids.flip(1))["lm_head"].mean(dim=1), dim=1)
    gathered = collectives.differentiable_gather(second)
    own = collectives.rank * len(first) + torch.arange(len(first))
    # A term that needs a sum: how far the batch's mean is from the origin.
    mean = collectives.differentiable_sum(first.sum(dim=0)) / len(gathered)
    return cross_entropy(first @ gathered.T / 0.1, own, reduction="sum") + mean.square().sum() * len(first)


def train(training: Training) -> list[float]:
    """Losses of steps in which each rank has its whole share in one micro-batch."""
    losses = []
    group_lr: GroupLr = lambda group: 3e-3 * group.lr_scale  # noqa: E731
    for _ in range(NUM_STEPS):
        (micro,) = training._micro_batches()
        result = train_step(
            training.engine,
            [training._batch(micro.start, micro.stop)],
            loss_sums=lambda model, batch: {
                "rows": contrastive_loss(model, batch, training.collectives),
            },
            num_targets=lambda batch: {"rows": len(batch.input_ids)},
            weights={"rows": 1.0},
            group_lr=group_lr,
        )
        losses.append(float(result.loss))
        training.step += 1
    return losses


def _train_all(topology: Topology, scenarios: list[Scenario]) -> list[list[float]]:
    results = []
    for scenario in scenarios:
        training = Training(scenario, topology, collectives_for(scenario, topology))
        results.append(train(training))
        training.engine.close()
    return results


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_contrastive_loss_over_all_ranks_equals_that_of_one_process(world_size: int) -> None:
    expected = train(Training(Scenario(micro_batch_size=8), Topology(), SingleProcess()))
    assert expected[-1] < expected[0] - 0.1
    scenarios = [Scenario(stage=stage, micro_batch_size=8 // world_size) for stage in (0, 1, 2, 3)]
    for results in run_ranks(_train_all, world_size, scenarios, timeout_s=240):
        for scenario, losses in zip(scenarios, results, strict=True):
            assert losses == pytest.approx(expected, abs=5e-6), scenario


def _gather_uneven(topology: Topology) -> tuple[list[float], list[float]]:
    collectives = ProcessGroup(topology, torch.device("cpu"), 60)
    rows = torch.arange(topology.rank + 1, dtype=torch.float64, requires_grad=True)
    gathered = collectives.differentiable_gather(rows)
    weights = torch.arange(1.0, len(gathered) + 1, dtype=torch.float64) * (topology.rank + 1)
    (gathered * weights).sum().backward()
    assert rows.grad is not None
    return gathered.tolist(), rows.grad.tolist()


@pytest.mark.ranks
def test_ranks_with_different_numbers_of_rows_gather_them_in_rank_order() -> None:
    results = run_ranks(_gather_uneven, 3)
    assert all(gathered == [0.0, 0.0, 1.0, 0.0, 1.0, 2.0] for gathered, _ in results)
    # The losses of ranks 1, 2, 3 weigh element i by (i + 1) times 1, 2, 3: together 6 (i + 1).
    assert [gradient for _, gradient in results] == [[6.0], [12.0, 18.0], [24.0, 30.0, 36.0]]
