"""A model computes with the moving average of its weights, and afterwards with its own again."""

from typing import Any

import pytest
import torch
from support.engine_scenarios import CPU, FREEING, Scenario, Training, collectives_for, run_alone, summed_loss
from support.rank_pool import run_ranks
from torch import Tensor

from distft.checkpoint.fragments import EMA
from distft.model.transformer import Transformer
from distft.topology import Topology

NUM_STEPS = 3
PARTLY = ("blocks.1.*", "norm.weight")
SCENARIOS = [
    *(Scenario(stage=stage) for stage in (0, 1, 2, 3)),
    Scenario(stage=1, precision="bf16"),
    Scenario(stage=3, precision="bf16", zero=FREEING),
    Scenario(stage=3, zero=FREEING),
    Scenario(stage=3, zero={"offload_optimizer": "cpu", "offload_param": "cpu"}),
    Scenario(stage=2, trainable=PARTLY, zero={"offload_optimizer": "cpu"}),
    Scenario(stage=3, trainable=PARTLY, tie_embeddings=False),
]
LOCAL = [Scenario(), Scenario(precision="bf16"), Scenario(trainable=PARTLY)]


@torch.no_grad()
def loss_of(training: Training) -> Tensor:
    """Of fixed rows, the same on every rank."""
    batch = training._batch(0, 4).to(CPU)
    return summed_loss(training.engine.model, batch)


def loss_of_average(training: Training) -> Tensor:
    """By a model of its own, that has the averages of all ranks as its weights."""
    state = training.whole_state()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[training.scenario.precision]
    module = Transformer(training.scenario.model).to(dtype)
    for name, param in module.named_parameters():
        values = state.get((name, EMA), state[name, "weight"])
        param.data.copy_(values.view_as(param))
    with torch.no_grad():
        return summed_loss(module, training._batch(0, 4))


def swap(topology: Topology, scenarios: list[Scenario]) -> list[tuple[Any, ...]]:
    results = []
    for scenario in scenarios:
        training = Training(scenario, topology, collectives_for(scenario, topology))
        training.run(NUM_STEPS)
        state, own = training.whole_state(), loss_of(training)
        with training.engine.averaged_weights():
            averaged = loss_of(training)
        again, after = loss_of(training), training.whole_state()
        is_same = state.keys() == after.keys() and all(torch.equal(after[key], state[key]) for key in state)
        with pytest.raises(RuntimeError, match="inside"), training.engine.averaged_weights():
            raise RuntimeError("inside")
        losses = training.run(2 * NUM_STEPS)
        results.append((own, averaged, again, is_same, loss_of_average_at(state, training), losses))
        training.engine.close()
    return results


def loss_of_average_at(state: dict[tuple[str, str], Tensor], training: Training) -> Tensor:
    training.whole_state = lambda: state  # type: ignore[method-assign]
    return loss_of_average(training)


def require_swapped(result: tuple[Any, ...], scenario: Scenario) -> None:
    own, averaged, again, is_same, expected, losses = result
    tolerance = 2e-5 if scenario.precision == "fp32" else 0.2
    assert float(averaged) == pytest.approx(float(expected), abs=tolerance), scenario
    assert abs(float(averaged - own)) > 1e-3, "the average is not the weights themselves"
    assert torch.equal(own, again), scenario
    assert is_same, scenario
    local = Scenario(
        precision=scenario.precision, trainable=scenario.trainable, tie_embeddings=scenario.tie_embeddings
    )
    expected_losses = run_alone(local, 2 * NUM_STEPS).losses[NUM_STEPS:]  # type: ignore[attr-defined]
    assert losses == pytest.approx(expected_losses, abs=2e-6 if scenario.precision == "fp32" else 2e-3), (
        scenario
    )


@pytest.mark.parametrize("scenario", LOCAL)
def test_the_local_engine_computes_with_the_average_and_goes_on_with_its_own(scenario: Scenario) -> None:
    (result,) = swap(Topology(), [scenario])
    require_swapped(result, scenario)


@pytest.mark.ranks
def test_every_stage_computes_with_the_average_and_goes_on_with_its_own() -> None:
    for results in run_ranks(swap, 3, SCENARIOS, timeout_s=240):
        for scenario, result in zip(SCENARIOS, results, strict=True):
            require_swapped(result, scenario)


def test_the_decay_of_the_average_may_change_from_step_to_step() -> None:
    training = Training(Scenario(), Topology(), collectives_for(Scenario(), Topology()))
    name = "norm.weight"
    average = training.whole_state()[name, EMA]
    for decay in (0.5, 0.9, 0.1):
        training.engine.set_ema_decay(decay)
        training.run(training.step + 1)
        state = training.whole_state()
        average = decay * average + (1 - decay) * state[name, "weight"]
        torch.testing.assert_close(state[name, EMA], average)
