"""Mixtures of experts of transformers: fused tensors, damage, generation, and what is not there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.huggingface_models import (
    MAX_SEQ_LEN,
    load_from_hf,
    loaded,
    make_distft_model,
    make_hf_model,
    model_config,
    random_ids,
    save_model,
)

from distft.checkpoint.formats.huggingface_config import parse_config
from distft.checkpoint.formats.huggingface_source import HuggingFaceCheckpoint
from distft.checkpoint.formats.huggingface_target import write_huggingface
from distft.checkpoint.fragments import WEIGHT
from distft.errors import ConfigError
from distft.model.generation import generate

KINDS = ("mixtral", "qwen2_moe", "qwen2_moe_every", "qwen3_moe")
EXPERTS = {"num_experts": 4, "experts_per_token": 2}


@pytest.mark.parametrize("kind", KINDS)
def test_the_tensors_of_all_experts_at_once_are_read_too(tmp_path: Path, kind: str) -> None:
    model = make_hf_model(kind)
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    model.save_pretrained(tmp_path / "single", max_shard_size="6KB")
    fused, read = load_from_hf(tmp_path / "fused")
    single, _ = load_from_hf(tmp_path / "single")
    assert fused.find_damage() == single.find_damage() == []
    with torch.no_grad():
        torch.testing.assert_close(read.logits(random_ids()), model(random_ids()).logits, rtol=0, atol=1e-5)
    for name, record in single.manifest.parameters.items():
        numel = torch.Size(record.shape).numel()
        assert torch.equal(fused.read(name, WEIGHT, 0, numel), single.read(name, WEIGHT, 0, numel)), name
        # Any slice, across experts too.
        start, stop = numel // 7, numel - numel // 5
        assert torch.equal(
            fused.read(name, WEIGHT, start, stop), single.read(name, WEIGHT, 0, numel)[start:stop]
        )


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_generation_equals_that_of_transformers(tmp_path: Path, kind: str) -> None:
    model = make_hf_model(kind)
    model.save_pretrained(tmp_path)
    _, read = load_from_hf(tmp_path)
    prompt = random_ids()[0, :5].tolist()
    expected = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, 5, dtype=torch.int64),
        max_new_tokens=9,
        do_sample=False,
        eos_token_id=None,
    )
    assert generate(read, [prompt], max_new_tokens=9, temperature=0) == [expected[0, 5:].tolist()]


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make_hf_model("mixtral").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    source = HuggingFaceCheckpoint.open(str(tmp_path))
    assert any(f"no tensor {name} [28, 24]" in problem for problem in source.find_damage())
    assert not source.has("blocks.1.mlp.experts.up.weight", WEIGHT)
    assert source.has("blocks.0.mlp.experts.up.weight", WEIGHT)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_an_empty_config_has_transformers_defaults(model_type: str) -> None:
    import transformers

    full = transformers.AutoConfig.for_model(model_type).to_dict()
    assert parse_config({"model_type": model_type}) == parse_config(full)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [("mixtral", {"router_jitter_noise": 0.1}), ("qwen3_moe", {"use_sliding_window": True})],
)
def test_an_unsupported_option_is_named(model_type: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(changes))}=.* is not supported"):
        parse_config({"model_type": model_type, **changes})


@pytest.mark.parametrize(
    ("experts", "problem"),
    [
        ({"scores": "sigmoid"}, "model.experts.scores=sigmoid would have to be softmax"),
        ({"bias_update_rate": 0.1}, "model.experts.bias_update_rate=0.1 would have to be null"),
        ({"normalize_weights": False}, "model.experts.normalize_weights=False would have to be true"),
        ({"shared_d_ff": 8}, "model.experts.shared_d_ff=8 would have to be 0"),
    ],
)
def test_what_mixtral_cannot_be_is_named(tmp_path: Path, experts: dict[str, Any], problem: str) -> None:
    source = save_model(make_distft_model(model_config(experts={**EXPERTS, **experts})), tmp_path / "distft")
    with pytest.raises(ConfigError, match=problem):
        write_huggingface(source, str(tmp_path / "exported"), architecture="mixtral")
    with pytest.raises(ConfigError, match=r"model\.experts would have to be null"):
        write_huggingface(source, str(tmp_path / "exported"), architecture="llama")


def test_a_dense_model_is_no_mixtral(tmp_path: Path) -> None:
    source = save_model(make_distft_model(model_config()), tmp_path / "distft")
    with pytest.raises(ConfigError, match=r"model\.experts would have to be set"):
        write_huggingface(source, str(tmp_path / "exported"), architecture="mixtral")


def test_an_export_has_a_tensor_for_each_expert(tmp_path: Path) -> None:
    config = model_config(experts={**EXPERTS, "d_ff": 12}, max_seq_len=MAX_SEQ_LEN)
    source = save_model(make_distft_model(config), tmp_path / "distft")
    write_huggingface(source, str(tmp_path / "exported"), dtype=torch.bfloat16)
    names = set(HuggingFaceCheckpoint.open(str(tmp_path / "exported")).tensor_map.tensors)
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in names
    assert loaded(tmp_path / "exported").config.num_local_experts == 4
