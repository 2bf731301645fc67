"""The driver of a run on Ray: `python -m distft.cli.ray_driver CONFIG [KEY=VALUE]...`

The same as launch/ray_train.py, for directories without launch/.

If RAY_ADDRESS is not set, starts a Ray on this machine for the run. Relative paths are relative to
DISTFT_RUN_ROOT or, if it is not set, to the current directory: for a job, its copy of the submitted one.

Exit codes: 0 done, 2 the user's mistake, 75 stopped on request (SIGTERM, Ctrl-C) after saving, 130 stopped at
once by a second Ctrl-C, 1 any other failure.
"""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distft.cluster.worker import TrainFn


def main(arguments: Sequence[str], train: "TrainFn | None" = None) -> int:
    """Train as the arguments say, calling `train` in each worker; returns the exit code."""
    if not arguments or arguments[0] in {"-h", "--help"}:
        print(__doc__)
        return 0 if arguments else 2
    # Ray reads this when it is imported. Hides its long message about a lost worker; distft prints one line.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed")
    from distft.cli.main import report
    from distft.cluster.driver.driver import run_on_ray
    from distft.errors import DistftError

    try:
        run_on_ray(arguments[0], arguments[1:], environ=os.environ, train=train)
    except DistftError as error:
        report(error, rank=0)
        return error.exit_code
    except KeyboardInterrupt:
        print("Interrupted. Start the run again to resume from its last checkpoint.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
