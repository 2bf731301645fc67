"""A model in muP is exported with its multipliers in the weights: transformers computes the same logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.huggingface_models import (
    DISTFT_GPT2,
    loaded,
    make_distft_model,
    model_config,
    random_ids,
    save_model,
)

from distft.checkpoint.convert import convert
from distft.checkpoint.convert_config import ConvertConfig
from distft.checkpoint.formats.huggingface_target import write_huggingface
from distft.checkpoint.mup import factors
from distft.errors import ConfigError
from distft.model.heads import LANGUAGE_MODEL, ClassificationHead, Heads

# The model has a width of 24 and heads of 6.
MUP = {"parametrization": "mup", "mup_base_d_model": 8, "mup_base_head_dim": 2}
BERT = {
    "attention": "bidirectional",
    "norm": "layernorm",
    "norm_position": "post",
    "embedding_norm": True,
    "positions": "learned",
    "num_segments": 2,
    "mlp": "gelu_exact",
    "attention_bias": True,
    "mlp_bias": True,
    "lm_head_transform": True,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("AutoModelForCausalLM", {}),
    "untied": ("AutoModelForCausalLM", {"tie_embeddings": False}),
    "with biases": ("AutoModelForCausalLM", {"qkv_bias": True}),
    "with norms of queries": ("AutoModelForCausalLM", {"qk_norm": True}),
    "gpt2": ("AutoModelForCausalLM", DISTFT_GPT2),
    "bert": ("AutoModelForMaskedLM", BERT),
}


@pytest.mark.parametrize("kind", MODELS)
def test_transformers_computes_the_logits_of_a_model_in_mup(tmp_path: Path, kind: str) -> None:
    auto_class, options = MODELS[kind]
    model = make_distft_model(model_config(**options, **MUP))
    standard = make_distft_model(model_config(**options))
    source, target = save_model(model, tmp_path / "distft"), tmp_path / "exported"
    write_huggingface(source, str(target))
    with torch.no_grad():
        expected = model.logits(random_ids())
        torch.testing.assert_close(
            loaded(target, auto_class)(random_ids()).logits, expected, rtol=0, atol=1e-5
        )
        assert not torch.allclose(standard.logits(random_ids()), expected, atol=1e-2), "muP changes nothing"


def test_a_classifier_in_mup_is_exported_without_its_table_of_logits(tmp_path: Path) -> None:
    heads: Heads = {"classifier": ClassificationHead(num_labels=3)}
    model = make_distft_model(model_config(**MUP), heads)
    source, target = save_model(model, tmp_path / "distft", label_names=list("abc")), tmp_path / "exported"
    write_huggingface(source, str(target))
    with torch.no_grad():
        found = loaded(target, "AutoModelForSequenceClassification")(random_ids()[:1]).logits
        torch.testing.assert_close(found, model.logits(random_ids()[:1]), rtol=0, atol=1e-5)


def test_at_the_base_nothing_is_folded() -> None:
    at_base = {**MUP, "mup_base_d_model": 24, "mup_base_head_dim": 6}
    assert factors(model_config(**at_base)) == {}
    assert (
        make_distft_model(model_config(**at_base), LANGUAGE_MODEL).get_submodule("lm_head").multiplier is None
    )


def test_adapters_of_a_model_in_mup_are_refused_by_name(tmp_path: Path) -> None:
    source = save_model(make_distft_model(model_config(**MUP)), tmp_path / "distft")
    with pytest.raises(ConfigError, match="parametrization=mup, and PEFT has no place for its multipliers"):
        convert(source, str(tmp_path / "out"), ConvertConfig.model_validate({"to": "peft"}), lambda _: None)
