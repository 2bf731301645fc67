"""TransformerConfig: derived sizes and rejected combinations."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distft.config import dump_yaml, parse, parse_yaml
from distft.errors import ConfigError
from distft.model.transformer_config import TransformerConfig

SIZES = {"max_seq_len": 8, "d_model": 256, "num_layers": 1, "num_heads": 4}


def test_missing_sizes_are_derived_from_the_others() -> None:
    config = parse(TransformerConfig, SIZES)
    assert (config.num_kv_heads, config.head_dim, config.d_ff) == (4, 64, 688)
    assert parse(TransformerConfig, SIZES | {"mlp": "gelu"}).d_ff == 1024
    assert parse(TransformerConfig, parse_yaml(dump_yaml(config))) == config


def test_one_error_lists_all_invalid_sizes() -> None:
    raw = {"head_dim": 9, "num_kv_heads": 3, "dropout": 0.1, "attention_kernel": "flex"}
    with pytest.raises(ConfigError) as raised:
        parse(TransformerConfig, SIZES | raw, where="model")
    for key in ("num_kv_heads=3", "head_dim=9", "dropout=0.1"):
        assert key in str(raised.value)
    with pytest.raises(ConfigError, match=r"d_model=256 is not a multiple of num_heads=3"):
        parse(TransformerConfig, SIZES | {"num_heads": 3})


@given(vocab_size=st.integers(1, 1000), multiple=st.integers(1, 100))
def test_the_vocabulary_is_padded_to_the_next_multiple(vocab_size: int, multiple: int) -> None:
    config = parse(TransformerConfig, SIZES | {"pad_vocab_to": multiple}).for_vocabulary(vocab_size)
    assert config.vocab_size == vocab_size
    assert 0 <= config.padded_vocab_size - vocab_size < multiple
    assert config.padded_vocab_size % multiple == 0


def test_the_vocabulary_size_must_be_set_and_cover_the_tokenizer() -> None:
    config = parse(TransformerConfig, SIZES)
    with pytest.raises(ConfigError, match="vocab_size is not set"):
        _ = config.padded_vocab_size
    fixed = config.for_vocabulary(100)
    assert fixed.for_vocabulary(90) == fixed
    with pytest.raises(ConfigError, match="less than the tokenizer's 101 pieces"):
        fixed.for_vocabulary(101)
