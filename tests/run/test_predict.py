"""`distft predict`: what `evaluate` measures, row by row, on any ranks, and after an interruption."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.predictions import (
    BLOCK_ROWS,
    interrupt_in_the_third_block,
    json_lines,
    predict_in_small_blocks,
)
from support.rank_pool import run_ranks
from support.small_runs import fine_tuning, pretraining, run

from distft.cli.main import main
from distft.errors import ConfigError, DataError
from distft.run import label_predictor, text_predictor
from distft.run import predict as predict_module
from distft.run.generate import GenerationOptions, generate_text
from distft.run.predict import predict_file
from distft.run.prediction_rows import PredictOptions
from distft.run.pretrained import evaluate_checkpoint
from distft.topology import Topology


@pytest.fixture(scope="module")
def classifier(data: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("classifier")
    run(Topology(), fine_tuning(data, run_dir, pretrained, trainable=["*"]))
    return run_dir


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_predictor, "_BLOCK_ROWS", BLOCK_ROWS)


def test_the_labels_are_those_that_evaluate_counts(data: Path, classifier: Path, tmp_path: Path) -> None:
    output = tmp_path / "predictions.jsonl"
    assert main(["predict", str(classifier), str(data / "test.jsonl"), "-o", str(output)]) == 0
    rows, predictions = json_lines(data / "test.jsonl"), json_lines(output)
    assert [found["text"] for found in predictions] == [row["text"] for row in rows]
    assert [found["line"] for found in predictions] == list(range(1, len(rows) + 1))
    for found in predictions:
        probabilities = found["probabilities"]
        assert set(probabilities) == {"bird", "cat", "dog"}
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-12)
        assert found["probability"] == probabilities[found["label"]] == max(probabilities.values())
    share = sum(f["label"] == row["label"] for f, row in zip(predictions, rows, strict=True)) / len(rows)
    assert share == evaluate_checkpoint(str(classifier), [], Topology())["accuracy"]
    assert not (tmp_path / "predictions.jsonl.parts").exists()


@pytest.mark.ranks
@pytest.mark.usefixtures("small_blocks")
def test_ranks_write_the_same_file_and_go_on_where_an_interruption_left(
    data: Path, classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = str(data / "test.jsonl")
    predict_file(str(classifier), rows, str(tmp_path / "one.jsonl"), Topology())
    run_ranks(predict_in_small_blocks, 3, str(classifier), rows, str(tmp_path / "three.jsonl"))
    assert (tmp_path / "three.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()

    interrupt_in_the_third_block(str(classifier), rows, tmp_path / "cut.jsonl", monkeypatch)
    run_ranks(predict_in_small_blocks, 2, str(classifier), rows, str(tmp_path / "cut.jsonl"))
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert not (tmp_path / "cut.jsonl.parts").exists()


def test_csv_and_parquet_have_the_same_in_columns(data: Path, classifier: Path, tmp_path: Path) -> None:
    rows = str(data / "test.jsonl")
    for suffix in ("jsonl", "csv", "tsv", "parquet"):
        predict_file(str(classifier), rows, str(tmp_path / f"p.{suffix}"), Topology())
    expected = json_lines(tmp_path / "p.jsonl")
    assert pq.read_table(tmp_path / "p.parquet").to_pylist() == expected
    for suffix, delimiter in (("csv", ","), ("tsv", "\t")):
        with (tmp_path / f"p.{suffix}").open(newline="") as file:
            found = list(csv.DictReader(file, delimiter=delimiter))
        assert [row["label"] for row in found] == [row["label"] for row in expected]
        cats = [float(row["probability of cat"]) for row in found]
        assert cats == [row["probabilities"]["cat"] for row in expected]


def test_a_regression_predicts_numbers_in_the_units_of_the_data(data: Path, tmp_path: Path) -> None:
    texts = [json.loads(line)["text"] for line in (data / "train.jsonl").read_text().splitlines()]
    numbers = tmp_path / "numbers.jsonl"
    lines = [json.dumps({"text": text, "score": 1000.0 + len(text)}) + "\n" for text in texts]
    numbers.write_text("".join(lines))
    own = {"type": "labelled", "path": str(numbers), "label": "score", "labels": "number"}
    raw = pretraining(
        data,
        tmp_path / "run",
        tokenizer=str(data / "tokenizer.model"),
        data=own,
        validation=own,
        objective={"type": "regression"},
    )
    mean_error = run(Topology(), raw).metrics["validation/mean_absolute_error"]
    predict_file(str(tmp_path / "run"), str(numbers), str(tmp_path / "p.jsonl"), Topology())
    found = [row["number"] for row in json_lines(tmp_path / "p.jsonl")]
    errors = [abs(number - 1000 - len(text)) for number, text in zip(found, texts, strict=True)]
    assert sum(errors) / len(errors) == pytest.approx(mean_error, rel=1e-6)


def test_what_cannot_be_predicted_is_told_before_the_work(
    data: Path, classifier: Path, pretrained: Path, tmp_path: Path
) -> None:
    rows, output = str(data / "test.jsonl"), str(tmp_path / "p.jsonl")
    with pytest.raises(ConfigError, match=r"objective.type=contrastive, which predicts nothing of a row"):
        predict_file(str(pretrained), rows, output, Topology(), overrides=["objective={type: contrastive}"])
    with pytest.raises(ConfigError, match=r"must end in \.jsonl, \.csv, \.tsv, \.parquet"):
        predict_file(str(classifier), rows, str(tmp_path / "p.txt"), Topology())
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match=r"empty\.jsonl"):
        predict_file(str(classifier), str(tmp_path / "empty.jsonl"), output, Topology())
    (tmp_path / "other.jsonl").write_text('{"body": "the cat"}\n')
    with pytest.raises(DataError, match=r"other\.jsonl:1: .*'text'"):
        predict_file(str(classifier), str(tmp_path / "other.jsonl"), output, Topology())
    (tmp_path / "p.jsonl").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is not overwritten"):
        predict_file(str(classifier), rows, output, Topology())
    assert (tmp_path / "p.jsonl").read_text() == "mine"


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("damage", ["a row less", "half a line", "another label", "garbage"])
def test_a_damaged_block_is_predicted_again(
    data: Path, classifier: Path, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = str(data / "test.jsonl")
    predict_file(str(classifier), rows, str(tmp_path / "whole.jsonl"), Topology())
    with monkeypatch.context() as patch:
        patch.setattr(predict_module, "write_output", _power_cut)
        with pytest.raises(KeyboardInterrupt):
            predict_file(str(classifier), rows, str(tmp_path / "cut.jsonl"), Topology())
    block = tmp_path / "cut.jsonl.parts" / "rows_000000000004.jsonl"
    lines = block.read_text().splitlines(keepends=True)
    damaged = {
        "a row less": "".join(lines[1:]),
        "half a line": "".join(lines)[:-60],
        "another label": "".join(lines).replace('"label": "', '"label": "x', 1),
        "garbage": "garbage" + "".join(lines)[7:],
    }
    block.write_text(damaged[damage])
    predict_file(str(classifier), rows, str(tmp_path / "cut.jsonl"), Topology())
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def _power_cut(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_second_text_needs_a_model_of_pairs(data: Path, classifier: Path, tmp_path: Path) -> None:
    options = PredictOptions(text_pair="label")
    rows, output = str(data / "test.jsonl"), str(tmp_path / "p.jsonl")
    with pytest.raises(ConfigError, match="was trained on one text a row"):
        predict_file(str(classifier), rows, output, Topology(), options)
    with pytest.raises(ConfigError, match=r"--image-column: .* reads texts\. Leave it out"):
        predict_file(str(classifier), rows, output, Topology(), PredictOptions(image="image"))


def test_blocks_of_other_predictions_and_files_of_others_stay(
    data: Path, classifier: Path, tmp_path: Path
) -> None:
    parts = tmp_path / "p.jsonl.parts"
    parts.mkdir()
    (parts / "notes.txt").write_text("mine")
    rows, output = str(data / "test.jsonl"), str(tmp_path / "p.jsonl")
    with pytest.raises(ConfigError, match="is no directory of distft"):
        predict_file(str(classifier), rows, output, Topology())
    (parts / "predictions.json").write_text("{}")
    with pytest.raises(ConfigError, match="another model, other data or other settings"):
        predict_file(str(classifier), rows, output, Topology())
    assert (parts / "notes.txt").read_text() == "mine"
    (tmp_path / "q.jsonl.parts").write_text("mine")
    with pytest.raises(ConfigError, match="is a file, and a directory is needed"):
        predict_file(str(classifier), rows, str(tmp_path / "q.jsonl"), Topology())


def _predict_texts(topology: Topology, *arguments: str) -> int:
    text_predictor._BLOCK_ROWS = 2
    options = PredictOptions(text="text", generation=GenerationOptions(max_new_tokens=6, temperature=0.7))
    return predict_file(arguments[0], arguments[1], arguments[2], topology, options)


@pytest.mark.ranks
def test_a_language_model_writes_a_text_for_each_row(data: Path, pretrained: Path, tmp_path: Path) -> None:
    rows = json_lines(data / "test.jsonl")[:5]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    paths = [str(pretrained), str(tmp_path / "rows.jsonl")]
    command = ["predict", *paths, "--text-column", "text", "--max-new-tokens", "6"]
    assert main([*command, "-o", str(tmp_path / "greedy.csv")]) == 0
    found = list(csv.DictReader(io.StringIO((tmp_path / "greedy.csv").read_text(), newline="")))
    options = GenerationOptions(max_new_tokens=6, temperature=0.0)
    texts = [row["text"] for row in rows]
    expected = generate_text(str(pretrained), texts, options, on_note=lambda _: None)
    assert [row["text"] + row["generated"] for row in found] == expected
    command[2] = str(tmp_path / "rows.parquet")
    assert main([*command, "-o", str(tmp_path / "parquet.jsonl")]) == 0
    assert [r["generated"] for r in json_lines(tmp_path / "parquet.jsonl")] == [r["generated"] for r in found]
    # Drawn texts are the same on any ranks, and in other words than greedy ones.
    assert _predict_texts(Topology(), *paths, str(tmp_path / "one.jsonl")) == len(rows)
    run_ranks(_predict_texts, 2, *paths, str(tmp_path / "two.jsonl"))
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    drawn = [row["generated"] for row in json_lines(tmp_path / "one.jsonl")]
    assert drawn != [row["generated"] for row in found]


def test_options_of_texts_and_of_labels_are_told_apart(
    data: Path, pretrained: Path, classifier: Path, tmp_path: Path
) -> None:
    rows, output = str(data / "test.jsonl"), str(tmp_path / "out.jsonl")
    generation = GenerationOptions(max_new_tokens=3, temperature=0.0)
    with pytest.raises(ConfigError, match=r"predicts labels: --max-new-tokens"):
        predict_file(str(classifier), rows, output, Topology(), PredictOptions(generation=generation))
    options = PredictOptions(text="text", text_pair="b", head="c")
    with pytest.raises(ConfigError, match=r"(?s)--text-pair-column b: the model.*--head c: the model"):
        predict_file(str(pretrained), rows, output, Topology(), options)
    with pytest.raises(DataError, match=r"has no column 'prompt'"):
        predict_file(str(pretrained), rows, output, Topology())
    assert not Path(output).exists()
