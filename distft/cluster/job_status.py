"""What there is to say of submitted runs: a table of all, or one with the last that its directory tells."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distft.cluster.jobs import Job, Jobs
from distft.errors import ConfigError
from distft.tracker import EVENTS_FILE, METRICS_FILE
from distft.tracker.display import duration, step_line

DRIVER_NAMES = (
    "distft.cli.ray_driver",
    "launch/ray_train.py",
)  # by which jobs are known that others submitted

_TAIL_BYTES = 65_536  # of a record that may be as long as the run
_NUM_EVENTS = 5
_CLOCKS_S = 2.0  # by which those of nodes may differ
_COLUMNS = ("job", "state", "started", "duration", "exit_code", "run_dir")


def is_ours(job: Job) -> bool:
    """Whether a job is a run of distft, however it was submitted."""
    return "distft" in job.metadata or any(name in job.entrypoint for name in DRIVER_NAMES)


def require(jobs: Jobs, job_id: str) -> Job:
    """The job of that id. Raises `ConfigError`, which names those that there are."""
    job = jobs.find(job_id)
    if job is None:
        known = [job.job_id for job in jobs.submitted() if is_ours(job)]
        raise ConfigError(
            f"The cluster at {jobs.address} knows no job {job_id}. "
            + (f"It knows {', '.join(known)}." if known else "It has run nothing of distft.")
        )
    return job


def facts(job: Job, *, now: float) -> dict[str, Any]:
    """A job as plain data. `now` and all times in seconds since 1970."""
    ended = now if job.ended is None else job.ended
    return {
        "job": job.job_id,
        "state": job.state,
        "started": job.started,
        "duration_s": None if job.started is None else max(round(ended - job.started, 3), 0.0),
        "exit_code": job.exit_code,
        "config": job.metadata.get("config"),
        "run_dir": job.metadata.get("run_dir"),
        "message": job.message if job.is_over and job.exit_code is None else None,
    }


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of text with `facts` in columns."""
    cells = [[name.upper() for name in _COLUMNS], *([_text(row)[name] for name in _COLUMNS] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]


def report(job: Mapping[str, Any], record: Mapping[str, Any] | None) -> list[str]:
    """Lines of text about one job: its `facts`, and its run's `last_record` where that is to be had."""
    texts = _text(job)
    lines = [f"{name:<10} {texts[name]}" for name in (*_COLUMNS, "config")]
    if job["message"]:
        lines.append(f"{'message':<10} {job['message'].strip()}")
    if record is None:
        return [*lines, f"{'events':<10} not on this machine"]
    if metrics := record["metrics"]:
        lines.append(f"{'step':<10} {metrics['step']} | {step_line(metrics)} | {_clock(metrics['time'])}")
    for event in record["events"]:
        rest = {key: value for key, value in event.items() if key not in {"time", "kind"}}
        said = "".join(f" {key}={value}" for key, value in rest.items() if value is not None)
        lines.append(f"{'event':<10} {_clock(event['time'])} {event['kind']}{said}")
    return lines


def last_record(job: Job) -> dict[str, Any] | None:
    """The last events and step of the job's run, of this job alone; None where its run_dir is not here."""
    run_dir = Path(job.metadata.get("run_dir", ""))
    if not run_dir.is_absolute() or not run_dir.is_dir():
        return None
    first = (job.started or 0.0) - _CLOCKS_S
    last = float("inf") if job.ended is None else job.ended + _CLOCKS_S

    def of_this_job(name: str) -> list[dict[str, Any]]:
        lines = _last_lines(run_dir / name)
        return [line for line in lines if first <= line.get("time", 0.0) <= last]

    steps = [line for line in of_this_job(METRICS_FILE) if "loss" in line]
    return {"metrics": steps[-1] if steps else None, "events": of_this_job(EVENTS_FILE)[-_NUM_EVENTS:]}


def _last_lines(path: Path) -> list[dict[str, Any]]:
    """The last objects of a file of JSON lines; torn lines are left out."""
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
            continue  # cut by where reading began, or not yet whole
    return [record for record in found if isinstance(record, dict)]


def _text(row: Mapping[str, Any]) -> dict[str, str]:
    """`facts` as people read them."""
    texts = {name: "-" if row[name] is None else str(row[name]) for name in row}
    if row["started"] is not None:
        texts["started"] = _clock(row["started"])
    texts["duration"] = "-" if row["duration_s"] is None else duration(row["duration_s"])
    return texts


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
