"""All trackers get the same metrics without secrets; a failing optional tracker does not end the run."""

import json
import logging
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distft.config import parse
from distft.errors import ConfigError, StorageError
from distft.tracker import (
    JsonlTracker,
    MlflowConfig,
    TensorBoardConfig,
    TrackerConfig,
    Trackers,
    TrackioConfig,
    WandbConfig,
    build_trackers,
    read_lines,
)

SECRET = "hunter2hunter2hunter2hunter2hunter2hunter"  # 41 characters, as a wandb key may have
CONFIG = {
    "wandb_api_key": SECRET,
    "data": {"path": f"s3://me:{SECRET}@host/x"},
    "tokenizer": {"vocab_size": 512},
    "overrides": [f"service.token={SECRET}"],
}


class Recorder:
    """A tracker that records its calls, and fails in the method `fails_at`."""

    def __init__(self, fails_at: str = "", error: Exception | None = None) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._fails_at = fails_at
        self._error = error or OSError("no network")

    def _record(self, *call: Any) -> None:
        self.calls.append(call)
        if call[0] == self._fails_at:
            raise self._error

    def start(self, run_id: str, config: Any, run_dir: Path, *, resume_step: int | None = None) -> None:
        self._record("start", run_id, config, run_dir, resume_step)

    def log(self, metrics: Mapping[str, float | int], *, step: int) -> None:
        self._record("log", dict(metrics), step)

    def show(self, record: Mapping[str, Any], *, step: int) -> None:
        self._record("show", dict(record), step)

    def event(self, kind: str, **fields: Any) -> None:
        self._record("event", kind, fields)

    def finish(self, status: str) -> None:
        self._record("finish", status)


def run(trackers: Trackers, run_dir: Path) -> None:
    trackers.start("run", CONFIG, run_dir, resume_step=3)
    trackers.log({"loss": np.float32(0.5), "tokens_seen": np.int64(7)}, step=4)
    trackers.event("save", step=4, url=f"s3://me:{SECRET}@host")
    trackers.log({"loss": 0.25}, step=5)
    trackers.show({"samples": [{"prompt": f"token={SECRET}", "text": "x"}]}, step=5)
    trackers.finish("completed", step=5)


def test_all_trackers_get_the_same_plain_numbers_and_no_secret(tmp_path: Path) -> None:
    one, two = Recorder(), Recorder()
    run(Trackers([one], [two]), tmp_path)
    assert one.calls == two.calls
    assert [call[0] for call in one.calls] == ["start", "log", "event", "log", "show", "finish"]
    assert one.calls[0][2]["tokenizer"] == {"vocab_size": 512}
    assert one.calls[1] == ("log", {"loss": 0.5, "tokens_seen": 7}, 4)
    assert type(one.calls[1][1]["tokens_seen"]) is int
    assert SECRET not in repr(one.calls)


@pytest.mark.parametrize("fails_at", ["start", "log", "event", "show", "finish"])
def test_a_failing_optional_tracker_warns_once_and_the_run_continues(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fails_at: str
) -> None:
    good, bad, later = Recorder(), Recorder(fails_at), Recorder()
    with caplog.at_level(logging.WARNING):
        run(Trackers([good], [bad, later]), tmp_path)
    assert good.calls == later.calls
    assert len(good.calls) == 6
    assert bad.calls[-1][0] == fails_at
    assert [record.getMessage() for record in caplog.records] == [
        "Recorder failed and is disabled from here on (OSError: no network)"
    ]


def test_a_failing_required_tracker_ends_the_run_and_the_others_finish(tmp_path: Path) -> None:
    first, second = Recorder("finish", StorageError("full")), Recorder()
    with pytest.raises(StorageError, match="full"):
        run(Trackers([first, second]), tmp_path)
    assert second.calls[-1] == ("finish", "completed")
    failed = Trackers([Recorder("finish", StorageError("full"))])
    failed.start("run", {}, tmp_path)
    failed.finish("failed", step=1)  # the run raises its own error


def test_events_and_the_final_status_are_in_the_events_file(tmp_path: Path) -> None:
    run(Trackers([JsonlTracker()]), tmp_path)
    save, finish = read_lines(tmp_path / "events.jsonl")
    assert (save["kind"], save["step"], finish["status"], finish["step"]) == ("save", 4, "completed", 5)
    assert save["start_id"] == finish["start_id"]
    assert SECRET not in (tmp_path / "events.jsonl").read_text()


def test_events_of_several_threads_do_not_meet_in_a_tracker(tmp_path: Path) -> None:
    class Meeting(Recorder):
        num_inside = 0

        def _record(self, *call: Any) -> None:
            super()._record(*call)
            assert self.num_inside == 0
            self.num_inside += 1
            time.sleep(0.001)
            self.num_inside -= 1

    trackers = Trackers([Meeting()])
    trackers.start("run", {}, tmp_path)
    with ThreadPoolExecutor(3) as pool:
        events = [pool.submit(trackers.event, "save", step=step) for step in range(20)]
        logs = [pool.submit(trackers.log, {"loss": 1.0}, step=step) for step in range(20)]
        ending = pool.submit(trackers.finish, "completed", step=20)
        late = [pool.submit(trackers.event, "save", step=step) for step in range(20, 30)]
        for future in (*events, *logs, ending, *late):
            future.result()


def test_without_trackers_nothing_is_written(tmp_path: Path) -> None:
    run(Trackers(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_trackers_are_chosen_by_type(tmp_path: Path) -> None:
    config = parse(TrackerConfig, {"type": "tensorboard", "flush_s": 5})
    assert config == TensorBoardConfig(flush_s=5)
    run(build_trackers([config], max_steps=10, show=False), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "evaluations.jsonl",
        "events.jsonl",
        "metrics.jsonl",
        "tensorboard",
    ]


def tensorboard_scalars(run_dir: Path) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(scalar.step, scalar.value) for scalar in events.Scalars("loss")]


def test_tensorboard_shows_the_final_history_after_a_resume(tmp_path: Path) -> None:
    for resume_step, marks in [(None, range(1, 6)), (3, range(4, 8))]:
        tracker = TensorBoardConfig().build()
        tracker.start("run", {"tokenizer": "x"}, tmp_path, resume_step=resume_step)
        for step in marks:
            tracker.log({"loss": step + (resume_step or 0) / 10}, step=step)
        tracker.event("save", step=3)
        tracker.finish("completed")
    assert tensorboard_scalars(tmp_path) == [
        (step, pytest.approx(value))
        for step, value in [(1, 1), (2, 2), (3, 3), (4, 4.3), (5, 5.3), (6, 6.3), (7, 7.3)]
    ]


@pytest.mark.parametrize(
    "config", [TensorBoardConfig(), WandbConfig(), MlflowConfig(), TrackioConfig()], ids=lambda c: c.type
)
def test_a_missing_package_is_an_error_before_the_run(
    monkeypatch: pytest.MonkeyPatch,
    config: TensorBoardConfig | WandbConfig | MlflowConfig | TrackioConfig,
) -> None:
    monkeypatch.setitem(sys.modules, config.type, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match="pip install"):
        config.build()


def test_wandb_works_offline_continues_its_run_and_writes_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setattr(sys, "argv", ["distft", f"service.password={SECRET}"])
    for resume_step, last_step in ((None, 5), (3, 8)):
        tracker = WandbConfig(mode="offline", tags=("a",)).build()
        trackers = Trackers([], [tracker])
        trackers.start("run", CONFIG, tmp_path, resume_step=resume_step)
        assert tracker._run is not None
        assert tracker._run.id == (tmp_path / "wandb" / "run_id.txt").read_text().strip()
        print(f"password is {SECRET}")
        for step in range((resume_step or 0) + 1, last_step + 1):
            trackers.log({"loss": 1 / step, "bad": float("nan")}, step=step)
        trackers.event("save", step=3)
        assert dict(tracker._run.summary)["loss"] == pytest.approx(1 / last_step)
        trackers.finish("completed", step=1)
        assert trackers._optional == [tracker]  # it did not fail
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.suffix == ".wandb" for path in files) == 2
    assert any(b"vocab_size" in path.read_bytes() for path in files)
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


def test_trackers_get_a_config_that_is_json(tmp_path: Path) -> None:
    recorder = Recorder()
    trackers = Trackers([recorder])
    trackers.start("run", {"a": (1, 2), "b": {"c": None}}, tmp_path)
    assert json.loads(json.dumps(recorder.calls[0][2])) == {"a": [1, 2], "b": {"c": None}}
    trackers.finish("completed", step=1)
