"""The status of submitted runs, as data and as text: all in a table, or one with its latest events."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distft.cluster.client.jobs import Job, JobClient
from distft.errors import ConfigError, Preempted
from distft.tracker import EVENTS_FILE, METRICS_FILE
from distft.tracker.number_format import duration, step_line

# Entry points of distft, by which to recognise runs that were not submitted by `distft submit`.
DRIVER_NAMES = ("distft.cli.ray_driver", "launch/ray_train.py")

_TAIL_BYTES = 65_536  # read from the end of an event or metrics file, which grows with the run
_NUM_EVENTS = 5
_CLOCK_SKEW_S = 2.0  # allowed between nodes
_COLUMNS = ("job", "state", "started", "duration", "exit_code", "run_dir")


def is_distft_run(job: Job) -> bool:
    """Whether a job is a run of distft, however it was submitted."""
    return "distft" in job.metadata or any(name in job.entrypoint for name in DRIVER_NAMES)


def require_job(client: JobClient, job_id: str) -> Job:
    """The job with that id. Raises `ConfigError` that lists the known runs if the cluster has no such job."""
    job = client.find(job_id)
    if job is None:
        known = [job.job_id for job in client.submitted() if is_distft_run(job)]
        raise ConfigError(
            f"The cluster at {client.address} has no job {job_id}. "
            + (f"Its runs are {', '.join(known)}." if known else "No run of distft was submitted to it.")
        )
    return job


def describe(job: Job, *, now: float) -> dict[str, Any]:
    """A job as plain data. `now` and all times in seconds since 1970.

    The state is Ray's, or SAVED if the run was asked to stop, and saved: submitted again it goes on.
    """
    ended = now if job.ended is None else job.ended
    return {
        "job": job.job_id,
        "state": _state(job),
        "started": job.started,
        "duration_s": None if job.started is None else max(round(ended - job.started, 3), 0.0),
        "exit_code": job.exit_code,
        "config": job.metadata.get("config"),
        "run_dir": job.metadata.get("run_dir"),
        "message": job.message if job.has_ended and job.exit_code is None else None,
    }


def _state(job: Job) -> str:
    """Ray's word, except for runs that stopped on request: to Ray any exit code but 0 is a failure."""
    return "SAVED" if job.has_ended and job.exit_code == Preempted.exit_code else job.status


def format_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of text with the columns of several jobs, each as `describe` returns it."""
    cells = [
        [name.upper() for name in _COLUMNS],
        *([_as_text(row)[name] for name in _COLUMNS] for row in rows),
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]


def format_job(job: Mapping[str, Any], latest: Mapping[str, Any] | None) -> list[str]:
    """Lines of text about one job, from `describe` and `latest_of_run`."""
    texts = _as_text(job)
    lines = [f"{name:<10} {texts[name]}" for name in (*_COLUMNS, "config")]
    if job["message"]:
        lines.append(f"{'message':<10} {job['message'].strip()}")
    if latest is None:
        return [*lines, f"{'events':<10} not on this machine"]
    if metrics := latest["metrics"]:
        lines.append(
            f"{'step':<10} {metrics['step']} | {step_line(metrics)} | {_local_time(metrics['time'])}"
        )
    for event in latest["events"]:
        fields = {key: value for key, value in event.items() if key not in {"time", "kind"}}
        text = "".join(f" {key}={value}" for key, value in fields.items() if value is not None)
        lines.append(f"{'event':<10} {_local_time(event['time'])} {event['kind']}{text}")
    return lines


def latest_of_run(job: Job) -> dict[str, Any] | None:
    """The last step and the last events that this job wrote; None if its run_dir is not on this machine."""
    run_dir = Path(job.metadata.get("run_dir", ""))
    if not run_dir.is_absolute() or not run_dir.is_dir():
        return None
    # The jobs before and after it that run the same run_dir write to the same files.
    first = (job.started or 0.0) - _CLOCK_SKEW_S
    last = float("inf") if job.ended is None else job.ended + _CLOCK_SKEW_S

    def written_by_job(name: str) -> list[dict[str, Any]]:
        lines = _last_lines(run_dir / name)
        return [line for line in lines if first <= line.get("time", 0.0) <= last]

    steps = [line for line in written_by_job(METRICS_FILE) if "loss" in line]
    return {"metrics": steps[-1] if steps else None, "events": written_by_job(EVENTS_FILE)[-_NUM_EVENTS:]}


def _last_lines(path: Path) -> list[dict[str, Any]]:
    """The last objects of a file of JSON lines, without incomplete lines."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - _TAIL_BYTES, 0))
        lines = file.read().splitlines()
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # reading began within the line, or it is being written
    return [record for record in found if isinstance(record, dict)]


def _as_text(row: Mapping[str, Any]) -> dict[str, str]:
    """The values of `describe` as text."""
    texts = {name: "-" if row[name] is None else str(row[name]) for name in row}
    if row["started"] is not None:
        texts["started"] = _local_time(row["started"])
    texts["duration"] = "-" if row["duration_s"] is None else duration(row["duration_s"])
    return texts


def _local_time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
