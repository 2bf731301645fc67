"""What an engine does not hold."""

from math import prod
from typing import Any

import pytest
import torch
from distributed import run_ranks
from engine_scenarios import Scenario, Training, collectives_for

from distft.engine import zero_layout
from distft.topology import Topology

FROZEN = ("blocks.1.*", "norm.weight")


def _holdings(topology: Topology, stages: list[int], precision: str) -> list[dict[str, Any]]:
    found = []
    for stage in stages:
        scenario = Scenario(stage=stage, trainable=FROZEN, precision=precision)
        training = Training(scenario, topology, collectives_for(scenario, topology))
        training.run(2)
        engine = training.engine._engine  # type: ignore[attr-defined]
        inner = zero_layout.inner_optimizer(engine)
        moments = sum(
            state["exp_avg"].numel() + state["exp_avg_sq"].numel() for state in inner.state.values()
        )
        params = dict(training.engine.module.named_parameters())
        found.append(
            {
                "trainable": sum(prod(training.shapes[name]) for name in training.trainable),
                "moments": moments,
                "gradients": [
                    n for n, p in params.items() if n not in training.trainable and p.grad is not None
                ],
                "whole": sum(p.numel() for p in params.values()),
                "total": sum(map(prod, training.shapes.values())),
            }
        )
        training.engine.close()
    return found


@pytest.mark.ranks
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_frozen_part_has_no_moments_and_no_gradients_at_any_stage(precision: str) -> None:
    stages = [0, 1, 2, 3]
    by_rank = run_ranks(_holdings, 2, stages, precision)
    for number, stage in enumerate(stages):
        held = [found[number] for found in by_rank]
        copies = 2 if stage == 0 else 1  # stage 0 keeps everything on every rank
        expected = copies * 2 * held[0]["trainable"]
        assert expected <= sum(one["moments"] for one in held) <= expected * 1.1  # partitions are padded
        assert all(one["gradients"] == [] for one in held)


def _build_sliced(topology: Topology) -> tuple[int, int, int]:
    """Largest number of elements of whole parameters alive at once in the construction, and sizes."""
    alive, peak = 0, 0
    zeros = torch.zeros

    def counted(*arguments: Any, **options: Any) -> torch.Tensor:
        nonlocal alive, peak
        made = zeros(*arguments, **options)
        alive = made.numel()  # the one before is partitioned by now, or it would show in `whole` below
        peak = max(peak, alive)
        return made

    scenario = Scenario(stage=3)
    collectives = collectives_for(scenario, topology)
    zero_layout.torch.zeros = counted  # type: ignore[attr-defined]
    try:
        training = Training(scenario, topology, collectives)
    finally:
        zero_layout.torch.zeros = zeros  # type: ignore[attr-defined]
    params = dict(training.engine.module.named_parameters())
    sliced = sum(p.ds_tensor.numel() for p in params.values())
    whole = sum(p.numel() for p in params.values() if not p.ds_persist)
    training.engine.close()
    return peak, sliced, whole


@pytest.mark.ranks
def test_a_stage_3_model_is_never_whole_on_one_rank() -> None:
    total = sum(
        map(prod, Training(Scenario(), Topology(), collectives_for(Scenario(), Topology())).shapes.values())
    )
    for peak, sliced, whole in run_ranks(_build_sliced, 2):
        assert peak <= total / 2  # the embedding, which is half of so small a model
        assert sliced == pytest.approx(total / 2, rel=0.05)
        assert whole == 0
