"""Write a checkpoint for another number of ranks: `python tools/reshard.py CHECKPOINT TARGET --ranks N`."""

import sys

from distft.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["checkpoint", "reshard", *sys.argv[1:]]))
