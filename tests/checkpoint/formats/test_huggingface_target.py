"""Models of ours, written for transformers: transformers itself loads them."""

import json
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from huggingface_models import (
    MAX_SEQ_LEN,
    THEIRS,
    VOCAB_SIZE,
    make_ours,
    make_theirs,
    random_ids,
    save_ours,
    weights,
)
from safetensors.torch import load_file
from torch import Tensor

from distft.checkpoint.formats.huggingface_shape import choose_architecture
from distft.checkpoint.formats.huggingface_source import HuggingFaceCheckpoint
from distft.checkpoint.formats.huggingface_target import write_huggingface
from distft.checkpoint.sources import CheckpointSource
from distft.errors import CheckpointError, ConfigError
from distft.model.config import ModelConfig
from distft.model.head import ClassificationHead
from distft.tokenizer import TokenizerTrainConfig, train_tokenizer

TRANSFORMERS = "distft.checkpoint.formats.huggingface_target"
GPT2: dict[str, Any] = {
    "norm": "layernorm",
    "positions": "learned",
    "mlp": "gelu",
    "attention_bias": True,
    "mlp_bias": True,
}
OURS: dict[str, tuple[str, dict[str, Any]]] = {
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


def our_config(**changes: Any) -> ModelConfig:
    sizes = {"vocab_size": VOCAB_SIZE, "max_seq_len": MAX_SEQ_LEN, "d_model": 24, "num_layers": 2}
    return ModelConfig.model_validate({**sizes, "num_heads": 4, "d_ff": 29, **changes})


def loaded(target: Path, auto_class: str = "AutoModelForCausalLM") -> Any:
    """The model that transformers finds there; nothing may be missing, too much, or of another shape."""
    import transformers

    model, found = getattr(transformers, auto_class).from_pretrained(target, output_loading_info=True)
    assert not any(found.values()), found
    return model.eval()


class Broken:
    """Another source whose reads fail from the given one on."""

    def __init__(self, source: CheckpointSource, num_reads: int) -> None:
        self._source, self._num_reads = source, num_reads

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def read(self, *args: Any) -> Tensor:
        self._num_reads -= 1
        if self._num_reads < 0:
            raise OSError("the disk is gone")
        return self._source.read(*args)


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("max_shard_bytes", [1 << 30, 6000])
def test_transformers_computes_what_our_model_computes(
    tmp_path: Path, kind: str, max_shard_bytes: int
) -> None:
    architecture, options = OURS[kind]
    ours = make_ours(our_config(**options))
    source, target = save_ours(ours, tmp_path / "ours"), tmp_path / "theirs"
    done: list[int] = []
    write_huggingface(source, str(target), max_shard_bytes=max_shard_bytes, on_progress=done.append)
    theirs = loaded(target)
    assert theirs.config.model_type == architecture
    with torch.no_grad():
        torch.testing.assert_close(theirs(random_ids()).logits, ours(random_ids()), rtol=0, atol=1e-5)
    files = sorted(target.glob("*.safetensors"))
    assert sum(done) == sum(p.numel() * 4 for p in ours.parameters())
    assert (len(files) > 3) == (max_shard_bytes == 6000)
    largest = max(p.numel() * 4 for p in theirs.parameters())
    assert len(files) == 1 or all(
        sum(v.numel() * 4 for v in load_file(file).values()) <= max(max_shard_bytes, largest)
        for file in files
    )


@pytest.mark.parametrize("kind", OURS)
def test_what_comes_back_has_every_bit(tmp_path: Path, kind: str) -> None:
    ours = make_ours(our_config(**OURS[kind][1]))
    source = save_ours(ours, tmp_path / "ours")
    write_huggingface(source, str(tmp_path / "theirs"), max_shard_bytes=9000)
    back = HuggingFaceCheckpoint.open(str(tmp_path / "theirs"))
    assert back.faults() == []
    names = list(source.manifest.parameters)
    assert list(back.manifest.parameters) == names
    expected = weights(source, names)
    assert all(torch.equal(values, expected[name]) for name, values in weights(back, names).items())
    # What transformers cannot say: padding becomes vocabulary, a bias of q, k and v is told once.
    known = {"vocab_size": ours.config.padded_vocab_size, "pad_vocab_to": 1}
    if ours.config.attention_bias:
        known["qkv_bias"] = False
    expected_config = {**ours.config.model_dump(mode="json"), **known}
    assert back.manifest.config["model"] == expected_config


@pytest.mark.parametrize("kind", THEIRS)
def test_their_model_goes_through_us_unchanged(tmp_path: Path, kind: str) -> None:
    theirs = make_theirs(kind)
    theirs.save_pretrained(tmp_path / "before")
    source = HuggingFaceCheckpoint.open(str(tmp_path / "before"))
    write_huggingface(source, str(tmp_path / "after"), architecture=THEIRS[kind][0])
    before, after = (load_file(tmp_path / when / "model.safetensors") for when in ("before", "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = loaded(tmp_path / "after").config.to_dict()
    told = theirs.config.to_dict()
    silent = {
        "eos_token_id",
        "embd_pdrop",
        "attn_pdrop",
        "resid_pdrop",
        "sliding_window",
        "head_dim",
        "n_inner",
    }
    differing = (
        {k for k in told | again if told.get(k) != again.get(k)} - silent - {"_name_or_path", "torch_dtype"}
    )
    assert differing == set()


def test_small_pieces_make_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_ours(make_ours(our_config(**OURS["gpt2"][1])), tmp_path / "ours")
    write_huggingface(source, str(tmp_path / "large"))
    monkeypatch.setattr(f"{TRANSFORMERS}._CHUNK_NUMEL", 100)
    write_huggingface(source, str(tmp_path / "small"))
    large, small = (tmp_path / name / "model.safetensors" for name in ("large", "small"))
    assert large.read_bytes() == small.read_bytes()


def test_no_more_than_a_piece_is_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_ours(make_ours(our_config(**OURS["gpt2"][1])), tmp_path / "ours")
    monkeypatch.setattr(f"{TRANSFORMERS}._CHUNK_NUMEL", 100)
    sizes: list[int] = []
    read = source.read

    def watched(parameter: str, state: str, start: int, stop: int) -> Tensor:
        sizes.append(stop - start)
        return read(parameter, state, start, stop)

    monkeypatch.setattr(source, "read", watched)
    write_huggingface(source, str(tmp_path / "theirs"))
    assert max(sizes) == 100


def test_an_export_in_bf16_is_rounded_once(tmp_path: Path) -> None:
    ours = make_ours(our_config(**GPT2))
    source = save_ours(ours, tmp_path / "ours")
    write_huggingface(source, str(tmp_path / "theirs"), dtype=torch.bfloat16)
    theirs = loaded(tmp_path / "theirs")
    assert theirs.dtype == torch.bfloat16
    back = HuggingFaceCheckpoint.open(str(tmp_path / "theirs"))
    for name, values in weights(back, list(back.manifest.parameters)).items():
        assert torch.equal(values, dict(ours.named_parameters())[name].detach().to(torch.bfloat16))


def test_each_weight_keeps_its_dtype_unless_told_otherwise(tmp_path: Path) -> None:
    """What was frozen in bf16 has an odd number of elements here: what follows must still be aligned."""
    ours = make_ours(our_config(vocab_size=53, d_model=27, num_heads=1, head_dim=2))
    source = save_ours(ours, tmp_path / "ours", change=lambda v: v.bfloat16() if v.numel() == 53 * 27 else v)
    write_huggingface(source, str(tmp_path / "theirs"))
    tensors = load_file(tmp_path / "theirs" / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert tensors["model.norm.weight"].dtype == torch.float32
    assert loaded(tmp_path / "theirs").dtype == torch.float32
    data = (tmp_path / "theirs" / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    for name, entry in json.loads(data[8 : 8 + length]).items():
        assert name == "__metadata__" or entry["data_offsets"][0] % (4 if entry["dtype"] == "F32" else 2) == 0


def test_values_that_fp16_cannot_hold_are_refused(tmp_path: Path) -> None:
    source = save_ours(make_ours(our_config()), tmp_path / "ours", change=lambda values: values * 1e6)
    with pytest.raises(ConfigError, match=r"beyond 65504.*bfloat16"):
        write_huggingface(source, str(tmp_path / "theirs"), dtype=torch.float16)
    assert not (tmp_path / "theirs" / "config.json").exists()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2"])
def test_a_classifier_that_pools_the_last_token_is_theirs(tmp_path: Path, kind: str) -> None:
    ours = make_ours(our_config(**OURS[kind][1]), ClassificationHead(num_labels=3))
    source = save_ours(ours, tmp_path / "ours", label_names=["cat", "dog", "bird"])
    notes = write_huggingface(source, str(tmp_path / "theirs"))
    theirs = loaded(tmp_path / "theirs", "AutoModelForSequenceClassification")
    assert theirs.config.id2label == {0: "cat", 1: "dog", 2: "bird"}
    assert theirs.config.label2id == {"cat": 0, "dog": 1, "bird": 2}
    assert any("no pad id" in note for note in notes)
    with torch.no_grad():
        for row in (random_ids()[:1], random_ids()[1:2, :5]):
            torch.testing.assert_close(theirs(row).logits, ours(row), rtol=0, atol=1e-5)


def test_a_classifier_finds_the_last_token_before_padding(tmp_path: Path) -> None:
    config = TokenizerTrainConfig(algorithm="char", unk_id=1, bos_id=None, eos_id=2, pad_id=0)
    tokenizer = train_tokenizer(["any text will do"], config, tmp_path / "tokenizer.model")
    ours = make_ours(our_config(), ClassificationHead(num_labels=2))
    source = save_ours(ours, tmp_path / "ours", label_names=["a", "b"], tokenizer=tokenizer)
    assert write_huggingface(source, str(tmp_path / "theirs")) == []
    theirs = loaded(tmp_path / "theirs", "AutoModelForSequenceClassification")
    lengths = torch.tensor([MAX_SEQ_LEN, 4, 9])
    is_real = torch.arange(MAX_SEQ_LEN) < lengths[:, None]
    ids = torch.where(is_real, random_ids().clamp_min(1), 0)
    with torch.no_grad():
        expected = ours(ids, None, None, lengths)
        found = theirs(ids, attention_mask=is_real.long()).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("pooling", "label_names", "note"),
    [
        ("mean", ["a", "b"], "it pools 'mean'"),
        ("last", ["a"], "it has 2 classes, and 1 names are known"),
        ("last", None, "it has 2 classes, and no names are known"),
    ],
)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_another_classifier_is_left_out_with_a_note(
    tmp_path: Path, pooling: str, label_names: list[str] | None, note: str, kind: str
) -> None:
    ours = make_ours(our_config(**OURS[kind][1]), ClassificationHead(num_labels=2))
    source = save_ours(ours, tmp_path / "ours", label_names=label_names, pooling=pooling)
    notes = write_huggingface(source, str(tmp_path / "theirs"))
    assert sum(note in found for found in notes) == 1
    theirs = loaded(tmp_path / "theirs", "AutoModel")
    with torch.no_grad():
        hidden = theirs(random_ids()).last_hidden_state
        expected = ours(random_ids())
    torch.testing.assert_close(hidden[:, -1] @ ours.classifier.weight.T, expected, rtol=0, atol=1e-5)


def test_config_comes_last_and_an_interrupted_export_is_replaced(tmp_path: Path) -> None:
    source, target = save_ours(make_ours(our_config()), tmp_path / "ours"), tmp_path / "theirs"
    for num_reads in (0, 3, 7):
        with pytest.raises(OSError, match="the disk is gone"):
            write_huggingface(Broken(source, num_reads), str(target), max_shard_bytes=5000)
        assert not (target / "config.json").exists()
    assert list(target.glob("*.safetensors"))
    write_huggingface(source, str(target))
    assert [p.name for p in target.glob("*.safetensors*")] == ["model.safetensors"]
    loaded(target)


@pytest.mark.parametrize("name", ["config.json", "notes.txt", "model_of_mine"])
def test_a_directory_in_use_is_left_alone(tmp_path: Path, name: str) -> None:
    source = save_ours(make_ours(our_config()), tmp_path / "ours")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / name).write_text("mine")
    (tmp_path / "theirs" / "model.safetensors").write_text("mine, too")
    with pytest.raises(ConfigError, match=rf"theirs is not empty \({name}\)"):
        write_huggingface(source, str(tmp_path / "theirs"))
    assert (tmp_path / "theirs" / "model.safetensors").read_text() == "mine, too"


def test_a_source_that_lacks_parameters_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = save_ours(make_ours(our_config()), tmp_path / "ours")
    source.manifest.config["model"].update(d_ff=30)
    del source.manifest.parameters["norm.weight"]
    with pytest.raises(CheckpointError) as refusal:
        write_huggingface(source, str(tmp_path / "theirs"))
    assert "norm.weight [24] has no weight" in str(refusal.value)
    assert "blocks.1.mlp.gate.weight is [29, 24] in it, and [30, 24]" in str(refusal.value)
    assert not (tmp_path / "theirs").exists()
    source.manifest.config.clear()
    with pytest.raises(ConfigError, match="does not say what its model is like"):
        write_huggingface(source, str(tmp_path / "theirs"))


def test_a_model_without_a_head_stays_one(tmp_path: Path) -> None:
    make_theirs("llama", "AutoModel").save_pretrained(tmp_path / "before")
    source = HuggingFaceCheckpoint.open(str(tmp_path / "before"))
    notes = write_huggingface(source, str(tmp_path / "after"))
    assert any("has no head" in note for note in notes)
    before, after = (load_file(tmp_path / when / "model.safetensors") for when in ("before", "after"))
    assert before.keys() == after.keys()
    loaded(tmp_path / "after", "AutoModel")


def test_a_url_is_written_as_a_path_is(tmp_path: Path) -> None:
    source = save_ours(make_ours(our_config()), tmp_path / "ours")
    write_huggingface(source, "memory://exports/ours", max_shard_bytes=9000)
    fsspec.filesystem("memory").get("/exports/ours", str(tmp_path / "theirs"), recursive=True)
    loaded(tmp_path / "theirs")


@pytest.mark.parametrize(
    ("options", "wanted", "faults"),
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
        ({}, "qwen2", ["it is no qwen2, as\n", "model.qkv_bias=false would have to be true"]),
        ({}, "falcon", ["architecture='falcon' is not one of llama, mistral"]),
    ],
    ids=str,
)
def test_what_transformers_does_not_have_is_refused_option_by_option(
    options: dict[str, Any], wanted: str | None, faults: list[str]
) -> None:
    with pytest.raises(ConfigError) as refusal:
        choose_architecture(our_config(**options), wanted)
    assert all(fault in str(refusal.value) for fault in faults)


def test_mistral_is_written_on_request(tmp_path: Path) -> None:
    ours = make_ours(our_config(num_heads=5, head_dim=6, num_kv_heads=1))
    source = save_ours(ours, tmp_path / "ours")
    write_huggingface(source, str(tmp_path / "theirs"), architecture="mistral")
    theirs = loaded(tmp_path / "theirs")
    assert theirs.config.model_type == "mistral"
    with torch.no_grad():
        torch.testing.assert_close(theirs(random_ids()).logits, ours(random_ids()), rtol=0, atol=1e-5)


def test_dropout_that_transformers_does_not_have_is_noted(tmp_path: Path) -> None:
    for kind, is_noted in (("llama", True), ("gpt2", False)):
        ours = make_ours(our_config(**OURS[kind][1], dropout=0.25))
        source = save_ours(ours, tmp_path / kind)
        notes = write_huggingface(source, str(tmp_path / f"{kind}_out"))
        assert any("dropout=0.25 is left out" in note for note in notes) == is_noted
    assert json.loads((tmp_path / "gpt2_out" / "config.json").read_text())["embd_pdrop"] == 0.25
