"""The lock of a search's directory: the process that runs the search holds it, however that ends."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from distft.errors import ConfigError

_LOCK_FILE = ".lock"
_LOCK_S = 1.0  # `is_being_run` holds it for microseconds


@contextlib.contextmanager
def only_search(directory: Path) -> Iterator[None]:
    """Raise `ConfigError` if another process runs the search in this directory."""
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory / _LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        give_up_s = time.monotonic() + _LOCK_S
        while not took_lock(descriptor, fcntl.LOCK_EX):
            if time.monotonic() > give_up_s:
                raise ConfigError(
                    f"Another `distft tune` runs the search in {directory}: wait for it, or choose another "
                    "run_dir."
                )
            time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)


def is_being_run(directory: Path) -> bool:
    """Whether a process runs the search in this directory; also where the lock cannot be read."""
    try:
        descriptor = os.open(directory / _LOCK_FILE, os.O_RDONLY)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        return not took_lock(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def took_lock(descriptor: int, kind: int) -> bool:
    """Whether this process has the lock of an open file now, without waiting for it."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
