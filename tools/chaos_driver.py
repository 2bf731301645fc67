"""launch/ray_train.py for chaos.py: `python chaos_driver.py BRAKE CONFIG [KEY=VALUE]...`

The run goes slowly while the file BRAKE is there.
"""

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


if __name__ == "__main__":
    sys.exit(main(sys.argv[2:], train=partial(train_slowly, Path(sys.argv[1]))))
