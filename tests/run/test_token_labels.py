"""Complete runs that learn labels of words: trained, resumed, evaluated, and used."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from seqeval.metrics import f1_score
from support.rank_pool import run_ranks
from support.small_runs import fine_tuning, logged, pretraining, run, run_until_power_cut

from distft.cli.main import main
from distft.config import parse
from distft.errors import ConfigError
from distft.run.config import RunConfig
from distft.run.inputs import read_inputs
from distft.run.pretrained import evaluate_checkpoint
from distft.topology import Topology

NOUNS = {"cat": "B-PET", "dog": "B-PET", "bird": "B-PET", "red": "B-SKY", "moon": "I-SKY"}


@pytest.fixture(scope="module")
def sentences(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The texts of the other tests' rows, with animals and moons as entities."""
    folder = tmp_path_factory.mktemp("sentences")
    for name in ("train", "test"):
        texts = [json.loads(line)["text"] for line in (data / f"{name}.jsonl").read_text().splitlines()]
        rows = [
            {"tokens": text.split(), "labels": [NOUNS.get(w, "O") for w in text.split()]} for text in texts
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config_of(data: Path, run_dir: Path, pretrained: Path, sentences: Path, **changes: Any) -> dict[str, Any]:
    raw = fine_tuning(data, run_dir, pretrained)
    return raw | {
        "trainable": ["*"],
        "objective": {"type": "token_classification"},
        "data": {"type": "token_labels", "path": str(sentences / "train.jsonl")},
        "validation": {"type": "token_labels", "path": str(sentences / "test.jsonl")},
        "batch": {"global_batch_size": 8, "micro_batch_size": 4, "seq_len": 24},
        "train": {"max_steps": 9, "log_every_steps": 1},
        "checkpoint": {"every_steps": 3, "in_background": False},
        **changes,
    }


def _run(topology: Topology, raw: dict[str, Any]) -> None:
    run(topology, raw)


@pytest.mark.ranks
def test_a_resumed_run_on_other_ranks_ends_as_one_that_went_through(
    data: Path, pretrained: Path, sentences: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = pretraining(data, tmp_path)["model"] | {"dropout": 0.1, "neftune_alpha": 5.0}
    whole = config_of(data, tmp_path / "whole", pretrained, sentences, model=model)
    run(Topology(), whole)
    cut = config_of(data, tmp_path / "cut", pretrained, sentences, model=model)
    run_until_power_cut(cut, 5)
    run_ranks(_run, 2, cut | {"engine": {"type": "zero", "zero_stage": 1, "compile": False}})
    losses = [logged(tmp_path / name) for name in ("whole", "cut")]
    assert losses[1][9] == pytest.approx(losses[0][9], abs=1e-5)
    found, expected = (evaluate_checkpoint(str(tmp_path / name), [], Topology()) for name in ("cut", "whole"))
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5)
    assert set(found) >= {"accuracy", "macro_f1", "entity_precision", "entity_recall", "entity_f1"}

    rows = [json.loads(line) for line in (sentences / "test.jsonl").read_text().splitlines()]
    output = tmp_path / "out.jsonl"
    assert main(["predict", str(tmp_path / "whole"), str(sentences / "test.jsonl"), "-o", str(output)]) == 0
    predictions = [json.loads(line) for line in output.read_text().splitlines()]
    assert [one["tokens"] for one in predictions] == [row["tokens"] for row in rows]
    kept = [row["labels"][: len(one["labels"])] for row, one in zip(rows, predictions, strict=True)]
    guess = [one["labels"] for one in predictions]
    assert sum(map(len, kept)) < sum(len(row["labels"]) for row in rows)  # some words are beyond seq_len
    assert expected["entity_f1"] == pytest.approx(float(f1_score(kept, guess)))
    for one in predictions:
        for span in one["spans"]:
            assert {label[2:] for label in one["labels"][span["start"] : span["stop"]]} == {span["type"]}
    for name in ("out.parquet", "out.csv"):
        table = tmp_path / name
        assert (
            main(["predict", str(tmp_path / "whole"), str(sentences / "test.jsonl"), "-o", str(table)]) == 0
        )
    spans = pq.read_table(tmp_path / "out.parquet")["spans"].to_pylist()
    assert [json.loads(cell) for cell in spans] == [one["spans"] for one in predictions]
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "whole")]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[-2:]] == ["PET", "SKY"]


def test_data_and_objective_must_fit(data: Path, pretrained: Path, sentences: Path, tmp_path: Path) -> None:
    raw = config_of(data, tmp_path, pretrained, sentences, objective={"type": "classification"})
    with pytest.raises(ConfigError, match="does not fit the labels of its data"):
        read_inputs(parse(RunConfig, raw))
    raw = fine_tuning(data, tmp_path, pretrained, objective={"type": "token_classification"})
    with pytest.raises(ConfigError, match=r"set data\.type=token_labels"):
        read_inputs(parse(RunConfig, raw))


def test_labels_are_saved_in_the_order_of_the_head(
    data: Path, pretrained: Path, sentences: Path, tmp_path: Path
) -> None:
    inputs = read_inputs(parse(RunConfig, config_of(data, tmp_path, pretrained, sentences)))
    assert inputs.config.objective.labels == inputs.label_names == ("B-PET", "B-SKY", "I-SKY", "O")  # type: ignore[union-attr]
