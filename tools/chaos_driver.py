"""launch/ray_train.py for chaos.py: `python chaos_driver.py BRAKE distft|ray CONFIG [KEY=VALUE]...`

Steps take seconds while the file BRAKE exists. With `ray`, Ray Train restarts workers by its own defaults.
"""

import contextlib
import os
import sys
import time
from functools import partial
from pathlib import Path

from distft.cli.ray_driver import main
from distft.run.config import RunConfig
from distft.run.train import RunResult, run_training
from distft.topology import Topology
from distft.train.services import StopReason, StopRequested

_PAUSE_S = 3.0  # per step; shorter than hang_timeout_s


def train_slowly(
    brake: Path, config: RunConfig, topology: Topology, stop_requested: StopRequested
) -> RunResult:
    """Train, but pause in every step while the file `brake` exists."""

    def pausing_stop_requested() -> StopReason | None:
        if brake.exists():
            time.sleep(_PAUSE_S)
        return stop_requested()

    return run_training(config, topology, pausing_stop_requested)


def leave_restarts_to_ray() -> None:
    """Undo what distft changes about Ray Train's restarts."""
    from distft.cluster.driver import ray_run

    os.environ.update(
        RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="2",
        RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="60",
        RAY_TRAIN_ENABLE_PREEMPTION_WATCHER="1",
    )
    module = vars(ray_run)
    module.update(
        make_torch_trainer=module["TorchTrainer"], stale_reservation_released=contextlib.nullcontext
    )


if __name__ == "__main__":
    _, brake_file, restarts, *rest = sys.argv
    if restarts == "ray":
        leave_restarts_to_ray()
    sys.exit(main(rest, train=partial(train_slowly, Path(brake_file))))
