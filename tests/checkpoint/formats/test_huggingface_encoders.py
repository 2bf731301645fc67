"""BERT, RoBERTa and DistilBERT: read, computed and written as transformers does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.huggingface_models import (
    MAX_SEQ_LEN,
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

from distft.checkpoint.formats.huggingface_config import choose_architecture, parse_config
from distft.checkpoint.formats.huggingface_source import HuggingFaceCheckpoint
from distft.checkpoint.formats.huggingface_target import write_huggingface
from distft.errors import ConfigError
from distft.model.heads import ClassificationHead, EmbeddingHead
from distft.model.layout import RowLayout
from distft.model.transformer import Transformer
from distft.model.transformer_config import TransformerConfig

MODEL, CONFIG = "model.safetensors", "config.json"
BERT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": MAX_SEQ_LEN,
    "layer_norm_eps": 1e-3,
}
DISTILBERT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "dim": 24,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 37,
    "max_position_embeddings": MAX_SEQ_LEN,
}
# model_type and sizes
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", BERT),
    "bert_tanh_gelu": ("bert", {**BERT, "hidden_act": "gelu_new", "type_vocab_size": 1}),
    "roberta": ("roberta", {**BERT, "max_position_embeddings": MAX_SEQ_LEN + 2, "type_vocab_size": 1}),
    "distilbert": ("distilbert", DISTILBERT),
}
MASKED_LM, CLASSIFIER, ENCODER = (
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModel",
)
LENGTHS = torch.tensor([MAX_SEQ_LEN, 4, 11])
# settings of distft's models, beside the architecture that fits
ENCODER_OPTIONS: dict[str, Any] = {
    "attention": "bidirectional",
    "norm": "layernorm",
    "norm_position": "post",
    "embedding_norm": True,
    "positions": "learned",
    "mlp": "gelu_exact",
    "attention_bias": True,
    "mlp_bias": True,
    "lm_head_transform": True,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "bert": {**ENCODER_OPTIONS, "num_segments": 2, "dropout": 0.1, "pad_vocab_to": 8},
    "roberta": {**ENCODER_OPTIONS, "num_segments": 1, "position_offset": 2},
    "distilbert": {**ENCODER_OPTIONS, "norm_eps": 1e-12, "mlp": "gelu"},
}
LAYERS = {"bert": "tanh", "roberta": "tanh", "distilbert": "relu"}


def make_model(kind: str, auto_class: str, **changes: Any) -> Any:
    """A model of transformers with random weights."""
    import transformers

    model_type, sizes = KINDS[kind]
    config = transformers.AutoConfig.for_model(model_type, **sizes, **changes)
    model = getattr(transformers, auto_class).from_config(config)
    randomize(model)
    return model.eval()


def padded_rows(pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids with padding, and which of them are none."""
    ids = torch.randint(2, VOCAB_SIZE, (3, MAX_SEQ_LEN), generator=torch.Generator().manual_seed(5))
    is_real = torch.arange(MAX_SEQ_LEN) < LENGTHS[:, None]
    return ids.where(is_real, pad_id), is_real


def rows_for(model_type: str) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """The same rows as arguments of distft's models and of transformers', and which positions are real."""
    ids, is_real = padded_rows(1 if model_type == "roberta" else 0)
    own, other = {"input_ids": ids, "lengths": LENGTHS}, {"input_ids": ids, "attention_mask": is_real.long()}
    return own, other, is_real


def with_segments(own: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    segments = (torch.arange(MAX_SEQ_LEN) >= torch.tensor([[7], [2], [5]])).long()
    own["segment_ids"], other["token_type_ids"] = segments, segments


@pytest.mark.parametrize("kind", KINDS)
def test_the_masked_language_model_read_computes_the_same_logits(tmp_path: Path, kind: str) -> None:
    hf_model = make_model(kind, MASKED_LM)
    hf_model.save_pretrained(tmp_path)
    source, model = load_from_hf(tmp_path)
    assert source.find_damage() == []
    own, other, is_real = rows_for(KINDS[kind][0])
    if kind == "bert":
        with_segments(own, other)
    with torch.no_grad():
        found, expected = model(**own)["lm_head"], hf_model(**other).logits
    torch.testing.assert_close(found[is_real], expected[is_real], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_classifier_read_computes_the_same_logits(tmp_path: Path, kind: str) -> None:
    hf_model = make_model(kind, CLASSIFIER, id2label={0: "cat", 1: "dog", 2: "bird"})
    hf_model.save_pretrained(tmp_path)
    source, model = load_from_hf(tmp_path)
    assert source.find_damage() == []
    assert source.manifest.label_names == ["cat", "dog", "bird"]
    own, other, _ = rows_for(KINDS[kind][0])
    if kind == "bert":
        with_segments(own, other)
    with torch.no_grad():
        found, expected = model(**own)["classifier"], hf_model(**other).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_encoder_read_computes_the_same_hidden_states(tmp_path: Path, kind: str) -> None:
    hf_model = make_model(kind, ENCODER)
    hf_model.save_pretrained(tmp_path)
    source = HuggingFaceCheckpoint.open(str(tmp_path))
    assert source.find_damage() == []
    pooler = [name for name in load_file(tmp_path / MODEL) if "pooler" in name]
    assert [note for note in source.notes if all(name in note for name in pooler)] or not pooler
    model = _encoder(source)
    own, other, is_real = rows_for(KINDS[kind][0])
    with torch.no_grad():
        found = model.encode(*_embedded(model, own), None)
        expected = hf_model(**other).last_hidden_state
    torch.testing.assert_close(found[is_real], expected[is_real], rtol=0, atol=1e-5)
    mean = torch.stack([row[:length].mean(0) for row, length in zip(expected, LENGTHS, strict=True)])
    with torch.no_grad():
        torch.testing.assert_close(model(**own)["vector"], mean, rtol=0, atol=1e-5)


def _encoder(source: HuggingFaceCheckpoint) -> Transformer:
    config = TransformerConfig.model_validate(source.manifest.config["model"])
    return build_model(config, source, {"vector": EmbeddingHead(pooling="mean", normalize=False)})


def _embedded(model: Transformer, rows: dict[str, Tensor]) -> tuple[Tensor, Any]:
    positions = torch.arange(MAX_SEQ_LEN)[None]
    layout = RowLayout(shape=rows["input_ids"].shape, position_ids=positions, lengths=rows["lengths"])
    return model.embed_tokens(rows["input_ids"], positions), layout


@pytest.mark.parametrize("kind", OPTIONS)
def test_transformers_computes_the_logits_of_an_exported_language_model(tmp_path: Path, kind: str) -> None:
    model = make_distft_model(model_config(**OPTIONS[kind]))
    source = save_model(model, tmp_path / "distft")
    write_huggingface(source, str(tmp_path / "exported"))
    exported = loaded(tmp_path / "exported", MASKED_LM)
    assert exported.config.model_type == kind
    own, other, is_real = rows_for(kind)
    if kind == "bert":
        with_segments(own, other)
    with torch.no_grad():
        found, expected = exported(**other).logits, model(**own)["lm_head"]
    torch.testing.assert_close(found[is_real], expected[is_real], rtol=0, atol=1e-5)
    back = HuggingFaceCheckpoint.open(str(tmp_path / "exported"))
    assert back.find_damage() == []
    names = list(source.manifest.parameters)
    assert list(back.manifest.parameters) == names
    before = weights(source, names)
    assert all(torch.equal(values, before[name]) for name, values in weights(back, names).items())
    vocabulary = {"vocab_size": model.config.padded_vocab_size, "pad_vocab_to": 1}
    assert back.manifest.config["model"] == {**model.config.model_dump(mode="json"), **vocabulary}


@pytest.mark.parametrize("kind", OPTIONS)
def test_transformers_computes_the_logits_of_an_exported_classifier(tmp_path: Path, kind: str) -> None:
    head = ClassificationHead(num_labels=3, pooling="first", hidden=LAYERS[kind])  # type: ignore[arg-type]
    model = make_distft_model(model_config(**OPTIONS[kind]), {"classifier": head})
    source = save_model(model, tmp_path / "distft", label_names=["a", "b", "c"], pooling="first")
    write_huggingface(source, str(tmp_path / "exported"))
    exported = loaded(tmp_path / "exported", CLASSIFIER)
    own, other, _ = rows_for(kind)
    with torch.no_grad():
        torch.testing.assert_close(exported(**other).logits, model(**own)["classifier"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("auto_class", [MASKED_LM, CLASSIFIER])
def test_a_model_of_transformers_is_read_and_exported_unchanged(
    tmp_path: Path, kind: str, auto_class: str
) -> None:
    hf_model = make_model(kind, auto_class)
    hf_model.save_pretrained(tmp_path / "before")
    source = HuggingFaceCheckpoint.open(str(tmp_path / "before"))
    write_huggingface(source, str(tmp_path / "after"), architecture=KINDS[kind][0])
    before, after = (load_file(tmp_path / when / MODEL) for when in ("before", "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    own, other = (hf_model.config.to_dict(), loaded(tmp_path / "after", auto_class).config.to_dict())
    ignored = {"_name_or_path", "torch_dtype", "position_embedding_type", "problem_type"}
    ignored |= {"bos_token_id", "eos_token_id"} | ({"pad_token_id"} if kind != "roberta" else set())
    assert {key for key in own | other if own.get(key) != other.get(key)} <= ignored


def test_the_files_of_older_versions_are_read(tmp_path: Path) -> None:
    """As Google's first BERT: TensorFlow's names of norms, buffers, copies of tied tensors, a second head."""
    hf_model = make_model("bert", MASKED_LM)
    hf_model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / MODEL)
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in tensors.items()
    }
    renamed["bert.embeddings.position_ids"] = torch.arange(MAX_SEQ_LEN)[None]
    renamed["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    renamed["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].clone()
    renamed["cls.seq_relationship.weight"] = torch.ones(2, 24)
    save_file(renamed, tmp_path / MODEL)
    change_config(tmp_path, architectures=["BertForPreTraining"])
    source, model = load_from_hf(tmp_path)
    assert source.find_damage() == []
    assert any("cls.seq_relationship.weight left out" in note for note in source.notes)
    own, other, is_real = rows_for("bert")
    with torch.no_grad():
        found, expected = model(**own)["lm_head"], hf_model(**other).logits
    torch.testing.assert_close(found[is_real], expected[is_real], rtol=0, atol=1e-5)
    save_file({**renamed, "cls.predictions.decoder.bias": torch.ones(VOCAB_SIZE)}, tmp_path / MODEL)
    (problem,) = HuggingFaceCheckpoint.open(str(tmp_path)).find_damage()
    assert "cls.predictions.decoder.bias differs from cls.predictions.bias" in problem


def test_tensors_of_no_known_use_are_named(tmp_path: Path) -> None:
    make_model("distilbert", MASKED_LM).save_pretrained(tmp_path)
    save_file({**load_file(tmp_path / MODEL), "qa_outputs.weight": torch.ones(2, 24)}, tmp_path / MODEL)
    (problem,) = HuggingFaceCheckpoint.open(str(tmp_path)).find_damage()
    assert "qa_outputs.weight [2, 24] is not part of the model" in problem


@pytest.mark.parametrize(
    ("kind", "changes", "problem"),
    [
        ("bert", {"hidden_act": "relu"}, "hidden_act='relu' is not supported: it must be gelu or"),
        ("roberta", {"hidden_act": "gelu_new"}, "hidden_act='gelu_new' is not supported: it must be gelu or"),
        ("bert", {"is_decoder": True}, "is_decoder"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        (
            "bert",
            {"attention_probs_dropout_prob": 0.0},
            "attention_probs_dropout_prob=0.0: different dropout",
        ),
        ("distilbert", {"attention_dropout": 0.0}, "attention_dropout=0.0: different dropout rates"),
        ("distilbert", {"tie_word_embeddings": False}, "tie_word_embeddings=false is not supported"),
        ("roberta", {"max_position_embeddings": 2}, "max_position_embeddings=2 leaves no position"),
        ("bert", {"architectures": ["BertForQuestionAnswering"]}, "BertForQuestionAnswering"),
        (
            "bert",
            {"model_type": "electra"},
            "model_type='electra' is not supported: it must be one of llama, ",
        ),
    ],
    ids=str,
)
def test_an_unsupported_encoder_is_refused_by_name(kind: str, changes: dict[str, Any], problem: str) -> None:
    model_type, sizes = KINDS[kind]
    with pytest.raises(ConfigError) as failure:
        parse_config({"model_type": model_type, "architectures": None, **sizes, **changes})
    assert problem in str(failure.value)


@pytest.mark.parametrize(
    ("kind", "changes", "problems"),
    [
        ("bert", {"norm_position": "pre"}, ["model.norm_position=pre would have to be post"]),
        ("bert", {"num_segments": 0}, ["model.num_segments=0 would have to be 2"]),
        ("roberta", {"position_offset": 0}, ["model.position_offset=0 would have to be 2"]),
        (
            "distilbert",
            {"norm_eps": 1e-5, "num_segments": 1},
            ["norm_eps", "num_segments=1 would have to be 0"],
        ),
        ("gpt2", {}, ["model.norm_position=post would have to be pre", "lm_head_transform=true"]),
    ],
    ids=str,
)
def test_an_encoder_that_transformers_does_not_have_is_refused_option_by_option(
    kind: str, changes: dict[str, Any], problems: list[str]
) -> None:
    with pytest.raises(ConfigError) as failure:
        choose_architecture(model_config(**{**OPTIONS.get(kind, OPTIONS["bert"]), **changes}), kind)
    assert all(problem in str(failure.value) for problem in problems)


def change_config(folder: Path, **changes: Any) -> None:
    raw = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**raw, **changes}))
