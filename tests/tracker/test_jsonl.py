"""The metrics file has every step of the final history once, after any crashes and resumes."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distft.errors import StorageError
from distft.tracker import EventLog, JsonlTracker, read_lines
from distft.tracker.jsonl import LineWriter


def attempt(run_dir: Path, steps: range, *, resume_step: int | None, mark: int) -> None:
    tracker = JsonlTracker(clock=lambda: 1.0)
    tracker.start("run", {}, run_dir, resume_step=resume_step)
    for step in steps:
        tracker.log({"loss": step / 2, "mark": mark}, step=step)
    # No finish: the attempt crashes here.


@given(crashes=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12)), max_size=4), torn=st.booleans())
def test_after_crashes_and_resumes_every_step_appears_once(
    tmp_path_factory: pytest.TempPathFactory, crashes: list[tuple[int, int]], torn: bool
) -> None:
    run_dir = tmp_path_factory.mktemp("run")
    reached, resume = 0, None
    for mark, (length, back) in enumerate(crashes):
        start = resume or 0
        reached = start + length
        attempt(run_dir, range(start + 1, reached + 1), resume_step=resume, mark=mark)
        if torn:
            with (run_dir / "metrics.jsonl").open("a") as file:
                file.write('{"step": 1, "lo')
        resume = max(reached - back, 0) or None
    start = resume or 0
    attempt(run_dir, range(start + 1, 61), resume_step=resume, mark=-1)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 61))
    assert all((line["mark"] == -1) == (line["step"] > start) for line in lines)


def test_two_starts_that_overlap_log_every_step_once(tmp_path: Path) -> None:
    old, new = JsonlTracker(), JsonlTracker()
    old.start("run", {}, tmp_path)
    for step in (1, 2):
        old.log({"loss": 1.0}, step=step)
    new.start("run", {}, tmp_path, resume_step=2)  # nothing is to be dropped
    for step in (3, 4):
        old.log({"loss": 1.0}, step=step)
        new.log({"loss": 2.0}, step=step)
    for tracker in (old, new):
        tracker.finish("completed")
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]


def test_a_line_is_written_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    tracker = JsonlTracker(clock=lambda: 12.34567)
    tracker.start("run", {}, tmp_path)
    tracker.log({"loss": 1.5, "tokens_seen": 3}, step=1)
    assert (
        tmp_path / "metrics.jsonl"
    ).read_text() == '{"step": 1, "time": 12.346, "loss": 1.5, "tokens_seen": 3}\n'
    tracker.finish("completed")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -np.inf, torch.tensor(float("nan"))])
def test_nan_and_infinity_are_null(tmp_path: Path, value: Any) -> None:
    tracker = JsonlTracker()
    tracker.start("run", {}, tmp_path)
    tracker.log({"loss": value}, step=1)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail)["loss"] is None
    tracker.finish("completed")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (np.float32(0.5), "0.5"),
        (np.int64(3), "3"),
        (torch.tensor(2.5), "2.5"),
        (torch.tensor(7), "7"),
        (True, "1"),
    ],
)
def test_scalars_of_any_library_become_numbers(tmp_path: Path, value: Any, text: str) -> None:
    tracker = JsonlTracker()
    tracker.start("run", {}, tmp_path)
    tracker.log({"x": value}, step=1)
    assert (tmp_path / "metrics.jsonl").read_text().endswith(f'"x": {text}}}\n')
    tracker.finish("completed")


def test_events_of_all_attempts_are_kept(tmp_path: Path) -> None:
    for attempt_number in range(2):
        events = EventLog(tmp_path, clock=lambda: 5.0)
        events.write(
            "start", attempt=attempt_number, path=tmp_path, sizes=(1, float("nan")), more={"é": None}
        )
        events.close()
    first, second = read_lines(tmp_path / "events.jsonl")
    assert first == {
        "time": 5.0, "kind": "start", "attempt": 0, "path": str(tmp_path), "sizes": [1, None],
        "more": {"é": None},
    }  # fmt: skip
    assert second["attempt"] == 1


def test_of_several_that_write_an_event_one_does_and_earlier_attempts_do_not_count(
    tmp_path: Path,
) -> None:
    key = {"rank": 1, "host": "a", "pid": 7}

    def write(number: int) -> None:
        events = EventLog(tmp_path)
        events.write_once("hang", key, since=begun, found_by=number, stack=["one", "two"])
        events.close()

    for attempt in range(2):
        begun = round(time.time(), 3)  # as events have it
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(write, range(8)))
        found = read_lines(tmp_path / "events.jsonl")
        assert [record["kind"] for record in found] == ["hang"] * (attempt + 1)
        time.sleep(0.002)
    other = EventLog(tmp_path)
    other.write_once("hang", {**key, "pid": 8}, since=0.0)
    assert len(read_lines(tmp_path / "events.jsonl")) == 3


def test_a_torn_line_does_not_damage_the_next(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_bytes(b'{"kind": "star')
    events = EventLog(tmp_path)
    events.write("resume")
    events.close()
    assert [line["kind"] for line in read_lines(tmp_path / "events.jsonl")] == ["resume"]


def test_a_full_disk_is_a_storage_error() -> None:
    lines = LineWriter(Path("/dev/full"))
    with pytest.raises(StorageError, match=r"/dev/full: cannot write a line .*Free some space"):
        lines.append({"step": 1})
