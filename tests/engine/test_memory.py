"""Memory that engines must not use: frozen parameters' moments and gradients, and whole stage-3 weights."""

from functools import partial
from math import prod
from typing import Any

import pytest
import torch
from support.engine_scenarios import FREEING, Scenario, Training, collectives_for
from support.rank_pool import run_ranks
from torch.multiprocessing.reductions import StorageWeakRef

from distft.engine import zero_layout
from distft.engine.settings import ActivationCheckpointing
from distft.topology import Topology

TRAINABLE = ("blocks.1.*", "norm.weight")  # the rest is frozen


def _measure(topology: Topology, stages: list[int], precision: str) -> list[dict[str, Any]]:
    found = []
    for stage in stages:
        scenario = Scenario(stage=stage, trainable=TRAINABLE, precision=precision)
        training = Training(scenario, topology, collectives_for(scenario, topology))
        training.run(2)
        kernel = training.engine._optimizer.kernel  # type: ignore[attr-defined]
        moments = sum(
            state["exp_avg"].numel() + state["exp_avg_sq"].numel() for state in kernel.state.values()
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
def test_frozen_parameters_have_no_moments_and_no_gradients_at_any_stage(precision: str) -> None:
    stages = [0, 1, 2, 3]
    by_rank = run_ranks(_measure, 2, stages, precision)
    for number, stage in enumerate(stages):
        ranks = [stages_of_rank[number] for stages_of_rank in by_rank]
        copies = 2 if stage == 0 else 1  # stage 0 has all moments on every rank
        expected = copies * 2 * ranks[0]["trainable"]
        assert expected <= sum(one["moments"] for one in ranks) <= expected * 1.1  # partitions are padded
        assert all(one["gradients"] == [] for one in ranks)


def _build_at_stage_3(topology: Topology) -> tuple[int, int, int]:
    """Numbers of elements: largest whole parameter during construction; partitioned and whole at the end."""
    peak = 0
    zeros = torch.zeros

    def counting_zeros(*arguments: Any, **options: Any) -> torch.Tensor:
        nonlocal peak
        made = zeros(*arguments, **options)
        # Earlier tensors are partitioned by now; otherwise `whole` below would count them.
        peak = max(peak, made.numel())
        return made

    scenario = Scenario(stage=3)
    collectives = collectives_for(scenario, topology)
    zero_layout.torch.zeros = counting_zeros  # type: ignore[attr-defined]
    try:
        training = Training(scenario, topology, collectives)
    finally:
        zero_layout.torch.zeros = zeros  # type: ignore[attr-defined]
    params = dict(training.engine.module.named_parameters())
    partitioned = sum(p.ds_tensor.numel() for p in params.values())
    whole = sum(p.numel() for p in params.values() if not p.ds_persist)
    training.engine.close()
    return peak, partitioned, whole


@pytest.mark.ranks
def test_no_rank_ever_has_a_whole_stage_3_model() -> None:
    total = sum(
        map(prod, Training(Scenario(), Topology(), collectives_for(Scenario(), Topology())).shapes.values())
    )
    for peak, partitioned, whole in run_ranks(_build_at_stage_3, 2):
        assert peak <= total / 2  # the embedding, which is half of so small a model
        assert partitioned == pytest.approx(total / 2, rel=0.05)
        assert whole == 0


def _gathered_between_forward_and_backward(topology: Topology, scenarios: list[Scenario]) -> list[list[str]]:
    """By scenario: the weights of blocks whose gathered values are still in memory after the forward."""
    found = []
    for scenario in scenarios:
        training = Training(scenario, topology, collectives_for(scenario, topology))
        training.run(1)
        gathered: dict[str, StorageWeakRef] = {}

        def note_storages(block: torch.nn.Module, _inputs: Any, notes: dict[str, StorageWeakRef]) -> None:
            for name, param in block.named_parameters():
                notes[f"{id(block)}.{name}"] = StorageWeakRef(param.untyped_storage())

        for block in training.engine.module.blocks:
            block.register_forward_pre_hook(partial(note_storages, notes=gathered))
        batch = training.batches()[0]
        terms = training.engine.model(**batch.model_inputs)["lm_head"]
        assert len(gathered) == 18
        found.append([name for name, storage in gathered.items() if not storage.expired()])
        del terms
        training.engine.close()
    return found


@pytest.mark.ranks
@pytest.mark.parametrize(
    "compile_blocks", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"]
)
def test_gathered_weights_of_stage_3_are_freed_until_the_backward(compile_blocks: bool) -> None:
    modes: list[ActivationCheckpointing] = ["none", "selective", "full"]
    scenarios = [
        Scenario(stage=3, compile=compile_blocks, activation_checkpointing=mode, zero=FREEING)
        for mode in modes
    ]
    for found in run_ranks(_gathered_between_forward_and_backward, 2, scenarios, timeout_s=300):
        assert found == [[], [], []]
