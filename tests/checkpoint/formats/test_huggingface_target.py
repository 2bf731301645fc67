"""distft models exported for transformers, which loads them and computes with them."""

import json
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import load_file
from support.huggingface_models import (
    DISTFT_GPT2,
    DISTFT_MODELS,
    HF_MODELS,
    loaded,
    make_distft_model,
    make_hf_model,
    model_config,
    random_ids,
    save_model,
    weights,
)
from torch import Tensor

from distft.checkpoint.formats.huggingface_config import choose_architecture
from distft.checkpoint.formats.huggingface_source import HuggingFaceCheckpoint
from distft.checkpoint.formats.huggingface_target import write_huggingface
from distft.checkpoint.sources import CheckpointSource
from distft.errors import CheckpointError, ConfigError

TARGET_MODULE = "distft.checkpoint.formats.huggingface_target"


class FailingSource:
    """A source whose reads fail after `num_reads` of them."""

    def __init__(self, source: CheckpointSource, num_reads: int) -> None:
        self._source, self._num_reads = source, num_reads

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def read(self, *args: Any) -> Tensor:
        self._num_reads -= 1
        if self._num_reads < 0:
            raise OSError("the disk is gone")
        return self._source.read(*args)


@pytest.mark.parametrize("kind", DISTFT_MODELS)
@pytest.mark.parametrize("max_shard_bytes", [1 << 30, 6000])
def test_transformers_computes_the_same_logits(tmp_path: Path, kind: str, max_shard_bytes: int) -> None:
    architecture, options = DISTFT_MODELS[kind]
    model = make_distft_model(model_config(**options))
    source, target = save_model(model, tmp_path / "distft"), tmp_path / "exported"
    done: list[int] = []
    write_huggingface(source, str(target), max_shard_bytes=max_shard_bytes, on_progress=done.append)
    exported = loaded(target)
    assert exported.config.model_type == architecture
    with torch.no_grad():
        torch.testing.assert_close(
            exported(random_ids()).logits, model.logits(random_ids()), rtol=0, atol=1e-5
        )
    files = sorted(target.glob("*.safetensors"))
    assert sum(done) == sum(p.numel() * 4 for p in model.parameters())
    assert (len(files) > 3) == (max_shard_bytes == 6000)
    largest = max(p.numel() * 4 for p in exported.parameters())
    assert len(files) == 1 or all(
        sum(v.numel() * 4 for v in load_file(file).values()) <= max(max_shard_bytes, largest)
        for file in files
    )


@pytest.mark.parametrize("kind", DISTFT_MODELS)
def test_an_exported_model_is_read_back_with_equal_weights_and_config(tmp_path: Path, kind: str) -> None:
    model = make_distft_model(model_config(**DISTFT_MODELS[kind][1]))
    source = save_model(model, tmp_path / "distft")
    write_huggingface(source, str(tmp_path / "exported"), max_shard_bytes=9000)
    back = HuggingFaceCheckpoint.open(str(tmp_path / "exported"))
    assert back.find_damage() == []
    names = list(source.manifest.parameters)
    assert list(back.manifest.parameters) == names
    expected = weights(source, names)
    assert all(torch.equal(values, expected[name]) for name, values in weights(back, names).items())
    # transformers has no padded vocabulary, and only one option for the biases of q, k and v.
    different = {"vocab_size": model.config.padded_vocab_size, "pad_vocab_to": 1}
    if model.config.attention_bias:
        different["qkv_bias"] = False
    expected_config = {**model.config.model_dump(mode="json"), **different}
    assert back.manifest.config["model"] == expected_config


@pytest.mark.parametrize("kind", HF_MODELS)
def test_a_model_of_transformers_is_read_and_exported_unchanged(tmp_path: Path, kind: str) -> None:
    hf_model = make_hf_model(kind)
    hf_model.save_pretrained(tmp_path / "before")
    source = HuggingFaceCheckpoint.open(str(tmp_path / "before"))
    write_huggingface(source, str(tmp_path / "after"), architecture=HF_MODELS[kind][0])
    before, after = (load_file(tmp_path / when / "model.safetensors") for when in ("before", "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = loaded(tmp_path / "after").config.to_dict()
    original = hf_model.config.to_dict()
    ignored = {
        "eos_token_id",
        "embd_pdrop",
        "attn_pdrop",
        "resid_pdrop",
        "sliding_window",
        "head_dim",
        "n_inner",
    }
    differing = (
        {k for k in original | again if original.get(k) != again.get(k)}
        - ignored
        - {"_name_or_path", "torch_dtype"}
    )
    assert differing == set()


def test_the_chunk_size_does_not_change_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_model(make_distft_model(model_config(**DISTFT_MODELS["gpt2"][1])), tmp_path / "distft")
    write_huggingface(source, str(tmp_path / "large"))
    monkeypatch.setattr(f"{TARGET_MODULE}._CHUNK_NUMEL", 100)
    write_huggingface(source, str(tmp_path / "small"))
    large, small = (tmp_path / name / "model.safetensors" for name in ("large", "small"))
    assert large.read_bytes() == small.read_bytes()


def test_at_most_a_chunk_is_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_model(make_distft_model(model_config(**DISTFT_MODELS["gpt2"][1])), tmp_path / "distft")
    monkeypatch.setattr(f"{TARGET_MODULE}._CHUNK_NUMEL", 100)
    sizes: list[int] = []
    read = source.read

    def recorded(parameter: str, state: str, start: int, stop: int) -> Tensor:
        sizes.append(stop - start)
        return read(parameter, state, start, stop)

    monkeypatch.setattr(source, "read", recorded)
    write_huggingface(source, str(tmp_path / "exported"))
    assert max(sizes) == 100


def test_an_export_in_bf16_rounds_each_weight_once(tmp_path: Path) -> None:
    model = make_distft_model(model_config(**DISTFT_GPT2))
    source = save_model(model, tmp_path / "distft")
    write_huggingface(source, str(tmp_path / "exported"), dtype=torch.bfloat16)
    exported = loaded(tmp_path / "exported")
    assert exported.dtype == torch.bfloat16
    back = HuggingFaceCheckpoint.open(str(tmp_path / "exported"))
    for name, values in weights(back, list(back.manifest.parameters)).items():
        assert torch.equal(values, dict(model.named_parameters())[name].detach().to(torch.bfloat16))


def test_each_weight_keeps_its_dtype_by_default(tmp_path: Path) -> None:
    """The bf16 weight has an odd number of elements; the tensors after it must still be aligned."""
    model = make_distft_model(model_config(vocab_size=53, d_model=27, num_heads=1, head_dim=2))
    source = save_model(
        model, tmp_path / "distft", change=lambda v: v.bfloat16() if v.numel() == 53 * 27 else v
    )
    write_huggingface(source, str(tmp_path / "exported"))
    tensors = load_file(tmp_path / "exported" / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert tensors["model.norm.weight"].dtype == torch.float32
    assert loaded(tmp_path / "exported").dtype == torch.float32
    data = (tmp_path / "exported" / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    for name, entry in json.loads(data[8 : 8 + length]).items():
        assert name == "__metadata__" or entry["data_offsets"][0] % (4 if entry["dtype"] == "F32" else 2) == 0


def test_values_beyond_the_range_of_fp16_are_rejected(tmp_path: Path) -> None:
    source = save_model(
        make_distft_model(model_config()), tmp_path / "distft", change=lambda values: values * 1e6
    )
    with pytest.raises(ConfigError, match=r"beyond 65504.*bf16"):
        write_huggingface(source, str(tmp_path / "exported"), dtype=torch.float16)
    assert not (tmp_path / "exported" / "config.json").exists()


def test_config_is_written_last_and_an_interrupted_export_is_replaced(tmp_path: Path) -> None:
    source, target = (
        save_model(make_distft_model(model_config()), tmp_path / "distft"),
        tmp_path / "exported",
    )
    for num_reads in (0, 3, 7):
        with pytest.raises(OSError, match="the disk is gone"):
            write_huggingface(FailingSource(source, num_reads), str(target), max_shard_bytes=5000)
        assert not (target / "config.json").exists()
    assert list(target.glob("*.safetensors"))
    write_huggingface(source, str(target))
    assert [p.name for p in target.glob("*.safetensors*")] == ["model.safetensors"]
    loaded(target)


@pytest.mark.parametrize("name", ["config.json", "notes.txt", "model_of_mine"])
def test_a_directory_with_other_files_is_rejected_and_unchanged(tmp_path: Path, name: str) -> None:
    source = save_model(make_distft_model(model_config()), tmp_path / "distft")
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / name).write_text("mine")
    (tmp_path / "exported" / "model.safetensors").write_text("mine, too")
    with pytest.raises(ConfigError, match=rf"exported is not empty \({name}\)"):
        write_huggingface(source, str(tmp_path / "exported"))
    assert (tmp_path / "exported" / "model.safetensors").read_text() == "mine, too"


def test_a_source_that_lacks_parameters_is_rejected_before_anything_is_written(tmp_path: Path) -> None:
    source = save_model(make_distft_model(model_config()), tmp_path / "distft")
    source.manifest.config["model"].update(d_ff=30)
    del source.manifest.parameters["norm.weight"]
    with pytest.raises(CheckpointError) as failure:
        write_huggingface(source, str(tmp_path / "exported"))
    assert "lacks the weight of norm.weight [24]" in str(failure.value)
    assert "blocks.1.mlp.gate.weight has shape [29, 24], but its configuration requires [30, 24]" in str(
        failure.value
    )
    assert not (tmp_path / "exported").exists()
    source.manifest.config.clear()
    with pytest.raises(ConfigError, match="does not contain the model's configuration"):
        write_huggingface(source, str(tmp_path / "exported"))


def test_a_model_without_a_head_is_exported_without_one(tmp_path: Path) -> None:
    make_hf_model("llama", "AutoModel").save_pretrained(tmp_path / "before")
    source = HuggingFaceCheckpoint.open(str(tmp_path / "before"))
    notes = write_huggingface(source, str(tmp_path / "after"))
    assert any("has no head" in note for note in notes)
    before, after = (load_file(tmp_path / when / "model.safetensors") for when in ("before", "after"))
    assert before.keys() == after.keys()
    loaded(tmp_path / "after", "AutoModel")


def test_a_url_is_written_like_a_path(tmp_path: Path) -> None:
    source = save_model(make_distft_model(model_config()), tmp_path / "distft")
    write_huggingface(source, "memory://exports/model", max_shard_bytes=9000)
    fsspec.filesystem("memory").get("/exports/model", str(tmp_path / "exported"), recursive=True)
    loaded(tmp_path / "exported")


@pytest.mark.parametrize(
    ("options", "wanted", "problems"),
    [
        ({"attention": "bidirectional"}, None, ["none of llama, qwen2, qwen3, gpt2", "causal"]),
        (
            {"mlp": "gelu", "positions": "learned"},
            None,
            ["model.mlp=gelu would have to be swiglu", "model.positions=learned would have to be rotary"],
        ),
        ({**DISTFT_GPT2, "mlp_bias": False}, None, ["gpt2", "model.mlp_bias=false would have to be true"]),
        ({"qk_norm": True, "qkv_bias": True}, None, ["model.q"]),
        ({"num_heads": 5, "head_dim": 6}, None, ["d_model=24 would have to be a multiple", "mistral"]),
        ({**DISTFT_GPT2, "num_kv_heads": 2}, "gpt2", ["model.num_kv_heads=2 would have to be 4"]),
        (
            {**DISTFT_GPT2, "head_dim": 5},
            "gpt2",
            ["model.head_dim=5 would have to be d_model / num_heads = 6"],
        ),
        ({"mlp_bias": True}, "mistral", ["model.mlp_bias=true would have to be false"]),
        ({}, "qwen2", ["qwen2 does not support it, as\n", "model.qkv_bias=false would have to be true"]),
        ({}, "falcon", ["architecture='falcon' is not one of llama, mistral"]),
    ],
    ids=str,
)
def test_a_model_that_transformers_does_not_support_is_rejected_option_by_option(
    options: dict[str, Any], wanted: str | None, problems: list[str]
) -> None:
    with pytest.raises(ConfigError) as failure:
        choose_architecture(model_config(**options), wanted)
    assert all(problem in str(failure.value) for problem in problems)


def test_mistral_is_exported_on_request(tmp_path: Path) -> None:
    model = make_distft_model(model_config(num_heads=5, head_dim=6, num_kv_heads=1))
    source = save_model(model, tmp_path / "distft")
    write_huggingface(source, str(tmp_path / "exported"), architecture="mistral")
    exported = loaded(tmp_path / "exported")
    assert exported.config.model_type == "mistral"
    with torch.no_grad():
        torch.testing.assert_close(
            exported(random_ids()).logits, model.logits(random_ids()), rtol=0, atol=1e-5
        )


def test_dropout_that_the_architecture_lacks_is_noted(tmp_path: Path) -> None:
    for kind, is_noted in (("llama", True), ("gpt2", False)):
        model = make_distft_model(model_config(**DISTFT_MODELS[kind][1], dropout=0.25))
        source = save_model(model, tmp_path / kind)
        notes = write_huggingface(source, str(tmp_path / f"{kind}_out"))
        assert any("dropout=0.25 is left out" in note for note in notes) == is_noted
    assert json.loads((tmp_path / "gpt2_out" / "config.json").read_text())["embd_pdrop"] == 0.25
