"""Adapters on a frozen model: the local engine and every ZeRO stage compute the same training."""

import pytest
import torch
from support.engine_scenarios import CPU, FREEING, Scenario, Training, collectives_for, run_alone
from support.rank_pool import run_ranks

from distft.model.encoder_decoder_config import EncoderDecoderConfig
from distft.model.lora_config import LoraConfig
from distft.model.quantized import QuantizedMatrix
from distft.topology import Topology

NUM_STEPS = 4
T5 = EncoderDecoderConfig(
    vocab_size=53,
    max_seq_len=12,
    d_model=12,
    num_encoder_layers=2,
    num_decoder_layers=1,
    num_heads=2,
    d_ff=10,
    head_dim=6,
)
LORA = Scenario(lora=LoraConfig(rank=3), trainable=("@lora", "norm.weight"))
DORA = Scenario(
    lora=LoraConfig(rank=2, dora=True, rslora=True, targets=("q", "v", "mlp.*")), trainable=("@lora",)
)
VARIANTS = {
    "lora": LORA,
    "dora": DORA,
    "dropout": Scenario(lora=LoraConfig(rank=3, dropout=0.3), trainable=("@lora",)),
    "recomputed": Scenario(lora=DORA.lora, trainable=("@lora",), activation_checkpointing="full"),
    "bf16": Scenario(lora=DORA.lora, trainable=("@lora",), precision="bf16"),
    "8 bits": Scenario(lora=DORA.lora, trainable=("@lora", "norm.weight"), frozen_bits=8),
    "4 bits": Scenario(lora=LORA.lora, trainable=("@lora", "blocks.1.*"), frozen_bits=4),
    "encoder_decoder": Scenario(other_model=T5, lora=LoraConfig(rank=2, dora=True), trainable=("@lora",)),
}


def _train(scenario: Scenario, topology: Topology) -> tuple[list[float], dict]:
    training = Training(scenario, topology, collectives_for(scenario, topology))
    losses = training.run(NUM_STEPS)
    state = training.whole_state()
    training.engine.close()
    return losses, state


def _train_all(topology: Topology, stage: int) -> list[tuple[list[float], dict]]:
    zero = FREEING if stage == 3 else {}
    return [_train(_replaced(VARIANTS[name], stage=stage, zero=zero), topology) for name in _variants(stage)]


def _variants(stage: int) -> list[str]:
    """All of them at stage 3; at the others the plain ones, and some of the rest."""
    others = {0: ["recomputed", "8 bits"], 1: ["bf16", "4 bits"], 2: ["dropout", "encoder_decoder"]}
    return ["lora", "dora", *others[stage]] if stage in others else list(VARIANTS)


def _replaced(scenario: Scenario, **changes: object) -> Scenario:
    return Scenario(**{**scenario.__dict__, **changes})  # type: ignore[arg-type]


@pytest.mark.ranks
@pytest.mark.parametrize(("stage", "world_size"), [(0, 2), (1, 2), (2, 2), (3, 4)])
def test_every_stage_computes_what_one_process_computes(stage: int, world_size: int) -> None:
    names = _variants(stage)
    expected = [_train(VARIANTS[name], Topology()) for name in names]
    for by_variant in run_ranks(_train_all, world_size, stage, timeout_s=240):
        for name, (losses, state), (wanted_losses, wanted) in zip(names, by_variant, expected, strict=True):
            exact = name != "bf16"
            assert losses == pytest.approx(wanted_losses, abs=1e-6 if exact else 2e-2), name
            assert state.keys() == wanted.keys(), "frozen weights have no moments"
            for key, values in state.items() if exact else ():
                torch.testing.assert_close(values, wanted[key], atol=1e-5, rtol=1e-4, msg=f"{name} {key}")


def test_frozen_weights_have_no_gradients_and_no_optimizer_state() -> None:
    training = run_alone(LORA, 1)
    numel = sum(values.numel() for (_, state), values in training.whole_state().items() if state == "exp_avg")
    params = dict(training.engine.module.named_parameters())
    assert numel == sum(params[name].numel() for name in training.trainable)
    assert not any(name.endswith("q.weight") or params[name].grad is not None for name in training.trainable)
    assert all(param.grad is None for param in params.values() if not param.requires_grad)


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_in_fewer_bits_compute_as_if_they_were_rounded(bits: int) -> None:
    """Also those of layers without adapters; what trains, heads and embeddings are not rounded."""
    trainable = ("blocks.1.*", "@lora")
    few = run_alone(Scenario(lora=DORA.lora, trainable=trainable, frozen_bits=bits), 0)
    rounded = run_alone(Scenario(lora=DORA.lora, trainable=trainable), 0)
    quantized = {name for name in rounded.shapes if name.startswith("blocks.0.") and name.endswith(".weight")}
    quantized = {name for name in quantized if len(rounded.shapes[name]) == 2}
    for name, param in rounded.engine.module.named_parameters():
        if name in quantized:
            matrix = QuantizedMatrix(param.shape, bits, CPU)
            matrix.set(param.detach())
            param.detach().copy_(matrix.whole(torch.float32))
    assert few.run(NUM_STEPS) == pytest.approx(rounded.run(NUM_STEPS), abs=1e-6)
    assert set(dict(few.engine.module.named_parameters())) == few.shapes.keys() - quantized
    exact = run_alone(Scenario(lora=DORA.lora, trainable=trainable), NUM_STEPS)
    assert exact.run(NUM_STEPS + 1) != pytest.approx(few.run(NUM_STEPS + 1), abs=1e-6)


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_in_fewer_bits_are_saved_as_they_came(bits: int) -> None:
    scenario = Scenario(lora=LORA.lora, trainable=("@lora",), frozen_bits=bits)
    before, after = run_alone(scenario, 0).whole_state(), run_alone(scenario, 2).whole_state()
    exact = run_alone(Scenario(lora=LORA.lora, trainable=("@lora",)), 0).whole_state()
    assert before.keys() == exact.keys()
    for (name, state), values in exact.items():
        torch.testing.assert_close(before[name, state], values, atol=0, rtol=0)
        if "lora" not in name:
            torch.testing.assert_close(after[name, state], values, atol=0, rtol=0)
