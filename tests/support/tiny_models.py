"""Small models whose weights depend on their names only."""

from typing import Any

import torch

from distft.engine.memory import allocate
from distft.model.config import ModelConfig
from distft.model.heads import LANGUAGE_MODEL, Heads
from distft.model.initialisation import initial_fragment
from distft.model.transformer import Transformer
from distft.model.transformer_config import TransformerConfig
from distft.model.with_heads import ModelWithHeads

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "max_seq_len": 24,
    "d_model": 32,
    "num_layers": 2,
    "num_heads": 4,
    "d_ff": 44,
    "init_std": 0.2,
}


def build(config: TransformerConfig, heads: Heads = LANGUAGE_MODEL) -> Transformer:
    model = build_any(config, heads)
    assert isinstance(model, Transformer)
    return model


def build_any(config: ModelConfig, heads: Heads = LANGUAGE_MODEL) -> ModelWithHeads:
    """A model of any type, in evaluation mode."""
    with torch.device("meta"):
        model = config.build(heads)
    allocate(model, torch.device("cpu"), torch.float32)
    for name, param in model.named_parameters():
        values = initial_fragment(name, tuple(param.shape), 0, param.numel(), seed=3, config=config)
        param.data.copy_(values.view_as(param))
    return model.eval()
