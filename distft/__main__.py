"""`python -m distft` and the `distft` command."""

import sys

from distft.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
