"""Mixtures of experts train the same on every engine, number of ranks and cut of the batch."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.engine_scenarios import (
    FREEING,
    SEQ_LEN,
    VOCAB_SIZE,
    Scenario,
    Training,
    collectives_for,
)
from support.rank_pool import run_ranks

from distft.checkpoint.committed import Checkpoint
from distft.collectives import SingleProcess
from distft.data.batch import Batch
from distft.data.targets import IGNORE_INDEX, NEXT_TOKEN
from distft.model.transformer_config import TransformerConfig
from distft.objective.causal_lm import CausalLM
from distft.objective.interface import ObjectiveContext
from distft.topology import Topology
from distft.train.experts import ExpertLoad
from distft.train.step import train_step

NUM_STEPS = 6
MODELS: list[dict[str, Any]] = [
    {"shared_d_ff": 11, "shared_gate": True, "every": 2, "load_balance_weight": 0.1, "router_z_weight": 0.01},
    {"scores": "sigmoid", "bias_update_rate": 0.05, "load_balance_weight": 0.0},
]


def _model(raw: dict[str, Any]) -> TransformerConfig:
    return TransformerConfig.model_validate(
        {
            "vocab_size": VOCAB_SIZE,
            "max_seq_len": SEQ_LEN,
            "d_model": 18,
            "num_layers": 2,
            "num_heads": 3,
            "d_ff": 29,
            "experts": {"num_experts": 5, "experts_per_token": 2, "d_ff": 7, **raw},
        }
    )


class RoutedTraining(Training):
    """As the loop of a run trains: with the routers' losses and biases, on padded rows of two documents."""

    def __init__(self, scenario: Scenario, topology: Topology, *args: Any, **options: Any) -> None:
        super().__init__(scenario, topology, *args, **options)
        model = scenario.model
        assert isinstance(model, TransformerConfig)
        assert model.experts is not None
        self.load = ExpertLoad(model.experts, model.num_layers, self.trainable)
        self.objective = self.load.routed(CausalLM())
        self.terms: list[list[float]] = []

    def run_step(self, batches: list[Batch], factor: float = 1.0) -> None:
        context = ObjectiveContext(VOCAB_SIZE, self.collectives)
        self.last = train_step(
            self.engine,
            batches,
            loss_sums=lambda model, batch: {
                name: value * factor
                for name, value in self.objective.loss_sums(model, batch, context).items()
            },
            num_targets=self.objective.num_targets,
            weights=self.objective.term_weights(self.step),
            group_lr=lambda group: 3e-3 * group.lr_scale,
        )
        self.load.finish_step(self.engine, self.last.is_skipped)
        self.terms.append(self.last.terms.tolist())
        self.step += 1

    def _batch(self, start: int, stop: int) -> Batch:
        batch = super()._batch(start, stop)
        numbers = torch.arange(start, max(stop, start + 1))
        lengths = SEQ_LEN - numbers % 5
        positions = torch.arange(SEQ_LEN)
        labels = batch.targets[NEXT_TOKEN].where(positions < lengths[:, None], IGNORE_INDEX)
        return replace(
            batch,
            lengths=lengths,
            document_ids=(positions >= 7).long().expand(len(labels), -1),
            targets={NEXT_TOKEN: labels},
            num_targets={NEXT_TOKEN: int((labels != IGNORE_INDEX).sum())},
            counted_tokens=int(lengths.sum()) if stop > start else 0,
        )


def _result(training: RoutedTraining, to_step: int = NUM_STEPS) -> tuple[Any, ...]:
    losses = training.run(to_step)
    return losses, training.terms, training.whole_state(), training.load.metrics()


def _alone(scenario: Scenario, to_step: int = NUM_STEPS) -> tuple[Any, ...]:
    return _result(RoutedTraining(scenario, Topology(), SingleProcess()), to_step)


def _train_all(topology: Topology, scenarios: list[Scenario]) -> list[tuple[Any, ...]]:
    results = []
    for scenario in scenarios:
        training = RoutedTraining(scenario, topology, collectives_for(scenario, topology))
        results.append(_result(training))
        training.engine.close()
    return results


def _assert_equal(found: tuple[Any, ...], expected: tuple[Any, ...], about: object) -> None:
    losses, terms, state, load = found
    assert losses == pytest.approx(expected[0], abs=1e-6), about
    for own, other in zip(terms, expected[1], strict=True):
        assert own == pytest.approx(other, abs=1e-6), about
    assert state.keys() == expected[2].keys()
    for key, values in state.items():
        torch.testing.assert_close(values, expected[2][key], atol=2e-5, rtol=1e-4, msg=f"{about} {key}")
    assert load == pytest.approx(expected[3], abs=1e-6)


@pytest.mark.ranks
@pytest.mark.parametrize(("world_size", "stages"), [(2, (1, 2, 3)), (3, (2,)), (4, (0, 3))])
def test_zero_computes_what_the_local_engine_computes(world_size: int, stages: tuple[int, ...]) -> None:
    """At 3 ranks with 8 rows a step, one rank has a row that stands for none."""
    scenarios = [
        Scenario(
            stage=stage,
            other_model=_model(raw),
            micro_batch_size=1 if world_size == 3 else 2,
            zero=FREEING if stage == 3 else {},
        )
        for raw in MODELS
        for stage in stages
    ]
    by_rank = run_ranks(_train_all, world_size, scenarios, timeout_s=240)
    for number, scenario in enumerate(scenarios):
        expected = _alone(Scenario(other_model=scenario.model))
        for results in by_rank:
            _assert_equal(results[number], expected, scenario)


@pytest.mark.parametrize("raw", MODELS)
@pytest.mark.parametrize(("micro_batch_size", "mode"), [(1, "none"), (3, "full"), (8, "selective")])
def test_the_cut_into_micro_batches_and_recomputing_change_nothing(
    raw: dict[str, Any], micro_batch_size: int, mode: Any
) -> None:
    model = _model(raw)
    changed = Scenario(other_model=model, micro_batch_size=micro_batch_size, activation_checkpointing=mode)
    _assert_equal(_alone(changed), _alone(Scenario(other_model=model)), changed)


def _biases(training: Training) -> list[torch.Tensor]:
    state = training.whole_state()
    return [state[f"blocks.{layer}.mlp.router.selection_bias", "weight"] for layer in range(2)]


def test_the_bias_moves_by_the_sign_of_the_load_and_no_gradient_moves_it() -> None:
    scenario = Scenario(other_model=_model(MODELS[1]))
    training = RoutedTraining(scenario, Topology(), SingleProcess())
    assert not any("selection_bias" in name for name in training.trainable)
    before = _biases(training)
    training.run(1)
    shares = training.load.metrics()
    for layer, (was, now) in enumerate(zip(before, _biases(training), strict=True)):
        own = torch.tensor([shares[f"experts/blocks.{layer}/share_{expert}"] for expert in range(5)])
        torch.testing.assert_close(now, was + 0.05 * torch.sign(0.2 - own))
        param = training.engine.module.get_parameter(f"blocks.{layer}.mlp.router.selection_bias")
        assert torch.equal(param, now)


def test_a_skipped_step_moves_no_bias() -> None:
    training = RoutedTraining(Scenario(other_model=_model(MODELS[1])), Topology(), SingleProcess())
    before = _biases(training)
    training.run(1, poison_step=0)
    assert float(training.last.is_skipped) == 1
    assert all(map(torch.equal, _biases(training), before))


def test_the_bias_of_a_frozen_router_stays() -> None:
    scenario = Scenario(other_model=_model(MODELS[1]), trainable=("blocks.1.*",))
    training = RoutedTraining(scenario, Topology(), SingleProcess())
    before = _biases(training)
    training.run(1)
    assert [torch.equal(*pair) for pair in zip(before, _biases(training), strict=True)] == [True, False]


def _save(topology: Topology, scenario: Scenario, root: str) -> str:
    training = RoutedTraining(scenario, topology, collectives_for(scenario, topology))
    training.run(NUM_STEPS // 2)
    return training.save(root)


def _resume(topology: Topology, scenarios: list[Scenario], path: str) -> list[tuple[Any, ...]]:
    results = []
    for scenario in scenarios:
        collectives = collectives_for(scenario, topology)
        training = RoutedTraining(scenario, topology, collectives, Checkpoint.open(path))
        results.append(_result(training))
        training.engine.close()
    return results


@pytest.mark.ranks
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_resumes_at_another_world_size_and_stage(tmp_path: Any, precision: str) -> None:
    """Biases included, which are kept in fp32 beside weights in bf16."""
    model = _model(MODELS[1])
    before = Scenario(stage=3, other_model=model, zero=FREEING, precision=precision)
    (path, _) = run_ranks(_save, 2, before, str(tmp_path), timeout_s=240)
    saved = Checkpoint.open(path).read("blocks.1.mlp.router.selection_bias", "weight", 0, 5)
    assert saved.dtype == torch.float32
    assert not torch.equal(saved.bfloat16().float(), saved)
    after = [Scenario(stage=stage, other_model=model, precision=precision) for stage in (1, 3)]
    resumed = run_ranks(_resume, 4, after, path, timeout_s=240)
    if precision == "bf16":
        return
    losses, _, state, _ = _alone(Scenario(other_model=model))
    for results in resumed:
        for found in results:
            assert found[0] == pytest.approx(losses[NUM_STEPS // 2 :], abs=1e-6)
            for key, values in found[2].items():
                torch.testing.assert_close(values, state[key], atol=2e-5, rtol=1e-4, msg=str(key))
