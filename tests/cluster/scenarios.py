"""Runs in which workers fail, one after the other: `python scenarios.py CONFIG FOLDER NAME...`

Prints what each leaves behind as one line of JSON, after what the run itself prints.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from distft.cluster.ray_job import run_on_ray
from distft.cluster.worker import Train
from distft.errors import DataError, DistftError
from distft.run.config import RunConfig
from distft.run.train import Outcome, run_training
from distft.topology import Topology
from distft.train.loop import StopAsked


def killed_once(config: RunConfig, topology: Topology, stop_asked: StopAsked) -> Outcome:
    """Rank 1 dies in training, in the first of its lives."""
    if topology.rank == 1 and _life(config) == 1:
        threading.Thread(target=_die_after_a_commit, args=(config,), daemon=True).start()
    return run_training(config, topology, stop_asked)


def _die_after_a_commit(config: RunConfig) -> None:
    while not (Path(config.run_dir) / "checkpoints" / "step_00000004" / "manifest.json").exists():
        time.sleep(0.005)
    os.kill(os.getpid(), signal.SIGKILL)


def bug_then_mistake(config: RunConfig, topology: Topology, _stop_asked: StopAsked) -> Outcome:
    """Rank 1 fails in a way that nobody foresaw, and in its second life in one that is the user's."""
    if topology.rank == 1:
        if _life(config) == 1:
            raise ZeroDivisionError("a bug\nof two lines")
        raise DataError("rows.jsonl:3: this label was never seen")
    time.sleep(60)
    raise AssertionError("nobody ended this rank")


def _life(config: RunConfig) -> int:
    """How often this has been called for the run."""
    with (Path(config.run_dir) / "lives").open("a+") as file:
        file.write("x")
        file.seek(0)
        return len(file.read())


SCENARIOS: dict[str, Train] = {
    "killed_once": killed_once,
    "bug_then_mistake": bug_then_mistake,
}


def main() -> None:
    config, folder, *names = sys.argv[1:]
    for name in names:
        told = {"name": name, "exit_code": 0, "message": "", "step": None}
        changes = [f"run_dir={folder}/{name}", "cluster.max_failures=3"]
        try:
            outcome = run_on_ray(config, changes, environ=os.environ, train=SCENARIOS[name])
            told["step"] = outcome.step
        except DistftError as error:
            told.update(exit_code=error.exit_code, message=str(error))
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
