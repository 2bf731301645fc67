"""Models other than the causal Transformer train the same on every engine and number of ranks."""

from typing import Any

import pytest
import torch
from support.engine_scenarios import (
    FREEING,
    SEQ_LEN,
    VOCAB_SIZE,
    Scenario,
    run_alone,
    train_all,
)
from support.rank_pool import run_ranks

from distft.config import parse
from distft.model.config import ModelConfig
from distft.model.settings import AnyModelConfig

NUM_STEPS = 4
MODELS: list[dict[str, Any]] = [
    {"type": "deep_averaging", "num_layers": 2, "direction": "bidirectional"},
    {"type": "deep_averaging", "num_layers": 2, "dropout": 0.2},
    {"type": "cnn", "num_layers": 2, "kernel_sizes": [2, 3, 4]},
    {"type": "rnn", "num_layers": 2},
    {"type": "lstm", "num_layers": 2, "dropout": 0.2},
    {"type": "gru", "num_layers": 2, "direction": "bidirectional", "d_hidden": 11, "tie_embeddings": False},
    # A BERT, with pairs as rows. Without a bias of k: no loss depends on it, so its gradient is rounding, and
    # AdamW makes a step of that.
    {
        "num_layers": 2,
        "num_heads": 3,
        "d_ff": 29,
        "norm": "layernorm",
        "norm_position": "post",
        "embedding_norm": True,
        "positions": "learned",
        "num_segments": 2,
        "mlp": "gelu_exact",
        "mlp_bias": True,
        "lm_head_transform": True,
        "attention": "bidirectional",
        "dropout": 0.2,
    },
    # A window in one of two layers, with rotary positions of its own, and capped scores and logits.
    {
        "num_layers": 2,
        "num_heads": 3,
        "d_ff": 29,
        "norm": "layernorm",
        "norm_bias": False,
        "embedding_norm": True,
        "first_attention_norm": False,
        "mlp": "geglu",
        "sliding_window": 4,
        "global_attention_every": 2,
        "local_rope_theta": 50.0,
        "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_seq_len": 6},
        "attention_logit_softcap": 2.0,
        "final_logit_softcap": 4.0,
        "dropout": 0.2,
    },
    # Rows of a source, of which some are longer than others, and a target
    {
        "type": "encoder_decoder",
        "num_encoder_layers": 2,
        "num_heads": 3,
        "d_ff": 29,
        "mlp": "geglu_tanh",
        "num_buckets": 8,
        "max_distance": 10,
        "dropout": 0.2,
    },
]
PARTLY = ("*blocks.1.*",)


def _model(raw: dict[str, Any]) -> ModelConfig:
    sizes = {"vocab_size": VOCAB_SIZE, "max_seq_len": SEQ_LEN, "d_model": 18}
    model: ModelConfig = parse(AnyModelConfig, {**sizes, **raw})
    return model


def _scenarios(stages: dict[int | None, tuple[str, ...]]) -> list[Scenario]:
    return [
        Scenario(
            stage=stage,
            other_model=_model(raw),
            trainable=trainable,
            zero=FREEING if stage == 3 else {},
        )
        for raw in MODELS
        for stage, trainable in stages.items()
    ]


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("world_size", "stages"),
    [(1, {2: PARTLY}), (2, {0: ("*",), 1: ("*",), 2: ("*",), 3: PARTLY}), (4, {3: ("*",)})],
    ids=["1", "2", "4"],
)
def test_zero_computes_what_the_local_engine_computes(
    world_size: int, stages: dict[int | None, tuple[str, ...]]
) -> None:
    scenarios = _scenarios(stages)
    by_rank = run_ranks(train_all, world_size, scenarios, NUM_STEPS, timeout_s=240)
    for number, scenario in enumerate(scenarios):
        alone = run_alone(Scenario(other_model=scenario.model, trainable=scenario.trainable), NUM_STEPS)
        for results in by_rank:
            losses, state = results[number]
            assert losses == pytest.approx(alone.losses, abs=1e-6), scenario
            expected = alone.whole_state()
            assert state.keys() == expected.keys()
            for key, values in state.items():
                torch.testing.assert_close(
                    values, expected[key], atol=2e-5, rtol=1e-4, msg=f"{scenario} {key}"
                )
