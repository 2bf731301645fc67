"""launch/ray_train.py for chaos.py: `python chaos_driver.py BRAKE ours|ray CONFIG [KEY=VALUE]...`

The run goes slowly while the file BRAKE is there. With `ray`, restarts are what Ray Train makes of them.
"""

import contextlib
import os
import sys
import time
from functools import partial
from pathlib import Path

from distft.cli.ray_driver import main
from distft.run.config import RunConfig
from distft.run.train import Outcome, run_training
from distft.topology import Topology
from distft.train.loop import StopAsked, StopReason

_PAUSE_S = 3.0  # a step; below the time after which a rank is taken to hang


def train_slowly(brake: Path, config: RunConfig, topology: Topology, stop_asked: StopAsked) -> Outcome:
    """As any run, in which every step waits while `brake` exists."""

    def reason() -> StopReason | None:
        if brake.exists():
            time.sleep(_PAUSE_S)
        return stop_asked()

    return run_training(config, topology, reason)


def leave_restarts_to_ray() -> None:
    """Take back what distft does for them; to compare."""
    from distft.cluster import ray_job

    os.environ.update(
        RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="2",
        RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="60",
        RAY_TRAIN_ENABLE_PREEMPTION_WATCHER="1",
    )
    module = vars(ray_job)
    module.update(_Trainer=module["TorchTrainer"], reservation_of=contextlib.nullcontext)


if __name__ == "__main__":
    _, brake_file, restarts, *rest = sys.argv
    if restarts == "ray":
        leave_restarts_to_ray()
    sys.exit(main(rest, train=partial(train_slowly, Path(brake_file))))
