"""Services show one run over restarts, with what evaluations found, and none of its secrets."""

import json
import struct
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from distft.tracker import MlflowConfig, TensorBoardConfig, Trackers, TrackioConfig, WandbConfig
from distft.tracker.evaluation_tables import pictures_of, tables_of
from distft.tracker.logged_steps import LoggedSteps

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


def test_trackio_in_a_space_is_sent_no_step_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trackio itself is a double here: a Space is a server elsewhere."""
    trackio = pytest.importorskip("trackio")
    sent: list[tuple[int, dict[str, Any]]] = []
    names = set()

    def init(**settings: Any) -> SimpleNamespace:
        names.add((settings["space_id"], settings["name"]))
        return SimpleNamespace(log=lambda values, step: sent.append((step, dict(values))))

    monkeypatch.setattr(trackio, "init", init)
    monkeypatch.setattr(trackio, "finish", lambda: None)
    _two_starts(TrackioConfig(space_id="me/words"), tmp_path)
    assert names == {("me/words", "0123abcd")}
    assert [(step, values["loss"]) for step, values in sent if "loss" in values] == [
        *((step, float(step)) for step in range(1, 6)),
        *((step, 10.0 * step) for step in (6, 7)),
    ]
    assert [step for step, values in sent if "samples" in values] == [5, 7]


def test_wandb_shows_one_run_whose_steps_never_go_back(tmp_path: Path) -> None:
    _two_starts(WandbConfig(mode="offline", project="p", name="mine"), tmp_path / "run")
    run_id = (tmp_path / "run" / "wandb" / "run_id.txt").read_text().strip()
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"), key=_first_time)
    assert [path.stem for path in files] == [f"run-{run_id}"] * 2, "of one run"
    rows = [row for path in files for row in _wandb_rows(path)]
    assert [(row["step"], row["loss"]) for row in rows if "loss" in row] == [
        *((step, float(step)) for step in range(1, 6)),
        *((step, 10.0 * step) for step in (6, 7)),
    ]
    assert [row["step"] for row in rows if any(name.startswith("samples") for name in row)] == [5, 7]
    _require_no_secret(tmp_path)


def test_an_evaluation_in_which_a_start_ended_is_logged_by_the_next(tmp_path: Path) -> None:
    """The training's metrics of that step are there already."""
    config = WandbConfig(mode="offline")
    for loss, accuracy in ((1.0, None), (2.0, 0.5)):
        trackers = Trackers([], [config.build()])
        trackers.start("0123abcd", {}, tmp_path)
        trackers.log({"loss": loss}, step=5)
        if accuracy is not None:
            trackers.log({"validation/accuracy": accuracy}, step=5)
        trackers.finish("failed", step=5)
    rows = [row for path in sorted(tmp_path.rglob("*.wandb"), key=_first_time) for row in _wandb_rows(path)]
    assert [{name: row[name] for name in row if name[0] != "_"} for row in rows] == [
        {"loss": 1.0, "step": 5},
        {"validation/accuracy": 0.5, "step": 5},
    ]


def test_what_a_disabled_wandb_was_not_sent_is_logged_later(tmp_path: Path) -> None:
    for mode in ("disabled", "offline"):
        trackers = Trackers([], [WandbConfig(mode=mode).build()])
        trackers.start("0123abcd", {}, tmp_path)
        trackers.log({"loss": 1.0}, step=5)
        trackers.finish("failed", step=5)
        assert trackers._optional, "it did not fail"
    (file,) = tmp_path.rglob("*.wandb")
    assert [row["step"] for row in _wandb_rows(file)] == [5]


@pytest.mark.parametrize(
    "damage", [None, b"", b"[]", b"{", b'{"run": "a", "steps": 1}', b"[" * 9_000], ids=range(6)
)
def test_steps_count_for_the_run_that_was_sent_them(tmp_path: Path, damage: bytes | None) -> None:
    path = tmp_path / "logged_steps.json"
    assert LoggedSteps(path, "a").new_of({"loss": 1.0}, 5) == {"loss": 1.0}
    assert LoggedSteps(path, "a").new_of({"loss": 1.0, "lr": 2.0}, 5) == {"lr": 2.0}
    assert LoggedSteps(path, "a").new_of({"loss": 1.0}, 6) == {"loss": 1.0}
    if damage is not None:
        path.write_bytes(damage)
    assert LoggedSteps(path, "b" if damage is None else "a").new_of({"loss": 1.0}, 1) == {"loss": 1.0}


def _wandb_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The points in wandb's file of an offline run, which a process of wandb's ends after `finish`."""
    give_up_s = time.monotonic() + 60
    while not any(record.HasField("exit") for record in _wandb_records(path)):
        assert time.monotonic() < give_up_s, f"{path} has no end"
        time.sleep(0.05)
    for record in _wandb_records(path):
        if record.HasField("history"):
            items = record.history.item
            yield {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def _first_time(path: Path) -> float:
    return min(row["_timestamp"] for row in _wandb_rows(path))


def _wandb_records(path: Path) -> Iterator[Any]:
    """A log in LevelDB's format of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts = path.read_bytes(), 7, b""  # after the file's own header
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # no header fits: zeros to the block's end
            place += 32768 - place % 32768
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in {1, 4} and place <= len(data):  # a whole record, or the last part of one
            yield Record.FromString(parts)
            parts = b""


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
