"""Compiled blocks compute what eager ones do under ZeRO, and are compiled once."""

from typing import Any

import pytest
from support.engine_scenarios import FREEING, Scenario, Training, collectives_for, run_alone
from support.rank_pool import run_ranks

from distft.topology import Topology

NUM_STEPS = 4
PARTLY_TRAINABLE = ("blocks.1.*", "norm.weight")  # the rest is frozen


def _train(topology: Topology, scenarios: list[Scenario]) -> list[tuple[list[float], int, int]]:
    """By scenario: losses, and the number of compiled graphs after the first step and at the end."""
    from torch._dynamo import reset
    from torch._dynamo.utils import counters

    found = []
    for scenario in scenarios:
        reset()
        counters.clear()
        training = Training(scenario, topology, collectives_for(scenario, topology))
        losses = training.run(1)
        after_first = counters["stats"]["unique_graphs"]
        losses += training.run(NUM_STEPS)
        found.append((losses, after_first, counters["stats"]["unique_graphs"]))
        training.engine.close()
    return found


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("stage", [2, 3])  # gradients are exchanged during the backward; so are weights
def test_compiled_blocks_compute_what_eager_ones_do(stage: int) -> None:
    zero: dict[str, Any] = FREEING if stage == 3 else {}
    scenarios = [
        Scenario(stage=stage, compile=True, zero=zero, activation_checkpointing=mode, trainable=trainable)
        for mode, trainable in (
            ("none", ("*",)),
            ("selective" if stage == 2 else "full", ("*",)),
            ("none", PARTLY_TRAINABLE),
        )
    ]
    expected = [run_alone(Scenario(trainable=one.trainable), NUM_STEPS).losses for one in scenarios]
    for results in run_ranks(_train, 2, scenarios, timeout_s=500):
        for scenario, reference, (losses, after_first, at_end) in zip(
            scenarios, expected, results, strict=True
        ):
            assert losses == pytest.approx(reference, abs=2e-6), scenario
            # Block, final norm and rotary angles; a partly frozen model has two kinds of blocks. With hooks
            # inside of blocks it would be 16.
            assert 3 <= after_first == at_end <= 4, scenario
