"""Encoders of transformers in whole runs: their rows of text, a fine-tune of pairs, and its export."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.huggingface_models import randomize
from support.library_tokenizers import TEXTS, WRITERS
from support.small_runs import run

from distft.cli.main import main
from distft.run.data_context import text_template
from distft.run.pretrained import evaluate_checkpoint
from distft.tokenizer import Tokenizer
from distft.topology import Topology

PAIRS = [(TEXTS[0][:28], TEXTS[1][:40]), (TEXTS[3], "knowingly happier"), ("trout", TEXTS[0])]


def tokenizer_in(folder: Path, kind: str) -> Tokenizer:
    folder.mkdir()
    WRITERS[kind](folder)
    return Tokenizer.load(str(folder))


@pytest.mark.parametrize("kind", ["bert", "vocab.txt", "roberta"])
def test_rows_have_the_ids_and_segments_that_transformers_gives_them(tmp_path: Path, kind: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = tokenizer_in(tmp_path / "tokenizer", kind)
    template = text_template(tokenizer)
    assert template is not None
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "tokenizer"))
    for first, second in PAIRS:
        assert template.row(tokenizer.encode(first), 99) == theirs(first, truncation=False)["input_ids"]
        ids = tokenizer.encode(first)
        row = template.pair(ids, tokenizer.encode(second))
        expected = theirs(first, second, truncation=False, padding=False, return_token_type_ids=True)
        assert row == expected["input_ids"]
        if kind != "roberta":  # which has no segments
            start = template.second_start(ids)
            assert expected["token_type_ids"] == [0] * start + [1] * (len(row) - start)


def test_texts_of_a_language_models_tokenizer_stay_without_marks(tmp_path: Path) -> None:
    for kind in ("gpt2", "llama3", "qwen"):
        assert text_template(tokenizer_in(tmp_path / kind, kind)) is None


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a small random BERT and its tokenizer."""
    import transformers

    folder = tmp_path_factory.mktemp("bert") / "model"
    vocab_size = tokenizer_in(folder, "bert").vocab_size
    config = transformers.BertConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=48,
    )
    model = transformers.BertForMaskedLM(config)
    randomize(model)
    model.save_pretrained(folder)
    return folder


def fine_tuning(folder: Path, data: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    rows = [{"a": a, "b": b, "label": "even" if i % 2 else "odd"} for i, (a, b) in enumerate(PAIRS * 2)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "run_dir": str(run_dir),
        "device": "cpu",
        "init_from": str(folder),
        "trainable": ["classifier.*", "blocks.1.*"],
        "data": {"type": "labelled", "path": str(data), "text": "a", "text_pair": "b"},
        "objective": {"type": "classification", "pooling": "first", "hidden": "tanh"},
        "batch": {"global_batch_size": 4, "micro_batch_size": 2, "seq_len": 48},
        "optim": {"peak_lr": 0.01},
        "train": {"max_steps": 3},
        **changes,
    }


def test_a_fine_tune_of_pairs_is_exported_as_the_bert_that_transformers_evaluates_alike(
    bert: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    data = tmp_path / "pairs.jsonl"
    run(Topology(), fine_tuning(bert, data, tmp_path / "run"))
    own = evaluate_checkpoint(
        str(tmp_path / "run"),
        [
            "validation.type=labelled",
            f"validation.path={data}",
            "validation.text=a",
            "validation.text_pair=b",
        ],
        Topology(),
    )
    target = tmp_path / "exported"
    assert main(["checkpoint", "convert", str(tmp_path / "run"), str(target), "--to", "huggingface"]) == 0
    model = AutoModelForSequenceClassification.from_pretrained(str(target)).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(target))
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    texts = [[row[column] for row in rows] for column in ("a", "b")]
    with torch.no_grad():
        inputs = tokenizer(*texts, return_tensors="pt", padding=True, truncation=True, max_length=48)
        labels = torch.tensor([model.config.label2id[row["label"]] for row in rows])
        theirs = model(**inputs, labels=labels)
    assert own["loss"] == pytest.approx(float(theirs.loss), abs=1e-5)
    # Read back, it is a model of a classification that needs no settings.
    again = evaluate_checkpoint(
        str(target),
        [f"validation.path={data}", "validation.text=a", "validation.text_pair=b"],
        Topology(),
    )
    assert again == pytest.approx(own, abs=1e-6)


def test_an_architecture_that_is_not_there_is_one_error_of_the_check(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((bert / "config.json").read_text())
    other = tmp_path / "electra"
    other.mkdir()
    for path in bert.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "electra"}))
    raw = fine_tuning(other, tmp_path / "pairs.jsonl", tmp_path / "run")
    (tmp_path / "run.yaml").write_text(json.dumps(raw))
    assert main(["config", "check", str(tmp_path / "run.yaml")]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "model_type='electra' is not supported: it must be one of llama, mistral" in told
    assert "bert, roberta, distilbert" in told


def test_rows_longer_than_the_positions_are_one_error_of_the_check(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = {"global_batch_size": 4, "micro_batch_size": 2, "seq_len": 49}
    raw = fine_tuning(bert, tmp_path / "pairs.jsonl", tmp_path / "run", batch=batch)
    (tmp_path / "run.yaml").write_text(json.dumps(raw))
    assert main(["config", "check", str(tmp_path / "run.yaml")]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "batch.seq_len=49 is more than model.max_seq_len=48" in told
