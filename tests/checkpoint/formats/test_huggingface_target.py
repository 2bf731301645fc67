"""distft models exported for transformers, which loads them and computes with them."""

import json
from pathlib import Path
from typing import Any, Literal

import fsspec
import pytest
import torch
from safetensors.torch import load_file
from support.huggingface_models import (
    HF_MODELS,
    MAX_SEQ_LEN,
    VOCAB_SIZE,
    make_distft_model,
    make_hf_model,
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
from distft.model.config import ClassificationHead, ModelConfig
from distft.tokenizer import TokenizerTrainConfig, train_tokenizer

TARGET_MODULE = "distft.checkpoint.formats.huggingface_target"
GPT2: dict[str, Any] = {
    "norm": "layernorm",
    "positions": "learned",
    "mlp": "gelu",
    "attention_bias": True,
    "mlp_bias": True,
}
DISTFT_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_untied": ("llama", {"tie_embeddings": False, "num_kv_heads": 2, "norm_eps": 1e-3}),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 10}),
    "llama_padded": ("llama", {"pad_vocab_to": 8, "rope_theta": 57.0, "qkv_bias": False}),
    "qwen2": ("qwen2", {"qkv_bias": True, "num_heads": 3, "num_kv_heads": 1, "head_dim": 6}),
    "qwen3": ("qwen3", {"qk_norm": True, "num_kv_heads": 2, "head_dim": 10, "tie_embeddings": False}),
    "qwen3_biases": ("qwen3", {"qk_norm": True, "attention_bias": True, "qkv_bias": True}),
    "gpt2": ("gpt2", {**GPT2, "d_ff": 37}),
    "gpt2_untied": ("gpt2", {**GPT2, "tie_embeddings": False, "pad_vocab_to": 8, "dropout": 0.1}),
}


def model_config(**changes: Any) -> ModelConfig:
    sizes = {"vocab_size": VOCAB_SIZE, "max_seq_len": MAX_SEQ_LEN, "d_model": 24, "num_layers": 2}
    return ModelConfig.model_validate({**sizes, "num_heads": 4, "d_ff": 29, **changes})


def loaded(target: Path, auto_class: str = "AutoModelForCausalLM") -> Any:
    """Load the model with transformers, which must report no missing, unexpected or mismatched tensors."""
    import transformers

    model, problems = getattr(transformers, auto_class).from_pretrained(target, output_loading_info=True)
    assert not any(problems.values()), problems
    return model.eval()


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
    model = make_distft_model(model_config(**GPT2))
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


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2"])
def test_a_classifier_that_pools_the_last_token_computes_the_same_logits(tmp_path: Path, kind: str) -> None:
    model = make_distft_model(
        model_config(**DISTFT_MODELS[kind][1]), {"classifier": ClassificationHead(num_labels=3)}
    )
    source = save_model(model, tmp_path / "distft", label_names=["cat", "dog", "bird"])
    notes = write_huggingface(source, str(tmp_path / "exported"))
    exported = loaded(tmp_path / "exported", "AutoModelForSequenceClassification")
    assert exported.config.id2label == {0: "cat", 1: "dog", 2: "bird"}
    assert exported.config.label2id == {"cat": 0, "dog": 1, "bird": 2}
    assert any("There is no pad id" in note for note in notes)
    with torch.no_grad():
        for row in (random_ids()[:1], random_ids()[1:2, :5]):
            torch.testing.assert_close(exported(row).logits, model.logits(row), rtol=0, atol=1e-5)


def test_an_exported_classifier_finds_the_last_token_before_padding(tmp_path: Path) -> None:
    config = TokenizerTrainConfig(algorithm="char", unk_id=1, bos_id=None, eos_id=2, pad_id=0)
    tokenizer = train_tokenizer(["any text will do"], config, tmp_path / "tokenizer.model")
    model = make_distft_model(model_config(), {"classifier": ClassificationHead(num_labels=2)})
    source = save_model(model, tmp_path / "distft", label_names=["a", "b"], tokenizer=tokenizer)
    assert write_huggingface(source, str(tmp_path / "exported")) == []
    exported = loaded(tmp_path / "exported", "AutoModelForSequenceClassification")
    lengths = torch.tensor([MAX_SEQ_LEN, 4, 9])
    is_real = torch.arange(MAX_SEQ_LEN) < lengths[:, None]
    ids = torch.where(is_real, random_ids().clamp_min(1), 0)
    with torch.no_grad():
        expected = model.logits(ids, None, None, lengths)
        found = exported(ids, attention_mask=is_real.long()).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_classifier_without_pad_computes_padded_rows_as_ours(
    tmp_path: Path, kind: str, pooling: Literal["last", "mean"]
) -> None:
    """With `pooling: mean`, which transformers does not have, by the lines in classifier.md."""
    config = TokenizerTrainConfig(algorithm="char", unk_id=0, bos_id=None, eos_id=1, pad_id=None)
    tokenizer = train_tokenizer(["any text will do"], config, tmp_path / "tokenizer.model")
    changes = {**DISTFT_MODELS[kind][1], "vocab_size": tokenizer.vocab_size}
    model = make_distft_model(
        model_config(**changes), {"classifier": ClassificationHead(num_labels=2, pooling=pooling)}
    )
    source = save_model(
        model, tmp_path / "distft", label_names=["a", "b"], tokenizer=tokenizer, pooling=pooling
    )
    told: list[str] = []
    notes = write_huggingface(source, str(tmp_path / "exported"), on_note=told.append)
    assert told == notes
    assert any("pads with '</s>'" in note for note in notes)
    texts = ["any text", "do", "a wild tale"]
    rows = [tokenizer.encode(text) for text in texts]
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.tensor([row + [0] * (int(lengths.max()) - len(row)) for row in rows])
    with torch.no_grad():
        expected = model.logits(ids, None, None, lengths)
    torch.testing.assert_close(exported_logits(tmp_path / "exported", texts), expected, rtol=0, atol=1e-5)


def exported_logits(folder: Path, texts: list[str]) -> Tensor:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if (folder / "classifier.md").exists():
        code = (folder / "classifier.md").read_text().split("```python")[1].split("```")[0]
        code = code.replace('folder = "."', f"folder = {str(folder)!r}")
        code = code.replace('texts = ["a text", "another one"]', f"texts = {texts!r}")
        names: dict[str, Any] = {}
        exec(code, names)
        logits: Tensor = names["logits"]
        return logits
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    model = AutoModelForSequenceClassification.from_pretrained(str(folder)).eval()
    with torch.no_grad():
        found: Tensor = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    return found


@pytest.mark.parametrize(
    ("pooling", "label_names", "note"),
    [
        ("mean", ["a", "b"], "it pools 'mean'"),
        ("last", ["a"], "it has 2 classes, but the checkpoint has 1 names"),
        ("last", None, "it has 2 classes, but the checkpoint has no names"),
    ],
)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_unsupported_classifier_is_left_out_with_a_note(
    tmp_path: Path, pooling: str, label_names: list[str] | None, note: str, kind: str
) -> None:
    model = make_distft_model(
        model_config(**DISTFT_MODELS[kind][1]), {"classifier": ClassificationHead(num_labels=2)}
    )
    source = save_model(model, tmp_path / "distft", label_names=label_names, pooling=pooling)
    notes = write_huggingface(source, str(tmp_path / "exported"))
    assert sum(note in found for found in notes) == 1
    exported = loaded(tmp_path / "exported", "AutoModel")
    with torch.no_grad():
        hidden = exported(random_ids()).last_hidden_state
        expected = model.logits(random_ids())
    torch.testing.assert_close(hidden[:, -1] @ model.classifier.weight.T, expected, rtol=0, atol=1e-5)


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
        ({**GPT2, "mlp_bias": False}, None, ["gpt2", "model.mlp_bias=false would have to be true"]),
        ({"qk_norm": True, "qkv_bias": True}, None, ["model.q"]),
        ({"num_heads": 5, "head_dim": 6}, None, ["d_model=24 would have to be a multiple", "mistral"]),
        ({**GPT2, "num_kv_heads": 2}, "gpt2", ["model.num_kv_heads=2 would have to be 4"]),
        ({**GPT2, "head_dim": 5}, "gpt2", ["model.head_dim=5 would have to be d_model / num_heads = 6"]),
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
