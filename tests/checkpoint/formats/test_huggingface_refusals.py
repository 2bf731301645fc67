"""What scaled rotary positions, windows and ModernBERT cannot be here or there is refused by name."""

from typing import Any

import pytest
from support.huggingface_models import DISTFT_MODERNBERT, LLAMA, MODERNBERT, model_config

from distft.checkpoint.formats.huggingface_config import choose_architecture, parse_config
from distft.errors import ConfigError

UNSUPPORTED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"rope_scaling": {"type": "longrope"}}, "rope_scaling: rotary positions of type 'longrope'"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 0.5}}, "rope_scaling"),
    ("llama", {"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling"),
    (
        "qwen3",
        {"layer_types": ["chunked_attention", "full_attention"]},
        "layer_types has 'chunked_attention'",
    ),
    ("qwen3", {"layer_types": ["full_attention"]}, "layer_types has 1 layers, but num_hidden_layers=2"),
    ("modernbert", {"hidden_activation": "silu"}, "hidden_activation='silu' is not supported"),
    ("modernbert", {"classifier_activation": "relu"}, "classifier_activation='relu' is not supported"),
    ("modernbert", {"decoder_bias": False}, "decoder_bias=false is not supported"),
    ("modernbert", {"tie_word_embeddings": False}, "tie_word_embeddings=false is not supported"),
    ("modernbert", {"mlp_dropout": 0.1}, "mlp_dropout=0.1: dropout in these places"),
    (
        "modernbert",
        {"architectures": ["ModernBertForTokenClassification"]},
        "it must be one of ModernBertForMaskedLM, ModernBertForSequenceClassification, ModernBertModel",
    ),
    (
        "modernbert",
        {"architectures": ["ModernBertForSequenceClassification"], "classifier_bias": True, "norm_eps": 1e-5},
        "classifier_bias=True is not supported for a classifier: it must be False",
    ),
    (
        "modernbert",
        {"architectures": ["ModernBertForSequenceClassification"], "classifier_pooling": "max"},
        "classifier_pooling='max' is not supported: it must be cls or mean",
    ),
    (
        "modernbert",
        {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
        "rope_parameters.sliding_attention",
    ),
    ("gemma2", {}, "model_type='gemma2' is not supported: it must be one of llama, "),
]


@pytest.mark.parametrize(("model_type", "changes", "problem"), UNSUPPORTED, ids=str)
def test_an_unsupported_feature_is_refused_by_name(
    model_type: str, changes: dict[str, Any], problem: str
) -> None:
    sizes = MODERNBERT if model_type == "modernbert" else LLAMA
    with pytest.raises(ConfigError) as failure:
        parse_config({"model_type": model_type, **sizes, **changes})
    assert problem in str(failure.value)


@pytest.mark.parametrize(
    ("changes", "wanted", "problems"),
    [
        ({"sliding_window": 5}, "llama", ["model.sliding_window=5 would have to be null"]),
        (
            {"sliding_window": 5, "global_attention_every": 2},
            "mistral",
            ["model.global_attention_every=2 would have to be null"],
        ),
        (
            {"sliding_window": 5, "local_rope_theta": 9.0},
            None,
            ["local_rope_theta=9.0 would have to be null"],
        ),
        ({"final_logit_softcap": 5.0, "attention_logit_softcap": 5.0}, None, ["final_logit_softcap=5.0"]),
        (
            DISTFT_MODERNBERT | {"first_attention_norm": True},
            "modernbert",
            ["first_attention_norm=true would have to be false"],
        ),
    ],
    ids=str,
)
def test_a_model_that_transformers_does_not_have_is_refused_option_by_option(
    changes: dict[str, Any], wanted: str | None, problems: list[str]
) -> None:
    with pytest.raises(ConfigError) as failure:
        choose_architecture(model_config(**changes), wanted)
    assert all(problem in str(failure.value) for problem in problems)
