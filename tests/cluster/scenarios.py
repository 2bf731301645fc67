"""Runs whose workers fail, one run after the other: `python scenarios.py CONFIG FOLDER NAME...`

After the output of each run, prints its result as one line of JSON.
"""

import gc
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import ray
from ray._private.state import actors

from distft.cluster.driver.driver import run_on_ray
from distft.cluster.worker import TrainFn
from distft.errors import DataError, DistftError
from distft.run.config import RunConfig
from distft.run.train import RunResult, run_training
from distft.topology import Topology
from distft.train.services import StopRequested


def killed_once(config: RunConfig, topology: Topology, stop_requested: StopRequested) -> RunResult:
    """Rank 1 is killed in training, in its first start. In its second it describes its process."""
    if topology.rank == 1:
        if _num_starts(config) == 1:
            threading.Thread(target=_kill_after_a_commit, args=(config,), daemon=True).start()
        else:
            process = {
                "actors": _actor_classes_of_this_job(),
                "full_collections": gc.get_stats()[2]["collections"],
                "collects_garbage": gc.isenabled(),
            }
            (Path(config.run_dir) / "second_start.json").write_text(json.dumps(process))
    return run_training(config, topology, stop_requested)


def _actor_classes_of_this_job() -> list[str]:
    """The class of each actor that was started for the run, those included that have ended."""
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    return [actor["ActorClassName"] for actor in actors(job_id=job).values()]


def _kill_after_a_commit(config: RunConfig) -> None:
    while not (Path(config.run_dir) / "checkpoints" / "step_00000004" / "manifest.json").exists():
        time.sleep(0.005)
    os.kill(os.getpid(), signal.SIGKILL)


def bug_then_mistake(config: RunConfig, topology: Topology, _stop_requested: StopRequested) -> RunResult:
    """Rank 1 raises an unexpected error in its first start, and a user's error in its second."""
    if topology.rank == 1:
        if _num_starts(config) == 1:
            raise ZeroDivisionError("a bug\nof two lines")
        raise DataError("rows.jsonl:3: this label was never seen")
    time.sleep(60)
    raise AssertionError("nobody ended this rank")


def _num_starts(config: RunConfig) -> int:
    """How often this was called for the run, this call included."""
    with (Path(config.run_dir) / "starts").open("a+") as file:
        file.write("x")
        file.seek(0)
        return len(file.read())


SCENARIOS: dict[str, TrainFn] = {
    "killed_once": killed_once,
    "bug_then_mistake": bug_then_mistake,
}


def main() -> None:
    config, folder, *names = sys.argv[1:]
    for name in names:
        outcome = {"name": name, "exit_code": 0, "message": "", "step": None}
        overrides = [f"run_dir={folder}/{name}", "cluster.max_failures=3"]
        try:
            result = run_on_ray(config, overrides, environ=os.environ, train=SCENARIOS[name])
            outcome["step"] = result.step
        except DistftError as error:
            outcome.update(exit_code=error.exit_code, message=str(error))
        print(json.dumps(outcome), flush=True)


if __name__ == "__main__":
    main()
