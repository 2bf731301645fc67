"""Initial weights depend on seed and parameter name, not on how a parameter is cut."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distft.model.initialisation import initial_fragment, initial_values
from distft.model.transformer import Transformer
from distft.model.transformer_config import TransformerConfig

CONFIG = TransformerConfig(vocab_size=11, max_seq_len=8, d_model=16, num_layers=8, num_heads=2)
SHAPE = (3, 700_001)  # just over two chunks, each with a generator of its own


@settings(max_examples=8)
@given(st.lists(st.integers(0, math.prod(SHAPE)), max_size=4))
def test_values_do_not_depend_on_how_they_are_cut(cuts: list[int]) -> None:
    whole = initial_fragment("embed.weight", SHAPE, 0, math.prod(SHAPE), seed=1, config=CONFIG)
    bounds = sorted([0, *cuts, math.prod(SHAPE)])
    slices = [
        initial_fragment("embed.weight", SHAPE, a, b, seed=1, config=CONFIG) for a, b in pairwise(bounds)
    ]
    assert torch.equal(torch.cat(slices), whole)


def test_values_depend_on_name_and_seed_and_have_the_configured_std() -> None:
    shape, numel = (1000, 1000), 1_000_000
    first = initial_fragment("blocks.0.attn.q.weight", shape, 0, numel, seed=1, config=CONFIG)
    for name, seed in (("blocks.1.attn.q.weight", 1), ("blocks.0.attn.q.weight", 2)):
        other = initial_fragment(name, shape, 0, numel, seed=seed, config=CONFIG)
        assert abs(torch.corrcoef(torch.stack([first, other]))[0, 1]) < 0.01
    assert first.std().item() == pytest.approx(0.02, rel=0.01)
    assert abs(first.mean().item()) < 1e-4


def test_chunks_of_one_parameter_are_uncorrelated() -> None:
    chunk = 1 << 20
    values = initial_fragment("embed.weight", (2, chunk), 0, 2 * chunk, seed=1, config=CONFIG)
    assert abs(torch.corrcoef(values.view(2, chunk))[0, 1]) < 0.01


def test_norms_start_at_one_biases_at_zero_and_residual_outputs_small() -> None:
    config = CONFIG.model_copy(
        update={"norm": "layernorm", "attention_bias": True, "qk_norm": True, "init_std": None}
    )
    with torch.device("meta"):
        model = Transformer(config)
    for name, param in model.named_parameters():
        initial = initial_values(config, name, tuple(param.shape))
        if name.endswith(".bias"):
            assert initial.kind == "zeros"
        elif "norm" in name:
            assert initial.kind == "ones"
        else:
            is_residual = name.endswith((".attn.o.weight", ".mlp.down.weight"))
            assert initial.kind == "normal"
            assert initial.std == pytest.approx(0.25 / (4 if is_residual else 1))
