"""What is told of jobs, from what a cluster and a run's directory say."""

import json
from pathlib import Path
from typing import Any

import pytest

from distft.cluster.job_status import facts, is_ours, last_record, report, table
from distft.cluster.jobs import Job

STARTED = 1_700_000_000.0


def job(**changes: Any) -> Job:
    told: dict[str, Any] = {
        "job_id": "distft-x-0a1b2c",
        "state": "RUNNING",
        "is_over": False,
        "exit_code": None,
        "started": STARTED,
        "ended": None,
        "message": "Job is currently running.",
        "entrypoint": "true",
        "metadata": {"distft": "0.1.0", "config": "c.yaml", "run_dir": "/nowhere/x"},
        "runtime_env": {},
    }
    return Job(**{**told, **changes})


def test_a_job_in_progress_lasts_until_now_and_one_that_ended_until_then() -> None:
    running = facts(job(), now=STARTED + 61)
    ended = facts(job(state="FAILED", is_over=True, exit_code=75, ended=STARTED + 7), now=STARTED + 61)
    assert (running["duration_s"], ended["duration_s"]) == (61.0, 7.0)
    assert (running["exit_code"], ended["exit_code"]) == (None, 75)
    header, first, second = table([running, ended])
    assert first.split()[-3:] == ["01:01", "-", "/nowhere/x"]
    assert second.split()[-3:] == ["00:07", "75", "/nowhere/x"]
    assert header.index("EXIT_CODE") == second.index("75")


def test_a_job_that_never_ran_says_why() -> None:
    lost = job(state="FAILED", is_over=True, ended=STARTED + 1, message="no room for the driver")
    assert any("no room for the driver" in line for line in report(facts(lost, now=STARTED + 2), None))


@pytest.mark.parametrize(
    ("metadata", "entrypoint", "expected"),
    [
        ({"distft": "0.1.0"}, "true", True),
        ({}, "python launch/ray_train.py c.yaml", True),
        ({}, "python -m distft.cli.ray_driver c.yaml", True),
        ({}, "python other.py", False),
    ],
)
def test_runs_are_known_however_they_were_submitted(
    metadata: dict[str, str], entrypoint: str, expected: bool
) -> None:
    assert is_ours(job(metadata=metadata, entrypoint=entrypoint)) is expected


def test_of_a_runs_record_a_job_tells_its_own_part(tmp_path: Path) -> None:
    """A run that goes on under another job writes to the same files."""
    moments = {"before": -60, "in time": 30, "later": 50, "after": 160}
    events = [{"time": STARTED + after, "kind": name} for name, after in moments.items()]
    metrics = [
        {"time": STARTED + 40, "step": 7, "loss": 2.5},
        {"time": STARTED + 45, "step": 7, "validation/loss": 3},
    ]
    (tmp_path / "events.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in events) + '{"time": 17'
    )
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    ended = job(ended=STARTED + 100, is_over=True, exit_code=0, metadata={"run_dir": str(tmp_path)})
    record = last_record(ended)
    assert record is not None
    assert [event["kind"] for event in record["events"]] == ["in time", "later"]
    assert record["metrics"]["step"] == 7
    lines = report(facts(ended, now=STARTED), record)
    assert any(line.startswith("step       7 | loss 2.5000") for line in lines)


def test_a_long_record_is_read_from_its_end(tmp_path: Path) -> None:
    line = json.dumps({"time": STARTED + 1, "step": 1, "loss": 1.0, "padding": "x" * 1000}) + "\n"
    (tmp_path / "metrics.jsonl").write_text(line * 200 + line.replace('"step": 1', '"step": 2'))
    record = last_record(job(metadata={"run_dir": str(tmp_path)}))
    assert record is not None
    assert record["metrics"]["step"] == 2


@pytest.mark.parametrize("run_dir", ["", "~/distft/runs/x", "runs/x", "/nowhere/x"])
def test_a_run_directory_that_may_be_another_machines_is_not_read(run_dir: str) -> None:
    assert last_record(job(metadata={"run_dir": run_dir})) is None
