"""Scaled rotary positions, windows and ModernBERT: read, computed and written as transformers does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.huggingface_models import (
    DISTFT_MODERNBERT,
    LLAMA,
    MAX_SEQ_LEN,
    MODERNBERT,
    VOCAB_SIZE,
    build_model,
    load_from_hf,
    loaded,
    make_distft_model,
    model_config,
    randomize,
    save_model,
    weights,
)
from torch import Tensor

from distft.checkpoint.formats.huggingface_config import parse_config
from distft.checkpoint.formats.huggingface_source import HuggingFaceCheckpoint
from distft.checkpoint.formats.huggingface_target import write_huggingface
from distft.model.heads import ClassificationHead, EmbeddingHead
from distft.model.transformer import Transformer
from distft.model.transformer_config import TransformerConfig

MODEL = "model.safetensors"
CAUSAL_LM, MASKED_LM = "AutoModelForCausalLM", "AutoModelForMaskedLM"
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 5}
HEAD_DIM = {"head_dim": 16}
SCALED_GLOBAL = {
    "full_attention": {**YARN, "rope_theta": 700.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 700.0},
}
SAME = {"rope_type": "linear", "factor": 2.0, "rope_theta": 90.0}
# model_type, keys of transformers, and what distft makes of them
READ: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama3": (
        "llama",
        {"rope_parameters": {**LLAMA3, "rope_theta": 500.0}, **HEAD_DIM},
        {"rope_theta": 500.0, "rope_scaling.type": "llama3", "rope_scaling.original_max_seq_len": 8},
    ),
    "linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}},
        {"rope_scaling.type": "linear", "rope_scaling.factor": 2.5},
    ),
    "yarn": (
        "llama",
        {"rope_parameters": {**YARN, "rope_theta": 90.0, "beta_fast": 8.0, "truncate": False}, **HEAD_DIM},
        {"rope_scaling.type": "yarn", "rope_scaling.beta_fast": 8.0, "rope_scaling.truncate": False},
    ),
    "yarn_of_deepseek": (
        "qwen2",
        {"rope_parameters": {**YARN, "rope_theta": 90.0, "mscale": 0.7, "mscale_all_dim": 1.5}, **HEAD_DIM},
        {"rope_scaling.original_max_seq_len": 5},
    ),
    "dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 90.0}},
        {"rope_scaling": None, "rope_theta": 90.0},
    ),
    "mistral": ("mistral", {"sliding_window": 5}, {"sliding_window": 5, "global_layers": []}),
    "qwen2": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2, "num_hidden_layers": 3},
        {"sliding_window": 4, "global_attention_every": None, "global_layers": [0, 1]},
    ),
    "qwen3": (
        "qwen3",
        {
            "head_dim": 10,
            "use_sliding_window": True,
            "sliding_window": 4,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        {"sliding_window": 4, "global_attention_every": 2, "global_attention_offset": 1},
    ),
    "modernbert": (
        "modernbert",
        {},
        {
            "sliding_window": 6,
            "global_attention_every": 3,
            "rope_theta": 700.0,
            "local_rope_theta": 50.0,
            "first_attention_norm": False,
        },
    ),
    "modernbert_biases": (
        "modernbert",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "norm_bias": True,
            "classifier_bias": True,
            "local_attention": 7,
            "layer_types": ["full_attention", "sliding_attention", *["full_attention"] * 3],
            "rope_parameters": SCALED_GLOBAL,
        },
        {"global_layers": [0, 2, 3, 4], "local_rope_theta": 700.0, "rope_scaling.type": "yarn"},
    ),
    "modernbert_windows_alone": (
        "modernbert",
        {
            "layer_types": ["sliding_attention"] * 5,
            "rope_parameters": {"full_attention": SAME, "sliding_attention": SAME},
        },
        {"sliding_window": 6, "local_rope_theta": None, "rope_scaling.type": "linear"},
    ),
}


def make_model(kind: str, **changes: Any) -> Any:
    """A language model of transformers with random weights."""
    import transformers

    model_type, options, _ = READ[kind]
    sizes = MODERNBERT if model_type == "modernbert" else LLAMA
    config = transformers.AutoConfig.for_model(model_type, **{**sizes, **options, **changes})
    model = getattr(transformers, auto_class(model_type)).from_config(config)
    randomize(model)
    return model.eval()


def auto_class(model_type: str) -> str:
    return MASKED_LM if model_type == "modernbert" else CAUSAL_LM


def padded_rows() -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """The same rows, longer than the windows, for distft and transformers, and which tokens are real."""
    ids = torch.randint(1, VOCAB_SIZE, (3, MAX_SEQ_LEN), generator=torch.Generator().manual_seed(5))
    lengths = torch.tensor([MAX_SEQ_LEN, 3, 13])
    is_real = torch.arange(MAX_SEQ_LEN) < lengths[:, None]
    return (
        {"input_ids": ids, "lengths": lengths},
        {"input_ids": ids, "attention_mask": is_real.long()},
        is_real,
    )


def require_same_logits(model: Transformer, other: Any) -> None:
    own_rows, other_rows, is_real = padded_rows()
    with torch.no_grad():
        found, expected = model(**own_rows)["lm_head"], other(**other_rows).logits
    torch.testing.assert_close(found[is_real], expected[is_real], rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*original_max_position_embeddings")
@pytest.mark.parametrize("kind", READ)
def test_a_model_read_computes_the_same_logits_and_is_written_unchanged(tmp_path: Path, kind: str) -> None:
    model_type, _, expected = READ[kind]
    hf_model = make_model(kind)
    hf_model.save_pretrained(tmp_path / "before")
    source, model = load_from_hf(tmp_path / "before")
    assert source.find_damage() == []
    raw = source.manifest.config["model"]
    for name, value in expected.items():
        section, _, inner = name.partition(".")
        assert (raw[section][inner] if inner else raw[section]) == value, name
    require_same_logits(model, hf_model)
    write_huggingface(source, str(tmp_path / "after"), architecture=model_type)
    before, after = (load_file(tmp_path / when / MODEL) for when in ("before", "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = loaded(tmp_path / "after", auto_class(model_type))
    require_same_logits(model, again)


@pytest.mark.parametrize("kind", ["modernbert", "modernbert_biases"])
def test_a_packed_document_of_a_modernbert_is_what_transformers_computes_of_it_alone(
    tmp_path: Path, kind: str
) -> None:
    hf_model = make_model(kind)
    hf_model.save_pretrained(tmp_path)
    _, model = load_from_hf(tmp_path)
    cuts = [11, 2, 7]
    ids = torch.randint(1, VOCAB_SIZE, (1, sum(cuts)), generator=torch.Generator().manual_seed(5))
    documents = torch.cat([torch.full((n,), i) for i, n in enumerate(cuts)])[None]
    positions = torch.cat([torch.arange(n) for n in cuts])[None]
    with torch.no_grad():
        found = model.logits(ids, positions, documents)
        alone = [hf_model(input_ids=document).logits for document in torch.split(ids, cuts, dim=1)]
    torch.testing.assert_close(found, torch.cat(alone, dim=1), rtol=0, atol=1e-5)


def test_the_encoder_of_a_modernbert_gives_the_same_hidden_states(tmp_path: Path) -> None:
    import transformers

    hf_model = transformers.AutoModel.from_config(make_model("modernbert").config)
    randomize(hf_model)
    hf_model.eval().save_pretrained(tmp_path)
    source = HuggingFaceCheckpoint.open(str(tmp_path))
    assert source.find_damage() == []
    config = TransformerConfig.model_validate(source.manifest.config["model"])
    model = build_model(config, source, {"vector": EmbeddingHead(pooling="mean", normalize=False)})
    own, other, is_real = padded_rows()
    with torch.no_grad():
        layout = model.layout_of(**own)
        found = model.encode(model.embed_tokens(own["input_ids"], layout.position_ids), layout, None)
        expected = hf_model(**other).last_hidden_state
        vectors = model(**own)["vector"]
    torch.testing.assert_close(found[is_real], expected[is_real], rtol=0, atol=1e-5)
    mean = (expected * is_real[..., None]).sum(1) / is_real.sum(1, keepdim=True)
    torch.testing.assert_close(vectors, mean, rtol=0, atol=1e-5)


def test_the_keys_of_older_versions_mean_the_same() -> None:
    """And those that a file leaves out, what they are by default."""
    base = {"model_type": "modernbert", **MODERNBERT}
    del base["rope_parameters"]
    expected = parse_config(
        {
            **base,
            "layer_types": [("sliding" if layer % 2 else "full") + "_attention" for layer in range(5)],
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 160_000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
            },
        }
    )
    assert parse_config({**base, "global_attn_every_n_layers": 2, "local_rope_theta": 30.0}) == expected
    llama = {"model_type": "llama", **LLAMA}
    older = {name: value for name, value in LLAMA3.items() if name != "rope_type"} | {"type": "llama3"}
    newer = parse_config({**llama, "rope_parameters": {**LLAMA3, "rope_theta": 500.0}})
    assert parse_config({**llama, "rope_theta": 500.0, "rope_scaling": older}) == newer
    windows = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    qwen = {"model_type": "qwen2", **LLAMA, **windows, "num_hidden_layers": 3}
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    assert parse_config(qwen) == parse_config({**qwen, "layer_types": kinds})
    assert parse_config(qwen).model.global_layers == (0,)


def test_an_empty_config_has_transformers_defaults() -> None:
    import transformers

    raw = {"model_type": "modernbert"}
    assert parse_config(raw) == parse_config(transformers.AutoConfig.for_model("modernbert").to_dict())


WRITTEN: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": ("llama", {"rope_scaling": {"type": "llama3", "factor": 8.0, "original_max_seq_len": 9}}),
    "yarn": (
        "llama",
        {
            "rope_scaling": {
                "type": "yarn",
                "factor": 2.0,
                "original_max_seq_len": 9,
                "attention_factor": 1.25,
            }
        },
    ),
    "mistral": ("mistral", {"sliding_window": 5}),
    "qwen3": ("qwen3", {"qk_norm": True, "sliding_window": 5, "global_layers": [1]}),
    "modernbert": ("modernbert", DISTFT_MODERNBERT),
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_transformers_computes_the_logits_of_an_exported_model(tmp_path: Path, kind: str) -> None:
    model_type, options = WRITTEN[kind]
    model = make_distft_model(model_config(**options))
    source = save_model(model, tmp_path / "distft")
    write_huggingface(source, str(tmp_path / "exported"))
    exported = loaded(tmp_path / "exported", auto_class(model_type))
    assert exported.config.model_type == model_type
    require_same_logits(model, exported)
    back = HuggingFaceCheckpoint.open(str(tmp_path / "exported"))
    assert back.find_damage() == []
    names = list(source.manifest.parameters)
    assert list(back.manifest.parameters) == names
    before = weights(source, names)
    assert all(torch.equal(values, before[name]) for name, values in weights(back, names).items())
    assert back.manifest.config["model"] == model.config.model_dump(mode="json")


def test_static_ntk_scaling_is_exported_as_another_theta(tmp_path: Path) -> None:
    model = make_distft_model(model_config(rope_scaling={"type": "ntk", "factor": 3.0}))
    write_huggingface(save_model(model, tmp_path / "distft"), str(tmp_path / "exported"))
    exported = loaded(tmp_path / "exported")
    assert exported.config.rope_parameters["rope_theta"] == pytest.approx(1e4 * 3 ** (6 / 4))
    require_same_logits(model, exported)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_the_classifier_read_computes_the_same_logits_and_is_written_unchanged(
    tmp_path: Path, pooling: str
) -> None:
    import transformers

    config = make_model("modernbert", norm_eps=1e-5, classifier_pooling=pooling).config
    config.id2label = {0: "cat", 1: "dog", 2: "bird"}
    hf_model = transformers.AutoModelForSequenceClassification.from_config(config)
    randomize(hf_model)
    hf_model.eval().save_pretrained(tmp_path / "before")
    source, model = load_from_hf(tmp_path / "before")
    assert source.find_damage() == []
    assert source.manifest.label_names == ["cat", "dog", "bird"]
    own, other, _ = padded_rows()
    with torch.no_grad():
        expected = hf_model(**other).logits
        torch.testing.assert_close(model(**own)["classifier"], expected, rtol=0, atol=1e-5)
    write_huggingface(source, str(tmp_path / "after"))
    before, after = (load_file(tmp_path / when / MODEL) for when in ("before", "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():
        again = loaded(tmp_path / "after", "AutoModelForSequenceClassification")(**other).logits
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "it has hidden=none, but those of modernbert have hidden=gelu_norm"),
        ({"hidden": "gelu_norm", "pooling": "max"}, "it pools 'max', but those pool the first or mean token"),
        ({"hidden": "gelu_norm"}, "norm_eps=1e-05, but model.norm_bias=false and model.norm_eps=0.001"),
    ],
)
def test_another_classifier_of_a_modernbert_is_exported_beside_the_model(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    options = WRITTEN["modernbert"][1] | ({"norm_eps": 1e-3} if changes else {})
    head = ClassificationHead(num_labels=3, **{"pooling": "first", **changes})
    model = make_distft_model(model_config(**options), {"classifier": head})
    source = save_model(model, tmp_path / "distft", label_names=["a", "b", "c"], pooling=head.pooling)
    notes = write_huggingface(source, str(tmp_path / "exported"))
    assert any(reason in note for note in notes)
    if changes:
        return
    own, other, _ = padded_rows()
    with torch.no_grad():
        pooled = loaded(tmp_path / "exported", "AutoModel")(**other).last_hidden_state[:, 0]
    logits = pooled @ load_file(tmp_path / "exported/classifier.safetensors")["classifier.weight"].T
    torch.testing.assert_close(logits, model(**own)["classifier"], rtol=0, atol=1e-5)


def test_a_copy_of_the_tied_weight_is_compared(tmp_path: Path) -> None:
    make_model("modernbert").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / MODEL)
    embedding = tensors["model.embeddings.tok_embeddings.weight"]
    save_file({**tensors, "decoder.weight": embedding.clone()}, tmp_path / MODEL)
    assert HuggingFaceCheckpoint.open(str(tmp_path)).find_damage() == []
    save_file({**tensors, "decoder.weight": embedding + 1}, tmp_path / MODEL)
    (problem,) = HuggingFaceCheckpoint.open(str(tmp_path)).find_damage()
    assert "decoder.weight differs from model.embeddings.tok_embeddings.weight" in problem
