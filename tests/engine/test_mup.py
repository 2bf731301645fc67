"""muP is what is written out here by hand, and standard at its base width, on every engine."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.engine_scenarios import Scenario, run_alone, train_all
from support.rank_pool import run_ranks
from torch import Tensor
from torch.nn import functional

from distft.data.targets import NEXT_TOKEN
from distft.model.transformer_config import TransformerConfig

NUM_STEPS = 5
RATIO = 3  # width 24 over 8; heads are wider, too: 12 over 4
BASE = {"parametrization": "mup", "mup_base_d_model": 8, "mup_base_head_dim": 4}


def _model(d_model: int = 24, **changes: Any) -> TransformerConfig:
    sizes = {"vocab_size": 53, "max_seq_len": 12, "d_model": d_model, "num_layers": 2, "num_heads": 2}
    options = {"positions": "learned", "norm": "layernorm", "mlp": "gelu", "mlp_bias": True}
    return TransformerConfig.model_validate({**sizes, **options, **changes})


def _scenario(model: TransformerConfig, **optimizer: Any) -> Scenario:
    settings = {"peak_lr": 3e-3, "lr_scales": {}, "ema_decay": None, "max_grad_norm": None, **optimizer}
    return Scenario(other_model=model, micro_batch_size=8, optimizer=settings)


def _plain_logits(weights: dict[str, Tensor], input_ids: Tensor, output: Tensor) -> Tensor:
    """The model of `_model`, with muP's scale of attention."""
    x = weights["embed.weight"][input_ids] + weights["position_embed.weight"][: input_ids.shape[1]]

    def norm(name: str, x: Tensor) -> Tensor:
        return functional.layer_norm(x, (24,), weights[f"{name}.weight"], weights[f"{name}.bias"])

    for block in ("blocks.0.", "blocks.1."):
        h = norm(f"{block}attn_norm", x)
        q, k, v = ((h @ weights[f"{block}attn.{n}.weight"].T).unflatten(-1, (2, 12)) for n in "qkv")
        scores = torch.einsum("bthd,bshd->bhts", q, k) * 2 / 12  # 1 / 12, times the root of 4
        scores = scores.masked_fill(~torch.ones(12, 12).bool().tril(), -torch.inf)
        y = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).flatten(2)
        x = x + y @ weights[f"{block}attn.o.weight"].T
        h = norm(f"{block}mlp_norm", x) @ weights[f"{block}mlp.up.weight"].T + weights[f"{block}mlp.up.bias"]
        h = functional.gelu(h, approximate="tanh") @ weights[f"{block}mlp.down.weight"].T
        x = x + h + weights[f"{block}mlp.down.bias"]
    return norm("norm", x) @ output.T


def _adam_rates(name: str, value: Tensor) -> dict[str, Any]:
    """Table 8: a third of the rate for matrices of blocks, and three times their decay."""
    is_hidden = name.startswith("blocks.") and value.ndim == 2
    decay = 0.1 if value.ndim == 2 and "embed" not in name else 0.0
    if name == "lm_head.weight" or is_hidden:  # an untied lm_head begins a third as large, with no multiplier
        return {"lr": 1 / RATIO, "weight_decay": decay * RATIO}
    return {"lr": 1.0, "weight_decay": decay}


def _sgd_rates(name: str, value: Tensor) -> dict[str, Any]:
    is_hidden = name.startswith("blocks.") and value.ndim == 2
    decay = 1e-4 if value.ndim == 2 and "embed" not in name else 0.0
    if name == "lm_head.weight":
        return {"lr": 1 / RATIO, "weight_decay": decay * RATIO}
    return {"lr": 1.0 if is_hidden else float(RATIO), "weight_decay": decay}


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_training_equals_mup_by_hand_in_plain_torch(optimizer: str, is_tied: bool) -> None:
    # With its usual eps, Adam makes a whole step of a gradient that is rounding alone.
    options = {"type": "adamw", "eps": 1e-5} if optimizer == "adamw" else {"type": optimizer}
    training = run_alone(_scenario(_model(tie_embeddings=is_tied, **BASE), **options), 0)
    weights = {n: p.detach().clone().requires_grad_() for n, p in training.engine.module.named_parameters()}
    rates: Callable[[str, Tensor], dict[str, Any]] = _adam_rates if optimizer == "adamw" else _sgd_rates
    groups = [{"params": [value], **rates(name, value)} for name, value in weights.items()]
    factors = [group["lr"] for group in groups]
    plain: torch.optim.Optimizer = (
        torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-5)
        if optimizer == "adamw"
        else torch.optim.SGD(groups, momentum=0.9)
    )
    for step in range(NUM_STEPS):
        [batch] = training.batches()
        output = weights["embed.weight"] / RATIO if is_tied else weights["lm_head.weight"]
        logits = _plain_logits(weights, batch.input_ids, output)
        loss = functional.cross_entropy(logits.flatten(0, 1), batch.targets[NEXT_TOKEN].flatten())
        plain.zero_grad()
        loss.backward()
        for group, factor in zip(plain.param_groups, factors, strict=True):
            group["lr"] = 3e-3 * (1 - step / 100) * factor
        plain.step()
        training.run_step([batch])
        assert float(training.last.loss) == pytest.approx(float(loss.detach()), abs=1e-6)
    for name, param in training.engine.module.named_parameters():
        torch.testing.assert_close(param.detach(), weights[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lion", "muon"])
def test_at_the_base_width_it_is_the_standard_parametrization_bit_for_bit(optimizer: str) -> None:
    base = {**BASE, "mup_base_d_model": 24, "mup_base_head_dim": 12}
    standard, mup = (run_alone(_scenario(_model(**own), type=optimizer), 3) for own in ({}, base))
    assert mup.losses == standard.losses
    state = standard.whole_state()
    assert all(torch.equal(values, state[key]) for key, values in mup.whole_state().items())


@pytest.mark.ranks
def test_every_zero_stage_computes_what_the_local_engine_computes() -> None:
    local = _scenario(_model(**BASE), max_grad_norm=0.5, lr_scales={"*blocks.1.*": 0.5})
    expected = run_alone(local, NUM_STEPS)
    state = expected.whole_state()
    scenarios = [replace(local, stage=stage, micro_batch_size=2) for stage in (0, 1, 2, 3)]
    for results in run_ranks(train_all, 2, scenarios, NUM_STEPS, timeout_s=240):
        for losses, found in results:
            assert losses == pytest.approx(expected.losses, abs=2e-6)
            for key, values in found.items():
                torch.testing.assert_close(values, state[key], atol=2e-5, rtol=1e-4)
