"""Scaled rotary positions against transformers, at lengths beyond that of the pretraining."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_models import SIZES
from torch import Tensor

from distft.config import parse
from distft.errors import ConfigError
from distft.model.attention import inverse_frequencies, rotary_cos_sin
from distft.model.rope_scaling import NtkScaling
from distft.model.transformer_config import TransformerConfig

CPU = torch.device("cpu")
HEAD_DIMS, THETAS = st.sampled_from([4, 10, 64, 128]), st.sampled_from([100.0, 1e4, 5e5])
FACTORS = st.floats(1, 64)


def oracle(kind: str, head_dim: int, theta: float, seq_len: int | None = None, **options: Any) -> Any:
    """Inverse frequencies and factor of cos and sin, of transformers."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        head_dim=head_dim,
        max_position_embeddings=options.get("original_max_position_embeddings", 512) * 4,
        rope_parameters={"rope_type": kind, "rope_theta": theta, **options},
    )
    return ROPE_INIT_FUNCTIONS[kind](config, CPU, seq_len=seq_len)


def own(raw: dict[str, Any], head_dim: int, theta: float) -> tuple[Tensor, float]:
    sizes = SIZES | {"head_dim": head_dim, "rope_theta": theta}
    scaling = parse(TransformerConfig, {**sizes, "rope_scaling": raw}).rope_scaling
    assert scaling is not None
    return inverse_frequencies(head_dim, theta, scaling, CPU), scaling.magnitude


def require_equal(found: tuple[Tensor, float], expected: tuple[Tensor, float], longest: int = 2048) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-6)
    assert found[1] == pytest.approx(expected[1], rel=1e-12)
    angles = torch.arange(longest)[:, None].float() * expected[0]
    cos, sin = rotary_cos_sin(torch.arange(longest)[None], *found)
    torch.testing.assert_close(cos[0, :, 0], angles.cos() * expected[1], rtol=0, atol=1e-3)
    torch.testing.assert_close(sin[0, :, 0], angles.sin() * expected[1], rtol=0, atol=1e-3)


@settings(deadline=None)
@given(HEAD_DIMS, THETAS, FACTORS)
def test_linear_scaling(head_dim: int, theta: float, factor: float) -> None:
    expected = oracle("linear", head_dim, theta, factor=factor)
    require_equal(own({"type": "linear", "factor": factor}, head_dim, theta), expected)


@settings(deadline=None)
@given(HEAD_DIMS, THETAS, st.integers(1, 16))
def test_ntk_scaling_is_the_dynamic_one_of_a_row_that_many_times_as_long(
    head_dim: int, theta: float, factor: int
) -> None:
    """And the rotation of another theta, as an export writes it."""
    expected = oracle("dynamic", head_dim, theta, factor=1.0, seq_len=factor * 2048)
    require_equal(own({"type": "ntk", "factor": factor}, head_dim, theta), expected)
    other = NtkScaling(factor=factor).theta(theta, head_dim)
    torch.testing.assert_close(inverse_frequencies(head_dim, other, None, CPU), expected[0])


@settings(deadline=None)
@given(
    head_dim=HEAD_DIMS,
    theta=THETAS,
    factor=FACTORS,
    original=st.sampled_from([16, 512, 8192]),
    options=st.fixed_dictionaries(
        {},
        optional={
            "beta_fast": st.sampled_from([16.0, 32.0]),
            "beta_slow": st.sampled_from([1.0, 2.0]),
            "attention_factor": st.sampled_from([0.7, 1.3]),
            "truncate": st.booleans(),
        },
    ),
)
def test_yarn_scaling(
    head_dim: int, theta: float, factor: float, original: int, options: dict[str, Any]
) -> None:
    expected = oracle(
        "yarn", head_dim, theta, factor=factor, original_max_position_embeddings=original, **options
    )
    raw = {"type": "yarn", "factor": factor, "original_max_seq_len": original, **options}
    require_equal(own(raw, head_dim, theta), expected)


@settings(deadline=None)
@given(
    head_dim=HEAD_DIMS,
    theta=THETAS,
    factor=FACTORS,
    original=st.sampled_from([16, 512, 8192]),
    low=st.sampled_from([1.0, 2.0]),
    high=st.sampled_from([4.0, 8.0]),
)
def test_llama_3_scaling(
    head_dim: int, theta: float, factor: float, original: int, low: float, high: float
) -> None:
    names: dict[str, Any] = {"low_freq_factor": low, "high_freq_factor": high}
    expected = oracle(
        "llama3", head_dim, theta, factor=factor, original_max_position_embeddings=original, **names
    )
    raw = {"type": "llama3", "factor": factor, "original_max_seq_len": original, **names}
    require_equal(own(raw, head_dim, theta), expected)


def test_no_scaling_rotates_as_before() -> None:
    """Bit for bit: the models of all earlier checkpoints."""
    exponents = torch.arange(0, 64, 2, dtype=torch.float32) / 64
    assert torch.equal(inverse_frequencies(64, 5e5, None, CPU), 5e5**-exponents)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"type": "linear", "factor": 0.5}, "rope_scaling.*factor"),
    ({"type": "linear"}, "rope_scaling.*factor"),
    ({"factor": 2.0}, "type is missing"),
    ({"type": "dynamic", "factor": 2.0}, "type 'dynamic' is unknown.*linear, ntk, yarn, llama3"),
    ({"type": "yarn", "factor": 2.0}, "original_max_seq_len"),
    ({"type": "llama3", "factor": 2.0}, "original_max_seq_len"),
    ({"type": "yarn", "factor": 2.0, "original_max_seq_len": 0}, "original_max_seq_len"),
    (
        {"type": "yarn", "factor": 2.0, "original_max_seq_len": 8, "beta_fast": 1, "beta_slow": 4},
        "beta_fast=1 is less than beta_slow=4",
    ),
    (
        {"type": "llama3", "factor": 2.0, "original_max_seq_len": 8, "high_freq_factor": 1},
        "high_freq_factor=1 is not more than low_freq_factor=1",
    ),
    ({"type": "linear", "factor": 2.0, "original_max_seq_len": 8}, "original_max_seq_len"),
]


@pytest.mark.parametrize(("raw", "problem"), WRONG, ids=str)
def test_settings_that_make_no_sense_are_refused(raw: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as failure:
        parse(TransformerConfig, SIZES | {"rope_scaling": raw}, where="model")
    assert len(str(failure.value).splitlines()) == 1
