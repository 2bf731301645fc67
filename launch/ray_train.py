"""Train on Ray: `ray job submit --working-dir . -- python launch/ray_train.py CONFIG [KEY=VALUE]...`

The same as `python -m distft.cli.ray_driver`, whose --help explains exit codes and relative paths.
"""

import sys

from distft.cli.ray_driver import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
