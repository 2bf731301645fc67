"""distft classifiers exported for transformers, which loads them and computes the same logits."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from support.huggingface_models import (
    DISTFT_MODELS,
    MAX_SEQ_LEN,
    loaded,
    make_distft_model,
    model_config,
    random_ids,
    save_model,
)
from torch import Tensor

from distft.checkpoint.formats.huggingface_target import write_huggingface
from distft.model.heads import ClassificationHead
from distft.tokenizer import TokenizerTrainConfig, train_tokenizer


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


@pytest.mark.parametrize(
    ("kind", "pooling", "hidden"),
    [
        ("llama", "last", "none"),
        ("gpt2", "last", "none"),
        ("llama", "mean", "none"),
        ("gpt2", "mean", "none"),
        ("llama", "mean", "tanh"),
        ("llama", "mean", "gelu_norm"),
    ],
)
def test_a_classifier_without_pad_computes_padded_rows_as_ours(
    tmp_path: Path, kind: str, pooling: Literal["last", "mean"], hidden: Any
) -> None:
    """With `pooling: mean`, which transformers does not have, by the lines in classifier.md."""
    config = TokenizerTrainConfig(algorithm="char", unk_id=0, bos_id=None, eos_id=1, pad_id=None)
    tokenizer = train_tokenizer(["any text will do"], config, tmp_path / "tokenizer.model")
    changes = {**DISTFT_MODELS[kind][1], "vocab_size": tokenizer.vocab_size}
    head = ClassificationHead(num_labels=2, pooling=pooling, hidden=hidden)
    model = make_distft_model(model_config(**changes), {"classifier": head})
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
