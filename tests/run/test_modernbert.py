"""A directory of ModernBERT in whole runs: its rows, a fine-tune of its classifier, export and embeddings."""

import json
from pathlib import Path

import numpy as np
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

ROWS = [{"text": text, "label": "even" if i % 2 else "odd"} for i, text in enumerate([*TEXTS[:4], "trout"])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random ModernBERT with its tokenizer; its rows are longer than the window."""
    import transformers

    folder = tmp_path_factory.mktemp("modernbert") / "model"
    folder.mkdir()
    WRITERS["modernbert"](folder)
    config = transformers.ModernBertConfig(
        vocab_size=Tokenizer.load(str(folder)).vocab_size,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=96,
        local_attention=8,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0),
    )
    model = transformers.ModernBertForMaskedLM(config)
    randomize(model)
    model.save_pretrained(folder)
    return folder


def test_rows_have_the_ids_that_transformers_gives_them(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = Tokenizer.load(str(folder))
    template, theirs = text_template(tokenizer), AutoTokenizer.from_pretrained(str(folder))
    assert template is not None
    assert tokenizer.piece_id("[MASK]") == theirs.mask_token_id
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert template.row(ids, 999) == theirs(text)["input_ids"]
        assert template.pair(ids, tokenizer.encode("a lake")) == theirs(text, "a lake")["input_ids"]


def test_a_fine_tune_is_exported_as_the_classifier_that_transformers_evaluates_alike(
    folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    data, target = tmp_path / "rows.jsonl", tmp_path / "exported"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    raw = {
        "run_dir": str(tmp_path / "run"),
        "device": "cpu",
        "init_from": str(folder),
        "data": {"type": "labelled", "path": str(data)},
        "objective": {"type": "classification", "pooling": "mean", "hidden": "gelu_norm"},
        "batch": {"global_batch_size": 4, "micro_batch_size": 2, "seq_len": 96},
        "optim": {"peak_lr": 0.01},
        "train": {"max_steps": 3},
    }
    run(Topology(), raw)
    validation = ["validation.type=labelled", f"validation.path={data}"]
    own = evaluate_checkpoint(str(tmp_path / "run"), validation, Topology())
    assert main(["checkpoint", "convert", str(tmp_path / "run"), str(target), "--to", "huggingface"]) == 0
    model = AutoModelForSequenceClassification.from_pretrained(str(target)).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(target))
    assert (model.config.model_type, model.config.classifier_pooling) == ("modernbert", "mean")
    with torch.no_grad():
        inputs = tokenizer([row["text"] for row in ROWS], return_tensors="pt", padding=True)
        labels = torch.tensor([model.config.label2id[row["label"]] for row in ROWS])
        theirs = model(**{k: v for k, v in inputs.items() if k != "token_type_ids"}, labels=labels)
    assert own["loss"] == pytest.approx(float(theirs.loss), abs=1e-5)


def test_its_embeddings_are_those_of_transformers(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    texts, vectors = tmp_path / "texts.jsonl", tmp_path / "vectors.npy"
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:4]))
    assert main(["embed", str(folder), str(texts), "-o", str(vectors)]) == 0
    model, tokenizer = (
        AutoModel.from_pretrained(str(folder)).eval(),
        AutoTokenizer.from_pretrained(str(folder)),
    )
    for text, vector in zip(TEXTS[:4], np.load(vectors), strict=True):
        with torch.no_grad():
            hidden = model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0]
        torch.testing.assert_close(torch.from_numpy(vector), hidden.mean(0), rtol=0, atol=1e-5)
