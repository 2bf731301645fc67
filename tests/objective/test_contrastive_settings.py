"""Settings of the contrastive objective that make no sense, alone or with a model."""

from typing import Any

import pytest

from distft.config import parse
from distft.errors import ConfigError
from distft.model.transformer_config import TransformerConfig
from distft.objective.contrastive import Contrastive
from distft.objective.settings import ObjectiveConfig


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"loss": "triplet", "temperature": 0.1}, "no temperature"),
        ({"loss": "margin", "learns_temperature": True}, "no temperature"),
        ({"margin": 0.5}, "has no margin"),
        ({"symmetric": True, "negatives": "own"}, "symmetric needs negatives=batch"),
        ({"views": "crops", "crop_share": [0.5, 0.2]}, "ascending"),
        ({"crop_share": [0.1, 0.2]}, "needs views=crops"),
        ({"temperature": 1e-300}, "temperature.*0.0001"),
    ],
)
def test_settings_without_sense_are_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        parse(ObjectiveConfig, {"type": "contrastive", **settings})


def test_a_model_whose_views_would_be_equal_is_refused() -> None:
    sizes: dict[str, Any] = {"vocab_size": 9, "max_seq_len": 8, "d_model": 8, "num_layers": 1, "num_heads": 1}
    with pytest.raises(ConfigError, match=r"views=dropout with model\.dropout=0"):
        Contrastive(views="dropout").check_model(TransformerConfig(**sizes))
    with pytest.raises(ConfigError, match="pooling=first"):
        Contrastive(pooling="first").check_model(TransformerConfig(**sizes))
    Contrastive(views="dropout").check_model(TransformerConfig(**sizes, dropout=0.1))
