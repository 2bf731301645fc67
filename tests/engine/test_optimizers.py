"""Every optimizer, with rates and weight decays by layer, is torch's own, or the paper's, on every engine."""

from collections.abc import Callable
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from support.engine_scenarios import Scenario, Training, collectives_for, run_alone, train_all
from support.rank_pool import run_ranks
from torch import nn

from distft.checkpoint.committed import Checkpoint
from distft.collectives import SingleProcess
from distft.data.targets import NEXT_TOKEN
from distft.topology import Topology

NUM_STEPS = 6
LAYER_DECAY = 0.8
BY_LAYER = {
    "layer_decay": LAYER_DECAY,
    "lr_scales": {"*attn.k.weight": 0.5},
    "weight_decay": 0.3,
    "weight_decays": {"*norm.weight": 0.05, "blocks.1.mlp.*": 0.02},
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {**BY_LAYER},
    "lion": {"type": "lion", **BY_LAYER},
    "sgd": {"type": "sgd", **BY_LAYER},
    "nesterov": {"type": "sgd", "momentum": 0.8, "nesterov": True, **BY_LAYER},
    "plain_sgd": {"type": "sgd", "momentum": 0.0, **BY_LAYER},
    "muon": {"type": "muon", "iteration_dtype": "fp32", **BY_LAYER},
    "spectral_muon": {
        "type": "muon",
        "update_scale": "spectral",
        "nesterov": False,
        "iteration_dtype": "fp32",
        **BY_LAYER,
    },
}
MOMENTS = {
    "adamw": {"exp_avg", "exp_avg_sq"},
    "lion": {"exp_avg"},
    "sgd": {"momentum_buffer"},
    "plain_sgd": set(),
    "muon": {"exp_avg", "exp_avg_sq", "muon_momentum"},
}


def _expected_settings(name: str, shape: torch.Size) -> dict[str, Any]:
    """The scale of the rate and the weight decay, written out for the two blocks of the model."""
    depth = {"embed.weight": 3, "norm.weight": 0}
    power = depth[name] if name in depth else 2 - int(name.split(".")[1])
    scale = LAYER_DECAY**power * (0.5 if name.endswith("attn.k.weight") else 1.0)
    decay = 0.3 if len(shape) == 2 and name != "embed.weight" else 0.0
    if name.endswith("norm.weight"):
        decay = 0.05
    if name.startswith("blocks.1.mlp."):
        decay = 0.02
    return {"scale": scale, "weight_decay": decay}


class _PlainLion:
    """The paper's algorithm 2, as it stands there."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        self.param_groups = groups
        self.momenta = [torch.zeros_like(group["params"][0]) for group in groups]

    @torch.no_grad()
    def step(self) -> None:
        for group, momentum in zip(self.param_groups, self.momenta, strict=True):
            (param,) = group["params"]
            update = torch.sign(0.9 * momentum + 0.1 * param.grad)
            param -= group["lr"] * (update + group["weight_decay"] * param)
            momentum.copy_(0.99 * momentum + 0.01 * param.grad)


class _PlainMuon:
    """Muon in fp32 for the matrices of blocks, torch's AdamW for the rest."""

    def __init__(
        self, groups: list[dict[str, Any]], *, nesterov: bool, scale: Callable[[int, int], float]
    ) -> None:
        is_matrix = [group["params"][0].ndim == 2 and "blocks" in group["name"] for group in groups]
        self._matrices = [group for group, is_one in zip(groups, is_matrix, strict=True) if is_one]
        rest = [group for group, is_one in zip(groups, is_matrix, strict=True) if not is_one]
        self._adamw = torch.optim.AdamW(rest, betas=(0.9, 0.95), eps=1e-8)
        self._momenta = [torch.zeros_like(group["params"][0]) for group in self._matrices]
        self._nesterov, self._scale = nesterov, scale
        self.param_groups = [*self._matrices, *self._adamw.param_groups]

    @torch.no_grad()
    def step(self) -> None:
        self._adamw.step()
        for group, momentum in zip(self._matrices, self._momenta, strict=True):
            (param,) = group["params"]
            momentum.mul_(0.95).add_(0.05 * param.grad)
            x = 0.05 * param.grad + 0.95 * momentum if self._nesterov else momentum
            x = x / x.norm()
            for _ in range(5):
                gram = x @ x.T
                x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
            param -= group["lr"] * group["weight_decay"] * param
            param -= group["lr"] * self._scale(*param.shape) * x


PLAIN: dict[str, Callable[[list[dict[str, Any]]], Any]] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8),
    "lion": _PlainLion,
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.9),
    "nesterov": lambda groups: torch.optim.SGD(groups, momentum=0.8, nesterov=True),
    "plain_sgd": torch.optim.SGD,
    "muon": lambda groups: _PlainMuon(
        groups, nesterov=True, scale=lambda rows, columns: 0.2 * sqrt(max(rows, columns))
    ),
    "spectral_muon": lambda groups: _PlainMuon(
        groups, nesterov=False, scale=lambda rows, columns: sqrt(max(1, rows / columns))
    ),
}


def _scenario(name: str, **options: Any) -> Scenario:
    return Scenario(optimizer=OPTIMIZERS[name], **options)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_local_engine_equals_plain_torch_with_a_group_for_each_parameter(name: str) -> None:
    training = run_alone(_scenario(name), 0)
    module, plan = training.engine.module, training.plan
    params = {key: nn.Parameter(p.detach().clone()) for key, p in module.named_parameters()}
    groups = [{"params": [p], "name": key, **_expected_settings(key, p.shape)} for key, p in params.items()]
    optimizer = PLAIN[name](groups)
    losses = []
    for step in range(NUM_STEPS):
        batch = training._batch(step * plan.global_batch_size, (step + 1) * plan.global_batch_size)
        logits = torch.func.functional_call(module, {**params}, (batch.input_ids,))["lm_head"]
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.targets[NEXT_TOKEN].flatten(), ignore_index=-100
        )
        for param in params.values():
            param.grad = None
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(params.values(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / 100) * group["scale"]
        optimizer.step()
        losses.append(loss.item())
    assert training.run(NUM_STEPS) == pytest.approx(losses, abs=1e-6)
    for key, param in module.named_parameters():
        torch.testing.assert_close(param.detach(), params[key].detach(), atol=1e-6, rtol=1e-6, msg=key)


OFFLOAD = {"offload_optimizer": "cpu"}


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_stages_and_ranks_change_nothing(world_size: int) -> None:
    scenarios = [
        _scenario(name, stage=stage)
        for name in ("adamw", "lion", "nesterov", "muon")
        for stage in {1: (1,), 2: (0, 1, 2, 3), 4: (2, 3)}[world_size]
    ]
    if world_size == 2:
        scenarios += [
            _scenario(name, stage=stage, zero=OFFLOAD) for name in ("lion", "muon") for stage in (1, 3)
        ]
    by_rank = run_ranks(train_all, world_size, scenarios, NUM_STEPS, timeout_s=240)
    expected = {str(OPTIMIZERS[name]): run_alone(_scenario(name), NUM_STEPS) for name in OPTIMIZERS}
    states = {key: training.whole_state() for key, training in expected.items()}
    for results in by_rank:
        for scenario, (losses, found) in zip(scenarios, results, strict=True):
            key = str(scenario.optimizer)
            assert losses == pytest.approx(expected[key].losses, abs=2e-6), scenario
            assert found.keys() == states[key].keys(), scenario
            for state, values in found.items():
                torch.testing.assert_close(
                    values, states[key][state], atol=2e-5, rtol=1e-4, msg=f"{scenario} {state}"
                )


@pytest.mark.parametrize("name", MOMENTS)
def test_an_optimizer_has_its_own_states_only(name: str) -> None:
    states = run_alone(_scenario(name), 1).whole_state()
    assert {state for _, state in states} == {"weight", "ema"} | MOMENTS[name]
    if name == "muon":
        assert {state for key, state in states if key == "blocks.0.attn.q.weight"} == {
            "weight",
            "ema",
            "muon_momentum",
        }


def _train_in_low_precision(
    topology: Topology, scenarios: list[Scenario]
) -> list[tuple[list[float], bool, bool]]:
    """By scenario: losses; whether a step with infinite gradients was skipped, and changed nothing."""
    if topology.is_distributed:
        from deepspeed.accelerator import get_accelerator

        get_accelerator().is_fp16_supported = lambda: True  # torch can compute in fp16 on any CPU
    found = []
    for scenario in scenarios:
        training = Training(scenario, topology, collectives_for(scenario, topology))
        if scenario.precision == "fp16":
            training.engine.set_loss_scale(torch.tensor(1024.0))
        losses = training.run(6)
        before = training.whole_state()
        training.run(7, poison_step=6)
        after = training.whole_state()
        is_unchanged = all(torch.equal(before[key], after[key]) for key in before)
        found.append((losses, bool(training.last.is_skipped), is_unchanged))
        training.engine.close()
    return found


@pytest.mark.ranks
def test_fp32_masters_a_loss_scale_and_skipped_steps_are_the_same_on_ranks() -> None:
    scenarios = [
        _scenario(name, stage=stage, precision=precision)
        for name, stage, precision in (
            ("lion", 1, "bf16"),
            ("lion", 3, "fp16"),
            ("nesterov", 2, "fp16"),
            ("muon", 1, "bf16"),
            ("muon", 2, "fp16"),
            ("muon", 3, "bf16"),
        )
    ]
    alone = [replace(scenario, stage=None) for scenario in scenarios]
    expected = _train_in_low_precision(Topology(), alone)
    for results in run_ranks(_train_in_low_precision, 2, scenarios, timeout_s=240):
        for scenario, found, (losses, *_) in zip(scenarios, results, expected, strict=True):
            assert found[0] == pytest.approx(losses, abs=1e-3), scenario
            assert found[1:] == (True, True), scenario


def _save_halfway(topology: Topology, scenario: Scenario, root: str) -> str:
    training = Training(scenario, topology, collectives_for(scenario, topology))
    training.run(NUM_STEPS // 2)
    path = training.save(root)
    training.engine.close()
    return path


@pytest.mark.ranks
@pytest.mark.parametrize(("name", "stage"), [("muon", 2), ("lion", 3)])
def test_another_engine_goes_on_from_a_checkpoint(name: str, stage: int, tmp_path: Path) -> None:
    path, *_ = run_ranks(_save_halfway, 2, _scenario(name, stage=stage), str(tmp_path))
    resumed = Training(_scenario(name), Topology(), SingleProcess(), Checkpoint.open(path))
    whole = run_alone(_scenario(name), NUM_STEPS)
    losses = whole.losses[NUM_STEPS // 2 :]  # type: ignore[attr-defined]
    assert resumed.run(NUM_STEPS) == pytest.approx(losses, abs=2e-6)
    for key, values in resumed.whole_state().items():
        torch.testing.assert_close(values, whole.whole_state()[key], atol=2e-5, rtol=1e-4)
