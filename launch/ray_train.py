"""Train on Ray: `ray job submit --working-dir . -- python launch/ray_train.py CONFIG [KEY=VALUE]...`

The same as `python -m distft.cli.ray_driver`; its --help has the exit codes, and where relative paths start.
"""

import sys

from distft.cli.ray_driver import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
