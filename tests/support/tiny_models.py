"""Small models whose weights depend on their names only."""

from typing import Any

import torch

from distft.engine.memory import allocate
from distft.model.config import LANGUAGE_MODEL, Heads, ModelConfig
from distft.model.initialisation import initial_fragment
from distft.model.transformer import Transformer

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "max_seq_len": 24,
    "d_model": 32,
    "num_layers": 2,
    "num_heads": 4,
    "d_ff": 44,
    "init_std": 0.2,
}


def build(config: ModelConfig, heads: Heads = LANGUAGE_MODEL) -> Transformer:
    with torch.device("meta"):
        model = Transformer(config, heads)
    allocate(model, torch.device("cpu"), torch.float32)
    for name, param in model.named_parameters():
        values = initial_fragment(name, tuple(param.shape), 0, param.numel(), seed=3, config=config)
        param.data.copy_(values.view_as(param))
    return model.eval()
