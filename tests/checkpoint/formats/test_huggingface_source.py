"""Models that transformers saved, read by distft; transformers computes the expected values."""

import json
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.huggingface_models import (
    GPT2,
    HF_MODELS,
    LLAMA,
    MAX_SEQ_LEN,
    VOCAB_SIZE,
    load_from_hf,
    make_hf_model,
    random_ids,
    weights,
)

from distft.checkpoint.formats.huggingface_config import parse_config
from distft.checkpoint.formats.huggingface_source import HuggingFaceCheckpoint
from distft.checkpoint.fragments import WEIGHT
from distft.errors import CheckpointError, ConfigError
from distft.tokenizer import TokenizerTrainConfig, train_tokenizer

MODEL, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one saved model of each kind; tests copy a model before they change it."""
    root = tmp_path_factory.mktemp("transformers")
    for kind in HF_MODELS:
        make_hf_model(kind).save_pretrained(root / kind)
    for kind in ("llama", "gpt2"):
        make_hf_model(kind).save_pretrained(root / f"{kind}_sharded", max_shard_size="6KB")
    return root


def copied(saved: Path, kind: str, target: Path) -> Path:
    shutil.copytree(saved / kind, target)
    return target


def change_config(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**raw, **changes}))


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors; `__` stands for a dot."""
    tensors: dict[str, Any] = load_file(folder / MODEL)
    tensors.update({name.replace("__", "."): values for name, values in changes.items()})
    save_file({n: v for n, v in tensors.items() if v is not None}, folder / MODEL, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", HF_MODELS)
def test_the_model_read_computes_the_same_logits(saved: Path, kind: str) -> None:
    source, model = load_from_hf(saved / kind)
    assert source.find_damage() == []
    assert source.manifest.written_by["architecture"] == HF_MODELS[kind][0]
    with torch.no_grad():
        expected = make_hf_model(kind)(random_ids()).logits
        torch.testing.assert_close(model.logits(random_ids()), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_sharded_files_give_the_same_weights_as_one_file(saved: Path, kind: str) -> None:
    whole, sharded = (HuggingFaceCheckpoint.open(str(saved / name)) for name in (kind, f"{kind}_sharded"))
    assert len(list((saved / f"{kind}_sharded").glob("*.safetensors"))) > 2
    assert sharded.find_damage() == []
    assert sharded.manifest.parameters == whole.manifest.parameters
    names = list(whole.manifest.parameters)
    assert all(
        torch.equal(a, b)
        for a, b in zip(weights(whole, names).values(), weights(sharded, names).values(), strict=True)
    )


@given(data=st.data())
def test_any_interval_equals_that_of_the_whole_parameter(saved: Path, data: st.DataObject) -> None:
    source = HuggingFaceCheckpoint.open(str(saved / data.draw(st.sampled_from(["gpt2", "qwen3"]))))
    name = data.draw(st.sampled_from(list(source.manifest.parameters)))
    whole = weights(source, [name])[name].reshape(-1)
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, whole.numel())] * 2)))
    assert torch.equal(source.read(name, WEIGHT, start, stop), whole[start:stop])


def test_the_chunk_size_does_not_change_a_transposed_tensor(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = HuggingFaceCheckpoint.open(str(saved / "gpt2"))
    names = list(source.manifest.parameters)
    expected = weights(source, names)
    monkeypatch.setattr("distft.checkpoint.formats.huggingface_source._CHUNK_BYTES", 1000)
    assert all(torch.equal(values, expected[name]) for name, values in weights(source, names).items())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("pad_token_id", [None, 0])
def test_a_classifier_read_computes_the_same_logits(
    tmp_path: Path, kind: str, pad_token_id: int | None
) -> None:
    names = {0: "cat", 1: "dog", 2: "bird"}
    hf_model = make_hf_model(
        kind, "AutoModelForSequenceClassification", id2label=names, pad_token_id=pad_token_id
    )
    hf_model.save_pretrained(tmp_path)
    source, model = load_from_hf(tmp_path)
    assert source.find_damage() == []
    assert source.manifest.label_names == ["cat", "dog", "bird"]
    ids = random_ids().clamp_min(1)
    with torch.no_grad():
        for row in (ids[:1], ids[1:2, :7]):
            torch.testing.assert_close(model.logits(row), hf_model(row).logits, rtol=0, atol=1e-5)


def test_two_unnamed_labels_get_transformers_default_names(tmp_path: Path) -> None:
    make_hf_model("llama", "AutoModelForSequenceClassification").save_pretrained(tmp_path)
    source, _ = load_from_hf(tmp_path)
    assert "id2label" not in json.loads((tmp_path / CONFIG).read_text())
    assert source.manifest.label_names == ["LABEL_0", "LABEL_1"]
    assert source.shape("classifier.weight") == (2, LLAMA["hidden_size"])


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "gpt2", "gpt2_untied"])
def test_a_model_saved_without_its_head_has_all_other_parameters(
    saved: Path, tmp_path: Path, kind: str
) -> None:
    make_hf_model(kind, "AutoModel").save_pretrained(tmp_path)
    source = HuggingFaceCheckpoint.open(str(tmp_path))
    assert source.find_damage() == []
    whole = HuggingFaceCheckpoint.open(str(saved / kind)).manifest.parameters
    assert set(whole) - set(source.manifest.parameters) <= {"lm_head.weight"}
    assert all(source.has(name, WEIGHT) for name in source.manifest.parameters)


def test_openais_gpt2_files_without_prefix_are_read(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, "gpt2", tmp_path / "model")
    tensors = {n.removeprefix("transformer."): v for n, v in load_file(folder / MODEL).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, MAX_SEQ_LEN, MAX_SEQ_LEN)
    save_file(tensors, folder / MODEL)
    source, model = load_from_hf(folder)
    assert source.find_damage() == []
    with torch.no_grad():
        torch.testing.assert_close(
            model.logits(random_ids()), make_hf_model("gpt2")(random_ids()).logits, rtol=0, atol=1e-5
        )


def test_weights_are_read_in_their_stored_dtype(tmp_path: Path) -> None:
    make_hf_model("gpt2").to(torch.bfloat16).save_pretrained(tmp_path)
    source = HuggingFaceCheckpoint.open(str(tmp_path))
    assert {r.states[WEIGHT].dtype for r in source.manifest.parameters.values()} == {"bfloat16"}
    assert source.read("blocks.0.attn.k.weight", WEIGHT, 3, 60).dtype == torch.bfloat16


def test_the_manifest_has_the_name_ties_and_tokenizer_of_the_model(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, "llama_tied", tmp_path / "my_model")
    tokenizer = train_tokenizer(
        ["some text to learn from"], TokenizerTrainConfig(algorithm="char"), folder / "tokenizer.model"
    )
    manifest = HuggingFaceCheckpoint.open(str(folder)).manifest
    assert manifest.run_id == "my_model"
    assert manifest.tied == {"lm_head.weight": "embed.weight"}
    assert manifest.tokenizer is not None
    assert manifest.tokenizer.fingerprint == tokenizer.fingerprint
    assert manifest.files == []
    (folder / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # tiktoken's files also have this name
    assert HuggingFaceCheckpoint.open(str(folder)).manifest.tokenizer is None


def test_a_url_is_read_like_a_path(saved: Path) -> None:
    files = fsspec.filesystem("memory")
    for file in (saved / "gpt2_sharded").iterdir():
        files.pipe_file(f"/transformers/gpt2/{file.name}", file.read_bytes())
    here, there = (HuggingFaceCheckpoint.open(str(p)) for p in (saved / "gpt2", "memory://transformers/gpt2"))
    assert there.find_damage() == []
    name = "blocks.1.attn.v.weight"
    assert torch.equal(weights(here, [name])[name], weights(there, [name])[name])


def test_all_problems_of_tensors_are_reported_at_once(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, "llama", tmp_path / "model")
    change_tensors(
        folder,
        model__layers__1__mlp__up_proj__weight=None,
        model__norm__weight=torch.ones(7),
        model__layers__0__self_attn__o_proj__weight=torch.ones(24, 24, dtype=torch.int8),
        model__layers__2__mlp__up_proj__weight=torch.ones(3),
    )
    source = HuggingFaceCheckpoint.open(str(folder))
    problems = source.find_damage()
    assert len(problems) == 4
    assert "has no tensor model.layers.1.mlp.up_proj.weight [29, 24]" in "".join(problems[:3])
    for text in (
        "model.norm.weight has shape [7], but config.json requires [24]",
        "o_proj.weight has dtype I8",
        "model.layers.2.mlp.up_proj.weight [3] is not part",
    ):
        assert sum(text in problem for problem in problems) == 1
    assert not source.has("norm.weight", WEIGHT)
    with pytest.raises(CheckpointError, match=r"norm\.weight"):
        source.read("norm.weight", WEIGHT, 0, 1)


def test_each_missing_or_damaged_shard_is_reported_once(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, "llama_sharded", tmp_path / "model")
    shards = sorted(folder.glob("*.safetensors"))
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-5])
    shards[2].write_bytes(b"no such file")
    with pytest.raises(CheckpointError) as failure:
        HuggingFaceCheckpoint.open(str(folder))
    problems = str(failure.value).splitlines()
    assert len(problems) == 3
    assert f"{shards[0]} is missing" in problems[0]
    assert f"{shards[1]} is cut short" in problems[1]
    assert f"{shards[2]} is not a safetensors file" in problems[2]


@pytest.mark.parametrize("keep", [0, 5, 300, -1, None])  # bytes; None: only the header
def test_a_single_file_that_is_cut_short_is_reported(saved: Path, tmp_path: Path, keep: int | None) -> None:
    folder = copied(saved, "gpt2", tmp_path / "model")
    data = (folder / MODEL).read_bytes()
    if keep is None:
        keep = 8 + int.from_bytes(data[:8], "little")
    (folder / MODEL).write_bytes(data[:keep])
    source = HuggingFaceCheckpoint.open(str(folder))
    problems = source.find_damage()
    assert len(problems) == 1
    assert str(folder / MODEL) in problems[0]
    num_unreadable = sum(not source.has(name, WEIGHT) for name in source.manifest.parameters)
    assert num_unreadable == (1 if keep == -1 else len(source.manifest.parameters))


def test_a_stored_copy_of_a_tied_head_must_equal_the_embedding(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, "llama_tied", tmp_path / "model")
    embedding = load_file(folder / MODEL)["model.embed_tokens.weight"]
    change_tensors(folder, lm_head__weight=embedding.clone())
    assert HuggingFaceCheckpoint.open(str(folder)).find_damage() == []
    embedding[3, 3] += 1
    change_tensors(folder, lm_head__weight=embedding)
    (problem,) = HuggingFaceCheckpoint.open(str(folder)).find_damage()
    assert "lm_head.weight differs from model.embed_tokens.weight" in problem
    change_tensors(folder, model__embed_tokens__weight=None)  # the copy is then read as the embedding
    source = HuggingFaceCheckpoint.open(str(folder))
    assert source.find_damage() == []
    assert torch.equal(weights(source, ["embed.weight"])["embed.weight"], embedding)


@pytest.mark.parametrize(
    ("missing", "error"),
    [
        ([CONFIG], "config.json is missing"),
        ([MODEL], "has neither model.safetensors nor model.safetensors.index.json"),
    ],
)
def test_a_directory_without_config_or_weights_is_rejected(
    saved: Path, tmp_path: Path, missing: list[str], error: str
) -> None:
    folder = copied(saved, "llama", tmp_path / "model")
    for name in missing:
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match=error):
        HuggingFaceCheckpoint.open(str(folder))


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_config_or_index_that_is_not_a_json_object_is_reported(
    saved: Path, tmp_path: Path, content: str
) -> None:
    folder = copied(saved, "llama_sharded", tmp_path / "model")
    for name in (INDEX, CONFIG):
        (folder / name).write_text(content)
        with pytest.raises(CheckpointError, match=f"{name} is"):
            HuggingFaceCheckpoint.open(str(folder))


UNSUPPORTED: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rope_scaling": {"type": "longrope", "factor": 2.0}}),
    ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}),
    ("llama", {"partial_rotary_factor": 0.5}),
    ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": "1"}}),
    ("llama", {"rope_parameters": {"rope_theta": "1e4"}}),
    ("llama", {"rope_theta": None}),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}),
    ("llama", {"layer_types": ["full_attention"] * 3}),
    ("llama", {"num_hidden_layers": "2"}),
    ("llama", {"pad_token_id": VOCAB_SIZE}),
    ("llama", {"rms_norm_eps": -1.0}),
    ("llama", {"num_attention_heads": 5}),
    ("gpt2", {"hidden_size": 25}),
    ("gpt2", {"num_hidden_layers": 3}),
    ("llama", {"hidden_act": "gelu"}),
    ("llama", {"attention_dropout": 0.1}),
    ("llama", {"quantization_config": {"quant_method": "gptq"}}),
    ("llama", {"auto_map": {"AutoModel": "modeling.Mine"}}),
    ("llama", {"architectures": ["LlamaForTokenClassification"]}),
    ("llama", {"architectures": ["LlamaForSequenceClassification"], "problem_type": "regression"}),
    ("llama", {"model_type": "falcon"}),
    ("gpt2", {"activation_function": "gelu"}),
    ("gpt2", {"scale_attn_weights": False}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ("gpt2", {"add_cross_attention": True}),
    ("gpt2", {"resid_pdrop": 0.3}),
]


@pytest.mark.parametrize(("model_type", "changes"), UNSUPPORTED, ids=str)
def test_an_unsupported_feature_is_reported_by_name(model_type: str, changes: dict[str, Any]) -> None:
    sizes = GPT2 if model_type == "gpt2" else {**LLAMA, "sliding_window": None}
    parse_config({"model_type": model_type, **sizes})
    with pytest.raises(ConfigError) as failure:
        parse_config({"model_type": model_type, **sizes, **changes})
    assert any(name in str(failure.value) for name in changes)
    assert len(str(failure.value).splitlines()) == 1


def test_other_names_of_keys_are_read_as_transformers_reads_them() -> None:
    gpt2 = {"hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 3, "max_position_embeddings": 9}
    model = parse_config({"model_type": "gpt2", **gpt2}).model.model_dump()
    assert [model[name] for name in ("d_model", "num_heads", "num_layers", "max_seq_len")] == [24, 4, 3, 9]
    mixtral = parse_config({"model_type": "mixtral", "num_experts": 4}).model.model_dump()
    assert mixtral["experts"]["num_experts"] == 4


def test_a_config_of_many_layers_with_tensors_of_few_is_refused_before_they_are_built(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(saved, "llama", tmp_path / "model")
    change_config(folder, num_hidden_layers=2000)
    monkeypatch.delattr("distft.checkpoint.formats.huggingface_source.map_saved_tensors")
    with pytest.raises(CheckpointError, match="describes 2,000 layers, but there are tensors of 2"):
        HuggingFaceCheckpoint.open(str(folder))
    (folder / "model.safetensors").write_bytes(bytes(64))  # a file that cannot be read says nothing of them
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a safetensors file"):
        HuggingFaceCheckpoint.open(str(folder))


def test_all_unsupported_features_are_reported_at_once(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, "llama", tmp_path / "model")
    change_config(
        folder, rope_scaling={"type": "longrope", "factor": 2.0}, hidden_act="relu", auto_map={"a": 1}
    )
    with pytest.raises(ConfigError) as failure:
        HuggingFaceCheckpoint.open(str(folder))
    for text in (str(folder / CONFIG), "rope_scaling", "hidden_act='relu'", "auto_map"):
        assert text in str(failure.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 4, "use_sliding_window": False},
        {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 2},
        {"sliding_window": MAX_SEQ_LEN, "use_sliding_window": True, "max_window_layers": 0},
    ],
)
def test_a_sliding_window_without_effect_is_accepted(changes: dict[str, Any]) -> None:
    assert parse_config({"model_type": "qwen2", **LLAMA, **changes}).model.max_seq_len == MAX_SEQ_LEN


@pytest.mark.parametrize("kind", HF_MODELS)
@pytest.mark.parametrize("is_old", [False, True])
def test_missing_keys_have_transformers_defaults(saved: Path, kind: str, is_old: bool) -> None:
    raw = json.loads((saved / kind / CONFIG).read_text())
    expected = parse_config(raw)
    if is_old:
        raw["torch_dtype"] = raw.pop("dtype")
        rope = raw.pop("rope_parameters", {})
        raw |= {"rope_theta": rope["rope_theta"], "rope_scaling": None} if rope else {}
    import transformers

    defaults = transformers.AutoConfig.for_model(raw["model_type"]).to_dict()
    short = {k: v for k, v in raw.items() if k in {"model_type", "architectures"} or defaults.get(k, ()) != v}
    assert len(short) < len(raw)
    assert parse_config(short) == expected


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "gpt2"])
def test_an_empty_config_has_transformers_defaults(model_type: str) -> None:
    import transformers

    full = transformers.AutoConfig.for_model(model_type).to_dict()
    assert parse_config({"model_type": model_type}) == parse_config(full)
