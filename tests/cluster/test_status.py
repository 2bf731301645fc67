"""The status of jobs, from the cluster's record and the run's directory."""

import json
from pathlib import Path
from typing import Any

import pytest

from distft.cluster.client.jobs import Job
from distft.cluster.client.status import describe, format_job, format_table, is_distft_run, latest_of_run

STARTED = 1_700_000_000.0


def job(**changes: Any) -> Job:
    fields: dict[str, Any] = {
        "job_id": "distft-x-0a1b2c",
        "status": "RUNNING",
        "has_ended": False,
        "exit_code": None,
        "started": STARTED,
        "ended": None,
        "message": "Job is currently running.",
        "entrypoint": "true",
        "metadata": {"distft": "0.1.0", "config": "c.yaml", "run_dir": "/nowhere/x"},
        "runtime_env": {},
    }
    return Job(**{**fields, **changes})


def test_the_duration_ends_with_the_job_or_now() -> None:
    running = describe(job(), now=STARTED + 61)
    ended = describe(job(status="FAILED", has_ended=True, exit_code=75, ended=STARTED + 7), now=STARTED + 61)
    assert (running["duration_s"], ended["duration_s"]) == (61.0, 7.0)
    assert (running["exit_code"], ended["exit_code"]) == (None, 75)
    assert (running["state"], ended["state"]) == ("RUNNING", "SAVED")  # to Ray 75 is a failure
    header, first, second = format_table([running, ended])
    assert first.split()[-3:] == ["01:01", "-", "/nowhere/x"]
    assert second.split()[-3:] == ["00:07", "75", "/nowhere/x"]
    assert header.index("EXIT_CODE") == second.index("75")


def test_a_job_that_never_ran_shows_the_clusters_message() -> None:
    lost = job(status="FAILED", has_ended=True, ended=STARTED + 1, message="no resources for the driver")
    assert any(
        "no resources for the driver" in line for line in format_job(describe(lost, now=STARTED + 2), None)
    )


@pytest.mark.parametrize(
    ("metadata", "entrypoint", "expected"),
    [
        ({"distft": "0.1.0"}, "true", True),
        ({}, "python launch/ray_train.py c.yaml", True),
        ({}, "python -m distft.cli.ray_driver c.yaml", True),
        ({}, "python other.py", False),
    ],
)
def test_runs_are_recognised_however_they_were_submitted(
    metadata: dict[str, str], entrypoint: str, expected: bool
) -> None:
    assert is_distft_run(job(metadata=metadata, entrypoint=entrypoint)) is expected


def test_a_job_shows_only_the_events_and_steps_that_it_wrote(tmp_path: Path) -> None:
    """Another job that continues the run writes to the same files."""
    seconds_after_start = {"before": -60, "in time": 30, "later": 50, "after": 160}
    events = [{"time": STARTED + after, "kind": name} for name, after in seconds_after_start.items()]
    metrics = [
        {"time": STARTED + 40, "step": 7, "loss": 2.5},
        {"time": STARTED + 45, "step": 7, "validation/loss": 3},
    ]
    (tmp_path / "events.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in events) + '{"time": 17'
    )
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    ended = job(ended=STARTED + 100, has_ended=True, exit_code=0, metadata={"run_dir": str(tmp_path)})
    latest = latest_of_run(ended)
    assert latest is not None
    assert [event["kind"] for event in latest["events"]] == ["in time", "later"]
    assert latest["metrics"]["step"] == 7
    lines = format_job(describe(ended, now=STARTED), latest)
    assert any(line.startswith("step       7 | loss 2.5000") for line in lines)


def test_the_last_step_of_a_long_run_is_found(tmp_path: Path) -> None:
    line = json.dumps({"time": STARTED + 1, "step": 1, "loss": 1.0, "padding": "x" * 1000}) + "\n"
    (tmp_path / "metrics.jsonl").write_text(line * 200 + line.replace('"step": 1', '"step": 2'))
    latest = latest_of_run(job(metadata={"run_dir": str(tmp_path)}))
    assert latest is not None
    assert latest["metrics"]["step"] == 2


@pytest.mark.parametrize("run_dir", ["", "~/distft/runs/x", "runs/x", "/nowhere/x"])
def test_a_run_directory_on_another_machine_is_not_read(run_dir: str) -> None:
    assert latest_of_run(job(metadata={"run_dir": run_dir})) is None
