"""MLflow and Trackio show one run over restarts, with what evaluations found, and send nothing away."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distft.tracker import MlflowConfig, TensorBoardConfig, Trackers, TrackioConfig, WandbConfig
from distft.tracker.evaluation_tables import pictures_of, tables_of

SECRET = "hunter2hunter2hunter2hunter2hunter2hunter"
RECORD = {
    "classifiers": [
        {
            "stream": "",
            "num_rows": 4,
            "num_wrong": 1,
            "labels": ["a", "b"],
            "confusion": [[3, 0], [1, 0]],
            "mistakes": [{"row": 4, "label": "b", "predicted": "a", "probability": 0.9, "text": "x|<b>\ny"}],
        }
    ],
    "samples": [{"prompt": "the", "text": " cat"}],
}


# From MLflow itself, on SQLAlchemy 2.1.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio_home"))
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "false")  # the tracker's own doing is tested


def _two_starts(config: Any, run_dir: Path) -> None:
    """A start that ends after step 5, and one that resumes after step 3 and computes other losses."""
    for resume_step, factor in ((None, 1.0), (3, 10.0)):
        trackers = Trackers([], [config.build()])
        trackers.start("0123abcd", {"a": {"token": SECRET, "b": 1}}, run_dir, resume_step=resume_step)
        for step in range((resume_step or 0) + 1, 6 if resume_step is None else 8):
            trackers.log({"loss": factor * step}, step=step)
        trackers.event("save", step=3, note=f"password={SECRET}")
        trackers.show(RECORD, step=5 if resume_step is None else 7)
        assert trackers._optional, "it did not fail"
        trackers.finish("preempted" if resume_step is None else "completed", step=7)
        assert trackers._optional, "it did not fail"


def _require_no_secret(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


@pytest.mark.skipif(find_spec("mlflow") is None, reason="needs mlflow: pip install 'distft[mlflow]'")
def test_mlflow_shows_one_run_whose_steps_never_go_back(tmp_path: Path) -> None:
    from mlflow import MlflowClient
    from mlflow.telemetry import get_telemetry_client

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    config = MlflowConfig(
        tracking_uri=uri, project="words", name="mine", tags=("first",), notes="a note", group="g"
    )
    _two_starts(config, tmp_path / "run")
    assert get_telemetry_client() is None
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("words")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.run_name == "mine"
    assert found.info.status == "FINISHED"
    assert found.data.params == {"a.token": "***", "a.b": "1"}
    shown = {name: found.data.tags[name] for name in ("first", "mlflow.note.content", "group", "status")}
    assert shown == {"first": "true", "mlflow.note.content": "a note", "group": "g", "status": "completed"}
    points = client.get_metric_history(found.info.run_id, "loss")
    assert [(point.step, point.value) for point in points] == [
        *((step, float(step)) for step in range(1, 6)),
        *((step, 10.0 * step) for step in (6, 7)),
    ]
    artifacts = {
        file.path
        for folder in ("samples", "mistakes", "confusion")
        for file in client.list_artifacts(found.info.run_id, folder)
    }
    assert artifacts == {
        *(f"{name}/step_0000000{step}.json" for name in ("samples", "mistakes") for step in (5, 7)),
        *(f"confusion/step_0000000{step}.png" for step in (5, 7)),
    }
    text = Path(client.download_artifacts(found.info.run_id, "samples/step_00000007.json")).read_text()
    assert json.loads(text) == {"prompt": ["the"], "text": [" cat"]}
    _require_no_secret(tmp_path)


@pytest.mark.skipif(find_spec("mlflow") is None, reason="needs mlflow: pip install 'distft[mlflow]'")
def test_a_server_that_is_not_there_does_not_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES as RETRIES
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT as TIMEOUT

    monkeypatch.delenv(RETRIES.name, raising=False)
    monkeypatch.setenv(TIMEOUT.name, "3")
    trackers = Trackers([], [MlflowConfig(tracking_uri="http://127.0.0.1:9").build()])
    trackers.start("0123abcd", {}, tmp_path)
    trackers.log({"loss": 1.0}, step=1)
    trackers.finish("completed", step=1)
    assert RETRIES.get() == 1, "by itself MLflow tries for minutes"
    assert TIMEOUT.get() == 3, "what the user has set counts"
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith("MlflowTracker failed and is disabled from here on")


@pytest.mark.skipif(find_spec("trackio") is None, reason="needs trackio: pip install 'distft[trackio]'")
def test_trackio_shows_one_run_whose_steps_never_go_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _two_starts(TrackioConfig(project="words", name="mine", notes="a note"), tmp_path / "run")
    import trackio

    assert trackio.SQLiteStorage.get_runs("words") == ["mine-0123abcd"]
    logs = trackio.SQLiteStorage.get_logs("words", "mine-0123abcd")
    assert [(line["step"], line["loss"]) for line in logs if "loss" in line] == [
        *((step, step) for step in range(1, 6)),
        *((step, 10 * step) for step in (6, 7)),
    ]
    assert [line["step"] for line in logs if "samples" in line] == [5, 7]
    assert "Trackio" not in capsys.readouterr().out
    _require_no_secret(tmp_path)


def test_tensorboard_and_wandb_take_tables_and_pictures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for config in (TensorBoardConfig(), WandbConfig(mode="offline", project="p", name="n", notes="x")):
        trackers = Trackers([], [config.build()])
        trackers.start("0123abcd", {}, tmp_path)
        trackers.show(RECORD, step=5)
        trackers.finish("completed", step=5)
        assert trackers._optional
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [image.step for image in events.Images("confusion")] == [5]
    assert {"samples/text_summary", "mistakes/text_summary"} <= set(events.Tags()["tensors"])
    tables = [path.name for path in tmp_path.rglob("*.table.json")]
    assert {name.partition("_")[0] for name in tables} == {"samples", "mistakes"}


def test_a_table_is_one_and_a_picture_has_the_shares() -> None:
    samples, mistakes = tables_of(RECORD)
    assert (samples.name, samples.rows) == ("samples", [("the", " cat")])
    lines = mistakes.markdown().splitlines()
    assert len(lines) == 3
    assert lines[2] == r"| 4 | b | a | 0.9 | x\|&lt;b> y |"
    ((name, pixels),) = pictures_of(RECORD)
    assert (name, pixels.shape, pixels.dtype) == ("confusion", (32, 32, 3), np.uint8)
    assert pixels[0, 0].tolist() == pixels[16, 0].tolist() == [43, 108, 176]
    assert pixels[0, 16].tolist() == [255, 255, 255]
