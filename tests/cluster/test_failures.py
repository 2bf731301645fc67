"""Of several ranks that fail together, the cause is told, in the words of whoever foresaw it."""

from itertools import permutations
from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError
from ray.train.v2._internal.exceptions import WorkerHealthCheckTimeoutError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from distft.cluster.failures import FailureWatch, explain, root_cause
from distft.errors import (
    ConfigError,
    DataError,
    DistftError,
    LaunchError,
    Preempted,
    StorageError,
    SupersededError,
    TrainingError,
)
from distft.tracker import EVENTS_FILE, EventLog, read_lines
from distft.watch.verdict import HANG

LOST_PEER = TrainingError("RuntimeError: [pair.cc:553] Connection closed by peer [127.0.0.1]:3711")
ACCUSATION = TrainingError("rank 1 (node4, pid 12) has not answered for 12 s, in step 7, forward")
BY_DISTANCE = [
    DataError("a bad row"),
    ACCUSATION,
    ActorDiedError(),
    TrainingError("ValueError: a bug"),
    LOST_PEER,
]


@pytest.mark.parametrize("order", list(permutations(range(5))))
def test_the_cause_is_found_whatever_its_rank(order: tuple[int, ...]) -> None:
    for first in range(5):
        errors = {rank: BY_DISTANCE[index] for rank, index in enumerate(order) if index >= first}
        assert root_cause(errors).error is BY_DISTANCE[first]


@pytest.mark.parametrize(
    ("error", "told", "helps"),
    [
        (DataError("a bad row"), DataError("a bad row"), False),
        (ConfigError("a bad key"), ConfigError("a bad key"), False),
        (Preempted("stopped"), Preempted("stopped"), False),
        (TrainingError("no finite loss"), TrainingError("rank 3: no finite loss"), True),
        (TrainingError("rank 1: no finite loss"), TrainingError("rank 1: no finite loss"), True),
        (KeyError("x"), TrainingError("rank 3: KeyError: 'x'"), True),
        (
            WorkerHealthCheckTimeoutError("a wall of text"),
            LaunchError("rank 3 does not answer Ray: its process is stopped, or hangs in C."),
            True,
        ),
        (SupersededError("another start"), SupersededError("another start"), False),
        (StorageError("no space left"), StorageError("rank 3: no space left"), True),
    ],
)
def test_a_failure_keeps_its_kind_and_says_its_rank_where_that_tells_something(
    error: Exception, told: DistftError, helps: bool
) -> None:
    failure = root_cause({3: error})
    assert (type(failure.as_distft_error()), str(failure.as_distft_error())) == (type(told), str(told))
    assert failure.helps_if_tried_again is helps


def test_a_worker_that_died_has_a_short_obituary() -> None:
    message = str(explain(WorkerGroupError("a wall of text", {2: ActorDiedError()}), "2 workers"))
    assert message.startswith("rank 2 died")
    assert "\n" not in message
    assert "memory" in str(root_cause({0: OutOfMemoryError("a wall of text")}).as_distft_error())


def test_an_error_of_ours_comes_out_of_the_controller_unchanged() -> None:
    ours = DataError("a bad row")
    assert explain(ControllerError(ControllerError(ours)), "2 workers") is ours


def test_what_ray_says_of_another_process_is_cut_to_what_went_wrong() -> None:
    error = ControllerError(
        RuntimeError("ray::Worker.run\n  File x\nModuleNotFoundError: No module named 'a'")
    )
    told = explain(error, "2 workers")
    assert isinstance(told, LaunchError)
    assert str(told) == "Ray could not run 2 workers: RuntimeError: ModuleNotFoundError: No module named 'a'"


class _Mailbox:
    """Takes what a watch tells the driver."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.write = self.ended = self

    def remote(self, *arguments: str) -> None:
        self.told += arguments[1:]


def test_a_rank_that_was_seen_to_hang_is_the_fault_whoever_ray_saw_end(tmp_path: Path) -> None:
    """Once: of an earlier life nothing is told again."""
    about = {"reason": "silent", "step": 7, "phase": "forward", "silent_s": 12.0, "unmoved_s": 12.0}
    log = EventLog(tmp_path)
    log.write("start", step=0)
    log.write(HANG, rank=1, host="node4", pid=12, stack=["loop.py:173 _one_step"], **about)
    log.close()
    mailbox = _Mailbox()
    watch = FailureWatch(mailbox, max_failures=3, run_dir=str(tmp_path), checkpoints=str(tmp_path / "none"))
    watch.after_exception(None, {0: ActorDiedError()})
    assert "rank 1 (node4, pid 12) has not answered for 12.0 s, in step 7, forward" in mailbox.told[0]
    assert "loop.py:173 _one_step" in mailbox.told[0]
    log = EventLog(tmp_path)
    log.write("resume", step=5)
    log.close()
    watch.after_exception(None, {0: ActorDiedError()})
    first, second = (event for event in read_lines(tmp_path / EVENTS_FILE) if event["kind"] == "fault")
    assert (first["rank"], first["reason"].endswith("in step 7, forward")) == (1, True)
    assert (second["rank"], "died" in second["reason"]) == (0, True)
