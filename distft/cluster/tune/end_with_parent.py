"""`python -m distft.cluster.tune.end_with_parent ARGUMENTS...` becomes `python ARGUMENTS...`.

On Linux the kernel then sends it SIGTERM when the process that started it dies, so no run outlives its trial.
"""

import ctypes
import os
import signal
import sys

_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG


def main(arguments: list[str]) -> None:
    """Replace this process; `arguments` begin with the id of the parent."""
    parent, *rest = arguments
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)
        if os.getppid() != int(parent):  # it died before the line above
            sys.exit(1)
    os.execv(sys.executable, [sys.executable, *rest])


if __name__ == "__main__":
    main(sys.argv[1:])
