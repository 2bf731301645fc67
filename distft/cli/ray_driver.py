"""The driver of a run on Ray: `python -m distft.cli.ray_driver CONFIG [KEY=VALUE]...`

The same as launch/ray_train.py, for directories that have no launch/.

Without a cluster (RAY_ADDRESS is not set) a Ray of this machine is started for the run. Relative paths start
in the directory DISTFT_RUN_ROOT; without it here, and for a job in its copy of what was submitted.

Exit codes: 0 done, 2 the user's mistake, 75 stopped as asked with its state saved, 1 any other failure.
"""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distft.cluster.worker import Train


def main(arguments: Sequence[str], train: "Train | None" = None) -> int:
    """Train as the arguments say, with `train` in each worker; returns the exit code."""
    if not arguments or arguments[0] in {"-h", "--help"}:
        print(__doc__)
        return 0 if arguments else 2
    # Ray reads this when it is imported. Its account of a lost worker is a wall of text; ours is one line.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed")
    from distft.cli.main import report
    from distft.cluster.ray_job import run_on_ray
    from distft.errors import DistftError
    from distft.run.train import run_training

    try:
        run_on_ray(arguments[0], arguments[1:], environ=os.environ, train=train or run_training)
    except DistftError as error:
        report(error, rank=0)
        return error.exit_code
    except KeyboardInterrupt:
        print("Interrupted. Started again, the run goes on from its last checkpoint.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
