"""Fresh weights are a function of the name."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distft.model.config import ModelConfig
from distft.model.initialisation import initial_fragment, initial_values
from distft.model.transformer import Transformer

CONFIG = ModelConfig(vocab_size=11, max_seq_len=8, d_model=16, num_layers=8, num_heads=2)
SHAPE = (3, 700_001)  # just over two of the pieces that are drawn at a time


@settings(max_examples=8)
@given(st.lists(st.integers(0, math.prod(SHAPE)), max_size=4))
def test_values_do_not_depend_on_how_they_are_cut(cuts: list[int]) -> None:
    whole = initial_fragment("embed.weight", SHAPE, 0, math.prod(SHAPE), seed=1, config=CONFIG)
    bounds = sorted([0, *cuts, math.prod(SHAPE)])
    pieces = [
        initial_fragment("embed.weight", SHAPE, a, b, seed=1, config=CONFIG) for a, b in pairwise(bounds)
    ]
    assert torch.equal(torch.cat(pieces), whole)


def test_values_depend_on_name_and_seed_and_have_the_stated_spread() -> None:
    shape, numel = (1000, 1000), 1_000_000
    first = initial_fragment("blocks.0.attn.q.weight", shape, 0, numel, seed=1, config=CONFIG)
    for name, seed in (("blocks.1.attn.q.weight", 1), ("blocks.0.attn.q.weight", 2)):
        other = initial_fragment(name, shape, 0, numel, seed=seed, config=CONFIG)
        assert abs(torch.corrcoef(torch.stack([first, other]))[0, 1]) < 0.01
    assert first.std().item() == pytest.approx(0.02, rel=0.01)
    assert abs(first.mean().item()) < 1e-4


def test_pieces_of_one_parameter_are_not_alike() -> None:
    half = 1 << 20
    values = initial_fragment("embed.weight", (2, half), 0, 2 * half, seed=1, config=CONFIG)
    assert abs(torch.corrcoef(values.view(2, half))[0, 1]) < 0.01


def test_norms_begin_at_one_biases_at_zero_and_residual_outputs_small() -> None:
    config = CONFIG.model_copy(
        update={"norm": "layernorm", "attention_bias": True, "qk_norm": True, "init_std": None}
    )
    with torch.device("meta"):
        model = Transformer(config)
    for name, param in model.named_parameters():
        found = initial_values(config, name, tuple(param.shape))
        if name.endswith(".bias"):
            assert found.kind == "zeros"
        elif "norm" in name:
            assert found.kind == "ones"
        else:
            is_residual = name.endswith((".attn.o.weight", ".mlp.down.weight"))
            assert found.kind == "normal"
            assert found.std == pytest.approx(0.25 / (4 if is_residual else 1))
