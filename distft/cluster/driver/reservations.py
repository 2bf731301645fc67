"""Releases the resources that Ray keeps reserved for a driver that was killed.

Ray Train reserves the resources of an elastic run, and cancels the reservation when the run's driver ends. If
the driver is killed, Ray keeps it for 180 s, and the same run, submitted again, finds the cluster full.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import ray

from distft.cluster.ray_internals import cancel_reservation, reservation_name

_FILE = ".ray_reservation"  # in run_dir: the name of the reservation
_CANCEL_TIMEOUT_S = 10.0


def record_reservation(run_dir: str) -> None:
    """Write the name of this worker's reservation into `run_dir`."""
    name = reservation_name()
    with contextlib.suppress(OSError):  # without the file, a killed driver costs 180 s
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        (Path(run_dir) / _FILE).write_text(name)


@contextlib.contextmanager
def stale_reservation_released(run_dir: str) -> Iterator[None]:
    """Cancel the reservation of a killed driver of this run; delete this driver's record after the block."""
    path = Path(run_dir) / _FILE
    if path.exists():
        with contextlib.suppress(ValueError, ray.exceptions.RayError):  # nothing is reserved
            cancel_reservation(path.read_text(), timeout_s=_CANCEL_TIMEOUT_S)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # Ray Train cancels by itself
