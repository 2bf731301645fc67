"""Train on Ray: `ray job submit --working-dir . -- python launch/ray_train.py CONFIG [key=value ...]`.

Without a cluster (`RAY_ADDRESS` is not set) a Ray of this machine is started for the run.
"""

import os
import sys


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0 done, 2 the user's mistake, 75 asked to stop and saved, 1 any other failure."""
    if not arguments or arguments[0] in {"-h", "--help"}:
        print(__doc__)
        return 0 if arguments else 2
    from distft.cluster.ray_job import run_on_ray
    from distft.errors import DistftError

    try:
        run_on_ray(arguments[0], arguments[1:], environ=os.environ)
    except DistftError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
