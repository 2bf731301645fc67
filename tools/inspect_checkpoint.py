"""Show the content of a checkpoint: `python tools/inspect_checkpoint.py CHECKPOINT [--json]`."""

import sys

from distft.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["checkpoint", "inspect", *sys.argv[1:]]))
