"""Models of transformers, read by us: transformers itself says what they compute."""

import json
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from huggingface_models import GPT2, LLAMA, MAX_SEQ_LEN, THEIRS, from_theirs, make_theirs, random_ids, weights
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from distft.checkpoint.formats.huggingface_config import read_shape
from distft.checkpoint.formats.huggingface_source import HuggingFaceCheckpoint
from distft.checkpoint.fragments import WEIGHT
from distft.errors import CheckpointError, ConfigError
from distft.tokenizer import TokenizerTrainConfig, train_tokenizer

MODEL, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory of each kind, under its name; tests copy what they change."""
    root = tmp_path_factory.mktemp("theirs")
    for kind in THEIRS:
        make_theirs(kind).save_pretrained(root / kind)
    for kind in ("llama", "gpt2"):
        make_theirs(kind).save_pretrained(root / f"{kind}_sharded", max_shard_size="6KB")
    return root


def copied(saved: Path, kind: str, target: Path) -> Path:
    shutil.copytree(saved / kind, target)
    return target


def change_config(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**raw, **changes}))


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Put or (None) take away tensors; `__` stands for a dot."""
    tensors: dict[str, Any] = load_file(folder / MODEL)
    tensors.update({name.replace("__", "."): values for name, values in changes.items()})
    save_file({n: v for n, v in tensors.items() if v is not None}, folder / MODEL, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", THEIRS)
def test_our_model_computes_what_theirs_computes(saved: Path, kind: str) -> None:
    source, ours = from_theirs(saved / kind)
    assert source.faults() == []
    assert source.manifest.written_by["architecture"] == THEIRS[kind][0]
    with torch.no_grad():
        expected = make_theirs(kind)(random_ids()).logits
        torch.testing.assert_close(ours(random_ids()), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_shards_hold_what_one_file_holds(saved: Path, kind: str) -> None:
    whole, sharded = (HuggingFaceCheckpoint.open(str(saved / name)) for name in (kind, f"{kind}_sharded"))
    assert len(list((saved / f"{kind}_sharded").glob("*.safetensors"))) > 2
    assert sharded.faults() == []
    assert sharded.manifest.parameters == whole.manifest.parameters
    names = list(whole.manifest.parameters)
    assert all(
        torch.equal(a, b)
        for a, b in zip(weights(whole, names).values(), weights(sharded, names).values(), strict=True)
    )


@given(data=st.data())
def test_any_interval_is_that_of_the_whole(saved: Path, data: st.DataObject) -> None:
    source = HuggingFaceCheckpoint.open(str(saved / data.draw(st.sampled_from(["gpt2", "qwen3"]))))
    name = data.draw(st.sampled_from(list(source.manifest.parameters)))
    whole = weights(source, [name])[name].reshape(-1)
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, whole.numel())] * 2)))
    assert torch.equal(source.read(name, WEIGHT, start, stop), whole[start:stop])


def test_small_slabs_transpose_as_large_ones(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = HuggingFaceCheckpoint.open(str(saved / "gpt2"))
    names = list(source.manifest.parameters)
    expected = weights(source, names)
    monkeypatch.setattr("distft.checkpoint.formats.huggingface_source._SLAB_BYTES", 1000)
    assert all(torch.equal(values, expected[name]) for name, values in weights(source, names).items())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("pad_token_id", [None, 0])
def test_their_classifier_is_ours(tmp_path: Path, kind: str, pad_token_id: int | None) -> None:
    names = {0: "cat", 1: "dog", 2: "bird"}
    theirs = make_theirs(
        kind, "AutoModelForSequenceClassification", id2label=names, pad_token_id=pad_token_id
    )
    theirs.save_pretrained(tmp_path)
    source, ours = from_theirs(tmp_path)
    assert source.faults() == []
    assert source.manifest.label_names == ["cat", "dog", "bird"]
    ids = random_ids().clamp_min(1)
    with torch.no_grad():
        for row in (ids[:1], ids[1:2, :7]):
            torch.testing.assert_close(ours(row), theirs(row).logits, rtol=0, atol=1e-5)


def test_two_labels_that_nobody_named_have_the_names_of_transformers(tmp_path: Path) -> None:
    make_theirs("llama", "AutoModelForSequenceClassification").save_pretrained(tmp_path)
    source, _ = from_theirs(tmp_path)
    assert "id2label" not in json.loads((tmp_path / CONFIG).read_text())
    assert source.manifest.label_names == ["LABEL_0", "LABEL_1"]
    assert source.shape("classifier.weight") == (2, LLAMA["hidden_size"])


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "gpt2", "gpt2_untied"])
def test_a_model_without_its_head_lacks_nothing_else(saved: Path, tmp_path: Path, kind: str) -> None:
    make_theirs(kind, "AutoModel").save_pretrained(tmp_path)
    source = HuggingFaceCheckpoint.open(str(tmp_path))
    assert source.faults() == []
    whole = HuggingFaceCheckpoint.open(str(saved / kind)).manifest.parameters
    assert set(whole) - set(source.manifest.parameters) <= {"lm_head.weight"}
    assert all(source.has(name, WEIGHT) for name in source.manifest.parameters)


def test_gpt2_as_openai_gave_it_out_is_read(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, "gpt2", tmp_path / "model")
    tensors = {n.removeprefix("transformer."): v for n, v in load_file(folder / MODEL).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, MAX_SEQ_LEN, MAX_SEQ_LEN)
    save_file(tensors, folder / MODEL)
    source, ours = from_theirs(folder)
    assert source.faults() == []
    with torch.no_grad():
        torch.testing.assert_close(
            ours(random_ids()), make_theirs("gpt2")(random_ids()).logits, rtol=0, atol=1e-5
        )


def test_weights_come_in_the_dtype_that_they_are_kept_in(tmp_path: Path) -> None:
    make_theirs("gpt2").to(torch.bfloat16).save_pretrained(tmp_path)
    source = HuggingFaceCheckpoint.open(str(tmp_path))
    assert {r.states[WEIGHT].dtype for r in source.manifest.parameters.values()} == {"bfloat16"}
    assert source.read("blocks.0.attn.k.weight", WEIGHT, 3, 60).dtype == torch.bfloat16


def test_a_manifest_says_what_is_known(saved: Path, tmp_path: Path) -> None:
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
    (folder / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # tiktoken's own files have this name, too
    assert HuggingFaceCheckpoint.open(str(folder)).manifest.tokenizer is None


def test_a_url_is_read_as_a_path_is(saved: Path) -> None:
    files = fsspec.filesystem("memory")
    for file in (saved / "gpt2_sharded").iterdir():
        files.pipe_file(f"/theirs/gpt2/{file.name}", file.read_bytes())
    here, there = (HuggingFaceCheckpoint.open(str(p)) for p in (saved / "gpt2", "memory://theirs/gpt2"))
    assert there.faults() == []
    name = "blocks.1.attn.v.weight"
    assert torch.equal(weights(here, [name])[name], weights(there, [name])[name])


def test_all_faults_of_tensors_are_told_at_once(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, "llama", tmp_path / "model")
    change_tensors(
        folder,
        model__layers__1__mlp__up_proj__weight=None,
        model__norm__weight=torch.ones(7),
        model__layers__0__self_attn__o_proj__weight=torch.ones(24, 24, dtype=torch.int8),
        model__layers__2__mlp__up_proj__weight=torch.ones(3),
    )
    source = HuggingFaceCheckpoint.open(str(folder))
    faults = source.faults()
    assert len(faults) == 4
    assert "has no tensor model.layers.1.mlp.up_proj.weight [29, 24]" in faults[0] + faults[1] + faults[2]
    for part in (
        "model.norm.weight is [7], and [24]",
        "o_proj.weight is of dtype I8",
        "model.layers.2.mlp.up_proj.weight [3] is no part",
    ):
        assert sum(part in fault for fault in faults) == 1
    assert not source.has("norm.weight", WEIGHT)
    with pytest.raises(CheckpointError, match=r"norm\.weight"):
        source.read("norm.weight", WEIGHT, 0, 1)


def test_lost_and_shortened_shards_are_named_once(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, "llama_sharded", tmp_path / "model")
    shards = sorted(folder.glob("*.safetensors"))
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes()[:-5])
    shards[2].write_bytes(b"no such file")
    faults = HuggingFaceCheckpoint.open(str(folder)).faults()
    assert len(faults) == 3
    assert f"{shards[0]} is missing" in faults[0]
    assert f"{shards[1]} is cut short" in faults[1]
    assert f"{shards[2]} is not a safetensors file" in faults[2]


@pytest.mark.parametrize("keep", [0, 5, 300, -1, None])  # bytes; None: the header and no more
def test_a_single_file_that_is_cut_short_is_named(saved: Path, tmp_path: Path, keep: int | None) -> None:
    folder = copied(saved, "gpt2", tmp_path / "model")
    data = (folder / MODEL).read_bytes()
    if keep is None:
        keep = 8 + int.from_bytes(data[:8], "little")
    (folder / MODEL).write_bytes(data[:keep])
    source = HuggingFaceCheckpoint.open(str(folder))
    faults = source.faults()
    assert len(faults) == 1
    assert str(folder / MODEL) in faults[0]
    num_lost = sum(not source.has(name, WEIGHT) for name in source.manifest.parameters)
    assert num_lost == (1 if keep == -1 else len(source.manifest.parameters))


def test_a_stored_copy_of_a_tied_head_must_be_one(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, "llama_tied", tmp_path / "model")
    embedding = load_file(folder / MODEL)["model.embed_tokens.weight"]
    change_tensors(folder, lm_head__weight=embedding.clone())
    assert HuggingFaceCheckpoint.open(str(folder)).faults() == []
    embedding[3, 3] += 1
    change_tensors(folder, lm_head__weight=embedding)
    (fault,) = HuggingFaceCheckpoint.open(str(folder)).faults()
    assert "lm_head.weight differs from model.embed_tokens.weight" in fault
    change_tensors(folder, model__embed_tokens__weight=None)  # the one copy serves for both
    source = HuggingFaceCheckpoint.open(str(folder))
    assert source.faults() == []
    assert torch.equal(weights(source, ["embed.weight"])["embed.weight"], embedding)


@pytest.mark.parametrize(
    ("lacking", "error"),
    [
        ([CONFIG], "config.json is missing"),
        ([MODEL], "has neither model.safetensors nor model.safetensors.index.json"),
    ],
)
def test_what_is_no_model_is_refused(saved: Path, tmp_path: Path, lacking: list[str], error: str) -> None:
    folder = copied(saved, "llama", tmp_path / "model")
    for name in lacking:
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match=error):
        HuggingFaceCheckpoint.open(str(folder))


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_config_or_index_that_is_no_json_object_is_named(saved: Path, tmp_path: Path, content: str) -> None:
    folder = copied(saved, "llama_sharded", tmp_path / "model")
    for name in (INDEX, CONFIG):
        (folder / name).write_text(content)
        with pytest.raises(CheckpointError, match=f"{name} is"):
            HuggingFaceCheckpoint.open(str(folder))


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}),
    ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}),
    ("llama", {"partial_rotary_factor": 0.5}),
    ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    ("llama", {"hidden_act": "gelu"}),
    ("llama", {"attention_dropout": 0.1}),
    ("llama", {"quantization_config": {"quant_method": "gptq"}}),
    ("llama", {"auto_map": {"AutoModel": "modeling.Mine"}}),
    ("llama", {"architectures": ["LlamaForTokenClassification"]}),
    ("llama", {"architectures": ["LlamaForSequenceClassification"], "problem_type": "regression"}),
    ("llama", {"model_type": "mixtral"}),
    ("mistral", {"sliding_window": MAX_SEQ_LEN - 1}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "layer_types": None}),
    (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
    ("gpt2", {"activation_function": "gelu"}),
    ("gpt2", {"scale_attn_weights": False}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ("gpt2", {"add_cross_attention": True}),
    ("gpt2", {"resid_pdrop": 0.3}),
]


@pytest.mark.parametrize(("model_type", "changes"), REFUSED, ids=str)
def test_a_feature_that_is_not_ours_is_refused_by_name(model_type: str, changes: dict[str, Any]) -> None:
    sizes = GPT2 if model_type == "gpt2" else {**LLAMA, "sliding_window": None}
    read_shape({"model_type": model_type, **sizes})
    with pytest.raises(ConfigError) as refusal:
        read_shape({"model_type": model_type, **sizes, **changes})
    assert any(name in str(refusal.value) for name in changes)
    assert len(str(refusal.value).splitlines()) == 1


def test_all_features_that_are_not_ours_are_refused_at_once(saved: Path, tmp_path: Path) -> None:
    folder = copied(saved, "llama", tmp_path / "model")
    change_config(
        folder, rope_scaling={"type": "linear", "factor": 2.0}, hidden_act="relu", auto_map={"a": 1}
    )
    with pytest.raises(ConfigError) as refusal:
        HuggingFaceCheckpoint.open(str(folder))
    for part in (str(folder / CONFIG), "rope_scaling", "hidden_act='relu'", "auto_map"):
        assert part in str(refusal.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 4, "use_sliding_window": False},
        {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 2},
        {"sliding_window": MAX_SEQ_LEN, "use_sliding_window": True, "max_window_layers": 0},
    ],
)
def test_a_window_without_effect_is_no_obstacle(changes: dict[str, Any]) -> None:
    assert read_shape({"model_type": "qwen2", **LLAMA, **changes}).model.max_seq_len == MAX_SEQ_LEN


@pytest.mark.parametrize("kind", THEIRS)
@pytest.mark.parametrize("is_old", [False, True])
def test_keys_that_are_left_out_mean_what_transformers_takes_for_them(
    saved: Path, kind: str, is_old: bool
) -> None:
    raw = json.loads((saved / kind / CONFIG).read_text())
    expected = read_shape(raw)
    if is_old:
        raw["torch_dtype"] = raw.pop("dtype")
        rope = raw.pop("rope_parameters", {})
        raw |= {"rope_theta": rope["rope_theta"], "rope_scaling": None} if rope else {}
    import transformers

    defaults = transformers.AutoConfig.for_model(raw["model_type"]).to_dict()
    short = {k: v for k, v in raw.items() if k in {"model_type", "architectures"} or defaults.get(k, ()) != v}
    assert len(short) < len(raw)
    assert read_shape(short) == expected


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "gpt2"])
def test_a_config_that_says_nothing_means_what_it_means_to_transformers(model_type: str) -> None:
    import transformers

    given = {"sliding_window": None} if model_type == "mistral" else {}  # its default is refused
    told = transformers.AutoConfig.for_model(model_type, **given).to_dict()
    assert read_shape({"model_type": model_type, **given}) == read_shape(told)
