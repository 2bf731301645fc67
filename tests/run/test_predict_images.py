"""`distft predict` for models of images: folders and Parquet files, on any ranks, after an interruption."""

import io
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from support.predictions import (
    BLOCK_ROWS,
    interrupt_in_the_third_block,
    json_lines,
    predict_in_small_blocks,
)
from support.rank_pool import run_ranks
from support.small_runs import run

from distft.cli.main import main
from distft.data.image_sources import DIGIT_NAMES
from distft.errors import ConfigError, DataError
from distft.run import label_predictor
from distft.run.predict import predict_file
from distft.run.prediction_rows import PredictOptions
from distft.run.pretrained import evaluate_checkpoint
from distft.topology import Topology

SHOWN = 20  # digits, of which every class has some


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`classes` has a folder a class, `flat` the same images alone, `digits.parquet` all in one file."""
    folder = tmp_path_factory.mktemp("digits")
    found = load_digits()
    labels = [DIGIT_NAMES[digit] for digit in found.target[:SHOWN]]
    files = []
    for number, (image, label) in enumerate(zip(found.images[:SHOWN], labels, strict=True)):
        buffer = io.BytesIO()
        Image.fromarray((image * 15).astype("uint8")).save(buffer, "PNG")
        files.append(buffer.getvalue())
        for path in (folder / "classes" / label, folder / "flat"):
            path.mkdir(parents=True, exist_ok=True)
            (path / f"{number:02}.png").write_bytes(files[-1])
    pq.write_table(pyarrow.table({"picture": files, "label": labels}), folder / "digits.parquet")
    return folder


@pytest.fixture(scope="module")
def classifier(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("classifier")
    data = {"type": "images", "path": str(digits / "classes")}
    raw = {
        "run_dir": str(run_dir),
        "device": "cpu",
        "timeout_s": 60.0,
        "model": {"type": "image_cnn", "image_size": 8, "num_channels": 1, "num_filters": [8, 8]},
        "data": data,
        "validation": data,
        "objective": {"type": "classification"},
        "batch": {"global_batch_size": 8, "micro_batch_size": 4, "seq_len": 1},
        "optim": {"peak_lr": 0.01},
        "train": {"max_steps": 20},
        "engine": {"type": "local", "compile": False},
    }
    run(Topology(), raw)
    return run_dir


def test_folders_and_parquet_get_the_labels_that_evaluate_counts(
    digits: Path, classifier: Path, tmp_path: Path
) -> None:
    output = tmp_path / "classes.jsonl"
    assert main(["predict", str(classifier), str(digits / "classes"), "-o", str(output)]) == 0
    found = json_lines(output)
    truth = [Path(row["image"]).parent.name for row in found]
    assert len(found) == SHOWN
    share = sum(row["label"] == label for row, label in zip(found, truth, strict=True)) / SHOWN
    assert share == evaluate_checkpoint(str(classifier), [], Topology())["accuracy"]
    for row in found:
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-12)
        assert row["probability"] == row["probabilities"][row["label"]]

    by_name = {Path(row.pop("image")).name: row for row in found}
    predict_file(str(classifier), str(digits / "flat"), str(tmp_path / "flat.jsonl"), Topology())
    flat = json_lines(tmp_path / "flat.jsonl")
    assert [Path(row["image"]).name for row in flat] == sorted(by_name)
    parquet = tmp_path / "parquet.csv"
    arguments = ["predict", str(classifier), str(digits / "digits.parquet"), "-o", str(parquet)]
    assert main([*arguments, "--image-column", "picture"]) == 0
    rows = [line.split(",")[:2] for line in parquet.read_text().splitlines()[1:]]
    in_order = [by_name[name] for name in sorted(by_name)]
    assert rows == [[str(number), row["label"]] for number, row in enumerate(in_order, start=1)]
    for row, expected in zip(flat, in_order, strict=True):
        assert row["probability"] == pytest.approx(expected["probability"], abs=1e-6)
    one = tmp_path / "one.jsonl"
    assert main(["predict", str(classifier), str(digits / "flat" / "03.png"), "-o", str(one)]) == 0
    assert [row["label"] for row in json_lines(one)] == [by_name["03.png"]["label"]]


@pytest.mark.ranks
def test_ranks_go_on_where_an_interruption_left(
    digits: Path, classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(label_predictor, "_BLOCK_ROWS", BLOCK_ROWS)
    model, rows, output = str(classifier), str(digits / "classes"), str(tmp_path / "cut.jsonl")
    predict_file(model, rows, str(tmp_path / "one.jsonl"), Topology())
    interrupt_in_the_third_block(model, rows, Path(output), monkeypatch)
    with pytest.raises(ConfigError, match="another model, other data or other settings"):
        predict_file(model, str(digits / "flat"), output, Topology())
    run_ranks(predict_in_small_blocks, 2, model, rows, output)
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()


def test_an_ensemble_of_image_classifiers_predicts_together(
    digits: Path, classifier: Path, tmp_path: Path
) -> None:
    rows = str(digits / "flat")
    predict_file(str(classifier), rows, str(tmp_path / "one.jsonl"), Topology())
    shutil.copytree(classifier, tmp_path / "its copy")
    both = PredictOptions(others=[str(tmp_path / "its copy")])
    predict_file(str(classifier), rows, str(tmp_path / "both.jsonl"), Topology(), both)
    for found, expected in zip(*map(json_lines, tmp_path.glob("*.jsonl")), strict=True):
        assert found["image"] == expected["image"]
        assert found["probability"] == pytest.approx(expected["probability"], abs=1e-9)


@pytest.mark.parametrize(
    ("rows", "options", "problem"),
    [
        ("flat", {"text": "body"}, "--text-column body: the model reads images; --image-column names"),
        (
            "flat",
            {"image": "picture"},
            "--image-column picture is a column of a .parquet file, and .*flat is",
        ),
        (
            "digits.parquet",
            {},
            r"digits.parquet has no column 'image'\. It has 'label' and 'picture'|'picture'",
        ),
        ("gone", {}, "gone does not exist: name a folder of images, or a .parquet file"),
        ("rows.jsonl", {}, r"rows\.jsonl: is no image by its name, which must end in \.png"),
        ("nested", {}, "b: is no image file but a folder"),
        ("empty", {}, "empty has no images: put some there"),
    ],
)
def test_what_is_no_image_is_told_before_the_work(
    digits: Path, classifier: Path, tmp_path: Path, rows: str, options: dict[str, str], problem: str
) -> None:
    (digits / "rows.jsonl").write_text('{"text": "a"}\n')
    (digits / "nested" / "a" / "b").mkdir(parents=True, exist_ok=True)
    (digits / "empty").mkdir(exist_ok=True)
    with pytest.raises((ConfigError, DataError), match=problem):
        predict_file(
            str(classifier),
            str(digits / rows),
            str(tmp_path / "p.jsonl"),
            Topology(),
            PredictOptions(**options),
        )
    assert not list(tmp_path.iterdir())


def test_an_output_among_the_images_is_refused(digits: Path, classifier: Path) -> None:
    folder = digits / "classes"
    for output in (folder / "p.jsonl", folder / "zero" / "p.jsonl"):
        with pytest.raises(ConfigError, match="classes, whose files are images: choose another place"):
            predict_file(str(classifier), str(folder), str(output), Topology())
    assert all(path.is_dir() or path.suffix == ".png" for path in folder.rglob("*"))
