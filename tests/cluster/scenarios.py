"""Runs in which workers fail, one after the other: `python scenarios.py CONFIG FOLDER NAME...`

Prints what each leaves behind as one line of JSON, after what the run itself prints.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from distft.cluster.ray_job import run_on_ray
from distft.errors import DataError, DistftError, Preempted
from distft.run.config import RunConfig
from distft.run.train import Outcome, run_training
from distft.topology import Topology


def killed_once(config: RunConfig, topology: Topology) -> Outcome:
    """Rank 1 dies in training, in the first of two lives."""
    if topology.rank == 1 and not _first_time(config, "killed"):
        threading.Thread(target=_die_after_a_commit, args=(config,), daemon=True).start()
    return run_training(config, topology)


def _die_after_a_commit(config: RunConfig) -> None:
    while not (Path(config.run_dir) / "checkpoints" / "step_00000004" / "manifest.json").exists():
        time.sleep(0.005)
    os.kill(os.getpid(), signal.SIGKILL)


def _first_time(config: RunConfig, what: str) -> bool:
    """Whether this has been called before for the run."""
    mark = Path(config.run_dir) / what
    was_there = mark.exists()
    mark.touch()
    return was_there


def unforeseen(config: RunConfig, topology: Topology) -> Outcome:  # noqa: ARG001
    if topology.rank == 1:
        raise ZeroDivisionError("a bug\nof two lines")
    return _wait()


def user_mistake(config: RunConfig, topology: Topology) -> Outcome:
    with (Path(config.run_dir) / f"lives_{topology.rank}").open("a") as file:
        file.write("x")
    if topology.rank == 1:
        raise DataError("rows.jsonl:3: this label was never seen")
    return _wait()


def preempted(config: RunConfig, topology: Topology) -> Outcome:  # noqa: ARG001
    raise Preempted("Stopped at step 3 as asked; start again to go on from there.")


def _wait() -> Outcome:
    time.sleep(60)
    raise AssertionError("nobody ended this rank")


SCENARIOS: dict[str, Callable[[RunConfig, Topology], Outcome]] = {
    "killed_once": killed_once,
    "unforeseen": unforeseen,
    "user_mistake": user_mistake,
    "preempted": preempted,
}


def main() -> None:
    config, folder, *names = sys.argv[1:]
    for name in names:
        told = {"name": name, "exit_code": 0, "message": "", "step": None}
        changes = [f"run_dir={folder}/{name}", f"cluster.max_failures={int(name != 'unforeseen')}"]
        try:
            outcome = run_on_ray(config, changes, environ=os.environ, train=SCENARIOS[name])
            told["step"] = outcome.step
        except DistftError as error:
            told.update(exit_code=error.exit_code, message=str(error))
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
