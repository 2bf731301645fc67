"""Room that Ray still keeps for a driver that was killed: its next driver gives it back.

An elastic run reserves what its workers need. A driver that ends cancels that; for one that was killed Ray
keeps it 180 s, for which the run, submitted again, would find a full cluster.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import ray

_NAME = "AutoscalingCoordinator"  # Ray's actor, and its namespace
_FILE = ".ray_reservation"  # in the run's directory: under which name this run reserves
_ANSWER_WITHIN_S = 10.0


def remember_reservation(run_dir: str) -> None:
    """Note under which name the run of this worker reserves room."""
    # Ray tells its runs' ids nowhere else.
    from ray.train.v2._internal.execution.context import get_train_context

    run_id = get_train_context().train_run_context.run_id
    with contextlib.suppress(OSError):  # then a driver that is killed costs 180 s
        Path(run_dir).mkdir(parents=True, exist_ok=True)
        (Path(run_dir) / _FILE).write_text(f"train-{run_id}")


@contextlib.contextmanager
def reservation_of(run_dir: str) -> Iterator[None]:
    """Cancel what the last driver of the run reserved. A driver that leaves the block was not killed."""
    path = Path(run_dir) / _FILE
    if path.exists():
        with contextlib.suppress(ValueError, ray.exceptions.RayError):  # no such actor: nothing is reserved
            coordinator = ray.get_actor(_NAME, namespace=_NAME)
            ray.get(
                coordinator.cancel_request.remote(requester_id=path.read_text()), timeout=_ANSWER_WITHIN_S
            )
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # Ray Train cancels by itself
